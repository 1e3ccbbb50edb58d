"""A launch while it goes on: how far engines have got, what has stopped, which models have changed.

Called by `serving.cli.launch` alone. On a Ray that is joined also what becomes of its nodes.
"""
