"""Real workers, trainers and savers: the saver is killed, stopped, and lives on heartbeats."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash import big_trainer, mini
from crash.mini import Place, checkpoints, final
from workers import Workers, until

from sweeper.trainer.saver import SaverLost

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TRAINER = {"_target_": "big_trainer.train"}
CHECKPOINT = {"every_n_steps": 2, "keep_last": 2}


@pytest.fixture
def machine(fast_dir: Path, where: Path) -> Iterator[Workers]:
    lease = {"heartbeat_s": 0.3, "ttl_s": 6.0}
    made = Workers(mini.new_place(where, trainer=TRAINER, checkpoint=CHECKPOINT, lease=lease))
    yield made
    made.end()


@pytest.fixture(scope="module")
def expected(fast_dir: Path) -> mini.Final:
    """What an undisturbed training saves at its end."""
    machine = Workers(mini.new_place(fast_dir / "big", trainer=TRAINER, checkpoint=CHECKPOINT))
    (machine.place.data_dir / "go").touch()
    machine.finish()
    end = final(machine.place)
    assert end.problems == []
    assert end.step == big_trainer.STEPS
    return end


def saver_of(machine: Workers) -> int:
    """The pid of the saver, once its trainer waits and two checkpoints are committed."""

    def look() -> int | None:
        steps = checkpoints.steps_on_disk(machine.place.root())
        pids = [pid for pid in machine.alive() if b"sweeper.trainer.saver" in command_of(pid)]
        return pids[0] if len(steps) == 2 and pids and has_waited(machine.place) else None

    return int(until(look, "a saver had committed"))


def has_waited(place: Place) -> bool:
    rows = (place.run_dir() / "metrics.jsonl").read_bytes().count(b"\n")
    return rows == big_trainer.WAITS_IN - 1


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def outcomes(place: Place) -> list[str]:
    return [row["outcome"] for row in place.rows("SELECT outcome FROM sweeper_attempt ORDER BY attempt")]


def test_a_killed_saver_costs_one_lost_attempt(machine: Workers, expected: mini.Final) -> None:
    worker = machine.worker()
    os.kill(saver_of(machine), signal.SIGKILL)
    (machine.place.data_dir / "go").touch()
    assert worker.wait(120) == 0, machine.place.printed()
    assert outcomes(machine.place) == ["lost", "completed"]
    reason = machine.place.rows("SELECT reason FROM sweeper_attempt ORDER BY attempt")[0]["reason"]
    assert SaverLost.__name__ in reason
    assert "SIGKILL" in reason
    assert expected.differs(final(machine.place)) is None


def test_a_saver_goes_on_past_its_first_deadline(machine: Workers, expected: mini.Final) -> None:
    """The worker has stopped nothing; its heartbeats reach the saver, too."""
    worker = machine.worker()
    saver_of(machine)
    started = lease_end(machine.place)
    until(lambda: lease_end(machine.place) > started + 6, "the lease was renewed past its first end")
    (machine.place.data_dir / "go").touch()
    assert worker.wait(120) == 0, machine.place.printed()
    assert outcomes(machine.place) == ["completed"]
    assert expected.differs(final(machine.place)) is None


def lease_end(place: Place) -> float:
    return float(place.rows("SELECT lease_until FROM sweeper_run")[0]["lease_until"] or 0)


def test_all_killed_at_once(machine: Workers, expected: mini.Final) -> None:
    machine.worker()
    saver_of(machine)
    (machine.place.data_dir / "go").touch()
    for pid in machine.alive():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    machine.all_gone()
    machine.finish()
    assert expected.differs(final(machine.place)) is None


def test_a_stopped_saver_stops_nobody_else(machine: Workers, expected: mini.Final) -> None:
    """The run's lease goes on being renewed, and the worker can be asked to stop."""
    worker = machine.worker()
    pid = saver_of(machine)
    os.kill(pid, signal.SIGSTOP)
    before = lease_end(machine.place)
    until(lambda: lease_end(machine.place) > before + 1, "the lease was renewed")
    os.kill(pid, signal.SIGCONT)
    (machine.place.data_dir / "go").touch()
    assert worker.wait(120) == 0
    assert outcomes(machine.place) == ["completed"]
    assert expected.differs(final(machine.place)) is None
