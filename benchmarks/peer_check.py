"""Whether a library that is measured computes attention: a peer that does not is no peer."""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

EXCUSED = 4.0  # times the error of bfloat16: whether it is attention is asked, not how exact


class PeerError(Exception):
    """A library cannot be measured here; the message is one line."""


def compare(
    what: str, found: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None
) -> None:
    """Hold an answer against attention in float32.

    Args:
        found, q: bfloat16 [rows, heads, queries, head_dim]; k, v: [rows, KV heads, keys, head_dim].
        seen: bool [queries, keys]; None: every query sees every key.

    Raises:
        PeerError: it is further off than attention in bfloat16 by more than EXCUSED.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    with sdpa_kernel(SDPBackend.MATH):
        truth = scaled_dot_product_attention(q.float(), k.float(), v.float(), seen)
    twin = scaled_dot_product_attention(q, k, v, seen)
    error, excused = ((x.float() - truth).abs().max() for x in (found, twin))
    if not error <= EXCUSED * excused:  # NaN is no answer either
        raise PeerError(f"{what} is off by {error:.2g}, bfloat16 by {excused:.2g}")


def compare_last_token(
    out_THD: Tensor, q_THD: Tensor, cache: tuple[Tensor, Tensor], pages_B: Tensor
) -> None:
    """The last token of a causal prompt sees all others: what is off at its length shows there.

    Args:
        cache: keys and values, [pages, KV heads, block, head_dim].
        pages_B: of the prompt.

    Raises:
        PeerError: as `compare`.
    """
    tokens, heads, dim = q_THD.shape
    group = heads // cache[0].shape[1]
    for kv_row in range(cache[0].shape[1]):
        # The heads of a group as queries of one head: nothing is repeated for each of them.
        k, v = (part[pages_B, kv_row].reshape(1, 1, -1, dim)[:, :, :tokens] for part in cache)
        own = slice(kv_row * group, (kv_row + 1) * group)
        found, q = (x[-1, own].reshape(1, 1, group, dim) for x in (out_THD, q_THD))
        compare(f"prefill of {tokens} tokens", found, q, k, v)
