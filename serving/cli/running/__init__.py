"""The commands that ask a running service: `status`, `top`, `explain`, `bench`.

Nothing is decided here: what gateways answer is shown. Called by `serving.cli.main`.
"""
