"""Everything that only a GPU can show, in order of worth, within twelve minutes:

    python -m benchmarks.gpu_check FOLDER [--seconds 720] [--only engine_decode,decode_anatomy]

Each step is a process of its own with a limit; one that fails or hangs does not stop the next, and
some are tried a second time in another way. FlashInfer is compiled beside the tests, never beside
what is timed; where it is not ready in time, everything is measured without it. Names after --only
run in the order in which they are given, so that a run can be cut in two.

FOLDER receives a file for every benchmark (its JSON with date, commit and command, as soon as it is
there; of a benchmark that was stopped, the rows that it had measured), `gpu-check.json` (after
every step: what ran, how long, exit status, last lines, rows) and `gpu-check.log` (all output). At
the end it says which files are missing or not whole. Nothing heavy is imported here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu_steps import BUILD, BY_NAME, STEPS, Attempt, Step, run_step

LEAST_SECONDS = 8.0  # a step that has less than this is left out
SECONDS = 720.0


@dataclass
class Check:
    """Steps, one after another, and the report on them, which lies in the folder too."""

    folder: Path
    commit: str
    seconds: float
    build: Step = BUILD
    report: dict[str, Any] = field(init=False)
    building: Future[dict[str, Any]] | None = field(init=False, default=None)
    has_build: bool = field(init=False, default=True)  # until it is known to have failed

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + self.seconds
        date = datetime.now(UTC).isoformat(timespec="seconds")
        self.report = {"date": date, "commit": self.commit, "steps": [], "left_out": []}

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self, steps: Sequence[Step]) -> dict[str, Any]:
        """All steps for which there is time; the report."""
        with ThreadPoolExecutor(1) as beside:
            if any(step.needs_build for step in steps):
                self.building = beside.submit(self._attempt, self.build, Attempt())
            for step in steps:
                if step.file:  # its figures are times, which a compiler beside it would spoil
                    self._finish_build()
                self._run(step)
            self._finish_build()
        self.report["missing"] = self.missing(steps)
        self._write()
        return self.report

    def _run(self, step: Step) -> None:
        """One step; in another way if it failed, or at once if what it needs is not there.

        One that was stopped would be so again, unless it waited in vain for what BUILD makes.
        """
        wanted = (Attempt(), *step.again)
        earlier = None
        for attempt in wanted[1:] if step.needs_build and not self.has_build else wanted:
            if self.left < LEAST_SECONDS:
                self.report["left_out"].append(step.name)
                return
            found = self._attempt(step, attempt)
            earlier = self._keep(step, found, earlier)
            in_vain = step.needs_build and not found.get("rows")
            if found["status"] == 0 or (found["stopped"] and not in_vain):
                return

    def missing(self, steps: Sequence[Step]) -> list[str]:
        """Files that these steps should have left, and why they are not there or not whole."""
        last = {found["name"]: found for found in self.report["steps"]}
        return [
            f"{step.file} ({self._why(step, last.get(step.name))})"
            for step in steps
            if step.file and (step.name not in last or last[step.name]["status"] != 0)
        ]

    def _why(self, step: Step, found: dict[str, Any] | None) -> str:
        """Of its last attempt; its file may be of an earlier one."""
        if found is None:
            return "no time"
        seconds, status = found["seconds"], found["status"]
        parts = [f"stopped after {seconds} s" if found["stopped"] else f"status {status}"]
        path = self.folder / step.file
        if path.exists():
            if "rows" in (kept := json.loads(path.read_text())):
                parts.insert(0, f"{kept['rows']} rows")
            parts.insert(0, "in part")
        return ", ".join(parts)

    def _finish_build(self) -> None:
        """Wait for it, within the time that is left."""
        if self.building is None:
            return
        if not self.building.done():
            print(f"waiting for {self.build.name}", flush=True)
        found = self.building.result()  # its limit ends with the time for all
        self.building, self.has_build = None, found["status"] == 0
        self._note(found)

    def _attempt(self, step: Step, attempt: Attempt) -> dict[str, Any]:
        if step.file:
            (self.folder / step.file).unlink(missing_ok=True)
        return run_step(step, attempt, min(step.seconds, self.left), self.folder)

    def _keep(self, step: Step, found: dict[str, Any], earlier: Any) -> Any:
        """The step's own file, with where its figures are from, and its part of the report.

        earlier: what this returned for an attempt that failed; it stays beside what came later.
        """
        path = self.folder / step.file
        figures = found.pop("result") if step.file else None
        if step.file and path.exists():
            figures = json.loads(path.read_text())
        if figures is not None and step.rows:
            found["rows"] = len(figures.get(step.rows, ()))
        self._note(found)
        if figures is None:
            if earlier is not None:
                path.write_text(json.dumps(earlier) + "\n")
            return earlier
        kept = {"date": self.report["date"], "commit": self.commit}
        about = ("command", "status", "seconds", "rows")
        kept |= {name: found[name] for name in about if name in found}
        kept |= {"figures": figures} | ({"earlier_attempt": earlier} if earlier else {})
        path.write_text(json.dumps(kept) + "\n")
        self.report["hardware"] = self.report.get("hardware") or figures.get("hardware")
        return kept

    def _note(self, found: dict[str, Any]) -> None:
        self.report["steps"].append(found)
        more = f", {found['rows']} rows" if "rows" in found else ""
        if "reported" in found:
            more += f", names {', '.join(found['reported']) or 'no kernel'}"
        print(f"{found['name']}: status {found['status']}, {found['seconds']} s{more}", flush=True)
        self._write()

    def _write(self) -> None:
        (self.folder / "gpu-check.json").write_text(json.dumps(self.report) + "\n")


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all steps together")
    parser.add_argument("--only", default="", help="names of steps in their order, with commas")
    given = parser.parse_args()
    names = [name for name in given.only.split(",") if name] or [step.name for step in STEPS]
    if unknown := set(names) - set(BY_NAME):
        known = ", ".join(BY_NAME)
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {known}")
    report = Check(given.folder, _commit(), given.seconds).run([BY_NAME[name] for name in names])
    for what in ("left_out", "missing"):
        if report[what]:
            print(f"{what.replace('_', ' ')}: {', '.join(report[what])}")
    return int(bool(report["left_out"]) or any(step["status"] != 0 for step in report["steps"]))


if __name__ == "__main__":
    sys.exit(main())
