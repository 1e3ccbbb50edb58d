"""The file of keys, and what a new key is: nothing is lost, or readable by others, or half."""

import datetime
import hashlib
import os
import stat
from pathlib import Path

import pytest

from serving.config import ConfigError
from serving.gateway.tenants.keys import Key, KeyRing, KeysFile, make_key, read_keys

NOW = datetime.datetime.now(datetime.UTC)


def entry(key_id: str = "0123456789ab") -> Key:
    return Key(id=key_id, tenant="acme", sha256="0" * 64, created=NOW)


def save(path, *keys: Key) -> None:
    with KeysFile(path) as file:
        file.keys += keys
        file.save()


class TestNewKeys:
    def test_know_their_text_by_its_hash_alone(self):
        text, key = make_key("acme")
        assert key.id == text.split("-")[1]
        assert key.sha256 == hashlib.sha256(text.encode()).hexdigest()
        assert (key.tenant, key.admin, key.expires) == ("acme", False, None)
        now = datetime.datetime.now(datetime.UTC)
        assert abs(key.created - now) < datetime.timedelta(minutes=5)
        assert key.created.microsecond == 0
        assert key.created.utcoffset() == datetime.timedelta(0)
        assert make_key("acme", admin=True, expires=NOW)[1].expires == NOW
        assert make_key("acme", admin=True)[1].admin

    def test_are_never_the_same(self):
        made = [make_key("acme") for _ in range(50)]
        assert len({key.id for _, key in made}) == len({text[16:] for text, _ in made}) == 50

    @pytest.mark.parametrize("tenant", ["a", "a" * 64, "A.b_c@d-9"])
    def test_are_for_tenants_with_a_plain_name(self, tenant):
        assert make_key(tenant)[1].tenant == tenant

    @pytest.mark.parametrize("tenant", ["", "a" * 65, "a/b", "a b", "a\n"])
    def test_and_for_no_others(self, tenant):
        with pytest.raises(ConfigError) as error:
            make_key(tenant)
        assert str(error.value) == (
            f"{tenant!r}: a tenant's name is 1 to 64 letters, digits or any of _.@-"
        )


class TestRing:
    def test_tells_how_many_it_knows(self):
        assert len(KeyRing([])) == 0
        assert len(KeyRing([entry("a"), entry("b")])) == 2

    def test_takes_any_text(self):
        assert KeyRing([entry()]).find("hw-\udcff", NOW) is None


class TestFile:
    def test_is_for_its_owner_and_for_people(self, tmp_path):
        path = tmp_path / "keys.json"
        save(path, entry())
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        text = path.read_text()
        assert text.startswith('{\n "keys": [\n')
        assert text.endswith("}\n")
        assert read_keys(path) == [entry()]
        assert sorted(each.name for each in tmp_path.iterdir()) == ["keys.json", "keys.json.lock"]

    def test_keeps_what_others_wrote(self, tmp_path):
        path = tmp_path / "keys.json"
        for name in "abc":
            save(path, entry(name))
        assert [key.id for key in read_keys(path)] == ["a", "b", "c"]

    def test_stays_as_it_was_where_it_cannot_be_written(self, tmp_path, monkeypatch):
        path = tmp_path / "keys.json"
        save(path, entry("old"))

        def full(handle: int) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            save(path, entry("new"))
        assert [key.id for key in read_keys(path)] == ["old"]
        assert sorted(each.name for each in tmp_path.iterdir()) == ["keys.json", "keys.json.lock"]
        monkeypatch.undo()
        save(path, entry("new"))  # it is locked no more
        assert [key.id for key in read_keys(path)] == ["old", "new"]

    def test_is_on_the_disk_before_it_takes_the_others_place(self, tmp_path, monkeypatch):
        path = tmp_path / "keys.json"
        sizes: list[int] = []
        fsync = os.fsync

        def noting(handle: int) -> None:
            sizes.append(os.fstat(handle).st_size)
            assert not path.exists()
            # On the same disk, or it could not take the other's place at once.
            assert [name for name in os.listdir(tmp_path) if name.startswith(".keys.json.")]
            fsync(handle)

        monkeypatch.setattr(os, "fsync", noting)
        save(path, entry())
        assert sizes == [path.stat().st_size]

    def test_is_there_even_if_that_was_all_that_could_be_done(self, tmp_path, monkeypatch):
        path = tmp_path / "keys.json"
        replace = Path.replace

        def interrupted(self: Path, target: Path) -> None:
            replace(self, target)
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(path, entry())
        assert read_keys(path) == [entry()]

    def test_is_empty_before_it_is_read(self, tmp_path):
        assert KeysFile(tmp_path / "keys.json").keys == []

    def test_is_locked_only_while_it_is_being_changed(self, tmp_path):
        path = tmp_path / "keys.json"
        path.write_text("{")
        file = KeysFile(path)
        with pytest.raises(ConfigError), file:
            pass
        assert not file._lock.is_locked
        path.write_text('{"keys": []}')
        with file:
            assert file._lock.is_locked
        assert not file._lock.is_locked
        assert (tmp_path / "keys.json.lock").exists()

    def test_that_is_missing_says_how_to_make_one(self, tmp_path):
        with pytest.raises(ConfigError) as error:
            read_keys(tmp_path / "none.json")
        assert str(error.value) == (
            f"auth.keys_file: {tmp_path}/none.json cannot be read: No such file or directory "
            "(`headway key create` makes one)"
        )

    def test_that_is_none_says_so(self, tmp_path):
        (tmp_path / "keys.json").write_text("[]")
        with pytest.raises(ConfigError) as error:
            read_keys(tmp_path / "keys.json")
        assert str(error.value).startswith(
            f"auth.keys_file: {tmp_path}/keys.json is not a keys file: Expected `object`"
        )
