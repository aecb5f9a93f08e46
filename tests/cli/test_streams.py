"""Runs survive closed pipes, closed streams, and encodings without Chinese."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, sys
from cogview_pl.cli.streams import use_forgiving_streams
use_forgiving_streams()
for number in range(20000):
    print(f"{number}: 红色的圆形 …")
sys.stdout.flush()
os.write(int(sys.argv[1]), b"done")
"""


def run(line: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell line; `RUN` is replaced by the program, and descriptor 9 gets its final output."""
    command = line.replace("RUN", f"{sys.executable} -c '{PROGRAM}' 9")
    return subprocess.run(["bash", "-c", f"exec 9>&2; {command}"], capture_output=True, text=True, check=False)


def test_a_reader_that_goes_away_does_not_end_the_program() -> None:
    ended = run("set -o pipefail; RUN | head -1")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "0: 红色的圆形 …\n", "done")


def test_a_log_on_a_full_disk_does_not_end_the_program() -> None:
    ended = run("RUN > /dev/full")
    assert (ended.returncode, ended.stderr) == (0, "done")


def test_closed_streams_do_not_end_the_program() -> None:
    ended = run("RUN >&-")
    assert (ended.returncode, ended.stderr) == (0, "done")


def test_an_encoding_without_chinese_gets_escapes() -> None:
    ended = run("PYTHONIOENCODING=latin-1 RUN | head -1")
    assert ended.stdout == "0: \\u7ea2\\u8272\\u7684\\u5706\\u5f62 \\u2026\n"


LINES = """
import sys
from cogview_pl.cli.streams import use_forgiving_streams
use_forgiving_streams()
sys.stderr.write("\\rtrain 10%")
sys.stderr.flush()
print("a message", 1)
sys.stderr.write("\\rtrain 20%\\n")
print("cogview_pl: an error", file=sys.stderr)
"""


def test_messages_do_not_stand_behind_a_progress_bar() -> None:
    """The bar is erased before them, and a finished one stays."""
    reader, writer = pty.openpty()
    subprocess.run([sys.executable, "-c", LINES], stdout=writer, stderr=writer, check=True)
    found = os.read(reader, 1000).decode()
    os.close(reader)
    os.close(writer)
    assert found == ("\rtrain 10%\r\x1b[Ka message 1\r\n\rtrain 20%\r\ncogview_pl: an error\r\n")


def test_ctrl_c_during_imports_says_nothing(cli, tmp_path: Path) -> None:
    """The terminal has shown ^C already."""
    (tmp_path / "hydra.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    process = cli.start(["task=vqvae"], tmp_path)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (-signal.SIGINT, "", "")
