"""OpenAI's Batch API: files of requests, answered in the gaps that other requests leave.

What is decided here: which gateway runs a batch, when each of its requests is sent, and what is
kept of the answers. Asked by clients through the gateway's routes; it asks the request path.
"""
