import pytest

from router.fleet.prefill_chunk import prefill_chunk_tokens


@pytest.mark.parametrize(
    ("budget", "chunk"), [(8192, 1024), (2048, 256), (512, 128), (256, 128), (64, 32), (1, 1)]
)
def test_an_eighth_but_not_little(budget: int, chunk: int) -> None:
    assert prefill_chunk_tokens(budget) == chunk
