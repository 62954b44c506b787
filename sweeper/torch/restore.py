"""Restoring a training: rank 0 names one candidate after the other, and what one rank refuses, all refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sweeper import checkpoints
from sweeper.checkpoints import Content, Manifest
from sweeper.errors import CheckpointRefused, ConfigError, Misfit
from sweeper.torch.state import load
from sweeper.torch.training import OPTIMIZER_FILE, STATE_FILE, Training, saved_ranks, unfit
from sweeper.trainer.main import is_out_of_memory
from sweeper.trainer.run import NoValidCheckpoint, Run, say


def restore(run: Run, training: Training) -> dict[str, Any] | None:
    """Put a training where this run was interrupted. Collective.

    Returns:
        The counters of the checkpoint; None where there never was one.

    Raises:
        NoValidCheckpoint: Checkpoints were committed once, and none can be used.
        ConfigError: There are sound ones, of another training than this.
        MemoryError: There are sound ones, and not enough memory for any.
    """
    ranks = training.ranks
    refused: list[Path] = []
    last_reason = ""
    misfit: Misfit | None = None
    for directory in ranks.from_first(run.candidates() if ranks.is_first else None):
        reason: str | None = None
        try:
            manifest, state, loaded = _read(run, training, directory)
            training.put_parts(loaded[OPTIMIZER_FILE])  # the model last: it was checked, it will fit
        except CheckpointRefused as error:
            reason = str(error)
            misfit = misfit or (error if isinstance(error, Misfit) else None)
        if problem := ranks.agreed(reason):
            refused.append(directory)
            last_reason = f"step {checkpoints.step_of(directory)}: {reason or problem}"
            if ranks.is_first:
                run.refuse(checkpoints.step_of(directory), reason or problem)
            continue
        training.put(state, loaded)
        if training.has_changed_ranks and ranks.is_first:
            say(
                f"[RESUME] {run.run_id}: from {saved_ranks(state)} ranks to {ranks.world_size}: no sample is repeated or "
                "skipped, but the bits differ from here on from those of an undisturbed run"
            )
        if ranks.is_first:
            run.open_metrics(state["metrics_offset"])
        run.resumed(manifest, refused=refused)
        return state
    if misfit is not None:  # sound checkpoints: what has changed is the code, or the machine
        if misfit.__cause__ is not None and is_out_of_memory(misfit.__cause__):
            raise MemoryError(str(misfit))
        raise ConfigError(
            f"no checkpoint of run {run.run_id} fits this training",
            why=last_reason,
            do="Nothing was changed. Put the training back as it was, cancel the run, or start it fresh with resume.mode=never.",
        )
    if ranks.from_first(run.was_ever_committed() if ranks.is_first else None):
        raise NoValidCheckpoint(f"no valid checkpoint ({len(refused)} refused)", why=last_reason)
    if ranks.is_first:
        say(f"[RESUME] {run.run_id}: no checkpoint found, starting fresh")
    return None


def _read(run: Run, training: Training, directory: Path) -> tuple[Manifest, dict[str, Any], dict[str, Any]]:
    """Verify, unpickle and check everything, before the first object is changed.

    Raises:
        CheckpointRefused: With the reason.
    """
    contents: dict[str, Content] = {}
    try:
        manifest, contents = run.read(directory)
        state = json.loads(contents[STATE_FILE].data)
        loaded = {name: load(name, contents[name]) for name in contents if name != STATE_FILE}
        training.check_fit(state, loaded)
        if manifest.config_digest != run.spec.config_digest:
            raise CheckpointRefused("it was made with another config.yaml")
    except (KeyError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise unfit(error) from error
    finally:
        for content in contents.values():
            content.close()
    return manifest, state, loaded
