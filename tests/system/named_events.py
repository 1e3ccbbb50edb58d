"""Streams that name their events, as of the Messages and the Responses API."""

import json


def named_events(body: bytes) -> list[dict]:
    """Events of a stream that names them, each by the name that it has itself."""
    found = []
    for block in body.strip().split(b"\n\n"):
        name, data = (line.partition(b": ")[2] for line in block.split(b"\n"))
        found.append(json.loads(data))
        assert found[-1]["type"] == name.decode()
    return found


def all_said(events: list[dict]) -> tuple[str, list[str], object]:
    """The text, the kinds of events with each run of one kind as one, and the usage."""
    text = ""
    for event in events:
        delta = event.get("delta")
        if isinstance(delta, dict):
            delta = delta.get("text")
        text += delta or ""
    kinds = [event["type"] for event in events]
    runs = [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before]
    usages = [event.get("usage") or event.get("response", {}).get("usage") for event in events]
    usage = [usage for usage in usages if usage][-1]
    # Of a prompt that comes again more may be cached.
    details = usage.pop("input_tokens_details", None) or {}
    assert details.get("cached_tokens", 0) <= usage["input_tokens"]
    return text, runs, usage
