"""A model, a device and a log for tests of which kernels are chosen."""

from __future__ import annotations

import pytest
import torch

from tests.engine.head_map_model import make_model

MODEL = make_model([[0]], dim=64, index_dim=8, block=16)
CUDA = torch.device("cuda")


def reason(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = caplog.records
    return record.getMessage()
