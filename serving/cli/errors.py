"""How do errors that a user can mend look on the command line?"""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from serving.capacity.launch import MeasureError
from serving.config import ConfigError
from serving.gateway.http.endpoint import StartError
from serving.planning.bundled_model import BundledModelError

_FAILED = 1
_BAD_CONFIG = 2


@contextmanager
def errors_in_one_line(*others: type[Exception], verbose: bool = False) -> Iterator[None]:
    """Print an expected error as one line on stderr and exit; first its traceback if `verbose`.

    The exit code is 1 if something failed, 2 if the user asked for what cannot be. `others` are
    expected too, and count as the latter.
    """
    failures = (BundledModelError, StartError, MeasureError)
    expected: tuple[type[Exception], ...] = (ConfigError, *failures, *others)
    try:
        yield
    except expected as error:
        if verbose:
            traceback.print_exc()
        print(f"headway: {error}", file=sys.stderr)
        failed = isinstance(error, failures)
        raise typer.Exit(_FAILED if failed else _BAD_CONFIG) from None
