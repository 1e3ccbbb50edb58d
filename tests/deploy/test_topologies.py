"""Every file in deploy/ is what `serve run` and `headway serve` take, and can be planned."""

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serving.cli.config_file import check_with_ray, load_config_file
from serving.planning.hardware import Gpu, Hardware
from serving.planning.plan import make_plan

GIB = 1 << 30
FOLDER = Path(__file__).parents[2] / "deploy"
FILES = sorted(FOLDER.glob("*.yaml"))


def hardware(path: Path) -> Hardware:
    gpus = (Gpu(i, "NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, "9.0", 18) for i in range(8))
    on_gpu = path.name.startswith("gpu8")
    return Hardware(
        cores=tuple(range(64 if on_gpu else 2)),
        num_ram_bytes=500 * GIB,
        num_free_ram_bytes=400 * GIB if on_gpu else 16 * GIB,
        gpus=tuple(gpus) if on_gpu else (),
    )


def test_all_are_here() -> None:
    assert {path.stem for path in FILES} == {
        "cpu",
        "cpu-haproxy",
        "emulated8",
        "gpu8-tp1",
        "gpu8-tp2x4",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_takes_it_and_it_fits(path: Path) -> None:
    ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    file = load_config_file(path, {})
    check_with_ray(file)
    plan = make_plan(file.config, hardware(path))
    expected = {"cpu": 2, "cpu-haproxy": 2, "emulated8": 8, "gpu8-tp1": 8, "gpu8-tp2x4": 4}
    assert plan.num_replicas == expected[path.stem]
    gpus = plan.num_replicas * plan.num_gpus_per_replica
    assert gpus == (8 if path.name.startswith("gpu8") else 0)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_only_the_front_that_listens_has_the_port(path: Path) -> None:
    """Serve's own proxy would otherwise take the gateway's port under `serve run`."""
    content = yaml.safe_load(path.read_text())
    front = content["applications"][0]["args"]["gateway"].get("front", "own")
    assert (content["proxy_location"] == "Disabled") == (front == "own")
    assert load_config_file(path, {}).port == 8000


def test_no_sample_is_open_to_a_network_without_keys() -> None:
    """Whatever else is in the folder: manifests, images, units."""
    listening = []
    for path in sorted(FOLDER.rglob("*")):
        if not path.is_file() or path.suffix in (".py", ".pyc", ".json"):
            continue
        lines = [line.partition("#")[0] for line in path.read_text().splitlines()]
        text = "\n".join(lines)
        if "0.0.0.0" in text or "insecure" in text:
            listening.append(path.name)
            assert "keys_file" in text, path
            assert "insecure" not in text, path
    assert listening  # containers do
