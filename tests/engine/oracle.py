"""Slow, obvious generation: no cache, no batch, everything computed again for every token.

Written from the design (section 5) and the Qwen3 architecture, in float64, over the checkpoint's
tensors as they lie in the folder. It shares nothing with the engine but `select_blocks` of
`kernels.reference`, which defines the selection, and the sampler, which has tests of its own.

Legend: T tokens of the sequence, H query heads, N KV heads, D head_dim, E hidden size, I index_dim,
R positions under the decode rule, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from engine.request import Request, SamplingParams
from engine.sampler import Sampler
from kernels.reference import select_blocks
from tests.engine.tiny_checkpoint import TinyModel


@dataclass
class Answer:
    """Tokens, logits [T, V] of the newest forward, and what the newest forward attended."""

    tokens: list[int] = field(default_factory=list)
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    pairs: int = 0  # (generated position that was computed, retrieval head)
    attended: int = 0  # tokens attended, summed over the pairs
    fraction: float = 0.0
    blocks_dropped: int = 0


class Oracle:
    """One checkpoint folder."""

    def __init__(
        self, folder: Path, model: TinyModel, *, dense: bool = False, int8_index: bool = False
    ) -> None:
        self.model = model
        self.int8_index = int8_index
        self.dense = dense or model.retrieval_heads is None
        self.weights = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
        if not self.dense and (folder / "indexer.safetensors").exists():
            indexers = load_file(folder / "indexer.safetensors")
            self.weights |= {k: v.double() for k, v in indexers.items()}

    def generate(self, prompt: list[int], params: SamplingParams) -> Answer:
        answer = Answer()
        sampler = Sampler([self.model.eos])
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else (self.model.eos,))}
        while len(answer.tokens) < params.max_tokens:
            self._forward([*prompt, *answer.tokens], len(prompt), params, answer)
            request = Request(1, prompt, params, output=answer.tokens)
            (sample,) = sampler.sample(answer.logits[-1:].float(), [request])
            assert sample.token is not None
            answer.tokens.append(sample.token)
            if sample.token in stops:
                break
        return answer

    def _forward(
        self, tokens: list[int], prompt_len: int, params: SamplingParams, answer: Answer
    ) -> None:
        answer.pairs = answer.attended = answer.blocks_dropped = 0
        answer.fraction = 0.0
        x_TE = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(self.model.layers):
            name = f"model.layers.{layer}"
            normed_TE = self._norm(x_TE, f"{name}.input_layernorm.weight")
            x_TE = x_TE + self._attention(normed_TE, layer, prompt_len, params, answer)
            normed_TE = self._norm(x_TE, f"{name}.post_attention_layernorm.weight")
            gate = torch.nn.functional.silu(normed_TE @ self._weight(f"{name}.mlp.gate_proj"))
            up = normed_TE @ self._weight(f"{name}.mlp.up_proj")
            x_TE = x_TE + (gate * up) @ self._weight(f"{name}.mlp.down_proj")
        answer.logits = self._norm(x_TE, "model.norm.weight") @ self._weight("lm_head")

    def _attention(
        self,
        x_TE: torch.Tensor,
        layer: int,
        prompt_len: int,
        params: SamplingParams,
        answer: Answer,
    ) -> torch.Tensor:
        model, name = self.model, f"model.layers.{layer}.self_attn"
        T, D = len(x_TE), model.head_dim
        q_THD = (x_TE @ self._weight(f"{name}.q_proj")).view(T, model.num_heads, D)
        k_TND = (x_TE @ self._weight(f"{name}.k_proj")).view(T, model.num_kv_heads, D)
        v_TND = (x_TE @ self._weight(f"{name}.v_proj")).view(T, model.num_kv_heads, D)
        q_pre_THD = self._norm(q_THD, f"{name}.q_norm.weight")
        k_pre_TND = self._norm(k_TND, f"{name}.k_norm.weight")
        q_THD, k_TND = rotate(q_pre_THD), rotate(k_pre_TND)
        allowed_HTT = self._allowed(q_pre_THD, k_pre_TND, layer, prompt_len, params, answer)
        heads = []
        for head in range(model.num_heads):
            kv = head * model.num_kv_heads // model.num_heads
            scores_TT = q_THD[:, head] @ k_TND[:, kv].T * D**-0.5
            weights_TT = scores_TT.masked_fill(~allowed_HTT[head], -torch.inf).softmax(dim=-1)
            heads.append(weights_TT @ v_TND[:, kv])
        return torch.cat(heads, dim=-1) @ self._weight(f"{name}.o_proj")

    def _allowed(
        self,
        q_pre_THD: torch.Tensor,
        k_pre_TND: torch.Tensor,
        layer: int,
        prompt_len: int,
        params: SamplingParams,
        answer: Answer,
    ) -> torch.Tensor:
        """Which key (last) each query (middle) of each head sees, by the rule of its token."""
        model, T = self.model, len(q_pre_THD)
        query, key = torch.arange(T)[:, None], torch.arange(T)[None]
        causal_TT = key <= query
        allowed_HTT = causal_TT.repeat(model.num_heads, 1, 1)
        if self.dense:
            return allowed_HTT
        assert model.retrieval_heads is not None
        window_TT = causal_TT & ((query - key < model.window) | (key < model.sinks))
        for head in range(model.num_heads):
            if head not in model.retrieval_heads[layer]:
                allowed_HTT[head] = window_TT
        for row, head in enumerate(model.retrieval_heads[layer]):
            scores_TT = self._index_scores(q_pre_THD, k_pre_TND, layer, row, head)
            rows = [m for m in range(prompt_len, T) if m + 1 >= model.dense_below]
            kept_RB = self._select(scores_TT, rows, params, self._age_bias(layer, row, rows, T))
            for m, kept_B in zip(rows, kept_RB, strict=True):
                kept_T = kept_B.repeat_interleave(model.block)[: m + 1]
                allowed_HTT[head, m, : m + 1] &= kept_T
                answer.pairs += 1
                answer.attended += int(kept_T.sum())
                answer.fraction += int(kept_T.sum()) / (m + 1)
                answer.blocks_dropped += m // model.block + 1 - int(kept_B.sum())
        return allowed_HTT

    def _index_scores(
        self, q_pre_THD: torch.Tensor, k_pre_TND: torch.Tensor, layer: int, row: int, head: int
    ) -> torch.Tensor:
        model, name = self.model, f"model.layers.{layer}.self_attn.indexer"
        kv = head * model.num_kv_heads // model.num_heads
        key_row = row if model.index_scope == "query_head" else model.full_kv(layer).index(kv)
        qi_TI = q_pre_THD[:, head] @ self.weights[f"{name}.q_proj.weight"][row].T
        ki_TI = k_pre_TND[:, kv] @ self.weights[f"{name}.k_proj.weight"][key_row].T
        if self.int8_index:
            scale_T1 = (ki_TI.abs().amax(-1, keepdim=True) / 127).bfloat16().double()
            ki_TI = (ki_TI / scale_T1).round().clamp(-127, 127) * scale_T1
        return qi_TI @ ki_TI.T

    def _age_bias(self, layer: int, row: int, rows: list[int], tokens: int) -> torch.Tensor:
        """What a head adds to the log mass of blocks for queries at positions `rows`: [R, B]."""
        blocks = range(-(-tokens // self.model.block))
        if not self.model.index_age_bias:
            return torch.zeros(len(rows), len(blocks), dtype=torch.float64)
        bias_A = self.weights[f"model.layers.{layer}.self_attn.indexer.age_bias"][row].tolist()
        ages = [[max(0, m // self.model.block - block) for block in blocks] for m in rows]
        return torch.tensor([[bias_A[min(age.bit_length(), 15)] for age in row] for row in ages])

    def _select(
        self,
        scores_TT: torch.Tensor,
        rows: list[int],
        params: SamplingParams,
        bias_RB: torch.Tensor,
    ) -> torch.Tensor:
        """Kept blocks of the queries at positions `rows`: bool [R, B]."""
        if not rows:
            return torch.empty(0, 0, dtype=torch.bool)
        block, T = self.model.block, len(scores_TT)
        context_R = torch.tensor(rows) + 1
        past_end_RT = torch.arange(T) >= context_R[:, None]
        scores_RT = scores_TT[rows].masked_fill(past_end_RT, -torch.inf)
        mass_BR = [part.logsumexp(dim=-1) for part in torch.split(scores_RT, block, -1)]
        top_p = self.model.top_p if params.attention_top_p is None else params.attention_top_p
        mask_R1B = select_blocks(
            (torch.stack(mass_BR, dim=-1) + bias_RB)[:, None].float(),
            torch.full((len(rows), 1), top_p),
            context_R,
            block,
        )
        return mask_R1B[:, 0]

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * self.weights[name]

    def _weight(self, name: str) -> torch.Tensor:
        return self.weights[f"{name}.weight"].T


def rotate(x_THD: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, theta 10000, halves rotated against each other (Su et al., 2021)."""
    T, _, D = x_THD.shape
    frequency = 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = torch.arange(T, dtype=torch.float64)[:, None, None] * frequency
    first, second = x_THD[..., : D // 2], x_THD[..., D // 2 :]
    return torch.cat(
        [
            first * angle.cos() - second * angle.sin(),
            second * angle.cos() + first * angle.sin(),
        ],
        dim=-1,
    )
