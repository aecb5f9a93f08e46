"""Runs programs in forked children of a process that has imported torch and Lightning, because imports are slow.

`python forked.py` is that process; it gets requests through a socket on its standard input. Only libraries are
imported ahead, so a program imports this package as in a process of its own.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

_LIBRARIES = ("torch", "torchvision", "torch.utils.tensorboard", "lightning", "hydra", "sentencepiece", "PIL.Image")
_CODE = struct.Struct("i")
_LONGEST = 900  # seconds


@dataclass(frozen=True)
class Ended:
    """Exit code and output of a program."""

    code: int
    stdout: str
    stderr: str


class ForkServer:
    """The process with the libraries; it is started at the first run."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket, self._theirs = socket.socketpair()

    def run(self, program: Sequence[str | Path], cwd: Path, stdin: str = "") -> Ended:
        """Run `-m MODULE ARGUMENTS` or `FILE ARGUMENTS` to the end.

        Raises:
            TimeoutError: it takes longer than fifteen minutes, and is killed.
        """
        if self._process is None:
            command = [sys.executable, __file__]
            options = {"env": self._environment, "start_new_session": True}
            self._process = subprocess.Popen(command, stdin=self._theirs, **options)  # type: ignore[call-overload]
            self._theirs.close()
            self._socket.settimeout(_LONGEST)
        with ExitStack() as stack:
            files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(4)]
            request, given, stdout, stderr = files
            request.write(json.dumps({"program": list(map(str, program)), "cwd": str(cwd)}).encode())
            given.write(stdin.encode())
            request.seek(0)
            given.seek(0)
            socket.send_fds(self._socket, [b"run"], [file.fileno() for file in files])
            (code,) = _CODE.unpack(self._socket.recv(_CODE.size))
            stdout.seek(0)
            stderr.seek(0)
            return Ended(code, stdout.read().decode(), stderr.read().decode())

    def close(self) -> None:
        """End the process and all programs that still run in it."""
        self._socket.close()
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _serve() -> list[str]:
    """Fork for every request; returns the requested program in the child."""
    for name in _LIBRARIES:
        __import__(name)
    requests = socket.socket(fileno=0)
    while True:
        message, files, _, _ = socket.recv_fds(requests, 16, 4)
        if not message:
            os._exit(0)
        child = os.fork()
        if not child:
            requests.detach()
            return _become(*files)
        for file in files:
            os.close(file)
        _, status = os.waitpid(child, 0)
        requests.sendall(_CODE.pack(os.waitstatus_to_exitcode(status)))


def _become(request: int, *standard: int) -> list[str]:
    with open(request, encoding="utf-8") as stream:
        wanted = json.load(stream)
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(wanted["cwd"])
    return wanted["program"]  # type: ignore[no-any-return]


if __name__ == "__main__":
    words = _serve()
    if words[0] == "-m":
        sys.path[0], sys.argv = os.getcwd(), words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(words[0]).parent), words
        runpy.run_path(words[0], run_name="__main__")
