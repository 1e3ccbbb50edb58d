"""A model is looked up, and downloaded, before anything starts; mistakes take one line."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from rich.console import Console

from serving.cli.commands import weights
from serving.config import ConfigError, parse
from serving.planning import hub
from tests.serving.planning.fake_hub import BROKEN, GATED, OPEN, SLOW, TOKEN, FakeHub, fake_hub


@pytest.fixture(scope="module")
def the_hub() -> Iterator[FakeHub]:
    with fake_hub() as running:
        yield running


@pytest.fixture
def cache(the_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache; the hub is ours, and nobody has logged in."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "VLLM_USE_MODELSCOPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", the_hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    # What was read when the package was imported, for this process alone.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    return tmp_path / "hub"


def look_up(model: str, *, must_be_there: bool = True, **args) -> weights.Weights:
    return weights.look_up(
        parse({"model": model, "engine": {"args": args}}), must_be_there=must_be_there
    )


def fetch(found: weights.Weights, model: str) -> str:
    console = Console(width=200, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as captured:
        weights.fetch(found, parse({"model": model}), console)
    return captured.get()


def test_its_size_is_known_before_it_is_downloaded(cache: Path) -> None:
    found = look_up(OPEN)
    assert found.size is not None
    assert found.size.num_weight_bytes == 300_000
    assert (found.size.max_model_len, found.size.is_guess) == (2048, False)
    assert found.size.num_kv_bytes_per_token == 2 * 2 * 4 * 16 * 2


def test_all_that_vllm_loads_is_downloaded_once(cache: Path, the_hub: FakeHub) -> None:
    found = look_up(OPEN)
    assert "of 0.00 GB" in fetch(found, OPEN)
    snapshot = cache / "models--acme--open" / "snapshots"
    names = {path.name for path in snapshot.rglob("*") if path.is_file()}
    assert names == {"config.json", "tokenizer.json", "model.safetensors"}
    assert hub.cached_models() == [OPEN]
    again = look_up(OPEN)
    assert again.size is None  # the files themselves tell
    number = len(the_hub.paths)
    assert fetch(again, OPEN) == ""
    assert len(the_hub.paths) == number


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        ("acme/wrong", {}, "the Hugging Face hub has no acme/wrong, or it is private: .*HF_TOKEN"),
        (GATED, {}, r"acme/gated is gated: accept its terms at http\S+, and set HF_TOKEN to a tok"),
        (OPEN, {"revision": "v9"}, "engine.args.revision: acme/open has no v9"),
        (BROKEN, {}, "acme/broken is not in the cache, and the hub cannot be reached"),
        ("no id", {}, "'no id' is neither a folder here nor an id of the Hugging Face hub"),
        ("/no/where", {}, "there is no folder /no/where"),
    ],
)
def test_mistakes(cache: Path, model: str, args: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        look_up(model, **args)
    assert "\n" not in str(raised.value)


def test_a_token_opens_what_is_gated(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ConfigError, match=r"make HF_TOKEN a token of that account"):
        look_up(GATED)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    found = look_up(GATED)
    fetch(found, GATED)
    assert hub.is_cached(GATED, {})


def test_without_a_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(look_up(OPEN), OPEN)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="not in the cache, and the hub cannot be reached"):
        look_up(GATED)
    assert "was not looked up" in look_up(GATED, must_be_there=False).note
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # put back afterwards
    assert "is in the cache" in look_up(OPEN).note
    assert hub.is_offline()  # for engines, too
    assert look_up(OPEN).note == ""
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE forbids to ask for it"):
        look_up(GATED)


def test_what_is_no_model_of_the_hub_is_not_looked_up(
    cache: Path, the_hub: FakeHub, tmp_path: Path
) -> None:
    number = len(the_hub.paths)
    for model in (str(tmp_path), "s3://bucket/model", "acme/open:Q4_K_M"):
        assert look_up(model) == weights.Weights()
    emulated = parse({"model": OPEN, "engine": "emulated"})
    assert weights.look_up(emulated, must_be_there=True) == weights.Weights()
    assert len(the_hub.paths) == number


def test_an_interrupted_download_is_ended(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = look_up(SLOW).found
    assert found is not None
    started = []

    class Stopped(KeyboardInterrupt):
        pass

    popen = subprocess.Popen

    def start(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    def stop(done: int, total: int) -> None:
        assert (done <= total, total > 300_000) == (True, True)
        raise Stopped

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(Stopped):
        hub.download(found, {}, stop)
    assert started[0].poll() is not None
