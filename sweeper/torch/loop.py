"""The resumable loop: position, cadence of checkpoints, preemption, exact restore."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from sweeper import checkpoints, clock
from sweeper.checkpoints import Content, Manifest
from sweeper.errors import CheckpointRefused, ConfigError, Misfit
from sweeper.torch.cadence import Cadence
from sweeper.torch.order import OrderedLoader, derived_seed, seed_generators
from sweeper.torch.ranks import Ranks, is_sharded, put_whole_states, rank_files, unwrapped, whole_states
from sweeper.torch.saves import Saves
from sweeper.torch.state import (
    check_architecture,
    check_restorable,
    gradients,
    load,
    rng_state,
    set_gradients,
    set_rng_state,
)
from sweeper.trainer.commits import Plan
from sweeper.trainer.main import is_out_of_memory
from sweeper.trainer.run import NoValidCheckpoint, Run, TrialPruned, say
from sweeper.trainer.saver import Done

MODEL_FILE = "model.pth"
OPTIMIZER_FILE = "optimizer.pt"
RNG_FILE = "rng_state.pt"
GRADIENTS_FILE = "gradients.pt"
DATA_FILE = "data.pt"
STATE_FILE = "state.json"
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
        self._ranks = Ranks.here(wait_s=run.spec.ranks_s)
        self._model = unwrapped(model)
        self._parts = dict(parts)
        self._is_sharded = is_sharded(self._model)
        self._loader = OrderedLoader(
            loader, seed=run.seed, rank=self._ranks.rank, world_size=self._ranks.world_size
        )
        self._rng: dict[str, Any] | None = None
        self._last_report: tuple[int, float] | None = None
        self._num_accumulated = 0  # batches whose gradients the next update will use
        self._row: dict[str, Any] = {}
        self._is_replaying = False  # between a restore and the first batch: reported already
        self._cadence = Cadence.of(run.spec.checkpoint, mtbf_s=run.spec.mtbf_s)
        self._saves = Saves(run, is_beside=bool(run.spec.checkpoint.get("async_save", True)))
        self._saved = (0, 0)  # step and batches accumulated of the last save that was begun
        self._saved_at_s = clock.awake_s()
        self._is_asked_to_save = self._is_asked_to_pin = self._is_overdue = self._has_saved = False
        self._is_pinning = False  # the save in flight is a pinned one
        self._exports = self._export_paths()
        self._has_changed_ranks = False

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

        Raises:
            Preempted: The worker asked to stop; everything is checkpointed.
            TrialPruned: The pruner stopped the trial.
        """
        self.total_steps = self._loader.num_updates(accumulate) * epochs
        if self._has_changed_ranks and self.total_steps:  # what is behind was counted in other steps
            epochs_left = epochs - self.epoch - 1
            left = self._loader.updates_left(accumulate) + self._loader.num_updates(accumulate) * epochs_left
            self.total_steps = self.step + left
        if max_steps is not None:
            self.total_steps = min(self.total_steps or max_steps, max_steps)
        self._run.start(step=self.step, total_steps=self.total_steps or None)
        self._run.progress(self.step, total_steps=self.total_steps or None)
        self._is_replaying = False
        if self._rng is not None:
            set_rng_state(self._rng)
            self._rng = None
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
                yield batch
                self._boundary()
                if self._is_done:
                    return
            if self.epoch == epoch:  # the data had no length to know its end by
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
        if (self.step, self._num_accumulated) == self._saved:  # outside the loop no boundary comes
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
        return bool(self.total_steps) and self.step >= self.total_steps and self._num_accumulated == 0

    def _next_epoch(self) -> None:
        self.epoch, self.step_in_epoch, self._loader.position = self.epoch + 1, 0, 0

    def _boundary(self) -> None:
        if self.is_update:
            self._num_accumulated = 0
        row_epoch, is_epoch_end = self.epoch, self.is_epoch_end
        if self._is_at_end:
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
        decision, reason = self._ranks.from_first(answer)
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
        self._settle_save(self._saves.poll())
        if reason := self._run.stop_reason:
            return Decision.STOP, reason
        if self._is_last_step:
            return Decision.FINISH, ""
        if self.is_update and self._is_due(is_epoch_end=is_epoch_end):
            if self._is_asked_to_save:  # this very step is meant
                self._settle_save(self._saves.wait())
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
            OSError: The disk refused and this was the last step; earlier ones are tried again.
            SaverLost: The saver was killed.
        """
        if wait:
            self._settle_save(self._saves.wait(), is_last=is_last and self._saved == self._position)
        if self._ranks.from_first(self._position != self._saved):
            states = self._states()  # collective
            if not self._ranks.is_first:
                return
            try:
                offset = self._run.settle_metrics()
                has_begun = self._saves.begin(
                    self._plan(), self._files(states, offset), wait=wait, is_asked=self._is_asked_to_save
                )
            except OSError as error:
                self._complain(error, is_last=is_last or self._is_last_step)
                return
            if not has_begun:
                return  # room is being made; still due at the next step
            self._saved, self._saved_at_s = self._position, clock.awake_s()
            self._is_pinning = self._is_asked_to_pin
            self._is_asked_to_save = self._is_asked_to_pin = self._is_overdue = False
            self._settle_save(self._saves.wait() if wait else self._saves.poll(), is_last=is_last)

    @property
    def _position(self) -> tuple[int, int]:
        return self.step, self._num_accumulated

    def _settle_save(self, done: Done | None, *, is_last: bool = False) -> None:
        """Take note of a save that has ended. Raises what it raised, unless it may be tried again."""
        if done is None or done.error is None:
            return
        if not isinstance(done.error, OSError):
            raise done.error
        self._run.metrics.distrust()
        self._is_asked_to_pin |= self._is_pinning
        self._saved = (0, 0) if self._saved[0] == done.step else self._saved
        self._complain(done.error, is_last=is_last or self._is_last_step, step=done.step)

    def _complain(self, error: OSError, *, is_last: bool, step: int | None = None) -> None:
        if is_last:
            raise error
        at = self.step if step is None else step
        text = f"checkpoint of step {at} could not be saved: {error}; the older one stands"
        say(f"[CHECKPOINT] {text}")
        self._run.complain(text)
        self._saved_at_s = clock.awake_s()
        self._is_asked_to_save = self._is_overdue = False

    def _save_last(self) -> None:
        """The last step of a run is always checkpointed: also after `break`, or when pruned."""
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

    def _states(self) -> dict[str, Any]:
        """The states of all ranks, on rank 0. Collective."""
        if self._is_sharded:
            model, parts = whole_states(self._model, self._parts)
        elif self._ranks.is_first:
            model = self._model.state_dict()
            parts = {name: part.state_dict() for name, part in self._parts.items()}
        else:
            model, parts = {}, {}
        files: dict[str, Any] = {MODEL_FILE: model, OPTIMIZER_FILE: parts}
        own = {"rng": rng_state(), "gradients": gradients(self._modules()) if self._num_accumulated else None}
        everybody = self._ranks.gathered(own)
        for name, rank in zip(rank_files(RNG_FILE, len(everybody)), everybody, strict=True):
            files[name] = rank["rng"]
        if self._num_accumulated:
            for name, rank in zip(rank_files(GRADIENTS_FILE, len(everybody)), everybody, strict=True):
                files[name] = rank["gradients"]
        return files

    def _files(self, states: dict[str, Any], metrics_offset: int) -> dict[str, Any]:
        if data := self._loader.state_dict():
            states[DATA_FILE] = data
        if not self._has_saved:
            names = [name for name in (MODEL_FILE, OPTIMIZER_FILE, DATA_FILE) if name in states]
            check_restorable({name: states[name] for name in names})
            self._has_saved = True
        counters = json.dumps(self._counters(metrics_offset), indent=2, sort_keys=True)
        return {**states, STATE_FILE: counters.encode()}

    def _modules(self) -> dict[str, torch.nn.Module]:
        parts = {name: part for name, part in self._parts.items() if isinstance(part, torch.nn.Module)}
        return {"model": self._model, **parts}

    def _counters(self, metrics_offset: int) -> dict[str, Any]:
        counters = {
            "schema_version": STATE_VERSION,
            "stage": STAGE,
            "epoch": self.epoch,
            "step_in_epoch": self.step_in_epoch,
            "global_step": self.step,
            "best_loss": self.best_value,
            "metrics_offset": metrics_offset,
            "args": _plain(self._run.config),
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
        if self._ranks.world_size > 1 or self._has_changed_ranks:
            counters["position"] = self._loader.position
        return counters

    # --- restoring -------------------------------------------------------------------------

    def _restore(self) -> None:
        """Rank 0 names candidates; one that any rank refuses is refused by all."""
        run, ranks = self._run, self._ranks
        refused: list[Path] = []
        last_reason = ""
        unfit: Misfit | None = None
        for directory in ranks.from_first(run.candidates() if ranks.is_first else None):
            reason: str | None = None
            try:
                manifest, state, loaded = self._read(directory)
                self._apply_parts(loaded[OPTIMIZER_FILE])  # the model last: it was checked, it will fit
            except CheckpointRefused as error:
                reason = str(error)
                unfit = unfit or (error if isinstance(error, Misfit) else None)
            if problem := ranks.agreed(reason):
                refused.append(directory)
                last_reason = f"step {checkpoints.step_of(directory)}: {reason or problem}"
                if ranks.is_first:
                    run.refuse(checkpoints.step_of(directory), reason or problem)
                continue
            self._apply(state, loaded)
            run.resumed(manifest, refused=refused)
            self._is_replaying = True
            return
        if unfit is not None:  # sound checkpoints: what has changed is the code, or the machine
            if unfit.__cause__ is not None and is_out_of_memory(unfit.__cause__):
                raise MemoryError(str(unfit))
            raise ConfigError(
                f"no checkpoint of run {run.run_id} fits this training",
                why=last_reason,
                do="Nothing was changed. Put the training back as it was, cancel the run, or start it fresh with resume.mode=never.",
            )
        if ranks.from_first(run.was_ever_committed() if ranks.is_first else None):
            raise NoValidCheckpoint(f"no valid checkpoint ({len(refused)} refused)", why=last_reason)
        if ranks.is_first:
            say(f"[RESUME] {run.run_id}: no checkpoint found, starting fresh")

    def _read(self, directory: Path) -> tuple[Manifest, dict[str, Any], dict[str, Any]]:
        """Verify, unpickle and check everything, before the first object is changed.

        Raises:
            CheckpointRefused: With the reason.
        """
        contents: dict[str, Content] = {}
        try:
            manifest, contents = self._run.read(directory)
            state = json.loads(contents[STATE_FILE].data)
            loaded = {name: load(name, contents[name]) for name in contents if name != STATE_FILE}
            self._check_fit(state, loaded)
            if manifest.config_digest != self._run.spec.config_digest:
                raise CheckpointRefused("it was made with another config.yaml")
        except (KeyError, ValueError, TypeError, RuntimeError, MemoryError) as error:
            raise _unfit(error) from error
        finally:
            for content in contents.values():
                content.close()
        return manifest, state, loaded

    def _apply_parts(self, parts: Mapping[str, Any]) -> None:
        """Put the parts back; sharded ones need all ranks at once. Raises CheckpointRefused."""
        if self._is_sharded:
            return
        try:
            for name, part in self._parts.items():
                part.load_state_dict(parts[name])
        except (KeyError, ValueError, TypeError, RuntimeError, MemoryError) as error:
            raise _unfit(error) from error

    def _apply(self, state: dict[str, Any], loaded: dict[str, Any]) -> None:
        """Put back what all ranks have agreed on."""
        if self._is_sharded:
            put_whole_states(self._model, self._parts, loaded[MODEL_FILE], loaded[OPTIMIZER_FILE])
        else:
            self._model.load_state_dict(loaded[MODEL_FILE])
        saved_size = state.get("ranks", {}).get("world_size", 1)
        self._has_changed_ranks = saved_size != self._ranks.world_size
        mine = dict(enumerate(rank_files(RNG_FILE, saved_size))).get(self._ranks.rank)
        self._rng = loaded[mine] if mine is not None else self._fresh_rng(state["global_step"])
        gradient_file = dict(enumerate(rank_files(GRADIENTS_FILE, saved_size))).get(self._ranks.rank, "")
        if gradient_file in loaded:
            set_gradients(self._modules(), loaded[gradient_file])
        self._take_counters(state, loaded.get(DATA_FILE))
        if self._has_changed_ranks and self._ranks.is_first:
            say(
                f"[RESUME] {self._run.run_id}: from {saved_size} ranks to {self._ranks.world_size}: no sample is repeated or "
                "skipped, but the bits differ from here on from those of an undisturbed run"
            )
        if self._ranks.is_first:
            self._run.open_metrics(state["metrics_offset"])

    def _fresh_rng(self, step: int) -> dict[str, Any]:
        """Generators of a rank that was not there before."""
        seed_generators(derived_seed(self._run.seed, "rank", self._ranks.rank, step))
        return rng_state()

    def _take_counters(self, state: Mapping[str, Any], data: Mapping[str, Any] | None) -> None:
        self.step = state["global_step"]
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        accumulated = state.get("accumulated", {"batches": 0, "row": {}})
        self._num_accumulated, self._row = accumulated["batches"], dict(accumulated["row"])
        self._saved = self._position
        self.best_value = state["best_loss"]
        self._loader.load_state_dict(data)
        self._loader.position = state.get("position", self._loader.position_of(self.step_in_epoch))
        step_and_value = state["metadata"].get("last_report")
        self._last_report = (
            None if step_and_value is None else (int(step_and_value[0]), float(step_and_value[1]))
        )

    def _check_fit(self, state: dict[str, Any], loaded: Mapping[str, Any]) -> None:
        """Raise Misfit when a sound checkpoint is of another training."""
        try:
            self._check(state, loaded[MODEL_FILE], loaded[OPTIMIZER_FILE])
            self._loader.check(loaded.get(DATA_FILE))
        except CheckpointRefused as error:
            raise Misfit(error.what, why=error.why) from error

    def _check(self, state: dict[str, Any], model: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
        if difference := _difference(state["args"], _plain(self._run.config)):
            raise CheckpointRefused(difference)
        made_with, here = state["metadata"]["torch"], torch.__version__
        if made_with.partition(".")[0] != here.partition(".")[0]:
            raise CheckpointRefused(f"it was made with torch {made_with}, this is torch {here}")
        check_architecture(model, self._model)
        if set(parts) != set(self._parts):
            raise CheckpointRefused(f"it holds {sorted(parts)}, this training has {sorted(self._parts)}")
        for name, part in self._parts.items():
            if isinstance(part, torch.nn.Module):
                check_architecture(parts[name], part, name=name)
        saved_size = state.get("ranks", {}).get("world_size", 1)
        if saved_size != self._ranks.world_size:
            self._check_reshardable(state, saved_size)
        elif state["metadata"]["batches_per_epoch"] != self._loader.num_batches:
            raise CheckpointRefused(
                f"it counts {state['metadata']['batches_per_epoch']} batches an epoch, the loader has {self._loader.num_batches}"
            )

    def _check_reshardable(self, state: Mapping[str, Any], saved_size: int) -> None:
        change = f"it was made by {saved_size} ranks, these are {self._ranks.world_size}"
        if not self._loader.is_reshardable:
            raise CheckpointRefused(change, why="the loader's own sampler cannot be shared out anew")
        if "accumulated" in state:
            raise CheckpointRefused(change, why="it lies in the middle of an accumulation of gradients")


def _unfit(error: BaseException) -> CheckpointRefused:
    if is_out_of_memory(error):
        return Misfit("there was not enough memory to load it")
    return Misfit("it does not fit this training", why=f"{type(error).__name__}: {error}")


def _difference(saved: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    for name in sorted(set(saved) | set(present)):
        if saved.get(name) != present.get(name):
            return f"the checkpoint has {name} {saved.get(name)}, the configuration has {present.get(name)}"
    return ""


def _plain(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    if config is None:
        return {}
    # Not resolved: what config.yaml keeps as an interpolation may be a secret's.
    plain = OmegaConf.to_container(config.trainer, resolve=False)
    assert isinstance(plain, dict)
    return json.loads(json.dumps(plain, default=str))  # type: ignore[no-any-return]


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
