"""Shared by tests of the command line: a caller, and one tiny chain of runs that all tests read."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from .forked import Ended, ForkServer

REPOSITORY = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "cogview_pl.run")

TINY = (
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.log_every_n_steps=1",
    "image_tokenizer.quantize_after_steps=2",
    "image_tokenizer.quantizer.kmeans_iters=1",
    "data.train_size=64",
    "data.val_size=8",
    "data.batch_size=8",
    "threads=1",
    "plan.strict=false",  # test_plan.py plans; here an estimate would take a fifth of each run
)

CHAIN = ("experiment=quickstart", *TINY, "num_prompts=4", "num_captions=4", "seed=3")


class CommandLine:
    """Calls `python -m cogview_pl.run …` on the CPU, in a folder of the test."""

    def __init__(self) -> None:
        self._server = ForkServer(self.environment)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every run: this package, one thread, no GPU."""
        ours = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return os.environ | ours

    def start(self, args: Sequence[str], cwd: Path, **options: object) -> subprocess.Popen[str]:
        """Start a run in its own process without waiting for its end."""
        return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
            [*COMMAND, *args],
            cwd=cwd,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )

    def run(self, args: Sequence[str], cwd: Path, stdin: str = "") -> Ended:
        """Run to the end, with any exit code."""
        return self._server.run([*COMMAND[1:], *args], cwd, stdin)

    def run_script(self, script: Path, cwd: Path) -> Ended:
        """Run a Python script to the end, with any exit code."""
        return self._server.run([script], cwd)

    def succeed(self, args: Sequence[str], cwd: Path, stdin: str = "") -> Ended:
        """Run to the end; the exit code must be 0."""
        ended = self.run(args, cwd, stdin)
        assert ended.code == 0, f"{' '.join(args)}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
        return ended

    def run_many(self, cases: Sequence[tuple[Sequence[str], Path]], scratch: Path) -> list[Ended]:
        """Run several command lines one after the other in one process (see `in_process.py`)."""
        given, results = scratch / "cases.json", scratch / "results.json"
        given.write_text(json.dumps([{"args": list(args), "cwd": str(cwd)} for args, cwd in cases]))
        driver = Path(__file__).with_name("in_process.py")
        ended = self._server.run([driver, given, results], scratch)
        assert ended.code == 0, ended.stderr
        return [Ended(**result) for result in json.loads(results.read_text())]

    def run_on_two(self, cases: Sequence[tuple[Sequence[str], Path]], scratch: Path) -> list[Ended]:
        """Like `run_many`, in two processes that are started as by torchrun; both must end with the same exit codes.

        The second process says nothing about a run that ends well.

        The results have the output of the first process.
        """
        given, results = scratch / "cases.json", scratch / "results.json"
        given.write_text(json.dumps([{"args": list(args), "cwd": str(cwd)} for args, cwd in cases]))
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        variables = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes = [
            subprocess.Popen(
                [sys.executable, Path(__file__).with_name("in_process.py"), given, results],
                env=self.environment | variables | {"RANK": rank, "LOCAL_RANK": rank},
                stdout=subprocess.DEVNULL,
            )
            for rank in "01"
        ]
        try:
            assert [process.wait(timeout=900) for process in processes] == [0, 0]
        finally:
            for process in processes:
                process.kill()
        first, second = (
            [Ended(**result) for result in json.loads(Path(f"{results}{rank}").read_text())] for rank in "01"
        )
        for one, other in zip(first, second, strict=True):
            assert one.code == other.code, f"{one.stderr[-3000:]}\n{other.stderr[-3000:]}"
            assert one.code != 0 or not other.stdout + other.stderr, other  # no message comes twice
        return first

    def close(self) -> None:
        """End the processes that `run` and `run_many` share."""
        self._server.close()

    def refuse(self, cases: Sequence[tuple[Sequence[str], Sequence[str]]], cwd: Path, scratch: Path) -> None:
        """Every case (arguments, words) must end with exit code 2 and one line that contains the words."""
        ended = self.run_many([(args, cwd) for args, _ in cases], scratch)
        for result, (args, words) in zip(ended, cases, strict=True):
            assert result.code == 2, f"{args}\n{result.stderr[-2000:]}"
            assert result.stderr.startswith("cogview_pl: ") and result.stderr.count("\n") == 1
            for word in words:
                assert word in result.stderr, (word, result.stderr)


@pytest.fixture(scope="session")
def cli() -> Iterator[CommandLine]:
    command_line = CommandLine()
    yield command_line
    command_line.close()


@dataclass(frozen=True)
class Chain:
    """A finished chain, for reading only; `home` is the folder in which it was called."""

    home: Path
    stdout: str
    command: tuple[str, ...]
    configurations: dict[Path, str]
    """`config.yaml` of every run folder of the chain."""

    def run_folder(self, task: str) -> Path:
        """The newest finished run of a task."""
        return (self.home / "outputs" / task / "latest").resolve()


def configurations(home: Path) -> dict[Path, str]:
    """`config.yaml` of every run folder below `outputs`."""
    runs = (path for path in home.glob("outputs/*/*") if not path.is_symlink())
    return {path: (path / "config.yaml").read_text(encoding="utf-8") for path in runs}


@pytest.fixture(scope="session")
def chain(cli: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The quickstart with a few steps per stage, in one process."""
    home = tmp_path_factory.mktemp("chain")
    ended = cli.succeed(CHAIN, home)
    return Chain(home, ended.stdout, CHAIN, configurations(home))


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Overrides that make any task small enough for a test."""
    return TINY
