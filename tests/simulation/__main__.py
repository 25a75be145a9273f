"""Run one seed, or many: `python -m tests.simulation SEED [LAST] [-v]`."""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.simulation import simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("last", type=int, nargs="?", help="run all seeds up to this one")
    parser.add_argument("-v", "--verbose", action="store_true", help="print the history")
    options = parser.parse_args()
    last = options.seed if options.last is None else options.last
    began = time.process_time()
    failed = 0
    for seed in range(options.seed, last + 1):
        outcome = simulate(seed)
        failed += bool(outcome.problems)
        if options.verbose:
            print(outcome.scenario)
            print("\n".join(outcome.history.lines()))
        for problem in outcome.problems:
            print(f"seed {seed}: {problem}")
    seconds = time.process_time() - began
    print(f"{last - options.seed + 1} seeds, {failed} with problems, {seconds:.1f} s of CPU")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
