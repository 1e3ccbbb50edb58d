# /// script
# dependencies = ["langchain-openai==1.7.4"]
# ///
"""LangChain's client, as its agents use it."""

import asyncio
import sys
from importlib.metadata import version
from typing import Any, Literal

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

QUESTION = "What is the capital of France?"


class Capital(BaseModel):
    """The capital of a country."""

    city: Literal["Paris", "Rome"]


@tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """Tell the weather of a city."""
    return f"It rains in {city}."


def main(url: str, model: str) -> None:
    print(f"langchain-openai {version('langchain-openai')}")
    talk(url, model)
    ask_for_objects(url, model)


def talk(url: str, model: str) -> None:
    """Ask for what any model can write."""
    chat = _chat(url, model, max_tokens=16)
    whole = chat.invoke(QUESTION)
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 0, whole
    assert "".join(str(chunk.content) for chunk in chat.stream(QUESTION)) == whole.content
    print("chat, whole and streamed")

    async def ask() -> list[str]:
        replies = await chat.abatch([QUESTION] * 4)
        parts = [chunk.content async for chunk in chat.astream(QUESTION)]
        return [*(reply.text for reply in replies), "".join(map(str, parts))]

    texts = asyncio.run(ask())
    assert len(texts) == 5, texts
    assert all(texts), texts
    print("the same from asyncio, several at once")
    assert _chat(url, model, max_tokens=16, use_responses_api=True).invoke(QUESTION).text
    print("responses")


def ask_for_objects(url: str, model: str) -> None:
    """Ask for what only a model can write that ends its JSON."""
    chat = _chat(url, model, max_tokens=64)
    found = chat.with_structured_output(Capital, method="json_schema").invoke(QUESTION)
    assert isinstance(found, Capital), found
    print("structured output")
    armed = chat.bind_tools([weather], tool_choice="weather", strict=True)
    called = armed.invoke(QUESTION)
    assert isinstance(called, AIMessage)
    [call] = called.tool_calls
    assert weather.invoke(call["args"]).startswith("It rains in "), call
    streamed = None
    for chunk in armed.stream(QUESTION):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    [again] = streamed.tool_calls
    assert weather.invoke(again["args"]).startswith("It rains in "), streamed
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    assert chat.invoke([HumanMessage(QUESTION), called, result]).content is not None
    print("tools, whole and streamed, and their result")


def _chat(url: str, model: str, **settings: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        model=model,
        max_retries=0,
        temperature=0,
        **settings,
    )


if __name__ == "__main__":
    main(*sys.argv[1:3])
