"""How large a model is, read from its folder without loading it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes that decide whether an engine fits; None where the folder does not tell."""

    num_weight_bytes: int
    max_model_len: int | None = None  # tokens that the model was trained for
    num_kv_bytes_per_token: int | None = None  # at two bytes per value, all layers
    num_attention_heads: int | None = None  # must divide by tensor_parallel_size

    def in_float32(self) -> "ModelSize":
        """The size with weights and KV cache of four bytes per value, where files have two."""
        per_token = self.num_kv_bytes_per_token
        return replace(
            self,
            num_weight_bytes=2 * self.num_weight_bytes,
            num_kv_bytes_per_token=per_token and 2 * per_token,
        )


# The model on board (`serving.planning.bundled_model`): 135 M parameters in bfloat16, 30 layers
# of 3 KV heads with 64 values each.
ON_BOARD = ModelSize(269_060_552, 8192, 2 * 30 * 3 * 64 * 2, 9)


def measure(model: str) -> ModelSize | None:
    """Return the size of the model in folder `model`; None where it is not a folder.

    Weights are the safetensors files, or PyTorch's .bin files where there are
    none. Shapes are `config.json`'s, of the language part of a multimodal model.
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
    """Keys and values of all layers; None for latent attention, which keeps less."""
    try:
        if shape.get("kv_lora_rank"):
            return None
        heads = shape["num_attention_heads"]
        kv_heads = shape.get("num_key_value_heads") or heads
        head_dim = shape.get("head_dim") or shape["hidden_size"] // heads
        return 2 * shape["num_hidden_layers"] * kv_heads * head_dim * 2
    except (KeyError, TypeError, ZeroDivisionError):
        return None
