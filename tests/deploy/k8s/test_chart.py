"""What the chart makes is safe, and fits what Headway and Ray Serve do with it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.application_state import _get_shared_build_app_label_selector
from ray.serve.schema import ServeDeploySchema

from serving.cluster.ray_session import private_environment
from serving.config import Config, EngineConfig, parse
from serving.planning.hardware import Gpu, Hardware
from serving.planning.plan import make_plan
from tests.deploy.k8s.chart import EXAMPLES, CannotRender, Values, merge, read, render

GIB = 1 << 30
LEAST = {"image": {"repository": "r"}, "keys": {"secret": "k"}}
ONE_NODE = next(path for path in EXAMPLES if path.stem == "one-node")
each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


def of_kind(manifests: list[Values], kind: str) -> list[Values]:
    return [each for each in manifests if each["kind"] == kind]


def ray_service(values: Values) -> Values:
    return of_kind(render(values), "RayService")[0]["spec"]


def serve_config(values: Values) -> Values:
    return yaml.safe_load(ray_service(values)["serveConfigV2"])


def config_of(values: Values) -> Config:
    return parse(serve_config(values)["applications"][0]["args"])


def groups(values: Values) -> tuple[Values, Values]:
    """Return the head's group and the engines'."""
    cluster = ray_service(values)["rayClusterConfig"]
    return cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]


def container(group: Values) -> Values:
    return group["template"]["spec"]["containers"][0]


# --- what would not work, or not be safe, is refused ------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"keys": {"secret": ""}}, "keys.secret"),
        ({"image": {"repository": ""}}, "image.repository"),
        ({"engine": {"gpus": 16}}, "do not fit nodes of 8"),
        ({"engine": {"gpus": 2, "perNode": 5}}, "do not fit nodes of 8"),
        ({"device": "cpu"}, "must be 0 with device cpu"),
        ({"autoscaler": {"enabled": True, "minNodes": 3, "maxNodes": 2}}, "minNodes"),
        ({"autoscaler": {"enabled": True, "minNodes": 2, "maxNodes": 3}}, "nodes.count"),
        ({"nodes": {"count": 2}}, "ReadWriteMany"),
        ({"serviceMonitor": {"enabled": True}}, "admin key"),
        ({"gatway": {}}, "gatway"),
    ],
)
def test_refused(values: Values, said: str) -> None:
    render(LEAST)
    with pytest.raises(CannotRender, match=said):
        render(merge(LEAST, values))


def test_no_value_opens_it_without_keys() -> None:
    loose: dict[str, Any] = {
        "gateway": {"host": "::", "port": 80, "front": "haproxy", "tls_cert_file": "/cert"},
        "auth": {"keys_file": None, "open_metrics": True},
    }
    config = config_of(merge(LEAST, {"config": loose}))
    assert config.gateway.host == "0.0.0.0"
    assert config.auth.keys_file == Path("/etc/headway/keys/keys.json")
    assert not config.auth.open_metrics
    assert (config.gateway.front, config.gateway.port) == ("own", 8000)
    assert config.gateway.tls_cert_file is None


@each_example
def test_no_service_leaves_the_cluster_and_ray_asks_for_its_token(example: Path) -> None:
    manifests = render(read(example))
    spec = of_kind(manifests, "RayService")[0]["spec"]
    assert spec["rayClusterConfig"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    assert all(each["spec"]["clusterIP"] == "None" for each in of_kind(manifests, "Service"))
    assert not of_kind(manifests, "Secret")  # values are no place for secrets


@each_example
def test_pods_have_no_privileges(example: Path) -> None:
    for group in groups(read(example)):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000  # as in deploy/docker
        assert container(group)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not any("hostPath" in volume for volume in pod["volumes"])
    mounts = {mount["name"]: mount for mount in container(groups(read(example))[1])["volumeMounts"]}
    assert mounts["keys"]["mountPath"] == "/etc/headway/keys"
    assert mounts["keys"]["readOnly"] is True


# --- Ray Serve and Headway take it --------------------------------------------


@each_example
def test_serve_takes_its_config_and_the_engines_fit_a_node(example: Path) -> None:
    values = read(example)
    config = serve_config(values)
    ServeDeploySchema.model_validate(config)
    _, engines = groups(values)
    limits = container(engines)["resources"]["limits"]
    gpu = Gpu(0, "NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, "9.0", 18)
    node = Hardware(
        cores=tuple(range(int(limits["cpu"]))),
        num_ram_bytes=int(limits["memory"].removesuffix("Gi")) * GIB,
        num_free_ram_bytes=int(limits["memory"].removesuffix("Gi")) * GIB,
        gpus=(gpu,) * int(limits.get("nvidia.com/gpu", 0)),
    )
    plan = make_plan(config_of(values), node)
    deployments = {each["name"]: each for each in config["applications"][0]["deployments"]}
    assert deployments["Engine"]["num_replicas"] == plan.num_replicas * engines["replicas"]
    options = deployments["Engine"]["ray_actor_options"]
    assert options["num_gpus"] == plan.num_gpus_per_replica
    num_gateways = deployments["Gateway"]["num_replicas"]
    assert config_of(values).gateway.num_replicas == num_gateways  # tenants' limits go by it
    cpus = options["num_cpus"] * plan.num_replicas
    cpus += plan.gateway_actor_options["num_cpus"] * deployments["Gateway"]["max_replicas_per_node"]
    assert cpus <= int(limits["cpu"])


@each_example
def test_engines_are_planned_on_a_node_that_has_them(example: Path) -> None:
    """The head has no GPU, so Ray must not build the application there."""
    schema = ServeDeploySchema.model_validate(serve_config(read(example)))
    head, engines = groups(read(example))
    assert _get_shared_build_app_label_selector(schema.applications[0]) == engines["labels"]
    assert head["rayStartParams"]["num-cpus"] == "0"  # so gateways are where the Service looks
    assert "labels" not in head


@each_example
def test_ray_is_set_as_the_launcher_sets_it(example: Path, tmp_path: Path) -> None:
    ours = private_environment(tmp_path, haproxy=False, given={})
    for group in groups(read(example)):
        env = {each["name"]: each.get("value") for each in container(group)["env"]}
        rays = {name for name in env if name.startswith("RAY_")}
        assert len(rays) == 6
        assert {name: env[name] for name in rays} == {name: ours[name] for name in rays}


# --- probes, drains, metrics, networks ------------------------------------------


def test_a_pod_is_ready_when_its_gateway_is() -> None:
    head, engines = groups(LEAST)
    assert container(engines)["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}
    # KubeRay submits the application once the head is ready: that must not wait for engines.
    assert container(head)["readinessProbe"]["httpGet"]["port"] == 52365
    assert ray_service(LEAST)["excludeHeadPodFromServeSvc"] is True


def test_a_pod_has_time_to_end() -> None:
    grace_s = groups(LEAST)[1]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace_s >= EngineConfig().drain_timeout_s + 30


def test_each_gateway_of_a_node_is_scraped_with_an_admin_key() -> None:
    manifests = render(merge(read(ONE_NODE), {"gateway": {"perNode": 2}}))
    service, monitor = of_kind(manifests, "Service")[0], of_kind(manifests, "ServiceMonitor")[0]
    ports = {each["name"]: each["port"] for each in service["spec"]["ports"]}
    assert ports == {"metrics-0": 9100, "metrics-1": 9101}
    assert [each["port"] for each in monitor["spec"]["endpoints"]] == list(ports)
    for endpoint in monitor["spec"]["endpoints"]:
        assert endpoint["authorization"]["credentials"] == {
            "name": "headway-metrics",
            "key": "token",
        }
    selected = monitor["spec"]["selector"]["matchLabels"].items()
    assert selected <= service["metadata"]["labels"].items()
    pod = of_kind(manifests, "RayService")[0]["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    labels = pod["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert {"name": "metrics-1", "containerPort": 9101} in container(pod)["ports"]


def test_only_those_named_may_connect() -> None:
    manifests = render(merge(read(ONE_NODE), {"networkPolicy": {"clients": [{"podSelector": {}}]}}))
    inside, clients = of_kind(manifests, "NetworkPolicy")
    assert all(each["spec"]["policyTypes"] == ["Ingress"] for each in (inside, clients))
    own, operator = inside["spec"]["ingress"]
    assert own["from"] == [{"podSelector": inside["spec"]["podSelector"]}]
    assert operator["ports"] == [{"port": 8265}, {"port": 8000}]
    assert clients["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "engines"
    requests, metrics = clients["spec"]["ingress"]
    assert (requests["from"], requests["ports"]) == ([{"podSelector": {}}], [{"port": 8000}])
    assert metrics["ports"] == [{"port": 9100, "endPort": 9100}]
    assert not of_kind(render(merge(LEAST, {"networkPolicy": {"enabled": False}})), "NetworkPolicy")


def test_evictions_leave_what_is_said() -> None:
    engines, head = of_kind(render(LEAST), "PodDisruptionBudget")
    assert (engines["spec"]["minAvailable"], head["spec"]["minAvailable"]) == (1, 1)
    labels = [group["template"]["metadata"]["labels"] for group in groups(LEAST)]
    assert [each["spec"]["selector"]["matchLabels"] for each in (head, engines)] == labels


def test_weights_outlive_the_release() -> None:
    (claim,) = of_kind(render(LEAST), "PersistentVolumeClaim")
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    volumes = {each["name"]: each for each in groups(LEAST)[1]["template"]["spec"]["volumes"]}
    named = volumes["weights"]["persistentVolumeClaim"]["claimName"]
    assert named == claim["metadata"]["name"]
    own = merge(LEAST, {"weights": {"existingClaim": "mine"}, "nodes": {"count": 2}})
    assert not of_kind(render(own), "PersistentVolumeClaim")
    assert groups(own)[1]["template"]["spec"]["volumes"][-1] == {
        "name": "weights",
        "persistentVolumeClaim": {"claimName": "mine"},
    }


def test_the_hugging_face_token_comes_from_its_secret() -> None:
    values = merge(LEAST, {"huggingFace": {"tokenSecret": "s"}})
    env = {each["name"]: each for each in container(groups(values)[1])["env"]}
    assert env["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "s", "key": "token"}
    assert "HF_TOKEN" not in {each["name"] for each in container(groups(LEAST)[1])["env"]}


def test_the_autoscaler_has_its_bounds_and_may_speak_to_kubernetes() -> None:
    head, engines = groups(LEAST)
    assert head["template"]["spec"]["automountServiceAccountToken"] is False
    assert (engines["minReplicas"], engines["replicas"], engines["maxReplicas"]) == (1, 1, 1)
    values = merge(
        LEAST,
        {
            "autoscaler": {"enabled": True, "minNodes": 1, "maxNodes": 4},
            "weights": {"accessModes": ["ReadWriteMany"]},
        },
    )
    head, engines = groups(values)
    assert "automountServiceAccountToken" not in head["template"]["spec"]
    assert engines["template"]["spec"]["automountServiceAccountToken"] is False
    assert (engines["minReplicas"], engines["replicas"], engines["maxReplicas"]) == (1, 1, 4)
    assert ray_service(values)["rayClusterConfig"]["autoscalerOptions"]["version"] == "v2"
