"""A LoRA adapter for the tiny model: rank 4, random, in peft's layout; each seed another one."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.support.tiny_model import HEAD_DIM, HIDDEN_SIZE, NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS

RANK = 4
_OUT_SIZES = {"q_proj": NUM_HEADS * HEAD_DIM, "v_proj": NUM_KV_HEADS * HEAD_DIM}


def tiny_adapter(folder: Path, seed: int) -> Path:
    """Return `folder` after writing into it what vLLM and peft load."""
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": list(_OUT_SIZES),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(NUM_LAYERS):
        for module, out_size in _OUT_SIZES.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            for half, shape in {"A": (RANK, HIDDEN_SIZE), "B": (out_size, RANK)}.items():
                tensors[f"{name}.lora_{half}.weight"] = rng.standard_normal(shape, np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
