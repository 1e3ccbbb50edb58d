"""Which model does a request mean, is there one for whoever asks, and what can it bear?"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import msgspec

from router import EngineInfo
from serving.gateway.http.errors import ApiError, model_gone, model_not_found

MayUse = Callable[[Iterable[str]], bool]

# Each name that is held has a queue, which the router looks into with every event.
_MAX_GUESSES = 100
_RETRY_AFTER_S = 30.0  # about as long as an engine takes to start


class Capacity(msgspec.Struct, frozen=True):
    """What the engines of one model can do, all of them together."""

    tasks: frozenset[str]  # vLLM's names
    longest_context: int  # tokens, prompt and output together, of the engine that takes most
    shortest_context: int
    vocab_size: int  # 0: unknown
    routes: frozenset[str] = frozenset()  # empty: unknown


class ModelEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the configuration, as gateways are told of it."""

    deployment: str  # of its engines, by the name that Ray Serve has for it
    names: tuple[str, ...]  # its own first; empty if only the engines know
    # Its own targets, seconds; None: those of all models.
    ttft_target_base_s: float | None = None
    ttft_target_s_per_token: float | None = None
    tpot_target_s: float | None = None
    scales: bool = False  # its engines come and go as it is asked for: there may be none


class ServedModels:
    """The names of models: as configured, as engines serve them, as providers answer for them."""

    def __init__(self, names: Sequence[str], engines: Mapping[str, EngineInfo]) -> None:
        """`names` are those that engines will serve; empty if only they know.

        `engines` are those that are up, by replica; it changes.
        """
        self._names = tuple(names)
        self._engines = engines
        # As they were when `_capacities` was made; None: it has to be made.
        self._infos: list[EngineInfo] | None = None
        self._capacities: dict[str, Capacity] = {}
        self._adapters: dict[str, frozenset[str]] = {}  # of LoRA, as each engine served them then
        self._guesses: set[str] = set()
        self._all: tuple[ModelEntry, ...] = ()  # as `use_entries` was told last
        self._entries: dict[str, ModelEntry] = {}  # of these, by name
        self._removed: frozenset[str] = frozenset()  # names
        self._failed: dict[str, str] = {}  # deployments that cannot start, and why
        self._last: dict[str, EngineInfo] = {}  # of an engine of each model, by its own name
        self._ready_s: dict[str, float] = {}  # when an engine should be, by deployment

    @property
    def removed(self) -> frozenset[str]:
        """The names of models that were served, and are to be no more."""
        return self._removed

    def use_entries(self, entries: Sequence[ModelEntry]) -> None:
        """Go by these models from now on. Names of others are not served any more."""
        before = self._entries.keys()
        self._all = tuple(entries)
        self._entries = {name: entry for entry in entries for name in entry.names}
        self._removed = (self._removed | before) - self._entries.keys()
        self._names = (*self._names, *self._entries)
        self._infos = None
        self._follow_engines()

    def use_failures(self, failed: Mapping[str, str]) -> dict[str, str]:
        """Go by these deployments as those that cannot start, with the reason of each.

        Return the reason by name of each model that nobody serves for it.
        """
        self._failed = dict(failed)
        self._follow_engines()
        whys = {name: self._why_failed(name, ()) for name in self._entries}
        return {name: why for name, why in whys.items() if why}

    @property
    def configured(self) -> tuple[str, ...]:
        """The models of the configuration in its order, each by its own name."""
        return tuple(dict.fromkeys(entry.names[0] for entry in self._entries.values()))

    def entry(self, name: str) -> ModelEntry | None:
        """Return the model of this name; None if it is not in the configuration."""
        return self._entries.get(name)

    @property
    def scaled(self) -> dict[str, frozenset[str] | None]:
        """The names of each model whose engines come and go, by deployment; None: any name."""
        return {
            entry.deployment: frozenset(entry.names).union(*self._names_of_engines(entry.names))
            or None
            for entry in self._all
            if entry.scales
        }

    @property
    def listed(self) -> list[EngineInfo]:
        """What is served: by the engines that are up, and by those that a request would start.

        Of a model that had no engine yet only the names are known.
        """
        self._follow_engines()
        infos = [info for info in self._engines.values() if info.model not in self._removed]
        there = {name for info in infos for name in (info.model, *info.aliases)}
        asleep = [entry for entry in self._all if entry.scales and there.isdisjoint(entry.names)]
        for entry in asleep:
            infos += [self._last[name] for name in entry.names if name in self._last] or [
                EngineInfo(
                    model=name,
                    tasks=(),
                    max_model_len=0,
                    max_num_seqs=0,
                    max_num_batched_tokens=0,
                    num_kv_tokens=0,
                    block_size=0,
                )
                for name in entry.names
            ]
        return infos

    def name_of(self, deployment: str) -> str:
        """Return what clients call a model; "" if it is the only one."""
        if len(self._all) == 1:
            return ""
        return next((each.names[0] for each in self._all if each.deployment == deployment), "")

    def expect_engine(self, deployment: str, ready_s: float | None) -> None:
        """Note when the next engine of a model should be ready; None if none is starting."""
        if ready_s is None:
            self._ready_s.pop(deployment, None)
        else:
            self._ready_s[deployment] = ready_s

    def waits_for(self, name: str) -> str:
        """Return what a request waits for until an engine starts, in words; "" if one is there."""
        self._follow_engines()
        if name in self._capacities or (entry := self._scaled_entry(name)) is None:
            return ""
        if (ready_s := self._ready_s.get(entry.deployment)) is None:
            return "waiting for an engine to start"
        left_s = max(1.0, ready_s - time.monotonic())
        return f"waiting for an engine to start, about {left_s:.0f} s"

    def _scaled_entry(self, name: str) -> ModelEntry | None:
        """Return the model of a name of which no engine is up, if a request starts one."""
        for entry in self._all:
            if not entry.names and not self._engines:
                return entry if entry.scales else None
            if name in entry.names or any(name in of for of in self._names_of_engines(entry.names)):
                return entry if entry.scales else None
        return None

    def _names_of_engines(self, names: Collection[str]) -> list[tuple[str, ...]]:
        """Return the names that each engine of a model serves, or did: adapters' among them."""
        infos = [*self._engines.values(), *self._last.values()]
        return [(info.model, *info.aliases) for info in infos if info.model in names]

    def without_engine(self) -> dict[str, str]:
        """Return the models that have no engine, and why they cannot start; "" if they may."""
        self._follow_engines()
        return {
            name: self._failed.get(self._entries[name].deployment, "")
            for name in self.configured
            if not any(each in self._capacities for each in self._entries[name].names)
        }

    def find_model(
        self,
        name: str | None,
        task: str,
        models_elsewhere: Sequence[str],
        may_use: MayUse,
        *,
        route: str = "",
    ) -> tuple[str, Capacity | None]:
        """Return the model that is meant, and what it can do; None if no engine serves it now.

        No name means the first model there is. Providers answer for `models_elsewhere`. Raise
        `ApiError` 404 for one that does not exist, and in the same words for one that the caller
        may not use; 400 for one that cannot do `task`, or has no such `route`.
        """
        self._follow_engines()
        if not name:  # null, or "", which vLLM takes for its own model
            names = [each for each in (*self._names, *models_elsewhere) if may_use((each,))]
            able = (each for each in names if not self._why_failed(each, models_elsewhere))
            name = next(able, names[0] if names else "")
        exists = name in self._names or name in models_elsewhere
        if may_use((name,)) and not (exists or self._names):
            # Before the first engine has told its names any may be right.
            exists = self._is_good_guess(name)
        if not exists or not may_use((name,)):
            usable = {each for each in (*self._names, *models_elsewhere) if may_use((each,))}
            raise model_not_found(name, sorted(usable))
        if why := self._why_failed(name, models_elsewhere):
            raise model_gone(name, f"could not be started: {why}", _RETRY_AFTER_S)
        capacity = self._capacities.get(name)
        if capacity is not None and name not in models_elsewhere:
            if task and task not in capacity.tasks:
                raise ApiError(400, f"The model '{name}' does not support this endpoint ({task}).")
            if capacity.routes and route and route not in capacity.routes:
                raise ApiError(400, f"The engines of '{name}' do not have this endpoint ({route}).")
        return name, capacity

    def _why_failed(self, name: str, models_elsewhere: Sequence[str]) -> str:
        """Return why nobody answers for a model; "" if somebody does, or may soon."""
        entry = self._entries.get(name)
        if not self._failed or entry is None or name in models_elsewhere:
            return ""
        return "" if name in self._capacities else self._failed.get(entry.deployment, "")

    def _is_good_guess(self, name: str) -> bool:
        """Take a name for that of a model to come. Raise `ApiError` 503 for none, or too many."""
        if name and (name in self._guesses or len(self._guesses) < _MAX_GUESSES):
            self._guesses.add(name)
            return True
        raise ApiError(
            503,
            "No engine has started yet: it is not known which models there will be.",
            kind="ServiceUnavailableError",
            retry_after_s=_RETRY_AFTER_S,
        )

    def _follow_engines(self) -> None:
        """Learn what engines serve, if others are up than before."""
        if (infos := list(self._engines.values())) == self._infos:
            return
        self._infos = infos
        self._last |= {info.model: info for info in infos}
        by_name: dict[str, list[EngineInfo]] = {}
        adapters: set[str] = set()  # and all else that engines serve which only finish
        for info in infos:
            for name in (info.model, *info.aliases):
                if info.model in self._removed:
                    adapters.add(name)
                else:
                    by_name.setdefault(name, []).append(info)
        self._removed |= adapters - by_name.keys()
        self._capacities = {name: _capacity(of_model) for name, of_model in by_name.items()}
        unloaded = self._follow_adapters() - by_name.keys()
        # All may be gone later, and then these are known to come back.
        names = dict.fromkeys(
            (*(self.configured if len(self.configured) > 1 else ()), *by_name, *self._names)
        )
        gone = self._removed | unloaded
        self._names = tuple(name for name in names if name not in gone)

    def _follow_adapters(self) -> set[str]:
        """Return the adapters that an engine serves no more, while it is up."""
        before = self._adapters
        self._adapters = {each: frozenset(info.adapters) for each, info in self._engines.items()}
        unloaded: set[str] = set()
        for replica_id, names in self._adapters.items():
            unloaded |= before.get(replica_id, names) - names
        return unloaded


def _capacity(infos: Sequence[EngineInfo]) -> Capacity:
    contexts = [info.max_model_len for info in infos]
    return Capacity(
        frozenset(task for info in infos for task in info.tasks),
        max(contexts),
        min(contexts),
        max(info.vocab_size for info in infos),
        frozenset(route for info in infos for route in info.routes),
    )
