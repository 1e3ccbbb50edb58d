"""How does a Llama's GGUF file become what vLLM loads: safetensors, tokenizer, chat template?

This converts only what the bundled model needs. `transformers` can do it too and gives the same
weights bit for bit. But it takes 30 s where this takes 6 s, and it loses the tokenizer's
splitting of digits ("a  1" gets other ids than in training). Names and layouts
are those of llama.cpp's `gguf-py` constants and of its `convert_hf_to_gguf.py`, whose steps
are undone here.

`python -m serving.planning.gguf GGUF FOLDER` prints the fraction done, one per line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # numpy and gguf take a second to import; only a conversion needs them
    import numpy as np
    from gguf import GGUFReader

# llama.cpp's name -> the Hugging Face name, both without layer prefix and ".weight".
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL


def convert(gguf_path: Path, folder: Path, progress: Callable[[float], None]) -> None:
    """Write what vLLM loads into the existing `folder`; report the fraction done, 0 to 1.

    Raise `ValueError` for a GGUF that is not a Llama with a byte-level BPE
    tokenizer.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(gguf_path)
    if _field(reader, "general.architecture") != "llama":
        raise ValueError(f"{gguf_path.name} is not a Llama")
    if _field(reader, "tokenizer.ggml.model") != "gpt2":
        raise ValueError(f"{gguf_path.name} has no byte-level BPE tokenizer")
    config = llama_config(
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rope_theta=_field(reader, "llama.rope.freq_base"),
        # Stored as float32: rounded to 7 digits it is the original number again.
        rms_norm_eps=float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.7g}"),
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
    )
    write_config(folder, config)
    _write_tokenizer(reader, folder, config)

    # llama.cpp's rotary embedding wants the rows of Q and K interleaved in pairs.
    num_heads_of = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }
    num_weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    num_done = 0

    def weights() -> Iterable[tuple[str, np.ndarray]]:
        nonlocal num_done
        for tensor in reader.tensors:
            array = dequantize(tensor.data, tensor.tensor_type)
            num_heads = num_heads_of.get(tensor.name.split(".")[-2])
            if num_heads:
                array = _deinterleave(array, num_heads)
            yield _hf_name(tensor.name), array
            num_done += int(tensor.n_elements)
            progress(num_done / num_weights)

    shapes = {
        _hf_name(tensor.name): [int(size) for size in reversed(tensor.shape)]
        for tensor in reader.tensors
    }
    write_safetensors(folder / "model.safetensors", shapes, weights())


def llama_config(
    *, bos_token_id: int, eos_token_id: int, pad_token_id: int, rope_theta: float, **sizes: Any
) -> dict[str, Any]:
    """Return the `config.json` of a bfloat16 Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "head_dim": sizes["hidden_size"] // sizes["num_attention_heads"],
        **sizes,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write `config.json` and the matching `generation_config.json`."""
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {key: config[key] for key in ids})


def write_safetensors(
    path: Path, shapes: dict[str, list[int]], weights: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Write float32 `weights`, in the order of `shapes`, as bfloat16, one in memory at a time.

    Format: 8 bytes little-endian header size, JSON header, raw tensors
    (huggingface.co/docs/safetensors).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        num_bytes = 2
        for size in shape:
            num_bytes *= size
        header[name] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # tensors start aligned
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for (name, array), (expected, shape) in zip(weights, shapes.items(), strict=True):
            if name != expected or list(array.shape) != shape:
                raise ValueError(f"tensor {name} {array.shape} where {expected} {shape} belongs")
            file.write(_bfloat16(array).data)


def _bfloat16(array: np.ndarray) -> np.ndarray:
    """Return float32 `array` as bfloat16 bit patterns, rounded to nearest, ties to even."""
    import numpy as np

    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def _deinterleave(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Return the rows of each head in Hugging Face's order: all first halves, then all second."""
    pairs = array.reshape(num_heads, array.shape[0] // num_heads // 2, 2, array.shape[1])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _hf_name(name: str) -> str:
    """Return the Hugging Face name of llama.cpp's tensor `name`; raise `ValueError` if unknown."""
    match name.split("."):
        case ["blk", layer, tensor, "weight"] if tensor in _LAYER_TENSORS:
            return f"model.layers.{layer}.{_LAYER_TENSORS[tensor]}.weight"
        case [tensor, "weight"] if tensor in _TENSORS:
            return f"{_TENSORS[tensor]}.weight"
    raise ValueError(f"unknown tensor {name}")


def _write_tokenizer(reader: GGUFReader, folder: Path, config: dict[str, Any]) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and the chat template."""
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    types: list[int] = _field(reader, "tokenizer.ggml.token_type")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    # llama.cpp's pre-tokenizer "smollm" splits off every digit and then works as GPT-2's.
    digits = [{"type": "Digits", "individual_digits": True}]
    split = digits if _field(reader, "tokenizer.ggml.pre") == "smollm" else []
    _write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": index,
                    "content": tokens[index],
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for index, kind in enumerate(types)
                if kind == _CONTROL_TOKEN
            ],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [*split, {**byte_level, "use_regex": True}],
            },
            "post_processor": None,
            "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {token: index for index, token in enumerate(tokens)},
                "merges": [merge.split(" ") for merge in _field(reader, "tokenizer.ggml.merges")],
            },
        },
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[config["bos_token_id"]],
            "eos_token": tokens[config["eos_token_id"]],
            "pad_token": tokens[config["pad_token_id"]],
            "unk_token": tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
        },
    )
    template: str = _field(reader, "tokenizer.chat_template")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _field(reader: GGUFReader, key: str) -> Any:
    """Return the metadata value at `key`; raise `ValueError` if absent."""
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF file lacks {key}")
    return field.contents()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), lambda done: print(f"{done:.4f}", flush=True))
