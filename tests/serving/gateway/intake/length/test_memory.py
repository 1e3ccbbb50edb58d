"""What was learned of lengths is in a file when a gateway closes, and there again when it opens."""

import pytest

from router.types import Request
from serving.gateway.intake.length.memory import LengthMemory
from serving.gateway.intake.length.weights import shipped_lengths

REQUEST = Request(id="r", model="m", num_prompt_tokens=20, wording=(1, 2, 500))


@pytest.mark.asyncio
async def test_it_outlives_a_restart(tmp_path):
    lengths = shipped_lengths()
    memory = LengthMemory(lengths, tmp_path / "new" / "lengths", rank=1)
    for _ in range(100):
        lengths.learn(REQUEST, 9)
    memory.close()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["lengths.1"]
    other = shipped_lengths()
    assert other.forecast(REQUEST) != lengths.forecast(REQUEST)
    LengthMemory(other, tmp_path / "new" / "lengths", rank=1).close()
    assert other.forecast(REQUEST) == lengths.forecast(REQUEST)


@pytest.mark.asyncio
@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x80", b"\x84\xacnum_features\xa1x"])
async def test_a_file_that_cannot_be_read_is_as_good_as_none(tmp_path, content):
    (tmp_path / "lengths.0").write_bytes(content)
    lengths = shipped_lengths()
    LengthMemory(lengths, tmp_path / "lengths", rank=0).close()
    assert lengths.forecast(REQUEST) == shipped_lengths().forecast(REQUEST)


@pytest.mark.asyncio
async def test_without_a_file_nothing_is_kept(tmp_path):
    LengthMemory(shipped_lengths(), None, rank=0).close()
    assert not list(tmp_path.iterdir())
