"""Who the client is: API keys, tenants, and what each may use.

What is decided here: whether a key is known and its tenant within its limits. Asked by the
request path before anything else.
"""
