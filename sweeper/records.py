"""Frozen records: what the parts of sweeper hand to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sweeper.states import Outcome, State

ParamValue = str | int | float | bool
Params = dict[str, ParamValue]


@dataclass(frozen=True, slots=True)
class ProcessId:
    """One process, for ever: pids are reused, (boot, namespace, pid, start) is not.

    Attributes:
        start_ticks: Field 22 of /proc/PID/stat, clock ticks after boot.
        pid_namespace: The link text of /proc/PID/ns/pid.
        slurm_cluster: Whose number slurm_job_id is; "" in markers and earlier records: then the lease decides.
        slurm_restarts: How often SLURM had requeued the job when this process was started.
    """

    host: str
    machine_id: str
    boot_id: str
    pid_namespace: str
    uid: int
    pid: int
    start_ticks: int
    slurm_job_id: str = ""
    slurm_restarts: int = 0
    slurm_cluster: str = ""


@dataclass(frozen=True, slots=True)
class Death:
    """That an owner is gone for certain: why, and what that was for its attempt."""

    reason: str
    outcome: Outcome = Outcome.LOST


@dataclass(frozen=True, slots=True)
class Proposal:
    """A trial that may be drawn: from the sampler, or one that waits in the study.

    Attributes:
        number: The trial's number. A sampled one is drawn only while this is still the next.
        waiting_id: Optuna's id of a WAITING trial; None for a sampled one.
        internal: Parameter → (Optuna's internal representation, JSON of its distribution).
    """

    number: int
    params: Params
    internal: Mapping[str, tuple[float, str]]
    waiting_id: int | None = None
    system_attrs: Mapping[str, Any] = field(default_factory=dict)
    retry_of: str | None = None


@dataclass(frozen=True, slots=True)
class NewSweep:
    """What a launch asks for: identity, size and configuration of a sweep."""

    name: str
    seed: int
    n_trials: int
    metric: str
    direction: str
    config: dict[str, Any]
    grid: Sequence[Proposal] = ()


@dataclass(frozen=True, slots=True)
class Sweep:
    """A named search, as the database holds it. `config` is the composed launch configuration."""

    sweep_id: int
    name: str
    study_id: int
    seed: int
    n_trials: int
    metric: str
    direction: str
    config: dict[str, Any]
    is_cancelled: bool

    def run_seed(self, trial: int) -> int:
        """The seed of every run of a trial: 32 bits from the sweep's seed and the trial's number.

        `sweep.run_seed` overrules it, so that one run can be trained again to the same bits.
        """
        from hashlib import sha256

        fixed: int | None = self.config.get("sweep", {}).get("run_seed")
        if fixed is not None:
            return fixed
        return int.from_bytes(sha256(f"{self.seed}:{trial}".encode()).digest()[:4], "big")


@dataclass(frozen=True, slots=True)
class Run:
    """One training of one trial, as the database holds it.

    Attributes:
        path: The run directory, relative to the data directory.
        checkpoint_step: Newest committed checkpoint the database knows of: a hint, the disk decides.
        lost_count: Consecutive lost attempts without a newer committed checkpoint; the other
            two counts likewise.
        threads: Threads of one trainer. Part of the identity, because it changes the bits.
    """

    run_id: str
    sweep_id: int
    number: int
    trial_id: int
    trial: int
    params: Params
    seed: int
    threads: int
    path: str
    wandb_run_id: str
    state: State
    lease_epoch: int
    attempts: int
    global_step: int
    total_steps: int | None
    checkpoint_step: int | None
    lost_count: int = 0
    crashed_count: int = 0
    oom_count: int = 0
    replaces: str | None = None
    retry_of: str | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write to one run. Every write carries all three fields.

    Attributes:
        lease_epoch: Fencing number, one per attempt; the newest owner has the largest.
        owner_token: Random, so that a lost COMMIT reply can be settled by reading it back.
    """

    run_id: str
    lease_epoch: int
    owner_token: str


@dataclass(frozen=True, slots=True)
class Claim:
    """What a worker gets when it becomes the owner of a run.

    Attributes:
        previous: Owner and recorded processes of the attempt before, if there was one.
        is_new: True when the run was drawn just now, False when it was taken over.
    """

    run: Run
    lease: Lease
    is_new: bool
    reason: str
    previous: tuple[ProcessId, ...] = ()


@dataclass(frozen=True, slots=True)
class Suspect:
    """A running run of somebody else, as an observer sees it."""

    run_id: str
    lease_epoch: int
    heartbeat: int
    lease_until: float
    lost_count: int
    owner: ProcessId
    processes: tuple[ProcessId, ...]


@dataclass(frozen=True, slots=True)
class Ending:
    """How one attempt of a run ended, as the worker saw it.

    Attributes:
        value: The returned number, for `completed` and `pruned`.
        detail: Traceback or last lines of output, for people.
        is_hopeless: The same training would end the same way again.
        is_config: The configuration must be changed; no other trial would fare better.
        is_disk_fault: The disk refused a write; the run itself did nothing wrong.
        no_checkpoint: Checkpoints had been committed, but none could be used.
    """

    outcome: Outcome
    reason: str = ""
    value: float | None = None
    detail: str = ""
    is_hopeless: bool = False
    is_config: bool = False
    is_disk_fault: bool = False
    no_checkpoint: bool = False
