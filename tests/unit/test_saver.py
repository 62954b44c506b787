"""The saver process itself: what it hears, what it says, and what ends it."""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sweeper import checkpoints, clock, processes
from sweeper.channel import Channel
from sweeper.errors import Fenced
from sweeper.records import Lease
from sweeper.supervisor import Attempt, LeaseTimes, Supervisor
from sweeper.trainer.commits import Plan
from sweeper.trainer.saver import NICENESS, Done, Saver, SaverLost, map_shared

RUN = "beside.r.00000"
WEIGHTS = bytes(range(256)) * 40  # ends inside a page


class Trainer:
    """A trainer with a saver: memory with two files, a metrics log, and the worker's end of the channel."""

    def __init__(self, run_dir: Path, *, deadline_s: float | None = None, has_worker: bool = True) -> None:
        self.root = run_dir / "checkpoints"
        self.root.mkdir()
        self.memory_fd = os.memfd_create("test")
        os.ftruncate(self.memory_fd, 5 * mmap.PAGESIZE)
        self.memory = map_shared(self.memory_fd, 5 * mmap.PAGESIZE)
        self.memory[: len(WEIGHTS)] = WEIGHTS
        self.memory[4 * mmap.PAGESIZE : 4 * mmap.PAGESIZE + 2] = b"{}"
        self.files = {"model.pth": (0, len(WEIGHTS)), "state.json": (4 * mmap.PAGESIZE, 2)}
        self.metrics_fd = os.open(run_dir / "metrics.jsonl", os.O_RDWR | os.O_CREAT)
        ours, theirs = socket.socketpair()
        self.worker = Channel(ours)
        fd = theirs.fileno() if has_worker else -1
        deadline_s = clock.boot_s() + 60 if deadline_s is None else deadline_s
        self.saver = Saver(self.memory_fd, channel_fd=fd, deadline_s=deadline_s, known_good={})
        theirs.close()
        self.pid: int = self.saver._process.pid  # type: ignore[attr-defined]

    def plan(self, step: int, **more: Any) -> Plan:
        keep = {"last": 3, "best": 0, "every": 0, "direction": "minimize"}
        return Plan(
            str(self.root), RUN, step, 1, [[1, 0]], None, "config", [[1, 0]], **{"keep": keep, **more}
        )

    def save(self, step: int, **more: Any) -> Done:
        """Have it saved, being the worker meanwhile."""
        size = len(self.memory)
        self.saver.save(self.plan(step, **more), self.files, size_bytes=size, metrics_fd=self.metrics_fd)
        return self.answer()

    def answer(self) -> Done:
        while True:
            if done := self.saver.poll(wait_s=0.002):
                return done
            for message in [] if self.worker.is_closed else self.worker.receive():
                if message["kind"] in ("lease", "committed"):
                    self.worker.send("answer")

    def steps(self) -> list[int]:
        return [step for step, _ in checkpoints.steps_on_disk(self.root)]

    def close(self) -> None:
        self.saver.close()
        self.worker.close()
        os.close(self.memory_fd)
        os.close(self.metrics_fd)


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    made = Trainer(tmp_path)
    yield made
    made.close()


def test_what_lies_in_memory_is_committed(trainer: Trainer) -> None:
    for step in (1, 2, 3, 4):
        assert trainer.save(step).error is None
    _, contents = checkpoints.validate(trainer.root / checkpoints.step_name(4), run_id=RUN, keep=True)
    assert contents["model.pth"].data == WEIGHTS
    assert trainer.steps() == [4, 3, 2], "it prunes, too"
    maps = Path(f"/proc/{trainer.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "numpy" not in maps
    assert os.getpriority(os.PRIO_PROCESS, trainer.pid) == min(
        19, os.getpriority(os.PRIO_PROCESS, 0) + NICENESS
    )


def test_it_makes_the_pages_of_the_memory(trainer: Trainer) -> None:
    os.ftruncate(trainer.memory_fd, 0)
    trainer.saver.allocate(1 << 20)
    done = trainer.answer()
    assert (done.kind, done.error) == ("allocate", None)
    assert os.fstat(trainer.memory_fd).st_blocks * 512 >= 1 << 20


def test_without_a_worker_it_commits_as_well(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, has_worker=False)
    assert trainer.save(1).error is None
    assert trainer.steps() == [1]
    trainer.close()


def test_past_its_deadline_it_commits_nothing_and_deletes_nothing(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, deadline_s=clock.boot_s() - 1)
    done = trainer.save(1)
    assert isinstance(done.error, Fenced)
    assert trainer.steps() == []
    assert len(list(trainer.root.glob(".tmp-1-*"))) == 1
    trainer.close()


def test_the_workers_heartbeats_reach_it(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, deadline_s=clock.boot_s() - 1)
    trainer.worker.send("deadline", at=clock.boot_s() + 60)
    assert trainer.save(1).error is None
    assert trainer.steps() == [1]
    trainer.close()


def test_what_the_worker_says_last_counts(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.worker.send("deadline", at=clock.boot_s() - 1)
    assert isinstance(trainer.save(1).error, Fenced)
    trainer.close()


def test_a_worker_that_is_gone_ends_it(trainer: Trainer) -> None:
    trainer.save(1)
    trainer.worker.close()
    with pytest.raises(SaverLost):
        trainer.save(2)
    assert trainer.steps() == [1]


def test_a_killed_saver_is_named_so(trainer: Trainer) -> None:
    os.kill(trainer.pid, signal.SIGSTOP)
    trainer.saver.save(
        trainer.plan(1), trainer.files, size_bytes=len(trainer.memory), metrics_fd=trainer.metrics_fd
    )
    assert trainer.saver.poll() is None
    os.kill(trainer.pid, signal.SIGKILL)
    for _ in range(2):  # whoever swallows it the first time hears of it again
        with pytest.raises(SaverLost, match="SIGKILL"):
            trainer.saver.poll(wait_s=None)
    with pytest.raises(SaverLost):
        trainer.saver.save(trainer.plan(2), trainer.files, size_bytes=4096, metrics_fd=trainer.metrics_fd)


def test_signals_that_reach_all_processes_of_a_job_do_not_end_it(tmp_path: Path) -> None:
    """From its very first moment on: a save in flight must come to its end."""
    trainer = Trainer(tmp_path)
    for step in (1, 2):
        for number in processes.NOT_FOR_CHILDREN:
            os.kill(trainer.pid, number)
        assert trainer.save(step).error is None
    trainer.close()


def test_what_the_disk_refuses_it_names_with_its_path(trainer: Trainer) -> None:
    trainer.root.rmdir()
    error = trainer.save(1).error
    assert isinstance(error, FileNotFoundError)
    assert str(trainer.root) in str(error.filename)


def test_a_bug_in_it_says_what_it_is(trainer: Trainer) -> None:
    done = trainer.save(1, keep={"surplus": 1})
    assert isinstance(done.error, RuntimeError)
    assert "surplus" in str(done.error)
    assert trainer.save(2).error is None, "and it goes on"


def test_it_dies_with_its_trainer(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        trainer = Trainer(tmp_path)
        trainer.save(1)  # it listens
        os.write(writing, f"{trainer.pid}\n".encode())
        signal.pause()
    saver = os.pidfd_open(int(os.read(reading, 20)))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert select.select([saver], [], [], 30)[0]
    for fd in (saver, reading, writing):
        os.close(fd)


# --- a saver that does not listen ----------------------------------------------------------------


def test_no_heartbeat_waits_for_a_saver_that_is_stopped() -> None:
    ours, theirs = socket.socketpair()
    trainer_ours, trainer_theirs = socket.socketpair()
    attempt = Attempt(Channel(trainer_ours), Channel(ours), None, Path(), has_saver=True)  # type: ignore[arg-type]
    store = SimpleNamespace(renew=lambda *_, **__: None)
    supervisor = Supervisor(
        store, search=None, times=LeaseTimes(), server=None, log=print, stop_reason=lambda: None  # type: ignore[arg-type]
    )  # fmt: skip
    trainer = Channel(trainer_theirs)
    signal.alarm(20)  # it would wait for ever
    for _ in range(3000):
        supervisor._beat(Lease(RUN, "token", 1), attempt, 0.0)
        trainer.receive()
    signal.alarm(0)
    saver = Channel(theirs)
    heard = saver.receive()
    assert 10 < len(heard) < 3000
    assert {message["kind"] for message in heard} == {"deadline"}, "whole lines"
    supervisor._beat(Lease(RUN, "token", 1), attempt, 0.0)
    assert len(saver.receive()) == 1, "and it hears of the next one again"
    for channel in (attempt.channel, attempt.saver, trainer, saver):
        channel.close()


def test_savers_leave_nobody_behind(tmp_path: Path) -> None:
    before = set(processes.children())
    Trainer(tmp_path).close()
    assert set(processes.children()) == before
