"""How large is a model? Read from its files without loading it, or else guessed by its name."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# `8B`, `8x7B`, `135M`; not the `A3B` of `30B-A3B`, which tells what is active of it.
_NUM_PARAMETERS = re.compile(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z0-9])")
_FOUR_BITS = re.compile(r"awq|gptq|fp4|nf4|int4|w4a|4-?bit")
_EIGHT_BITS = re.compile(r"fp8|int8|w8a|8-?bit")
_UNITS = {"b": 1e9, "m": 1e6}


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes that decide how much memory an engine needs; None where the files do not say."""

    num_weight_bytes: int
    max_model_len: int | None = None  # tokens of context that the model was trained for
    num_kv_bytes_per_token: int | None = None  # at two bytes per value, all layers
    num_attention_heads: int | None = None  # must divide by tensor_parallel_size
    is_guess: bool = False  # the weights, by the model's name: nothing may be refused for it

    def in_float32(self) -> "ModelSize":
        """Return the size with four bytes per value of weights and KV cache; files have two."""
        per_token = self.num_kv_bytes_per_token
        return replace(
            self,
            num_weight_bytes=2 * self.num_weight_bytes,
            num_kv_bytes_per_token=per_token and 2 * per_token,
        )


# Of `serving.planning.bundled_model`: 135 M parameters in bfloat16, 30 layers
# of 3 KV heads with 64 values each.
BUNDLED_MODEL_SIZE = ModelSize(269_060_552, 8192, 2 * 30 * 3 * 64 * 2, 9)


def find_model_size(model: str) -> ModelSize | None:
    """Return the size of `model`: a folder, a file, or a name on the Hugging Face hub.

    Without the weights of the latter in the local cache it is guessed by the name; None if that
    does not tell. Nothing is downloaded.
    """
    path = Path(model)
    if path.is_file():
        return ModelSize(path.stat().st_size)
    folder = path if path.is_dir() else cached_folder(model)
    size = read_folder(folder) if folder else ModelSize(0)
    if not size.num_weight_bytes:
        size = replace(size, num_weight_bytes=_guess_weight_bytes(path.name), is_guess=True)
    return size if size.num_weight_bytes or folder else None


def cached_folder(model: str, revision: str | None = None, cache: str | None = None) -> Path | None:
    """Return the folder with what has been downloaded of a model of the hub; None if nothing.

    `cache` is the cache's folder if it is not the usual one.
    """
    try:
        from huggingface_hub import snapshot_download  # late, and only vLLM brings it

        return Path(
            snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True)
        )
    except (ImportError, OSError, ValueError) as error:
        # Who downloads for vLLM leaves out what it does not load, and so the folder is not whole.
        folder = getattr(error, "snapshot_path", None)
        return Path(folder) if folder is not None else None


def read_folder(folder: Path) -> ModelSize:
    """Return the size of the model in `folder`, with 0 for the weights if they are not there.

    Weights are the safetensors files, or PyTorch's .bin files if there are
    none. Shapes come from `config.json`; of a multimodal model, those of its language part.
    """
    weights = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    indices = [_read_json(path) for path in folder.glob("*.index.json")]
    totals = [index.get("metadata", {}).get("total_size", 0) for index in indices]
    shape = _read_json(folder / "config.json")
    shape = shape.get("text_config") or shape
    return ModelSize(
        # Not all of them need to be there yet.
        max(sum(path.stat().st_size for path in weights), *totals, 0),
        shape.get("max_position_embeddings"),
        _kv_bytes_per_token(shape),
        shape.get("num_attention_heads"),
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a file; an empty one if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _guess_weight_bytes(name: str) -> int:
    """Return the bytes of the weights of a model with this name, 0 if it tells no number."""
    name = name.lower()
    if (match := _NUM_PARAMETERS.search(name)) is None:
        return 0
    num_experts, number, unit = match.groups()
    num_parameters = int(num_experts or 1) * float(number) * _UNITS[unit]
    num_bits = 4.5 if _FOUR_BITS.search(name) else 8 if _EIGHT_BITS.search(name) else 16
    return int(num_parameters * num_bits / 8)


def _kv_bytes_per_token(shape: dict[str, Any]) -> int | None:
    """Return the bytes of keys and values in all layers; None for latent attention, with less."""
    try:
        if shape.get("kv_lora_rank"):
            return None
        heads = shape["num_attention_heads"]
        kv_heads = shape.get("num_key_value_heads") or heads
        head_dim = shape.get("head_dim") or shape["hidden_size"] // heads
        return 2 * shape["num_hidden_layers"] * kv_heads * head_dim * 2
    except (KeyError, TypeError, ZeroDivisionError):
        return None
