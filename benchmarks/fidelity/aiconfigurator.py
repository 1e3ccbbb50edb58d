"""Where do the H100 and H200 profiles come from? Step times that aiconfigurator estimates.

    python -m benchmarks.fidelity.aiconfigurator STEP_TIMES.csv

Writes both profiles. The table's columns are model, system, tp, phase (prefill or decode), batch,
context_tokens, prefill_ms, decode_step_ms. aiconfigurator (NVIDIA, Apache-2.0) interpolates
operators that were measured on the hardware. Their sums are its estimate, not an end-to-end
measurement.
"""

import argparse
import csv
from pathlib import Path

from router.simulation.engine.profile import Profile
from serving.capacity.profiles import FOLDER, save_profile
from serving.capacity.step_fit import Step, fit

_GIB = 1 << 30
# Llama-3.1-8B: 8.03e9 weights of 2 bytes; KV of 32 layers, 8 heads of 128, K and V, 2 bytes.
_WEIGHT_BYTES = 16.06e9
_KV_BYTES_PER_TOKEN = 2 * 32 * 8 * 128 * 2
# vLLM's share of the memory (its default), and the part of it that holds neither weights nor KV:
# activations of 8,192 tokens and CUDA graphs (assumed).
_SHARE = 0.92
_OTHER_BYTES = 2.5 * _GIB
# The noise of these step times is unknown. For one GPU's steps of equal size it is a few percent.
_ASSUMED_NOISE = 0.03

_MODEL = "meta-llama/Meta-Llama-3.1-8B"
_SYSTEMS = {  # profile: aiconfigurator's system, device, GiB by the driver
    "h100-llama8b": ("h100_sxm", "NVIDIA H100 80GB SXM", 79.6),
    "h200-llama8b": ("h200_sxm", "NVIDIA H200 141GB SXM", 139.8),
}


def read_steps(path: Path, model: str, system: str) -> list[Step]:
    """Return the table's steps of one model on one system."""
    found = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["model"], row["system"]) != (model, system):
                continue
            batch, context = int(row["batch"]), int(row["context_tokens"])
            if row["phase"] == "prefill":
                pairs = batch * context**2 / 2
                found.append(Step(batch * context, 0, 0, pairs, float(row["prefill_ms"]) / 1e3))
            else:
                step_s = float(row["decode_step_ms"]) / 1e3
                found.append(Step(0, batch, batch * context, 0.0, step_s))
    return found


def make_profile(name: str, path: Path) -> tuple[Profile, float]:
    """Return the profile of this name and the root mean square relative error of its fit."""
    system, device, gib = _SYSTEMS[name]
    num_kv_tokens = int((_SHARE * gib * _GIB - _WEIGHT_BYTES - _OTHER_BYTES) // _KV_BYTES_PER_TOKEN)
    profile = Profile(
        name=name,
        model=_MODEL.replace("Meta-", ""),
        device=device,
        source="to be fitted",
        max_model_len=131_072,
        # vLLM 0.32's defaults of its OpenAI server on a GPU of 70 GiB and more.
        max_num_seqs=1024,
        max_num_batched_tokens=8192,
        num_kv_tokens=num_kv_tokens,
        base_s=0.0,
        s_per_token=1e-6,
        noise=_ASSUMED_NOISE,
    )
    found = read_steps(path, _MODEL, system)
    profile, error = fit(found, profile)
    source = (
        f"Step times: aiconfigurator 0.12.0's estimate for vLLM 0.24.0 ({_MODEL}, {system}, "
        f"TP 1), from operators measured on that hardware; not an end-to-end measurement. "
        f"{len(found)} of them, fitted to {error:.1%} (root mean square). "
        f"KV capacity: {_SHARE} of {gib} GiB, less weights and {_OTHER_BYTES / _GIB:g} GiB "
        "(assumed) for activations and CUDA graphs, at 128 KiB per token. "
        "Limits: vLLM 0.32's defaults. Noise: assumed."
    )
    return profile.model_copy(update={"source": source}), error


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write the H100 and H200 profiles from aiconfigurator's step times."
    )
    parser.add_argument("step_times", type=Path, help="aiconfigurator's table, CSV")
    path = parser.parse_args().step_times
    for name in _SYSTEMS:
        profile, error = make_profile(name, path)
        save_profile(profile, FOLDER / f"{name}.yaml")
        print(f"{name}: fitted to {error:.1%}")


if __name__ == "__main__":
    main()
