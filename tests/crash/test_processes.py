"""Real processes: workers, launchers and trainers that are killed, stopped, woken and told to go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from crash import mini
from crash.mini import FIRST_RUN, Place, checkpoints

from sweeper import processes, rundir

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

LIMIT_S = 180.0
TAG = "SWEEPER_CRASH_TEST"
STEPS = 24
SLOW_FROM = 5


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait until something is so, and return it."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"in {LIMIT_S:.0f} s it did not happen that {what}")


@dataclass(slots=True)
class Machine:
    """Starts commands on a place, and ends all they started when the test is over."""

    place: Place
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def tag(self) -> str:
        return f"{TAG}={self.place.data_dir}"

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        name, value = self.tag.split("=", 1)
        environment = {
            **os.environ,
            name: value,
            "PYTHONPATH": str(Path(__file__).parent),
            "SWEEPER_THREADS": "1",
        }
        with open(self.place.log, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "sweeper", *arguments],
                env={**environment, "SWEEPER_DATA_DIR": str(self.place.data_dir)},
                cwd=self.place.data_dir, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def worker(self, name: str = "a") -> subprocess.Popen[bytes]:
        return self.start("worker", mini.SWEEP, "--name", name)

    def alive(self) -> list[int]:
        """Processes of this test that run or are stopped; stopped ones and orphans included."""
        found = []
        for entry in os.listdir("/proc"):
            try:
                if entry.isdigit() and self.tag.encode() in Path(f"/proc/{entry}/environ").read_bytes().split(
                    b"\0"
                ):
                    found.append(int(entry))
            except OSError:
                continue
        return [pid for pid in found if processes.start_ticks(pid) is not None]

    def end(self) -> None:
        while alive := self.alive():
            for pid in alive:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            for process in self.started:
                process.poll()
        for process in self.started:
            process.wait(10)

    # --- what is seen from outside -------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        return self.place.rows("SELECT * FROM sweeper_run ORDER BY number DESC LIMIT 1")[0]

    def attempts(self) -> list[dict[str, Any]]:
        return self.place.rows("SELECT * FROM sweeper_attempt ORDER BY run_id, attempt")

    def steps_done(self) -> int:
        try:
            return (self.place.run_dir() / rundir.METRICS_FILE).read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def trainer(self) -> int:
        """The pid of the trainer, once it has become slow."""

        def look() -> int | None:
            rows = self.place.rows("SELECT processes FROM sweeper_run WHERE state='running'")
            if self.steps_done() < SLOW_FROM or not rows or not rows[0]["processes"]:
                return None
            return int(json.loads(rows[0]["processes"])[0]["pid"])

        return int(until(look, "a trainer reached its slow part"))

    def hide_owner(self) -> None:
        """Let the owner look as if it lived in another container of this machine."""
        import sqlite3

        here = processes.pid_namespace()
        with sqlite3.connect(self.place.data_dir / "sweeper.db") as connection:
            connection.execute(
                "UPDATE sweeper_run SET owner=replace(owner, ?, 'pid:[1]'), processes=replace(processes, ?, 'pid:[1]')",
                (here, here),
            )
        connection.close()


def bytes_at_the_end(place: Place) -> dict[str, bytes]:
    """What may not depend on any disturbance, and that nothing is left which should not be."""
    end = mini.final(place)
    assert end.problems == []
    assert end.state == "completed"
    return {**end.files, "metrics": end.metrics, "value": repr(end.value).encode()}


def new_place(data_dir: Path, *, act: str = "slow", **changes: dict[str, Any]) -> Place:
    return mini.new_place(
        data_dir,
        trainer={"_target_": "crash_trainer.train", "act": act, "at": SLOW_FROM},
        lease={"heartbeat_s": 0.3, "ttl_s": 1.0, "grace_s": 20.0, **changes.pop("lease", {})},
        **changes,
    )


@pytest.fixture
def machine(fast_dir: Path, where: Path) -> Iterator[Machine]:
    made = Machine(new_place(where))
    yield made
    made.end()


@pytest.fixture(scope="module")
def expected(fast_dir: Path) -> dict[str, bytes]:
    """The end of a training that nothing disturbs."""
    made = Machine(new_place(fast_dir / "processes-undisturbed"))
    (made.place.data_dir / "go").touch()
    try:
        assert made.worker().wait(LIMIT_S) == 0, made.place.printed()
        assert made.alive() == []
    finally:
        made.end()
    assert mini.final(made.place).metrics.count(b"\n") == STEPS
    return bytes_at_the_end(made.place)


def finish(machine: Machine, name: str = "b") -> None:
    """Let a new worker finish the sweep."""
    assert machine.worker(name).wait(LIMIT_S) == 0, machine.place.printed()


# --- told to go by somebody who does not ask the worker ------------------------------------------


def test_signals_to_all_but_the_worker_are_no_end(machine: Machine, expected: dict[str, bytes]) -> None:
    """SLURM sends its signals to every process of a step; the worker alone acts on them."""
    worker = machine.worker()
    machine.trainer()
    for number in processes.NOT_FOR_CHILDREN:
        for pid in set(machine.alive()) - {worker.pid}:
            os.kill(pid, number)
    (machine.place.data_dir / "go").touch()
    assert worker.wait(LIMIT_S) == 0, machine.place.printed()
    assert [attempt["outcome"] for attempt in machine.attempts()] == ["completed"]
    assert bytes_at_the_end(machine.place) == expected


# --- killed ------------------------------------------------------------------------------------


def test_a_killed_worker_takes_its_trainer_with_it(machine: Machine, expected: dict[str, bytes]) -> None:
    worker = machine.worker()
    machine.trainer()
    assert len(machine.alive()) >= 3  # worker, warm server, trainer
    worker.kill()
    worker.wait(LIMIT_S)
    until(lambda: not machine.alive(), "the trainer and the server ended")
    done = machine.steps_done()
    assert done < STEPS
    finish(machine)
    assert bytes_at_the_end(machine.place) == expected
    assert [(row["outcome"], row["lease_epoch"]) for row in machine.attempts()] == [
        ("lost", 1),
        ("completed", 2),
    ]
    assert machine.alive() == []


def test_a_killed_warm_server_takes_its_trainer_with_it(machine: Machine, expected: dict[str, bytes]) -> None:
    worker = machine.worker()
    trainer = machine.trainer()
    os.kill(parent(trainer), signal.SIGKILL)
    (machine.place.data_dir / "go").touch()
    assert worker.wait(LIMIT_S) == 0, machine.place.printed()
    first, second = machine.attempts()
    assert (first["outcome"], second["outcome"]) == ("lost", "completed")
    assert "the warm server died" in first["reason"]
    assert bytes_at_the_end(machine.place) == expected
    assert machine.alive() == []


def test_a_killed_template_costs_nothing(machine: Machine, expected: dict[str, bytes]) -> None:
    """The servers forked from it go on; a worker that is started again has one of its own."""
    launcher = machine.start("resume", mini.SWEEP)
    trainer = machine.trainer()
    (template,) = [pid for pid in machine.alive() if kind_of_server(pid) == b"template" and parent(pid) == launcher.pid]  # fmt: skip
    assert parent(parent(trainer)) == template, "the trainer's server was forked from it"
    os.kill(template, signal.SIGKILL)
    os.kill(json.loads(machine.run()["owner"])["pid"], signal.SIGKILL)
    assert launcher.wait(LIMIT_S) == 0, machine.place.printed()
    assert [row["outcome"] for row in machine.attempts()] == ["lost", "completed"]
    assert bytes_at_the_end(machine.place) == expected
    assert machine.alive() == []


def test_programs_that_a_trainer_started_end_with_it(fast_dir: Path, where: Path) -> None:
    """Also those in a session of their own, and whoever ends the trainer."""
    made = Machine(new_place(where, act="daemon"))
    try:
        worker = made.worker()
        made.trainer()
        daemon = int(until(lambda: (where / "daemon").exists() and (where / "daemon").read_text(), "it ran"))
        worker.kill()
        worker.wait(LIMIT_S)
        until(lambda: processes.start_ticks(daemon) is None, "the daemon ended")
        until(lambda: not made.alive(), "everything ended")
    finally:
        made.end()


def kind_of_server(pid: int) -> bytes:
    argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return argv[3] if b"sweeper.trainer.server" in argv else b""


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# --- stopped past the lease, overtaken, woken --------------------------------------------------


@pytest.mark.parametrize("with_trainer", [False, True], ids=["worker", "worker-and-trainer"])
def test_stopped_past_the_lease_overtaken_and_woken(
    machine: Machine, expected: dict[str, bytes], with_trainer: bool
) -> None:
    """The second worker cannot see the first: only the lease is between them."""
    first = machine.worker("first")
    trainer = machine.trainer()
    stopped = [first.pid, *([trainer] if with_trainer else [])]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        machine.hide_owner()
        finish(machine, "second")
        assert "its heartbeat stood still" in machine.place.printed()
        assert bytes_at_the_end(machine.place) == expected
        if with_trainer:
            assert processes.start_ticks(trainer) is not None, "nobody could end it"
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    assert first.wait(LIMIT_S) == 0, machine.place.printed()
    until(lambda: not machine.alive(), "the woken processes ended")
    finish(machine, "third")
    assert bytes_at_the_end(machine.place) == expected
    assert [(row["outcome"], row["lease_epoch"]) for row in machine.attempts()] == [
        ("lost", 1),
        ("completed", 2),
    ]


def test_the_trainer_of_a_stopped_worker_fences_itself(machine: Machine) -> None:
    """It has no more heartbeats: at a step boundary past its deadline it stops, before it writes."""
    first = machine.worker("first")
    trainer = machine.trainer()
    os.kill(first.pid, signal.SIGSTOP)
    try:
        until(lambda: state_of(trainer) in "ZX", "the trainer ended by itself")
        log = rundir.attempt_log(machine.place.run_dir(), 1).read_text()
        assert "the lease of this run may be over" in log
        assert machine.steps_done() < STEPS
    finally:
        os.kill(first.pid, signal.SIGCONT)


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


# --- told the truth ----------------------------------------------------------------------------

ACTS = ["kill", "segv", "memory", "raise", "exit", "hang"]


def test_outcomes_are_told_truthfully(fast_dir: Path, where: Path) -> None:
    """One trial for each way to end badly; a lost one goes on, the others have no budget here."""
    choices = mini.search.distribution_of("trainer.act", f"choice({', '.join(ACTS)})")
    place = new_place(
        where,
        space={"trainer.act": choices},
        sampler={"_target_": "optuna.samplers.GridSampler"},
        retry={"max_crashed": 0},
        checkpoint={"every_n_steps": 100},  # progress would pay for the failure
        lease={"progress_s": 4.0},
    )
    made = Machine(place)
    try:
        assert made.worker().wait(LIMIT_S) == 0, place.printed()
        assert made.alive() == []
    finally:
        made.end()
    rows = place.rows(
        "SELECT r.params, r.state, a.* FROM sweeper_run r JOIN sweeper_attempt a USING (run_id) ORDER BY a.attempt"
    )
    ends: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        ends.setdefault(json.loads(row["params"])["trainer.act"], []).append(row)
    told = {act: [row["outcome"] for row in ends[act]] for act in ACTS}
    assert told == {
        "kill": ["lost", "completed"],
        "segv": ["crashed"],
        "memory": ["oom"],
        "raise": ["crashed"],
        "exit": ["crashed"],
        "hang": ["lost", "completed"],
    }
    states = {act: ends[act][0]["state"] for act in ACTS}
    assert [act for act in ACTS if states[act] == "failed"] == ["segv", "memory", "raise", "exit"]
    assert "SIGKILL" in ends["kill"][0]["reason"]
    assert "SIGSEGV" in ends["segv"][0]["reason"]
    assert "code 3" in ends["exit"][0]["reason"]
    assert "no progress for 4 s" in ends["hang"][0]["reason"]
    assert "ValueError: the loss is on fire" in ends["raise"][0]["reason"]
    assert "Traceback" in ends["raise"][0]["detail"]
    assert "crash_trainer.py" in ends["raise"][0]["detail"]
    assert "MemoryError" in ends["memory"][0]["detail"]
    trials = place.rows("SELECT state FROM trials ORDER BY number")
    assert sorted(row["state"] for row in trials) == ["COMPLETE"] * 2 + ["FAIL"] * 4
    assert not list(place.data_dir.rglob("*.incomplete"))


# --- told to go --------------------------------------------------------------------------------


def test_sigterm_releases_with_a_checkpoint_of_that_very_step(
    machine: Machine, expected: dict[str, bytes]
) -> None:
    worker = machine.worker()
    machine.trainer()
    worker.terminate()
    assert worker.wait(LIMIT_S) == 75, machine.place.printed()
    until(lambda: not machine.alive(), "everything ended")
    run = machine.run()
    (attempt,) = machine.attempts()
    assert (run["state"], attempt["outcome"]) == ("interrupted", "preempted")
    assert "SIGTERM" in attempt["reason"]
    assert run["owner_token"] is None
    assert (
        run["checkpoint_step"]
        == machine.steps_done()
        == checkpoints.steps_on_disk(machine.place.root())[0][0]
    )
    assert rundir.marker_path(machine.place.run_dir()).exists()
    finish(machine)
    assert f"going on from step {run['checkpoint_step']}" in machine.place.printed()
    assert "taken over" not in machine.place.printed(), "a released run is claimed, no lease has to end"
    assert bytes_at_the_end(machine.place) == expected


def test_a_killed_launcher_releases_its_workers(machine: Machine, expected: dict[str, bytes]) -> None:
    launcher = machine.start("resume", mini.SWEEP)
    machine.trainer()
    launcher.kill()
    launcher.wait(LIMIT_S)
    until(lambda: not machine.alive(), "its workers and their trainers ended")
    (attempt,) = machine.attempts()
    assert (machine.run()["state"], attempt["outcome"]) == ("interrupted", "preempted")
    assert "launcher is gone" in attempt["reason"]
    finish(machine)
    assert bytes_at_the_end(machine.place) == expected


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 75)]
)
def test_a_launcher_that_is_told_to_stop(
    machine: Machine, expected: dict[str, bytes], number: int, code: int
) -> None:
    launcher = machine.start("resume", mini.SWEEP)
    machine.trainer()
    os.killpg(launcher.pid, number)  # as a terminal does: everybody in the foreground gets it
    assert launcher.wait(LIMIT_S) == code, machine.place.printed()
    assert machine.alive() == []
    assert "go on with" in machine.place.printed()
    assert machine.run()["state"] == "interrupted"
    assert [row["outcome"] for row in machine.attempts()] == ["preempted"]
    if number == signal.SIGINT:
        finish(machine)
        assert bytes_at_the_end(machine.place) == expected


def test_a_killed_worker_is_started_again_by_its_launcher(
    machine: Machine, expected: dict[str, bytes]
) -> None:
    launcher = machine.start("resume", mini.SWEEP)
    machine.trainer()
    owner = json.loads(machine.run()["owner"])["pid"]
    os.kill(owner, signal.SIGKILL)
    assert launcher.wait(LIMIT_S) == 0, machine.place.printed()
    assert machine.alive() == []
    assert [row["outcome"] for row in machine.attempts()] == ["lost", "completed"]
    assert bytes_at_the_end(machine.place) == expected


def test_no_two_workers_train_one_run(machine: Machine, expected: dict[str, bytes]) -> None:
    """One trial, three workers: the others wait, and end when it is done."""
    workers = [machine.worker(name) for name in "abc"]
    machine.trainer()
    (machine.place.data_dir / "go").touch()
    assert [worker.wait(LIMIT_S) for worker in workers] == [0, 0, 0], machine.place.printed()
    assert [row["outcome"] for row in machine.attempts()] == ["completed"]
    assert machine.run()["run_id"] == FIRST_RUN
    assert bytes_at_the_end(machine.place) == expected
