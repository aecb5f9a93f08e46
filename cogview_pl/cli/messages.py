"""Errors that the user can mend, as one line on standard error and exit code 2."""

from __future__ import annotations

import errno
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cogview_pl.config.keys import did_you_mean, nearest_words, unknown_key
from cogview_pl.config.shipped import shipped
from cogview_pl.durable.write import disk_full, is_disk_full
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import Stopped
from cogview_pl.runs.ranks import RANKS

_LIST_OF_KEYS = "`task=… --cfg job` lists all keys"
_OPEN_FILES = (errno.EMFILE, errno.ENFILE)
_NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUDA out of memory")
_INTERNALS = ("object_type=", "full_key:", "reference_type=", "See https://", "provider=")
_UNKNOWN = re.compile(r"Key '(.*)' (?:not in|is not in struct)")
_WRONG_CHOICE = re.compile(r"Invalid value '(.*)', expected one of \[(.*)\]")
_WRONG_TYPE = re.compile(r"Value '(.*)' (?:of type '.*' could not be converted to|is not a valid) (Integer|Float|bool)")
_BELOW_NULL = "Unexpected type for root: NoneType"  # OmegaConf's, of a key below a node that is null
_NOT_SET = re.compile(r"Environment variable '(.*)' not found")
_TYPES = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}
_OVERRIDE = re.compile(r"Could not override '(?P<key>.*)'\.\s+To append to your config use (?P<advice>.*)", re.DOTALL)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn errors that the user can mend into one line and exit code 2; defects of ours keep their traceback.

    A stopped run keeps its exit code and prints how it goes on.
    """
    try:
        yield
    except Stopped as stop:
        if RANKS.first:
            print(f"cogview_pl: stopped by {stop.signal.name}; {stop.advice}", file=sys.stderr)
        sys.exit(stop.code)
    except Exception as error:
        message = one_line(error)
        if message is None:
            raise
        give_up(message, error.details if isinstance(error, UserError) else ())


def one_line(error: Exception) -> str | None:
    """What the user can mend about an error; None for a defect of ours, which keeps its traceback."""
    if isinstance(error, UserError):
        return str(error) if error.advice is None else f"{str(error).rstrip('.')}; {error.advice}"
    if isinstance(error, MissingConfigException):
        return _unknown_choice(error)
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _of_composition(error)
    if isinstance(error, ValueError) and str(error).startswith("Config group override must be"):  # Hydra's, of a number
        return "a group takes the name of a choice, not a number (precision=fp16); `--help` lists groups and choices"
    if isinstance(error, OverflowError) and "full_key:" in str(error):  # OmegaConf's, of a number with many digits
        return _of_composition(error)
    if isinstance(error, AssertionError) and str(error) == _BELOW_NULL:
        return _below_null(error)
    if isinstance(error, OSError) and error.errno is not None:
        return _of_the_machine(error)
    if _is_out_of_memory(error):
        return "out of memory; lower data.batch_size, or see with plan=true which overrides fit"
    return None


def give_up(message: str, details: Sequence[str] = ()) -> NoReturn:
    """Print one line, and details below it, and exit with code 2."""
    if RANKS.first:  # the other processes meet the same error
        print(f"cogview_pl: {' '.join(message.split())}", *details, sep="\n", file=sys.stderr)
    sys.unraisablehook = lambda unraisable: None  # finalisers of half-made objects would print more lines
    sys.exit(2)


def report_thread_error(failed: threading.ExceptHookArgs) -> None:
    """Print the traceback of a thread, except for a full disk: the main thread reports that."""
    if not is_disk_full(failed.exc_value):
        threading.__excepthook__(failed)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether torch or Python found no memory."""
    named = type(error).__name__ == "OutOfMemoryError"  # torch's; this file does not import torch
    return named or isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)


def _of_the_machine(error: OSError) -> str:
    """What the operating system refuses, with the file if it is known."""
    if is_disk_full(error):
        return disk_full(Path(error.filename or "a file of this run"))
    if error.errno in _OPEN_FILES:
        return f"{error.strerror}: this process may not open another one; raise the limit (ulimit -n), then go on"
    return f"{error.filename or 'a file'}: {error.strerror}; see to the disk and its permissions, then go on"


def _unknown_choice(error: MissingConfigException) -> str:
    """A choice that a group does not have, with the choices that it has."""
    if not error.options or not error.missing_cfg_file:
        return _without_internals(error)
    group, _, choice = error.missing_cfg_file.rpartition("/")
    if (group, choice) == ("hydra/sweeper", "optuna"):
        return 'hydra/sweeper=optuna needs hydra-optuna-sweeper; pip install "cogview_pl[optuna]"'
    return _no_such_choice(group, choice, error.options)


def _no_such_choice(key: str, choice: str, choices: Sequence[str]) -> str:
    guesses = [f"{key}={guess}" for guess in nearest_words(choice, choices)]
    return f"{key}={choice}: there is no such choice{did_you_mean(guesses)}; choices: {', '.join(choices)}"


def _of_composition(error: BaseException) -> str:
    """Messages of Hydra and OmegaConf, with the nearest keys and without internals."""
    cause = error.__cause__ or error.__context__
    parent = getattr(cause, "parent_node", None)
    if isinstance(cause, OmegaConfBaseException) and isinstance(parent, DictConfig) and _UNKNOWN.match(str(cause)):
        return _unknown_key(error, cause, parent)
    if str(error).startswith("Error merging override") and cause is not None:
        error = cause  # it names the wrong value
        key = str(getattr(cause, "full_key", ""))
        if choice := _WRONG_CHOICE.search(str(error)):
            return _no_such_choice(key, choice[1], choice[2].split(", "))
        if wrong := _WRONG_TYPE.search(str(error)):
            return f"{key}={wrong[1]} must be {_TYPES[wrong[2]]}"
    if variable := _NOT_SET.search(str(error)):
        return f"the environment variable {variable[1]} is not set; put {variable[1]}=VALUE before the command"
    if isinstance(error, OverrideParseException) and "missing EQUAL" in str(error):
        return f"{error.override} is not of the form KEY=VALUE, such as task=vqvae; `--help` lists tasks and keys"
    return _without_internals(error)


def _below_null(error: AssertionError) -> str:
    """A key of a node that is null, because nobody chose what sets it; the error itself does not name it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    key = "a key" if trace is None else str(trace.tb_frame.f_locals.get("key", "a key"))
    node = key.rpartition(".")[0]
    group = node.replace(".", "/")
    choice = f"choose {group}=…" if (shipped("conf") / group).is_dir() else "choose the task that has it"
    return f"{key} has no effect, because {node} is null; {choice} (`--help` lists choices), or leave {key} out"


def _unknown_key(error: BaseException, cause: OmegaConfBaseException, parent: DictConfig) -> str:
    """A key that `parent` lacks, and how to add it if that node may have any key."""
    key = str(cause.full_key)
    root = OmegaConf.select(parent, "." * (key.count(".") + key.count("[") + 1))  # dots go up
    override = _OVERRIDE.fullmatch(str(error))
    if override is None:  # a file of configurations sets the key
        return f"{str(error).partition(': ')[0]}: {unknown_key(key, root)}; {_LIST_OF_KEYS}"
    given, advice = override["key"], override["advice"]
    if OmegaConf.get_type(parent) is not dict:
        return f"{unknown_key(max(given, key, key=len), root)}; {_LIST_OF_KEYS}"
    if not key.startswith(f"{given}."):
        return f"{unknown_key(given, root)}; to add it: {advice}"
    return f"{given} exists and has {', '.join(map(str, parent)) or 'no keys'}; to add {cause.key}: {advice}"


def _without_internals(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    keys = [line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")]
    keys += [error.override] if isinstance(error, OverrideParseException) else []
    prefix = f"{keys[0]}: " if keys and keys[0] else ""
    message = prefix + " ".join(line for line in lines if not line.startswith(_INTERNALS))
    return message.replace("KeyError raised while resolving interpolation: ", "")
