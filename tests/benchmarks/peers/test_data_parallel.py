"""vLLM's own data parallelism as a peer: it starts, answers, is measured, and leaves nothing."""

from pathlib import Path

import pytest

from benchmarks.load.mix import Mix
from benchmarks.peers import testbed
from benchmarks.peers.data_parallel import VllmDataParallel
from serving.planning.bundled_model import SERVED_MODEL_NAME
from tests.support.tiny_model import tiny_model


def test_is_told_of_its_engines(tmp_path: Path) -> None:
    peer = VllmDataParallel(2, num_sharing=6)
    command = " ".join(peer.command(tmp_path, 7000))
    assert "--data-parallel-size 2" in command
    assert "--engines 6" in command
    assert "--settings stock" in command
    assert (peer.name, peer.engines) == ("vllm-dp, stock engines", "stock")


@pytest.mark.engine
@pytest.mark.timeout(600)
async def test_it_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    mix = Mix(short_tokens=(8, 16), long_tokens=(100, 200), output_tokens=(4, 8))
    peer = VllmDataParallel(2, model=str(tiny_model(tmp_path / "tiny")))
    async with peer:
        (launch,) = peer.launches
        launch.refresh()
        titles = [" ".join(process.cmdline()) for process in launch.living()]
        assert sum("EngineCore_DP" in title for title in titles) == 2
        assert sum("APIServer" in title for title in titles) == 2
        bed = testbed.Testbed({peer.name: peer}, {peer.name: peer}, 60.0)
        requests = mix.arrivals(4.0, 5.0, "seed")
        run = await bed.measure_run(peer.name, requests, mix, SERVED_MODEL_NAME, 0, "salt")
        assert [sample.error for sample in run.samples if sample.error] == []
        assert len(run.samples) == 20
        assert run.cost.engines_s > run.cost.router_s > 0.0
    assert launch.living() == []
    assert peer.killed == []
