"""Does something of a library still look the way our code takes it for?

A shape is compared by names alone: whether they are there, and in which order. It costs
microseconds and starts nothing. That the names still mean the same only a test can tell.
"""

import dis
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any, Literal

import msgspec


class Shape(msgspec.Struct, frozen=True):
    """How something must look. Names stand apart by spaces; what is empty is not compared."""

    target: str  # "module:attribute"; a module's own name for the module
    signature: str = ""  # of a function or class: "(request, prompt=None)"
    has: str = ""  # parameters of a function, attributes of a class or module, keys of a mapping
    uses: str = ""  # what the code of a function names, in the order of its first mention

    def differences(self) -> list[str]:
        """Return in words what is not as expected: nothing where all is."""
        try:
            found = resolve(self.target)
        except (ImportError, AttributeError) as error:
            return [f"{self.target} is gone ({error})"]
        differences = []
        if self.signature and (signature := _signature(found)) != self.signature:
            differences.append(
                f"{self.target} has the signature {signature}, expected {self.signature}"
            )
        if missing := [name for name in self.has.split() if name not in _names(found)]:
            differences.append(f"{self.target} has no {', '.join(missing)}")
        if self.uses and not _is_in_order(self.uses.split(), _mentioned(found)):
            order = ", then ".join(self.uses.split())
            differences.append(f"the code of {self.target} does not use {order}")
        return differences


def classes(module: str, **attributes: str) -> tuple[Shape, ...]:
    """Return the shapes of some of a module's classes, by their attributes."""
    return tuple(Shape(f"{module}:{name}", has=names) for name, names in attributes.items())


class Patch(msgspec.Struct, frozen=True, kw_only=True):
    """One thing of a library's that we touch: the target of its first shape."""

    how: Literal["replaced", "subclassed", "called", "set", "read"]
    ours: str  # "module:attribute" that depends on it
    why: str
    guards: tuple[str, ...]  # names of tests that fail if it no longer means the same
    shapes: tuple[Shape, ...]
    versions: tuple[str, ...] = ()  # of the library, that it is for; empty: all we support
    is_fatal: bool = True  # nothing works as it should where this differs

    def explain_differences(self) -> str:
        """Return in one line what is not as expected; empty where all is."""
        found = [difference for shape in self.shapes for difference in shape.differences()]
        return f"{', '.join(found)} ({self.how} by {self.ours}: {self.why})" if found else ""


def resolve(target: str) -> Any:
    """Return what "module:attribute" names; import the module for it."""
    module, _, path = target.partition(":")
    found: Any = importlib.import_module(module)
    for name in filter(None, path.split(".")):
        found = getattr(found, name)
    return found


def _signature(function: Callable[..., Any]) -> str:
    """Return the parameters with their defaults, without annotations."""
    signature = inspect.signature(function)
    parameters = [
        each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()
    ]
    return str(inspect.Signature(parameters))


def _names(found: Any) -> set[str]:
    if isinstance(found, Mapping):
        return set(found)
    if inspect.isroutine(found):
        return set(inspect.signature(found).parameters)
    names = {*dir(found), *getattr(found, "__dataclass_fields__", ())}
    for cls in getattr(found, "__mro__", ()):
        if inspect.isfunction(init := vars(cls).get("__init__")):
            names.update(_assigned(init.__code__))
    return names


def _assigned(code: CodeType) -> Iterator[str]:
    """Yield the attributes that `code` assigns."""
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_ATTR":
            yield instruction.argval


def _mentioned(function: Callable[..., Any]) -> list[str]:
    """Return the names of globals and attributes in a function's code, then those of inner ones."""
    names = []
    codes = [inspect.unwrap(function).__code__]
    while codes:
        code = codes.pop(0)
        names += code.co_names  # in the order of their first mention
        codes += [const for const in code.co_consts if isinstance(const, CodeType)]
    return names


def _is_in_order(expected: list[str], names: list[str]) -> bool:
    """Whether all `expected` are among the `names`, one after the other."""
    rest = iter(names)
    return all(name in rest for name in expected)
