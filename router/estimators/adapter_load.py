"""What does a request wait for its LoRA adapter at an engine, and who waits with it?

An engine keeps so many adapters resident that one step can use them (vLLM: `max_loras`), and as
many more in its memory (`max_cpu_loras`). One that a request needs and that is not resident is
loaded in the step that begins it, and everybody there waits for that step; the adapter that was
used longest ago makes room. While requests use as many others as can be resident, it waits inside
the engine until one of these has none left.
"""

from collections.abc import Collection

from router.types import AdapterState


class AdapterLoads:
    """What loading an adapter took, seconds; for all engines of a kind together.

    By adapter, since they differ in rank. One that was never loaded is taken for the mean of the
    others: 0 until any was, and then all engines are as good for the first one.
    """

    __slots__ = ("_by_name", "_mean_s", "swap_s")

    def __init__(self) -> None:
        self._by_name: dict[str, float] = {}
        self._mean_s = 0.0
        self.swap_s = 0.0  # from the engine's memory

    def learn(self, state: AdapterState, names: Collection[str]) -> None:
        """Take in what an engine has measured of the adapters of these names."""
        for name, load_s in state.load_s.items():
            if name in names:
                self._by_name[name] = load_s
        self._average()
        if state.swap_s > 0.0:
            self.swap_s = state.swap_s

    def load_s(self, name: str) -> float:
        """Return what loading it from its files takes."""
        return self._by_name.get(name, self._mean_s)

    def forget(self, name: str) -> None:
        """Drop what is known of an adapter that nobody serves any more; another may be so named."""
        if self._by_name.pop(name, None) is not None:
            self._average()

    def _average(self) -> None:
        if self._by_name:
            self._mean_s = sum(self._by_name.values()) / len(self._by_name)


class Adapters:
    """The LoRA adapters of one engine: which are at hand, and which are in use."""

    __slots__ = ("_booked", "_state", "_used", "loads", "max_loras", "paths")

    def __init__(self, max_loras: int, paths: dict[str, str]) -> None:
        """`max_loras`, at least 1, can be resident; `paths` are those that are served, by name."""
        self.max_loras = max_loras
        self.paths = paths
        self.loads = AdapterLoads()  # `Fleet` shares it by kind
        self._state = AdapterState()
        self._booked: dict[str, int] = {}  # requests that this gateway has there, by adapter
        # Requests of any gateway there, by adapter: reported, or booked and not reported yet.
        self._used: dict[str, int] = {}

    def learn(self, state: AdapterState) -> None:
        """Install a newer state."""
        self._state = state
        self.loads.learn(state, self.paths)  # its workers may tell of one that is unloaded
        self._count_used()

    def use_paths(self, paths: dict[str, str]) -> None:
        """Go by these adapters as those that are served."""
        for name in self.paths:
            if paths.get(name) != self.paths[name]:
                self.loads.forget(name)
        self.paths = paths

    def book(self, name: str) -> None:
        """Count a request that was sent there; one that needs no adapter changes nothing."""
        if name in self.paths:
            self._booked[name] = self._booked.get(name, 0) + 1
            self._count_used()

    def release(self, name: str) -> None:
        """Stop counting one; an unknown name changes nothing."""
        num_left = self._booked.get(name, 0) - 1
        if num_left > 0:
            self._booked[name] = num_left
        elif name in self._booked:
            del self._booked[name]
        else:
            return
        self._count_used()

    def load_s(self, name: str) -> float:
        """Return what a request of this name has the engine load, seconds; 0: it is at hand.

        Or on its way: somebody has it loaded already. Any name that is no adapter's is at hand.
        """
        if name not in self.paths or name in self._state.resident or name in self._used:
            return 0.0
        return self.loads.swap_s if name in self._state.cached else self.loads.load_s(name)

    def has_at_hand(self, name: str) -> bool:
        """Whether it is resident, or will be for a request that is there already."""
        return name in self._state.resident or name in self._used

    def wait_s(self, name: str, answer_s: float) -> float:
        """Return the predicted seconds until an adapter can be resident; 0 if it is, or may be.

        It waits while requests use as many others as there is room for: until the last of the
        requests for one of these ends. Of k answers of `answer_s` each, begun at any time, that is
        k / (k + 1) of one (the highest of k, evenly spread), and k is that of the adapter with the
        fewest. Others that wait already go first, each for an answer.
        """
        if name not in self.paths:
            return 0.0
        num_others = len(self._used) - (name in self._used)
        if num_others < self.max_loras or (name in self._used and name in self._state.resident):
            return 0.0
        fewest = min([num for other, num in self._used.items() if other != name])
        num_first = (num_others - self.max_loras) / self.max_loras
        return answer_s * (fewest / (fewest + 1.0) + num_first)

    def loading_s(self) -> float:
        """Return what loading those takes that are needed and not resident, seconds."""
        loading_s = 0.0
        for name in self._used:
            if name not in self._state.resident:
                loading_s += self.loads.load_s(name)
        return loading_s

    def delay_s(self, name: str, answer_s: float) -> float:
        """Return what a request of this name waits for its adapter, seconds, loading included."""
        return self.load_s(name) + self.wait_s(name, answer_s)

    def evicts(self, name: str) -> bool:
        """Whether loading it takes another's place, which is then to be loaded again."""
        return self.load_s(name) > 0.0 and len(self._state.resident) >= self.max_loras

    def state(self) -> AdapterState:
        """Return what the engine has told last, with the requests that were sent since."""
        state = self._state
        return AdapterState(
            resident=state.resident,
            cached=state.cached,
            num_requests=dict(self._used),
            load_s=state.load_s,
            swap_s=state.swap_s,
        )

    def _count_used(self) -> None:
        used = dict(self._state.num_requests)
        for name, num_booked in self._booked.items():
            used[name] = max(num_booked, used.get(name, 0))
        self._used = used
