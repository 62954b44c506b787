"""The resumable loop: position, cadence of checkpoints, preemption, exact restore."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch.utils.data import DataLoader

from sweeper import clock
from sweeper.errors import CheckpointError
from sweeper.torch.cadence import Cadence
from sweeper.torch.leaving import consumers, is_unwound
from sweeper.torch.restore import restore
from sweeper.torch.saves import Saves
from sweeper.torch.state import check_restorable, kinds, set_rng_state
from sweeper.torch.training import MODEL_FILE, STATE_FILE, Training
from sweeper.trainer.commits import Plan
from sweeper.trainer.run import Run, TrialPruned, say
from sweeper.trainer.saver import Done

STAGE = "train"
STATE_VERSION = 1


def resumable(run: Run, *, model: torch.nn.Module, loader: DataLoader[Any], **parts: Any) -> Loop:
    """Make a training resumable, and restore it if this run was interrupted.

    Args:
        run: What the training function got.
        model: Its `state_dict` becomes model.pth.
        loader: A DataLoader with `batch_size` and `shuffle`; its order is made from the run's seed.
        parts: Anything else with `state_dict` and `load_state_dict`: optimizer, scheduler, scaler,
            EMA. None is skipped.

    Returns:
        The loop, standing at the step it resumed from, or at 0.

    Raises:
        NoValidCheckpoint: Checkpoints were committed once, and none can be used.
        ConfigError: The loader cannot be resumed, or checkpoint.export_weights cannot be filled in.
    """
    loop = Loop(run, model=model, loader=loader, parts={k: v for k, v in parts.items() if v is not None})
    loop._restore()
    run.at_end(loop._save_last)
    return loop


class Decision(Enum):
    """What all ranks do at a step boundary."""

    GO_ON = "go on"
    SAVE = "save"
    FINISH = "finish"
    STOP = "stop"
    PRUNE = "prune"
    RAISE = "raise"


class Loop:
    """Steps through the data exactly once, across any number of interruptions.

    Attributes:
        step: Optimizer updates so far, the one in progress included; never reset.
        epoch: The current pass over the data, from 0.
        step_in_epoch: Batches of this epoch, the one in progress included.
        total_steps: Where the loop ends; 0 before `batches`, and when the data has no length.
        is_update: Whether the batch in progress completes an optimizer update: always, unless
            `batches(accumulate=…)` says otherwise.
        best_value: Best reported value of the sweep's metric so far.
    """

    def __init__(
        self, run: Run, *, model: torch.nn.Module, loader: DataLoader[Any], parts: Mapping[str, Any]
    ) -> None:
        self.step = self.epoch = self.step_in_epoch = self.total_steps = 0
        self.is_update = True
        self._is_at_end = False  # the batch in progress is known to be the last of its epoch
        self.best_value: float | None = None
        self._run = run
        self._training = Training(run, model=model, loader=loader, parts=parts)
        self._ranks, self._loader = self._training.ranks, self._training.loader
        self._last_report: tuple[int, float] | None = None
        self._is_in_step = False  # a batch was handed out, and no exception has ended the loop since
        self._was_left = False  # by `break`, in this attempt
        self._is_closed = False  # by `break`, in an attempt before
        self._num_accumulated = 0  # batches whose gradients the next update will use
        self._row: dict[str, Any] = {}
        self._is_replaying = False  # between a restore and the first batch: reported already
        self._cadence = Cadence.of(run.spec.checkpoint, mtbf_s=run.spec.mtbf_s)
        self._saves = Saves(run, is_beside=bool(run.spec.checkpoint.get("async_save", True)))
        self._saved: tuple[int, int, bool] = (0, 0, False)  # position of the last save that was begun
        self._saved_at_s = clock.awake_s()
        self._is_asked_to_save = self._is_asked_to_pin = self._is_overdue = False
        self._restorable: set[type] = set()  # types known to come back from a file
        self._is_pinning = False  # the save in flight is a pinned one
        self._exports = self._export_paths()

    # --- the user's side -------------------------------------------------------------------

    @property
    def is_epoch_end(self) -> bool:
        """Whether the batch in progress is the last of its epoch."""
        return self._is_at_end or self._is_last_step

    def batches(self, *, epochs: int, max_steps: int | None = None, accumulate: int = 1) -> Iterator[Any]:
        """Yield batches from the exact position; between two of them lies the step boundary.

        Args:
            epochs: Passes over the data.
            max_steps: Stop after so many optimizer updates, if that is sooner.
            accumulate: Batches an optimizer update; `is_update` says when to make it. The last
                update of an epoch may have fewer.

        A `break` is the end of the training, also for an attempt that is started afterwards: it gets no
        batch any more. Batches of an update that is not complete do not count then.

        Raises:
            Preempted: The worker asked to stop; everything is checkpointed.
            TrialPruned: The pruner stopped the trial.
        """
        self.total_steps = self._loader.num_updates(accumulate) * epochs
        if self._training.has_changed_ranks and self.total_steps:  # what is behind was counted in other steps
            epochs_left = epochs - self.epoch - 1
            left = self._loader.updates_left(accumulate) + self._loader.num_updates(accumulate) * epochs_left
            self.total_steps = self.step + left
        if max_steps is not None:
            self.total_steps = min(self.total_steps or max_steps, max_steps)
        if self._is_closed:
            self.total_steps = self.step
        if self._is_in_step:
            self._leave()
        self._was_left = self._is_in_step = False
        self._run.start(step=self.step, total_steps=self.total_steps or None)
        self._run.progress(self.step, total_steps=self.total_steps or None)
        self._is_replaying = False
        if self._training.rng is not None:
            set_rng_state(self._training.rng)
            self._training.rng = None
            if self._last_report is not None:
                self._run.judge(*self._last_report)
        while self.epoch < epochs and not self._is_done:
            epoch = self.epoch
            for batch in self._loader.epoch(epoch):
                self.step_in_epoch += 1
                self._num_accumulated += 1
                self._is_at_end = self._loader.advance()
                self.is_update = self._num_accumulated >= accumulate or self._is_at_end
                self.step += self.is_update
                self._is_in_step = True
                by = consumers(sys._getframe().f_back)
                try:
                    yield batch
                except GeneratorExit:
                    self._is_in_step = not is_unwound(sys._getframe().f_back, by)
                    raise
                self._is_in_step = False
                self._boundary()
                if self._is_done:
                    return
            if self.epoch == epoch:  # the data itself has said that it is at its end
                self._next_epoch()

    def report(self, **metrics: Any) -> None:
        """Log numbers of this step: metrics log, W&B, TensorBoard, and the pruner.

        Several calls in one step make one row, written at the step boundary; there the pruner is
        asked, if the row holds the sweep's metric. Tensors and NumPy numbers are read as floats.
        """
        if self._is_replaying:
            return
        self._row.update({name: _number(value) for name, value in metrics.items()})
        if self._run.spec.metric in metrics:
            self._note_best(float(self._row[self._run.spec.metric]))
        if self._position == self._saved:  # outside the loop no boundary comes
            self._flush_row()

    @property
    def is_saving(self) -> bool:
        """Whether a save is written beside the training at this moment."""
        return self._saves.is_busy

    @property
    def saves(self) -> Saves:
        """What the last save cost: `blocked_s` it kept the loop waiting, `took_s` in all."""
        return self._saves

    def save(self, *, pin: bool = False) -> None:
        """Ask for a checkpoint at the boundary of this step, whatever the cadence says.

        Args:
            pin: It is never removed.
        """
        self._is_asked_to_save = True
        self._is_asked_to_pin |= pin

    def _note_best(self, value: float) -> None:
        if value != value:
            return
        better = min if self._run.spec.direction == "minimize" else max
        self.best_value = value if self.best_value is None else better(self.best_value, value)

    # --- the step boundary -----------------------------------------------------------------

    @property
    def _is_last_step(self) -> bool:
        return self.step == self.total_steps and self.is_update and self.step > 0

    @property
    def _is_done(self) -> bool:
        is_there = bool(self.total_steps) and self.step >= self.total_steps
        return self._is_closed or (is_there and self._num_accumulated == 0)

    def _next_epoch(self) -> None:
        self.epoch, self.step_in_epoch, self._loader.position = self.epoch + 1, 0, 0

    def _leave(self) -> None:
        """The loop was left by `break`: the training is over."""
        self._is_in_step, self._was_left = False, True
        self._num_accumulated = 0
        if self._is_at_end and not self._loader.is_stream:
            self._next_epoch()

    def _boundary(self) -> None:
        if self.is_update:
            self._num_accumulated = 0
        row_epoch, is_epoch_end = self.epoch, self.is_epoch_end
        if self._is_at_end and not self._loader.is_stream:
            self._next_epoch()
        decision, reason = self._agree(row_epoch, is_epoch_end=is_epoch_end)
        if decision is Decision.SAVE:
            self._save()
        elif decision is Decision.FINISH:
            self._save(wait=True, is_last=True)
        elif decision is Decision.STOP:
            self._save(wait=True)
            raise self._run.preempted(reason)

    def _agree(self, row_epoch: int, *, is_epoch_end: bool) -> tuple[Decision, str]:
        """What all ranks do at this boundary. Raises what rank 0 raised, on all of them."""
        if self._ranks.world_size == 1:
            return self._decide(row_epoch, is_epoch_end=is_epoch_end)
        error: BaseException | None = None
        answer = (Decision.GO_ON, "")
        if self._ranks.is_first:
            try:
                answer = self._decide(row_epoch, is_epoch_end=is_epoch_end)
            except BaseException as raised:  # noqa: BLE001 - the others must not wait for ever
                is_pruned = isinstance(raised, TrialPruned)
                error, answer = raised, (Decision.PRUNE if is_pruned else Decision.RAISE, str(raised))
        decision, reason = self._ranks.from_first(answer, at="between two steps")
        if error is not None:
            raise error
        if decision is Decision.PRUNE:
            raise TrialPruned(reason)
        if decision is Decision.RAISE:
            raise self._run.preempted(f"rank 0: {reason}")
        return decision, reason

    def _decide(self, row_epoch: int, *, is_epoch_end: bool) -> tuple[Decision, str]:
        if self.is_update:
            self._flush_row(epoch=row_epoch)
        self._run.progress(self.step)
        self._settle(self._saves.poll())
        if reason := self._run.stop_reason:
            return Decision.STOP, reason
        if self._is_last_step:
            return Decision.FINISH, ""
        if self.is_update and self._is_due(is_epoch_end=is_epoch_end):
            if self._is_asked_to_save:  # this very step is meant
                self._settle(self._saves.wait())
            if not self._saves.is_busy:
                return Decision.SAVE, ""
        return Decision.GO_ON, ""

    def _is_due(self, *, is_epoch_end: bool) -> bool:
        self._is_overdue |= self._cadence.is_due(
            steps=self.step - self._saved[0],
            seconds=clock.awake_s() - self._saved_at_s,
            is_epoch_end=is_epoch_end,
            blocked_s=self._saves.blocked_s,
            took_s=self._saves.took_s,
        )
        return self._is_asked_to_save or self._is_overdue

    def _flush_row(self, *, epoch: int | None = None) -> None:
        row, self._row = self._row, {}
        if row:
            self._run.log(self.step, {"epoch": self.epoch if epoch is None else epoch, **row})

    # --- saving ----------------------------------------------------------------------------

    def _save(self, *, wait: bool = False, is_last: bool = False) -> None:
        """Save this step, unless that was begun already; with `wait`, until it is committed.

        Raises:
            Fenced: The run belongs to somebody else.
            ConfigError: What was passed to `resumable` could never be restored.
            CheckpointError: The disk refused and this was the last step; earlier ones are tried again.
            SaverLost: The saver was killed.
        """
        if wait:
            self._settle(self._saves.wait())  # if it has failed, and was this step's, here is another try
        is_wanted = self._position != self._saved or self._is_asked_to_pin
        if self._ranks.from_first(is_wanted, at="at the end" if is_last else "in a save"):
            states = self._training.states(has_gradients=self._num_accumulated > 0)  # collective
            error = self._save_states(states, wait=wait) if self._ranks.is_first else None
            if error is not None and is_last:
                raise CheckpointError(
                    f"the checkpoint of the last step, {self.step}, could not be saved",
                    why=str(error),
                    do=f"{_remedy(error)} Then run it again: it goes on from the checkpoint before.".strip(),
                ) from error

    def _save_states(self, states: dict[str, Any], *, wait: bool) -> OSError | None:
        """Begin a save on rank 0, or see it through. Returns why the disk refused, which was said by then."""
        try:
            offset = self._run.settle_metrics()
            has_begun = self._saves.begin(
                self._plan(), self._files(states, offset), wait=wait, is_asked=self._is_asked_to_save
            )
        except OSError as error:
            self._complain(error, step=self.step)
            return error
        if not has_begun:
            return None  # room is being made; still due at the next step
        self._saved, self._saved_at_s = self._position, clock.awake_s()
        self._is_pinning = self._is_asked_to_pin
        self._is_asked_to_save = self._is_asked_to_pin = self._is_overdue = False
        return self._settle(self._saves.wait() if wait else self._saves.poll())

    @property
    def _position(self) -> tuple[int, int, bool]:
        """Updates, batches of the next one, and whether the training was left here for good."""
        return self.step, self._num_accumulated, self._is_closed or self._was_left

    def _settle(self, done: Done | None) -> OSError | None:
        """Take note of a save that has ended. Returns why the disk refused; raises what else there was."""
        if done is None or done.error is None:
            return None
        if not isinstance(done.error, OSError):
            raise done.error
        self._run.metrics.distrust()
        self._is_asked_to_pin |= self._is_pinning
        self._saved = (0, 0, False) if self._saved[0] == done.step else self._saved
        self._complain(done.error, step=done.step)
        return done.error

    def _complain(self, error: OSError, *, step: int) -> None:
        text = f"checkpoint of step {step} could not be saved: {error}; the older one stands. {_remedy(error)}".strip()
        say(f"[CHECKPOINT] {text}")
        self._run.complain(text)
        self._saved_at_s = clock.awake_s()
        self._is_asked_to_save = self._is_overdue = False

    def _save_last(self) -> None:
        """The last step of a run is always checkpointed: also after `break`, or when pruned."""
        if self._is_in_step:
            self._leave()
        self._flush_row()
        self._save(wait=True, is_last=True)
        self._saves.close()

    def _plan(self) -> Plan:
        value = self._run.last_value
        finite = value if value is not None and abs(value) < float("inf") else None
        return self._run.plan(
            self.step, value=finite, is_pinned=self._is_asked_to_pin, exports=dict(self._exports)
        )

    def _export_paths(self) -> dict[str, str]:
        pattern = self._run.spec.checkpoint.get("export_weights")
        return {} if not pattern else {MODEL_FILE: self._run.export_path(str(pattern), stage=STAGE)}

    def _files(self, states: dict[str, Any], metrics_offset: int) -> dict[str, Any]:
        if unknown := kinds(states) - self._restorable:
            check_restorable(states)
            self._restorable |= unknown
        counters = json.dumps(self._counters(metrics_offset), indent=2, sort_keys=True)
        return {**states, STATE_FILE: counters.encode()}

    def _counters(self, metrics_offset: int) -> dict[str, Any]:
        counters = {
            "schema_version": STATE_VERSION,
            "stage": STAGE,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "global_step": self.step,
            "best_loss": self.best_value,
            "metrics_offset": metrics_offset,
            "args": self._training.args,
            **({"is_over": True} if self._is_closed or self._was_left else {}),
            "metadata": {
                "torch": torch.__version__,
                "batches_per_epoch": self._loader.num_batches,
                "last_report": self._run.last_report,
            },
        }
        if self._num_accumulated:
            counters["accumulated"] = {
                "batches": self._num_accumulated,
                "row": list(self._row.items()),
            }  # in its order
        if self._ranks.world_size > 1:
            counters["ranks"] = {"world_size": self._ranks.world_size}
        if self._ranks.world_size > 1 or self._training.has_changed_ranks:
            counters["position"] = self._loader.position
        return counters

    def _restore(self) -> None:
        state = restore(self._run, self._training)
        if state is None:
            return
        self.step = state["global_step"]
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        accumulated = state.get("accumulated", {"batches": 0, "row": {}})
        self._num_accumulated, self._row = accumulated["batches"], dict(accumulated["row"])
        self._is_closed = state.get("is_over", False)
        if self._is_closed and self._ranks.is_first:
            say(
                f"[RESUME] {self._run.run_id}: it was ended at step {self.step} by a break; there is nothing left to train"
            )
        self._saved = self._position
        self.best_value = state["best_loss"]
        step_and_value = state["metadata"].get("last_report")
        self._last_report = (
            None if step_and_value is None else (int(step_and_value[0]), float(step_and_value[1]))
        )
        self._is_replaying = True


def _remedy(error: OSError) -> str:
    """What a person can do about a disk that refuses."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Make room on that disk."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Make that directory writable."
    return "Look after that disk."


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
