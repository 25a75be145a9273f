"""Compiles the prefill kernel for an H100, without one: a JSON line for each configuration.

    python -m tests.kernels.compile_triton [all]

A program of its own, since Triton decides at import whether kernels are interpreted.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.prefill_triton import SWEEP, TileConfig
from kernels.span_attention import span_attention

POINTERS = {"q_ptr": "*bf16", "out_ptr": "*bf16"} | dict.fromkeys(
    ("heads", "kv_rows", "tables", "query_starts", "context_lens"), "*i64"
)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_config(dim: int, config: TileConfig) -> dict[str, int]:
    """Shared memory, registers, stack and tensor-core instructions of one configuration."""
    constants: dict[str, int | str] = {
        "DIM": dim,
        "QUERIES": config.queries,
        "KEYS": 64,
        "SPANS": 1,
    }
    constants |= {"STAGES": config.stages, "PRECISION": "tf32"}
    page = f"tensordesc<bf16[64,{dim}]>"
    types = POINTERS | {"k_desc": page, "v_desc": page, "scale_log2": "fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    names = span_attention.arg_names
    signature = {name: types.get(name, "i32") for name in names}
    aligned = ("q_ptr", "out_ptr", "q_row", "q_head", "out_row", "out_head")
    source = ASTSource(
        span_attention,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": config.warps, "num_stages": config.stages}
    if config.registers is not None:
        options["maxnreg"] = config.registers
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(part.split(":") for part in report.split() if part[:4] in ("REG:", "STAC"))
    return {
        "dim": dim,
        "shared": done.metadata.shared,
        "used_registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "wgmma": done.asm["ptx"].count("wgmma.mma_async"),
    } | config._asdict()


if __name__ == "__main__":
    narrow = TileConfig.default(torch.bfloat16)
    for dim in (64, 128):
        for config in SWEEP if sys.argv[1:] == ["all"] else (narrow,):
            print(json.dumps(compile_config(dim, config)), flush=True)
