# /// script
# dependencies = ["litellm[mcp]==1.106.2"]
# ///
"""LiteLLM as a client. 1.107.0 was flagged as compromised: never that one."""

import asyncio
import json
import os
import sys
from importlib.metadata import version
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it downloads one

import litellm

ASKED: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "strict": True, "parameters": SCHEMA},
}


def main(url: str, model: str) -> None:
    print(f"litellm {version('litellm')}")
    asked: Any = {"api_base": f"{url}/v1", "api_key": "none", "messages": ASKED}
    asked |= {"temperature": 0, "max_tokens": 64, "num_retries": 0}
    for provider in ("openai", "hosted_vllm"):
        asked["model"] = f"{provider}/{model}"
        whole: Any = litellm.completion(**asked)
        text = whole.choices[0].message.content
        assert whole.usage.completion_tokens > 0, whole
        stream: Any = litellm.completion(**asked, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text

        async def ask() -> list[str]:
            replies: Any = await asyncio.gather(*(litellm.acompletion(**asked) for _ in range(4)))
            return [reply.choices[0].message.content for reply in replies]

        assert all(asyncio.run(ask()))
        said: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
        parsed: Any = litellm.completion(**asked, response_format=said)
        assert json.loads(parsed.choices[0].message.content)["city"] in ("Paris", "Rome")
        called: Any = litellm.completion(
            **asked,
            tools=[TOOL],
            tool_choice={"type": "function", "function": {"name": "weather"}},
        )
        [call] = called.choices[0].message.tool_calls
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
        try:
            litellm.completion(**{**asked, "model": f"{provider}/no such model"})
        except litellm.NotFoundError:
            pass
        else:
            raise AssertionError("a model that is not there answers")
        print(f"as {provider}: chat whole, streamed and at once, structured output, tools, errors")


if __name__ == "__main__":
    main(*sys.argv[1:3])
