"""`serving.engine.vllm.shape`, on things of this file."""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import pytest

from serving.engine.vllm.shape import Shape, classes

MAPPING = {"key": 1}


class Plain:
    def __init__(self, size: int) -> None:
        self.size = size

    @property
    def half(self) -> float:
        return self.size / 2


class Heir(Plain):
    def wait(self, event: str, timeout_s: float = 1.0, *more: int) -> Iterator[int]:
        first(event)
        yield from (second(each) for each in more)
        third(timeout_s)


@dataclass
class Data:
    field: int


class Struct(msgspec.Struct):
    field: int


def first(event: str) -> None: ...
def second(each: int) -> int:
    return each


def third(timeout_s: float) -> None: ...


HERE = __name__


@pytest.mark.parametrize(
    "shape",
    [
        Shape(HERE),
        Shape(HERE, has="MAPPING first"),
        Shape(f"{HERE}:Heir"),
        Shape(f"{HERE}:Heir", "(size)", has="size half wait"),
        Shape(f"{HERE}:Heir.wait", "(self, event, timeout_s=1.0, *more)", has="timeout_s"),
        Shape(f"{HERE}:Heir.wait", uses="first third"),
        Shape(f"{HERE}:Heir.wait", uses="first second"),  # in a generator within
        Shape(f"{HERE}:MAPPING", has="key"),
        *classes(HERE, Data="field", Struct="field", Plain="size"),
    ],
)
def test_as_expected(shape: Shape) -> None:
    assert shape.differences() == []


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (Shape("no.such.module:thing"), "no.such.module:thing is gone"),
        (Shape(f"{HERE}:Heir.sleep"), "Heir.sleep is gone"),
        (Shape(f"{HERE}:Heir", has="size colour weight"), "Heir has no colour, weight"),
        (Shape(f"{HERE}:Heir.wait", has="deadline_s"), "Heir.wait has no deadline_s"),
        (
            Shape(f"{HERE}:Heir.wait", "(self, event)"),
            "timeout_s=1.0, *more), expected (self, event)",
        ),
        (Shape(f"{HERE}:Heir.wait", uses="third first"), "does not use third, then first"),
        (Shape(f"{HERE}:Heir.wait", uses="fourth"), "does not use fourth"),
        (Shape(f"{HERE}:MAPPING", has="lock"), "MAPPING has no lock"),
    ],
)
def test_differences(shape: Shape, words: str) -> None:
    [difference] = shape.differences()
    assert words in difference


def test_all_differences_are_named() -> None:
    shape = Shape(f"{HERE}:Heir.wait", "(self)", has="deadline_s", uses="fourth")
    assert len(shape.differences()) == 3
