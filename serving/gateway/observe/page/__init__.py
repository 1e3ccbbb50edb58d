"""The live page at `/headway/`: what the gateway does, for people.

Nothing is decided here. The page is a few files without a build step, and asks a feed of frames.
"""
