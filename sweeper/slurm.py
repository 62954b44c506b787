"""SLURM as a worker sees it: who it is there, why it is asked to stop, and which jobs are over.

Only what SLURM says positively counts. A job that it does not list, and a command that fails or
does not answer, prove nothing: then the lease decides.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sweeper import clock
from sweeper.records import Death, ProcessId
from sweeper.states import Outcome

ASK_EVERY_S = 10.0
ANSWER_WAIT_S = 10.0
EARLY_WARNING_S = 60.0
"""How much earlier than asked for SLURM may send the warning of a time limit. Source: sbatch(1), --signal."""

_OVER = {
    "COMPLETED": Outcome.LOST,
    "FAILED": Outcome.LOST,
    "CANCELLED": Outcome.PREEMPTED,
    "PREEMPTED": Outcome.PREEMPTED,
    "REQUEUED": Outcome.PREEMPTED,
    "TIMEOUT": Outcome.TIMEOUT,
    "DEADLINE": Outcome.TIMEOUT,
    "OUT_OF_MEMORY": Outcome.OOM,
}
"""States after which no process of the job is left, and what that was for its attempt.

Not NODE_FAIL and BOOT_FAIL: SLURM has lost sight of the node, and the tasks may live on it.
"""

Command = Callable[[Sequence[str]], str | None]
"""Runs a command; its output, or None when it failed."""


def is_inside(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is part of a SLURM job."""
    return "SLURM_JOB_ID" in environment


def worker_name(environment: Mapping[str, str] = os.environ) -> str:
    """A worker's name, the same after each requeue: it goes on with its own runs first."""
    array, index = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"slurm:{array}_{index}" if array else f"slurm:{environment['SLURM_JOB_ID']}"


def why_stopped(
    *, warning_s: float, command: Command | None = None, environment: Mapping[str, str] = os.environ
) -> tuple[Outcome, str]:
    """Why this job has to stop: its time is nearly over, or somebody needs its place.

    Asked when a signal has come; without an answer it is a preemption.

    Args:
        warning_s: How long before the time limit SLURM was asked to warn.
    """
    job = worker_name(environment).removeprefix("slurm:")
    # HAZARD: the last member of an array has the array's own number, which would name all of them.
    answer = (command or run)(["scontrol", "show", "job", "--oneliner", job])
    said = dict(word.partition("=")[::2] for word in (answer or "").split())
    preempted_in_s, began_in_s = (_seconds_to(said.get(name, "")) for name in ("PreemptTime", "StartTime"))
    if began_in_s <= preempted_in_s < math.inf:  # else it tells of a preemption before a requeue
        return Outcome.PREEMPTED, f"SLURM job {job} is preempted"
    if said.get("Reason") == "TimeLimit":
        return Outcome.TIMEOUT, f"the time limit of SLURM job {job} is reached"
    is_late = _seconds_to(said.get("EndTime", "")) <= warning_s + EARLY_WARNING_S
    if said.get("JobState") == "RUNNING" and is_late:
        return Outcome.TIMEOUT, f"the time limit of SLURM job {job} is near"
    return Outcome.PREEMPTED, f"SLURM ends job {job}"


def grace_s(command: Command | None = None, *, environment: Mapping[str, str] = os.environ) -> float | None:
    """Seconds from the signal of a preemption to SIGKILL in this job's partition; None if SLURM does not say."""
    ask = command or run
    partition = ask(
        ["scontrol", "show", "partition", "--oneliner", environment.get("SLURM_JOB_PARTITION", "")]
    )
    grace = re.search(r"\bGraceTime=(\d+)", partition or "")
    wait = re.search(r"^KillWait\s*=\s*(\d+)", ask(["scontrol", "show", "config"]) or "", flags=re.MULTILINE)
    return float(grace[1]) + float(wait[1]) if grace and wait else None


def _seconds_to(time: str) -> float:
    """From now to a time of SLURM's, which is local and has no zone."""
    try:
        return datetime.fromisoformat(time).timestamp() - clock.wall_s()
    except ValueError:
        return math.inf


def run(command: Sequence[str]) -> str | None:
    """Ask one of SLURM's commands; None when it failed, is not there, or does not answer."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=ANSWER_WAIT_S
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


@dataclass(frozen=True, slots=True)
class Job:
    """A line of squeue."""

    state: str
    restarts: int


class Jobs:
    """What SLURM says of this user's jobs: one query for all owners, and not often.

    Args:
        command: Runs squeue and sacct; replaceable in tests.
    """

    def __init__(self, command: Command = run) -> None:
        self._command = command
        self._jobs: dict[str, Job] = {}
        self._asked_at_s = -ASK_EVERY_S
        self._earlier: dict[str, list[str]] = {}

    def death(self, owner: ProcessId, *, is_gone: bool = False) -> Death | None:
        """Why SLURM says that this process is over, or None.

        Args:
            is_gone: It is known to be gone: ask now, for the cause alone.
        """
        if not owner.slurm_job_id or not is_inside():
            return None
        if owner.slurm_cluster != os.environ.get("SLURM_CLUSTER_NAME", ""):
            return None  # the same number may be another job here
        self._look(ASK_EVERY_S / 10 if is_gone else ASK_EVERY_S)
        job = self._jobs.get(owner.slurm_job_id)
        if job is None or job.restarts < owner.slurm_restarts:
            return None
        # HAZARD: a requeue counts as a restart from its first signal on; until the last, the old tasks live.
        if job.state == "COMPLETING" and not is_gone:
            return None
        state: str | None = job.state
        if job.restarts > owner.slurm_restarts:
            state = self._state_of_earlier(owner, of=job.restarts + 1)
        if state not in _OVER:
            return None
        return Death(f"its SLURM job {owner.slurm_job_id} is {state}", _OVER[state])

    def _look(self, every_s: float) -> None:
        now = clock.awake_s()
        if now - self._asked_at_s < every_s:
            return
        self._asked_at_s = now
        fields = "JobID:20 ,State:30 ,RestartCnt:10 "
        answer = self._command(["squeue", "--me", "--noheader", "--array", "--states=all", "-O", fields])
        self._jobs = parse_squeue(answer or "")
        self._earlier.clear()

    def _state_of_earlier(self, owner: ProcessId, *, of: int) -> str | None:
        """How a job's run ended that was followed by a requeue. `sacct` lags a second or more behind.

        It may tell of more than the `of` runs there were: of an older job that had the same number.
        """
        job_id = owner.slurm_job_id
        if job_id not in self._earlier:
            command = [
                "sacct",
                "--noheader",
                "--parsable2",
                "--allocations",
                "--duplicates",
                f"--jobs={job_id}",
            ]
            answer = self._command([*command, "--format=JobIDRaw,State"])
            self._earlier[job_id] = parse_sacct(answer or "", job_id)
        states = self._earlier[job_id]
        return states[owner.slurm_restarts] if owner.slurm_restarts < len(states) <= of else None


def parse_squeue(text: str) -> dict[str, Job]:
    """Jobs by id, from lines of id, state and restart count; lines of another form say nothing."""
    found = {}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) == 3 and fields[2].isdigit():
            found[fields[0]] = Job(fields[1], int(fields[2]))
    return found


def parse_sacct(text: str, job_id: str) -> list[str]:
    """The states of a job's runs, oldest first, from lines of id and state: `CANCELLED by 1000` is CANCELLED.

    What belongs to other jobs is left out: the number of an array names all its members.
    """
    fields = [line.split("|") for line in text.splitlines()]
    return [
        state.split()[0] for number, state in (pair for pair in fields if len(pair) == 2) if number == job_id
    ]
