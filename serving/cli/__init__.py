"""The command line: `headway serve`, `plan`, `key`, `profile`, `whatif`.

What is decided here: how options and files become one configuration, and how progress, errors
and Ctrl-C look to a person. Called by people and by `make`.
"""
