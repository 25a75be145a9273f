"""Manifests of docker/k8s against Kubernetes' published schemas, and against the server itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.config import ServerConfig
from server.info_api import LIVE, METRICS, READY

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker/k8s"
KUBERNETES = "1.34"

Manifest = dict[str, Any]


def read(name: str) -> Manifest:
    (manifest,) = yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text())
    assert isinstance(manifest, dict)
    return manifest


@pytest.fixture(scope="module")
def pod() -> Manifest:
    spec: Manifest = read("deployment")["spec"]["template"]["spec"]
    return spec


def container(pod: Manifest) -> Manifest:
    (found,) = pod["containers"]
    assert isinstance(found, dict)
    return found


def test_every_manifest_is_tested_here() -> None:
    names = {path.stem for path in FOLDER.iterdir()}
    assert names == {"deployment", "service", "podmonitor", "llm-d-router"}


@pytest.mark.parametrize("name", ["deployment", "service"])
def test_the_published_schema_accepts_it(name: str) -> None:
    kubernetes_validate.validate(read(name), KUBERNETES, strict=True)


def test_the_published_schema_refuses_a_mistake() -> None:
    manifest = read("deployment")
    manifest["spec"]["template"]["spec"]["enableServiceLink"] = False
    with pytest.raises(kubernetes_validate.ValidationError, match="enableServiceLink"):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_service_and_monitor_find_the_pods() -> None:
    template = read("deployment")["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert read("service")["spec"]["selector"].items() <= labels.items()
    monitor = read("podmonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    ports = [port["name"] for port in container(template["spec"])["ports"]]
    assert [port["targetPort"] for port in read("service")["spec"]["ports"]] == ports
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == (ports[0], METRICS)
    assert endpoint["authorization"]["type"] == "Bearer"


def test_probes_ask_what_they_mean(pod: Manifest) -> None:
    server = container(pod)
    paths = {kind: server[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness")}
    assert paths == {"startup": READY, "readiness": READY}
    assert server["livenessProbe"]["httpGet"]["path"] == LIVE


def test_running_requests_have_time_to_end(pod: Manifest) -> None:
    server = container(pod)
    settings = {entry["name"]: entry["value"] for entry in server["env"]}
    command = server["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "sleep"
    needed = int(command[1]) + float(settings["RTPURBO_DRAIN_SECONDS"])
    assert pod["terminationGracePeriodSeconds"] > needed + 10


def test_the_pod_is_confined(pod: Manifest) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container(pod)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)
    assert user is not None
    context = pod["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"]) == (int(user[1]), int(user[2]))
    assert "memory" in container(pod)["resources"]["limits"]


def test_kubernetes_sets_no_setting_by_itself(pod: Manifest) -> None:
    """Links of a service called rtpurbo would set RTPURBO_PORT to tcp://10.0.0.1:80."""
    assert pod["enableServiceLinks"] is False


def test_variables_are_settings(pod: Manifest) -> None:
    names = {entry["name"] for entry in container(pod)["env"]}
    assert names <= {f"RTPURBO_{name.upper()}" for name in ServerConfig.model_fields}


def test_the_router_asks_for_metrics_that_exist(pod: Manifest) -> None:
    """A renamed metric must not leave the router blind; a test keeps docs/metrics.md true."""
    router = read("llm-d-router")
    (parameters,) = [p["parameters"] for p in router["plugins"] if "engineConfigs" in str(p)]
    (engine,) = parameters["engineConfigs"]
    labels = read("deployment")["spec"]["template"]["metadata"]["labels"]
    assert labels[parameters["engineLabelKey"]] == engine["name"]
    documented = (ROOT / "docs/metrics.md").read_text()
    for key in ("queuedRequestsSpec", "runningRequestsSpec", "kvUsageSpec"):
        name, _, matcher = engine[key].partition("{")
        label = matcher.partition("=")[0]
        row = rf"^\| `{name}` \| gauge \| {f'`{label}`' if label else ''}"
        assert re.search(row, documented, re.MULTILINE), engine[key]
