"""Which runs does the comparison of policies consist of?

A place is a trace on a fleet, at its own speed or faster. All its policies are judged on the same
requests at the same loads, and each load is repeated on requests drawn anew.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from router.simulation import clairvoyant
from router.simulation.variant import OURS, STOCK, ablations, policies
from serving.capacity.sweep import Case

# A fleet of this size gets a trace as it is where one is made faster; a larger one more copies.
_ENGINES_PER_COPY = 8
SQUEEZED = ", squeezed"
# Of the knee: where waits are steep.
LOADS = (0.5, 0.8, 0.9)
SHOWN_LOAD = 0.8
# What users run today, as they run it, beside what we ship and our policy on what they run.
RIVALS = tuple(
    name + STOCK
    for name in (
        "round_robin",
        "least_requests",
        "cache_aware",
        "weighted_score",
        "lmetric",
        "vllm_dp",
    )
)
AT_ALL_LOADS = (OURS, OURS + STOCK, *RIVALS)


@dataclass(frozen=True)
class Place:
    """A trace on a fleet."""

    title: str
    num_engines: int
    is_squeezed: bool  # one copy made faster, and not as many as keep the trace's own speed

    @property
    def name(self) -> str:
        return self.title + SQUEEZED * self.is_squeezed

    @property
    def num_copies(self) -> int | None:
        """Copies that are laid over one another; None: as many as the speed asks for."""
        return max(1, self.num_engines // _ENGINES_PER_COPY) if self.is_squeezed else None

    @property
    def is_large(self) -> bool:
        return self.num_engines > _ENGINES_PER_COPY


def variants_at_shown_load() -> tuple[str, ...]:
    """Return all that is looked at where the tables look: the rest of the policies, and why."""
    others = [name + STOCK for name in policies() if name != OURS and name + STOCK not in RIVALS]
    on_ours = ["weighted_score", "lmetric"]  # what our engines alone are worth
    return (*AT_ALL_LOADS, *others, *on_ours, *ablations(), clairvoyant.NAME)


def places(titles: Sequence[str], fleets: Sequence[int], *, squeezed: bool) -> list[Place]:
    """Return each trace on each fleet, and on the smallest one also made faster."""
    found = [Place(title, num_engines, False) for num_engines in fleets for title in titles]
    if squeezed:
        found += [Place(title, min(fleets), True) for title in titles]
    return found


def cases(
    place: Place,
    knee: float,
    *,
    loads: Sequence[float] | None,
    variants: Sequence[str] | None,
    num_requests: int,
    num_repeats: int,
    seed: int,
) -> Iterator[Case]:
    """Yield the runs of a place whose knee is so many requests per second.

    Without `loads` and `variants`: the rivals at all loads, the rest where the tables look. A
    large fleet and a squeezed trace are looked at there only.
    """
    chosen = loads or ((SHOWN_LOAD,) if place.is_large or place.is_squeezed else LOADS)
    for load in sorted(chosen):
        if variants is not None:
            here = tuple(variants)
        elif load == SHOWN_LOAD and not (place.is_large or place.is_squeezed):
            here = variants_at_shown_load()
        else:
            here = AT_ALL_LOADS
        for repeat in range(num_repeats):
            for variant in here:
                yield Case(
                    place.name,
                    place.num_engines,
                    load,
                    load * knee,
                    variant,
                    repeat,
                    seed + 1 + repeat,  # another one than the knee was found with
                    num_requests,
                    place.num_copies,
                )
