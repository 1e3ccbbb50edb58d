"""Onto which node does one more engine go?

Where fewest engines of its model are (spread), or where least is left free (pack); never onto one
whose GPUs, memory or cores do not hold it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from serving.config import Config, ConfigError
from serving.planning.machine.nodes import Nodes
from serving.planning.model_size import ModelSize
from serving.planning.plan import Plan, Share, gpus_per_engine, make_plan
from serving.planning.service.counts import counted


@dataclass(slots=True)
class PlacedModel:
    """One model, and where its engines are."""

    key: str
    config: Config
    size: ModelSize | None
    on_gpu: bool
    running: Plan | None
    engines: Counter[int] = field(default_factory=Counter)  # by the number of the node

    @property
    def number(self) -> int:
        return self.engines.total()

    @property
    def num_gpus(self) -> int:
        return gpus_per_engine(self.config) if self.on_gpu else 0

    @property
    def wanted(self) -> int | None:
        """Engines that it has to have; None if it takes what there is."""
        if self.config.max_replicas != "auto":
            scaling = self.config.scaling
            return self.config.max_replicas if scaling is None else max(1, scaling.min)
        return None if self.running is None else self.running.num_replicas


class Placing:
    """Puts one engine after the other onto a node that has room."""

    def __init__(self, config: Config, nodes: Nodes, models: Sequence[PlacedModel]) -> None:
        self._packs = config.placement == "pack"
        self.nodes = nodes
        self._models = models
        self._bytes: dict[int, int] = {}  # RAM of an engine, by the number of its model
        self._said: dict[tuple[int, int, int, int], str] = {}  # why not, by what was asked

    def why_not(self, index: int, at: int, number: int) -> str:
        """Return why so many engines of a model cannot be on a node; "" if they can."""
        question = (index, at, number, self._others(index, at))
        if question not in self._said:
            try:
                plan = self.plan(index, at, number)
                self._bytes[index] = plan.num_engine_bytes or 0
                self._said[question] = ""
            except ConfigError as error:
                self._said[question] = str(error)
        return self._said[question]

    def plan(self, index: int, at: int, number: int, share: Share | None = None) -> Plan:
        """Return the plan of one node with so many engines of a model. Raise `ConfigError`."""
        model, hardware = self._models[index], self.nodes[at].hardware
        share = share or Share(num_gateways=1, engine_cpus=1.0, gateway_cpus=0.0)
        share = replace(share, num_other_bytes=self._others(index, at))
        fixed = model.config.model_copy(update={"replicas": number})
        return make_plan(fixed, hardware, model.size, share)

    def _others(self, index: int, at: int) -> int:
        """Return the RAM on a node that the engines of other models take."""
        return sum(
            model.engines[at] * self._bytes.get(other, 0)
            for other, model in enumerate(self._models)
            if other != index and not model.on_gpu
        )

    def add(self, index: int, *, overfills: bool = True) -> str:
        """Put one more engine somewhere. Return why that is impossible; "" if it was not.

        Where a core is not free for it engines share cores, if it `overfills`.
        """
        model, why = self._models[index], "there is no node that engines may run on"
        for at in sorted(range(len(self.nodes)), key=lambda at: self._order(model, at)):
            if model.on_gpu and self._free_gpus(at) < model.num_gpus:
                why = self._short_of_gpus(model)
                continue
            if not (model.on_gpu or overfills or self._free_cores(at) > 0):
                why = "all cores have an engine"
                continue
            why = self.why_not(index, at, model.engines[at] + 1)
            if not why:
                model.engines[at] += 1
                return ""
        return why

    def _order(self, model: PlacedModel, at: int) -> tuple[float, ...]:
        """Return by what nodes are tried: where fewest engines are, or where least is free."""
        free = self._free_gpus(at) if model.on_gpu else self._free_cores(at)
        if self._packs:
            is_empty = not any(each.engines[at] for each in self._models)
            # Of empty ones the largest, so that few are begun; of others the fullest.
            return (free <= 0, is_empty, -free if is_empty else free, at)
        return (free <= 0, model.engines[at], -free, at)

    def _free_gpus(self, at: int) -> int:
        taken = sum(each.engines[at] * each.num_gpus for each in self._models)
        return len(self.nodes[at].hardware.gpus) - taken

    def _free_cores(self, at: int) -> int:
        taken = sum(each.engines[at] for each in self._models if not each.on_gpu)
        return len(self.nodes[at].hardware.cores) - taken

    def _short_of_gpus(self, model: PlacedModel) -> str:
        most = max(len(node.hardware.gpus) for node in self.nodes)
        if model.num_gpus > most:
            return (
                f"tensor_parallel_size: one engine needs {counted(model.num_gpus, 'GPU')} of one "
                f"node, and none has more than {most}: lower tensor_parallel_size"
            )
        free = ", ".join(
            f"{self._free_gpus(at)} on {node.name}" for at, node in enumerate(self.nodes)
        )
        return (
            f"replicas: engine {model.number + 1} needs {counted(model.num_gpus, 'GPU')} of one "
            f"node, and free are {free}: lower replicas or tensor_parallel_size"
        )
