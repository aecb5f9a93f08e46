"""A TorchScript archive that writes a file when it is opened, and disguises that libtorch still accepts."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


class Loader(nn.Module):
    """A module that writes a file when it is loaded."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target
        self.training = False

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.target, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.target = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), self.target)

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


DISGUISES: dict[str, Callable[[str], str]] = {
    "none": lambda name: name,
    "upper-case folder": lambda name: name.replace("/code/", "/Code/"),
    "upper-case ending": lambda name: name.replace(".py", ".PY"),
    "upper-case names": lambda name: name.partition("/")[0] + "/" + name.partition("/")[2].upper(),
}


def hostile_archive(file: Path, target: Path, disguise: str = "none", twice: bool = False) -> Path:
    """Write an archive that makes `target` when it is opened.

    Args:
        file: the archive.
        target: file that the archive makes.
        disguise: a key of `DISGUISES`.
        twice: the code is stored twice; libtorch reads the first entry, Python the second, which is empty.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Loader(str(target))), str(file))
        with zipfile.ZipFile(file) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in entries.items():
                archive.writestr(DISGUISES[disguise](name), content)
            for name in entries:
                if twice and name.endswith(".py"):
                    archive.writestr(DISGUISES[disguise](name), b"")
    target.unlink(missing_ok=True)
    return file
