"""A GGUF becomes the folder that vLLM loads, weight by weight."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from serving.planning.gguf import convert
from tests.serving.planning.tiny_gguf import HEADS, HIDDEN, write_gguf

HALF_ULP = 2**-8  # of bfloat16: a leading bit and 7 more


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Return the bfloat16 tensors of `path` as float32."""
    data = path.read_bytes()
    head_size = int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + head_size]).items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            bits = np.frombuffer(data[8 + head_size + start : 8 + head_size + end], "<u2")
            floats = (bits.astype(np.uint32) << 16).view(np.float32)
            tensors[name] = floats.reshape(entry["shape"])
    return tensors


def test_weights_are_those_of_the_gguf_rounded(tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "tiny.gguf")
    convert(tmp_path / "tiny.gguf", tmp_path, lambda done: None)
    made = read_safetensors(tmp_path / "model.safetensors")
    assert len(made) == len(weights)
    pairs = {
        "token_embd": "model.embed_tokens.weight",
        "output_norm": "model.norm.weight",
        "blk.1.ffn_down": "model.layers.1.mlp.down_proj.weight",
        "blk.0.attn_output": "model.layers.0.self_attn.o_proj.weight",
    }
    for name, made_name in pairs.items():
        np.testing.assert_allclose(made[made_name], weights[name], rtol=HALF_ULP)
    # Row 2i+j of a head in llama.cpp's order is row i + j * size/2 in Hugging Face's.
    size = HIDDEN // HEADS
    query, key = (made[f"model.layers.0.self_attn.{letter}_proj.weight"] for letter in "qk")
    for i, j in [(0, 1), (3, 0), (size // 2 - 1, 1)]:
        for made_rows, rows in [
            (query, weights["blk.0.attn_q"]),
            (key, weights["blk.0.attn_k"]),
        ]:
            np.testing.assert_allclose(
                made_rows[size + i + j * size // 2], rows[size + 2 * i + j], rtol=HALF_ULP
            )


def test_a_gguf_of_something_else_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="not a Llama"):
        convert(tmp_path / "other.gguf", tmp_path, lambda done: None)
