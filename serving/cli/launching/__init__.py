"""A launch while it goes on: how far engines have got, what has stopped, which models have changed.

Called by `serving.cli.launch` alone.
"""
