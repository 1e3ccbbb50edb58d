"""Every manifest that the chart makes of an example is one that a cluster takes."""

import json
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest

from tests.deploy.k8s.chart import EXAMPLES, Values, read, render

SCHEMAS = {
    schema["properties"]["kind"]["const"]: schema
    for path in (Path(__file__).parent / "schemas").glob("*.json")
    for schema in [json.loads(path.read_text())]
}
OLDEST, NEWEST = "1.29", "1.37"  # Chart.yaml names the former


def check(manifest: Values, version: str) -> None:
    """Raise `ValidationError` unless Kubernetes, or the operator of its kind, takes it."""
    if (schema := SCHEMAS.get(manifest["kind"])) is None:
        kubernetes_validate.validate(manifest, version, strict=True)
        return
    jsonschema.validate(manifest, schema)
    for pod in pods(manifest):
        kubernetes_validate.validate(pod, version, strict=True)


def pods(manifest: Values) -> list[Values]:
    """Return the pod templates of a RayService as pods; none for another kind."""
    cluster = manifest["spec"].get("rayClusterConfig")
    if cluster is None:
        return []
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [{"apiVersion": "v1", "kind": "Pod", **group["template"]} for group in groups]


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_a_cluster_takes_it(example: Path, version: str) -> None:
    manifests = render(read(example))
    for manifest in manifests:
        check(manifest, version)
    names = [(each["kind"], each["metadata"]["name"]) for each in manifests]
    assert len(set(names)) == len(names) >= 6


def test_the_examples_are_these() -> None:
    assert [path.stem for path in EXAMPLES] == ["cpu", "four-nodes", "one-node"]


def test_what_a_cluster_would_refuse_is_found() -> None:
    service = next(each for each in render(read(EXAMPLES[0])) if each["kind"] == "RayService")
    container = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    container["containers"][0]["imagePullPolcy"] = "Always"
    with pytest.raises(jsonschema.ValidationError, match="imagePullPolcy"):
        check(service, NEWEST)
    del container["containers"][0]["imagePullPolcy"]
    check(service, NEWEST)
    service["spec"]["serveConfig"] = ""
    with pytest.raises(jsonschema.ValidationError, match="serveConfig"):
        check(service, NEWEST)
