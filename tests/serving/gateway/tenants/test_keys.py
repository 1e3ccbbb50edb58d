"""`headway key`: prints a key once, stores its hash."""

import datetime
import hashlib
import re
import threading
from typing import Any

import pytest
from typer.testing import CliRunner

from serving.cli.config_file import load_config_file
from serving.cli.launch import _ready_text
from serving.cli.main import main
from serving.config import ConfigError
from serving.gateway.tenants.keys import KeyRing, KeysFile, make_key, read_keys
from serving.planning.hardware import detect_hardware
from serving.planning.service.service_plan import plan_service


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["key", *arguments])


def test_create_list_revoke(tmp_path):
    path = tmp_path / "keys.json"
    made = run("create", "acme", "--file", str(path), "--admin", "--expires-days", "30")
    assert made.exit_code == 0
    text = made.stdout.strip()
    assert re.fullmatch(r"hw-[0-9a-f]{12}-[0-9a-f]{64}", text)
    (key,) = read_keys(path)
    assert (key.tenant, key.admin) == ("acme", True)
    assert (key.expires - key.created).days == 30
    now = datetime.datetime.now(datetime.UTC)
    assert KeyRing([key]).find(text, now) == key
    run("create", "acme", "--file", str(path))
    listed = run("list", "--file", str(path)).stdout
    assert listed.count("acme") == 2
    assert key.id in listed
    assert text not in listed
    assert run("revoke", key.id, "--file", str(path)).exit_code == 0
    assert [left.id for left in read_keys(path)] != [key.id]
    assert len(read_keys(path)) == 1


class TestWhoHoldsAKey:
    NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)

    @pytest.fixture
    def keys(self) -> dict[str, str]:
        """The text of two tenants' keys, by tenant; `self.ring` knows both."""
        made = {tenant: make_key(tenant, admin=tenant == "ops") for tenant in ("acme", "ops")}
        self.ring = KeyRing(key for _, key in made.values())
        return {tenant: text for tenant, (text, _) in made.items()}

    def find(self, text: str):
        return self.ring.find(text, self.NOW)

    def test_only_the_whole_key_will_do(self, keys):
        text = keys["acme"]
        assert self.find(text).tenant == "acme"
        key_id, _, secret = text.rpartition("-")
        other = keys["ops"].rpartition("-")[2]
        for wrong in (
            f"{key_id}-{other}",  # the id of one, the secret of another
            f"{key_id}-{'0' * 64}",
            f"{key_id}-{secret[:-1]}{'0' if secret[-1] != '0' else '1'}",
            f"{key_id}-{'0' if secret[0] != '0' else '1'}{secret[1:]}",
            f"{key_id}-{secret[:-1]}",
            f"{key_id}-{secret}0",
            f"{key_id}-",
            f"{key_id}-{secret.upper()}",
            f" {text}",
            f"{text}\n",
            f"hw-{'0' * 12}-{secret}",
            secret,
            key_id,
            "",
            hashlib.sha256(text.encode()).hexdigest(),  # what is stored
        ):
            assert self.find(wrong) is None, wrong

    def test_nobody_holds_a_key_where_there_is_none(self, keys):
        assert KeyRing([]).find(keys["acme"], self.NOW) is None
        assert KeyRing([]).find("", self.NOW) is None

    def test_each_is_its_own_tenants(self, keys):
        assert {
            name: (self.find(text).tenant, self.find(text).admin) for name, text in keys.items()
        } == {
            "acme": ("acme", False),
            "ops": ("ops", True),
        }

    @pytest.mark.parametrize(
        ("seconds_left", "is_known"), [(3600, True), (1, True), (0, False), (-1, False)]
    )
    def test_until_it_expires(self, seconds_left, is_known):
        expires = self.NOW + datetime.timedelta(seconds=seconds_left)
        text, key = make_key("acme", expires=expires)
        ring = KeyRing([key])
        assert (ring.find(text, self.NOW) is not None) is is_known
        assert ring.find(text, expires) is None
        eternal_text, eternal = make_key("acme")
        assert KeyRing([eternal]).find(eternal_text, self.NOW) == eternal


def test_mistakes_take_one_line(tmp_path):
    path = tmp_path / "keys.json"
    assert "cannot be read" in run("list", "--file", str(path)).stderr
    bad_name = run("create", "a/b", "--file", str(path))
    assert bad_name.exit_code == 2
    assert len(bad_name.stderr.splitlines()) == 1
    unknown = run("revoke", "none", "--file", str(path))
    assert unknown.exit_code == 2
    assert "headway key list" in unknown.stderr


def test_writers_at_the_same_time_lose_no_key(tmp_path):
    path = tmp_path / "keys.json"

    def write() -> None:
        for _ in range(5):
            with KeysFile(path) as file:
                file.keys.append(make_key("acme")[1])
                file.save()

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_keys(path)) == 20


@pytest.mark.parametrize(
    "text", ["", "[]", '{"keys": [{"id": 1}]}', '{"keys": [], "more": 1}', "\xff"]
)
def test_what_is_no_keys_file_is_refused(tmp_path, text):
    path = tmp_path / "keys.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"auth\.keys_file"):
        read_keys(path)


def _ready(**options) -> str:
    file = load_config_file(None, options)
    plan = plan_service(file.config, detect_hardware())
    return _ready_text(file, plan, "http://127.0.0.1:8000", 1.0, 0)


def test_open_to_the_network_without_keys_is_a_warning(tmp_path):
    assert "WARNING" in _ready(host="0.0.0.0")
    assert "WARNING" in _ready(host="192.0.2.1")
    assert "WARNING" not in _ready(host="127.0.0.1")
    keys = {"auth.keys_file": str(tmp_path / "keys.json")}
    assert "WARNING" not in _ready(host="0.0.0.0", **keys)


def test_the_keys_file_is_found_beside_the_config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "applications:\n"
        "  - import_path: serving.cluster.application:build\n"
        "    args: {auth: {keys_file: keys.json}}\n"
    )
    config = load_config_file(path, {}).config
    assert config.auth.keys_file == tmp_path / "keys.json"
    assert config.watch_file == path
