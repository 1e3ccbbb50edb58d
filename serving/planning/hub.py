"""Does the Hugging Face hub have this model for us, how large is it, and is it all in the cache?

Asked before anything starts: a wrong name, a missing token or no network shows at once, and
engines find all files in the cache, which one download with a progress bar has filled. The hub is
the one that `HF_ENDPOINT` names; the token is in `HF_TOKEN` or where `hf auth login` left it. The
package comes with vLLM.
"""

import dataclasses
import fnmatch
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from serving.config import ConfigError
from serving.planning.machine.running_process import running_process
from serving.planning.model_size import ModelSize, cached_folder, read_folder

Progress = Callable[[int, int], None]
"""Called with the bytes that are there, and those that are to be there."""

_ASK_TIMEOUT_S = 8.0
_POLL_S = 0.5
# As vLLM chooses: of the first pattern that names any file, all that it names.
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
_BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.yaml")
_INDEX = "model.safetensors.index.json"


class HubUnreachable(Exception):
    """The hub does not answer; the message says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class HubModel:
    """A model that the hub has, and the files that an engine will want."""

    name: str
    revision: str | None
    cache: str | None  # folder, where it is not the default one
    files: Mapping[str, int]  # sizes, bytes

    @property
    def num_weight_bytes(self) -> int:
        return sum(size for name, size in self.files.items() if name.endswith(_suffixes()))


def _suffixes() -> tuple[str, ...]:
    return tuple(pattern[1:] for pattern in _WEIGHTS)


def is_hub_id(model: str) -> bool:
    """Whether this names a model of the hub, rather than a file, a folder or another store."""
    if Path(model).exists() or model.count("/") > 1 or ":" in model:
        return False
    return not os.environ.get("VLLM_USE_MODELSCOPE") and not model.startswith((".", "/", "~"))


def is_offline() -> bool:
    """Whether the hub is not to be asked."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def ask_hub(model: str, engine_args: Mapping[str, Any]) -> HubModel:
    """Return what the hub has of `model`. Takes at most some 8 s.

    Raise `ConfigError` if it has no such model, or not for us, and `HubUnreachable` if it does not
    answer.
    """
    from huggingface_hub import HfApi, errors

    revision, cache = engine_args.get("revision"), engine_args.get("download_dir")
    token = engine_args.get("hf_token")
    try:
        api = HfApi(os.environ.get("HF_ENDPOINT"), token=token)
        info = api.model_info(model, revision=revision, timeout=_ASK_TIMEOUT_S, files_metadata=True)
        if getattr(info, "gated", None):
            api.auth_check(model)  # all may see it, and not all have it
    except Exception as error:
        if isinstance(error, errors.HFValidationError):
            raise ConfigError(
                f"model: {model!r} is neither a folder here nor an id of the Hugging Face hub"
            ) from None
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code < 500:
            raise ConfigError(_refusal(model, revision, error)) from None
        raise HubUnreachable(" ".join(str(error).split()) or type(error).__name__) from error
    sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
    return HubModel(model, revision, cache, _wanted(sizes))


def _refusal(model: str, revision: str | None, error: Any) -> str:
    """Return why the hub does not give us a model, and what mends it."""
    from huggingface_hub import constants, errors, get_token

    page = f"{os.environ.get('HF_ENDPOINT') or constants.ENDPOINT}/{model}"
    has_token = get_token() is not None
    if isinstance(error, errors.GatedRepoError):
        return f"model: {model} is gated: accept its terms at {page}, and " + (
            "make HF_TOKEN a token of that account (the one that is set has no access)"
            if has_token
            else "set HF_TOKEN to a token of that account"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"engine.args.revision: {model} has no {revision} on the Hugging Face hub"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"model: the Hugging Face hub has no {model}, or it is private: check the name, or "
            + (
                "whether HF_TOKEN is of an account that may read it"
                if has_token
                else "set HF_TOKEN"
            )
            + "; a model on this disk is named by its folder"
        )
    status = error.response.status_code
    if status == 401:
        return "model: the Hugging Face hub does not take the token in HF_TOKEN: is it still valid?"
    return f"model: the Hugging Face hub answers {status} for {model}: {_first_line(error)}"


def _wanted(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return those of a model's files that vLLM loads, as it does itself."""
    sizes = {name: size for name, size in sizes.items() if not name.startswith("original/")}
    beside = {name for name in sizes for each in _BESIDE_WEIGHTS if fnmatch.fnmatch(name, each)}
    weights: list[str] = next(filter(None, (fnmatch.filter(sizes, each) for each in _WEIGHTS)), [])
    if _INDEX in sizes:  # it does not list what is there for another loader
        weights = [name for name in weights if not name.startswith("consolidated")]
    return {name: size for name, size in sizes.items() if name in beside or name in weights}


def hub_size(found: HubModel) -> ModelSize:
    """Return the size of a model that is yet to be downloaded. Its `config.json` is, at once."""
    from huggingface_hub import hf_hub_download

    shape = ModelSize(0)
    if "config.json" in found.files:
        try:
            path = hf_hub_download(
                found.name,
                "config.json",
                revision=found.revision,
                cache_dir=found.cache,
                endpoint=os.environ.get("HF_ENDPOINT"),
            )
            shape = read_folder(Path(path).parent)
        except Exception:  # its size alone says enough; the download will say what is wrong
            shape = ModelSize(0)
    return dataclasses.replace(shape, num_weight_bytes=found.num_weight_bytes)


def is_cached(model: str, engine_args: Mapping[str, Any]) -> bool:
    """Whether the cache has weights of `model`, by which an engine can start without the hub."""
    folder = cached_folder(model, engine_args.get("revision"), engine_args.get("download_dir"))
    if folder is None:
        return False
    return any(path.name.endswith(_suffixes()) for path in folder.rglob("*"))


def cached_models() -> list[str]:
    """Return the ids of the models in the hub's cache. Imports nothing: shells complete by it."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))
    names = (path.name.removeprefix("models--") for path in cache.glob("models--*"))
    return sorted(name.replace("--", "/") for name in names)


def download(found: HubModel, engine_args: Mapping[str, Any], report: Progress) -> None:
    """Have all files in the cache. Raise `ConfigError` if that fails; what came stays for later.

    A process of its own does it, which is ended if this is interrupted.
    """
    folder = _repo_folder(found)
    total = sum(found.files.values())
    answer_to = [*(sys.executable, "-m", "serving.planning.hub"), _order(found)]
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))
    )
    if isinstance(token := engine_args.get("hf_token"), str):
        environment["HF_TOKEN"] = token
    with running_process(answer_to, environment) as process:
        while process.poll() is None:
            report(min(total, _num_bytes(folder)), total)
            time.sleep(_POLL_S)
        said = process.stdout.read() if process.stdout else ""
    if process.returncode != 0:
        lines = said.strip().splitlines() or [f"exit status {process.returncode}"]
        raise ConfigError(
            f"model: {found.name} cannot be downloaded: {lines[-1]}; check network and disk, and "
            "run it again to go on, or name a folder"
        )
    report(total, total)


def is_whole(found: HubModel) -> bool:
    """Whether every file is in the cache already."""
    from huggingface_hub import try_to_load_from_cache

    return all(
        isinstance(
            try_to_load_from_cache(
                found.name, name, cache_dir=found.cache, revision=found.revision
            ),
            str,
        )
        for name in found.files
    )


def _repo_folder(found: HubModel) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(found.cache or constants.HF_HUB_CACHE)
    return cache / repo_folder_name(repo_id=found.name, repo_type="model")


def _num_bytes(folder: Path) -> int:
    """Return the bytes of all downloads so far, unfinished ones too."""
    total = 0
    for path in folder.glob("blobs/*"):
        try:
            total += path.stat().st_blocks * 512  # unfinished ones may be sparse
        except OSError:
            continue
    return total


def _order(found: HubModel) -> str:
    return json.dumps({**dataclasses.asdict(found), "files": list(found.files)})


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _carry_out(order: dict[str, Any]) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(
        order["name"],
        revision=order["revision"],
        cache_dir=order["cache"],
        allow_patterns=order["files"],
    )


if __name__ == "__main__":
    try:
        _carry_out(json.loads(sys.argv[1]))
    except Exception as error:
        sys.exit(_first_line(error))
