"""`train` of trainer=command: start the program, hear it out, commit its checkpoints, say how it ended."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeper import checkpoints, clock, fsops, manifests, processes, slurm
from sweeper.command import files
from sweeper.command.files import NotTaken
from sweeper.command.program import Program
from sweeper.command.protocol import OK, REFUSED, BadLine, Ready, Result, Row, Said, parse
from sweeper.command.settings import Command
from sweeper.errors import CheckpointRefused
from sweeper.manifests import Manifest
from sweeper.recovery import signal_outcome
from sweeper.states import Outcome
from sweeper.trainer.run import BadValue, NoValidCheckpoint, Run, TrainingFailed, TrialPruned, in_attempt

STATE_FILE = "state.json"
STAGE = "train"
POLL_S = 0.1
STOP_WAIT_S = 2.0
MAX_COMPLAINTS = 10
_RESERVED = frozenset({STATE_FILE, manifests.MANIFEST})
_MAX_SHOWN = 200


def train(cfg: Any, run: Run) -> float:
    """Let the program of `cfg.argv` train, and return the trial's value.

    Raises:
        ConfigError: The program cannot be started.
        TrainingFailed: It ended with another exit code than 0, or by a signal.
        BadValue: It ended well, and has reported no value.
        NoValidCheckpoint: Checkpoints were committed once, and none can be used.
    """
    from omegaconf import OmegaConf

    command = Command.from_config(_plain(OmegaConf.to_container(cfg, resolve=True)))
    command.program(environment_of(run, command, directory=Path(), resume_step=0))
    with _directory_of_its_own(run) as directory:
        position = restore(run, directory)
        run.start(step=position.step, total_steps=command.total_steps)
        run.progress(position.step)
        if position.last_report is not None:
            run.judge(*position.last_report)
        if run.stop_reason is not None:
            raise run.preempted(run.stop_reason)
        environment = environment_of(run, command, directory=directory, resume_step=position.step)
        with Program(command, environment) as program:
            return Attempt(run, command, program, directory, position).follow()


def environment_of(run: Run, command: Command, *, directory: Path, resume_step: int) -> dict[str, str]:
    """What the program finds in its environment."""
    threads = str(run.spec.threads)
    configured = {
        **os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads,
        **command.env,
    }  # fmt: skip
    return {
        **{name: value for name, value in configured.items() if value is not None},
        "SWEEPER_CHECKPOINT_DIR": str(directory),
        "SWEEPER_RESUME_STEP": str(resume_step),
        "SWEEPER_RUN_ID": run.run_id,
        "SWEEPER_RUN_DIR": str(run.directory),
        "SWEEPER_SWEEP": run.spec.sweep,
        "SWEEPER_TRIAL": str(run.trial),
        "SWEEPER_SEED": str(run.seed),
        processes.ATTEMPT_VARIABLE: in_attempt(run.spec.run_dir, run.spec.lease_epoch),
    }


@contextlib.contextmanager
def _directory_of_its_own(run: Run) -> Iterator[Path]:
    """A fresh directory for this attempt's files. What a crash leaves of it, the next owner removes."""
    directory = fsops.temporary_name(run.directory.absolute() / "program")
    fsops.make_dir(directory)
    try:
        yield directory
    finally:
        with contextlib.suppress(OSError):
            fsops.remove_tree(directory)


# --- where it stands ---------------------------------------------------------------------------


@dataclass(slots=True)
class Position:
    """How far a run has come.

    Attributes:
        step: Of the last row or checkpoint.
        saved_step: Of the last checkpoint; 0 for none.
        best_value: Best reported value of the sweep's metric so far.
        value: What the program has told to be the trial's.
        last_report: Step and value of the last row with the sweep's metric.
    """

    step: int = 0
    saved_step: int = 0
    best_value: float | None = None
    value: float | None = None
    last_report: tuple[int, float] | None = None

    def note_best(self, value: float, *, direction: str) -> None:
        """Keep the better one; NaN is no better."""
        if value == value:
            better = min if direction == "minimize" else max
            self.best_value = value if self.best_value is None else better(self.best_value, value)


def restore(run: Run, directory: Path) -> Position:
    """Put the files of the newest valid checkpoint into `directory`; where there is none, start at 0.

    Raises:
        NoValidCheckpoint: Some were committed once, and none can be used.
    """
    refused: list[Path] = []
    for candidate in run.candidates():
        try:
            manifest, position = _load(run, candidate, directory)
        except CheckpointRefused as error:
            refused.append(candidate)
            run.refuse(checkpoints.step_of(candidate), str(error))
            continue
        run.resumed(manifest, refused=refused)
        return position
    if run.was_ever_committed():
        raise NoValidCheckpoint(f"no valid checkpoint ({len(refused)} refused)")
    return Position()


def _load(run: Run, candidate: Path, directory: Path) -> tuple[Manifest, Position]:
    manifest, contents = run.read(candidate)
    try:
        if manifest.config_digest != run.spec.config_digest:
            raise CheckpointRefused("it was made with another config.yaml")
        try:
            state = json.loads(contents[STATE_FILE].data)
            offset, metadata = int(state["metrics_offset"]), state["metadata"]
            report, names = metadata["last_report"], dict(metadata["files"])
            position = Position(
                step=manifest.step,
                saved_step=manifest.step,
                best_value=state["best_loss"],
                value=metadata["value"],
                last_report=None if report is None else (int(report[0]), float(report[1])),
            )
        except (KeyError, ValueError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise CheckpointRefused("it does not fit this training", why=why) from error
        files.put_back(names, contents, directory)
    finally:
        for content in contents.values():
            content.close()
    run.open_metrics(offset)
    return manifest, position


# --- an attempt --------------------------------------------------------------------------------


@dataclass(slots=True)
class Attempt:
    """One execution of the program, from its start to what became of it."""

    run: Run
    command: Command
    program: Program
    directory: Path
    position: Position
    _stop_reason: str | None = None
    _pruned: TrialPruned | None = None
    _kill_at_s: float | None = None
    _has_told_value: bool = False
    _num_complaints: int = 0

    def follow(self) -> float:
        """Hear the program until it ends; returns the trial's value."""
        while not self.program.is_over:
            is_silent = True
            for is_said, text in self.program.read(wait_s=POLL_S):
                is_silent = False
                if is_said:
                    self._hear(text)
                else:
                    _pass_on(text)
            if is_silent:
                self.run.poll()
            else:
                self.run.progress(self.position.step)
            self._look_at_the_time()
        return self._verdict(self.program.end())

    def _look_at_the_time(self) -> None:
        if self._stop_reason is None and self.run.stop_reason is not None:
            self._stop_reason = self.run.stop_reason
            self._ask_to_stop(self._stop_reason)
        if self._kill_at_s is not None and clock.awake_s() > self._kill_at_s:
            _say(f"it did not stop within {self.command.grace_s:g} s, and is killed")
            self.program.kill()
            self._kill_at_s = None

    def _ask_to_stop(self, reason: str) -> None:
        if self._kill_at_s is None:
            _say(f"it is asked to stop with {self.command.stop_signal.name}: {reason}")
            self._kill_at_s = clock.awake_s() + self.command.grace_s
            self.program.send_signal(self.command.stop_signal)

    def _verdict(self, code: int) -> float:
        """What an attempt has come to. Who was asked to stop may end well without having finished."""
        if self._pruned is not None:
            raise self._pruned
        if code == 0 and not self._has_told_value and slurm.is_inside():
            self._await_stop()
        if code == 0 and (self._stop_reason is None or self._has_told_value):
            return self._value()
        if self._stop_reason is not None:
            raise self.run.preempted(self._stop_reason)
        raise failure(code)

    def _await_stop(self) -> None:
        """SLURM's signals reach the program, too, and it may have stopped before anybody told us to."""
        until_s = clock.awake_s() + STOP_WAIT_S
        while self.run.stop_reason is None and clock.awake_s() < until_s:
            self.run.poll()
            time.sleep(POLL_S)
        self._stop_reason = self._stop_reason or self.run.stop_reason

    def _value(self) -> float:
        value = self.run.last_value if self.position.value is None else self.position.value
        if value is None:
            raise BadValue(
                "the program ended without a value",
                why=f"it reported neither {self.run.spec.metric!r} (sweep.metric) nor a value",
                do=f'Let it print SWEEPER {{"value": …}}, or a row with "{self.run.spec.metric}".',
            )
        return value

    # --- what it says ----------------------------------------------------------------------

    def _hear(self, line: bytes) -> None:
        try:
            self._act(parse(line, metric=self.run.spec.metric))
        except BadLine as error:
            shown = line.decode(errors="replace").strip()
            self._complain(f"cannot be used, {error}: {shown[:_MAX_SHOWN]}")

    def _act(self, said: Said) -> None:
        if isinstance(said, Row):
            self._log(said)
        elif isinstance(said, Ready):
            self._save(said.step)
        elif isinstance(said, Result):
            self.position.value, self._has_told_value = said.value, True

    def _log(self, row: Row) -> None:
        if row.step < self.position.step:
            raise BadLine(f"steps never go back, and step {self.position.step} was reported")
        if self._pruned is not None:
            return
        self.position.step = row.step
        if self.run.spec.metric in row.values:
            self.position.note_best(row.values[self.run.spec.metric], direction=self.run.spec.direction)
        try:
            self.run.log(row.step, row.values)
        except TrialPruned as stop:
            self._pruned = stop
            self._ask_to_stop(str(stop))

    def _complain(self, text: str) -> None:
        """In the attempt's log; in the worker's only so often."""
        _say(text)
        self._num_complaints += 1
        if self._num_complaints <= MAX_COMPLAINTS:
            self.run.complain(f"a line of the program {text}")

    # --- checkpoints -----------------------------------------------------------------------

    def _save(self, step: int) -> None:
        """Commit the program's files, and answer. A refusal costs the program nothing but this one."""
        if step < self.position.step:
            self.program.answer(f"{REFUSED} step {self.position.step} was reported already")
            raise BadLine(f"the checkpoint comes too late, step {self.position.step} was reported before it")
        self.position.step = step
        if step == self.position.saved_step:  # it is there, and stays as it is
            self.program.answer(OK)
            return
        try:
            self._commit(step)
        except (OSError, NotTaken) as error:
            text = f"checkpoint of step {step} could not be saved: {error}; the older one stands"
            _say(text)
            self.run.complain(text)
            self.program.answer(f"{REFUSED} {' '.join(str(error).split())}")
        else:
            self.position.saved_step = step
            self.program.answer(OK)

    def _commit(self, step: int) -> None:
        run = self.run
        offset = run.sync_metrics()
        value = run.last_value
        is_finite = value is not None and math.isfinite(value)
        draft = run.plan(step, value=value if is_finite else None).draft()
        try:
            names = files.take(draft, self.directory, reserved=_RESERVED, alive=lambda: run.progress(step))
            state = json.dumps(self._counters(offset, names), indent=2, sort_keys=True)
            draft.add_bytes(STATE_FILE, state.encode())
            run.metrics.ensure_in_place()
            run.commit(draft)
        except (OSError, NotTaken):
            draft.discard()
            raise

    def _counters(self, metrics_offset: int, names: Mapping[str, str]) -> dict[str, Any]:
        from omegaconf import OmegaConf

        return {
            "schema_version": 1,
            "stage": STAGE,
            "global_step": self.position.step,
            "best_loss": self.position.best_value,
            "metrics_offset": metrics_offset,
            # Not resolved: an interpolation may be a secret's.
            "args": OmegaConf.to_container(self.run.config.trainer, resolve=False),
            "metadata": {
                "files": dict(names),
                "last_report": self.run.last_report,
                "value": self.position.value,
            },
        }


def failure(code: int) -> TrainingFailed:
    """The error that says how a program ended that did not end well."""
    is_lost = code < 0 and signal_outcome(-code, was_oom_killed=False) is Outcome.LOST
    return TrainingFailed(f"the program ended with {processes.ending_of(code)}", is_lost=is_lost)


def _pass_on(output: bytes) -> None:
    """What it prints for people, into the attempt's log. A full disk there ends no training."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        os.write(1, output)


def _say(text: str) -> None:
    print(f"[COMMAND] {text}", flush=True)


def _plain(container: Any) -> dict[str, Any]:
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
