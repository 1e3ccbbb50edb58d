"""The hold queue: who waits, in which order, and within which bounds.

What is decided here: who is next, who must make room, who has waited too long. Called by
`router.scheduling`, which takes requests out, and by the router, which puts them in.
"""
