"""A simulation that cannot fail proves nothing: known faults are put in, and seeds must find them.

Each mutation is a small, plausible mistake in one real part. It must show within fewer seeds than
the suite runs.
"""

from __future__ import annotations

from functools import partial

import pytest

from engine.kv_pools import KvPools
from tests.simulation.child import make_pools
from tests.simulation.mutated_children import CHILDREN
from tests.simulation.mutated_parts import POOLS, SUPERVISORS
from tests.simulation.simulation import Parts, simulate

SEEDS = range(2000)  # as many as the suite runs


def pools_of(kind: type[KvPools]) -> Parts:
    return Parts(pools=partial(make_pools, kind=kind))


MUTATIONS = {
    **{kind.__name__: Parts(child=kind) for kind in CHILDREN},
    **{kind.__name__: pools_of(kind) for kind in POOLS},
    **{kind.__name__: Parts(engine=kind) for kind in SUPERVISORS},
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_seeds_find_a_fault_that_was_put_in(name: str) -> None:
    assert any(simulate(seed, MUTATIONS[name]).problems for seed in SEEDS)
