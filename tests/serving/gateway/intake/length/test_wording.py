"""What is read of an instruction, and that nothing a client sends can stop it."""

import itertools
import json
import random
import zlib

import pytest

from serving.gateway.intake.length import wording
from serving.gateway.intake.length.cues import (
    CUES,
    FIRST_ASKED,
    FIRST_OPTION,
    FIRST_WORD,
    LEXICON,
    OPTIONS,
)
from serving.gateway.intake.length.weights import shipped_lengths
from serving.gateway.intake.length.wording import (
    NO_WORDING,
    NUM_FEATURES,
    instruction_features,
    read_wording,
)
from tests.serving.gateway.intake.asking import CHAT, ask, chat


def cues(text):
    return {CUES[number] for number in instruction_features(text) if number < len(CUES)}


def options(wording):
    numbers = [number - FIRST_OPTION for number in wording.features]
    return {OPTIONS[number] for number in numbers if 0 <= number < len(OPTIONS)}


def read(messages, **fields):
    prompt = json.dumps(messages).encode()
    data = json.dumps({"model": "m", "messages": messages, **fields}).encode()
    return read_wording(data, prompt)


@pytest.mark.parametrize(
    ("text", "cue"),
    [
        ("Write a one-sentence summary of it", "one sentence"),
        ("Write a comprehensive report on it", "long"),
        ("Briefly: is it so?", "brief"),
        ("List all rivers", "list"),
        ("Explain photosynthesis STEP BY STEP", "long"),
        ("Fill in the blank: the sky is ___", "fill"),
        ("Answer in JSON", "format"),
    ],
)
def test_cues_are_found(text, cue):
    assert cue in cues(text)


@pytest.mark.parametrize(
    ("text", "bits"), [("in 500 words", 10), ("three examples", 7), ("a story", None)]
)
def test_amounts_asked_for_are_read(text, bits):
    asked = [n - FIRST_ASKED for n in instruction_features(text) if 0 <= n - FIRST_ASKED < 14]
    assert asked == ([] if bits is None else [bits])


def test_the_last_turn_counts_and_the_system_prompt_is_known_again():
    turns = [
        {"role": "system", "content": "You answer in verse."},
        {"role": "user", "content": "Write a comprehensive report"},
        {"role": "assistant", "content": "..."},
        {"role": "user", "content": [{"type": "text", "text": "In one sentence, please"}]},
    ]
    found = read(turns)
    assert CUES.index("one sentence") in found.features
    assert CUES.index("long") not in found.features
    assert options(found) >= {"system prompt", "second turn"}
    assert found.system_prompt == read([turns[0], turns[1]]).system_prompt != 0
    assert read(turns[1:]).system_prompt == 0


def test_what_is_asked_for_beside_the_prompt_counts():
    hi = [{"role": "user", "content": "hi"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    found = read(hi, tools=tools, response_format={"type": "json_object"}, reasoning_effort="high")
    assert options(found) >= {"tools", "json", "high effort"}
    assert options(read(hi, stop=["."])) == {"stop"}


@pytest.mark.parametrize(
    "prompt",
    [
        b"",
        b"[1, 2, 3]",
        b"[[1], [2]]",
        b'["two", "texts"]',
        b'[{"role": 5}]',
        b'[{"role": "user", "content": null}]',
        b'[{"role": "user"',
        b'"\\ud800"',
        b'[{"role": "user", "content": "' + b"x" * 100_000,
        '[{"role": "user", "content": "数えて"}]'.encode(),
    ],
)
def test_nothing_stops_it(prompt):
    found = read_wording(b"{" + prompt + b"}", prompt)
    assert all(0 <= feature < NUM_FEATURES for feature in found.features)
    assert found.features == tuple(sorted(set(found.features)))


def test_a_request_comes_with_its_wording():
    brief = ask(CHAT, chat(messages=[{"role": "user", "content": "In one word: why?"}])).request
    assert CUES.index("one word") in brief.wording
    assert ask(CHAT, chat()).request.wording != NO_WORDING.features


def test_the_shipped_weights_tell_a_sentence_from_a_report():
    lengths = shipped_lengths()
    for topic in ("the water cycle", "our third quarter", "Kubernetes"):
        one, other = (
            lengths.forecast(
                ask(CHAT, chat(messages=[{"role": "user", "content": f"{text} {topic}"}])).request
            )
            for text in ("Write a one-sentence summary of", "Write a comprehensive report on")
        )
        assert 2 * one.num_booked_tokens < other.num_booked_tokens


def test_what_is_no_text_says_nothing():
    """As Python reads it, half a pair of surrogates may stand in a body: vLLM has the last word."""
    prompt = b'"\xed\xa0\x80"'
    assert read_wording(b'{"input": ' + prompt + b"}", prompt) == NO_WORDING


def test_words_and_pairs_have_the_numbers_that_weights_were_trained_for(monkeypatch):
    """Whatever is kept of earlier ones."""
    monkeypatch.setattr(wording, "_MAX_KEPT_WORDS", 8)
    rng = random.Random(6)
    known = ["write", "a", "one", "sentence", "essay", "über", "数", "42", "x" * 60, "yes", "or"]
    for _ in range(50):
        text = " ".join(rng.choices(known, k=rng.randint(1, 30)))
        words = wording._WORDS(text)
        pairs = [f"{one} {other}" for one, other in itertools.pairwise(words)]
        phrases = [*words, *pairs, f"^{words[0]}", f"^{' '.join(words[:2])}", f"${words[-1]}"]
        span = NUM_FEATURES - FIRST_WORD
        found = instruction_features(text)
        assert {each for each in found if each >= FIRST_WORD} == {
            FIRST_WORD + zlib.crc32(phrase.encode()) % span for phrase in phrases
        }
        assert {each for each in found if each < len(CUES)} == {
            LEXICON[phrase] for phrase in (*words, *pairs) if phrase in LEXICON
        }
        assert len(wording._checksum_of.__self__) <= 8


def test_no_two_cues_are_taken_for_each_other():
    assert len({zlib.crc32(phrase.encode()) for phrase in LEXICON}) == len(LEXICON)
