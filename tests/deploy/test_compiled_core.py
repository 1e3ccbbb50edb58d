"""The core compiled: its own tests once more, and is it the same? The rest of the tests run plain.

Compiling takes a minute or two where it was not done already.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.deploy.compiled_core import ROOT, compile_core, needs_compiler
from tests.support.running_gateway import CHAT, free_port

pytestmark = [needs_compiler, pytest.mark.timeout(1800)]

FORM = "import serving; from serving.core_form import form; print(form())"

STRUCTS = """
import importlib, pkgutil
import msgspec
import serving, router
for module in pkgutil.walk_packages(router.__path__, "router."):
    importlib.import_module(module.name)
def below(cls):
    for each in cls.__subclasses__():
        yield each
        yield from below(each)
for struct in sorted(set(below(msgspec.Struct)), key=lambda each: (each.__module__, each.__name__)):
    if struct.__module__.startswith("router."):
        config = struct.__struct_config__
        print(struct.__module__, msgspec.inspect.type_info(struct), struct.__doc__,
              struct.__hash__ is None,
              *(f"{name}={getattr(config, name)}" for name in dir(config) if name[0] != "_"))
"""

SIMULATION = """
import dataclasses
import numpy as np
import serving
from router.providers.settings import FallbackSettings, ProviderSettings
from router.simulation.events import Network
from tests.router.simulation.test_simulator import Failure, SYNTHETIC, policies, simulation
cases = [{"policy": policy} for policy in policies()]
cases += [
    {"policy": "headway", **options}
    for options in (
        {"num_gateways": 2, "network": Network(snapshot_loss=0.3)},
        {"hedge_factor": 1.2, "failures": [Failure(0, 2.0, 5.0), Failure(1, 2.0, 1.0)]},
        {"workload": SYNTHETIC["bursty"](300, 0).at_rate(150.0), "num_engines": 2},
        {"workload": SYNTHETIC["conversations"](300, 0).at_rate(30.0)},
    )
]
for case in cases:
    run = simulation(**case).run()
    for field in dataclasses.fields(run):
        value = getattr(run, field.name)
        value = value.tobytes().hex() if isinstance(value, np.ndarray) else value
        print(case["policy"], field.name, value)
"""


def run(form: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with this form of the core, its output kept."""
    env = os.environ | {"HEADWAY_CORE": form, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True
    )


def outputs(code: str) -> list[str]:
    """Return what the code prints with the core plain, and compiled."""
    found = []
    for form in ("plain", "compiled"):
        done = run(form, "-c", code)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    return found


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    compile_core()


def test_both_forms_can_be_had() -> None:
    assert outputs(FORM) == ["plain\n", "compiled\n"]


def test_structs_are_the_same() -> None:
    """Their types are the schema of `/headway/state`; `frozen`, `array_like` and others matter."""
    plain, compiled = outputs(STRUCTS)
    assert plain.count("\n") > 40
    assert plain.splitlines() == compiled.splitlines()


def test_a_simulation_is_the_same() -> None:
    """Request by request and token by token, to the last bit, under every policy."""
    plain, compiled = outputs(SIMULATION)
    assert len(plain) > 100_000
    assert plain == compiled


def test_the_tests_of_the_core() -> None:
    tests = ("tests/router", "tests/serving/gateway/seen")
    done = run("compiled", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", *tests)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]


def test_gateways_of_a_served_fleet_run_it(tmp_path: Path) -> None:
    """In Ray's workers, which import what they get by pickles."""
    url = f"http://127.0.0.1:{free_port()}"
    headway = [sys.executable, "-m", "serving.cli.main", "serve", "deploy/emulated8.yaml"]
    log = tmp_path / "log"
    with log.open("w") as output:
        served = subprocess.Popen(
            [*headway, "--replicas", "2", "--port", url.rpartition(":")[2]],
            cwd=ROOT,
            env=os.environ | {"HEADWAY_CORE": "compiled", "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while "\nready after " not in log.read_text():
            assert served.poll() is None, log.read_text()
            time.sleep(0.2)
        question = {"model": "emulated", "messages": [{"role": "user", "content": "hi"}]}
        reply = httpx.post(url + CHAT, json=question | {"max_tokens": 3}, timeout=60)
        assert reply.status_code == 200
        assert httpx.get(url + "/headway/state").json()["core"] == "compiled"
    finally:
        served.send_signal(signal.SIGINT)
        assert served.wait(60) == 0
    assert "plain Python" not in log.read_text()
