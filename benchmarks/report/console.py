"""How wide are the tables that benchmarks print?"""

import os
import sys

from rich.console import Console

_FILE_WIDTH = 200  # columns; rich takes 80 for what is no terminal, too few for a table of policies


def make_console() -> Console:
    """Return a console as wide as the terminal, or as a file may be."""
    is_known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if is_known else _FILE_WIDTH)
