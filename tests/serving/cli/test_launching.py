"""A launch of several models as it goes on, told by what Ray Serve would say."""

import contextlib
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from serving.cli.config_file import ConfigFile, load_config_file
from serving.cli.interrupts import StopSignal
from serving.cli.launching import service_watch
from serving.cli.launching.model_edits import ModelEdits
from serving.cli.launching.progress import AppState, DeploymentState, ProgressDisplay
from serving.cli.launching.service_watch import ServiceWatch
from serving.gateway.http.endpoint import StartError
from serving.planning.hardware import Hardware
from serving.planning.machine.nodes import this_machine
from serving.planning.service.service_plan import ServicePlan, plan_service

CORES = Hardware(tuple(range(4)), 16 << 30, 16 << 30, vllm_build="cpu")
UP, DOWN = DeploymentState(1, "", is_settled=True), DeploymentState()
FAILED = DeploymentState(0, "ValueError: no memory")


def model(name: str, **more: Any) -> dict[str, Any]:
    return {"served_model_name": name, **more}


def write(folder: Path, *models: dict[str, Any], **args: Any) -> Path:
    path = folder / "config.yaml"
    args = {"device": "cpu", "engine": "emulated", "replicas": 1, **args}
    application = {"name": "app", "import_path": "serving.cluster.application:build"}
    content = {"applications": [{**application, "args": {**args, "models": list(models)}}]}
    path.write_text(yaml.safe_dump({"proxy_location": "Disabled", **content}))
    return path


def state(status: str = "DEPLOYING", **deployments: DeploymentState) -> AppState:
    found = {name.replace("_", "-"): each for name, each in deployments.items()}
    return AppState(status, "", found)


class Edited:
    """Edits of a file, and what is deployed for them."""

    def __init__(self, folder: Path, *models: dict[str, Any]) -> None:
        self.folder = folder
        path = write(folder, *models)
        self.console = Console(file=None, force_terminal=False, width=300, record=True)
        self.deployed: list[tuple[dict[str, Any], ServicePlan, list[str]]] = []
        file = self.load()
        assert file.config.watch_file == path
        plan = plan_service(file.config, CORES)
        self.edits = ModelEdits(
            file, plan, this_machine(CORES), self.console, reload=self.load, deploy=self.deploy
        )

    def load(self) -> ConfigFile:
        return load_config_file(self.folder / "config.yaml", {})

    def deploy(self, args: dict[str, Any], plan: ServicePlan, leaving: Any) -> None:
        self.deployed.append((args, plan, [each.served_model_name for _, each in leaving]))

    def look(self, seen: AppState | None = None) -> str:
        """What is printed at a look."""
        with self.console.capture() as capture:
            self.edits.look(seen or state(Gateway=UP))
        return capture.get()


class TestEdits:
    def test_a_model_that_leaves_stays_until_gateways_have_heard_of_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        edited = Edited(tmp_path, model("a"), model("b"))
        assert edited.look() == ""
        write(tmp_path, model("a", replicas=2), model("c"))
        said = edited.look()
        assert "model a is resized: from 1 to 2." in said
        assert "model b is removed" in said
        assert "model c is added: 1 engine start." in said
        [(args, plan, leaving)] = edited.deployed
        assert [each["served_model_name"] for each in args["models"]] == ["a", "c"]
        assert [each.num_replicas for each in plan.plans] == [2, 1]
        assert leaving == ["b"]
        edited.look()  # at once it may be what Serve said before
        now_s = time.monotonic() + 5.0
        monkeypatch.setattr(time, "monotonic", lambda: now_s)
        edited.look(state(Gateway=DOWN))
        assert len(edited.deployed) == 1
        edited.look()
        assert edited.deployed[1:] == [(args, plan, [])]
        assert edited.look() == ""
        assert len(edited.deployed) == 2

    def test_what_cannot_be_used_changes_nothing_and_is_said_once(self, tmp_path: Path) -> None:
        edited = Edited(tmp_path, model("a"), model("b"))
        write(tmp_path, model("a"), model("b", aliases=["a"]))
        assert "is not used: models.1: the name 'a' is that of models.0" in edited.look()
        assert edited.look() == ""
        write(tmp_path)
        assert "is not used: models: there are none left" in edited.look()
        (tmp_path / "config.yaml").write_text("{")
        assert "is not used" in edited.look()
        assert not edited.deployed
        write(tmp_path, model("a"), model("b", aliases=["bee"]))
        assert "model b has changed" in edited.look()
        assert edited.edits.plan.plans[1].aliases == ("bee",)

    def test_other_keys_are_not_taken_up(self, tmp_path: Path) -> None:
        edited = Edited(tmp_path, model("a"), model("b"))
        write(tmp_path, model("a"), model("b"), router={"max_hold_s": 5}, device="auto")
        assert edited.look() == ""
        write(tmp_path, model("a"), model("b", replicas=2), router={"max_hold_s": 5})
        edited.look()
        [(args, plan, _)] = edited.deployed
        assert "router" not in args
        assert plan.models[0][0].router.max_hold_s == 300.0

    def test_what_models_leave_out_is(self, tmp_path: Path) -> None:
        edited = Edited(tmp_path, model("a", replicas=1), model("b"))
        write(tmp_path, model("a", replicas=1), model("b"), replicas=2)
        assert "model b is resized: from 1 to 2." in edited.look()


def watch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *states: AppState, names: str = "ab"
) -> tuple[ServiceWatch, Console]:
    """A watch that is told these states one after the other, and then that it is to stop."""
    path = write(tmp_path, *map(model, names))
    plan = plan_service(load_config_file(path, {}).config, CORES)
    told = iter(states)

    def read(app: str) -> AppState:
        with contextlib.suppress(StopIteration):
            return next(told)
        raise StopSignal(2)

    monkeypatch.setattr(service_watch, "read_app_state", read)
    monkeypatch.setattr(ServiceWatch, "pause", lambda self, duration_s: None)
    session = SimpleNamespace(call=lambda ask: ask(), folder=None, logs=None)
    console = Console(file=None, force_terminal=False, width=300)
    return ServiceWatch("app", plan, session, console), console  # type: ignore[arg-type]


class TestWatch:
    def test_one_of_several_that_cannot_start_is_told_of_and_not_waited_for(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        one, console = watch(
            monkeypatch,
            tmp_path,
            state(Engine_a=DOWN, Engine_b=FAILED, Gateway=UP),
            state("DEPLOY_FAILED", Engine_a=UP, Engine_b=FAILED, Gateway=UP),
        )
        with console.capture() as capture:
            one.wait_until_ready(ProgressDisplay(console))
        said = capture.get()
        assert said.count("model b cannot start: ValueError: no memory (the others go on)") == 1
        assert "a engine 1 ready, b engine 1 cannot start" in said
        assert one.num_failed == 1

    def test_if_none_starts_the_launch_fails(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        one, console = watch(monkeypatch, tmp_path, state(Engine_a=FAILED, Engine_b=FAILED))
        with console.capture(), pytest.raises(StartError, match=r"none of the models can.*memory"):
            one.wait_until_ready(ProgressDisplay(console))

    def test_so_it_does_if_the_only_one_or_a_gateway_does_not(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        for names, seen in (("a", {"Engine_a": FAILED}), ("ab", {"Gateway": FAILED})):
            one, console = watch(monkeypatch, tmp_path, state(**seen), names=names)
            with console.capture(), pytest.raises(StartError, match="cannot start: ValueError"):
                one.wait_until_ready(ProgressDisplay(console))

    def test_what_becomes_of_engines_is_told_by_model(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        up = state("RUNNING", Engine_a=UP, Engine_b=UP, Gateway=UP)
        one, console = watch(
            monkeypatch,
            tmp_path,
            up,
            state("UNHEALTHY", Engine_a=UP, Engine_b=FAILED, Gateway=UP),
            state("UNHEALTHY", Engine_a=UP, Engine_b=FAILED, Gateway=UP),
            up,
        )
        with console.capture():
            one.wait_until_ready(ProgressDisplay(console))
        with console.capture() as capture, pytest.raises(StopSignal):
            one.watch(None)
        assert capture.get().splitlines() == [
            "model b: 0 of 1 engines ready: ValueError: no memory",
            "model b: 1 of 1 engines ready",
        ]
