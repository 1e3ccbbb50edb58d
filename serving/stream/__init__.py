"""The connection between one gateway and one engine: frames, both ends, what a request uses.

What is decided here: what travels together in one write, and when an engine must wait for a
slow client. The gateway holds the client's end, an engine's replica the server's.
"""
