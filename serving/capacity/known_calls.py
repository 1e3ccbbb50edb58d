"""Requests of known size, of which no two share a block of their prompts."""

import itertools
import json

from benchmarks.load.client import Call

# Token ids to say nothing with: beyond the special ones, within every vocabulary.
_FIRST_ID, _NUM_IDS = 1000, 20_000


class KnownCalls:
    """Makes streamed completions that come to their end, each of its own token ids."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._numbers = itertools.count()

    def make(self, num_tokens: int, num_output_tokens: int) -> Call:
        """A prompt of so many tokens, for so many."""
        number = next(self._numbers)
        ids = [_FIRST_ID + (number * 7919 + each * each) % _NUM_IDS for each in range(num_tokens)]
        body = {
            "model": self._model,
            "prompt": ids,
            "max_tokens": num_output_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        return Call("/v1/completions", json.dumps(body).encode(), stream=True)
