# /// script
# dependencies = ["anthropic==2.12.0"]
# ///
"""Anthropic's own client."""

import sys
from importlib.metadata import version
from typing import Any

from anthropic import Anthropic, NotFoundError

ASKED: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
TOOL: Any = {
    "name": "weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def main(url: str, model: str) -> None:
    print(f"anthropic {version('anthropic')}")
    with Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        asked: Any = {"model": model, "messages": ASKED, "max_tokens": 16}
        asked["extra_body"] = {"temperature": 0}
        [block] = client.messages.create(**asked).content
        with client.messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == block.text, block
        print("messages, whole and streamed")
        counted = client.messages.count_tokens(model=model, messages=ASKED)
        assert counted.input_tokens > 0, counted
        print("count_tokens")
        choice: Any = {"type": "tool", "name": "weather"}
        called = client.messages.create(
            **{**asked, "max_tokens": 64}, tools=[TOOL], tool_choice=choice
        )
        [use] = [block for block in called.content if block.type == "tool_use"]
        assert use.name == "weather", called
        print("tools")
        refused = None
        try:
            client.messages.create(**{**asked, "model": "no such model"})
        except NotFoundError as error:
            refused = error
        assert refused is not None
        assert refused.type == "not_found_error", refused
        print("errors")


if __name__ == "__main__":
    main(*sys.argv[1:3])
