"""What the attention kernels aim at, and whether a run of `rtpurbo bench attention` got there.

Set for an H100; figures of one run, medians, decode in CUDA graphs on both sides. "Fastest" is the
fastest dense attention of that run, whoever made it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

K = 1024
Record = dict[str, Any]
Read = Callable[[Record], Any]  # a number, or None where it was not measured
DECODE_SHARE = 0.03  # of the blocks


class Target(NamedTuple):
    """A figure that is to be at least `least`."""

    what: str
    part: str  # of the result: "prefill" or "decode"
    tokens: int  # of the prompt, or the context of a row
    rows: int
    least: float
    unit: str
    read: Read
    and_longer: bool = False  # the least figure of this length and all longer ones counts


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target with its figure and whether it was hit; both None where nothing was measured."""
    found = []
    for target in targets():
        values = [target.read(record) for record in _records_for(target, result)]
        known = [value for value in values if value is not None]
        figure = min(known) if known else None
        found.append(
            {
                "what": target.what,
                "where": _where(target),
                "least": target.least,
                "unit": target.unit,
                "figure": figure,
                "hit": None if figure is None else figure >= target.least,
            }
        )
    return found


def targets() -> list[Target]:
    """In the order in which they are shown."""
    by_length = {32 * K: (3.0, 1.5), 128 * K: (7.0, 3.5), 1024 * K: (11.5, 5.5)}
    of_flash = [_prefill("over flash", n, both[0], _over_flash) for n, both in by_length.items()]
    of_best = [
        _prefill("over the fastest", n, both[1], _over_best) for n, both in by_length.items()
    ]
    sparse = {128 * K: 10.0, 1024 * K: 28.0}
    decode = {(1, 32): 2.2, (1, 128): 4.3, (1, 1024): 7.0, (8, 32): 2.4, (8, 128): 4.8}
    int8 = {(1, 1024): 9.0, (8, 128): 5.5}
    copy = ("of copy", 0.75)
    return [
        *of_flash,
        *of_best,
        *(_prefill("sparse, over flash", n, least, _sparse) for n, least in sparse.items()),
        Target("window", "prefill", 64 * K, 0, 520.0, "TFLOP/s", _window, and_longer=True),
        *(
            _decode("over the fastest", at, "x", n, lambda r: r["ratio"])
            for at, n in decode.items()
        ),
        *(_decode("int8 index", at, "x", n, lambda r: r["int8_ratio"]) for at, n in int8.items()),
        _decode("selection", (1, 1024), *copy, lambda r: r["sparse"]["select_share_of_copy"]),
        _decode("attention", (8, 128), *copy, lambda r: r["sparse"]["attention_share_of_copy"]),
    ]


def _prefill(what: str, tokens: int, least: float, read: Read) -> Target:
    return Target(what, "prefill", tokens, 0, least, "x", read)


def _decode(what: str, shape: tuple[int, int], unit: str, least: float, read: Read) -> Target:
    return Target(what, "decode", shape[1] * K, shape[0], least, unit, read)


def _over_flash(record: Record) -> Any:
    return record["times_faster"].get("flash")


def _over_best(record: Record) -> Any:
    return min(record["times_faster"].values(), default=None)


def _sparse(record: Record) -> Any:
    return record["sparse_times_faster"].get("flash")


def _window(record: Record) -> Any:
    return record["window_teraflops"]


def _records_for(target: Target, result: dict[str, Any]) -> Sequence[Record]:
    if target.part == "decode":
        shape = (target.rows, target.tokens, DECODE_SHARE)
        return [r for r in result["decode"] if (r["rows"], r["context"], r["share"]) == shape]
    return [
        record
        for record in result["prefill"]
        if record["tokens"] == target.tokens
        or (target.and_longer and record["tokens"] > target.tokens)
    ]


def _where(target: Target) -> str:
    length = length_name(target.tokens)
    if target.part == "decode":
        return f"decode {target.rows} x {length}"
    return f"prefill {length}" + (" and longer" if target.and_longer else "")


def length_name(tokens: int) -> str:
    """32K, 1M."""
    return f"{tokens // K}K" if tokens < K * K else f"{tokens // (K * K)}M"
