"""What is left of a run's logs."""

import logging
import os
import re
import stat

import pytest

from serving.cluster.logs import keep_logs, logs_of, place_for_logs, use_log_level
from serving.cluster.run.run_folder import run_folder
from serving.config import ConfigError, LogConfig


def write_logs(run):
    """Logs as Ray has them: behind a link, with a link to nothing among them."""
    logs = run / "ray" / "session_1" / "logs"
    (logs / "serve").mkdir(parents=True)
    (logs / "worker-1.err").write_text("alas")
    (logs / "serve" / "replica.log").write_text("hello")
    (logs / "gone").symlink_to(run / "nowhere")
    (run / "ray" / "session_latest").symlink_to(logs.parent)
    return logs_of(run)


def test_they_are_kept_when_the_run_is_over(tmp_path):
    with run_folder() as run:
        place = place_for_logs(LogConfig(dir=tmp_path / "new" / "logs"), run)
        write_logs(run)
        assert not place.exists()
    assert not run.exists()
    assert place.parent == tmp_path / "new" / "logs"
    assert re.fullmatch(rf"run-\d{{8}}-\d{{6}}-{os.getpid()}", place.name)
    assert (place / "worker-1.err").read_text() == "alas"
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert (place / "serve" / "replica.log").read_text() == "hello"


def test_nothing_is_kept_where_no_folder_is_given(tmp_path):
    with run_folder() as run:
        assert place_for_logs(LogConfig(), run) is None
        write_logs(run)
        keep_logs(run)
        assert {each.name for each in run.iterdir()} == {"owner", "proxy", "tmp", "ray"}


def test_they_are_copied_once(tmp_path):
    place = place_for_logs(LogConfig(dir=tmp_path / "logs"), tmp_path)
    log = write_logs(tmp_path) / "worker-1.err"
    keep_logs(tmp_path)
    log.write_text("later")
    keep_logs(tmp_path)
    assert (place / "worker-1.err").read_text() == "alas"


def test_a_run_that_ends_before_ray_has_started_has_none(tmp_path):
    place = place_for_logs(LogConfig(dir=tmp_path), tmp_path)
    keep_logs(tmp_path)
    assert not place.exists()


def test_a_folder_that_cannot_be_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"log.dir: .*file/logs: Not a directory"):
        place_for_logs(LogConfig(dir=tmp_path / "file" / "logs"), tmp_path)


def test_the_level_is_ours_and_vllms(monkeypatch):
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    logger = logging.getLogger("serving")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logger.level)
    use_log_level(LogConfig(level="debug"))
    use_log_level(LogConfig(level="debug"))
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert logging.getLogger("serving.gateway").getEffectiveLevel() == logging.DEBUG
    assert len(logger.handlers) == 1
    del os.environ["VLLM_LOGGING_LEVEL"]  # of which monkeypatch knows nothing
