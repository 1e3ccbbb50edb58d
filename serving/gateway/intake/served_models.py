"""Which model does a request mean, is there one for whoever asks, and what can it bear?"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from router import EngineInfo
from serving.gateway.http.errors import ApiError, model_not_found

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


class ServedModels:
    """The names of models: as configured, as engines serve them, as providers answer for them."""

    def __init__(self, names: Sequence[str], engines: Mapping[str, EngineInfo]) -> None:
        """`names` are those that engines will serve; empty if only they know.

        `engines` are those that are up, by replica; it changes.
        """
        self._names = tuple(names)
        self._engines = engines
        self._infos: list[EngineInfo] = []  # as they were when `_capacities` was made
        self._capacities: dict[str, Capacity] = {}
        self._guesses: set[str] = set()

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
            name = next(
                (each for each in (*self._names, *models_elsewhere) if may_use((each,))), ""
            )
        exists = name in self._names or name in models_elsewhere
        if may_use((name,)) and not (exists or self._names):
            # Before the first engine has told its names any may be right.
            exists = self._is_good_guess(name)
        if not exists or not may_use((name,)):
            usable = {each for each in (*self._names, *models_elsewhere) if may_use((each,))}
            raise model_not_found(name, sorted(usable))
        capacity = self._capacities.get(name)
        if capacity is not None and name not in models_elsewhere:
            if task and task not in capacity.tasks:
                raise ApiError(400, f"The model '{name}' does not support this endpoint ({task}).")
            if capacity.routes and route and route not in capacity.routes:
                raise ApiError(400, f"The engines of '{name}' do not have this endpoint ({route}).")
        return name, capacity

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
        by_name: dict[str, list[EngineInfo]] = {}
        for info in infos:
            for name in (info.model, *info.aliases):
                by_name.setdefault(name, []).append(info)
        self._capacities = {name: _capacity(of_model) for name, of_model in by_name.items()}
        # All may be gone later, and then these are known to come back.
        self._names = tuple(dict.fromkeys((*by_name, *self._names)))


def _capacity(infos: Sequence[EngineInfo]) -> Capacity:
    contexts = [info.max_model_len for info in infos]
    return Capacity(
        frozenset(task for info in infos for task in info.tasks),
        max(contexts),
        min(contexts),
        max(info.vocab_size for info in infos),
        frozenset(route for info in infos for route in info.routes),
    )
