"""Acts on a run that a crash may interrupt anywhere: settling it, superseding it, tidying up behind it.

Each goes in an order that leaves a state which the next owner knows how to go on from (DESIGN, sections 5 and 6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sweeper import checkpoints, rundir
from sweeper.errors import ConfigError
from sweeper.records import Claim, Ending, Lease, Run, Sweep
from sweeper.rundir import Damaged, new_wandb_id
from sweeper.states import INCOMPLETE, State
from sweeper.store import Store


def settle(store: Store, lease: Lease, run_dir: Path, state: State, ending: Ending) -> None:
    """Make a run's final state durable: result.json → database → marker, in this order."""
    store.check(lease)
    # HAZARD: the last checkpoint of the run may be on its way to W&B.
    tidy(run_dir, lease, is_tracked=True)
    rundir.write_result(
        run_dir, lease_epoch=lease.lease_epoch, state=str(state), value=ending.value,
        reason=ending.reason, outcome=str(ending.outcome), finished_at=now_text(),
    )  # fmt: skip
    close(store, lease, run_dir, state, ending)


def close(store: Store, lease: Lease, run_dir: Path, state: State, ending: Ending) -> None:
    """The rest of `settle`, once result.json is durable; also of one that a crash cut short."""
    root = run_dir / rundir.CHECKPOINTS_DIR
    if steps := checkpoints.steps_on_disk(root):
        checkpoints.write_stages(root, stage="train", state=str(state), step=steps[0][0])
    store.settle(lease, state, ending)
    rundir.remove_marker(run_dir)


def tidy(run_dir: Path, lease: Lease, *, is_tracked: bool = False) -> None:
    """Remove what attempts up to this one left unfinished: temporary files, partial checkpoints, trash."""
    rundir.clean(run_dir, is_tracked=is_tracked)
    checkpoints.clean(run_dir / rundir.CHECKPOINTS_DIR, lease_epoch=lease.lease_epoch + 1)


def supersede(
    store: Store,
    sweep: Sweep,
    run: Run,
    lease: Lease,
    ending: Ending,
    *,
    data_dir: Path,
    create: Any,
    owner: Any,
    worker: str,
) -> Claim:
    """Start a fresh run in place of one that cannot go on.

    New number → new directory and marker durable → one transaction → old result → old marker.
    """
    store.check(lease)  # an owner that was overtaken leaves no directory that nobody will adopt
    fresh = _unadopted(store, sweep, run, data_dir) or fresh_run(store, sweep, run)
    fresh_dir = data_dir / fresh.path
    create(fresh, fresh_dir)
    rundir.write_marker(
        fresh_dir, attempt=1, lease_epoch=fresh.lease_epoch, owner=owner, started_at=now_text()
    )
    claim = store.supersede(lease, ending, fresh, owner=owner, worker=worker)
    run_dir = data_dir / run.path
    tidy(run_dir, lease)
    close_superseded(run_dir, lease_epoch=lease.lease_epoch, by=fresh.run_id, reason=ending.reason)
    return claim


def close_superseded(run_dir: Path, *, lease_epoch: int, by: str | None, reason: str) -> None:
    """Result and marker of a superseded run, once the database knows."""
    rundir.write_result(
        run_dir, lease_epoch=lease_epoch, state=str(State.SUPERSEDED), value=None, reason=reason, by=by
    )
    rundir.remove_marker(run_dir)


def fresh_run(store: Store, sweep: Sweep, run: Run) -> Run:
    number = store.reserve_number(sweep.sweep_id)
    run_id = rundir.run_id(sweep.name, number)
    return replace(
        run, run_id=run_id, number=number, path=rundir.relative_path(sweep.name, number), wandb_run_id=new_wandb_id(run_id),
        state=State.RUNNING, lease_epoch=1, attempts=1, global_step=0, checkpoint_step=None, replaces=run.run_id,
    )  # fmt: skip


def _unadopted(store: Store, sweep: Sweep, run: Run, data_dir: Path) -> Run | None:
    """A directory that an earlier superseder of this run made durable but never put in the database."""
    known = {other.run_id for other in store.runs(sweep.sweep_id)}
    for directory in rundir.run_dirs(data_dir, sweep.name):
        if directory.name in known:
            continue
        try:
            identity = rundir.read_identity(directory)
        except (FileNotFoundError, Damaged):
            continue
        if identity.replaces == run.run_id and identity.params == run.params:
            return replace(
                run, run_id=identity.run_id, number=identity.number, path=rundir.relative_path(sweep.name, identity.number),
                wandb_run_id=identity.wandb_run_id, state=State.RUNNING, lease_epoch=rundir.largest_epoch(directory) + 1,
                attempts=1, global_step=0, checkpoint_step=None, replaces=run.run_id,
            )  # fmt: skip
    return None


def check_data_dir(store: Store, sweep: Sweep, data_dir: Path) -> None:
    """Raise ConfigError when the database tells of checkpoints and results, and none of them is here."""
    if next(rundir.run_dirs(data_dir, sweep.name), None) is not None:
        return
    missing = [run for run in store.runs(sweep.sweep_id) if run.checkpoint_step is not None]
    if missing:
        raise ConfigError(
            f"{data_dir} holds no run of sweep {sweep.name!r}, though the database knows of {len(missing)} with checkpoints",
            why="it is another data directory, or its disk is not mounted",
            do="Name the right one with data_dir= or --data-dir; nothing was changed.",
        )


def tidy_final(store: Store, sweep: Sweep, data_dir: Path, *, say: Callable[[str], None]) -> None:
    """Remove markers that outlived their finished run, and close superseded runs half closed."""
    for run in store.runs(sweep.sweep_id, [state for state in State if state not in INCOMPLETE]):
        run_dir = data_dir / run.path
        if not rundir.marker_path(run_dir).exists():
            continue
        say(f"[RESUME] {run.run_id} is {run.state}; its marker had outlived it and is removed")
        tidy(run_dir, Lease(run.run_id, run.lease_epoch, ""))
        if run.state is State.SUPERSEDED and not (run_dir / rundir.RESULT_FILE).exists():
            by = next(
                (other.run_id for other in store.runs(sweep.sweep_id) if other.replaces == run.run_id), None
            )
            close_superseded(run_dir, lease_epoch=run.lease_epoch, by=by, reason="superseded")
        else:
            rundir.remove_marker(run_dir)


def now_text() -> str:
    """The time as files have it, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
