"""A tokenizer for tests, made without torch: HTTP tests start in a second instead of ten."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level tokenizer without merges: id = 64 + byte's place in the alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {f"<|{i}|>": i for i in range(vocab_size - len(alphabet))}
    vocab |= {letter: len(vocab) + i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
