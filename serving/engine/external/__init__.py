"""Engines that somebody else runs: `vllm serve`, or any server that speaks OpenAI's API.

What is decided here: how such a server is asked, what its metrics tell of its scheduler, and how
another one goes on with a reply that it has begun. The gateway's `Engines` has one as it has a
connection to a replica of ours: `ExternalServer` takes the same frames and tells the same events.
"""
