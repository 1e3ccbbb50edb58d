"""Which machines are there for the engines of one service, and what do they have together?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from serving.planning.hardware import Hardware


@dataclass(frozen=True, slots=True)
class Node:
    """One machine of a Ray cluster, or one that is only planned for."""

    name: str  # its address, or what it is called
    hardware: Hardware  # with no more GPUs than Ray has there
    num_cpus: float  # logical ones, as Ray counts them
    is_head: bool = False
    node_id: str = ""  # Ray's; empty if it is not there

    @property
    def can_work(self) -> bool:
        """Whether engines may run there at all; a head node may be kept free of them."""
        return self.num_cpus > 0 or bool(self.hardware.gpus)


Nodes = tuple[Node, ...]


def this_machine(hardware: Hardware) -> Nodes:
    """Return the only node of a service that has no other."""
    return (Node("this machine", hardware, float(len(hardware.cores)), is_head=True),)


def working(nodes: Sequence[Node]) -> Nodes:
    """Return those on which engines may run."""
    return tuple(node for node in nodes if node.can_work)


def head_of(nodes: Sequence[Node]) -> Node:
    """Return the head node, or the first one where none is."""
    return next((node for node in nodes if node.is_head), nodes[0])


def together(nodes: Sequence[Node]) -> Hardware:
    """Return one machine with all that the nodes have. Cores are numbered anew."""
    first = next((node for node in nodes if node.hardware.gpus), nodes[0]).hardware
    return replace(
        first,
        cores=tuple(range(sum(len(node.hardware.cores) for node in nodes))),
        num_ram_bytes=sum(node.hardware.num_ram_bytes for node in nodes),
        num_free_ram_bytes=sum(node.hardware.num_free_ram_bytes for node in nodes),
        has_bfloat16=all(node.hardware.has_bfloat16 for node in nodes),
        gpus=tuple(gpu for node in nodes for gpu in node.hardware.gpus),
        gpu_error=next((n.hardware.gpu_error for n in nodes if n.hardware.gpu_error), ""),
    )
