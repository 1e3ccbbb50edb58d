# /// script
# dependencies = ["instructor==1.17.0"]
# ///
"""instructor: replies as pydantic objects."""

import sys
from importlib.metadata import version
from typing import Any, Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field

ASKED: list[Any] = [
    {"role": "user", "content": "Paris is the capital of France. Which city is it?"}
]


class Capital(BaseModel):
    city: Literal["Paris", "Rome"]
    num_words: int = Field(ge=1, le=9)


def main(url: str, model: str) -> None:
    print(f"instructor {version('instructor')}")
    plain = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked: Any = {"model": model, "messages": ASKED, "max_tokens": 100, "temperature": 0}
    for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
        client = instructor.from_openai(plain, mode=mode)
        # No retries: what the engine may write is bounded, so the first reply is valid.
        found = client.chat.completions.create(**asked, response_model=Capital, max_retries=0)
        assert isinstance(found, Capital), found
        *_, last = client.chat.completions.create_partial(
            **asked, response_model=Capital, max_retries=0
        )
        assert last.model_dump() == found.model_dump(), (last, found)
        print(f"{mode.name.lower()}: an object, whole and streamed")
    plain.close()


if __name__ == "__main__":
    main(*sys.argv[1:3])
