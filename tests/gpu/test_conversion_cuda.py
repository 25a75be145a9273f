"""On a GPU host: every step of a conversion and its evaluation against the CPU's results.

Steps that are compared number by number run in float32 on both devices. Whole commands compute in
bfloat16 on a GPU, and are held to what its 8 bits leave of a random model, whose attention is far
sharper than a trained one's. Skips itself without CUDA.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from conversion.answer_loss import AnswerLoss
from conversion.attention_samples import sample_rows
from conversion.calibration import NEEDLE_TOKENS, needle_document, needle_scores
from conversion.closed_form_fit import closed_form_candidates
from conversion.convert_options import ConvertOptions
from conversion.distil_options import DistilOptions
from conversion.evaluation.options import EvalOptions
from conversion.evaluation.report import EvalReport
from conversion.evaluation.run import evaluate
from conversion.fit_options import FitOptions
from conversion.index_weights import IndexWeights, index_groups
from conversion.indexer_fit import FittedIndex, HeadSetting, IndexerFit
from conversion.indexer_training import IndexerTraining
from conversion.pipeline import convert
from conversion.sequence import CachedSequence
from conversion.text_source import load_tokenizer
from engine.model.checkpoint import preflight
from kernels.block_age import AGE_RANGES
from tests.conversion.tiny_distillation import TinyDistillation
from tests.engine.model.tiny_models import make_checkpoint
from tests.gpu.conversion_host import HEADS, INDEX_DIM, SPARSE, TOKENS, Host

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"
QUIET = Console(file=io.StringIO())
STEPS = FitOptions(steps=8, queries=32, learning_rate=1e-2, warmup_steps=2, save_every=4)
TEMPERED = {
    (layer, head): HeadSetting(0.0, 1.0, 0.8) for layer, heads in enumerate(HEADS) for head in heads
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        lines = (f"value_{number}_{i} = [{i * number}, 'text']\n" for i in range(30))
        (folder / f"{number:02}.py").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    make_checkpoint("qwen3", folder, max_position_embeddings=1024)
    return folder


@pytest.fixture(scope="module")
def hosts(dense: Path, text: Path) -> tuple[Host, Host]:
    return Host.make(dense, text, "cpu"), Host.make(dense, text, DEVICE)


def test_calibration_in_float32_is_the_cpus(dense: Path, hosts: tuple[Host, Host]) -> None:
    tokenizer = load_tokenizer(dense)
    found = []
    for host in hosts:
        needles = [needle_document(ids, tokenizer, NEEDLE_TOKENS, 1) for ids in host.texts]
        scores = torch.tensor(needle_scores(host.decoder, needles))
        roles = (HEADS, ((), (), ()), (range(6),) * 3)
        loss = AnswerLoss(host.decoder, host.planted, 64, 4)
        found.append((scores, torch.tensor([loss(heads) for heads in roles])))
    (on_cpu, losses), (on_cuda, cuda_losses) = found
    torch.testing.assert_close(on_cuda, on_cpu, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(cuda_losses, losses, atol=1e-3, rtol=1e-3)
    assert len(set(losses.tolist())) == 3, "head roles make a difference"


def test_the_fit_in_float32_is_the_cpus(hosts: tuple[Host, Host]) -> None:
    start = IndexWeights.of_indexers(index_groups(hosts[0].config), hosts[0].random_indexers())
    products, losses, kept = [], [], []
    for host in hosts:
        candidates = closed_form_candidates(
            host.decoder, host.config, host.planted, 0, host.ranks, lambda: None
        )
        products.append([_products(candidate.weights) for candidate in candidates])
        training = IndexerTraining(host.decoder, host.config, start, STEPS, 0, host.ranks)
        for step in range(STEPS.steps):
            numbers = range(step * training.batch, (step + 1) * training.batch)
            training.take([(n, host.planted[n % len(host.planted)]) for n in numbers])
        losses.append(torch.tensor(training.losses))
        fit = IndexerFit(host.decoder, host.config, ranks=host.ranks)
        fitted = FittedIndex(training.weights.copied(host.ranks.device), TEMPERED)
        lines = fit.quality(fitted, fitted, host.planted)
        kept.append(torch.tensor([line.anywhere.values() for line in lines]))
    assert losses[0][-1] < 0.95 * losses[0][0], "the steps teach something"
    torch.testing.assert_close(losses[1], losses[0], atol=0.0, rtol=1e-3)
    for on_cuda, on_cpu in zip(products[1], products[0], strict=True):
        assert float((on_cuda - on_cpu).norm() / on_cpu.norm()) < 0.01
    torch.testing.assert_close(kept[1], kept[0], atol=0.01, rtol=0.01)


def _products(weights: IndexWeights) -> Tensor:
    """W_Q^T W_K of every head: the factors themselves may differ in sign."""
    return torch.stack(
        [w_q_ID.T @ group.w_k_ID for group in weights.groups for w_q_ID in group.w_q_GID]
    )


def test_gradients_of_biases_in_float32_are_the_cpus(hosts: tuple[Host, Host]) -> None:
    start = IndexWeights.of_indexers(index_groups(hosts[0].config), hosts[0].random_indexers())
    heads = sum(map(len, HEADS))
    generator = torch.Generator().manual_seed(1)
    start = start.with_age_biases(torch.randn(heads, AGE_RANGES, generator=generator))
    gradients = []
    for host in hosts:
        training = IndexerTraining(host.decoder, host.config, start, STEPS, 0, host.ranks)
        training.add_gradient(host.planted[0], sample_rows(host.planted[0], 32, 0))
        biases = [bias_GA.grad for bias_GA in training.weights.age_biases()]
        gradients.append(torch.cat([grad.cpu() for grad in biases if grad is not None]))
    assert gradients[0].shape == (heads, AGE_RANGES)
    assert gradients[0].abs().amax(1).min() > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("ages", [False, True], ids=["plain", "ages"])
def test_choices_by_trial_in_float32_are_the_cpus(hosts: tuple[Host, Host], ages: bool) -> None:
    """Ties may fall either way, so what is compared is what the choices keep and cost."""
    found = []
    for host in hosts:
        config = replace(host.config, sparse=replace(SPARSE, index_age_bias=ages))
        fit = IndexerFit(host.decoder, config, ranks=host.ranks)
        fitted = fit.closed_form(host.planted[:2], host.planted[2:])
        lines = fit.quality(fitted, fitted, host.planted[2:])
        found.append(torch.tensor([line.anywhere.values()[:3] for line in lines]))
    torch.testing.assert_close(found[1], found[0], atol=0.02, rtol=0.02)


def test_a_sequence_in_float32_is_the_cpus(hosts: tuple[Host, Host]) -> None:
    found = []
    for host in hosts:
        ids = host.texts[0]
        sequence = CachedSequence(
            host.decoder, host.config, host.random_indexers(), TOKENS, branch_tokens=20
        )
        hidden = [
            sequence.prefill(ids[:300]),
            *sequence.branch([ids[:20], ids[40:51]], decode=True),
        ]
        hidden += [sequence.decode(ids[300:400]), sequence.branch([ids[400:420]], decode=False)[0]]
        found.append((torch.cat(hidden).cpu(), sequence.attended, sequence.contexts))
    (hidden_TE, attended, contexts), (cuda_TE, cuda_attended, cuda_contexts) = found
    assert cuda_contexts == contexts
    assert max(attended) > 2 * min(attended)
    # A block whose mass is at the edge of a bin may be selected on one device alone.
    near_T = (cuda_TE - hidden_TE).abs().amax(-1) < 1e-2
    assert float(near_T.float().mean()) > 0.97
    equal = [a == b for a, b in zip(cuda_attended, attended, strict=True)]
    assert sum(equal) > 0.97 * len(equal)


def test_distillation_follows_the_cpus(tmp_path: Path) -> None:
    """In bfloat16, as it always computes on a GPU, with weights in float32."""
    tiny = TinyDistillation.make(tmp_path)
    on_cpu, _ = tiny.run("cpu", steps=2)
    on_cuda, _ = tiny.run("cuda", steps=2, device=DEVICE)
    assert on_cuda["steps"] == on_cpu["steps"] == 2
    assert on_cuda["losses"] == pytest.approx(on_cpu["losses"], rel=0.1)
    assert on_cuda["before"]["kl"] == pytest.approx(on_cpu["before"]["kl"], rel=0.1)
    again, _ = tiny.run("cuda", steps=2, device=DEVICE)
    assert again == on_cuda, "a finished one is not done again"


def test_a_whole_conversion_and_its_evaluation(dense: Path, text: Path, tmp_path: Path) -> None:
    options = ConvertOptions(
        data=text,
        heads_share=0.25,
        window_tokens=64,
        index_dim=INDEX_DIM,
        block_tokens=16,
        documents=2,
        document_tokens=400,
        causal_check=True,
        fit=replace(STEPS, moment_documents=1, trial_documents=2, quality_documents=2),
        distil=DistilOptions(
            sequence_tokens=400,
            response_tokens=40,
            sequences=4,
            validation_sequences=2,
            steps=2,
            batch=2,
            warmup_steps=1,
            validate_every=2,
            device=DEVICE,
        ),
        device=DEVICE,
    )
    convert(dense, tmp_path / "sparse", options, QUIET)
    sparse = preflight(tmp_path / "sparse").config.sparse
    assert sparse is not None
    assert 0 < sum(map(len, sparse.retrieval_heads)) <= round(0.25 * 18)
    quality = json.loads((tmp_path / "sparse.work" / "quality.json").read_text())
    assert len(quality["losses"]) == STEPS.steps
    assert all(0 < line["answers"]["kept_mass"] <= 1.001 for line in quality["heads"])

    on_cpu, on_cuda = (evaluated(tmp_path / "sparse", text, device) for device in ("cpu", DEVICE))
    for cuda, cpu in zip(on_cuda.curves, on_cpu.curves, strict=True):
        assert cuda.variant == cpu.variant
        assert cuda.losses == pytest.approx(cpu.losses, rel=0.01)
    for cuda_text, cpu_text in zip(on_cuda.agreements, on_cpu.agreements, strict=True):
        assert cuda_text.kl_mean == pytest.approx(cpu_text.kl_mean, rel=0.05, abs=1e-4)
        assert cuda_text.top1.value == pytest.approx(cpu_text.top1.value, abs=0.05)
    for cuda_cell, cpu_cell in zip(on_cuda.cells, on_cpu.cells, strict=True):
        assert cuda_cell.task == cpu_cell.task
        assert cuda_cell.attended == pytest.approx(cpu_cell.attended, rel=0.02)


def evaluated(folder: Path, text: Path, device: str) -> EvalReport:
    """Text and facts, in float32 on every device."""
    options = EvalOptions(
        tasks=("code_constant", "trace_counters", "text"),
        lengths=(800,),
        samples=2,
        facts=(2,),
        text_samples=2,
        decoded=60,
        data=text,
        device=device,
        dtype="float32",
    )
    return evaluate(folder, options, QUIET)
