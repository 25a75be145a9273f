"""The converted model that is taken apart: its weights, its conversion's state, its source.

State is OUT.work, see `conversion.work_folder`; what is used of it is how the indexer was fitted
(run.json) and the heads' scores (heads.json). Without it, the scores are those that config.json
keeps, and texts for a fit are chosen here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from conversion.attention_samples import PlantedDocument
from conversion.document_feed import DocumentFeed
from conversion.errors import ConversionError
from conversion.evaluation.options import EvalOptions
from conversion.evaluation.variants import load_weights
from conversion.fit_options import FitOptions
from conversion.head_roles import Scores, read_heads
from conversion.indexer_fit import IndexerFit
from conversion.progress_bar import progress_bar
from conversion.state import model_digest, read_json
from conversion.text_source import TextSource, load_tokenizer
from engine.model.checkpoint import INDEXER_FILE, preflight
from engine.model.config import ModelConfig, SparseAttentionConfig
from engine.model.decoder import Indexer

FIT_TOKENS = 8192  # of a document, where no conversion says


@dataclass(frozen=True, slots=True)
class FitTexts:
    """What the closed form is fitted on."""

    data: Path | None
    tokens: int  # of a document
    seed: int
    moments: int  # documents
    trial: int  # documents on which horizons and temperatures are chosen
    keep_far: bool = True  # see FitOptions

    @classmethod
    def of_conversion(cls, path: Path) -> FitTexts:
        """Those of a conversion's run.json; raises ConversionError."""
        try:
            options = read_json(path)["options"]
            fit, data = options["fit"], options["data"]
            return cls(
                data=None if data is None else Path(data),
                tokens=options["document_tokens"],
                seed=options["seed"],
                moments=fit["moment_documents"],
                trial=fit["trial_documents"],
                keep_far=fit["keep_far"],
            )
        except (KeyError, TypeError):
            raise ConversionError(f"{path}: not the state of a conversion") from None


class AblationModel:
    """A converted folder, loaded, with all that its parts can be replaced by."""

    def __init__(
        self, folder: Path, options: EvalOptions, work: Path | None, console: Console
    ) -> None:
        """
        Args:
            options: device and dtype; `teacher` is the folder that was converted.
            work: state of the conversion; None: FOLDER.work if that is there.

        Raises:
            CheckpointError: a folder is unusable.
            ConversionError: the model is dense or without an indexer, or the state is not its own.
        """
        checkpoint = preflight(folder)
        sparse = checkpoint.config.sparse
        if sparse is None:
            raise ConversionError(f"{folder} is a dense model: there is nothing to take away")
        if sparse.index_dim is None:
            raise ConversionError(f"{folder} has no indexer: its retrieval heads do not select")
        self.folder = folder
        self.sparse: SparseAttentionConfig = sparse
        self.tokenizer = load_tokenizer(folder)
        self.work = _state_folder(folder, work)
        self._options = options
        self._console = console
        self._digests = [model_digest(checkpoint), _sha256(folder / INDEXER_FILE)]
        if options.teacher is not None:
            self._digests.append(model_digest(preflight(options.teacher)))
        self._check_state()
        self.decoder = load_weights(folder, options)
        self.teacher = None if options.teacher is None else load_weights(options.teacher, options)
        if self.teacher is not None and not _same_shape(self.teacher.config, self.config):
            raise ConversionError(f"{options.teacher} is not the model that {folder} was made of")

    @property
    def config(self) -> ModelConfig:
        """The converted model's, with its sparse section."""
        return self.decoder.config

    @property
    def identity(self) -> str:
        """Names the weights of the folder, its indexer and its teacher."""
        return hashlib.sha256(" ".join(self._digests).encode()).hexdigest()

    @cached_property
    def distilled(self) -> bool:
        """Whether its weights are no longer those of the source."""
        return "distil" in self._calibration()

    def scores(self) -> Scores | None:
        """Needle scores by layer and query head, if a conversion has left them."""
        path = None if self.work is None else self.work / "heads.json"
        found = read_json(path) if path is not None and path.exists() else self._calibration()
        scores = found.get("scores")
        config = self.config
        shape = [config.num_heads] * config.num_layers
        if not isinstance(scores, list) or [len(layer) for layer in scores] != shape:
            return None
        return scores

    @cached_property
    def fit_texts(self) -> FitTexts:
        """As in the conversion, if its state is there."""
        if self.work is not None and (self.work / "run.json").exists():
            found = FitTexts.of_conversion(self.work / "run.json")
            return replace(found, tokens=min(found.tokens, self.config.max_position_embeddings))
        fit = FitOptions()
        tokens = min(FIT_TOKENS, max(self._options.lengths))
        return FitTexts(
            self._options.data,
            tokens,
            self._options.seed,
            fit.moment_documents,
            fit.trial_documents,
        )

    def closed_form(self, sparse: SparseAttentionConfig) -> list[Indexer | None]:
        """An indexer for other heads or dimensions, fitted on the weights before stage 2 if given.

        Horizons and temperatures are chosen as in a conversion; no gradient step is taken.
        """
        decoder = self.teacher or self.decoder
        moments, trial = self._fit_documents
        with progress_bar(self._console, "closed form", len(moments) + len(trial)) as advance:
            fit = IndexerFit(
                decoder,
                replace(self.config, sparse=sparse),
                self.fit_texts.seed,
                advance=advance,
                keep_far=self.fit_texts.keep_far,
            )
            fitted = fit.closed_form(moments, trial)
        return self.placed(fitted.weights.indexers(self.config.num_layers))

    def placed(self, indexers: list[Indexer | None]) -> list[Indexer | None]:
        """On the device of the weights and, but for biases for ages, in their dtype."""
        like = next(self.decoder.parameters())

        def to(weight: Tensor) -> Tensor:
            return weight.to(like.device, like.dtype).contiguous()

        def bias(own: Indexer) -> Tensor | None:
            return None if own.age_bias_HA is None else own.age_bias_HA.to(like.device)

        return [
            None if own is None else Indexer(to(own.q_proj_HID), to(own.k_proj_HID), bias(own))
            for own in indexers
        ]

    @cached_property
    def _fit_documents(self) -> tuple[list[PlantedDocument], list[PlantedDocument]]:
        texts = self.fit_texts
        feed = DocumentFeed(
            TextSource.find(texts.data),
            self.tokenizer,
            texts.tokens,
            2 * texts.seed + 1,  # as in the conversion
            texts.moments + texts.trial,
        )
        documents = feed.held_out()
        return documents[: texts.moments], documents[texts.moments :]

    def _calibration(self) -> dict[str, Any]:
        """What config.json says about how the model was made."""
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        found = config.get("rtpurbo", {}).get("calibration", {})
        return found if isinstance(found, dict) else {}

    def _check_state(self) -> None:
        """Raises ConversionError if the state is another model's."""
        if self.work is None:
            return
        config = preflight(self.folder).config
        heads = read_heads(self.work / "heads.json", config.num_layers, config.num_heads)
        if heads != [list(layer) for layer in self.sparse.retrieval_heads]:
            raise ConversionError(f"{self.work}: its heads are not those of {self.folder}")
        path = self.work / "run.json"
        if self._options.teacher is not None and path.exists():
            made_of = read_json(path).get("model_sha256")
            if made_of != self._digests[-1]:
                raise ConversionError(f"{path}: the state is of another model than the teacher")


def _state_folder(folder: Path, work: Path | None) -> Path | None:
    if work is not None and not work.is_dir():
        raise ConversionError(f"{work}: no such folder")
    beside = folder.with_name(folder.name + ".work")
    return work or (beside if beside.is_dir() else None)


def _same_shape(one: ModelConfig, other: ModelConfig) -> bool:
    return replace(one, sparse=None) == replace(other, sparse=None)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
