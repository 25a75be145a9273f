"""docker/Dockerfile, read as its builder reads it: what is shipped, who runs it, what is pinned."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.dockerfile_stages import (
    ROOT,
    Step,
    command,
    environment,
    health_check,
    read_stages,
    values,
)

SHIPPED = ("cpu", "gpu")
COMPILERS = re.compile(r"-devel|(?<!\w)(g\+\+|(gcc|clang|build-essential|nvcc|c?make|ninja)\b)")


@pytest.fixture(scope="module")
def stages() -> dict[str, list[Step]]:
    return read_stages()


def test_the_default_target_is_the_gpu_one(stages: dict[str, list[Step]]) -> None:
    assert list(stages)[-1] == "gpu"
    assert set(SHIPPED) <= set(stages)


def test_every_base_is_pinned_by_version_and_digest(stages: dict[str, list[Step]]) -> None:
    text = (ROOT / "docker/Dockerfile").read_text()
    bases = dict(re.findall(r"^ARG (\w+)=(\S+@\S+)$", text, re.MULTILINE))
    version = r"ubuntu:noble-\d{8}|nvidia/cuda:13\.0\.2-(base|devel)-ubuntu24\.04"
    for base in bases.values():
        assert re.fullmatch(rf"({version})@sha256:[0-9a-f]{{64}}", base), base
    for steps in stages.values():
        base = steps[0]["value"].split(" AS ")[0]
        assert base in stages or base.strip("${}") in bases, base


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_shipped_has_no_compiler(stages: dict[str, list[Step]], name: str) -> None:
    assert stages[name][0]["value"].split(" AS ")[0] in ("${CUDA_BASE}", "${UBUNTU}")
    for step in stages[name]:
        assert not COMPILERS.search(step["value"]), step["content"]


def test_a_compiler_would_be_noticed(stages: dict[str, list[Step]]) -> None:
    assert COMPILERS.search("nvidia/cuda:13.0.2-devel-ubuntu24.04")
    assert COMPILERS.search("apt-get install -y g++")
    assert stages["kernels"][0]["value"].startswith("${CUDA_DEVEL}")


@pytest.mark.parametrize("name", SHIPPED)
def test_it_runs_as_a_numbered_user_that_exists(stages: dict[str, list[Step]], name: str) -> None:
    (user,) = values(stages[name], "USER")
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)
    assert f"useradd --uid {user.split(':')[0]} " in " ".join(values(stages[name], "RUN"))
    after = stages[name][[s["instruction"] for s in stages[name]].index("USER") + 1 :]
    assert {step["instruction"] for step in after} <= {
        "HEALTHCHECK",
        "ENTRYPOINT",
        "CMD",
        "COMMENT",
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_it_is_asked_for_its_health_without_a_shell(
    stages: dict[str, list[Step]], name: str
) -> None:
    assert health_check(stages[name]) == ["rtpurbo", "health"]
    assert command(stages[name]) == ["rtpurbo", "serve"]


def test_kernels_are_found_where_they_were_built(stages: dict[str, list[Step]]) -> None:
    cache = environment(stages["gpu"])["RTPURBO_KERNEL_CACHE"]
    (build,) = [run for run in values(stages["kernels"], "RUN") if "build-kernels" in run]
    assert f"--kernel-cache {cache} " in build
    assert f"install -d -m 0755 {cache} " in build  # the server refuses what others may write to
    assert f"--from=kernels {cache} {cache}" in values(stages["gpu"], "COPY")


def test_python_packages_are_pinned_wheels(stages: dict[str, list[Step]]) -> None:
    assert environment(stages["python"])["PIP_ONLY_BINARY"] == ":all:"
    assert environment(stages["python"])["PIP_CONSTRAINT"] == "/src/constraints.txt"
    pinned = re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    for name in ("gpu-libraries", "cpu-libraries"):
        assert pinned.group() in " ".join(values(stages[name], "RUN"))


def test_the_image_has_what_the_project_needs(stages: dict[str, list[Step]]) -> None:
    """The stage's own one-liner, run on the real pyproject.toml."""
    (run,) = [run for run in values(stages["python"], "RUN") if "tomllib" in run]
    (code,) = re.findall(r'python3\.12 -c "([^"]+)"', run)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["tracing"]]
    assert done.stdout.splitlines() == wanted


def test_every_package_of_the_image_is_pinned() -> None:
    """What the project needs, and what that needs in turn; torch itself pins CUDA's packages."""
    pinned = {
        canonicalize_name(line.split("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = [*project["dependencies"], *project["optional-dependencies"]["tracing"]]
    names = set(required({Requirement(text) for text in direct}))
    assert len(names) > 40
    assert names - pinned == set()


def required(wanted: set[Requirement]) -> Iterator[str]:
    """Names of the installed distributions that `wanted` come down to."""
    seen: set[tuple[str, frozenset[str]]] = set()
    while wanted:
        one = wanted.pop()
        key = canonicalize_name(one.name), frozenset(one.extras)
        if key in seen:
            continue
        seen.add(key)
        yield key[0]
        for text in distribution(one.name).requires or []:
            further = Requirement(text)
            marker = further.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in one.extras | {""}):
                wanted.add(further)


def test_both_images_are_set_up_alike(stages: dict[str, list[Step]]) -> None:
    """They stand twice in the file, since their bases differ."""
    gpu, cpu = environment(stages["gpu"]), environment(stages["cpu"])
    extra = {"NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "RTPURBO_KERNEL_CACHE"}
    assert {name: value for name, value in gpu.items() if name not in extra} == cpu
    for instruction in ("USER", "HEALTHCHECK", "ENTRYPOINT", "CMD", "EXPOSE", "STOPSIGNAL"):
        assert values(stages["gpu"], instruction) == values(stages["cpu"], instruction)


def test_the_build_sees_only_what_it_needs() -> None:
    """Everything is left out but what is named, so no secret and no checkpoint slips in."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    named = {rule[1:] for rule in rules if rule.startswith("!")}
    assert named == {
        "pyproject.toml", "constraints.txt", "README.md", "LICENSE",
        "server", "engine", "kernels", "conversion", "benchmarks",
    }  # fmt: skip
    assert all((ROOT / name).exists() for name in named)
