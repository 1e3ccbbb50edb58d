"""A Llama that knows nothing but starts fast: two layers, random weights, the real tokenizer."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from serving.planning.bundled_model import prepare_bundled_model
from serving.planning.gguf import llama_config, write_config, write_safetensors

HIDDEN_SIZE = 64
NUM_LAYERS = 2
NUM_HEADS = 2  # of 32: the smallest head that vLLM's CPU attention takes
NUM_KV_HEADS = 2
HEAD_DIM = HIDDEN_SIZE // NUM_HEADS
INTERMEDIATE_SIZE = 128
VOCAB_SIZE = 49152


def tiny_model(folder: Path, *, max_position_embeddings: int = 4096, seed: int = 0) -> Path:
    """Return `folder` after writing into it what vLLM loads, in about a second.

    The same `seed` writes the same bytes; an existing model is kept.
    """
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    real = prepare_bundled_model()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(real / name, folder / name)
    write_config(
        folder,
        llama_config(
            vocab_size=VOCAB_SIZE,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=INTERMEDIATE_SIZE,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=NUM_HEADS,
            num_key_value_heads=NUM_KV_HEADS,
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=1e-5,
            rope_theta=10_000.0,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        ),
    )
    rng = np.random.default_rng(seed)
    shapes = _shapes()

    def weights() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in shapes.items():
            if "norm" in name:
                yield name, np.ones(shape, np.float32)
            else:
                yield name, rng.standard_normal(shape, np.float32) * np.float32(0.2)

    partial = folder / "model.safetensors.partial"
    write_safetensors(partial, shapes, weights())
    partial.rename(folder / "model.safetensors")
    return folder


def _shapes() -> dict[str, list[int]]:
    shapes = {"model.embed_tokens.weight": [VOCAB_SIZE, HIDDEN_SIZE]}
    for layer in range(NUM_LAYERS):
        for name, shape in {
            "input_layernorm": [HIDDEN_SIZE],
            "self_attn.q_proj": [NUM_HEADS * HEAD_DIM, HIDDEN_SIZE],
            "self_attn.k_proj": [NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE],
            "self_attn.v_proj": [NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE],
            "self_attn.o_proj": [HIDDEN_SIZE, NUM_HEADS * HEAD_DIM],
            "post_attention_layernorm": [HIDDEN_SIZE],
            "mlp.gate_proj": [INTERMEDIATE_SIZE, HIDDEN_SIZE],
            "mlp.up_proj": [INTERMEDIATE_SIZE, HIDDEN_SIZE],
            "mlp.down_proj": [HIDDEN_SIZE, INTERMEDIATE_SIZE],
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes["model.norm.weight"] = [HIDDEN_SIZE]
    # Tied to the embedding, the model would only repeat the last token for ever.
    shapes["lm_head.weight"] = [VOCAB_SIZE, HIDDEN_SIZE]
    return shapes
