"""`Run`: what a training function gets beside its configuration. No torch here."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sweeper import checkpoints, clock, rundir
from sweeper.channel import Link
from sweeper.checkpoints import Content, Draft
from sweeper.errors import ConfigError, SweeperError
from sweeper.manifests import Manifest
from sweeper.records import Params
from sweeper.tracking.metrics import MetricsLog
from sweeper.trainer.commits import Committer, Plan
from sweeper.trainer.saver import Saver

PROGRESS_EVERY_S = 0.25
DISK_FAULTS = frozenset({5, 28, 30, 122})  # EIO, ENOSPC, EROFS, EDQUOT


def say(text: str) -> None:
    """One line in the attempt's log. A full disk may refuse it; that must end no training."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def _devices() -> dict[str, Any]:
    """The GPUs that this training uses, for the database and W&B; empty on a CPU, which no GPU is woken for."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_count": torch.cuda.device_count(),
        "cuda_version": torch.version.cuda,
    }


class Stop(BaseException):
    """A training ends here, on purpose. Not an Exception, so that `except Exception` lets it pass."""


class Preempted(Stop):
    """The run was checkpointed and goes on in another attempt."""


class TrialPruned(Stop):
    """The pruner stopped this trial; its last reported value is what Optuna is told."""


class BadValue(SweeperError):
    """A training returned something that is not a finite number; it would do so again."""


class TrainingFailed(SweeperError):
    """A training that says itself how it failed, where a traceback would say nothing.

    Args:
        is_lost: It was ended from outside.
    """

    def __init__(self, what: str, *, why: str = "", do: str = "", is_lost: bool = False) -> None:
        super().__init__(what, why=why, do=do)
        self.is_lost = is_lost


class NoValidCheckpoint(SweeperError):
    """Checkpoints had been committed, but none of them can be used."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What a worker tells a new trainer. Plain JSON values.

    Attributes:
        starts: (lease_epoch, start step) of the attempts so far, from the database.
        was_committed: The database knows of a committed checkpoint.
        num_ranks, num_nodes, backend, ranks_s: Processes of this training, on how many nodes, how they talk, and how long one waits
            for another.
        mtbf_s: Mean time between failures of a run of this sweep, as observed so far.
        checkpoint: The run's `checkpoint` settings.
    """

    run_dir: str
    run_id: str
    sweep: str
    trial: int
    params: Params
    seed: int
    threads: int
    attempt: int
    lease_epoch: int
    config_digest: str
    deadline_s: float
    metric: str
    direction: str
    has_pruner: bool
    was_committed: bool
    mtbf_s: float = 3600.0
    num_ranks: int = 1
    num_nodes: int = 1
    backend: str = "gloo"
    ranks_s: float = 300.0
    starts: list[list[int]] = field(default_factory=list)
    checkpoint: dict[str, Any] = field(default_factory=dict)


class Run:
    """One run, as its training sees it: who it is, where it writes, and the worker behind it.

    Attributes:
        run_id: Stable id, e.g. `simple.r.00003`.
        trial: Number of the trial in the Optuna study.
        params: The trial's hyperparameters.
        seed: Seed of this trial; Python, NumPy and torch are seeded with it already.
        directory: The run directory.
    """

    ADVICE_UNFIT = (
        "Put the training back as it was, cancel the run, or start it fresh with resume.mode=never."
    )

    def __init__(self, spec: Spec, link: Link, *, config: Any = None, saver_fd: int = -1) -> None:
        self.spec = spec
        self._saver_fd = saver_fd
        self.config = config
        self.run_id, self.trial, self.params, self.seed = spec.run_id, spec.trial, spec.params, spec.seed
        self.directory = Path(spec.run_dir)
        self.checkpoints_dir = self.directory / rundir.CHECKPOINTS_DIR
        self.start_step = 0
        self.last_report: tuple[int, float] | None = None
        self._link = link
        self._metrics: MetricsLog | None = None
        self._has_started = False
        self._told_at = 0.0
        self._stopped: Stop | None = None
        self._at_end: list[Callable[[], None]] = []
        self._unwritten: list[tuple[int, dict[str, Any]]] = []
        self.committer = Committer(link)
        self._savers: list[Saver] = []
        self._parent_step: int | None = None

    # --- metrics ---------------------------------------------------------------------------

    @property
    def metrics(self) -> MetricsLog:
        """The metrics log; opened empty unless a resume opened it at its checkpoint's offset."""
        if self._metrics is None:
            self.open_metrics(0)
        assert self._metrics is not None
        return self._metrics

    def open_metrics(self, offset: int) -> None:
        """Cut the metrics log to what the checkpoint knows of, in a new file.

        Raises:
            Fenced: The run belongs to somebody else, and so does its log.
        """
        path = self.directory / rundir.METRICS_FILE
        self._metrics = MetricsLog(path, offset=offset, check_lease=self._check_lease)
        if self._metrics.warning:
            say(f"[RESUME] {self.run_id}: {self._metrics.warning}")
            self.complain(self._metrics.warning)

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Append a row to the metrics log; W&B and TensorBoard follow it.

        When the row holds the sweep's metric and a pruner is set, the worker is asked.

        Raises:
            TrialPruned: The pruner stops this trial.
        """
        self.start()
        self._write(step, row)
        if self.spec.metric in row:
            self.judge(step, float(row[self.spec.metric]))

    def judge(self, step: int, value: float) -> None:
        """Report a value of the sweep's metric to the pruner; what it said once, it says again.

        A resume repeats the last report its checkpoint knows of: a run that was pruned there, but
        killed before that was settled, is pruned there again.

        Raises:
            TrialPruned: The pruner stops this trial.
        """
        self.last_report = (step, value)
        if self.spec.has_pruner and self._link.ask("report", step=step, value=value)["prune"]:
            self._stopped = TrialPruned(f"stopped by the pruner at step {step}")
            raise self._stopped

    @property
    def last_value(self) -> float | None:
        """The value of the sweep's metric that was reported last."""
        return None if self.last_report is None else self.last_report[1]

    def _write(self, step: int, row: Mapping[str, Any]) -> None:
        """Write a row, or keep it until the disk takes it; no checkpoint is committed before that."""
        is_first = not self._unwritten
        self._unwritten.append((step, dict(row)))
        try:
            self.write_kept_rows()
        except OSError as error:
            if is_first:
                self.complain(f"a row of step {step} could not be written: {error}; it is kept in memory")

    def write_kept_rows(self) -> None:
        """Write the rows that the disk has refused so far. Raises OSError while it still does."""
        while self._unwritten:
            step, row = self._unwritten[0]
            self.metrics.write(step, row)
            del self._unwritten[0]

    def settle_metrics(self) -> int:
        """Have all rows in the file that is read; returns its length in bytes, not yet durable.

        Raises:
            Fenced: The run belongs to somebody else.
            OSError: The disk refused.
        """
        self.write_kept_rows()
        return self.metrics.settle()

    def sync_metrics(self) -> int:
        """Make every row durable and return the log's length in bytes. Raises OSError."""
        self.write_kept_rows()
        return self.metrics.sync()

    def keep_metrics(self) -> None:
        """Make the rows since the last checkpoint durable, in the file that is read.

        Raises:
            Fenced: The run belongs to somebody else.
            OSError: The disk refused.
        """
        if self._metrics is not None:
            self.sync_metrics()
            self._metrics.ensure_in_place()

    def _check_lease(self) -> None:
        self._link.ask("lease")

    # --- the course of an attempt ----------------------------------------------------------

    def start(self, *, step: int = 0, total_steps: int | None = None) -> None:
        """Tell the worker where this attempt starts; only the first call counts."""
        if not self._has_started:
            self._has_started = True
            self.start_step = step
            checkpoints.void(self.metrics)  # opened, so cut, before the first step
            self._link.ask("started", step=step, total_steps=total_steps, devices=_devices())

    def progress(self, step: int | None = None, *, total_steps: int | None = None) -> None:
        """Show a sign of life, e.g. in a long evaluation; at most a few a second are sent.

        Raises:
            Fenced: The lease may be over; nothing more may be written.
        """
        self._link.poll()
        now = clock.awake_s()
        if now - self._told_at >= PROGRESS_EVERY_S:
            self._told_at = now
            self._link.tell("progress", step=step, total_steps=total_steps)

    def poll(self) -> None:
        """Take in what the worker has said, which is no sign of life. Raises Fenced, as `progress` does."""
        self._link.poll()

    def complain(self, text: str) -> None:
        """Say something in the worker's log that a person should see."""
        self._link.tell("complaint", text=text)

    @property
    def stop_reason(self) -> str | None:
        """Why this attempt should stop at the next step boundary; None to go on."""
        return self._link.stop_reason

    def preempted(self, reason: str) -> Stop:
        """The exception that ends this attempt; it counts even if the training swallows it."""
        self._stopped = Preempted(reason)
        return self._stopped

    @property
    def stopped(self) -> Stop | None:
        """What has stopped this training, if something has."""
        return self._stopped

    def at_end(self, act: Callable[[], None]) -> None:
        """Have `act` called once the training has returned or was pruned, before anything is told."""
        self._at_end.append(act)

    def finish(self) -> None:
        """Do what was asked for at the end, and make the last rows durable."""
        for act in self._at_end:
            act()
        self.keep_metrics()

    # --- checkpoints -----------------------------------------------------------------------

    def candidates(self) -> list[Path]:
        """Checkpoint directories that may be resumed from, newest first; none may be valid."""
        return [directory for _, directory in checkpoints.steps_on_disk(self.checkpoints_dir)]

    def read(self, directory: Path) -> tuple[Manifest, dict[str, Content]]:
        """Verify one candidate and return exactly the bytes that were verified.

        Whether it was made with this config.yaml is left to the caller, who can name the difference.

        Raises:
            CheckpointRefused: With the reason.
        """
        return checkpoints.validate(directory, run_id=self.run_id, starts=self._all_starts(), keep=True)

    def _all_starts(self) -> set[tuple[int, int]]:
        known = {(int(epoch), int(step)) for epoch, step in self.spec.starts}
        return known | checkpoints.known_starts(self.checkpoints_dir)

    def was_ever_committed(self) -> bool:
        """Whether database or disk know of a checkpoint of this run."""
        return self.spec.was_committed or checkpoints.was_ever_committed(self.checkpoints_dir)

    def refuse(self, step: int, reason: str) -> None:
        """Say in both logs why a candidate is not used."""
        say(f"[RESUME] {self.run_id}: checkpoint step {step} refused: {reason}")
        self._link.tell("refused", step=step, reason=reason)

    def resumed(self, manifest: Manifest, *, refused: Iterable[Path]) -> None:
        """This attempt goes on from there: refused and newer checkpoints are moved out of the way."""
        step = manifest.step
        self._parent_step = step
        self.committer.known_good[step] = checkpoints.kept(manifest)
        say(f"[RESUME] {self.run_id}: going on from step {step}")
        self._link.ask("resumed", step=step)
        checkpoints.condemn(self.checkpoints_dir, refused)

    def plan(
        self,
        step: int,
        *,
        value: float | None = None,
        is_pinned: bool = False,
        exports: dict[str, str] | None = None,
    ) -> Plan:
        """What a checkpoint of `step` will say of itself.

        Args:
            value: By which the best are kept.
            is_pinned: It is never removed.
            exports: File of the checkpoint → path of a copy for other tools.
        """
        spec, settings = self.spec, self.spec.checkpoint
        lineage = sorted({(int(e), int(s)) for e, s in spec.starts} | {(spec.lease_epoch, self.start_step)})
        keep = {
            "last": int(settings.get("keep_last", 3)),
            "best": int(settings.get("keep_best") or 0),
            "every": int(settings.get("keep_every_n_steps") or 0),
            "direction": spec.direction,
        }
        return Plan(
            root=str(self.checkpoints_dir), run_id=self.run_id, step=step, lease_epoch=spec.lease_epoch,
            lineage=[list(pair) for pair in lineage], parent_step=self._parent_step, config_digest=spec.config_digest,
            starts=[list(pair) for pair in self._all_starts()], keep=keep,
            value=value, is_pinned=is_pinned, exports=exports or {},
        )  # fmt: skip

    def export_path(self, pattern: str, *, stage: str) -> str:
        """Where a weights file for other tools goes: `{stage}`, `{run_id}`, `{trial}` and every key of the trainer.

        Raises:
            ConfigError: The pattern names something else.
        """
        known = {
            **(self.config.trainer if self.config is not None else {}),
            "stage": stage,
            "run_id": self.run_id,
            "trial": self.trial,
        }
        try:
            path = pattern.format(**known)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"checkpoint.export_weights={pattern!r} cannot be filled in",
                why=f"{type(error).__name__}: {error}",
                do=f"It may name {', '.join(sorted(map(str, known)))}.",
            ) from error
        return str(self.directory / path) if not path.startswith("/") else path

    def draft(self, step: int) -> Draft:
        """Begin a checkpoint of `step`; nothing of it counts until `commit`."""
        return self.plan(step).draft()

    def commit(self, draft: Draft) -> None:
        """Make a draft the newest checkpoint and prune older ones.

        Raises:
            Fenced: The run belongs to somebody else.
            OSError: The disk refused; older checkpoints are untouched.
        """
        self.committer.commit(draft, self.plan(draft.step))

    def start_saver(self, memory_fd: int) -> Saver:
        """Start the process that saves beside this one."""
        deadline_s = getattr(self._link, "deadline_s", self.spec.deadline_s)
        saver = Saver(
            memory_fd, channel_fd=self._saver_fd, deadline_s=deadline_s, known_good=self.committer.known_good
        )
        self._savers.append(saver)
        return saver

    def end_savers(self) -> None:
        """End the processes that save beside this one; a save in flight is dropped."""
        for saver in self._savers:
            saver.close()


def checked_value(value: object) -> float:
    """The number a training returned. Raises BadValue."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadValue(f"the training must return a number, not {type(value).__name__} {str(value)[:60]!r}")
    if not math.isfinite(value):
        raise BadValue(f"the training returned {value}, which says nothing about its parameters")
    return float(value)


def in_attempt(run_dir: str, lease_epoch: int) -> str:
    """The tag that programs started by an attempt inherit in their environment.

    The run's resolved directory and not its id: sweeps of one name live in other data directories.
    """
    return f"{run_dir}:{lease_epoch}"
