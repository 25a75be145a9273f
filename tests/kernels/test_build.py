"""Building the CUDA kernels: the cache of libraries, and hosts that cannot build.

A stand-in for nvcc writes a file; what the real one says is in `test_nvcc`.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernels import _build
from kernels._build import Compiler, KernelBuildError, find_library
from kernels._launch import KernelError, KernelLibrary

FAKE_NVCC = """#!/bin/sh
if [ "$1" = --version ]; then
    echo "Cuda compilation tools, release 13.0, V{version}"
    exit 0
fi
echo "$@" >> {log}
{body}
while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then echo built > "$2"; fi
    shift
done
"""


class FakeNvcc:
    """A script in nvcc's place; counts the libraries that it links."""

    def __init__(self, folder: Path, version: str = "13.0.88", body: str = "") -> None:
        self._log = folder / f"log-{version}"
        path = folder / f"nvcc-{version}"
        path.write_text(FAKE_NVCC.format(version=version, log=self._log, body=body))
        path.chmod(0o755)
        found = Compiler.find(str(path))
        assert found is not None
        self.compiler = found

    @property
    def links(self) -> int:
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return sum("--shared" in line for line in lines)


def test_a_library_is_built_once_and_found_again(tmp_path: Path) -> None:
    nvcc, cache = FakeNvcc(tmp_path), tmp_path / "deep" / "cache"
    first = find_library(cache, ["90"], nvcc.compiler)
    assert find_library(cache, ["90"], nvcc.compiler) == first
    assert nvcc.links == 1
    assert cache.stat().st_mode & 0o777 == 0o700
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".json", ".so"]


def test_builders_at_the_same_time_build_once(tmp_path: Path) -> None:
    nvcc = FakeNvcc(tmp_path, body="sleep 0.2")
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(find_library, tmp_path / "c", ["90"], nvcc.compiler) for _ in range(4)]
    assert len({job.result() for job in jobs}) == 1
    assert nvcc.links == 1


def test_sources_compiler_and_targets_make_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, one, two = tmp_path / "cache", FakeNvcc(tmp_path), FakeNvcc(tmp_path, "13.1.2")
    found = {
        find_library(cache, ["90"], one.compiler),
        find_library(cache, ["90", "80"], one.compiler),
        find_library(cache, ["90"], two.compiler),
    }
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "a.cu").write_text("// other")
    monkeypatch.setattr(_build, "SOURCES", sources)
    assert len({*found, find_library(cache, ["90"], one.compiler)}) == 4


def test_a_host_without_nvcc_takes_what_was_built_for_its_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    built = find_library(cache, ["80", "90"], FakeNvcc(tmp_path).compiler)
    monkeypatch.setattr(Compiler, "find", lambda path=None: None)
    assert find_library(cache, ["90"]) == built
    assert find_library(cache, ["86"]) == built, "code for 8.0 runs on 8.6"
    for missing in ("89a", "100", "75"):
        with pytest.raises(KernelBuildError, match=f"no kernels for sm_{missing} .* no nvcc"):
            find_library(cache, [missing])


def test_a_read_only_cache_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    built = find_library(cache, ["90"], FakeNvcc(tmp_path).compiler)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert find_library(cache, ["90"], FakeNvcc(tmp_path, "13.1.2").compiler) == built


def test_without_nvcc_and_cache_the_message_names_the_fallback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compiler, "find", lambda path=None: None)
    with pytest.raises(KernelBuildError, match="falls back to the PyTorch ops") as caught:
        find_library(tmp_path / "none", ["90"])
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_a_cache_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(KernelBuildError, match="writable by nobody else"):
        find_library(cache, ["90"], FakeNvcc(tmp_path).compiler)


def test_a_failed_build_leaves_nothing_and_is_one_line(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    broken = FakeNvcc(tmp_path, "13.0.1", body='echo "x.cu(3): error: no such thing"; exit 2')
    with pytest.raises(KernelBuildError, match=r"nvcc failed: x\.cu\(3\): error: no such thing"):
        find_library(cache, ["90"], broken.compiler)
    assert [path.name for path in cache.iterdir()] == [".lock"]


@pytest.mark.parametrize("target", ["9.0", "sm_90", "90;rm", "9"])
def test_targets_are_numbers(tmp_path: Path, target: str) -> None:
    with pytest.raises(KernelBuildError, match="not a target"):
        find_library(tmp_path / "cache", [target], FakeNvcc(tmp_path).compiler)


def test_something_else_in_a_librarys_place_is_one_line(tmp_path: Path) -> None:
    wrong = tmp_path / "kernels.so"
    wrong.write_text("not a library")
    with pytest.raises(KernelError, match=r"kernels\.so") as caught:
        KernelLibrary(wrong)
    assert len(str(caught.value).splitlines()) == 1
