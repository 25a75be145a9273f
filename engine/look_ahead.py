"""Steps that are started before the results of the step before are read.

While the host reads results, accounts, and puts the next step together, a device that waits for it
has nothing to do. So where a step gives every running request one new token, the one after it is
started behind it: it gives each of them one token more, and takes the last one from the device
(`NEWEST_TOKEN`). At most two steps are under way, and the host waits for the older one.

    host     start 1 | start 2 | read 1, account, tell | start 3 | read 2, account, tell | start 4
    device             1 ------------------ 2 --------------------- 3 ---------------------

Why that is right:

1. Nothing is presumed of a request but that it goes on. If it is known to end (by length), it has
   no row in the step ahead. If it turns out to have ended (a stop id, an abort, a deadline, values
   that are not finite), its row was computed for nothing, and is left out of all accounts.
2. Requests change only with results (`Scheduler.update`), never ahead of them. So what is computed
   ahead is in no prefix cache: blocks are made findable up to `Request.computed` only.
3. A request that ended keeps slot and pages until the last step with a row of it is read, and while
   such a step is under way, none is started behind it. So pages change hands only when nothing is
   under way that writes to them, or that may leave in them what has to be wiped.
4. A window page that is given back when a step is read is one that no position from there on sees,
   and there the step under way begins. What a later step stores in it, it stores behind that one.
5. Admission, preemption, and steps cut for want of memory need results: where one of them may come
   next (`Scheduler.follow`), a step is read before another is put together.
6. The draw of a token depends on its request's seed and its place (`engine.counter_rng`). Where the
   logits of a request depend on the tokens before, by a penalty, all that run beside it go step by
   step, too.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.batch import NEWEST_TOKEN, Batch, Span
from engine.kv_pools import KvPools
from engine.request import Request


def next_rows(rows: Sequence[Span], requests: Sequence[Request], pools: KvPools) -> Batch | None:
    """A new token for each of these requests, behind the one that is computed in its row.

    None, and nothing is taken, where there are no rows or no pages for all of them.
    """
    full = window = 0
    for span, request in zip(rows, requests, strict=True):
        blocks = pools.blocks(span.stop + 1)
        full += blocks - len(request.full_blocks)
        window += blocks - len(request.window_blocks)
    if not rows or (pools.has_full and full > pools.full.available):
        return None
    if pools.has_window and window > pools.window.available:
        return None
    for span, request in zip(rows, requests, strict=True):
        pools.grow(request, span.stop + 1)
    return Batch([span._replace(start=span.stop, tokens=[NEWEST_TOKEN]) for span in rows])
