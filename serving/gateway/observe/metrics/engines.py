"""What do the engines' own metrics say, vLLM's and those of its Python? For `/metrics/engines`.

Whichever gateway is asked answers for all engines, so the answers of several are the same series:
Prometheus should ask one of them. An engine's text is passed on line by line, in 3 µs each: to
read it by prometheus-client and write it again takes ten times as long, and vLLM has a thousand
lines, while tokens wait. A test reads what comes of it by that library's parser.
"""

import asyncio
import re
from collections.abc import Mapping

from serving.gateway.engines import Engines
from serving.gateway.http.endpoints.questions import NotAnswered

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TIMEOUT_S = 5.0
_COMMENT = re.compile(r"# (?:HELP|TYPE) (\S+)")
_OWN_LABEL = re.compile(r'(?:^|(?<=,))engine="(?:[^"\\]|\\.)*",?')


async def engine_metrics(engines: Engines) -> str:
    """Ask all engines that are up. Return their metrics, each with the engine's id as a label."""
    texts = dict(
        await asyncio.gather(*(_ask(engines, replica_id) for replica_id in list(engines.infos)))
    )
    return merge({engine: text for engine, text in texts.items() if text is not None}) + _up(texts)


async def _ask(engines: Engines, replica_id: str) -> tuple[str, str | None]:
    """Return an engine and its text; None if it does not answer."""
    question = engines.ask(replica_id, "GET", "/metrics", [], b"")
    try:
        status, body = await question.whole(_TIMEOUT_S)
    except NotAnswered:
        return replica_id, None
    finally:
        question.close()
    return replica_id, body.decode() if status == 200 else None


def merge(texts: Mapping[str, str]) -> str:
    """Return engines' texts as one, in which all lines of a metric are together.

    The label `engine` is theirs; vLLM's own of that name, a number within the engine, goes. So
    do the times at which series were created: Prometheus takes them for gauges.
    """
    comments: dict[str, dict[str, None]] = {}
    samples: dict[str, list[str]] = {}
    for engine, text in texts.items():
        label, name = f'engine="{engine}"', ""
        for line in text.splitlines():
            if (comment := _COMMENT.match(line)) is not None:
                name = comment[1]
                if not name.endswith("_created"):
                    comments.setdefault(name, {})[line] = None
            elif line and line[0] != "#" and not name.endswith("_created"):
                samples.setdefault(name, []).append(_with_label(line, label))
    return "".join(
        f"{line}\n"
        for name in dict.fromkeys((*comments, *samples))
        for line in (*comments.get(name, ()), *samples.get(name, ()))
    )


def _with_label(line: str, label: str) -> str:
    name, brace, rest = line.partition("{")
    if not brace:
        name, _, value = line.partition(" ")
        return f"{name}{{{label}}} {value}"
    labels, _, value = rest.rpartition("}")
    others = _OWN_LABEL.sub("", labels).strip(",")
    return f"{name}{{{label}{',' if others else ''}{others}}}{value}"


def _up(texts: Mapping[str, str | None]) -> str:
    """Return which engines have answered."""
    name = "headway_engine_metrics_up"
    lines = [f"# HELP {name} 1 if the engine told its metrics", f"# TYPE {name} gauge"]
    lines += [
        f'{name}{{engine="{engine}"}} {float(text is not None)}' for engine, text in texts.items()
    ]
    return "".join(f"{line}\n" for line in lines)
