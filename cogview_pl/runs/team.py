"""Starts the processes that share the batches of a task, or joins them, and connects them.

The first process starts the others with its own command line, one per device; or torchrun or SLURM has started all.
Each of the others connects to the first one, at an address that it learns with a password.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge

import torch

from cogview_pl.data.sharing import Team
from cogview_pl.errors import UserError
from cogview_pl.errors.signals import SIGNALS
from cogview_pl.runs.ranks import LAUNCHER, RANKS

_MEETING = "COGVIEW_PL_MEETING"  # where the processes that the first one starts find it
_HERE, _ANYWHERE = "127.0.0.1", ""
_GLANCE = 0.1  # seconds between two looks for signals and dead processes while waiting
_TO_END = 20.0  # seconds that the others have to end after the first one


@contextmanager
def working_together(size: int, num_nodes: int, command: Sequence[str]) -> Iterator[Team | None]:
    """The processes that share a task; the block runs in each of them. None in a process that does not take part.

    Args:
        size: number of processes. With 1 the first process works alone, and those of torchrun or SLURM wait for it.
        num_nodes: number of machines that they run on.
        command: arguments of the command line of the task, for the processes to start.

    Raises:
        UserError: torchrun or SLURM has started another number of processes, or one of them has died.
    """
    if size == 1:
        with RANKS.first_goes_ahead() as first:
            yield Team() if first else None
        return
    if RANKS.size not in (1, size) or (RANKS.size == 1 and num_nodes > 1):
        raise UserError(
            f"{RANKS.size} processes were started for trainer.devices x trainer.num_nodes = {size}; start as many with "
            "torchrun or srun"
        )
    with _fewer_threads(size, num_nodes):
        if not RANKS.first:
            meeting = RANKS.agree(None) if RANKS.size > 1 else os.environ[_MEETING]
            with _quiet(), Team(RANKS.rank, size, partial(_join, str(meeting))) as joined:
                yield joined
            return
        with socket.create_server((_HERE if num_nodes == 1 else _ANYWHERE, 0)) as server:
            password = secrets.token_hex(16)
            address = _HERE if num_nodes == 1 else os.environ.get("MASTER_ADDR", socket.gethostname())
            meeting = f"{address} {server.getsockname()[1]} {password}"
            if RANKS.size > 1:
                RANKS.agree(meeting)
                with Team(0, size, partial(_gather, server, password, size, [])) as gathered:
                    yield gathered
                return
            with (
                _started(size, command, meeting) as others,
                Team(0, size, partial(_gather, server, password, size, others)) as gathered,
            ):
                yield gathered


@contextmanager
def _started(size: int, command: Sequence[str], meeting: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes for the other devices of this machine; they end with the block."""
    ours = {LAUNCHER: str(os.getpid()), _MEETING: meeting}
    others = [
        subprocess.Popen(
            [sys.executable, "-m", "cogview_pl.run", *command],
            env=os.environ | ours | {"LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,  # the first process reads prompts
        )
        for rank in range(1, size)
    ]
    try:
        yield others
    except BaseException:
        for other in others:
            other.terminate()
        raise
    finally:
        for other in others:
            try:
                other.wait(_TO_END)
            except subprocess.TimeoutExpired:
                other.kill()


def _gather(
    server: socket.socket, password: str, size: int, others: Sequence[subprocess.Popen[bytes]]
) -> dict[int, Connection]:
    """The connections to all other processes, by rank; raises UserError if one of them has ended."""
    links: dict[int, Connection] = {}
    server.settimeout(_GLANCE)
    while len(links) < size - 1:
        SIGNALS.check()
        for rank, other in enumerate(others, start=1):
            if rank not in links and other.poll():
                raise UserError(
                    f"the process for device {rank} ended with code {other.returncode} before it began; set "
                    "trainer.devices=1 to see whether the task runs on one device"
                )
        try:
            link = Connection(server.accept()[0].detach())
        except TimeoutError:
            continue
        try:
            deliver_challenge(link, password.encode())
            answer_challenge(link, password.encode())
            links[int(link.recv_bytes())] = link
        except (AuthenticationError, OSError, EOFError, ValueError):  # not one of ours
            link.close()
    return links


def _join(meeting: str) -> dict[int, Connection]:
    """The connection to the first process."""
    address, port, password = meeting.split()
    try:
        link = Client((address, int(port)), authkey=password.encode())
        link.send_bytes(str(RANKS.rank).encode())
    except (OSError, EOFError) as error:
        raise UserError(f"process {RANKS.rank} finds no first process at {address}:{port} ({error})") from None
    return {0: link}  # type: ignore[dict-item]


@contextmanager
def _fewer_threads(size: int, num_nodes: int) -> Iterator[None]:
    """Share the threads of this machine among its processes, unless a variable sets them."""
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, before * num_nodes // size))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave warnings to the first process."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
