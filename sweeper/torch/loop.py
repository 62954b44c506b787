"""The resumable loop: position, cadence of checkpoints, preemption, exact restore."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from sweeper import checkpoints, clock
from sweeper.errors import CheckpointRefused
from sweeper.torch.order import OrderedLoader
from sweeper.torch.state import (
    check_architecture,
    check_restorable,
    load_bytes,
    rng_state,
    saves,
    set_rng_state,
)
from sweeper.trainer.run import NoValidCheckpoint, Run

MODEL_FILE = "model.pth"
OPTIMIZER_FILE = "optimizer.pt"
RNG_FILE = "rng_state.pt"
STATE_FILE = "state.json"
STAGE = "train"


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
    """
    loop = Loop(run, model=model, loader=loader, parts={k: v for k, v in parts.items() if v is not None})
    loop._restore()
    run.at_end(loop._save_last)
    return loop


class Loop:
    """Steps through the data exactly once, across any number of interruptions.

    Attributes:
        step: Optimizer updates so far, the one in progress included; never reset.
        epoch: The current pass over the data, from 0.
        step_in_epoch: Batches of this epoch, the one in progress included.
        total_steps: Where the loop ends; 0 before `batches`.
        best_value: Best reported value of the sweep's metric so far.
    """

    def __init__(
        self, run: Run, *, model: torch.nn.Module, loader: DataLoader[Any], parts: Mapping[str, Any]
    ) -> None:
        self.step = self.epoch = self.step_in_epoch = self.total_steps = 0
        self.best_value: float | None = None
        self._run = run
        self._model = model
        self._parts = dict(parts)
        self._loader = OrderedLoader(loader, seed=run.seed)
        self._rng: dict[str, Any] | None = None
        self._last_report: tuple[int, float] | None = None
        self._saved_step = 0
        self._saved_at_s = clock.awake_s()
        self._row: dict[str, Any] = {}
        self._is_replaying = False  # between a restore and the first batch: reported already
        self._is_asked_to_save = False
        self._has_saved = False
        self._every_steps = run.spec.checkpoint.get("every_n_steps")
        self._every_s = run.spec.checkpoint.get("every_s")

    # --- the user's side -------------------------------------------------------------------

    @property
    def is_epoch_end(self) -> bool:
        """Whether the batch in progress is the last of its epoch."""
        return self.step_in_epoch == len(self._loader) or self.step == self.total_steps

    def batches(self, *, epochs: int, max_steps: int | None = None) -> Iterator[Any]:
        """Yield batches from the exact position; between two of them lies the step boundary.

        Args:
            epochs: Passes over the data.
            max_steps: Stop after so many optimizer updates, if that is sooner.

        Raises:
            Preempted: The worker asked to stop; everything is checkpointed.
            TrialPruned: The pruner stopped the trial.
        """
        whole = epochs * len(self._loader)
        self.total_steps = whole if max_steps is None else min(whole, max_steps)
        self._run.start(step=self.step, total_steps=self.total_steps)
        self._run.progress(self.step, total_steps=self.total_steps)
        self._is_replaying = False
        if self._rng is not None:
            set_rng_state(self._rng)
            self._rng = None
            if self._last_report is not None:
                self._run.judge(*self._last_report)
        while self.step < self.total_steps:
            for batch in self._loader.epoch(self.epoch, first_batch=self.step_in_epoch):
                self.step += 1
                self.step_in_epoch += 1
                yield batch
                self._boundary()
                if self.step == self.total_steps:
                    return

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
        if self.step == self._saved_step:  # outside the loop there is no boundary to come
            self._flush_row()

    def save(self) -> None:
        """Ask for a checkpoint at the boundary of this step, whatever the cadence says."""
        self._is_asked_to_save = True

    def _note_best(self, value: float) -> None:
        if value != value:
            return
        better = min if self._run.spec.direction == "minimize" else max
        self.best_value = value if self.best_value is None else better(self.best_value, value)

    # --- the step boundary -----------------------------------------------------------------

    def _boundary(self) -> None:
        row_epoch = self.epoch
        if self.step_in_epoch == len(self._loader):
            self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self._flush_row(epoch=row_epoch)
        self._run.progress(self.step)
        reason = self._run.stop_reason
        if reason or self._is_due():
            self._save()
        if reason:
            raise self._run.preempted(reason)

    def _is_due(self) -> bool:
        if self.step == self.total_steps or self._is_asked_to_save:
            return True
        if self._every_steps and self.step - self._saved_step >= self._every_steps:
            return True
        return self._every_s is not None and clock.awake_s() - self._saved_at_s >= self._every_s

    def _flush_row(self, *, epoch: int | None = None) -> None:
        row, self._row = self._row, {}
        if row:
            self._run.log(self.step, {"epoch": self.epoch if epoch is None else epoch, **row})

    # --- saving and restoring --------------------------------------------------------------

    def _save(self, *, is_last: bool = False) -> None:
        """Commit a checkpoint of this step, unless it is there already.

        Raises:
            Fenced: The run belongs to somebody else.
            ConfigError: What was passed to `resumable` could never be restored.
            OSError: The disk refused and this was the last step; earlier ones are tried again.
        """
        self._is_asked_to_save = False
        if self.step == self._saved_step:
            return
        try:
            self._commit()
        except OSError as error:
            if is_last or self.step == self.total_steps:
                raise
            text = f"checkpoint of step {self.step} could not be saved: {error}; the older one stands"
            print(f"[CHECKPOINT] {text}", flush=True)
            self._run.complain(text)
        else:
            self._saved_step = self.step
        self._saved_at_s = clock.awake_s()

    def _save_last(self) -> None:
        """The last step of a run is always checkpointed: also after `break`, or when pruned."""
        self._flush_row()
        self._save(is_last=True)

    def _commit(self) -> None:
        run = self._run
        offset = run.sync_metrics()
        draft = run.draft(self.step)
        try:
            draft.add(MODEL_FILE, saves(self._model.state_dict()))
            draft.add(OPTIMIZER_FILE, saves({name: part.state_dict() for name, part in self._parts.items()}))
            draft.add(RNG_FILE, saves(rng_state()))
            draft.add_bytes(STATE_FILE, json.dumps(self._counters(offset), indent=2, sort_keys=True).encode())
            if not self._has_saved:
                check_restorable(draft.directory, (MODEL_FILE, OPTIMIZER_FILE))
            run.metrics.ensure_in_place()
            run.commit(draft)
            self._has_saved = True
        except OSError:
            draft.discard()
            raise

    def _counters(self, metrics_offset: int) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "stage": STAGE,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "global_step": self.step,
            "best_loss": self.best_value,
            "metrics_offset": metrics_offset,
            "args": _plain(self._run.config),
            "metadata": {
                "torch": torch.__version__,
                "batches_per_epoch": len(self._loader),
                "last_report": self._run.last_report,
            },
        }

    def _restore(self) -> None:
        run = self._run
        refused: list[Path] = []
        for directory in run.candidates():
            try:
                self._load(directory)
            except CheckpointRefused as error:
                refused.append(directory)
                run.refuse(checkpoints.step_of(directory), str(error))
                continue
            run.resumed(self.step, refused=refused)
            self._is_replaying = True
            return
        if run.was_ever_committed():
            raise NoValidCheckpoint(f"no valid checkpoint ({len(refused)} refused)")

    def _load(self, directory: Path) -> None:
        """Verify, unpickle and check everything before the first object is changed."""
        manifest, contents = self._run.read(directory)
        try:
            state = json.loads(contents[STATE_FILE])
            model, parts, rng = (
                load_bytes(name, contents[name]) for name in (MODEL_FILE, OPTIMIZER_FILE, RNG_FILE)
            )
            self._check(state, model, parts)
            if manifest.config_digest != self._run.spec.config_digest:
                raise CheckpointRefused("it was made with another config.yaml")
            for name, part in self._parts.items():  # the model last: it has been checked, it will fit
                part.load_state_dict(parts[name])
            self._model.load_state_dict(model)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointRefused(
                "it does not fit this training", why=f"{type(error).__name__}: {error}"
            ) from error
        self.step = self._saved_step = manifest.step
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        self.best_value = state["best_loss"]
        self._rng = rng
        step_and_value = state["metadata"].get("last_report")
        self._last_report = (
            None if step_and_value is None else (int(step_and_value[0]), float(step_and_value[1]))
        )
        self._run.open_metrics(state["metrics_offset"])

    def _check(self, state: dict[str, Any], model: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
        if difference := _difference(state["args"], _plain(self._run.config)):
            raise CheckpointRefused(difference)
        check_architecture(model, self._model)
        if set(parts) != set(self._parts):
            raise CheckpointRefused(f"it holds {sorted(parts)}, this training has {sorted(self._parts)}")
        if state["metadata"]["batches_per_epoch"] != len(self._loader):
            raise CheckpointRefused(
                f"it counts {state['metadata']['batches_per_epoch']} batches an epoch, the loader has {len(self._loader)}"
            )


def _difference(saved: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    for name in sorted(set(saved) | set(present)):
        if saved.get(name) != present.get(name):
            return f"the checkpoint has {name} {saved.get(name)}, the configuration has {present.get(name)}"
    return ""


def _plain(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    if config is None:
        return {}
    plain = OmegaConf.to_container(config.trainer, resolve=True)
    assert isinstance(plain, dict)
    return json.loads(json.dumps(plain))  # type: ignore[no-any-return]


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
