"""Rank of this process in its run, and messages between processes before torch's process group exists.

A run has one process per device. Either Lightning starts them after the first process has opened the run folder, with
the path of the folder on their command line. Or torchrun or SLURM's `srun` starts all of them at once; then the first
process sends messages to the others through a key-value store on the first node.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from cogview_pl.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_PATIENCE = timedelta(days=7)  # longest time that other processes wait while the first one tokenises
_TO_MEET = timedelta(minutes=10)  # longest time until all processes have started
_INTERACTIVE = ("bash", "interactive")  # names of interactive SLURM jobs; a run in one starts as a single process
_FAILED = "failed"
_PROGRAM = "cogview_pl.run"
_SET_BY_LIGHTNING = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID")

LAUNCHER = "COGVIEW_PL_LAUNCHER"
"""Variable with the id of the process that started this one for another device of its run."""


class Processes:
    """The processes of a run.

    Args:
        rank: number of this process; process 0 writes the files of the run.
        size: number of processes that torchrun or SLURM started; 1 if Lightning starts the others, or without others.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._store: TCPStore | None = None
        self._told = 0

    @property
    def first(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    @property
    def local_rank(self) -> int:
        """Number of this process among those on its machine."""
        slurm = self.size > 1 and "TORCHELASTIC_RUN_ID" not in os.environ
        return _number("SLURM_LOCALID" if slurm else "LOCAL_RANK")

    def agree(self, value: str | None) -> str | None:
        """Return the first process's `value` in all processes; the others wait for it.

        Raises:
            SystemExit: the first process has failed, after it printed the reason.
        """
        if self.size == 1:
            return value
        self._store = self._store or _meet(self.rank, self.size)
        self._told += 1
        key = f"cogview_pl/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{self._told}"
        if self.first:
            self._store.set(key, _FAILED if value is None else f"={value}")
            return value
        said = self._store.get(key).decode()
        if said == _FAILED:
            sys.exit(2)
        return said.removeprefix("=")

    @contextmanager
    def first_goes_ahead(self) -> Iterator[bool]:
        """Run the block in the first process (it gets True), then in the others (they get False)."""
        if not self.first:
            self.agree(None)
            yield False
            return
        try:
            yield True
        except BaseException:
            self.agree(None)
            raise
        self.agree("done")

    @contextmanager
    def launching(self, command: list[str]) -> Iterator[None]:
        """Inside the block, processes that Lightning starts run `command`; afterwards its process group is removed.

        Lightning repeats the main module with `sys.argv`. But in a sweep or a chain these name more than the current
        job, and in a script of the user or under submitit another program. Lightning also leaves its process group and
        environment variables, and they would disturb the next job.
        """
        main: Any = sys.modules["__main__"]
        program = main.__spec__
        argv, variables = sys.argv, {name: os.environ.get(name) for name in (*_SET_BY_LIGHTNING, LAUNCHER)}
        sys.argv = [argv[0], *command]
        os.environ[LAUNCHER] = str(os.getpid())
        main.__spec__ = find_spec(_PROGRAM)
        try:
            yield
        finally:
            sys.argv, main.__spec__ = argv, program
            if self.size == 1:  # processes of torchrun or SLURM keep their group for the next job
                _leave_group()
            for name, value in variables.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _these() -> Processes:
    """Rank and size by the environment variables, if the launcher that set them has started this process."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return Processes(_number("RANK"), _number("WORLD_SIZE", 1))
    if "SLURM_PROCID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in _INTERACTIVE:
        rank, size = _number("SLURM_PROCID"), _number("SLURM_NTASKS", 1)
        return Processes(rank, size) if rank < size else Processes(0, 1)
    launched = os.environ.get(LAUNCHER) == str(os.getppid())
    return Processes(_number("LOCAL_RANK") if launched else 0, 1)


def _number(name: str, default: int = 0) -> int:
    value = os.environ.get(name, str(default))
    return int(value) if value.isdecimal() else default


def forget_stale_variables() -> None:
    """Remove environment variables of an earlier launch, with a warning.

    With them Lightning would treat this process as one of several, and would let another process write the results.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get(LAUNCHER) == str(os.getppid()):
        return
    stale = [name for name in ("LOCAL_RANK",) if name in os.environ]
    if _number("SLURM_PROCID") >= _number("SLURM_NTASKS", 1) > 0 and "SLURM_PROCID" in os.environ:
        stale += [name for name in _SLURM if name in os.environ]
    for name in stale:
        print(
            f"cogview_pl: {name}={os.environ.pop(name)} is ignored: no launcher has started this process; unset it",
            file=sys.stderr,
        )


def require_node(num_nodes: int) -> None:
    """Raises UserError if the environment names a node that the run does not have."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    for name in ("NODE_RANK", "GROUP_RANK"):
        if _number(name) >= num_nodes:
            raise UserError(
                f"{name}={os.environ[name]} is set, and the run has trainer.num_nodes={num_nodes}: this process would "
                f"wait for another one to write the results; unset {name}, or set trainer.num_nodes"
            )


RANKS = _these()
"""Processes of this run."""


def _meet(rank: int, size: int) -> TCPStore:
    from torch.distributed import TCPStore

    if "TORCHELASTIC_RUN_ID" not in os.environ:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        slurm = SLURMEnvironment()  # sets MASTER_ADDR and MASTER_PORT
        address, port = slurm.main_address, slurm.main_port
    else:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    kept_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            address,
            port,
            size,
            is_master=rank == 0 and not kept_by_torchrun,
            timeout=_TO_MEET,
            wait_for_workers=False,
            multi_tenant=True,  # the process group will use the same address
        )
    except RuntimeError as error:
        raise UserError(
            f"process {rank} of {size} found no first process at {address}:{port}; were all of them started? "
            "(Variables that an earlier launch of torchrun or SLURM left look the same: unset them)"
        ) from error
    store.set_timeout(_PATIENCE)
    return store


def _leave_group() -> None:
    torch: Any = sys.modules.get("torch")  # if torch is not imported, there is no group
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
