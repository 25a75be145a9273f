"""Kernels of decode with parts left out, to see what each costs (`benchmarks.decode_anatomy`).

The sources are copied and changed in a few places, which are found by their text: the compiler is
given conditions that it cannot know, so that registers, shared memory and grid stay those of the
kernel, and nothing is found unused that runs in the whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kernels._build import SOURCES, Compiler, KernelBuildError, local_targets, run_all

# The sources that are cut; others include nothing of what is.
ATTENTION, SELECTION = "sparse_decode.cu", "index_cluster.cu"


class Cut(NamedTuple):
    """A place in the sources, by text that stands there once, and what stands there instead."""

    old: str
    new: str


def _before(text: str, what: str) -> Cut:
    return Cut(text, what + text)


def _never(condition: str) -> Cut:
    return Cut(f"if ({condition}) {{", f"if ({condition} && args.ctas < 0) {{")


ENTRY = "const int workers = gridDim.x >> ranks, worker = blockIdx.x >> ranks;"
# By CTAs for themselves, and by clusters.
SHARED, CLUSTERED = "const int pieces = starts[items];", "piece < cut.total;"
MERGE, MERGE_CLUSTER = (
    "const bool complete = piece == start",
    "merge_cluster<Strip, kDim>(args, item,",
)
PARTS = "merge_parts<Strip, kDim>(args, item, first, last, shared);"
PARTS_CLUSTER = "if (pieces == 1) return;"
AT_ONCE = (_before(ENTRY, "if (args.ctas > 0) return;\n"),)
NO_PIECES = (
    Cut(SHARED, "const int pieces = args.ctas > 0 ? 0 : starts[items];"),
    Cut(CLUSTERED, "piece < (args.ctas > 0 ? 0 : cut.total);"),
)
NO_MERGE = (
    _before(MERGE, "if (args.ctas > 0) {\npiece = until;\ncontinue;\n}\n"),
    _before(MERGE_CLUSTER, "if (args.ctas < 0) "),
)
NO_PARTS = (
    _before(PARTS, "if (args.ctas < 0) "),
    Cut(PARTS_CLUSTER, "if (pieces == 1 || args.ctas > 0) return;"),
)
NO_STEPS, NO_COPIES = _never("now.first >= 0"), _never("first >= 0")
# Scores are added up, or the compiler would leave the products behind the return.
SCORES_ALONE = _before(
    "const bool clear = sight.is_clear(slots);",
    "if (scale > 0.0f) {\n#pragma unroll\nfor (int t = 0; t < kTiles; ++t)\n#pragma unroll\n"
    "for (int i = 0; i < 4; ++i) stats[t][i % 2].sum += scores[t][0][i] + scores[t][1][i];\n"
    "return;\n}\n",
)
# From nothing to the whole; each name tells what the kernel does up to there.
VARIANTS: dict[str, tuple[Cut, ...]] = {
    "starts and returns": AT_ONCE,
    "+ lengths, lists, shares": NO_PIECES,
    "+ pages, keys and values arrive": (NO_STEPS, *NO_MERGE),
    "+ scores": (SCORES_ALONE, *NO_MERGE),
    "+ softmax and values": NO_MERGE,
    "+ warps and clusters merged": NO_PARTS,
    "whole": (),
    "whole, but no keys or values": (NO_COPIES,),
}

CHOICE = "float share = 0.0f;"
BINS = "give_bins(largest, blocks, dealt, shared, arrays);"
THRESHOLD = "const int last = threshold_bin(mass, share, shared.sums);"
OWN_LIST = "if (group >= 0) write_own_list(args, head, group, context, shared, arrays.words);"


def _until(text: str) -> tuple[Cut, ...]:
    return (_before(text, "if (args.cluster > 0) return;\n    "),)


RING = "constexpr int kRingBytes = 8192;"
# Of a single row's selection. What a cut leaves undone was done by the launch before.
SELECTIONS: dict[str, tuple[Cut, ...]] = {
    "starts and returns": _until("DealtScores<Keys> scores(args, dealt, 0, head);"),
    "+ scores": _until(CHOICE),
    "+ largest": _until(BINS),
    "+ bins": _until(THRESHOLD),
    "+ words": _until(OWN_LIST),
    "whole": (),
    "rings of 12 KiB": (Cut(RING, "constexpr int kRingBytes = 12288;"),),
    "rings of 16 KiB": (Cut(RING, "constexpr int kRingBytes = 16384;"),),
}


def cut_sources(folder: Path, cuts: Sequence[Cut]) -> None:
    """Copy the kernels' sources and cut them.

    Raises:
        ValueError: a text that is not there, or more than once.
    """
    shutil.copytree(SOURCES, folder)
    for cut in cuts:
        places = [path for path in sorted(folder.iterdir()) if cut.old in path.read_text()]
        if len(places) != 1 or places[0].read_text().count(cut.old) != 1:
            raise ValueError(f"not once in the sources: {cut.old}")
        places[0].write_text(places[0].read_text().replace(cut.old, cut.new))


class Libraries(NamedTuple):
    """Of each variant of attention, and of each of the selection."""

    attention: dict[str, Path]
    selection: dict[str, Path]


def build_variants(folder: Path) -> Libraries:
    """A library for each variant, compiled side by side: as long as one takes, with cores enough.

    Raises:
        KernelBuildError: no nvcc, no GPU, or what nvcc says.
    """
    compiler, targets = Compiler.find(), local_targets()
    if compiler is None or not targets:
        raise KernelBuildError("the anatomy needs nvcc and a GPU")
    whole = {path.name: folder / f"{path.stem}.o" for path in sorted(SOURCES.glob("*.cu"))}
    pairs = [(SOURCES / name, target) for name, target in whole.items()]
    links = []

    def cut(kernel: str, variants: dict[str, tuple[Cut, ...]]) -> dict[str, Path]:
        found = {}
        for number, (name, cuts) in enumerate(variants.items()):
            place = folder / f"{Path(kernel).stem}-{number}"
            cut_sources(place, cuts)
            target, found[name] = place.with_suffix(".o"), place.with_suffix(".so")
            pairs.append((place / kernel, target))
            others = [str(path) for source, path in whole.items() if source != kernel]
            link = (compiler.path, "--shared", "--cudart=static", "-o", str(found[name]))
            links.append((*link, str(target), *others))
        return found

    found = Libraries(cut(ATTENTION, VARIANTS), cut(SELECTION, SELECTIONS))
    run_all([compiler.command(*pair, targets) for pair in pairs])
    run_all(links)
    return found
