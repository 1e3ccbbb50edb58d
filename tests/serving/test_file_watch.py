"""A watched file may hold anything: its last valid content is used, and watching goes on."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from serving import file_watch
from serving.config import ConfigError, read
from serving.file_watch import FileWatch
from serving.gateway.tenants.keys import read_keys

VALID = "applications:\n- args: {replicas: 3}\n"


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_watch, "_INTERVAL_S", 0.02)


@pytest.mark.parametrize(
    "content",
    [
        b"applications:\n- args: hello\n",
        b"applications:\n- args: [1, 2]\n",
        b"applications:\n- args: 5\n",
        b"applications:\n- hello\n",
        b"applications: hello\n",
        b"applications: []\n",
        b"- 1\n",
        b"",
        b"\xff\xfe\x00",
        b"applications:\n- args: {replicas: [}\n",
        b"applications:\n- args: {1: 2}\n",
        b"applications:\n- args: {auth: hello, providers: hello, engine: 3}\n",
        b"applications:\n- args: {providers: [3, {keys: 4}, {keys: [5]}]}\n",
    ],
)
async def test_a_broken_config_is_shown_and_the_next_one_used(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(VALID)
    used: list[Any] = []
    watch = FileWatch(path, read, lambda config: used.append(config.replicas))
    try:
        path.write_bytes(content)
        with pytest.raises(ConfigError):
            read(path)
        await until(lambda: watch.error)
        assert not used
        await asyncio.sleep(0.1)
        assert [record.levelno for record in caplog.records] == [logging.ERROR]
        path.write_text(VALID.replace("3", "4"))
        await until(lambda: used)
        assert (used, watch.state().error, watch.state().num_reloads) == ([4], None, 1)
    finally:
        watch.close()


def test_a_home_of_nobody_is_a_path_like_others(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("applications:\n- args: {auth: {keys_file: ~nobody-here/keys}}\n")
    assert read(path).auth.keys_file == tmp_path / "~nobody-here/keys"


@pytest.mark.parametrize(
    "content", [b'{"keys": [{"id": "\xff"}]}', b"\xff", b"", b"[]", b'{"keys": 3}']
)
def test_a_broken_keys_file_is_a_mistake_of_the_users(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not a keys file"):
        read_keys(path)


@pytest.mark.parametrize("part", ["read", "apply"])
async def test_a_fault_of_the_reader_does_not_end_the_watch(
    part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "file"
    path.write_text("1")
    used: list[str] = []

    def read_text(path: Path) -> str:
        if part == "read" and (text := path.read_text()) == "bad":
            raise KeyError(text)
        return path.read_text()

    def apply(text: str) -> None:
        if part == "apply" and text == "bad":
            raise KeyError(text)
        used.append(text)

    watch = FileWatch(path, read_text, apply)
    try:
        path.write_text("bad")
        await until(lambda: watch.error)
        assert watch.state().error == "KeyError: 'bad'"
        path.write_text("good")
        await until(lambda: used == ["good"])
        assert watch.state().error is None
        assert len([record for record in caplog.records if record.exc_info]) == 1
    finally:
        watch.close()
