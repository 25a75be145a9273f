"""Building the CUDA kernels: what nvcc says about them, the cache, and hosts that cannot build.

The cache is tested with a stand-in for nvcc that writes a file; with a real one, every source is
compiled for sm_90 and its resources are looked at.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import _build
from kernels._build import SOURCES, TARGETS, Compiler, KernelBuildError, find_library
from kernels._launch import KernelError, KernelLibrary

NVCC = Compiler.find()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on this host")
pytestmark = pytest.mark.timeout(400)  # half a minute of a core, which others may be using too
KERNELS = {
    "index_select": 11,
    "sparse_decode": 6,
    "host_checks": 0,
    "span_prefill": 4,
    "qkv_store": 4,
    "layer_ops": 4,
    "experts": 6,
    "step": 3,
}


# Compiles as nvcc does, and writes what it says about the resources of a source beside the others.
STRICT_NVCC = """#!/bin/sh
if [ "$1" = --version ] || [ "$1" = --shared ]; then exec {nvcc} "$@"; fi
for argument; do case "$argument" in *.cu) name=$(basename "$argument" .cu);; esac; done
{nvcc} "$@" -Werror all-warnings -Xcompiler -Wall,-Wextra -Xptxas -v >"{reports}/$name" 2>&1
code=$?
cat "{reports}/$name"
exit $code
"""


@dataclass(frozen=True)
class Build:
    """The library as it is shipped, and for each source what the compiler said about it."""

    library: Path
    reports: dict[str, str]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compiled once for all tests, without a warning: it takes longer than all of them."""
    if NVCC is None:
        pytest.skip("no nvcc on this host")
    folder = tmp_path_factory.mktemp("kernels")
    reports, script = folder / "reports", folder / "nvcc"
    reports.mkdir()
    script.write_text(STRICT_NVCC.format(nvcc=NVCC.path, reports=reports))
    script.chmod(0o755)
    library = find_library(folder / "cache", ["90"], Compiler(str(script), NVCC.version))
    return Build(library, {path.name: path.read_text() for path in reports.iterdir()})


@pytest.mark.parametrize("source", sorted(SOURCES.glob("*.cu")), ids=lambda path: path.stem)
def test_compiles_for_hopper_without_spills(source: Path, build: Build) -> None:
    report = build.reports[source.stem]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == KERNELS[source.stem], "one report a kernel"
    assert all(pair == ("0", "0") for pair in spills), report
    stacks = re.findall(r"(\d+) bytes stack frame", report)
    assert all(size == "0" for size in stacks), "a register array was indexed at run time"


@pytest.fixture(scope="module")
def host(build: Build) -> ctypes.CDLL:
    """Functions of the library that need no GPU."""
    return KernelLibrary(build.library).host


def test_bins_and_masses_equal_the_specification(host: ctypes.CDLL) -> None:
    generator = torch.Generator().manual_seed(0)
    below = torch.cat((torch.rand(2000, generator=generator) * 40, torch.arange(0, 40, 0.125)))
    below = torch.cat((below, torch.tensor([torch.inf, 1e30, 31.874999, 31.875])))
    bins = (below * 8).clamp(max=255).long()
    masses = ((-below).exp().double() * 2.0**32).round()
    for value, want_bin, want_mass in zip(below.tolist(), bins, masses, strict=True):
        assert host.rtpurbo_mass_bin(value) == want_bin
        # expf of two libraries may differ in its last bit.
        assert host.rtpurbo_fixed_mass(value) == pytest.approx(float(want_mass), rel=3e-7, abs=1)


@given(total=st.integers(1, 2**33), ctas=st.integers(1, 300), least=st.integers(1, 8))
def test_shares_of_a_selection_are_equal(
    host: ctypes.CDLL, total: int, ctas: int, least: int
) -> None:
    ctas = host.rtpurbo_working_ctas(total, ctas, least)
    starts = [host.rtpurbo_share_start(cta, total, ctas) for cta in range(ctas + 1)]
    assert starts[0] == 0
    assert starts[-1] == total
    sizes = [stop - start for start, stop in pairwise(starts)]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


@given(
    blocks=st.lists(st.integers(1, 65535) | st.integers(1, 200), min_size=1, max_size=40),
    workers=st.integers(1, 500),
    least=st.integers(1, 8),
    data=st.data(),
)
def test_items_are_cut_into_pieces_and_these_shared_out(
    host: ctypes.CDLL, blocks: list[int], workers: int, least: int, data: st.DataObject
) -> None:
    longest = host.rtpurbo_piece_blocks(sum(blocks), len(blocks), workers, least)
    counts = [-(-n // longest) for n in blocks]
    total = sum(counts)
    if 2 * len(blocks) <= workers:
        assert total <= workers, "a CTA for every piece"
    chosen = data.draw(st.integers(0, len(blocks) - 1))
    n, pieces = blocks[chosen], counts[chosen]
    cuts = [host.rtpurbo_piece_start(piece, pieces, n) for piece in range(pieces + 1)]
    assert (cuts[0], cuts[-1]) == (0, n)
    sizes = [stop - start for start, stop in pairwise(cuts)]
    assert min(sizes) >= 1
    assert max(sizes) <= min(longest, min(sizes) + 1)

    shares = min(total, workers)
    starts = [host.rtpurbo_shares_start(share, total, shares) for share in range(shares + 1)]
    assert (starts[0], starts[-1]) == (0, total)
    sizes = [stop - start for start, stop in pairwise(starts)]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    piece = data.draw(st.integers(0, total - 1))
    owner = host.rtpurbo_shares_owner(piece, total, shares)
    assert starts[owner] <= piece < starts[owner + 1]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_units_belong_to_the_item_that_holds_them(host: ctypes.CDLL, sizes: list[int]) -> None:
    starts = (ctypes.c_int * (len(sizes) + 1))(*[sum(sizes[:i]) for i in range(len(sizes) + 1)])
    owners = [item for item, size in enumerate(sizes) for _ in range(size)]
    for unit, owner in enumerate(owners):
        assert host.rtpurbo_item_of(starts, len(sizes), unit) == owner


@given(
    context=st.integers(0, 3000),
    block=st.sampled_from([16, 64, 128]),
    window=st.integers(0, 4000),
    sinks=st.integers(0, 300),
)
def test_the_window_rule_reads_the_blocks_with_a_seen_token(
    host: ctypes.CDLL, context: int, block: int, window: int, sinks: int
) -> None:
    blocks = (ctypes.c_int * 400)()
    count = host.rtpurbo_window_blocks(context, block, window, sinks, blocks)
    seen = {j // block for j in range(context) if context - 1 - j < window or j < sinks}
    assert blocks[:count] == sorted(seen)


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


@needs_nvcc
def test_nvcc_knows_every_target() -> None:
    assert NVCC is not None
    done = subprocess.run([NVCC.path, "--list-gpu-code"], capture_output=True, text=True)
    assert {f"sm_{target}" for target in TARGETS} <= set(done.stdout.split())
