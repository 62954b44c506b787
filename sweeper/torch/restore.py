"""Restoring a training: rank 0 names one candidate after the other, and what one rank refuses, all refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from sweeper import checkpoints
from sweeper.checkpoints import Content
from sweeper.errors import CheckpointRefused, ConfigError, Misfit
from sweeper.manifests import Manifest
from sweeper.torch.ranks import Kind, Refusal
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
    state: dict[str, Any]
    refused: list[Path] = []
    refusals: list[Refusal] = []
    for directory in ranks.from_first(run.candidates() if ranks.is_first else None, at="restoring"):
        found, refusal = _try(run, training, directory)
        if refusal is not None:
            step = checkpoints.step_of(directory)
            refused.append(directory)
            refusals.append(replace(refusal, text=f"step {step}: {refusal.text}"))
            if ranks.is_first:
                run.refuse(step, refusal.text)
            continue
        manifest, state = found
        if training.has_changed_ranks and ranks.is_first:
            say(
                f"[RESUME] {run.run_id}: from {saved_ranks(state)} ranks to {ranks.world_size}: no sample is repeated or "
                "skipped, but the bits differ from here on from those of an undisturbed run"
            )
        if ranks.is_first:
            run.open_metrics(state["metrics_offset"])
        run.resumed(manifest, refused=refused)
        return state
    _raise_for(run, [refusal for refusal in refusals if refusal.kind is not Kind.DAMAGED])
    if ranks.from_first(run.was_ever_committed() if ranks.is_first else None, at="starting"):
        why = refusals[0].text if refusals else ""
        raise NoValidCheckpoint(f"no valid checkpoint ({len(refused)} refused)", why=why)
    if ranks.is_first:
        say(f"[RESUME] {run.run_id}: no checkpoint found, starting fresh")
    return None


def _raise_for(run: Run, sound: list[Refusal]) -> None:
    """Raise when there are sound checkpoints: what has changed is the code, or the machine."""
    if sound and sound[0].kind is Kind.NO_MEMORY:
        raise MemoryError(sound[0].text)
    if sound:
        raise ConfigError(
            f"no checkpoint of run {run.run_id} fits this training",
            why=sound[0].text,
            do=f"Nothing was changed. {run.ADVICE_UNFIT}",
        )


def _try(run: Run, training: Training, directory: Path) -> tuple[Any, Refusal | None]:
    """Manifest and counters of a candidate that all ranks have put back, or the first refusal. Collective."""
    ranks = training.ranks
    own: Refusal | None = None
    try:
        manifest, state, loaded = _read(run, training, directory)
        training.put_parts(loaded[OPTIMIZER_FILE])  # the model last: it was checked, it will fit
    except CheckpointRefused as error:
        own = _refusal(error)
    if (refusal := ranks.agreed(own)) is not None:
        return None, refusal
    try:
        training.put(state, loaded)
    except CheckpointRefused as error:
        own = _refusal(error)
    return (manifest, state), ranks.agreed(own)


def _refusal(error: CheckpointRefused) -> Refusal:
    is_memory = error.__cause__ is not None and is_out_of_memory(error.__cause__)
    kind = Kind.NO_MEMORY if is_memory else Kind.UNFIT if isinstance(error, Misfit) else Kind.DAMAGED
    return Refusal(str(error), kind)


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
    except CheckpointRefused:
        raise
    except Exception as error:
        raise unfit(error) from error
    finally:
        for content in contents.values():
            content.close()
    return manifest, state, loaded
