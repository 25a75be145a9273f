"""What nvcc makes of the CUDA kernels: no warnings, no spills, and arithmetic as specified.

Every source is compiled once for sm_90. Its resources are read from what the compiler reports; the
functions of the library that need no GPU (`host_checks.cu`) are called.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels._build import SOURCES, TARGETS, Compiler, find_library
from kernels._launch import KernelLibrary

NVCC = Compiler.find()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on this host")
pytestmark = pytest.mark.timeout(400)  # half a minute of a core, which others may be using too
KERNELS = {
    "index_select": 11,
    "index_cluster": 9,
    "sparse_decode": 12,
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


@given(of=st.integers(0, 2**31 - 1), by=st.integers(1, 2**30) | st.integers(1, 300))
def test_a_product_and_a_shift_divide(host: ctypes.CDLL, of: int, by: int) -> None:
    for near in (of, of // by * by, max(0, of // by * by - 1), 2**31 - 1):
        assert host.rtpurbo_divide(near, by) == near // by


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


@needs_nvcc
def test_nvcc_knows_every_target() -> None:
    assert NVCC is not None
    done = subprocess.run([NVCC.path, "--list-gpu-code"], capture_output=True, text=True)
    assert {f"sm_{target}" for target in TARGETS} <= set(done.stdout.split())
