"""trainer=command: a program that cannot be imported survives what trainings survive."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crash import mini
from crash.mini import KillAt, Place, finish, kind_of, was_killed
from workers import LIMIT_S, Workers, until

from sweeper import checkpoints, manifests, processes, rundir

PROGRAM = Path(__file__).with_name("program.py")
STEPS, EVERY = 8, 3


def new_place(data_dir: Path, *, argv: list[Any] | None = None, **changes: Any) -> Place:
    trainer = {
        "_target_": "sweeper.command.train",
        "argv": [sys.executable, str(PROGRAM)] if argv is None else argv,
        "args": {"lr": 0.1, "steps": STEPS, "every": EVERY, **changes.pop("args", {})},
        **changes.pop("trainer", {}),
    }
    space = {"trainer.args.lr": mini.search.distribution_of("trainer.args.lr", "interval(0.01, 0.1)")}
    return mini.new_place(data_dir, trainer=trainer, space=space, **changes)


def at_the_end(place: Place) -> dict[str, Any]:
    """Everything that no disturbance may change, and that nothing is wrong or left."""
    end = mini.final(place)
    assert end.problems == []
    (_, newest), *_ = checkpoints.steps_on_disk(place.root())
    files = {path.name: path.read_bytes() for path in newest.iterdir() if path.name != manifests.MANIFEST}
    return {"files": files, "metrics": end.metrics, "value": end.value, "state": end.state, "step": end.step}


@pytest.fixture(scope="module")
def fresh(fast_dir: Path) -> Place:
    return new_place(fast_dir / "command-fresh")


@pytest.fixture(scope="module")
def undisturbed(fast_dir: Path, fresh: Place) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    place = fresh.copy(fast_dir / "command-undisturbed")
    trace = mini.traced(place, fast_dir / "command-undisturbed.trace")
    return trace, at_the_end(place)


Undisturbed = tuple[list[tuple[str, str]], dict[str, Any]]


# --- undisturbed -------------------------------------------------------------------------------


def test_what_a_program_leaves(fast_dir: Path, undisturbed: Undisturbed) -> None:
    place = Place(fast_dir / "command-undisturbed")
    end = undisturbed[1]
    rows = [json.loads(line) for line in end["metrics"].splitlines()]
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1), STEPS]
    assert rows[-1] == {"step": STEPS, "loss": end["value"]}
    assert end["step"] == STEPS - STEPS % EVERY
    state = json.loads(end["files"]["state.json"])
    assert state["global_step"] == end["step"]
    assert state["metadata"]["files"] == {"deep/rng state.json": "file_00000", "model.pth": "model.pth"}
    assert state["args"]["args"]["lr"] != 0.1, "the trial's"
    assert set(end["files"]) == {"state.json", "model.pth", "file_00000"}
    assert "beginning at 0\nit goes on\n" in place.printed()
    assert "SWEEPER" not in place.printed()


def test_undisturbed_trainings_agree(fresh: Place, undisturbed: Undisturbed, where: Path) -> None:
    place = fresh.copy(where)
    assert finish(place) == 0
    assert at_the_end(place) == undisturbed[1]


def test_the_program_of_the_documentation(where: Path) -> None:
    """Killed where it says that a checkpoint is ready, it ends with the value of an undisturbed one."""
    page = PROGRAM.parents[2].joinpath("docs", "command.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    values = []
    for name in ("undisturbed", "disturbed"):
        trainer = {"args": {"steps": 300, "lr": 0.1, "width": 4}}
        place = new_place(
            where.with_name(f"{where.name}-{name}"), argv=[sys.executable, "-c", code], trainer=trainer
        )
        if name == "disturbed":
            trace = mini.traced(place.copy(where.with_name(f"{where.name}-traced")), where)
            at = next(i for i, (operation, path) in enumerate(trace) if path.endswith("step_00000200"))
            assert was_killed(finish(place, probe=KillAt(at)))
        assert finish(place) == 0, place.printed()
        assert mini.final(place).problems == []
        values.append(mini.final(place).value)
    assert "going on from step 100" in place.printed()
    assert values[0] == values[1]


# --- killed ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_each_kind_of_operation(fresh: Place, undisturbed: Undisturbed) -> None:
    """The trainer dies in place of a file operation, and the program with it; the next one goes on."""
    trace, expected = undisturbed
    last = {kind_of(*operation): number for number, operation in enumerate(trace)}
    first = {kind_of(*operation): number for number, operation in reversed(list(enumerate(trace)))}
    cases = sorted({*first.values(), *last.values()})
    assert len(cases) > 30

    def check(case: int, path: Path) -> str | None:
        place = fresh.copy(path)
        if not was_killed(finish(place, probe=KillAt(case))):
            return "it was not killed"
        if finish(place) != 0:
            return place.printed()
        end = at_the_end(place)
        return None if end == expected else f"{end} instead of {expected}"

    assert mini.failures(check, cases) == []


def test_a_damaged_checkpoint_is_passed_over(fresh: Place, undisturbed: Undisturbed, where: Path) -> None:
    trace, expected = undisturbed
    place = fresh.copy(where)
    result = next(i for i, (operation, path) in enumerate(trace) if path.endswith("result.json"))
    assert was_killed(finish(place, probe=KillAt(result)))
    (_, newest), (older, _), *_ = checkpoints.steps_on_disk(place.root())
    mini.damage(newest, "file_00000")
    assert finish(place) == 0, place.printed()
    assert "file_00000 has the wrong digest" in place.printed()
    assert f"going on from step {older}" in place.printed()
    assert at_the_end(place) == expected


# --- what programs say, in a worker's own process ----------------------------------------------

SAYS = """
import json, os, pathlib, sys, time
def say(**words): print("SWEEPER " + json.dumps(words), flush=True)
def save(step):
    pathlib.Path(os.environ["SWEEPER_CHECKPOINT_DIR"], "it").write_text(str(step))
    say(checkpoint=step)
    return sys.stdin.readline().strip()
"""


def says(where: Path, code: str, **changes: Any) -> Place:
    """A place whose program is a few lines, after a worker has worked on it."""
    place = new_place(where, argv=[sys.executable, "-c", SAYS + code], **changes)
    assert finish(place) == 0, place.printed()
    return place


def run_of(place: Place) -> dict[str, Any]:
    return place.rows("SELECT * FROM sweeper_run")[0]


def test_the_last_reported_metric_is_the_value(where: Path) -> None:
    place = says(where, "say(step=1, loss=0.5); say(step=2, loss=0.25); say(step=3, other=7)")
    assert (run_of(place)["state"], run_of(place)["value"]) == ("completed", 0.25)


def test_a_value_takes_its_place(where: Path) -> None:
    place = says(where, "say(value=3); say(step=1, loss=0.5)")
    assert (run_of(place)["state"], run_of(place)["value"]) == ("completed", 3.0)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('done')", "reported neither 'loss' (sweep.metric) nor a value"),
        ("say(value=float('nan'))", "the training returned nan"),
    ],
)
def test_without_a_value_it_has_failed(where: Path, code: str, reason: str) -> None:
    place = says(where, code)
    assert run_of(place)["state"] == "failed"
    assert reason in place.printed()


def test_bad_lines_are_reported_and_nothing_else(where: Path) -> None:
    place = says(
        where,
        """
print("SWEEPER not json")
say(step=2, loss=0.5)
say(step=1, loss=0.25)
for _ in range(20): say(step="two")
sys.stdout.buffer.write(b"SWEEPER " + bytes([255, 10]))
assert save(1) == "no step 2 was reported already"
""",
    )
    assert (run_of(place)["state"], run_of(place)["value"]) == ("completed", 0.5)
    printed = place.printed()
    assert "[CHECKPOINT] a line of the program cannot be used, no JSON" in printed
    assert "steps never go back, and step 2 was reported: SWEEPER" in printed
    assert printed.count("[CHECKPOINT] a line of the program") == 10, "not for ever"
    assert printed.count("[COMMAND] cannot be used") == 24


def test_a_refused_checkpoint_is_answered_and_costs_nothing(where: Path) -> None:
    place = says(
        where,
        """
link = pathlib.Path(os.environ["SWEEPER_CHECKPOINT_DIR"], "link")
say(step=1, loss=1)
assert save(1) == "ok"
link.symlink_to("it")
say(step=2, loss=2)
assert save(2).startswith("no link is neither a file"), 2
link.unlink()
assert save(3) == "ok"
assert save(3) == "ok"
say(step=3, loss=3)
""",
    )
    assert run_of(place)["value"] == 3
    assert [step for step, _ in checkpoints.steps_on_disk(place.root())] == [3, 1]
    assert "checkpoint of step 2 could not be saved: link is neither" in place.printed()


def test_a_disk_that_refuses_a_checkpoint_is_answered(where: Path) -> None:
    place = new_place(where, argv=[sys.executable, "-c", SAYS + "say(step=1, loss=1); print(save(1))"])

    def probe(operation: str, path: Path) -> None:
        if operation == "create" and path.parent.name.startswith(".tmp-"):
            raise OSError(28, os.strerror(28), str(path))

    assert finish(place, probe=probe) == 0, place.printed()
    assert "no [Errno 28] No space left on device" in place.printed()
    assert (run_of(place)["state"], run_of(place)["value"]) == ("completed", 1.0)


def test_one_that_never_reads_its_answers_goes_on(where: Path) -> None:
    place = says(
        where,
        """
pathlib.Path(os.environ["SWEEPER_CHECKPOINT_DIR"], "it").touch()
for _ in range(30_000): say(checkpoint=1)
say(step=1, loss=1)
""",
    )
    assert run_of(place)["state"] == "completed"


def test_what_it_leaves_behind_neither_delays_nor_outlives_it(where: Path) -> None:
    """A child that holds its stdout and prints for ever."""
    place = says(
        where,
        """
import subprocess
say(value=1)  # before: on a pipe that is full, lines of two writers were seen torn
loop = "import os; [os.write(1, b'x' * 1000 + bytes([10])) for _ in iter(int, 1)]"  # whole lines
child = subprocess.Popen([sys.executable, "-c", loop])
pathlib.Path(os.environ["SWEEPER_RUN_DIR"]).parents[3].joinpath("child").write_text(str(child.pid))
time.sleep(0.2)
""",
    )
    assert (run_of(place)["state"], run_of(place)["reason"]) == ("completed", "")
    assert processes.start_ticks(int((where / "child").read_text())) is None


def test_its_environment(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAKEN_AWAY", "1")
    monkeypatch.delenv("SWEEPER_NO_SKIP", raising=False)  # .ci/run's
    place = says(
        where,
        "print('ENV', json.dumps(dict(os.environ))); print('CWD', os.getcwd()); say(value=1)",
        trainer={"env": {"COLOUR": "red", "TAKEN_AWAY": None, "SWEEPER_SEED": 1}, "cwd": "/"},
    )
    printed = place.printed()
    found = json.loads(printed.split("ENV ")[1].splitlines()[0])
    run_dir = place.run_dir()
    assert found["COLOUR"] == "red"
    assert "TAKEN_AWAY" not in found
    assert "SWEEPER_STORAGE" not in found
    directory = Path(found["SWEEPER_CHECKPOINT_DIR"])
    assert directory.parent == run_dir
    assert not directory.exists(), "it goes with the attempt"
    identity = rundir.read_identity(run_dir)
    assert {name: found[name] for name in found if name.startswith("SWEEPER_")} == {
        "SWEEPER_CHECKPOINT_DIR": str(directory), "SWEEPER_RESUME_STEP": "0", "SWEEPER_RUN_ID": run_dir.name,
        "SWEEPER_RUN_DIR": str(run_dir), "SWEEPER_SWEEP": mini.SWEEP, "SWEEPER_TRIAL": "0",
        "SWEEPER_SEED": str(identity.seed), "SWEEPER_ATTEMPT": f"{run_dir}:1",
    }  # fmt: skip
    assert (found["OMP_NUM_THREADS"], found["PYTHONUNBUFFERED"]) == ("1", "1")
    assert "CWD /\n" in printed


def test_a_pruned_program_is_told_and_ends(where: Path) -> None:
    """Its last checkpoint, and what it says while it stops, change nothing of the verdict."""
    place = says(
        where,
        """
import signal
def stop(*_):
    say(step=9, loss=0.0); print(save(9)); sys.exit(1)
signal.signal(signal.SIGTERM, stop)
for step in range(1, 1000): say(step=step, loss=step); time.sleep(0.02)
""",
        pruner={"_target_": "optuna.pruners.ThresholdPruner", "upper": 4.5},
    )
    assert (run_of(place)["state"], run_of(place)["value"]) == ("pruned", 5.0)
    assert "asked to stop with SIGTERM: stopped by the pruner at step 5" in place.printed()
    rows = [json.loads(line) for line in (place.run_dir() / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert mini.final(place).problems == []


def test_a_verdict_that_was_not_settled_is_given_again(where: Path) -> None:
    """Killed between the verdict and its settling: the program is not even started again."""
    code = """
pathlib.Path(os.environ["SWEEPER_RUN_DIR"]).parents[3].joinpath("starts").open("a").write("x")
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
say(step=1, loss=9.0); save(1)
"""
    pruner = {"_target_": "optuna.pruners.ThresholdPruner", "upper": 4.5}
    place = new_place(where, argv=[sys.executable, "-c", SAYS + code], pruner=pruner)

    def probe(operation: str, path: Path) -> None:
        if path.name == rundir.RESULT_FILE:
            os.kill(os.getpid(), signal.SIGKILL)

    assert was_killed(finish(place, probe=probe)), place.printed()
    assert finish(place) == 0
    assert (run_of(place)["state"], run_of(place)["value"]) == ("pruned", 9.0)
    assert len((where / "starts").read_text()) == 1


# --- real processes ----------------------------------------------------------------------------


@pytest.fixture
def made(where: Path) -> Iterator[list[Workers]]:
    """Collects machines, to be ended with the test."""
    found: list[Workers] = []
    yield found
    for workers in found:
        workers.end()


def machine(made: list[Workers], where: Path, act: str, **changes: Any) -> Workers:
    place = new_place(
        where,
        args={"act": act, "at": 5},
        lease={"heartbeat_s": 0.3, "ttl_s": 1.0, "grace_s": 20.0},
        **changes,
    )
    made.append(Workers(place))
    return made[-1]


def without_act(end: dict[str, Any]) -> dict[str, Any]:
    """What is comparable between programs whose arguments differ: state.json holds them."""
    state = json.loads(end["files"]["state.json"])
    del state["args"]
    return {**end, "files": {**end["files"], "state.json": state}}


def program_pid(workers: Workers) -> int:
    """The program's pid, once it has become slow."""

    def look() -> int | None:
        log = workers.place.run_dir() / rundir.METRICS_FILE
        if not log.exists() or log.read_bytes().count(b"\n") < 5:
            return None
        trainer = workers.trainer()
        if trainer is None:
            return None
        children = Path(f"/proc/{trainer}/task/{trainer}/children").read_text().split()
        return int(children[0]) if children else None

    return int(until(look, "the program became slow"))


@pytest.mark.slow
@pytest.mark.parametrize("act", ["kill", "leave"])
def test_a_killed_program_is_lost_and_goes_on(
    made: list[Workers], where: Path, undisturbed: Undisturbed, act: str
) -> None:
    workers = machine(made, where, act)
    workers.finish()
    assert workers.outcomes() == ["lost", "completed"]
    assert workers.attempts()[0]["reason"] == "the program ended with SIGKILL"
    assert "going on from step 3" in workers.place.printed()
    assert without_act(at_the_end(workers.place)) == without_act(undisturbed[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "reason"), [("exit", "exit code 3"), ("abort", "SIGABRT")], ids=["exit", "abort"]
)
def test_a_failed_program_has_crashed(made: list[Workers], where: Path, act: str, reason: str) -> None:
    workers = machine(made, where, act, retry={"max_crashed": 0}, checkpoint={"every_n_steps": None})
    assert workers.worker().wait(LIMIT_S) == 0
    (attempt, *_) = workers.attempts()
    assert (attempt["outcome"], attempt["reason"]) == ("crashed", f"the program ended with {reason}")
    if act == "exit":
        assert "no such data set" in attempt["detail"], "what it printed says more than a traceback"
    assert "Traceback" not in (attempt["detail"] or "")
    assert workers.alive() == []


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["trainer", "worker"])
def test_it_dies_with_its_trainer(
    made: list[Workers], where: Path, undisturbed: Undisturbed, victim: str
) -> None:
    workers = machine(made, where, "slow")
    worker = workers.worker()
    pid = program_pid(workers)
    os.kill(worker.pid if victim == "worker" else workers.trainer() or 0, signal.SIGKILL)
    until(lambda: processes.start_ticks(pid) is None, "the program ended")
    (workers.place.data_dir / "go").touch()
    if victim == "worker":
        worker.wait(LIMIT_S)
        workers.all_gone()
        workers.finish()
    else:
        assert worker.wait(LIMIT_S) == 0, workers.place.printed()
        assert workers.alive() == []
    assert workers.outcomes() == ["lost", "completed"]
    assert without_act(at_the_end(workers.place)) == without_act(undisturbed[1])


@pytest.mark.slow
def test_asked_to_stop_it_saves_and_is_preempted(
    made: list[Workers], where: Path, undisturbed: Undisturbed
) -> None:
    workers = machine(made, where, "slow")
    worker = workers.worker()
    program_pid(workers)
    worker.terminate()
    assert worker.wait(LIMIT_S) == 75, workers.place.printed()
    workers.all_gone()
    assert workers.outcomes() == ["preempted"]
    (newest, _), *_ = checkpoints.steps_on_disk(workers.place.root())
    assert newest >= 5, "it saved where it was asked to stop"
    log = rundir.attempt_log(workers.place.run_dir(), 1).read_text()
    assert "[COMMAND] it is asked to stop with SIGTERM: the worker got SIGTERM" in log
    workers.finish()
    assert workers.outcomes() == ["preempted", "completed"]
    end, expected = without_act(at_the_end(workers.place)), without_act(undisturbed[1])
    assert end["value"] == expected["value"]
    assert end["metrics"] == expected["metrics"]


@pytest.mark.slow
def test_in_a_slurm_job_it_may_stop_before_anybody_was_told(made: list[Workers], where: Path) -> None:
    """SLURM signals every process of a step: a program that stops well at once has not finished its training."""
    workers = machine(made, where, "slow")
    workers.environment["SLURM_JOB_ID"] = "4711"
    worker = workers.worker()
    pid = program_pid(workers)
    os.kill(pid, signal.SIGTERM)
    until(lambda: processes.start_ticks(pid) is None, "the program ended")
    worker.terminate()
    assert worker.wait(LIMIT_S) == 75, workers.place.printed()
    assert workers.outcomes() == ["preempted"]
    workers.environment.clear()
    workers.finish()
    assert workers.outcomes() == ["preempted", "completed"]


@pytest.mark.slow
def test_one_that_does_not_stop_is_killed_and_preempted(made: list[Workers], where: Path) -> None:
    workers = Workers(
        new_place(where, args={"act": "deaf", "at": 5, "steps": 500, "every": 300}, trainer={"grace_s": 0.3})
    )
    made.append(workers)
    worker = workers.worker()
    program_pid(workers)
    worker.terminate()
    assert worker.wait(LIMIT_S) == 75, workers.place.printed()
    workers.all_gone()
    assert workers.outcomes() == ["preempted"]
    assert "is killed" in rundir.attempt_log(workers.place.run_dir(), 1).read_text()


@pytest.mark.slow
def test_a_program_that_is_gone_is_a_matter_of_configuration(made: list[Workers], where: Path) -> None:
    workers = Workers(new_place(where, argv=["/nowhere/program"]))
    made.append(workers)
    assert workers.worker().wait(LIMIT_S) == 78
    assert "the program '/nowhere/program' of trainer.argv was not found" in workers.place.printed()
    assert workers.alive() == []
