"""What to compute more simply when requests end engine after engine.

A request that ended two engines in a row may be poison, or it may only have met a fault of a fast
path that most requests never enter. So before it is failed, the next engine runs without recorded
CUDA graphs, and the one after that without our own attention kernels. If the request gets
further there, it is served, and the engine stays as it is until the next restart without a suspect.
"""

from __future__ import annotations

import logging

import msgspec

from engine.config import EngineConfig

logger = logging.getLogger(__name__)

_ENGINES_WITH_ALL = 2  # that one request ended, before something is left out
_FEATURES = ("CUDA graphs", "attention kernels")  # in the order in which they go


def features_off(device: str, crashes: int) -> int:
    """How many of the features the next engine does without.

    Args:
        device: of the engine that was lost; only a GPU has these features.
        crashes: engines that one live request ended in a row without getting further.
    """
    if device == "cpu":
        return 0
    return min(max(crashes - _ENGINES_WITH_ALL + 1, 0), len(_FEATURES))


def with_features_off(config: EngineConfig, count: int) -> EngineConfig:
    """The settings without the first `count` features; says so in the log."""
    if not count:
        return config
    logger.warning("the next engine runs without %s", " and ".join(_FEATURES[:count]))
    kernels = config.kernels if count < 2 else "torch"
    return msgspec.structs.replace(config, cuda_graphs=False, kernels=kernels)
