"""How many tokens does a prompt have, or a list of prompts, before vLLM has counted them?

Of token ids the number is exact, of text an estimate. Either way the JSON is looked through by
searches that run at memory speed and not decoded: 1 MB of token ids takes 1.4 ms instead of 9.
"""

import re

import msgspec

from serving.gateway.http.errors import ApiError

# No search may go back over what it has passed (`*+`): white space without end would take forever.
_SPACE = rb"[ \t\r\n]*+"
# A list that holds numbers, or lists of them; the first of those may be empty.
_IDS = re.compile(rb"\[(?:%b\[%b\]%b,)*+%b\[?%b-?\d" % ((_SPACE,) * 5))
_TEXTS = re.compile(rb'\[%b"' % _SPACE)
_CHATS = re.compile(rb"\[%b\[" % _SPACE)
# Images and audio within a message, whose bytes are no text's.
_MEDIUM = re.compile(
    rb'"(?:url|image_url|data|file_data)"%b:%b"(?:data:[\w/;=.+-]{0,100},)?[A-Za-z0-9+/_-]{2048,}+'
    % ((_SPACE,) * 2)
)
# An image of 1024 × 1024 pixels takes 765 (OpenAI), 1,024 (Pixtral's 16 × 16 patches, merged) or
# 1,369 tokens (Qwen2-VL, 28 × 28).
_TOKENS_PER_MEDIUM = 1024
# Base64 of 4,096 values of two bytes, as of one token in models of 8 billion parameters.
_BYTES_PER_EMBED = 4096 * 2 * 4 // 3

_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode


class PromptSize(msgspec.Struct, frozen=True):
    """What one request gives a model to read."""

    num_tokens: int  # of all prompts
    num_prompts: int
    # From which the tokens were estimated; 0 where nothing can be learned from how many there are.
    num_text_bytes: int


def measure_prompt(
    field: str, prompt: bytes, *, tokens_per_byte: float, max_tokens: float, max_prompts: int
) -> PromptSize:
    """Return the size of what a field holds, in JSON; of each prompt at most `max_tokens` count.

    Raise `ApiError` 400 for more than `max_prompts` prompts.
    """
    num_text_bytes = len(prompt)
    if prompt.startswith(b"[{") and field != "prompt_embeds" and not _may_have_media(prompt):
        # Messages of text, as most prompts are: nothing has to be searched for.
        num_tokens = round(num_text_bytes * tokens_per_byte)
        if num_tokens > max_tokens:
            return PromptSize(max(1, int(max_tokens)), 1, 0)
        return PromptSize(max(1, num_tokens), 1, num_text_bytes)
    if _IDS.match(prompt):
        tokens = _count_ids(field, prompt, max_prompts)
        num_text_bytes = 0
    elif field == "prompt_embeds":
        embeds = _split_texts(field, prompt, max_prompts)
        tokens = [len(each) // _BYTES_PER_EMBED for each in embeds]
        num_text_bytes = 0
    elif _TEXTS.match(prompt):
        texts = _split_texts(field, prompt, max_prompts)
        tokens = [round(len(text) * tokens_per_byte) for text in texts]
    else:
        media = []
        if _may_have_media(prompt):
            media = [len(found[0]) for found in _MEDIUM.finditer(prompt)]
        num_tokens = round((len(prompt) - sum(media)) * tokens_per_byte)
        tokens = [num_tokens + len(media) * _TOKENS_PER_MEDIUM]
        if media or b'_url"' in prompt:
            num_text_bytes = 0  # an image elsewhere: few bytes, many tokens
        if _CHATS.match(prompt):
            # Several conversations, each with its own bound: taken to be of the same length.
            num_chats = _count_chats(field, prompt, max_prompts)
            tokens = [tokens[0] // num_chats] * num_chats
    if max(tokens) > max_tokens:
        num_text_bytes = 0  # not all of it is read
    num_read = sum(min(each, max_tokens) for each in tokens)
    return PromptSize(max(1, int(num_read)), len(tokens), num_text_bytes)


def _may_have_media(prompt: bytes) -> bool:
    """Whether there are the ends of the names in `_MEDIUM`: most prompts have none of them."""
    return b'url"' in prompt or b'data"' in prompt


def _count_chats(field: str, prompt: bytes, max_prompts: int) -> int:
    """Return the number of conversations in a list of them, by what stands between two.

    Written otherwise than most programs do, they are taken to be fewer.
    """
    num_chats = 1 + prompt.count(b"}],[{") + prompt.count(b"}], [{")
    _check_number(field, num_chats, max_prompts)
    return num_chats


def _count_ids(field: str, prompt: bytes, max_prompts: int) -> list[int]:
    """Return the number of ids in each list of them."""
    num_lists = prompt.count(b"[") - 1
    if num_lists < 1:
        return [prompt.count(b",") + 1]
    _check_number(field, num_lists, max_prompts)
    lists = [each[each.rfind(b"[") + 1 :] for each in prompt.split(b"]")[:num_lists]]
    return [each.count(b",") + bool(each.strip()) for each in lists]


def _split_texts(field: str, prompt: bytes, max_prompts: int) -> list[bytes]:
    """Return the texts of a list; a text alone is one."""
    # Every text ends by a quote that no backslash precedes, and begins with one: there are at
    # least half as many texts as such quotes. So a list of millions is never taken apart.
    _check_number(field, (prompt.count(b'"') - prompt.count(b'\\"')) // 2, max_prompts)
    if not _TEXTS.match(prompt):
        return [prompt]
    try:
        texts = [bytes(item) for item in _decode_items(prompt)]
    except (msgspec.MsgspecError, RecursionError):
        return [prompt]  # only Python can read it
    _check_number(field, len(texts), max_prompts)
    return texts


def _check_number(field: str, num_prompts: int, max_prompts: int) -> None:
    if num_prompts > max_prompts:
        raise ApiError(
            400,
            f"'{field}' has more than {max_prompts} prompts (gateway.max_sequences).",
            param=field,
        )
