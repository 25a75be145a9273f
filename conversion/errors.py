"""What can go wrong in a conversion, apart from an unusable model folder (CheckpointError)."""

from engine.errors import EngineError


class ConversionError(EngineError):
    """An option, the text or the saved state is unusable. The message is one line."""
