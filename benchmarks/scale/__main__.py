"""Print the table of growth.

`python -m benchmarks.scale [NAME …] [--largest N]`: subjects whose names begin with a NAME, sizes up to N. To measure
another version of the package, put it first in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.scale import checkpoints, images, order, store, tasks
from benchmarks.scale.measure import Subject, measured

SUBJECTS: Sequence[Subject] = (
    *images.SUBJECTS,
    *store.SUBJECTS,
    *order.SUBJECTS,
    *tasks.SUBJECTS,
    *checkpoints.SUBJECTS,
)


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    arguments.add_argument("names", nargs="*", help="first letters of subjects; none: all")
    arguments.add_argument("--largest", type=int, default=10**9, help="largest size")
    arguments.add_argument("--folder", help="where the data are made; the default is the folder of temporary files")
    given = arguments.parse_args()
    print("| subject | size | wall s | CPU s | peak MB |", "|---|--:|--:|--:|--:|", sep="\n")
    for subject in SUBJECTS:
        if given.names and not subject.name.startswith(tuple(given.names)):
            continue
        for size in (size for size in subject.sizes if size <= given.largest):
            with tempfile.TemporaryDirectory(dir=given.folder) as folder:
                subject.prepare(Path(folder), size)
                cost = measured(subject, Path(folder), size)
            costs = " | ".join(f"{value:,.3g}" for value in cost)
            print(f"| {subject.name} | {size:,} {subject.unit} | {costs} |", flush=True)


if __name__ == "__main__":
    main()
