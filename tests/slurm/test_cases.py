"""Ends of jobs one by one, on a real SLURM. What happens together is in test_sweep."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_sweep import ClusterSweep, until
from testbed import Testbed, missing_programs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CANARY = "CANARY" + "0123456789abcdef" * 2
PACE = {"PACE_S": "0.4"}
TRAINING = ("trainer.epochs=5", "launcher.partition=low", "launcher.timeout_min=30")


@pytest.fixture
def eager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    """A cluster of its own, whose preemptions send the signal that the job asked for."""
    if missing := missing_programs():
        pytest.skip(f"no SLURM here: {', '.join(missing)} missing (slurm/testbed/install gets them)")
    testbed = Testbed(tmp_path_factory.mktemp("eager"), num_nodes=1, send_user_signal=True)
    testbed.up()
    try:
        yield testbed
    finally:
        testbed.down()


def teller(sweep: ClusterSweep) -> Any:
    """What to print when something does not happen."""

    def tell() -> str:
        assert sweep.testbed is not None
        queue = sweep.testbed.run("squeue", "--array", "--states=all")
        return f"{sweep.outcomes()}\n{queue}\n{sweep.logs()[-6000:]}"

    return tell


def training(sweep: ClusterSweep, num: int) -> dict[str, dict[str, Any]]:
    """Worker → its run, once so many train and each has a checkpoint."""

    def found() -> dict[str, dict[str, Any]] | None:
        now = sweep.training()
        return now if len(now) == num else None

    return dict(until(found, f"{num} workers train", tell=teller(sweep)))


def history(sweep: ClusterSweep, worker: str) -> list[str]:
    """State and exit code of each run of a worker's job."""
    assert sweep.testbed is not None
    options = ("--noheader", "--parsable2", "--allocations", "--duplicates", "--format=state,exitcode")
    lines = sweep.testbed.run("sacct", *options, f"--jobs={sweep.job(worker)}").splitlines()
    return [re.sub(r"CANCELLED by \d+", "CANCELLED", line) for line in lines]


def step_daemon(testbed: Testbed, job_id: str) -> int:
    """The pid of the slurmstepd of a job's only step; the batch script has one of its own."""
    title = f"slurmstepd: [{job_id}.0]".encode()
    found = [
        process.pid for process in testbed.processes() if Path(f"/proc/{process.pid}/cmdline").read_bytes().startswith(title)
    ]  # fmt: skip
    assert len(found) == 1
    return found[0]


def test_a_cancelled_member_a_lost_step_daemon_and_a_requeue_of_one_that_was_done(
    testbed: Testbed, tmp_path: Path
) -> None:
    """Another worker goes on where one was cancelled, or has lost its step daemon; done is done."""
    sweep = ClusterSweep(testbed, tmp_path, more={**PACE, "WANDB_API_KEY": CANARY})
    sweep.launch(*TRAINING, "sweep.n_trials=4", "launcher.n_workers=3")
    cancelled, orphaned, quiet = workers = training(sweep, 3)

    shown = testbed.run("scontrol", "show", "job", "--details", sweep.job(quiet))
    script = testbed.run("scontrol", "write", "batch_script", sweep.job(quiet), "-")
    commands = subprocess.run(["ps", "axww"], capture_output=True, text=True, check=True).stdout
    assert "sweeper worker on_slurm" in commands
    assert "submitit" in script
    assert CANARY not in shown + script + commands

    job_ids = dict(
        line.split() for line in testbed.run("squeue", "--noheader", "--array", "--Format=ArrayTaskID:10,JobID:20").splitlines()
    )  # fmt: skip
    os.kill(step_daemon(testbed, job_ids[orphaned.rpartition("_")[2]]), signal.SIGKILL)
    testbed.run("scancel", sweep.job(cancelled))
    until(lambda: sweep.outcomes()["preempted"] == 2, "both runs are released", tell=teller(sweep))
    until(sweep.is_complete, "all trials are done", tell=teller(sweep))
    until(lambda: history(sweep, quiet) == ["COMPLETED|0:0"], "a worker ends", tell=teller(sweep))
    assert history(sweep, cancelled)[0].startswith("CANCELLED|")
    assert len(history(sweep, cancelled)) == 1
    for worker in (cancelled, orphaned):
        attempts = [row for row in sweep.attempts() if row["run_id"] == workers[worker]["run_id"]]
        assert [row["outcome"] for row in attempts] == ["preempted", "completed"]
        assert attempts[0]["reason"] == f"SLURM ends job {sweep.job(worker)}"
    assert dict(sweep.outcomes()) == {"completed": 4, "preempted": 2}
    assert sweep.violations() == []

    before, weights = sweep.attempts(), sweep.weights()
    testbed.run("scontrol", "requeue", sweep.job(quiet))
    again = ["REQUEUED|0:0", "COMPLETED|0:0"]
    until(lambda: history(sweep, quiet) == again, "it runs once more", tell=teller(sweep))
    assert (sweep.attempts(), sweep.weights()) == (before, weights)
    files = [path for path in sweep.data_dir.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_a_sweep_whose_jobs_are_all_over_goes_on_with_resume(testbed: Testbed, tmp_path: Path) -> None:
    """One is ended at its time limit without a warning, the other is cancelled; `launch --wait` joins what is there."""
    sweep = ClusterSweep(testbed, tmp_path, more=PACE)
    asked = (*TRAINING, "sweep.n_trials=3", "launcher.n_workers=2", "launcher.signal_delay_s=1")
    sweep.launch(*asked)
    late, cancelled = training(sweep, 2)
    testbed.run("scontrol", "update", f"job={sweep.job(late)}", "EndTime=now+1")
    testbed.run("scancel", sweep.job(cancelled))
    until(lambda: not sweep.jobs("RUNNING", "PENDING", "COMPLETING"), "all jobs are over", tell=teller(sweep))
    assert history(sweep, late)[0].startswith("TIMEOUT|")
    assert not sweep.is_complete()

    assert sweep.sweeper("resume", "on_slurm").stdout.startswith("submitted 2 workers: ")
    waited = sweep.launch(*asked, "--wait")
    assert waited.stdout.startswith("SLURM has 2 workers of sweep on_slurm already; nothing was submitted\n")
    assert all(f"on_slurm.r.0000{number} " in waited.stdout for number in range(3))
    assert "\nbest " in waited.stdout
    ends = {row["reason"]: row["outcome"] for row in sweep.attempts() if row["outcome"] != "completed"}
    assert ends == {
        f"the time limit of SLURM job {sweep.job(late)} is reached": "timeout",
        f"SLURM ends job {sweep.job(cancelled)}": "preempted",
    }
    assert sweep.outcomes()["completed"] == 3
    assert sweep.violations() == []


def test_a_worker_that_comes_when_nothing_is_left_ends_well(testbed: Testbed, tmp_path: Path) -> None:
    sweep = ClusterSweep(testbed, tmp_path)
    said = sweep.launch(
        *TRAINING, "sweep.n_trials=2", "launcher.n_workers=2", "launcher.array_parallelism=1", "--wait"
    )
    first, second = re.findall(r"\d+_\d", said.stdout.splitlines()[0])
    until(lambda: history(sweep, second) == ["COMPLETED|0:0"], "the second worker ends", tell=teller(sweep))
    assert history(sweep, first) == ["COMPLETED|0:0"]
    assert [row["worker"] for row in sweep.runs()] == [f"slurm:{first}"] * 2
    assert dict(sweep.outcomes()) == {"completed": 2}


def test_a_preemption_that_sends_the_warning_of_the_job_is_one_too(eager: Testbed, tmp_path: Path) -> None:
    """preempt_send_user_signal: USR2 comes in the place of TERM."""
    sweep = ClusterSweep(eager, tmp_path, more=PACE)
    sweep.launch(
        *TRAINING,
        "sweep.n_trials=1",
        "launcher.n_workers=1",
        "+launcher.additional_parameters.exclusive=true",
    )
    ((worker, run),) = training(sweep, 1).items()
    eager.run("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap", "true")
    until(sweep.is_complete, "the trial is done", tell=teller(sweep))
    assert [(row["outcome"], row["reason"]) for row in sweep.attempts()] == [
        ("preempted", f"SLURM job {sweep.job(worker)} is preempted"),
        ("completed", ""),
    ]
    assert "SIGUSR2" in sweep.logs()
    assert [row["run_id"] for row in sweep.runs()] == [run["run_id"]]
