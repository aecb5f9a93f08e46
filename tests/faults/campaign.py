"""The fault campaign: runs are killed, stopped, starved of disk and fed damaged files, then go on, and are compared.

    python -m tests.faults.campaign --injections 240 --seed 0 [--json FILE] [--keep FOLDER]

After each fault the run goes on (`resume=auto`) and must end with the same bytes as one that was left alone, or the
program must refuse what was damaged in one line that says why. Reported are the number of injections of each kind and
how they ended. Needs Linux; with the right to mount, full disks are real ones (a small tmpfs).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from omegaconf import DictConfig
from PIL import Image

from tests.faults import fork_server, injections
from tests.faults.fork_server import Ended, compose
from tests.faults.outcomes import (
    EVERY,
    Wrong,
    declared,
    left_by,
    require_nothing_lost,
    require_one_line,
    require_same,
)

SAME = "same result"
REFUSED = "refused with a reason"
LISTED = "skipped, listed and counted"
EARLY = "had ended before"
FAILED = "FAILED"

QUIET = ("seed=5", "threads=1", "logger=none")
STEPS = (
    "trainer.max_steps=8",
    "trainer.val_check_interval=4",
    f"callbacks.checkpoint.every_n_train_steps={EVERY}",
    "trainer.log_every_n_steps=2",
    "data.val_size=4",
    "data.batch_size=4",
    "~callbacks.progress",
    "~callbacks.learning_rate",
)
FIRST_STAGE = (
    "image_tokenizer.width=8",
    "image_tokenizer.code_dim=8",
    "image_tokenizer.num_codes=32",
    "image_tokenizer.residual_blocks=0",
    "image_tokenizer.continuous_steps=2",
    "image_tokenizer.quantizer.kmeans_iters=1",
)
SECOND_STAGE = ("model.num_layers=1", "model.width=32", "model.num_heads=2", "model.dropout=0.1", "~callbacks.samples")


@dataclass(frozen=True)
class Subject:
    """A run that faults are put into."""

    name: str
    config: DictConfig
    reference: dict[str, Any]
    """What it leaves when it is left alone."""
    seconds: float
    calls: int
    """fsync and replace calls that it makes."""
    largest: int
    """Size of the largest file that it writes."""


# --- the campaign ----------------------------------------------------------------------------------------------------


class Campaign:
    """Subjects, and the faults that are put into them.

    Args:
        home: folder for everything.
        seed: decides which faults, and when.
    """

    def __init__(self, home: Path, seed: int) -> None:
        self.home = home
        self.random = Random(seed)
        self.log = home / "log.txt"
        self.run = home / "run"
        self.mounted = False
        self.subjects = [self._subject(name) for name in ("vqvae", "tokenize", "pretrain", "generate")]
        self.shards = self._shards()
        self.from_shards = self._subject("shards")

    # --- set-up

    def _config(self, name: str) -> DictConfig:
        store, tokenizer = f"data.store={self.home}/tokenize", f"image_tokenizer.path={self.home}/vqvae"
        common = (*QUIET, f"outputs={self.home}/outputs")
        tokenising = ("data.batch_size=2", "text.num_pieces=320", tokenizer, *common)
        return {
            "vqvae": lambda: compose("task=vqvae", *common, *STEPS, *FIRST_STAGE, "data.train_size=18"),
            "tokenize": lambda: compose("task=tokenize", *tokenising, "data.train_size=20", "data.val_size=4"),
            "pretrain": lambda: compose("task=pretrain", *common, *STEPS, *SECOND_STAGE, store),
            "generate": lambda: compose(
                "task=generate", *common, f"init_from={self.home}/pretrain", "num_prompts=6", "sampler.batch_size=2",
                "data.val_size=6", "num_images=2",
            ),
            "shards": lambda: compose(
                "task=tokenize", *tokenising, "data=webdataset", f"data.urls={self.home}/tars/*.tar",
                "data.caption_field=txt", "data.val_fraction=0.2", "data.max_skipped_share=0.5",
            ),
        }[name]()  # fmt: skip

    def _subject(self, name: str) -> Subject:
        """Run a subject twice without faults: its reference, and that it is deterministic."""
        config, counted = self._config(name), self.home / "calls.txt"
        ended = fork_server.run(config, self.log, injections.count_calls(counted), run_dir=str(self.home / name))
        if ended.code:
            raise Wrong(f"{name} does not run: {ended.output[-3000:]}")
        reference = left_by(self.home / name)
        again = fork_server.run(config, self.log, run_dir=str(self.run))
        require_same(left_by(self.run), reference)
        shutil.rmtree(self.run)
        largest = max(file.stat().st_size for file in (self.home / name).rglob("*") if file.is_file())
        return Subject(name, config, reference, again.seconds, int(counted.read_text()), largest)

    def _shards(self) -> list[Path]:
        """Twelve pictures in two shards."""
        folder = self.home / "tars"
        folder.mkdir()
        files = []
        for shard in range(2):
            files.append(folder / f"{shard}.tar")
            with tarfile.open(files[-1], "w") as tar:
                for number in range(6 * shard, 6 * shard + 6):
                    stream = io.BytesIO()
                    Image.effect_noise((24, 24), 20 * number + 1).convert("RGB").save(stream, "PNG")
                    for extension, data in (("png", stream.getvalue()), ("txt", f"第{number}张红色的图".encode())):
                        info = tarfile.TarInfo(f"{number:02d}.{extension}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
        return files

    # --- faults

    def kinds(self) -> dict[str, Callable[[], str]]:
        """Name of a fault → what puts it in once and says how that ended."""
        return {
            "kill -9 at a random moment": lambda: self._signal(signal.SIGKILL),
            "SIGTERM at a random moment": lambda: self._signal(signal.SIGTERM),
            "Ctrl-C at a random moment": lambda: self._signal(signal.SIGINT),
            "kill -9 at a call that writes": self._die_at_call,
            "kill -9 inside a write": self._die_inside_a_write,
            "kill -9 at a call that writes a checkpoint": lambda: self._die_at_call(training=True),
            "kill -9 inside a write of a checkpoint": lambda: self._die_inside_a_write(training=True),
            "disk full": self._disk_full,
            "largest file exceeded": self._file_too_large,
            "flipped bit in a store": self._flip_store,
            "flipped bit in a shard": self._flip_shard,
            "flipped bit in a checkpoint": self._flip_checkpoint,
        }

    def _pick(self, training: bool = False) -> Subject:
        return self.random.choice([s for s in self.subjects if not training or s.name in ("vqvae", "pretrain")])

    def _signal(self, number: int) -> str:
        subject = self._pick()
        after = self.random.uniform(0.05, 1.05) * subject.seconds
        ended = fork_server.run_and_signal(subject.config, self.log, after, number, run_dir=str(self.run))
        if ended.code == 0:
            require_same(left_by(self.run), subject.reference)
            return EARLY
        if ended.code not in (-number, 128 + number if number != signal.SIGKILL else -number):
            raise Wrong(f"{subject.name}, {number} after {after:.2f} s: code {ended.code}: {ended.output[-1500:]}")
        if "Traceback" in ended.output:
            raise Wrong(ended.output[-1500:])
        return self._go_on(subject)

    def _die_at_call(self, training: bool = False) -> str:
        subject = self._pick(training)
        number, before = self.random.randint(1, subject.calls), self.random.random() < 0.5
        ended = fork_server.run(subject.config, self.log, injections.die_at_call(number, before), run_dir=str(self.run))
        if ended.code != -signal.SIGKILL:
            raise Wrong(f"{subject.name} did not make call {number}: code {ended.code} {ended.output[-1500:]}")
        return self._go_on(subject)

    def _die_inside_a_write(self, training: bool = False) -> str:
        subject = self._pick(training)
        size = self.random.randint(1, subject.largest - 1)
        ended = fork_server.run(subject.config, self.log, injections.die_inside_a_write(size), run_dir=str(self.run))
        if ended.code != -signal.SIGXFSZ:
            raise Wrong(f"{subject.name}, {size} bytes: code {ended.code}: {ended.output[-1500:]}")
        return self._go_on(subject)

    def _file_too_large(self) -> str:
        subject = self._pick()
        size = self.random.randint(1, subject.largest - 1)
        ended = fork_server.run(subject.config, self.log, injections.no_space_beyond(size), run_dir=str(self.run))
        self._require_full(ended)
        return self._go_on(subject)

    def _disk_full(self) -> str:
        subject = self._pick()
        total = sum(len(data) for data in subject.reference.values() if isinstance(data, bytes)) + subject.largest
        with small_disk(self.run, round(self.random.uniform(0.02, 0.9) * total)) as full:
            if not full:
                return self._file_too_large()
            self.mounted = True
            ended = fork_server.run(subject.config, self.log, run_dir=str(self.run / "run"))
            if ended.code == 0:
                require_same(left_by(self.run / "run"), subject.reference)
                return EARLY
            self._require_full(ended)
            subprocess.run(["mount", "-o", "remount,size=1g", str(self.run)], check=True)
            return self._go_on(subject, self.run / "run")

    def _require_full(self, ended: Ended) -> None:
        if "no space left on the disk" not in require_one_line(ended):
            raise Wrong(f"does not say that the disk is full: {ended.output[-600:]}")

    def _go_on(self, subject: Subject, run: Path | None = None) -> str:
        """Let a stopped run go on to its end; it must end like one that was not stopped."""
        run = run or self.run
        before = declared(run) if run.exists() else {}
        ended = fork_server.run(subject.config, self.log, run_dir=str(run), resume="auto")
        if ended.code:
            raise Wrong(f"{subject.name} does not go on: code {ended.code}: {ended.output[-2500:]}")
        require_nothing_lost(run, before)
        require_same(left_by(run), subject.reference)
        return SAME

    def _flip_store(self) -> str:
        subject = self.subjects[2]
        damaged = self.home / "damaged"
        shutil.copytree(self.home / "tokenize", damaged)
        try:
            file = self.random.choice(sorted((damaged / "store").iterdir()))
            injections.flip(file, self.random)
            config = {"run_dir": str(self.run), "data.store": str(damaged)}
            return self._same_or_refused(fork_server.run(subject.config, self.log, **config), subject)
        finally:
            shutil.rmtree(damaged)

    def _flip_shard(self) -> str:
        """Captions are left alone: nothing in a tar file vouches for them."""
        subject, file = self.from_shards, self.random.choice(self.shards)
        whole = file.read_bytes()
        with tarfile.open(file) as tar:
            captions = [range(m.offset_data, m.offset_data + m.size) for m in tar if m.name.endswith("txt")]
        try:
            injections.flip(file, self.random, lambda place: not any(place in caption for caption in captions))
            ended = fork_server.run(subject.config, self.log, run_dir=str(self.run))
            if ended.code == 0 and (self.run / "skipped.jsonl").exists():
                listed = len((self.run / "skipped.jsonl").read_text().splitlines())
                if listed != json.loads((self.run / "metrics.json").read_text())["tokenize/skipped"] or listed != 1:
                    raise Wrong(f"{listed} pictures are listed as skipped")
                return LISTED
            return self._same_or_refused(ended, subject)
        finally:
            file.write_bytes(whole)

    def _flip_checkpoint(self) -> str:
        subject = self._pick(training=True)
        shutil.copytree(self.home / subject.name, self.run)
        for name in ("metrics.json", "model/config.yaml"):
            (self.run / name).unlink()
        injections.flip(self.run / "checkpoints" / "last.ckpt", self.random)
        ended = fork_server.run(subject.config, self.log, run_dir=str(self.run), resume="auto")
        return self._same_or_refused(ended, subject)

    def _same_or_refused(self, ended: Ended, subject: Subject) -> str:
        if ended.code == 0:
            require_same(left_by(self.run), subject.reference)
            return SAME
        require_one_line(ended)
        return REFUSED

    def inject(self, kind: str) -> str:
        """Put one fault in; returns how it ended, `FAILED: …` if a promise was broken."""
        shutil.rmtree(self.run, ignore_errors=True)
        try:
            return self.kinds()[kind]()
        except Wrong as error:
            return f"{FAILED}: {error}"
        except Exception:
            return f"{FAILED}: {traceback.format_exc()}"


@contextmanager
def small_disk(folder: Path, size: int) -> Any:
    """A file system of its own with so many bytes (at least 64 KiB); yields False where that is not allowed."""
    folder.mkdir()
    size = max(size, 1 << 16)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        folder.rmdir()
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def campaign(home: Path, number: int, seed: int) -> tuple[dict[str, Counter[str]], list[str], bool]:
    """Put in `number` faults; returns outcomes by kind, what failed, and whether full disks were real ones."""
    session = Campaign(home, seed)
    table: dict[str, Counter[str]] = {kind: Counter() for kind in session.kinds()}
    failures: list[str] = []
    started = time.monotonic()
    for done in range(number):
        kind = list(table)[done % len(table)]
        outcome = session.inject(kind)
        if outcome.startswith(FAILED):
            failures.append(f"#{done} {kind}: {outcome}")
            print(failures[-1], flush=True)
        table[kind][outcome.split(":")[0]] += 1
        if (done + 1) % 20 == 0:
            print(f"{done + 1} of {number}, {time.monotonic() - started:.0f} s", flush=True)
    return table, failures, session.mounted


def markdown(table: dict[str, Counter[str]]) -> str:
    """The outcomes as a table."""
    columns = [SAME, REFUSED, LISTED, EARLY, FAILED]
    lines = ["| fault | " + " | ".join(columns) + " | all |", "|---|" + "---|" * (len(columns) + 1)]
    for kind, outcomes in table.items():
        cells = [str(outcomes[column] or "") for column in columns]
        lines.append(f"| {kind} | " + " | ".join(cells) + f" | {sum(outcomes.values())} |")
    total = sum(table.values(), Counter())
    cells = [str(total[column] or "0") for column in columns]
    lines.append("| **all** | " + " | ".join(cells) + f" | {sum(total.values())} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--injections", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the table there as well")
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as home:
        started = time.monotonic()
        table, failures, mounted = campaign(Path(home), options.injections, options.seed)
        print(markdown(table))
        print(f"{options.injections} injections, seed {options.seed}, {time.monotonic() - started:.0f} s, "
              f"full disks {'mounted' if mounted else 'by a limit on the size of files'}")  # fmt: skip
    if options.json is not None:
        options.json.write_text(json.dumps({"seed": options.seed, "table": table, "failures": failures}, indent=1))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
