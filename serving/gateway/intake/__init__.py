"""What a client asks for: from a body and its headers to a `Request`.

What is decided here: how fields are read (as vLLM reads them), which model is meant, how large the
request is, and whether it is too large for any model. Asked by the request path before anything
is booked.
"""
