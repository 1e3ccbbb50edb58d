"""How large is a model? Read from its folder, without loading it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes that decide how much memory an engine needs; None where the folder does not say."""

    num_weight_bytes: int
    max_model_len: int | None = None  # tokens of context that the model was trained for
    num_kv_bytes_per_token: int | None = None  # at two bytes per value, all layers
    num_attention_heads: int | None = None  # must divide by tensor_parallel_size

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


def read_model_size(model: str) -> ModelSize | None:
    """Return the size of the model in folder `model`; None if it is not a folder.

    Weights are the safetensors files, or PyTorch's .bin files if there are
    none. Shapes come from `config.json`; of a multimodal model, those of its language part.
    """
    folder = Path(model)
    if not folder.is_dir():
        return None
    weights = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    try:
        shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        shape = shape.get("text_config") or shape
    except (OSError, ValueError, AttributeError):
        shape = {}
    return ModelSize(
        sum(path.stat().st_size for path in weights),
        shape.get("max_position_embeddings"),
        _kv_bytes_per_token(shape),
        shape.get("num_attention_heads"),
    )


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
