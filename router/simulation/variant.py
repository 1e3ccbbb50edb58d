"""A policy, or `headway` without some of its parts: `headway:hold,order`."""

from typing import get_args

from router.settings import Part, PolicyName

OURS = "headway"
# Capacity hardly depends on the policy while every engine has work; this one is what an
# operator would have without us.
SATURATING_POLICY = "least_requests"


def policies() -> list[str]:
    """Return the names of all policies."""
    return list(get_args(PolicyName))


def ablations() -> list[str]:
    """Return ours without one part each."""
    return [f"{OURS}:{part}" for part in get_args(Part)]


def split(variant: str) -> tuple[str, tuple[str, ...]]:
    """Return the policy and the parts to do without; raise `ValueError` for unknown ones."""
    policy, _, without = variant.partition(":")
    parts = tuple(without.split(",")) if without else ()
    if policy not in policies():
        raise ValueError(f"unknown policy {policy!r}: one of {', '.join(policies())}")
    if unknown := set(parts).difference(get_args(Part)):
        known = ", ".join(get_args(Part))
        raise ValueError(f"unknown part {min(unknown)!r} of {variant!r}: one of {known}")
    return policy, parts
