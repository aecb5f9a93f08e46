"""Reads state dicts of other programs: `.pth`, `.pt` or safetensors, recognised by content. No code of a file is run.

Programs (TorchScript, torch.export) are archives too, and libraries look up entries of an archive in different ways:
libtorch ignores upper and lower case, and takes the first of two entries with the same name. So an archive counts as
weights only if it has no other entries than `torch.save` writes for weights, with exact names, each once.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from cogview_pl.checkpoints.safe_pickle.load import is_file, read_pt, shown
from cogview_pl.checkpoints.weights import require_finite
from cogview_pl.errors import UserError

_ENTRY = re.compile(
    r"data\.pkl|data/[0-9]+|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
)
_COUNTER = ".num_batches_tracked"  # counter of batch norm; old files lack it, and inference does not use it
_NAMED = 3  # largest number of faults that an error lists; it counts the others


def holds_more_than_weights(file: Path, key: str) -> bool:
    """Whether a file is an archive with entries that are no part of a state dict, such as a program.

    Args:
        file: the file; only its list of entries is read.
        key: configuration key, for errors.

    Raises:
        UserError: it is a damaged archive.
    """
    if not zipfile.is_zipfile(file):
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except Exception as error:  # zipfile raises many kinds of errors for damaged files
        raise UserError(f"{key}={file} is a damaged archive ({shown(error)}); download it again") from error
    split = [name.partition("/") for name in names]
    one_folder = len({folder for folder, _, _ in split}) == 1
    return not (one_folder and len(names) == len(set(names)) and all(_ENTRY.fullmatch(name) for _, _, name in split))


def read_state_dict(file: Path, key: str, *, verify: bool) -> dict[str, Tensor]:
    """The tensors of a file that holds a state dict and nothing else, on the CPU, memory-mapped if possible.

    Args:
        file: safetensors, or a file of `torch.save(model.state_dict(), file)`.
        key: configuration key, for errors.
        verify: compare the file with its checksums, and refuse weights that are not finite.

    Raises:
        UserError: the file is missing, damaged or no state dict.
    """
    if not is_file(file):
        raise UserError(f"{key}={file} does not exist or is no file; give a file of weights")
    if holds_more_than_weights(file, key):
        raise UserError(f"{key}={file} holds more than weights, maybe a program; give a state dict")
    found = _load_safetensors(file, key) if _is_safetensors(file) else read_pt(file, key, verify=verify)
    for name, value in found.items():
        if not (isinstance(name, str) and name.isprintable() and isinstance(value, Tensor)):
            raise UserError(
                f"{key}={file} is no plain state dict: {shown(name, 60)} is a {type(value).__name__}; give tensors by "
                "name, as torch.save(model.state_dict(), FILE) writes them"
            )
    if verify:
        require_finite(found, file)
    return found


def _is_safetensors(file: Path) -> bool:
    """Whether the first bytes are the length of a JSON object and its brace."""
    try:
        with file.open("rb") as stream:
            head = stream.read(9)
    except OSError:  # the other reader reports it
        return False
    return len(head) == 9 and head.endswith(b"{") and int.from_bytes(head[:8], "little") < file.stat().st_size


def _load_safetensors(file: Path, key: str) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except Exception as error:  # its reader raises several kinds of errors for damaged files
        raise UserError(f"{key}={file} is damaged ({shown(error)}); download it again") from error


def fit(model: nn.Module, weights: Mapping[str, Tensor], label: str, file: Path, key: str) -> None:
    """Load weights into a model as fp32, in evaluation mode, without gradients; counters of batch norm are ignored.

    Args:
        model: the model; it may be on the `meta` device.
        weights: its complete state dict, floating point.
        label: name of the network, for errors.
        file: file of the weights, for errors.
        key: configuration key, for errors.

    Raises:
        UserError: tensors are missing, unknown, or of other shapes or types; the message names them.
    """
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(_COUNTER)}
    found = {name: tensor for name, tensor in weights.items() if not name.endswith(_COUNTER)}
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{shown(name, 60)} is unknown" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        shape, needed = tuple(found[name].shape), tuple(wanted[name].shape)
        if shape != needed:
            faults.append(f"{name} has the shape {shape} instead of {needed}")
        elif not found[name].is_floating_point():
            faults.append(f"{name} holds {str(found[name].dtype).removeprefix('torch.')}")
    if faults:
        more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise UserError(f"{key}={file} does not fit {label}: {', '.join(faults[:_NAMED])}{more}; give its state dict")
    model.load_state_dict({name: tensor.float() for name, tensor in found.items()}, assign=True)
    model.requires_grad_(False).eval()


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
