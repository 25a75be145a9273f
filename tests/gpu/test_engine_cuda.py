"""On a GPU host: the engine on CUDA kernels and graphs. Skips itself without CUDA.

python -m pytest tests/gpu/test_engine_cuda.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.workload import code_prompt
from engine.config import EngineConfig
from engine.embedded import embedded_model_path
from engine.loading import load_engine_parts
from engine.request import SamplingParams
from engine.step import EngineParts
from engine.tokenizer import Tokenizer
from engine.worker import ModelRunner
from tests.engine.decode_case import MIXED, POISONED, Answer, generate, greedy, same
from tests.engine.decode_case import MODEL as TINY
from tests.engine.model.tiny_models import FAMILIES
from tests.engine.test_layer_kernels import answers
from tests.engine.test_layer_kernels import write as write_family
from tests.engine.tiny_checkpoint import write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LENGTHS = (3000, 700, 5, 129)


def load(folder: Path | None = None, **settings: Any) -> EngineParts:
    options = {"device": "cuda", "kernels": "cuda", "kv_cache_bytes": 2**30, "max_num_seqs": 6}
    model = str(folder or embedded_model_path())
    return load_engine_parts(EngineConfig(model=model, **options | settings))  # type: ignore[arg-type]  # options are mixed


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    tokenizer = Tokenizer.from_folder(embedded_model_path())
    return [code_prompt(tokenizer, length, seed) for seed, length in enumerate(lengths)]


def tokens_of(answers: list[Answer]) -> list[list[int]]:
    return [tokens for tokens, _, _ in answers]


@pytest.fixture(scope="module")
def on_cpu() -> list[Answer]:
    parts = load(device="cpu", dtype="float32", kernels="torch")
    return generate(parts, [(prompt, greedy(32)) for prompt in prompts()])


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"cuda_graphs": True}, "CUDA graphs"),
        ({"cuda_graphs": False}, "CUDA kernels"),
        ({"kernels": "torch"}, "PyTorch ops"),
    ],
    ids=["graphs", "kernels", "ops"],
)
def test_greedy_tokens_in_float32_equal_the_cpus(
    settings: dict[str, Any], name: str, on_cpu: list[Answer]
) -> None:
    parts = load(dtype="float32", **settings)
    assert isinstance(parts.runner, ModelRunner)
    assert parts.runner.decodes_with == name
    uses_ops = name == "PyTorch ops"
    assert parts.runner.prefills_with == ("PyTorch ops" if uses_ops else "Triton kernels")
    got = generate(parts, [(prompt, greedy(32)) for prompt in prompts()])
    assert tokens_of(got) == tokens_of(on_cpu)
    assert [a.pairs for *_, a in got] == [a.pairs for *_, a in on_cpu]
    for (*_, mine), (*_, its) in zip(got, on_cpu, strict=True):
        # A block whose mass lies on the threshold may fall to the other side in the last digit.
        assert mine.tokens == pytest.approx(its.tokens, rel=0.02)


def test_int8_index_keys_give_the_cpus_tokens_in_float32() -> None:
    wanted = [(prompt, greedy(32)) for prompt in prompts()]
    settings: dict[str, Any] = {"dtype": "float32", "index_dtype": "int8"}
    want = generate(load(device="cpu", **settings | {"kernels": "torch"}), wanted)
    parts = load(**settings)
    assert isinstance(parts.runner, ModelRunner)
    assert parts.runner.decodes_with == "CUDA graphs"
    got = generate(parts, wanted)
    assert tokens_of(got) == tokens_of(want)
    for (*_, mine), (*_, its) in zip(got, want, strict=True):
        # A key on the edge of a step may fall to the other side in the last digit.
        assert mine.tokens == pytest.approx(its.tokens, rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_and_eager_steps_are_identical(dtype: str) -> None:
    wanted = [(prompt, params) for prompt, (_, params) in zip(prompts(), MIXED, strict=True)]
    recorded = generate(load(dtype=dtype), wanted)
    eager = generate(load(dtype=dtype, cuda_graphs=False), wanted)
    same(recorded, eager)


def test_sampled_tokens_in_float32_equal_the_cpus(tmp_path: Path) -> None:
    """Bias, penalties, seeds, top-p and logprobs, on a model whose logits are far apart."""
    folder = write_checkpoint(tmp_path / "model", TINY)
    settings = {"dtype": "float32", "max_model_len": 160, "kv_cache_bytes": 2**26}
    got = generate(load(folder, **settings), MIXED)
    want = generate(load(folder, device="cpu", **settings | {"kernels": "torch"}), MIXED)
    assert tokens_of(got) == tokens_of(want)


def test_the_batch_does_not_change_greedy_tokens_in_float32(on_cpu: list[Answer]) -> None:
    parts = load(dtype="float32")
    for prompt, want in zip(prompts(), on_cpu, strict=True):
        assert tokens_of(generate(parts, [(prompt, greedy(32))])) == [want[0]]


def test_a_row_that_is_not_finite_fails_alone(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", TINY)
    settings = {"dtype": "float32", "max_model_len": 160, "kv_cache_bytes": 2**26}
    inputs = [[7 + i * k % 50 for i in range(n)] for k, n in ((3, 40), (7, 3), (13, 17))]
    expected = generate(load(folder, **settings), [(prompt, greedy(12)) for prompt in inputs])
    parts = load(folder, **settings)
    assert isinstance(parts.runner, ModelRunner)
    with torch.no_grad():
        parts.runner._decoder.embedding.weight[POISONED] = torch.nan
    spoiled = greedy(12, logit_bias={POISONED: 1000.0})  # the next decode step reads the bad row
    params = [greedy(12), spoiled, greedy(12)]
    got = generate(parts, list(zip(inputs, params, strict=True)))
    assert got[1][:2] == ([POISONED], "error")
    assert [got[0], got[2]] == [expected[0], expected[2]]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_the_cpu_does(family: str, tmp_path: Path) -> None:
    """In CUDA graphs, mixtures of experts included."""
    folder = write_family(family, tmp_path)
    settings = {"dtype": "float32", "max_model_len": 96, "kv_cache_bytes": 2**26, "max_num_seqs": 2}
    parts = load(folder, **settings)
    assert isinstance(parts.runner, ModelRunner)
    assert parts.runner.decodes_with == "CUDA graphs"
    tokens, logprobs = answers(parts)
    on_cpu = answers(load(folder, device="cpu", **settings | {"kernels": "torch"}))
    assert tokens == on_cpu[0]
    assert logprobs == pytest.approx(on_cpu[1], abs=2e-3)


@torch.no_grad()
def test_bfloat16_is_as_close_to_float32_as_transformers_own() -> None:
    """Log-probabilities of generated tokens, dense: mean error at most twice that of bfloat16 in
    transformers, both against float32 in transformers."""
    inputs = prompts((700, 300, 129))
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True, logprobs=0)
    parts = load(attention="dense", dtype="bfloat16")
    steps: list[list[Any]] = [[] for _ in inputs]

    def keep(request_id: int, entries: list[Any]) -> None:
        steps[request_id] += entries

    answers = generate(parts, [(prompt, params) for prompt in inputs], keep)
    errors: dict[str, list[float]] = {"engine": [], "transformers": []}
    factory: Any = AutoModelForCausalLM
    models = {
        dtype: factory.from_pretrained(embedded_model_path(), dtype=dtype).to("cuda")
        for dtype in (torch.float32, torch.bfloat16)
    }
    for prompt, (tokens, _, _), entries in zip(inputs, answers, steps, strict=True):
        ids = torch.tensor([[*prompt, *tokens]], device="cuda")
        at = torch.tensor(tokens, device="cuda")[:, None]
        exact, rounded = (
            model(ids[:, :-1]).logits[0, -len(tokens) :].float().log_softmax(-1).gather(1, at)
            for model in models.values()
        )
        own = torch.tensor([[entry.logprob] for entry in entries], device="cuda")
        errors["engine"] += (own - exact).abs().flatten().tolist()
        errors["transformers"] += (rounded - exact).abs().flatten().tolist()
    mean = {name: sum(found) / len(found) for name, found in errors.items()}
    assert mean["engine"] <= 2 * mean["transformers"], mean
