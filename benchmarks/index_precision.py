"""What fewer bits of an index key cost: blocks selected and attention kept, on the embedded model.

    python -m benchmarks.index_precision [--tokens 8192] [--documents 3]

Index keys are rounded as a cache would hold them, queries stay as they are, and the rule that
serves selects blocks (`kernels.indexer.select_blocks`). For sampled positions of Python code: the
share of the head's true attention that lies in the selected blocks, how many blocks these are, and
how many of them the unrounded index selects too (intersection over union). Float32, on the CPU. One
JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.hardware import describe_hardware
from benchmarks.workload import code_prompt
from conversion.document_attention import LayerView, attention_rows, hide_future, watch_document
from conversion.index_loss import block_log_mass
from engine.embedded import embedded_model_path
from engine.model.decoder import Decoder
from engine.model.head_layout import layer_heads
from engine.model.weights import load_decoder
from engine.tokenizer import Tokenizer
from kernels.indexer import select_blocks
from kernels.paged_kv import quantise_index_keys

ROWS = 128  # sampled positions of a document, the last half of it
FP8_MOST = 448.0  # largest float8_e4m3


def int8_per_token(keys_TI: Tensor, block: int) -> Tensor:
    """What `--index-dtype int8` serves, a scale in bfloat16 for every key: 18 bytes."""
    steps_T1I, scales_T1 = quantise_index_keys(keys_TI.unsqueeze(1))
    return steps_T1I.squeeze(1) * scales_T1.float()


def int8_per_block(keys_TI: Tensor, block: int) -> Tensor:
    """A scale for every block of tokens: 16 bytes, but a block that grows must be rounded anew."""
    return _by_block(keys_TI, block, lambda x, s: (x / s * 127).round() * s / 127)


def fp8(keys_TI: Tensor, block: int) -> Tensor:
    """e4m3 without a scale: 16 bytes."""
    return keys_TI.clamp(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn).float()


def bfloat16(keys_TI: Tensor, block: int) -> Tensor:
    """What is served on a GPU by default: 32 bytes."""
    return keys_TI.bfloat16().float()


Rounding = Callable[[Tensor, int], Tensor]
ROUNDINGS: dict[str, Rounding] = {
    "float32": lambda keys_TI, _: keys_TI,
    "bfloat16": bfloat16,
    "int8_per_token": int8_per_token,
    "int8_per_block": int8_per_block,
    "fp8_e4m3": fp8,
}


def _by_block(keys_TI: Tensor, block: int, rounded: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    parts = []
    for part_KI in keys_TI.split(block):  # type: ignore[no-untyped-call]  # torch's own
        most = part_KI.abs().amax().clamp_min(1e-20)
        parts.append(rounded(part_KI, most))
    return torch.cat(parts)


def head_figures(decoder: Decoder, view: LayerView, row: int, rows_R: Tensor) -> dict[str, Any]:
    """By rounding: sums over the sampled positions of one retrieval head."""
    sparse, indexer = decoder.config.sparse, decoder.indexers[view.layer]
    assert sparse is not None
    assert indexer is not None
    heads = layer_heads(decoder.config, view.layer)
    head, group, block = heads.retrieval[row], decoder.config.group_size, sparse.block_tokens
    log_attention_RT = attention_rows(view, head, rows_R, group)
    qi_RI = view.q_pre_THD[rows_R, head] @ indexer.q_proj_HID[row].T
    keys_TI = view.k_pre_TND[:, head // group] @ indexer.k_proj_HID[heads.index_row[row]].T
    top_p_R1 = torch.full((len(rows_R), 1), heads.top_p[row])

    def selected(rounding: Rounding) -> Tensor:
        scores_RT = hide_future(qi_RI @ rounding(keys_TI, block).T, rows_R)
        log_mass_R1B = block_log_mass(scores_RT, block).unsqueeze(1)
        return select_blocks(log_mass_R1B, top_p_R1, rows_R + 1, block)[:, 0]

    mass_RB = block_log_mass(log_attention_RT, block).exp()
    exact_RB = selected(ROUNDINGS["float32"])
    figures = {}
    for name, rounding in ROUNDINGS.items():
        mask_RB = selected(rounding)
        both, either = (mask_RB & exact_RB).sum(-1), (mask_RB | exact_RB).sum(-1)
        columns = ((mass_RB * mask_RB).sum(-1), mask_RB.sum(-1), both / either)
        figures[name] = [float(column.double().mean()) for column in columns]
    return figures


def measure(decoder: Decoder, documents: list[list[int]]) -> dict[str, dict[str, float]]:
    """Means over heads and documents."""
    sums: dict[str, list[list[float]]] = {name: [] for name in ROUNDINGS}
    assert decoder.config.sparse is not None
    retrieval = decoder.config.sparse.retrieval_heads
    for ids in documents:
        rows_R = torch.linspace(len(ids) // 2, len(ids) - 1, ROWS).long()

        def watch(view: LayerView, rows_R: Tensor = rows_R) -> None:
            for row in range(len(retrieval[view.layer])):
                for name, found in head_figures(decoder, view, row, rows_R).items():
                    sums[name].append(found)

        watch_document(decoder, decoder.config, ids, watch)
    names = ("attention_kept", "blocks", "overlap")
    return {
        name: {
            key: round(sum(column) / len(column), 5)
            for key, column in zip(names, zip(*found, strict=True), strict=True)
        }
        for name, found in sums.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=3)
    given = parser.parse_args()
    folder = embedded_model_path()
    decoder = load_decoder(folder, "cpu", torch.float32)
    tokenizer = Tokenizer.from_folder(folder)
    documents = [code_prompt(tokenizer, given.tokens, seed) for seed in range(given.documents)]
    result = {"benchmark": "index_precision", "model": folder.name, "tokens": given.tokens}
    result |= {"documents": given.documents, "index": measure(decoder, documents)}
    print(json.dumps(result | {"hardware": describe_hardware()}))


if __name__ == "__main__":
    main()
