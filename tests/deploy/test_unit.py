"""The unit file is one that systemd takes, and its numbers are those of the code."""

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path

from serving.cli import errors
from serving.config import EngineConfig

UNIT = Path(__file__).parents[2] / "deploy/service/headway.service"


def service() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # systemd minds the case
    parser.read_string(UNIT.read_text())
    return parser["Service"]


def test_a_stop_goes_to_the_launcher_alone_and_has_time_for_a_drain() -> None:
    unit = service()
    assert (unit["KillMode"], unit["KillSignal"]) == ("mixed", "SIGTERM")
    assert unit.getint("TimeoutStopSec") >= EngineConfig().drain_timeout_s + 30


def test_it_serves_as_the_command_line_does() -> None:
    unit = service()
    program, command, path = shlex.split(unit["ExecStart"])
    assert Path(program).name == "headway"
    assert (command, Path(path).suffix) == ("serve", ".yaml")
    assert Path(program).is_relative_to(unit["WorkingDirectory"])


def test_only_a_bad_configuration_is_not_tried_again() -> None:
    unit = service()
    assert unit["Restart"] == "on-failure"
    assert unit.getint("RestartPreventExitStatus") == errors._BAD_CONFIG


def test_an_engine_that_runs_out_of_memory_does_not_end_the_service() -> None:
    assert service()["OOMPolicy"] == "continue"


def test_systemd_takes_it(tmp_path: Path) -> None:
    """Where systemd is; its check wants the program and the user to exist."""
    copy = tmp_path / UNIT.name
    replaced = {"ExecStart": "/bin/true", "WorkingDirectory": "/", "User": "root", "Group": "root"}
    lines = UNIT.read_text().splitlines()
    for i, line in enumerate(lines):
        if (key := line.partition("=")[0]) in replaced:
            lines[i] = f"{key}={replaced[key]}"
    copy.write_text("\n".join(lines))
    assert len(lines) > 30
    if (analyze := shutil.which("systemd-analyze")) is not None:
        result = subprocess.run([analyze, "verify", str(copy)], capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
