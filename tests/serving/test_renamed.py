"""Old names are accepted until the next release, each with one line that names the new one."""

import logging
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from router.core.settings import RouterSettings
from router.scheduling.ablation import PARTS, RENAMED_PARTS
from serving.cli.config_file import IMPORT_PATH, load_config_file
from serving.config import ConfigError, EngineConfig, parse, read, renamed
from serving.config.renamed import FACTORIES, IMPORT_PATHS, KEYS, current_args, current_parts

ROOT = Path(__file__).parents[2]
OLD_ROUTER = {
    "promise_base_s": 1.5,
    "promise_s_per_token": 0.25,
    "promise_interactive_factor": 0.75,
    "promise_batch_s": 60.0,
    "ablate": ["hold", "externality"],
}
NEW_ROUTER = {
    "ttft_target_base_s": 1.5,
    "ttft_target_s_per_token": 0.25,
    "ttft_target_interactive_factor": 0.75,
    "ttft_target_batch_s": 60.0,
    "ablate": ("hold", "congestion_cost"),
}


@pytest.fixture(autouse=True)
def _fresh_process() -> None:
    """Let nobody have been warned of anything yet."""
    renamed._warn_once.cache_clear()


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Any:
    """Return a function that returns the warnings of old names so far."""

    def so_far() -> list[str]:
        return [
            each.getMessage() for each in caplog.records if each.name == "serving.config.renamed"
        ]

    with caplog.at_level(logging.WARNING):
        yield so_far


def write_config(folder: Path, args: dict[str, Any], import_path: str = IMPORT_PATH) -> Path:
    path = folder / "config.yaml"
    application = {"name": "x", "import_path": import_path, "args": args}
    path.write_text(yaml.safe_dump({"applications": [application]}))
    return path


def test_the_tables_lead_to_what_there_is(warnings: Any) -> None:
    for old, new in KEYS.items():
        assert old.startswith("router.")
        assert old.removeprefix("router.") not in RouterSettings.model_fields
        assert new.removeprefix("router.") in RouterSettings.model_fields
    assert set(FACTORIES.values()) == {
        EngineConfig().factory,
        parse({"engine": "emulated"}).engine.factory,
    }
    assert set(IMPORT_PATHS.values()) == {IMPORT_PATH}
    assert set(RENAMED_PARTS.values()) <= set(PARTS)
    assert not RENAMED_PARTS.keys() & set(PARTS)
    assert warnings() == []


@pytest.mark.parametrize(("old", "new"), KEYS.items())
def test_a_key(old: str, new: str, warnings: Any) -> None:
    value = OLD_ROUTER[old.removeprefix("router.")]
    args = {"router": {old.removeprefix("router."): value}}
    for _ in range(3):
        router = parse(args).router
        assert router.model_dump(exclude_unset=True) == {new.removeprefix("router."): value}
    assert args == {"router": {old.removeprefix("router."): value}}
    assert warnings() == [f"{old} is now called {new}; the next release drops the old name"]


@pytest.mark.parametrize(("old", "new"), FACTORIES.items())
def test_a_factory(old: str, new: str, warnings: Any) -> None:
    for _ in range(3):
        engine = parse({"engine": {"factory": old, "args": {"seed": 1}}}).engine
        assert (engine.factory, engine.args) == (new, {"seed": 1})
    assert warnings() == [f"{old} is now called {new}; the next release drops the old name"]


def test_a_part_to_ablate(warnings: Any) -> None:
    for _ in range(3):
        router = parse({"router": {"ablate": ["hold", "externality"]}}).router
        assert router.ablate == ("hold", "congestion_cost")
    assert current_parts(("externality",)) == ("congestion_cost",)
    assert len(warnings()) == 1
    assert warnings()[0].startswith("externality is now called congestion_cost;")


def test_both_names_are_an_error() -> None:
    for old, new in KEYS.items():
        both = {name.removeprefix("router."): 1.0 for name in (old, new)}
        with pytest.raises(ConfigError, match=f"{old} is the old name of {new}: only one"):
            parse({"router": both})
    pattern = "router.ablate: externality is the old name of congestion_cost: only one"
    with pytest.raises(ConfigError, match=pattern):
        parse({"router": {"ablate": ["congestion_cost", "externality"]}})


@pytest.mark.parametrize(
    "args",
    [
        {"router": None},
        {"router": "promise_base_s"},
        {"router": {"ablate": "externality"}},
        {"router": {"ablate": [["externality"]]}},
        {"router": {"ablate": 1}},
        {"engine": {"factory": 1}},
        {"engine": {"factory": ["serving.engine:VllmEngine"]}},
    ],
)
def test_malformed_values_are_left_to_the_configuration(args: Any, warnings: Any) -> None:
    assert current_args(args) == args
    with pytest.raises(ConfigError):
        parse(args)
    assert warnings() == []


def test_present_names_are_not_touched(warnings: Any) -> None:
    args = {"model": "m", "router": {"ablate": ["hold"], "seed": 7}, "engine": {"args": {"a": 1}}}
    assert current_args(args) == args
    assert warnings() == []


class TestLaunch:
    """`headway serve FILE --set KEY=VALUE`."""

    def test_what_is_launched_has_present_names(self, tmp_path: Path, warnings: Any) -> None:
        """Each engine and each gateway parses it again, in a process of its own."""
        factory = "benchmarks.emulated:EmulatedEngine"
        args = {"router": OLD_ROUTER, "engine": {"factory": factory}}
        file = load_config_file(write_config(tmp_path, args, "serving.app:build"), {})
        assert file.application["import_path"] == "serving.cluster.application:build"
        assert file.config.router.model_dump(exclude_unset=True) == NEW_ROUTER
        assert len(warnings()) == 1 + 4 + 1 + 1  # import path, keys, factory, part
        assert len(set(warnings())) == len(warnings())
        renamed._warn_once.cache_clear()
        assert parse(file.application["args"]) == file.config
        assert len(warnings()) == 7

    def test_an_option(self, warnings: Any) -> None:
        file = load_config_file(
            None, {"router.promise_base_s": 1.5, "engine.factory": "serving.engine:VllmEngine"}
        )
        assert file.config.router.ttft_target_base_s == 1.5
        assert file.config.engine.factory == "serving.engine.vllm.engine:VllmEngine"
        assert len(warnings()) == 2

    def test_an_option_beside_the_other_name_in_the_file(self, tmp_path: Path) -> None:
        path = write_config(tmp_path, {"router": {"promise_base_s": 1.0}})
        assert load_config_file(path, {"router.promise_base_s": 2.0}).config == parse(
            {"watch_file": str(path), "router": {"ttft_target_base_s": 2.0}}
        )
        with pytest.raises(ConfigError, match=r"router\.promise_base_s .*ttft_target_base_s"):
            load_config_file(path, {"router.ttft_target_base_s": 2.0})

    def test_a_file_that_is_read_anew(self, tmp_path: Path, warnings: Any) -> None:
        path = write_config(tmp_path, {"router": OLD_ROUTER})
        assert read(path) == read(path)
        assert read(path).router.model_dump(exclude_unset=True) == NEW_ROUTER
        assert len(warnings()) == 5

    def test_another_import_path_is_still_refused(self, tmp_path: Path) -> None:
        for path in ("serving.app:main", ["serving.app:build"], None):
            with pytest.raises(ConfigError, match=r"import_path: .* is not serving\.cluster"):
                load_config_file(write_config(tmp_path, {}, path), {})  # type: ignore[arg-type]


def test_the_line_reaches_whoever_started_it() -> None:
    options = ["--set", "router.promise_base_s=1", "--set", "engine=emulated", "--replicas", "1"]
    result = subprocess.run(
        [sys.executable, "-m", "serving.cli.main", "plan", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == textwrap.dedent("""\
        router.promise_base_s is now called router.ttft_target_base_s; \
the next release drops the old name
        """)
