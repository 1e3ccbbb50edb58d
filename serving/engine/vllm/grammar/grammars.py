"""May a grammar go to the engine core, which compiles it beside everybody's tokens?

vLLM compiles what `response_format`, `structured_outputs` and a required tool ask for twice: to
check it, on the event loop of the replica, and to use it, in the engine core. Some few characters
may take all memory there is, or hours. So each grammar is looked at before either:

| a grammar that                                  |                                            |
|-------------------------------------------------|--------------------------------------------|
| is plainly small (`is_small`), and checked by   | passes                                     |
| vLLM with the compiler that its core uses       |                                            |
| is longer than may be                           | is refused                                 |
| is any other                                    | is compiled in a sandbox first; the        |
|                                                 | verdict is kept                            |

What is refused is the request's fault. Meanwhile other requests go on.
"""

import asyncio
import hashlib
import logging
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import msgspec

from serving.config import EngineConfig
from serving.engine.vllm.grammar.sandbox import Limits, Sandbox, SandboxEnded, Verdict
from serving.stream.accounting import current_accounting

logger = logging.getLogger(__name__)

# vLLM reads some grammars on the event loop, when it parses the body of a request: so many take it
# a tenth of a second. It is a list of 10,000 choices, or a schema of 2,000 properties.
MAX_GRAMMAR_CHARS = 2**18
_MAX_VERDICTS = 1024  # kept, those used last
_VERDICT = "headway_verdict"  # an attribute of vLLM's `StructuredOutputsParams`
_FIELDS = (
    "json",
    "regex",
    "choice",
    "grammar",
    "json_object",
    "disable_any_whitespace",
    "disable_additional_properties",
    "whitespace_pattern",
    "structural_tag",
)
_encode = msgspec.msgpack.Encoder().encode


class GrammarRefused(Exception):
    """A grammar that must not be compiled here; the message says why."""


class Grammars:
    """Knows of every grammar whether it may be compiled; runs on the replica's event loop."""

    def __init__(
        self,
        vllm_config: Any,
        config: EngineConfig,
        core_backend: str,
        validate: Callable[[Any], None],
    ) -> None:
        """`core_backend` compiles all grammars in the core; empty if it has yet to be chosen.

        `validate` does vLLM's own checks of its parameters, in which it chooses a backend for them.
        """
        limits = Limits(config.grammar_timeout_s, config.grammar_max_bytes)
        self._sandbox = Sandbox(vllm_config, limits)
        self._backend = vllm_config.structured_outputs_config.backend
        self._core_backend = core_backend
        self._validate = validate
        self._verdicts: OrderedDict[bytes, asyncio.Task[Verdict]] = OrderedDict()

    async def check(self, outputs: Any) -> None:
        """Return once vLLM's `StructuredOutputsParams` may be passed on to vLLM.

        Raises `GrammarRefused` if they may not.
        """
        accounting = current_accounting.get()
        if accounting is not None:
            accounting.has_grammar = True
        if getattr(outputs, _VERDICT, None) is not None:
            return  # another prompt of the same request
        check_length(outputs)
        fields = {name: value for name in _FIELDS if (value := getattr(outputs, name))}
        if self._backend in _KNOWN_BACKENDS and is_small(outputs):
            self._validate(outputs)
            if not self._core_backend or outputs._backend == self._core_backend:
                verdict = Verdict(0, "", outputs._backend, outputs._backend_was_auto)
                setattr(outputs, _VERDICT, verdict)
                return
        if accounting is not None:
            accounting.is_parked = True
        try:
            verdict = await self._verdict(fields)
        finally:
            if accounting is not None:
                accounting.is_parked = False
        if verdict.error:
            raise GrammarRefused(verdict.error)
        setattr(outputs, _VERDICT, verdict)

    async def _verdict(self, fields: dict[str, Any]) -> Verdict:
        key = hashlib.blake2b(_encode((fields, self._core_backend)), digest_size=16).digest()
        task = self._verdicts.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(
                self._sandbox.examine(fields, self._core_backend)
            )
            self._verdicts[key] = task
            while len(self._verdicts) > _MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(key)
        try:
            return await asyncio.shield(task)
        except (SandboxEnded, OSError):
            if self._verdicts.get(key) is task:
                del self._verdicts[key]
            raise

    def close(self) -> None:
        self._sandbox.close()


def apply_verdict(outputs: Any, choice_as_grammar: Callable[[list[str]], str]) -> bool:
    """Do to vLLM's parameters what its own checks would. Return False if there is no verdict.

    Then those checks are cheap.
    """
    verdict: Verdict | None = getattr(outputs, _VERDICT, None)
    if verdict is None:
        return False
    if outputs.choice and verdict.backend == "xgrammar":
        outputs.grammar, outputs.choice = choice_as_grammar(outputs.choice), None
    outputs._backend, outputs._backend_was_auto = verdict.backend, verdict.was_auto
    return True


def check_length(outputs: Any) -> None:
    """Raise `GrammarRefused` for a grammar that it takes long just to read."""
    if (num_chars := count_chars(outputs)) > MAX_GRAMMAR_CHARS:
        raise GrammarRefused(
            f"The grammar has {num_chars} characters; at most {MAX_GRAMMAR_CHARS} are allowed."
        )


def count_chars(outputs: Any) -> int:
    """Return about the length of a grammar as a text."""
    texts = (outputs.regex, outputs.grammar, outputs.structural_tag, outputs.whitespace_pattern)
    num_chars = sum(len(text) for text in texts if text)
    if outputs.choice:
        num_chars += sum(len(text) + 4 for text in outputs.choice)
    schema = outputs.json
    if isinstance(schema, dict):
        schema = msgspec.json.encode(schema)
    return num_chars + len(schema or "")


# --- what is plainly small ---------------------------------------------------

_KNOWN_BACKENDS = ("auto", "xgrammar", "guidance")
_MAX_SMALL_CHARS = 16_384
_MAX_SMALL_NODES = 256  # of a schema
_MAX_SMALL_NUMBER = 10**9
_REF = re.compile(r"#/(?:\$defs|definitions)/([^/]+)")
# Keywords without a say in what is allowed.
_WORDS = frozenset(
    ("title", "description", "default", "examples", "$schema", "$id", "$comment", "strict", "name")
)
_FORMATS = frozenset(("date", "time", "date-time", "uuid", "email", "uri", "ipv4", "ipv6"))
_TYPES = frozenset(("string", "integer", "number", "boolean", "null", "object", "array"))
_BOUNDS = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"))
_COUNTS = frozenset(("minItems", "minLength", "minProperties"))


def is_small(outputs: Any) -> bool:
    """Whether compiling a grammar plainly takes next to nothing.

    That is: any JSON, few choices, and schemas of the usual keywords. Whatever repeats, counts or
    refers in circles may be anything, and so may an expression.
    """
    if outputs.json_object or outputs.choice:
        return count_chars(outputs) <= _MAX_SMALL_CHARS and len(outputs.choice or ()) <= 256
    schema = outputs.json
    if not schema or count_chars(outputs) > _MAX_SMALL_CHARS:
        return False
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except (msgspec.DecodeError, RecursionError):
            return False
    return isinstance(schema, dict) and _SmallSchema(schema).is_small()


class _SmallSchema:
    """A schema as a tree of nodes, to be counted."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._nodes: list[Any] = [root]
        self._num_nodes = 0
        self._definitions: dict[str, Any] = {}
        for name in ("$defs", "definitions"):
            if isinstance(found := root.get(name), dict):
                self._definitions |= found
        self._nodes += self._definitions.values()

    def is_small(self) -> bool:
        while self._nodes and self._num_nodes < _MAX_SMALL_NODES:
            node = self._nodes.pop()
            self._num_nodes += 1
            if isinstance(node, bool):
                continue
            if not isinstance(node, dict) or not all(map(self._is_usual, node, node.values())):
                return False
        return not self._nodes and self._num_nodes <= _MAX_SMALL_NODES

    def _is_usual(self, key: Any, value: Any) -> bool:
        """Whether a keyword means no more than it seems to. Nodes below it are looked at later."""
        if key in _WORDS or key in ("$defs", "definitions", "required"):
            return True
        if key == "type":
            names = value if isinstance(value, list) else [value]
            return all(isinstance(name, str) and name in _TYPES for name in names)
        if key == "properties":
            self._nodes += value.values() if isinstance(value, dict) else (None,)
            return True
        if key in ("items", "additionalProperties"):
            self._nodes.append(value)
            return True
        if key == "anyOf":
            self._nodes += value if isinstance(value, list) else (None,)
            return True
        if key in ("enum", "const"):
            values = value if isinstance(value, list) else [value]
            self._num_nodes += len(values)
            return all(each is None or isinstance(each, str | int | float) for each in values)
        if key == "$ref":
            found = _REF.fullmatch(value) if isinstance(value, str) else None
            # By way of an object there may be a circle: each turn of it takes a brace.
            definition = self._definitions.get(found[1]) if found else None
            return isinstance(definition, dict) and (
                definition.get("type") == "object" or "enum" in definition
            )
        if key == "format":
            return value in _FORMATS
        if key in _COUNTS:
            return value in (0, 1)
        return key in _BOUNDS and isinstance(value, int) and abs(value) <= _MAX_SMALL_NUMBER
