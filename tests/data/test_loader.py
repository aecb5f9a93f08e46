"""Loader processes that hang, die or fail end in one line; those that do not, change nothing."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cogview_pl.data import loader as loaders
from cogview_pl.data import worker_activity
from cogview_pl.data.bad_samples import ImageBatch
from cogview_pl.data.loader import Loader
from cogview_pl.data.sampler import EndlessSampler
from cogview_pl.errors import UserError

needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
pytestmark = [needs_fork, pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")]


@pytest.fixture(autouse=True)
def short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "_SLICE", 0.2)


def nothing() -> None:
    pass


def hang() -> None:
    """As on a disk that does not answer, which SIGTERM cannot end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    time.sleep(600)


def die() -> None:
    time.sleep(0.3)  # until what it has read before is out
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(3)


def refuse() -> None:
    raise UserError("data.token_store=x: row 5 is damaged; copy it again")


def fail() -> None:
    raise ValueError("a defect")


class Numbers(Dataset[Tensor]):
    """The numbers from 0 on; reading number 5 does something else first."""

    def __init__(self, at_five: Callable[[], None] = nothing, size: int = 12) -> None:
        self.at_five = at_five
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        if index == 5:
            self.at_five()
        return torch.tensor(index)

    def key(self, index: int) -> str:
        return f"number-{index}.png"


def read(dataset: Dataset[Any], **options: Any) -> list[list[int]]:
    """By one worker: of two, torch would wait for seconds for the one that is left when the other one ends."""
    return [batch.tolist() for batch in Loader(dataset, **{"batch_size": 2, "num_workers": 1, **options})]


def refused(dataset: Dataset[Any], **options: Any) -> str:
    """The line; `pytest.raises` would keep the frames of the error, and with them workers, until somebody collects."""
    try:
        read(dataset, **options)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    return message


def none_left() -> bool:
    for child in multiprocessing.active_children():
        child.join(10)
    return not multiprocessing.active_children()


# --- nothing happens


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_batches_are_those_of_a_dataloader(num_workers: int) -> None:
    options: dict[str, Any] = {"batch_size": 2, "num_workers": num_workers, "persistent_workers": num_workers > 0}
    orders = [
        [[batch.tolist() for batch in loader] for _ in range(2)]
        for kind in (DataLoader, Loader)
        for loader in [kind(Numbers(), shuffle=True, generator=torch.Generator().manual_seed(3), **options)]
    ]
    assert orders[0] == orders[1]
    assert orders[0][0] != orders[0][1]


def test_an_endless_order_is_read_as_far_as_asked() -> None:
    loader = Loader(Numbers(), sampler=EndlessSampler(12, seed=1), batch_size=4, num_workers=2)
    batches = iter(loader)
    found = [next(batches).tolist() for _ in range(7)]
    order = iter(EndlessSampler(12, seed=1))
    assert found == [[next(order) for _ in range(4)] for _ in range(7)]


def test_a_slow_batch_is_waited_for_as_long_as_samples_come() -> None:
    class Slow(Numbers):
        def __getitem__(self, index: int) -> Tensor:
            time.sleep(0.3)
            return torch.tensor(index)

    assert read(Slow(size=4), batch_size=4, patience=0.9) == [[0, 1, 2, 3]]


def test_workers_ignore_interrupts() -> None:
    def interrupt() -> None:
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN

    assert read(Numbers(interrupt))[2] == [4, 5]


# --- hanging


@pytest.mark.parametrize("persistent", [False, True])
def test_a_worker_that_hangs_is_named_with_its_sample_and_killed(persistent: bool) -> None:
    order = range(11, -1, -1)  # number 5 is the seventh
    message = refused(Numbers(hang), patience=0.5, persistent_workers=persistent, sampler=order)
    assert re.fullmatch(
        r"data\.num_workers=1: a worker has been reading number-5\.png for \d s \(data\.worker_timeout=0\.5\); "
        r"see to the disk that it is on, take it out of the data, or raise data\.worker_timeout",
        message,
    )
    assert none_left()


def test_samples_without_keys_are_named_by_their_number() -> None:
    class Nameless(Dataset[int]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> int:
            if index == 3:
                hang()
            return index

    assert "has been reading sample 3 for" in refused(Nameless(), patience=0.4)


def test_the_name_is_not_waited_for_where_it_lies_on_the_same_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unnameable(Numbers):
        def key(self, index: int) -> str:
            time.sleep(600)
            return "never"

    monkeypatch.setattr(worker_activity, "_NAMING", 0.1)
    assert "has been reading sample 5 for" in refused(Unnameable(hang), patience=0.4)


def test_workers_that_hang_elsewhere_are_noticed_too() -> None:
    def collate(samples: list[Tensor]) -> Tensor:
        time.sleep(1.5)
        os._exit(0)

    message = refused(Numbers(), patience=0.5, collate_fn=collate)
    assert re.fullmatch(
        r"data\.num_workers=1: the workers have been silent for \d s \(data\.worker_timeout=0\.5\) and are not "
        "reading; try fewer of them, or 0 to see what is wrong",
        message,
    )
    assert none_left()


class Stop(SystemExit):
    pass


def test_a_stop_is_heard_while_a_worker_hangs() -> None:
    looks = []

    def look() -> None:
        looks.append(None)
        if len(looks) == 3:
            raise Stop(143)

    with pytest.raises(Stop):
        read(Numbers(hang), look=look)
    assert len(looks) == 3
    assert none_left()


def test_an_unfinished_pass_does_not_spoil_the_next_one() -> None:
    """Its workers are at a slow sample when the next pass begins."""

    def slow() -> None:
        time.sleep(0.7)

    loader = Loader(Numbers(slow), batch_size=2, num_workers=2, persistent_workers=True)
    assert next(iter(loader)).tolist() == [0, 1]
    assert [batch.tolist() for batch in loader] == [[2 * number, 2 * number + 1] for number in range(6)]
    assert [batch.tolist() for batch in loader] == [[2 * number, 2 * number + 1] for number in range(6)]


PROGRAM = """
from test_loader import Loader, Numbers, hang
batches = iter(Loader(Numbers(hang), batch_size=2, num_workers=2))
print(next(batches).tolist(), flush=True)
import time; time.sleep(1)
"""


def test_a_program_ends_though_a_worker_hangs() -> None:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"[0, 1]\n", b"")


# --- dying


@pytest.mark.parametrize(("end", "how"), [(die, "Killed"), (leave, "exit code 3")])
def test_a_worker_that_dies_is_named_with_its_sample(end: Callable[[], None], how: str) -> None:
    message = refused(Numbers(end))
    assert message == (
        f"data.num_workers=1: a worker has died ({how}) while it read number-5.png; the memory may be full (RAM or "
        "/dev/shm): use fewer workers or smaller batches; if it was at the same sample twice, take that out of the data"
    )
    assert none_left()


def test_a_death_between_two_batches_is_named_with_the_next_one() -> None:
    batches = iter(Loader(Numbers(die), batch_size=2, num_workers=1))
    assert next(batches).tolist() == [0, 1]
    time.sleep(0.7)  # a step of training
    with pytest.raises(UserError, match=r"has died \(Killed\) while it read number-5\.png; the"):
        list(batches)


def test_a_worker_that_dies_before_or_after_its_samples() -> None:
    assert " before it read anything;" in refused(Numbers(), worker_init_fn=lambda worker: die())
    assert re.search(r" after it had read number-1\.png;", refused(Numbers(), collate_fn=lambda samples: die()))


def test_the_death_of_a_worker_of_somebody_else_stays_what_it_is() -> None:
    assert len(read(Numbers())) == 6  # our handler is installed
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):
        list(DataLoader(Numbers(die), batch_size=2, num_workers=1))


# --- failing


@pytest.mark.parametrize(
    ("kind", "limit", "message"),
    [
        (resource.RLIMIT_FSIZE, 10, "/dev/shm is full; use fewer workers or smaller batches, or give it more room "),
        (resource.RLIMIT_NOFILE, 3, "too many files are open; use fewer workers, or raise `ulimit -n`"),
    ],
)
@pytest.mark.parametrize("collate", [None, torch.stack])
def test_what_workers_run_out_of_is_named(kind: int, limit: int, message: str, collate: Any) -> None:
    """Where it is torch's own thread that finds no room, batches are lost, and waited for without end."""

    def limited(worker: int) -> None:
        resource.setrlimit(kind, (limit, limit))

    found = refused(Numbers(), worker_init_fn=limited, collate_fn=collate, batch_size=12, patience=5)
    assert found.startswith(f"data.num_workers=1: {message}")


def test_batches_of_any_form_come_through() -> None:
    def collate(samples: list[Tensor]) -> Any:
        return ImageBatch(torch.stack(samples), ["text"], [], []), {"empty": torch.empty(0, 3)}, None

    found = [*Loader(Numbers(), batch_size=6, num_workers=1, collate_fn=collate)]
    assert [(batch.images.tolist(), batch.texts, rest) for batch, _, rest in found] == [
        (list(range(start, start + 6)), ["text"], None) for start in (0, 6)
    ]
    assert all(named["empty"].shape == (0, 3) for _, named, _ in found)


def test_what_a_worker_refuses_arrives_as_it_was() -> None:
    assert refused(Numbers(refuse)) == "data.token_store=x: row 5 is damaged; copy it again"


def test_a_defect_keeps_its_traceback() -> None:
    try:
        read(Numbers(fail))
    except ValueError as error:
        message = str(error)
        error.with_traceback(None)  # with the frames it would keep the worker
    assert re.match(r"Caught ValueError in DataLoader worker process \d+\.\n(.*\n)+ValueError: a defect", message)
