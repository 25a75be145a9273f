"""How much retrieval a model loses when given heads see only the window.

The window is at most an eighth of the shortest document, so that there is something to lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from conversion.attention_samples import PlantedDocument
from conversion.document_attention import LayerView, watch_document
from conversion.parallel import Ranks
from engine.model.config import SparseAttentionConfig
from engine.model.decoder import Decoder

WINDOW_SHARE = 1 / 8  # of the shortest document


class AnswerLoss:
    """The retrieval loss of a model for given head roles, over some documents."""

    def __init__(
        self,
        decoder: Decoder,
        documents: Sequence[PlantedDocument],
        window_tokens: int,
        sink_tokens: int,
        ranks: Ranks | None = None,
    ) -> None:
        self._decoder = decoder
        self._ranks = ranks or Ranks()
        self._documents = documents
        shortest = min(len(document.ids) for document in documents)
        self.window_tokens = max(1, min(window_tokens, int(WINDOW_SHARE * shortest)))
        self._sinks = sink_tokens

    def __call__(self, retrieval_heads: Sequence[Sequence[int]]) -> float:
        """Nats per answer token; every process takes its part of the documents."""
        sparse = SparseAttentionConfig(
            retrieval_heads=tuple(tuple(heads) for heads in retrieval_heads),
            window_tokens=self.window_tokens,
            sink_tokens=self._sinks,
            index_dim=None,
        )
        config = replace(self._decoder.config, sparse=sparse)
        loss, count = 0.0, 0
        for document in self._documents[self._ranks.rank :: self._ranks.world]:
            hidden_TE = watch_document(self._decoder, config, document.ids, _look_away)
            loss += float(_answer_losses(self._decoder, hidden_TE, document).sum())
            count += len(document.answers)
        loss, total = self._ranks.total([loss, count])
        return loss / total


@torch.no_grad()
def _answer_losses(decoder: Decoder, hidden_TE: Tensor, document: PlantedDocument) -> Tensor:
    rows_R = torch.tensor(document.answers, device=hidden_TE.device)
    ids_T = torch.tensor(document.ids, device=hidden_TE.device)
    log_RV = decoder.logits(hidden_TE[rows_R]).log_softmax(-1)
    return -log_RV.gather(1, ids_T[rows_R + 1][:, None])[:, 0]


def _look_away(view: LayerView) -> None:
    """Nothing of the layer is wanted."""
