"""Which of a route's models answers a prompt, and why?

    rules --first that holds--> models --can take it--> --live--> --in time--> --preferred--> one

Each step leaves out what the next need not look at, unless nothing would be left: a request is
never refused here because no model suits it.
"""

import math
import random
from collections.abc import Callable

import msgspec

from router.core.choice.outlook import Outlook, Outlooks
from router.core.choice.settings import (
    ModelChoiceSettings,
    RouteSettings,
    RuleSettings,
    WhenSettings,
)
from router.core.settings import RouterSettings
from router.fleet.fleet import Fleet
from router.queueing.hold_queue import HoldQueue
from router.scheduling.predictions import Predictions
from router.scheduling.wait_time import WaitEstimator
from router.types import Request

# The tokens of a prompt are an estimate: by so much more they should fit a model's context.
_CONTEXT_MARGIN = 1.125
_INPUTS = frozenset(("tools", "images", "audio", "video"))


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A model that whoever asks may use, and that is served or will be."""

    name: str  # in the route
    model: str
    longest_context: int | None = None  # tokens; None: no engine has told
    is_elsewhere: bool = False  # a provider answers for it
    has_engines: bool = True  # now, or it is to have some; else only providers have it
    # Its own targets, as in `Request`.
    ttft_target_base_s: float | None = None
    ttft_target_s_per_token: float | None = None


class Choice(msgspec.Struct, frozen=True):
    """Who answers, and in a line of ASCII why."""

    name: str
    model: str
    why: str


class _Look:
    """One request's look at the models of its rule."""

    def __init__(
        self,
        route: RouteSettings,
        rule: RuleSettings,
        request: Request,
        now_s: float,
        outlooks: Outlooks,
    ) -> None:
        self.request = request
        self._route = route
        self._rule = rule
        self._now_s = now_s
        self._outlooks = outlooks
        self._seen: dict[str, Outlook | None] = {}  # by model
        self._names: list[str] = []  # that were compared in the end
        self._passed: list[str] = []  # who is not chosen though it comes first, and why

    def settings(self, candidate: Candidate) -> ModelChoiceSettings:
        """Return what the route says of a candidate."""
        return self._route.models[candidate.name]

    def narrow(
        self, candidates: list[Candidate], obstacle: Callable[[Candidate], str]
    ) -> list[Candidate]:
        """Return those without an obstacle, and note the others; all if each has one."""
        left: list[Candidate] = []
        passed: list[str] = []
        for each in candidates:
            why = obstacle(each)
            if why:
                passed.append(f"{each.name}: {why}")
            else:
                left.append(each)
        if not left or not passed:
            return candidates
        self._passed += passed
        return left

    def choose(
        self, candidates: list[Candidate], rng: random.Random, kept: str
    ) -> tuple[Candidate, str]:
        """Return the one that the rule prefers, and how it was found."""
        route, prefer = self._route, self._rule.prefer
        self._names = [each.name for each in candidates]
        if route.explore and len(candidates) > 1 and rng.random() < route.explore:
            return candidates[int(rng.random() * len(candidates))], "at random (explore)"
        if prefer == "best":
            candidates = sorted(candidates, key=lambda each: -self.settings(each).quality)
        elif prefer == "cheapest":
            candidates = sorted(candidates, key=lambda each: self.settings(each).cost)
        else:
            candidates = sorted(candidates, key=self._speed)
        if kept:
            candidates = sorted(candidates, key=lambda each: each.name != kept)
        latest: list[float] = []
        passed: list[str] = []
        for each in candidates:
            outlook, how = self._outlook(each), "kept" if each.name == kept else prefer
            if outlook is None:
                return each, how  # a provider's, or there is no engine yet
            target_s = self._rule.max_ttft_s or outlook.target_s
            if outlook.ttft_s <= target_s:
                self._passed += passed
                return each, how
            latest.append(outlook.ttft_s - target_s)
            passed.append(f"{each.name}: late by {latest[-1]:.2f} s")
        return candidates[latest.index(min(latest))], "none in time, the least late"

    def explain(self, chosen: Candidate, how: str) -> str:
        """Return in words why this one was chosen."""
        words = f"{how} of {', '.join(self._names)}"
        if self._passed:
            words += f"; not {', '.join(self._passed)}"
        outlook = self._outlook(chosen)
        if outlook is None:
            return f"{words}; {'by a provider' if chosen.is_elsewhere else 'no live engine yet'}"
        words += f"; first token in {outlook.ttft_s:.2f} s, end in {outlook.end_s:.2f} s"
        return words if outlook.is_measured else f"{words} (a guess: its speed is not measured yet)"

    def _speed(self, candidate: Candidate) -> tuple[bool, float]:
        """Return what orders by speed: first those that nobody has measured, providers last.

        One request tells; by a guess that is far too slow none would ever be sent there.
        """
        outlook = self._outlook(candidate)
        return (True, math.inf) if outlook is None else (outlook.is_measured, outlook.end_s)

    def _outlook(self, candidate: Candidate) -> Outlook | None:
        model = candidate.model
        if model not in self._seen:
            request = msgspec.structs.replace(
                self.request,
                model=model,
                ttft_target_base_s=candidate.ttft_target_base_s,
                ttft_target_s_per_token=candidate.ttft_target_s_per_token,
            )
            self._seen[model] = self._outlooks.of(request, self._now_s)
        return self._seen[model]


class Chooser:
    """Chooses by a route's rules and by what the router predicts of each model."""

    def __init__(
        self,
        fleet: Fleet,
        queue: HoldQueue,
        waits: WaitEstimator,
        predictions: Predictions,
        settings: RouterSettings,
        rng: random.Random,
    ) -> None:
        self._outlooks = Outlooks(fleet, queue, waits, predictions, settings)
        self._rng = rng

    def choose(
        self,
        route: RouteSettings,
        traits: frozenset[str],
        candidates: list[Candidate],
        request: Request,
        now_s: float,
        kept: str = "",
    ) -> Choice | None:
        """Return the model for a request; None if no rule has one of the candidates.

        `traits` are what its prompt asks for and has, by the words of `settings`. `kept` is what
        was chosen for the last request of its session: it is preferred to others in time.
        """
        for number, rule in enumerate(route.rules, start=1):
            said = ""
            if rule.when is not None:
                said = matched(rule.when, traits, request)
                if not said:
                    continue
            if allowed := _allowed(rule, candidates):
                look = _Look(route, rule, request, now_s, self._outlooks)
                chosen, how = look.choose(self._able(look, traits, allowed), self._rng, kept)
                title = f"rule {rule.name or number}{f' ({said})' if said else ''}"
                return Choice(chosen.name, chosen.model, f"{title}: {look.explain(chosen, how)}")
        return None

    def _able(
        self, look: _Look, traits: frozenset[str], candidates: list[Candidate]
    ) -> list[Candidate]:
        """Return those that can answer the request, and do so now."""
        request = look.request
        needs = traits & _INPUTS
        if needs:
            candidates = look.narrow(candidates, lambda each: _lacks(look.settings(each), needs))
        num_tokens = int(request.num_prompt_tokens * _CONTEXT_MARGIN)
        num_tokens += request.max_output_tokens or 0

        def too_short(each: Candidate) -> str:
            context = each.longest_context
            return "context too short" if context is not None and context < num_tokens else ""

        fitting = look.narrow(candidates, too_short)
        if fitting is candidates and len(candidates) > 1 and too_short(candidates[0]):
            longest = max(each.longest_context or 0 for each in candidates)
            fitting = [each for each in candidates if (each.longest_context or 0) == longest]
        live = look.narrow(fitting, self._why_not_live)
        if live is fitting and len(live) > 1 and self._why_not_live(live[0]):
            return look.narrow(live, lambda each: "" if each.is_elsewhere else "no provider")
        return live

    def _why_not_live(self, candidate: Candidate) -> str:
        if not candidate.has_engines or self._outlooks.is_live(candidate.model):
            return ""
        return "no live engine"


def matched(when: WhenSettings, traits: frozenset[str], request: Request) -> str:
    """Return in words by what a rule holds for a request; "" if it does not."""
    said: list[str] = []
    if when.asks is not None:
        found = sorted(traits & when.asks)
        if not found:
            return ""
        said.append(f"asks {'+'.join(found)}")
    if when.has is not None:
        found = sorted(traits & when.has)
        if not found:
            return ""
        said.append(f"has {'+'.join(found)}")
    if when.has_not is not None:
        if not traits.isdisjoint(when.has_not):
            return ""
        said.append(f"has no {'+'.join(sorted(when.has_not))}")
    num_tokens = request.num_prompt_tokens
    least, most = when.min_prompt_tokens, when.max_prompt_tokens
    if least is not None or most is not None:
        if (least is not None and num_tokens < least) or (most is not None and num_tokens > most):
            return ""
        said.append(f"{num_tokens} prompt tokens")
    if when.tenants is not None:
        if request.tenant not in when.tenants:
            return ""
        said.append("tenant")
    if when.classes is not None:
        if request.priority_class not in when.classes:
            return ""
        said.append(f"class {request.priority_class.value}")
    return ", ".join(said) or "always"


def _allowed(rule: RuleSettings, candidates: list[Candidate]) -> list[Candidate]:
    """Return the candidates that a rule names, in its order."""
    if not rule.models:
        return candidates
    by_name = {each.name: each for each in candidates}
    return [by_name[name] for name in rule.models if name in by_name]


def _lacks(settings: ModelChoiceSettings, needs: frozenset[str]) -> str:
    """Return what of all this a model does not take, in words; "" if it takes it all."""
    if settings.takes is None or needs <= settings.takes:
        return ""
    return f"takes no {'+'.join(sorted(needs - settings.takes))}"
