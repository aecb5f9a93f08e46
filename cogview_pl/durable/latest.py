"""`OUTPUTS/TASK/latest`: the newest finished run of a task.

It is a symbolic link. Where links do not exist (Windows without developer mode, some network and USB disks), it is a
text file that holds the path of the run, relative to the folder of the file.
"""

from __future__ import annotations

import os
from pathlib import Path

from cogview_pl.durable.read import UnreadableError, read_file
from cogview_pl.durable.write import write_text
from cogview_pl.errors import UserError

LATEST = "latest"
_LONGEST = 4096  # bytes of a path


def move(latest: Path, run: Path) -> None:
    """Let `latest` name a run folder, in one step; the path is relative, so that the folder of runs can be moved."""
    target = os.path.relpath(run.resolve(), latest.parent.resolve())
    temporary = latest.with_name(f".{LATEST}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target, target_is_directory=True)
    except (OSError, NotImplementedError):
        write_text(latest, f"{target}\n")
    else:
        os.replace(temporary, latest)


def through_latest(path: str | Path) -> Path:
    """The path, in which a file `latest` is replaced by the run that it names; links are left as they are.

    `outputs/style/latest/model` becomes `outputs/style/2026-01-01_00-00-00/model`.

    Raises:
        UserError: the file cannot be read, or holds no path.
    """
    parts = Path(path).parts
    for number in (number for number, part in enumerate(parts) if part == LATEST):
        latest = Path(*parts[: number + 1])
        if latest.is_file():
            return latest.parent.joinpath(_named_in(latest), *parts[number + 1 :])
    return Path(path)


def newest(latest: Path) -> Path | None:
    """The run folder that `latest` names, as a full path; None if there is none."""
    found = through_latest(latest)
    return found.resolve() if found.is_dir() else None


def require_free(latest: Path) -> None:
    """Raises UserError if a folder, or a file of another kind, takes the place of `latest`."""
    if not os.path.lexists(latest) or latest.is_symlink():
        return
    if not latest.is_file():
        raise UserError(f"{latest} must be a link to the newest run and is a file or folder; move it away")
    _named_in(latest)


def _named_in(latest: Path) -> str:
    """The path in a file `latest`."""
    try:
        text = read_file(latest, _LONGEST).decode("utf-8")
    except (UnreadableError, UnicodeDecodeError) as error:
        text = f"{error}\n\n"
    lines = text.splitlines()
    if len(lines) != 1 or not lines[0].strip() or "\0" in text:
        raise UserError(f"{latest} must name the newest run, as a link or in one line of text; move it away")
    return lines[0].strip()
