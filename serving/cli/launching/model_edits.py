r"""What happens when `models` in the config file are edited while they are served?

    calm --the file has changed--> told: engines start, gateways do not know removed models any more
      ^                             |
      \--gateways have heard it: engines of removed models drain, and end--/

Only what differs is started or stopped: Ray Serve goes by the version that each deployment has
(`serving.cluster.application`). A file that cannot be used, or models that do not fit, change
nothing.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from serving.cli.commands import weights
from serving.cli.config_file import ConfigFile
from serving.cli.launching.progress import AppState
from serving.config import Config, ConfigError, parse
from serving.planning.bundled_model import BundledModelError
from serving.planning.machine.nodes import Nodes
from serving.planning.plan import Plan
from serving.planning.service.over_nodes import plan_nodes
from serving.planning.service.service_plan import ServicePlan, changes

# Keys of the file that are followed: models, and what they leave out.
_FOLLOWED = ("models", "engine", "replicas", "idle_sleep_s", "tensor_parallel_size")
# From when Ray Serve has been told until it says what it does about gateways, seconds; and the
# longest to wait for gateways.
_TOLD_S = 2.0
_HEARD_S = 30.0

# Deploys these arguments by this plan, with the engines of models that leave.
Deploy = Callable[[dict[str, Any], ServicePlan, Sequence[tuple[Config, Plan]]], None]


class ModelEdits:
    """Follows a config file's models."""

    def __init__(
        self,
        file: ConfigFile,
        plan: ServicePlan,
        nodes: Nodes,
        console: Console,
        *,
        reload: Callable[[], ConfigFile],
        deploy: Deploy,
    ) -> None:
        """`nodes` are as they were before the engines of `plan` were started."""
        assert file.config.watch_file is not None
        self.plan = plan
        self._path: Path = file.config.watch_file
        self._args: Mapping[str, Any] = file.application["args"]
        self._nodes = nodes
        self._console = console
        self._reload = reload
        self._deploy = deploy
        self._seen = _signature(self._path)
        self._leaving: tuple[tuple[Config, Plan], ...] = ()
        self._told_s = 0.0

    def look(self, state: AppState) -> None:
        """Do what is to be done now."""
        if self._leaving:
            waited_s = time.monotonic() - self._told_s
            heard = waited_s > _TOLD_S and state.of("Gateway").is_settled
            if heard or waited_s > _HEARD_S:
                self._leaving = ()
                self._deploy(dict(self._args), self.plan, ())
        elif (signature := _signature(self._path)) not in (None, self._seen):
            self._seen = signature
            try:
                self._follow()
            except (ConfigError, BundledModelError) as error:
                self._console.print(f"{self._path} is not used: {error}")

    def _follow(self) -> None:
        file = self._reload()
        if not file.config.models:
            raise ConfigError("models: there are none left; end the service to stop them all")
        given = file.application["args"]
        args = {key: value for key, value in self._args.items() if key not in _FOLLOWED}
        args |= {key: given[key] for key in _FOLLOWED if key in given}
        config = parse(args)
        found = [weights.look_up(each, must_be_there=True) for each in config.by_model()]
        sizes = [each.size for each in found]
        plan = plan_nodes(config, self._nodes, sizes, running=self.plan)
        if not (said := changes(self.plan, plan)):
            return
        for sentence in (f"{self._path} has changed:", *said):
            self._console.print(sentence)
        for each, of_model in zip(found, config.by_model(), strict=True):
            weights.fetch(each, of_model, self._console)
        stay = {each.deployment for each in plan.plans}
        leaving = tuple(each for each in self.plan.models if each[1].deployment not in stay)
        self._deploy(args, plan, leaving)
        self._args, self.plan, self._leaving = args, plan, leaving
        self._told_s = time.monotonic()


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
