"""What bounds decode attention where few bytes are read: the kernel with its parts left out.

    python -m benchmarks.decode_anatomy [FILE] [--shapes 1x32768,1x131072,8x32768]

Microseconds of a layer in a CUDA graph, as in `benchmarks.attention_decode`, 3 % of the blocks
selected. Attention of all heads, of local heads alone, and of retrieval heads alone (their lists
made before) by `benchmarks.kernel_cuts`: from a grid that returns at once to the whole kernel, so
that the difference of two lines is what the later one adds to the chain; what overlaps adds
nothing. Beside them an empty kernel, a copy that moves as many bytes, the selection, and both
kernels with settings and grids that differ from the plan. FILE is written after every table, and
after every grid.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.attention_decode import blocks_needed
from benchmarks.attention_layer import BLOCK, DIM
from benchmarks.decode_grids import grids
from benchmarks.decode_layers import Stack
from benchmarks.device_times import graph_microseconds
from benchmarks.hardware import describe_hardware
from benchmarks.kernel_cuts import Libraries, build_variants
from kernels._args import DecodeArgs, SelectArgs
from kernels._launch import KernelLibrary

SHARE = 0.03
SHAPES = "1x32768,1x131072,8x32768"
Figures = dict[str, dict[str, float]]
Keep = Callable[[dict[str, Any]], None]  # takes some of a shape's figures as soon as they are there


@dataclass(frozen=True, slots=True)
class Change:
    """Of a launch: fields of `DecodeArgs` and `SelectArgs`, pointers of these that are null."""

    decode: dict[str, int] = field(default_factory=dict)
    select: dict[str, int] = field(default_factory=dict)
    select_ctas: float = 1.0  # times those of its plan
    without: tuple[str, ...] = ()


class Adjusted(KernelLibrary):
    """Launches with other numbers than were planned."""

    def __init__(self, path: Path, change: Change) -> None:
        super().__init__(path)
        self.change = change

    def launch_decode(self, args: DecodeArgs, like: Tensor) -> None:
        for name, value in self.change.decode.items():
            setattr(args, name, value)
        super().launch_decode(args, like)

    def launch_select(self, which: Any, args: SelectArgs, like: Tensor) -> None:
        args.ctas = int(args.ctas * self.change.select_ctas)
        for name, value in self.change.select.items():
            setattr(args, name, value)
        for name in self.change.without:
            setattr(args, name, None)
        super().launch_select(which, args, like)


def anatomy(libraries: Libraries, rows: int, context: int, keep: Keep) -> None:
    """All figures of one shape."""
    torch.cuda.empty_cache()
    loaded = {name: KernelLibrary(path) for name, path in libraries.attention.items()}
    stack = Stack.make(loaded["whole"], rows, context, SHARE)
    local, retrieval = (stack.of_role(retrieval=flag) for flag in (False, True))
    parts: Figures = {name: {} for name in loaded}
    for heads, of in (("all", stack), ("local", local), ("retrieval", retrieval)):
        if of is not local:  # which has no list; lists are numbered by tile
            use(stack, loaded["whole"])
            of.each(Stack.select)
        for name, library in loaded.items():
            use(stack, library)
            parts[name][heads] = of.microseconds(Stack.attention)
    use(stack, loaded["whole"])
    stack.each(Stack.select)
    needed = partial(blocks_needed, rows=rows, context=context, tiles=stack.tiles.count)
    moved = int(statistics.fmean(map(needed, stack.spaces))) * BLOCK * DIM * 4
    empty = partial(torch.zeros(1, device="cuda").add_, 1)
    keep(
        {
            "rows": rows,
            "context": context,
            "layers_in_a_graph": len(stack.layers),
            "kv_bytes": moved,
            "empty_kernel": graph_microseconds([empty] * len(stack.layers)),
            "copy_of_as_many_bytes": _copy(moved, len(stack.layers)),
            "parts": parts,
        }
    )
    keep({"selection": selection_parts(stack, libraries.selection) if rows == 1 else {}})
    keep({"settings": settings(stack, libraries.attention["whole"])})
    whole, found = libraries.attention["whole"], dict[str, dict[str, float]]()
    for name, row in grid_times(stack, local, retrieval, whole):
        found[name] = row
        keep({"grids": found})


def selection_parts(stack: Stack, libraries: dict[str, Path]) -> Figures:
    """The selection of a single row up to each of its parts, and the layer with it; with keys of 8
    bits beside."""
    in_int8, found = stack.with_int8_keys(), dict[str, dict[str, float]]()
    loaded = {name: KernelLibrary(path) for name, path in libraries.items()}
    loaded["whole, by shares"] = Adjusted(libraries["whole"], Change(select={"cluster": 0}))
    for name, library in loaded.items():
        use(stack, library)
        found[name] = {
            "select": stack.microseconds(Stack.select),
            "whole": stack.microseconds(Stack.whole),
            "select, int8": in_int8.microseconds(Stack.select),
            "whole, int8": in_int8.microseconds(Stack.whole),
        }
    return found


def settings(stack: Stack, path: Path) -> Figures:
    """The layer and its kernels under the plan, and each time with one thing changed."""
    changed = {"as planned": Change()}
    changed["2 warps a CTA"] = Change({"warps": 2})
    changed["attention after the selection"] = Change({"overlap": 0})
    changed["selection after what is before it"] = Change(select={"overlap": 0})
    for times in (0.5, 2.0):
        changed[f"selection by {times:g} x the CTAs"] = Change(select_ctas=times)
    rows = len(stack.layers[0].lens_R)
    if rows == 1:
        changed["selection by shares"] = Change(select={"cluster": 0})
        for cluster in (8, 16):
            name = f"selection by clusters of {cluster}"
            changed[name] = Change(select={"cluster": cluster})
    else:
        plan = stack.spaces[0].plan(stack.tiles)
        workers = grids(plan, rows, stack.tiles.count, _blocks(stack))["as planned"]
        for part in (2, 3, 4, 6):
            held = {"held_back": workers.ctas // max(1, workers.cluster) // part}
            for times in (1.0, 0.75, 0.5):
                name = f"selection by {times:g} x the CTAs, 1 in {part} for lists alone"
                changed[name] = Change(held, select_ctas=times)
    # What is left out stands in the workspace from the launches before.
    changed["selection without lists"] = Change(without=("groups",))
    changed["scores alone, by shares"] = Change(without=("words",))
    calls = {"whole": Stack.whole, "select": Stack.select, "attention": Stack.attention}
    found: Figures = {}
    for name, change in changed.items():
        use(stack, Adjusted(path, change))
        found[name] = {what: stack.microseconds(call) for what, call in calls.items()}
    return found


def grid_times(
    stack: Stack, local: Stack, retrieval: Stack, path: Path
) -> Iterator[tuple[str, dict[str, float]]]:
    """The layer, and heads of either role alone, with attention's launches divided otherwise.

    One after the other, and a failure names its grid: it ends all work on the device.
    """
    plan, rows = stack.spaces[0].plan(stack.tiles), len(stack.layers[0].lens_R)
    for name, grid in grids(plan, rows, stack.tiles.count, _blocks(stack)).items():
        use(stack, Adjusted(path, Change(asdict(grid))))
        try:
            times = {"whole": stack.microseconds(Stack.whole)}
            times["attention"] = stack.microseconds(Stack.attention)
            times["local"] = local.microseconds(Stack.attention)
            retrieval.each(Stack.select)  # lists are numbered by tile
            times["lists"] = retrieval.microseconds(Stack.attention)
        except RuntimeError as error:
            error.add_note(f"grid: {name}, {grid}")
            raise
        yield name, times


def _blocks(stack: Stack) -> int:
    return stack.layers[0].pool.tables_RB.shape[1]


def use(stack: Stack, library: KernelLibrary) -> None:
    """Launch from this library; its plan is asked for, which also prepares its kernels."""
    for layer, space in zip(stack.layers, stack.spaces, strict=True):
        library.decode_plan(layer.q_RHD.device, torch.bfloat16, DIM)
        space.library = library


def _copy(moved: int, count: int) -> float:
    """Of half as many bytes, which are read and written, for each layer others."""
    pairs = [torch.empty(2, moved // 8, device="cuda") for _ in range(count)]
    return graph_microseconds([partial(torch.neg, pair[0], out=pair[1]) for pair in pairs])


def tables(record: dict[str, Any]) -> list[Table]:
    found = []
    for what in ("parts", "selection", "settings", "grids"):
        if not record[what]:
            continue
        title = f"{record['rows']} x {record['context']}: {what}, microseconds; an empty kernel "
        title += f"{record['empty_kernel']:.1f}, a copy {record['copy_of_as_many_bytes']:.1f}"
        table = Table("", *next(iter(record[what].values())), title=title)
        for name, row in record[what].items():
            table.add_row(name, *(f"{value:.1f}" for value in row.values()))
        found.append(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", help="also write the JSON here")
    parser.add_argument("--shapes", default=SHAPES, help="rows x context, with commas")
    given = parser.parse_args()
    console = Console(stderr=True, width=100)
    shapes: list[dict[str, Any]] = []
    result = {"benchmark": "decode_anatomy", "hardware": describe_hardware(), "shapes": shapes}
    with tempfile.TemporaryDirectory() as folder:
        libraries = build_variants(Path(folder))
        for shape in given.shapes.split(","):
            rows, context = map(int, shape.split("x"))
            record: dict[str, Any] = {}
            shapes.append(record)

            def keep(figures: dict[str, Any], record: dict[str, Any] = record) -> None:
                record.update(figures)
                if given.file is not None:
                    given.file.write_text(json.dumps(result) + "\n")

            anatomy(libraries, rows, context, keep)
            console.print(*tables(record))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
