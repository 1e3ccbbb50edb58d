"""The commands that ask a running service: `status`, `top`, `explain`, `bench`, `drain`.

Nothing is decided here: what gateways answer is shown, what admins want is passed on. Called by
`serving.cli.main`.
"""
