"""How many engines should each model of an application have, where they may share GPUs?

No clock and no Ray here: times are arguments.
"""

import functools
from typing import Any

import msgspec

from router.scaling.autoscaler import ScalingState
from router.scaling.demand import Demand
from router.scaling.settings import ScalingSettings
from router.scaling.sharing import Claim, share_out
from serving.cluster.actors.scaling_keeper import Orders, ScalingKeeper

# Ray Serve asks for each model each second: one that it asks for no more has been removed.
_GONE_S = 10.0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What one gateway has seen."""

    demand: dict[str, Demand]  # of each model whose engines come and go, by deployment
    out_of_use: list[str]  # engines that get no new work, though nobody empties them here


class ScaledModel(msgspec.Struct, frozen=True, kw_only=True):
    """What Ray Serve knows of a model whose engines come and go."""

    settings: dict[str, Any]  # `ScalingSettings`
    num_gpus: int = 0  # of one engine
    num_shared_gpus: int = 0  # of all such models; 0: the most that all may have is there


class _Seen(msgspec.Struct):
    model: ScaledModel
    keeper: ScalingKeeper
    num_wanted: int  # engines
    num_held: int  # that were wanted and are there, or starting
    num_target: int  # as Serve has been told last
    asked_s: float


class ApplicationScaling:
    """A `ScalingKeeper` for each model, and what they leave to each other."""

    def __init__(self) -> None:
        self._models: dict[str, _Seen] = {}  # by deployment

    def report(self, gateway_id: str, report: Report, now_s: float) -> dict[str, Orders]:
        """Take in what a gateway has seen; return what it is told, by deployment."""
        return {
            deployment: self._models[deployment].keeper.report(
                gateway_id, demand, now_s, report.out_of_use
            )
            for deployment, demand in report.demand.items()
            if deployment in self._models
        }

    def decide(
        self, deployment: str, model: ScaledModel, running: list[str], num_target: int, now_s: float
    ) -> int:
        """Return how many engines of a model Serve should run: `ScalingKeeper.decide`."""
        self._models = {
            name: each for name, each in self._models.items() if now_s - each.asked_s < _GONE_S
        }
        settings = ScalingSettings.model_validate(model.settings)
        seen = self._models.get(deployment)
        if seen is None:
            seen = _Seen(model, ScalingKeeper(settings), num_target, num_target, num_target, now_s)
            self._models[deployment] = seen
        seen.model, seen.asked_s = model, now_s
        seen.keeper.use_settings(settings)
        shares = model.num_shared_gpus > 0
        grant = functools.partial(self._grant, deployment) if shares else None
        num = seen.keeper.decide(running, num_target, now_s, grant)
        if shares:
            # An engine that cannot be placed would be asked for all the same, and seem to start.
            num_taken = sum(
                each.num_target * each.model.num_gpus
                for each in self._models.values()
                if each is not seen
            )
            room = (model.num_shared_gpus - num_taken) // model.num_gpus
            num = min(num, max(room, len(running)))
        seen.num_target = num
        return num

    def state(self, deployment: str) -> ScalingState | None:
        """Return how many engines of a model there should be, and why; None if it is not known."""
        seen = self._models.get(deployment)
        return None if seen is None else seen.keeper.state

    def _grant(self, deployment: str, num_wanted: int, num_held: int) -> int:
        """Return how many engines a model may have of those that it wants, and has."""
        seen = self._models[deployment]
        seen.num_wanted, seen.num_held = num_wanted, num_held
        claims = [
            Claim(
                num_gpus=each.model.num_gpus,
                num_least=each.keeper.autoscaler.settings.min,
                num_wanted=each.num_wanted,
                num_held=each.num_held,
            )
            for each in self._models.values()
        ]
        shares = share_out(claims, seen.model.num_shared_gpus)
        return dict(zip(self._models, shares, strict=True))[deployment]
