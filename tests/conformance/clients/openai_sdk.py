# /// script
# dependencies = ["openai==3.54.0"]
# ///
"""OpenAI's own client."""

import sys
from enum import Enum
from importlib.metadata import version
from typing import Any

from openai import NotFoundError, OpenAI
from pydantic import BaseModel

ASKED: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class City(Enum):
    PARIS = "Paris"
    ROME = "Rome"


class Capital(BaseModel):
    city: City


def main(url: str, model: str) -> None:
    print(f"openai {version('openai')}")
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        chat = client.chat.completions
        whole = chat.create(model=model, messages=ASKED, max_tokens=16, temperature=0)
        stream = chat.create(model=model, messages=ASKED, max_tokens=16, temperature=0, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == whole.choices[0].message.content, (text, whole)
        print("chat, whole and streamed")
        parsed = chat.parse(
            model=model, messages=ASKED, max_tokens=64, temperature=0, response_format=Capital
        )
        assert isinstance(parsed.choices[0].message.parsed, Capital), parsed
        print("parse")
        called = chat.create(
            model=model,
            messages=ASKED,
            max_tokens=64,
            temperature=0,
            tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "weather"}},
        )
        [call] = called.choices[0].message.tool_calls or []
        assert call.function.name == "weather", called
        print("tools")
        completed = client.completions.create(model=model, prompt="Once", max_tokens=8)
        assert completed.usage is not None
        assert completed.usage.completion_tokens > 0, completed
        response = client.responses.create(model=model, input="Hello", max_output_tokens=8)
        assert response.output_text, response
        with client.responses.stream(model=model, input="Hello", max_output_tokens=8) as events:
            kinds = [event.type for event in events]
        assert kinds[0] == "response.created", kinds
        assert kinds[-1] in ("response.completed", "response.incomplete"), kinds
        print("completions, responses whole and streamed")
        refused = None
        try:
            client.chat.completions.create(model="no such model", messages=ASKED)
        except NotFoundError as error:
            refused = error
        assert refused is not None
        assert refused.type == "NotFoundError", refused
        print("errors")


if __name__ == "__main__":
    main(*sys.argv[1:3])
