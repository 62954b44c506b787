"""On an instance: is there a copy to go on from, and is it whole before the instance goes?

`python -m sweeper.launch.vast.copies launch PROJECT SWEEP …` launches a sweep, from W&B if it is there and not here.
`python -m sweeper.launch.vast.copies check SWEEP`: 0 if mirror or W&B have all that this disk has.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from sweeper import checkpoints, rundir
from sweeper.errors import EXIT_NOT_WELL, EXIT_OK, CheckpointRefused, NotWell, SweeperError
from sweeper.mirror.snapshots import result_epoch
from sweeper.reading import Reading, default_storage
from sweeper.states import State

COPY_WITHIN_S = 600.0
"""How long the mirror may take for what it lacks. Each try of the script gets as much."""

StepOf = Callable[[str], tuple[bool, int | None]]
"""Run id → whether the copy has it as finished, and its newest checkpoint's step there."""


ABANDONED = (State.SUPERSEDED, State.FAILED, State.CANCELLED)
"""Nothing goes on from their checkpoints; and all of a superseded run's may be damaged."""


def lacking(run_dirs: list[Path], in_copy: StepOf, *, has_newest: bool = True) -> list[str]:
    """The runs of which a copy lacks something, each with what.

    Args:
        has_newest: The copy is meant to have the newest valid checkpoint of every run that has not failed.
    """
    found = []
    for run_dir in run_dirs:
        is_final, step = in_copy(run_dir.name)
        state = _ended(run_dir)
        if state is not None and not is_final:
            found.append(f"{run_dir.name}: its result")
        elif has_newest and state not in ABANDONED and (newest := valid_beyond(run_dir, step)) is not None:
            found.append(f"{run_dir.name}: step {newest} (it has {step if step is not None else 'none'})")
    return found


def valid_beyond(run_dir: Path, step: int | None) -> int | None:
    """Step of the newest valid checkpoint of a run that is newer than `step`; None when there is none.

    What a copy has already is not read again.
    """
    root = run_dir / rundir.CHECKPOINTS_DIR
    starts = checkpoints.known_starts(root)
    for newest, directory in checkpoints.steps_on_disk(root):
        if step is not None and newest <= step:
            return None
        try:
            checkpoints.validate(directory, run_id=run_dir.name, starts=starts)
        except CheckpointRefused:
            continue
        return newest
    return None


def _ended(run_dir: Path) -> State | None:
    """How a run ended, if its result counts: no copy takes one that does not."""
    if result_epoch(run_dir) is None:
        return None
    return State(str((rundir.read_result(run_dir) or {}).get("state")))


def check(sweep: str, *, data_dir: Path) -> int:
    """Complete the copy if it lacks anything; 0 when it is whole."""
    with Reading(default_storage(str(data_dir))) as reading:
        config = reading.config(sweep)
    run_dirs = list(rundir.run_dirs(data_dir, sweep))
    if (config.get("mirror") or {}).get("url"):
        left = _check_mirror(config, sweep, run_dirs, data_dir=data_dir)
    else:
        left = _check_wandb(config, sweep, run_dirs, data_dir=data_dir)
    for text in left:
        print(f"[COPY] lacks {text}", file=sys.stderr)
    return EXIT_NOT_WELL if left else EXIT_OK


def _check_mirror(
    config: Mapping[str, Any], sweep: str, run_dirs: list[Path], *, data_dir: Path
) -> list[str]:
    from dataclasses import replace

    from sweeper.mirror import MirrorSettings, indexes
    from sweeper.mirror.bucket import Bucket
    from sweeper.mirror.mirror import Mirror

    settings = replace(MirrorSettings.from_config(config["mirror"]), finish_timeout_s=COPY_WITHIN_S)
    assert settings.url is not None
    bucket = Bucket.open(settings.url, sweep)

    def in_copy(run_id: str) -> tuple[bool, int | None]:
        index, _ = indexes.read_newest(bucket, run_id)
        return (False, None) if index is None else (index.is_final, index.step)

    left = lacking(run_dirs, in_copy)
    if not left:
        return []
    mirror = Mirror(settings, data_dir=data_dir, sweep=sweep)
    mirror.start()
    names = {text.partition(":")[0] for text in left}
    for run_dir in run_dirs:
        if run_dir.name in names:
            attempt = len(list((run_dir / rundir.LOGS_DIR).glob("attempt_*.log")))
            mirror.end(run_dir=run_dir, lease_epoch=rundir.largest_epoch(run_dir), attempt=attempt)
    mirror.close(lambda text: print(f"[MIRROR] {text}", file=sys.stderr))
    return lacking(run_dirs, in_copy)


def _check_wandb(config: Mapping[str, Any], sweep: str, run_dirs: list[Path], *, data_dir: Path) -> list[str]:
    from sweeper.sync import main as sync
    from sweeper.tracking import TrackingSettings
    from sweeper.tracking.wandb_checkpoints import BEST
    from sweeper.tracking.wandb_source import WandbSource, Wanted

    settings = TrackingSettings.from_config(config["tracking"]).wandb
    if sync(sweep, storage=default_storage(str(data_dir)), data_dir=data_dir) != EXIT_OK:
        return ["rows of the history"]
    source = WandbSource(Wanted(sweep), project_path(config))
    there = source.run_ids(sweep)

    def in_copy(run_id: str) -> tuple[bool, int | None]:
        if run_id not in there:
            return False, None
        return rundir.RESULT_FILE in source.listing(run_id).files, source.newest_step(run_id)

    return lacking(run_dirs, in_copy, has_newest=settings.upload_checkpoints != BEST)


def project_path(config: Mapping[str, Any]) -> str:
    """W&B's ENTITY/PROJECT of a sweep, or PROJECT of the default entity."""
    from sweeper.tracking import TrackingSettings
    from sweeper.tracking.wandb_sink import project_of

    settings = TrackingSettings.from_config(config["tracking"]).wandb
    return f"{settings.entity}/{project_of(settings)}" if settings.entity else project_of(settings)


def launch(path: str, sweep: str, overrides: list[str], *, data_dir: Path) -> NoReturn:
    """Become `sweeper launch`, with `resume_from_wandb` if the sweep is not here and W&B has runs of it."""
    is_here = next(rundir.run_dirs(data_dir, sweep), None) is not None
    more = [f"resume_from_wandb={sweep}"] if not is_here and _has_runs(path, sweep) else []
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "sweeper", "launch", *overrides, *more])


def _has_runs(path: str, sweep: str) -> bool:
    """Whether W&B has a run of a sweep that can be gone on with. Raises NotWell when it does not say.

    An instance that ended too early has left runs without an identity.
    """
    from sweeper.tracking.wandb_source import WandbSource, Wanted

    try:
        source = WandbSource(Wanted(sweep), path)
        return any(rundir.RUN_FILE in source.listing(run_id).files for run_id in source.run_ids(sweep))
    except ValueError:  # there is no such project yet
        return False
    except Exception as error:  # the client's errors have no common root
        raise NotWell(
            f"W&B does not say whether it has sweep {sweep}",
            why=" ".join(str(error).split())[:300],
            do="Check WANDB_API_KEY in launcher.env, and its access to the project.",
        ) from error


def main(arguments: list[str]) -> int:
    """Run `launch` or `check`; returns the exit code."""
    data_dir = Path(os.environ["SWEEPER_DATA_DIR"])
    try:
        if arguments[0] == "launch":
            launch(arguments[1], arguments[2], arguments[3:], data_dir=data_dir)
        return check(arguments[1], data_dir=data_dir)
    except (SweeperError, OSError) as error:
        print(f"[COPY] {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_NOT_WELL


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a client's threads may hang
