"""Runs many command lines in one process, because importing torch is slow: `in_process.py CASES RESULTS`.

CASES is a JSON list of `{args, cwd}`; RESULTS becomes a list of `{code, stdout, stderr}`. A traceback counts as code 1,
as it would in a process of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path

from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra

from cogview_pl.run import main


def run(args: list[str], cwd: str) -> dict[str, object]:
    """Exit code and output of a command line."""
    os.chdir(cwd)
    os.environ["HOME"] = cwd  # `~` of a case stays in its folder
    sys.argv = ["cogview_pl", *args]
    GlobalHydra.instance().clear()
    stdout, stderr = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
            code = 1
    return {"code": code, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}


if __name__ == "__main__":
    Hydra.get_mode = lambda *arguments, **options: None  # a key that no case sets, so that everything is composed again
    cases = json.loads(Path(sys.argv[1]).read_text())
    results_file = Path(sys.argv[2] + os.environ.get("RANK", "")).resolve()  # each process writes its own file
    results_file.write_text(json.dumps([run(**case) for case in cases]))
