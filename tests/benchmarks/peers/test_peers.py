"""Peers: what they are told of the engines, and one of them in front of emulated servers."""

from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from benchmarks.peers.fleet import EmulatedFleet
from benchmarks.peers.routers import PEERS
from benchmarks.peers.routers.attached import Attached
from benchmarks.peers.routers.haproxy import HAProxy
from benchmarks.peers.routers.litellm import LiteLLM
from benchmarks.peers.routers.nginx import Nginx
from benchmarks.peers.routers.peer import MissingError, answers
from benchmarks.systems.system import EmulatedHeadway
from serving.config import parse

URLS = ["http://127.0.0.1:7001", "http://127.0.0.1:7002"]


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.title)
def test_is_told_of_every_engine(peer, tmp_path: Path) -> None:
    for policy in peer.policies:
        system = peer(policy, URLS, "emulated")
        command = system.command(tmp_path, 7000)
        written = " ".join(path.read_text() for path in tmp_path.iterdir())
        told = f"{' '.join(command)} {written}"
        assert all(urlsplit(url).netloc in told for url in URLS)
        assert policy in told
        assert "7000" in told
        assert system.name == f"{peer.title} {policy}"
        stock = peer(policy, URLS, "emulated", "stock")
        assert stock.name == f"{peer.title} {policy}, stock engines"


def test_never_the_compromised_release(tmp_path: Path) -> None:
    assert LiteLLM.package == "litellm[proxy]==1.106.2"
    LiteLLM("least-busy", URLS, "emulated").command(tmp_path, 7000)
    config = yaml.safe_load((tmp_path / "litellm.yaml").read_text())
    assert [each["litellm_params"]["api_base"] for each in config["model_list"]] == [
        f"{url}/v1" for url in URLS
    ]


def test_what_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingError, match="nginx"):
        Nginx.install()


def test_headways_engines_are_the_same() -> None:
    config = EmulatedHeadway("h100-llama8b", 8, "emulated").config(8000, 8001)
    args = parse(config["applications"][0]["args"])
    assert args.engine.factory == "serving.engine.emulated.engine:EmulatedEngine"
    assert args.engine.args == {"profile": "h100-llama8b"}
    assert args.replicas == 8


async def test_haproxy_in_front_of_emulated_servers() -> None:
    try:
        HAProxy.install()
    except MissingError as error:
        pytest.skip(str(error))
    async with EmulatedFleet("h100-llama8b", 2, "emulated") as fleet:
        assert len(fleet.urls) == 2
        async with HAProxy("leastconn", fleet.urls, "emulated") as peer:
            assert answers(peer.urls[0], "emulated")
        assert not answers(peer.urls[0], "emulated")
        assert fleet.num_late() == 0


def test_attach_is_told_of_every_server(tmp_path: Path) -> None:
    command = Attached("", URLS, "m").command(tmp_path, 7000)
    assert command[-5:] == ["attach", *URLS, "--port", "7000"]
    assert Attached("", URLS, "m").name == "headway attach"
