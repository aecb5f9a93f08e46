"""TensorBoard with every run once: `python -m cogview_pl.cli.tensorboard [OUTPUTS] [options of TensorBoard]`.

TensorBoard follows links, so with `--logdir outputs` it also shows the newest run of each task as `latest`.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

from tensorboard import program

_FOLDER = "tensorboard"
_SECONDS = 5.0  # between two looks for new runs


def event_folders(outputs: Path) -> dict[str, Path]:
    """Name of a run (`TASK/RUN`) → its folder of events; links are not followed."""
    found = {}
    for folder, names, _ in os.walk(outputs):
        if _FOLDER in names:
            names.clear()
            found[os.path.relpath(folder, outputs)] = Path(folder, _FOLDER).resolve()
    return found


def link_runs(outputs: Path, view: Path) -> None:
    """Make a link in `view` to the events of every run that has none there yet."""
    for name, events in event_folders(outputs).items():
        link = view / name
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(events, target_is_directory=True)


def main() -> None:
    """Start TensorBoard on a view of the runs, to which new runs are added."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # so that the view is deleted
    words = sys.argv[1:]
    outputs = Path(words.pop(0) if words and not words[0].startswith("-") else "outputs")
    with tempfile.TemporaryDirectory(prefix="cogview_pl-") as view:
        link_runs(outputs, Path(view))
        ended = threading.Event()

        def look_for_runs() -> None:
            while not ended.wait(_SECONDS):
                link_runs(outputs, Path(view))

        threading.Thread(target=look_for_runs, daemon=True).start()
        board = program.TensorBoard()
        board.configure(argv=[_FOLDER, "--logdir", view, *words])
        try:
            board.main()
        finally:
            ended.set()


if __name__ == "__main__":
    main()
