"""What happens when nodes leave or join the Ray that a launch has joined?

Ray Serve starts the engines of a lost node again wherever there is room, at once or when a node
joins. More than there were are started only where `replicas` is auto: that counts nodes that join.
Engines that run are never replaced for it, so a new node has to hold engines as the others are.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console

from serving.cli.config_file import ConfigFile
from serving.cli.launching.model_edits import Deploy
from serving.cli.launching.progress import AppState
from serving.config import ConfigError
from serving.planning.machine.nodes import Node, Nodes
from serving.planning.service.over_nodes import plan_nodes
from serving.planning.service.service_plan import ServicePlan


class NodeWatch:
    """Follows the nodes of a Ray."""

    def __init__(
        self,
        file: ConfigFile,
        plan: ServicePlan,
        nodes: Nodes,
        console: Console,
        *,
        look: Callable[[Iterable[str]], Nodes],
        deploy: Deploy,
        alive: Callable[[], Mapping[str, str]] | None = None,
    ) -> None:
        """`look` returns nodes but for those with known ids; `alive` their addresses by id."""
        self.plan = plan
        self._file = file
        self._nodes = {node.node_id: node for node in nodes}
        self._console = console
        self._look = look
        self._deploy = deploy
        self._alive = alive or _alive
        self._unfit: set[str] = set()  # have joined, and cannot be used

    def look(self, state: AppState) -> None:
        """Tell of nodes that have left and joined, and use what has come."""
        alive = self._alive()
        self._unfit &= alive.keys()
        for node_id in self._nodes.keys() - alive.keys():
            node = self._nodes.pop(node_id)
            self._console.print(
                f"the node {node.name} is lost: its engines start where there is room"
            )
        new = alive.keys() - self._nodes.keys() - self._unfit
        if not new:
            return
        try:
            found = self._look([*self._nodes, *self._unfit])
        except ConfigError as error:
            self._unfit |= new
            self._console.print(f"a node has joined that is not used: {error}")
            return
        for node in found:
            self._nodes[node.node_id] = node
            self._console.print(f"the node {node.name} has joined: {_what(node)}")
        self._grow()

    def _grow(self) -> None:
        """Start more engines of the models whose number is auto, if there is room for them."""
        try:
            wanted = plan_nodes(self._file.config, tuple(self._nodes.values()))
        except ConfigError as error:
            self._console.print(f"nothing is added: {error}")
            return
        models = []
        for (config, was), (_, now) in zip(self.plan.models, wanted.models, strict=True):
            plan = was
            if config.max_replicas == "auto" and now.num_replicas > was.num_replicas:
                if now.engine_args == was.engine_args:
                    plan = replace(was, num_replicas=now.num_replicas)
                    self._console.print(
                        f"model {was.served_model_name} grows: from {was.num_replicas} to "
                        f"{now.num_replicas} engines"
                    )
                else:
                    self._console.print(
                        f"model {was.served_model_name} does not grow: engines would have to be "
                        "others for the new node; start the service anew to use it"
                    )
            models.append((config, plan))
        if models != list(self.plan.models):
            self.plan = replace(self.plan, models=tuple(models))
            self._deploy(dict(self._file.application["args"]), self.plan, ())


def _what(node: Node) -> str:
    if not node.can_work:
        return "no engines may run there"
    gpus = len(node.hardware.gpus)
    return f"{gpus} GPU{'' if gpus == 1 else 's'}, {len(node.hardware.cores)} cores"


def _alive() -> dict[str, Any]:
    import ray

    return {each["NodeID"]: each["NodeManagerAddress"] for each in ray.nodes() if each["Alive"]}
