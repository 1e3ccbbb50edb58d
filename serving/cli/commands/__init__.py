"""The commands that need no running service: `serve`, `plan`, `profile`, `key`, `config`, `whatif`.

What is decided here: which options there are, and what they set. Called by `serving.cli.main`.
"""
