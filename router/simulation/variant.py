"""Which policy does a label name? One of them, or `headway` without some parts: `headway:hold`.

With `@stock` behind it, over engines as vLLM comes: `round_robin@stock`. Else engines are set as
Headway sets its own. Labels stay as the user spelled them, in results, too. Only the run itself
uses present names.
"""

from router.scheduling.ablation import PARTS, check_parts, current_parts, renamed_parts
from router.scheduling.policies import POLICIES, check_policy

OURS = "headway"
STOCK = "@stock"
# For measuring capacity, which hardly depends on the policy while every engine has work. This
# is what an operator would use without Headway.
SATURATING_POLICY = "least_requests"

# The order of tables: ours, then the simplest first. Others follow by name.
_ORDER = (
    OURS,
    "round_robin",
    "least_requests",
    "least_response_time",
    "power_of_two",
    "least_kv_usage",
    "cache_aware",
    "weighted_score",
    "lmetric",
    "vllm_dp",
)


def policies() -> list[str]:
    """Return the names of all policies, in the order of tables."""
    rank = {name: number for number, name in enumerate(_ORDER)}
    return sorted(POLICIES, key=lambda name: (rank.get(name, len(rank)), name))


def ablations() -> list[str]:
    """Return `headway` without each of its parts in turn."""
    return [f"{OURS}:{part}" for part in PARTS]


def on_stock(variant: str) -> tuple[str, bool]:
    """Return the label without what it says of engines, and whether these are as vLLM comes."""
    return variant.removesuffix(STOCK), variant.endswith(STOCK)


def split(variant: str) -> tuple[str, tuple[str, ...]]:
    """Return the policy and the parts to leave out, by their present names.

    Raises `ValueError` for unknown ones.
    """
    policy, parts = _parse(variant)
    check_policy(policy)
    parts = current_parts(parts)
    check_parts(parts)
    return policy, parts


def renamed(variant: str) -> dict[str, str]:
    """Return the old names of parts in `variant`, each with the present one."""
    return renamed_parts(_parse(variant)[1])


def _parse(variant: str) -> tuple[str, tuple[str, ...]]:
    """Return the policy and the parts as spelled."""
    policy, _, without = variant.partition(":")
    return policy, tuple(without.split(",")) if without else ()
