"""What do our processes log, and what is left of it when a run is over?"""

import contextlib
import logging
import os
import re
import shutil
import time
from pathlib import Path

from serving.config import ConfigError, LogConfig

_PLACE_FILE = "keep-logs-at"  # in the run's folder: whoever removes that has to know
_ERROR = re.compile(r"^\S*?(?:\w\.)*(\w*(?:Error|Exception|Interrupt|Exit)\b.*)$")
_PREFIX = re.compile(r"^\(\w+ pid=\d+\)\s*(?:[A-Z]+ [\d-]+ [\d:]+ (?:\[[^\]]+\] )?)?")
_FORMAT = "%(levelname)s %(asctime)s %(name)s: %(message)s"


def use_log_level(config: LogConfig) -> None:
    """Have this process log from this level on; vLLM, too, if it is not imported yet."""
    level = config.level.upper()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", level)
    logger = logging.getLogger("serving")
    logger.setLevel(level)
    if not logger.handlers:  # else only warnings would show: nobody sets the root logger up
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(_FORMAT))
        logger.addHandler(handler)
        logger.propagate = False


def last_error(text: str) -> str:
    """Return the last exception in `text`, else its last line."""
    lines = [line for each in text.splitlines() if (line := without_prefix(each))]
    errors = [match[1] for line in lines if (match := _ERROR.match(line))]
    return (errors or lines or [""])[-1]


def start_failure(status: str, message: str) -> str:
    """Return why a replica could not start, by what Ray Serve says; "" if none has failed to.

    Serve would try again several times for each replica. But the same engine on the same machine
    fails again, minutes later.
    """
    failed = status == "DEPLOY_FAILED" or "failed to start" in message
    return last_error(message) or "no reason given" if failed else ""


def is_error(line: str) -> bool:
    """Whether a line of a log names an exception."""
    return _ERROR.match(without_prefix(line)) is not None


def without_prefix(line: str) -> str:
    """Return a line without what Ray or vLLM put in front of it."""
    return _PREFIX.sub("", line).strip()


def place_for_logs(config: LogConfig, run: Path) -> Path | None:
    """Note in a run's folder where its logs are to be kept, and return that; None for nowhere.

    Raises `ConfigError` if nothing can be written there.
    """
    if config.dir is None:
        return None
    place = config.dir / time.strftime(f"run-%Y%m%d-%H%M%S-{os.getpid()}")
    try:
        config.dir.mkdir(parents=True, exist_ok=True)
        if not os.access(config.dir, os.W_OK | os.X_OK):
            raise PermissionError("it is not writable")
    except OSError as error:
        raise ConfigError(f"log.dir: {config.dir}: {error.strerror or error}") from None
    (run / _PLACE_FILE).write_text(str(place))
    return place


def logs_of(run: Path) -> Path:
    """Return the folder where a private Ray has the logs of all its processes."""
    return run / "ray" / "session_latest" / "logs"


def keep_logs(run: Path) -> None:
    """Copy a run's logs to where they are to be kept, once; what cannot be copied is left out."""
    note = run / _PLACE_FILE
    with contextlib.suppress(OSError, shutil.Error):
        place = Path(note.read_text())
        note.unlink()
        shutil.copytree(logs_of(run), place, ignore_dangling_symlinks=True, dirs_exist_ok=True)
        place.chmod(0o700)  # Ray's are open to all
