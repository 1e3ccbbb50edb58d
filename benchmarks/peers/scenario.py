"""What does one run of the comparison do, with which engines and how long?"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.load.mix import Mix
from benchmarks.peers.dilation import dilated_profile, dilated_targets
from benchmarks.peers.fleet import EmulatedFleet, EngineSettings, VllmFleet
from benchmarks.systems.real_engines import RealEngines
from benchmarks.systems.system import EmulatedHeadway
from serving.capacity.profiles import load_profile, save_profile
from serving.capacity.service import Service
from serving.planning.bundled_model import SERVED_MODEL_NAME

# Sizes that keep 8 emulated H100s busy at a rate that two cores can carry. By the engine model
# alone, each H100 carries 12.5 such requests/s.
_EMULATED_MIX = Mix(short_tokens=(100, 800), long_tokens=(6000, 16_000), output_tokens=(16, 64))


@dataclass(frozen=True)
class Scenario:
    """What one run of the benchmark does."""

    peers: tuple[str, ...]
    rival_engines: tuple[EngineSettings, ...]  # the settings of those behind the peers
    profile: str | None  # None: real engines
    num_engines: int
    rate: float | None  # requests per second; unset: a share of what real engines carry
    duration_s: float
    num_repeats: int
    seed: int
    one_policy: bool  # only the first of each peer
    dilation: float  # of emulated engines, arrivals and targets; 1: none
    # A disturbed run is tried so many times in all. The last one counts, disturbed or not: the
    # router itself may take the processor from the load generator.
    max_tries: int

    @property
    def name(self) -> str:
        """The name of the result file."""
        if self.profile is None:
            return "peers-real"
        return "peers-emulated" if self.dilation == 1 else "peers-emulated-dilated"

    @property
    def max_late_s(self) -> float:
        """The lateness of the load generator (p99) above which a run counts as disturbed.

        Steps take some 25 ms on emulated engines, and hundreds on real ones, on CPU cores that
        they share with the load generator.
        """
        return 0.02 * self.dilation if self.profile else 0.1

    @property
    def timeout_s(self) -> float:
        """Seconds after the last arrival: many times what a request takes if nothing is wrong."""
        return 15.0 * self.dilation if self.profile else 120.0

    @property
    def warm_up_s(self) -> float:
        return 3.0 if self.profile else 10.0

    @property
    def mix(self) -> Mix:
        return Mix() if self.profile is None else _EMULATED_MIX

    @property
    def model(self) -> str:
        return SERVED_MODEL_NAME if self.profile is None else "emulated"

    def make_systems(
        self, folder: Path, num_sharing: int
    ) -> tuple[dict[EngineSettings, EmulatedFleet | VllmFleet], Service]:
        """Return the engines behind the peers, by their settings, and Headway with its own.

        A profile of its own is written to `folder`. `num_sharing` real engines share the memory.
        """
        if self.profile is None:
            fleets = {
                settings: VllmFleet(self.num_engines, settings, num_sharing)
                for settings in self.rival_engines
            }
            return {**fleets}, RealEngines(self.num_engines)
        profile, router = self.profile, {}
        if self.dilation != 1:
            path = folder / "dilated.yaml"
            save_profile(dilated_profile(load_profile(profile), self.dilation), path)
            profile, router = str(path), dilated_targets(self.dilation)
        emulated = {
            settings: EmulatedFleet(profile, self.num_engines, self.model, settings)
            for settings in self.rival_engines
        }
        ours = EmulatedHeadway(profile, self.num_engines, self.model, router)
        return {**emulated}, ours
