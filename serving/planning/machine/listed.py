"""Which machines does a list such as `8xH100-80GB,4xA100-40GB` stand for? None of them is here.

Each entry is a machine: so many GPUs of a name and a size, or so many CPU cores and RAM
(`16xCPU-64GB`). The same entry twice is two machines. What an entry does not say is assumed, as
machines are sold for such GPUs.
"""

import re

from serving.config import ConfigError
from serving.planning.hardware import Gpu, Hardware
from serving.planning.machine.nodes import Node, Nodes

_ENTRY = re.compile(
    r"(?P<number>[1-9]\d*)x(?P<name>[\w .+-]*?\w)-(?P<size>[1-9]\d*)GB", re.IGNORECASE
)
_GIB = 1 << 30
# An "80GB" H100 has 79.6 GiB (81,559 MiB), a "40GB" A100 39.6 GiB, and the driver takes some.
_VISIBLE_SHARE = 0.99
_FREE_SHARE = 0.98
_CORES_PER_GPU = 12  # 96 to 128 for eight GPUs
_RAM_PER_GPU_BYTE = 2
_NUM_NVLINKS = 1  # assumed, so that nothing is said of their lack


def listed_nodes(text: str) -> Nodes:
    """Return the machines that `text` lists. Raise `ConfigError` if it cannot be read."""
    entries = [entry.strip() for entry in text.split(",")]
    return tuple(_node(entry, index, len(entries)) for index, entry in enumerate(entries))


def _node(entry: str, index: int, num_entries: int) -> Node:
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise ConfigError(
            f"--hardware: {entry!r} is not of the form 8xH100-80GB (GPUs of a machine) or "
            "16xCPU-64GB (its cores and RAM)"
        )
    number, name, size = int(match["number"]), match["name"], int(match["size"])
    label = entry if num_entries == 1 else f"{index + 1} ({entry})"
    if name.upper() == "CPU":
        num_bytes = size * _GIB
        hardware = Hardware(tuple(range(number)), num_bytes, num_bytes, cpu_name="CPU")
    else:
        num_bytes = int(_VISIBLE_SHARE * size * _GIB)
        num_ram_bytes = _RAM_PER_GPU_BYTE * number * size * _GIB
        hardware = Hardware(
            tuple(range(number * _CORES_PER_GPU)),
            num_ram_bytes,
            num_ram_bytes,
            cpu_name="CPU (assumed)",
            gpus=tuple(
                Gpu(
                    at,
                    f"{name}-{size}GB",
                    num_bytes,
                    int(_FREE_SHARE * num_bytes),
                    num_nvlinks=_NUM_NVLINKS,
                )
                for at in range(number)
            ),
        )
    return Node(label, hardware, float(len(hardware.cores)), is_head=index == 0)
