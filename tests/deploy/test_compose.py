"""docker-compose.yml: valid by the Compose specification, and closed by default.

No Docker engine runs here: a strict parser of the specification reads the file as the engine would,
with its variables filled in, and every promise of its comments is asked for by name.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = re.compile(r"\$\{[A-Z_]+:-([^}]*)\}")
SERVICES = ("server", "server-cpu", "prometheus", "grafana")


def filled_in() -> str:
    """The file with every variable at its default and all anchors resolved."""
    text = VARIABLE.sub(r"\1", (ROOT / "docker-compose.yml").read_text())
    assert "${" not in text
    resolved: str = yaml.safe_dump(yaml.safe_load(text))
    return resolved


def parse(text: str) -> PyCompose:
    """By the specification, but for `on-failure:N`, which it has and the parser lacks."""
    return PyCompose.from_yaml(re.sub(r"on-failure:\d+", "on-failure", text))


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(filled_in())
    return content


def test_the_specification_accepts_it() -> None:
    assert sorted(parse(filled_in()).service_names()) == sorted(SERVICES)


@pytest.mark.parametrize(
    ("line", "mistake"),
    [("read_only: true", "read_onyl: true"), ("pids: 1024", "pids: many")],
    ids=["key", "value"],
)
def test_the_specification_refuses_mistakes(line: str, mistake: str) -> None:
    """The validator is only worth something if it is strict."""
    text = filled_in()
    assert line in text
    with pytest.raises(ValueError, match=re.escape(mistake.split(":")[0])):
        parse(text.replace(line, mistake))


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_confined(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert "privileged" not in service
    assert "cap_add" not in service
    assert service["restart"].startswith("on-failure:")
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    assert {"memory", "pids"} <= set(service["deploy"]["resources"]["limits"])
    assert all("size=" in mount for mount in service["tmpfs"])


@pytest.mark.parametrize("name", SERVICES)
def test_every_port_is_on_loopback(compose: dict[str, Any], name: str) -> None:
    ports = compose["services"][name]["ports"]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.parametrize("name", SERVICES)
def test_every_image_is_pinned_by_digest(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    if "build" in service:
        assert service["build"]["dockerfile"] == "docker/Dockerfile"
        return
    assert re.fullmatch(r"[a-z]+/[a-z]+@sha256:[0-9a-f]{64}", service["image"])
    text = (ROOT / "docker-compose.yml").read_text()
    assert re.search(rf"{service['image']}  # v?\d+\.\d+\.\d+$", text, re.MULTILINE)


def test_the_gpu_is_reserved_for_the_server_alone(compose: dict[str, Any]) -> None:
    reserved = {
        name: service["deploy"]["resources"]["reservations"]["devices"]
        for name, service in compose["services"].items()
        if "reservations" in service["deploy"]["resources"]
    }
    assert reserved == {"server": [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]}
    assert compose["services"]["server-cpu"]["profiles"] == ["cpu"]


def test_secrets_come_from_files_and_none_stands_in_the_file(compose: dict[str, Any]) -> None:
    assert {name: secret["file"] for name, secret in compose["secrets"].items()} == {
        "api_key": "./docker/secrets/api_key",
        "grafana_admin_password": "./docker/secrets/grafana_admin_password",
    }
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            if "PASSWORD" in name or "KEY" in name:
                assert value.startswith("/run/secrets/"), name


def test_grafana_lets_nobody_in_unasked(compose: dict[str, Any]) -> None:
    grafana = compose["services"]["grafana"]
    settings = grafana["environment"]
    assert settings["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert settings["GF_USERS_ALLOW_SIGN_UP"] == "false"
    assert settings["GF_SECURITY_ADMIN_PASSWORD__FILE"] == "/run/secrets/grafana_admin_password"
    assert grafana["secrets"] == ["grafana_admin_password"]
    assert grafana["depends_on"] == {"prometheus": {"condition": "service_healthy"}}
    assert "healthcheck" in grafana


def test_prometheus_takes_no_orders(compose: dict[str, Any]) -> None:
    command = " ".join(compose["services"]["prometheus"]["command"])
    assert "--web.enable" not in command  # neither lifecycle, nor admin, nor remote write
    assert "--storage.tsdb.retention.size=" in command
    assert "--enable-feature=exemplar-storage" in command
    assert "healthcheck" in compose["services"]["prometheus"]


def test_the_model_is_read_only_and_its_folder_is_never_made(compose: dict[str, Any]) -> None:
    for name in ("server", "server-cpu"):
        (model,) = compose["services"][name]["volumes"]
        assert model["read_only"] is True
        assert model["bind"] == {"create_host_path": False}
        assert (ROOT / model["source"] / "config.json").is_file()


def make(tmp_path: Path, *targets: str) -> subprocess.CompletedProcess[str]:
    folder = tmp_path / "secrets"
    return subprocess.run(
        ["make", "-f", str(ROOT / "Makefile"), f"SECRETS={folder}", f"PYTHON={sys.executable}"]
        + [f"{folder}/{target}" for target in targets],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )


def test_missing_secrets_are_made_at_random_and_kept(tmp_path: Path) -> None:
    names = ("api_key", "grafana_admin_password")
    done = make(tmp_path, *names)
    folder = tmp_path / "secrets"
    values = [(folder / name).read_text().strip() for name in names]
    assert len(set(values)) == 2
    assert min(map(len, values)) >= 40
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all((folder / name).stat().st_mode & 0o777 == 0o444 for name in names)
    assert str(folder / "api_key") in done.stdout
    assert values[0] not in done.stdout + done.stderr
    make(tmp_path, *names)
    assert [(folder / name).read_text().strip() for name in names] == values


def test_git_ignores_secrets_and_what_an_operator_sets(compose: dict[str, Any]) -> None:
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"docker/secrets/", "docker/server.env", ".env"} <= set(ignored)
    for name in ("server", "server-cpu"):
        settings = {"path": "./docker/server.env", "required": False}
        assert compose["services"][name]["env_file"] == [settings]


def test_settings_of_the_file_are_settings_of_the_server(compose: dict[str, Any]) -> None:
    """An unknown RTPURBO_ variable stops the server at start."""
    source = ast.parse((ROOT / "server/config.py").read_text())
    fields = {
        f"RTPURBO_{node.target.id.upper()}"
        for node in ast.walk(source)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    for name in ("server", "server-cpu"):
        assert set(compose["services"][name]["environment"]) <= fields
