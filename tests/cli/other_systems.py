"""Imports the package and runs command lines on a system without the POSIX parts of Python: `other_systems.py CASES`.

CASES is a JSON list of lists of arguments. Prints the exit code of each. The CPU stands for an Apple GPU. Libraries are
imported first, because they look at the name of the system and not at what it has.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pkgutil
import signal
import sys
from pathlib import Path

LIBRARIES = (
    "braceexpand", "filelock", "hydra", "lightning", "numpy", "omegaconf", "PIL.Image", "safetensors.torch",
    "sentencepiece", "tensorboard.backend.event_processing.event_accumulator", "torch.utils.data",
    "torch.utils.tensorboard", "torchmetrics", "torchvision", "tqdm", "xxhash",
)  # fmt: skip
OF_LIBRARIES = {"SIGUSR1": signal.SIGUSR1, "SIGCHLD": signal.SIGCHLD}
MODULES = ("fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty")
SIGNALS = ("SIGALRM", "SIGCHLD", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
CALLS = (
    "O_DIRECTORY", "O_NOFOLLOW", "fork", "geteuid", "getpgid", "getuid", "killpg", "mkfifo", "register_at_fork",
    "sched_getaffinity", "setsid",
)  # fmt: skip


def no_links(*arguments: object, **options: object) -> None:
    """Windows without developer mode."""
    raise OSError(1314, "A required privilege is not held by the client")


def become_another_system() -> None:
    """Take the POSIX parts away, for code that is imported or runs from here on."""
    for library in LIBRARIES:
        importlib.import_module(library)
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for module, names in ((signal, SIGNALS), (os, CALLS)):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    os.symlink = no_links
    multiprocessing.set_start_method("spawn")  # loader processes, on Windows and macOS
    opened = os.open

    def open_no_folder(path: str, flags: int, mode: int = 0o777, **options: int) -> int:
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, flags, mode, **options)

    os.open = open_no_folder


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    become_another_system()
    package = importlib.import_module("cogview_pl")
    for module in pkgutil.walk_packages(package.__path__, "cogview_pl."):
        importlib.import_module(module.name)
    for name, number in OF_LIBRARIES.items():  # Lightning and torch ask for the name of the system before they use them
        setattr(signal, name, number)
    no_float64 = importlib.import_module("tests.kernels.no_float64").NoFloat64
    main = importlib.import_module("cogview_pl.run").main
    for words in json.loads(sys.argv[1]):
        sys.argv = ["cogview_pl", *words]
        try:
            with no_float64():
                main()
            code: object = 0
        except SystemExit as stop:
            code = stop.code
        print("exit code", code)
