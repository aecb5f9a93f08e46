"""The fault campaign: runs are killed, stopped, or get a full disk or damaged files; then they resume and are compared.

    python -m tests.faults.campaign --injections 400 --seed 0 [--each NUMBER] [--only WORDS] [--json FILE]

After each fault the run resumes (`resume=auto`) and must end with the same bytes as an uninterrupted run, or the
program must refuse damaged or changed files in one line with the reason. A run that cannot be resumed must
leave no half-written files. The report has the number of injections by kind and outcome. Needs Linux; with the
right to mount, full disks are real file systems (a small tmpfs).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.faults import damage, disks, fork_server, inputs, kills
from tests.faults.bench import Bench
from tests.faults.outcomes import EARLY, FAILED, LISTED, REFUSED, SAME, STOPPED, Wrong

KINDS: dict[str, Callable[[Bench], str]] = {**kills.kinds(), **disks.kinds(), **inputs.kinds(), **damage.kinds()}
"""Name of a fault → function that injects it once and returns the outcome."""


def inject(bench: Bench, kind: str) -> str:
    """Inject one fault; returns the outcome, `FAILED: …` if a guarantee was broken."""
    bench.notes.clear()
    with bench.fresh_place():
        try:
            return KINDS[kind](bench)
        except Wrong as error:
            return f"{FAILED}: {', '.join(bench.notes)}: {error}"
        except Exception:
            return f"{FAILED}: {', '.join(bench.notes)}: {traceback.format_exc()}"


def campaign(bench: Bench, number: int, kinds: list[str]) -> tuple[dict[str, Counter[str]], list[str]]:
    """Inject `number` faults; returns outcomes by kind, and the failures."""
    table: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    failures: list[str] = []
    started = time.monotonic()
    for done in range(number):
        kind = kinds[done % len(kinds)]
        outcome = inject(bench, kind)
        if outcome.startswith(FAILED):
            failures.append(f"#{done} {kind}: {outcome}")
            print(failures[-1], flush=True)
        table[kind][outcome.split(":")[0]] += 1
        if (done + 1) % 20 == 0:
            print(f"{done + 1} of {number}, {time.monotonic() - started:.0f} s", flush=True)
    return table, failures


def markdown(table: dict[str, Counter[str]]) -> str:
    """Outcomes as a table."""
    columns = [SAME, REFUSED, LISTED, STOPPED, EARLY, FAILED]
    lines = ["| fault | " + " | ".join(columns) + " | all |", "|---|" + "---|" * (len(columns) + 1)]
    for kind, outcomes in table.items():
        cells = [str(outcomes[column] or "") for column in columns]
        lines.append(f"| {kind} | " + " | ".join(cells) + f" | {sum(outcomes.values())} |")
    total = sum(table.values(), Counter())
    cells = [str(total[column] or "0") for column in columns]
    lines.append("| **all** | " + " | ".join(cells) + f" | {sum(total.values())} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--injections", type=int, default=400, help="number of injections, kind after kind")
    parser.add_argument("--each", type=int, help="number of injections of each kind instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the table there as well")
    parser.add_argument("--only", default="", help="only faults with these words in their names")
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    fork_server.adopt_orphans()
    with tempfile.TemporaryDirectory() as home:
        started = time.monotonic()
        bench = Bench(Path(home), options.seed)
        damage.require_all_read(bench)
        print(f"{len(bench.subjects)} subjects, {time.monotonic() - started:.0f} s", flush=True)
        kinds = [kind for kind in KINDS if options.only in kind]
        number = options.injections if options.each is None else options.each * len(kinds)
        table, failures = campaign(bench, number, kinds)
        print(markdown(table))
        seconds, disk = time.monotonic() - started, "mounted" if bench.mounted else "by a limit on the size of files"
        print(f"{number} injections, seed {options.seed}, {seconds:.0f} s, full disks {disk}")
    if options.json is not None:
        found = {"seed": options.seed, "seconds": round(seconds), "table": table, "failures": failures}
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
