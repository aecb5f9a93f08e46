"""Compiles a C++ file of this project once per machine, and loads it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

# Without contraction, because a compiler fuses a multiplication and an addition in one place and not in another, which
# rounds differently; the sources fuse them where it saves time.
_COMPILE = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fPIC", "-fopenmp", "-c"),
)
_LONGEST = 300  # seconds that the compiler may take
_LONGEST_REASON = 200  # characters of its message


class NoLibraryError(Exception):
    """The library cannot be made on this machine; the message says why."""


class Library:
    """The compiled form of a C++ file, from the cache of the user if it was compiled before.

    The library has no OpenMP of its own: it takes that of torch, so `torch.set_num_threads` counts for it too.
    """

    def __init__(self, source: Path) -> None:
        self.source = source

    def load(self) -> ctypes.CDLL:
        """Its functions; compiles them at the first call.

        Raises:
            NoLibraryError: there is no compiler, or it fails, or its result cannot be loaded.
        """
        return self._loaded

    def is_compiled(self) -> bool:
        """Whether the cache has it; raises NoLibraryError if there is no compiler, or it fails."""
        with self._compiler() as compiler:
            return self._file(compiler).is_file()

    @cached_property
    def missing(self) -> str | None:
        """Why this machine cannot make it; None: it is ready."""
        try:
            self.load()
        except NoLibraryError as error:
            return str(error)
        return None

    @cached_property
    def _loaded(self) -> ctypes.CDLL:
        with self._compiler() as compiler:
            file = self._file(compiler)
            if not file.is_file():
                _compile(compiler, self.source, file)
            return ctypes.CDLL(str(file))

    @contextmanager
    def _compiler(self) -> Iterator[str]:
        """The compiler, whose failures in this context become NoLibraryError."""
        compiler = _compiler()
        try:
            yield compiler
        except (OSError, subprocess.SubprocessError) as error:
            raise NoLibraryError(
                f"{compiler} did not make a library of {self.source.name} ({_reason(error)})"
            ) from error

    def _file(self, compiler: str) -> Path:
        return _cache() / f"{self.source.stem}-{_key(self.source, compiler)}.so"


def has_compiler() -> bool:
    """Whether this machine has a C++ compiler."""
    try:
        _compiler()
    except NoLibraryError:
        return False
    return True


def _compiler() -> str:
    named = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, [named] if named else ["g++", "clang++"])), None)
    if found is None:
        raise NoLibraryError(f"no C++ compiler was found ({named or 'g++'}); install one or name it in CXX")
    return found


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home, "cogview_pl", "kernels")


def _key(source: Path, compiler: str) -> str:
    """Hash of all that the library depends on: source, headers, compiler, options and processor."""
    cores = Path("/proc/cpuinfo")
    flags = [line for line in cores.read_text(errors="replace").splitlines() if line.startswith("flags")][:1]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    sources = [file.read_text(encoding="utf-8") for file in (source, *sorted(source.parent.glob("*.h")))]
    parts = (*sources, version, " ".join(_COMPILE), platform.machine(), *flags)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, source: Path, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:  # other processes may do the same
        objects, library = Path(folder, "objects.o"), Path(folder, "library.so")
        # Linked without -fopenmp, or it would load a second OpenMP next to that of torch.
        for command in (
            [compiler, *_COMPILE, str(source), "-o", str(objects)],
            [compiler, "-shared", str(objects), "-o", str(library)],
        ):
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=_LONGEST)
        library.replace(file)


def _reason(error: Exception) -> str:
    """The compiler's first line that speaks of an error, without the path in front."""
    said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    line = next((line for line in said.splitlines() if "error" in line), said)
    return " ".join(line.partition("error: ")[2].split() or line.split())[:_LONGEST_REASON]
