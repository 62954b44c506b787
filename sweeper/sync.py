"""`sweeper sync`: send W&B what it lacks of runs that nobody trains now, from their metrics logs."""

from __future__ import annotations

import contextlib
import select
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper import costs, fsops, rundir
from sweeper.errors import EXIT_NOT_WELL, EXIT_OK, NotWell
from sweeper.reading import Reading
from sweeper.report import rows
from sweeper.states import Outcome, State
from sweeper.tracking import Tracker, TrackingSettings, read_rows
from sweeper.tracking.messages import TensorboardSettings
from sweeper.tracking.metrics import STEP

if TYPE_CHECKING:
    from sweeper.reading_rows import RunRow

POLL_S = 0.5
ASK_TIMEOUT_S = 20
_MORE_S = 60.0
_SHOWN = {
    State.COMPLETED: "finished", State.PRUNED: "finished", State.FAILED: "failed", State.CANCELLED: "failed",
    State.SUPERSEDED: "failed",
}  # fmt: skip
"""What W&B shows of a run that is final."""
_LOCK_FILE = ".sync.lock"


def main(name: str | None, *, storage: str, data_dir: Path) -> int:
    """Send what W&B lacks of a run, a sweep, or everything; one line a run.

    Returns:
        1 when W&B may still lack something.

    Raises:
        NotFound: There is no such run or sweep.
        NotWell: W&B does not answer, or there is no key.
    """
    with Reading(storage) as reading:
        is_run = rundir.RUN_ID.match(name or "")
        runs = [reading.run(str(name))] if is_run else reading.runs(name)
        figures = {run["run_id"]: _figures(reading, run) for run in runs}
        configs = {sweep: reading.config(sweep) for sweep in sorted({run["sweep"] for run in runs})}
    failed: list[str] = []
    for sweep, config in configs.items():
        mine = [run for run in runs if run["sweep"] == sweep]
        with _exclusively(data_dir / "sweep" / sweep):
            failed += _sync_sweep(mine, config, figures, data_dir=data_dir, is_named=name is not None)
    if failed:
        print(f"sweeper: W&B may still lack rows of {', '.join(failed)}; run it again", file=sys.stderr)
    return EXIT_NOT_WELL if failed else EXIT_OK


def _figures(reading: Reading, run: RunRow) -> dict[str, Any]:
    causes = [row["outcome"] for row in reading.attempts(run["run_id"]) if row["outcome"]]
    of_sweep = reading.resumption(run["sweep"])
    return costs.figures(run["attempts"], causes, reading.run_costs(run["run_id"]), of_sweep)


@contextlib.contextmanager
def _exclusively(sweep_dir: Path) -> Iterator[None]:
    """Two at once would write the same lines of a run's history."""
    if not sweep_dir.is_dir():
        yield  # not one row to send
        return
    busy = NotWell(f"another sync of sweep {sweep_dir.name} is running", do="Wait for it; nothing was sent.")
    with fsops.held(sweep_dir / _LOCK_FILE, busy=busy):
        yield


def _sync_sweep(
    runs: Sequence[RunRow],
    config: dict[str, Any],
    figures: dict[str, dict[str, Any]],
    *,
    data_dir: Path,
    is_named: bool,
) -> list[str]:
    """Returns the runs of one sweep that could not be sent."""
    sweep = runs[0]["sweep"]
    settings = TrackingSettings.from_config(config["tracking"])
    if settings.wandb.mode == "disabled" and not is_named:
        print(f"sweep {sweep}: tracking.wandb.mode=disabled; `sweeper sync {sweep}` sends it all the same")
        return []
    resume = "allow" if settings.wandb.resume == "must" else settings.wandb.resume
    # Checkpoints are the worker's affair: it knows which of them are this attempt's.
    wandb = replace(settings.wandb, mode="online", resume=resume, upload_checkpoints="never")
    settings = TrackingSettings(wandb, TensorboardSettings(is_enabled=False))
    now_s = time.time()
    quiet = []
    for run in runs:
        if rows.lease(run, now_s=now_s, is_gone=rows.owner_is_gone) == "live":
            print(f"{run['run_id']}: is being trained; its worker sends it")
        else:
            quiet.append(run)
    there = _known(settings, sweep) if quiet else {}
    lacking = []
    for run in quiet:
        if _is_whole(run, _there(run, settings, there), data_dir=data_dir):
            print(f"{run['run_id']}: W&B has it all")
        else:
            lacking.append(run)
    if not lacking:
        return []
    tracker = Tracker.start(settings)
    try:
        return [
            run["run_id"]
            for run in lacking
            if not _sync(
                tracker, run, config, _there(run, settings, there), figures[run["run_id"]], data_dir=data_dir
            )
        ]
    finally:
        tracker.close(settings.wandb.finish_timeout_s)


def _known(settings: TrackingSettings, sweep: str) -> dict[str, tuple[int, str]]:
    """W&B's id → last step and state, of the runs of a sweep that W&B knows. Raises NotWell."""
    import wandb

    from sweeper.tracking.wandb_sink import project_of

    entity = f"{settings.wandb.entity}/" if settings.wandb.entity else ""
    try:
        api = wandb.Api(timeout=ASK_TIMEOUT_S)
        found = api.runs(f"{entity}{project_of(settings.wandb)}", {"group": settings.wandb.group or sweep})
        return {run.id: (run.lastHistoryStep, run.state) for run in found}
    except ValueError:
        return {}  # no such project yet
    except Exception as error:
        raise NotWell(
            "W&B does not answer",
            why=" ".join(str(error).split())[:300],
            do="Check the key (`wandb login`) and the network; nothing was changed.",
        ) from error


def _there(run: RunRow, settings: TrackingSettings, there: dict[str, tuple[int, str]]) -> tuple[int, str]:
    """Last step and state of the W&B run that a run's last attempt is in; (-1, "") when W&B has none."""
    from sweeper.tracking.wandb_sink import identity_of

    wandb_run_id, _ = identity_of(run["wandb_run_id"], run["attempts"], settings.wandb.resume)
    return there.get(wandb_run_id, (-1, ""))


def _is_whole(run: RunRow, there: tuple[int, str], *, data_dir: Path) -> bool:
    step, state = there
    expected = _SHOWN.get(State(run["state"]), state)
    return state == expected and bool(state) and step >= _last_step(run, data_dir=data_dir)


def _last_step(run: RunRow, *, data_dir: Path) -> int:
    """The last step that W&B is to have: the newest of a run that goes on may not be complete, and is held back."""
    log = data_dir / run["path"] / rundir.METRICS_FILE
    steps = [-1, *sorted({int(row[STEP]) for row in read_rows(log)})]
    is_held = not State(run["state"]).is_final and len(steps) > 1
    return steps[-2] if is_held else steps[-1]


def _sync(
    tracker: Tracker,
    run: RunRow,
    config: dict[str, Any],
    there: tuple[int, str],
    summary: dict[str, Any],
    *,
    data_dir: Path,
) -> bool:
    from sweeper.config import for_run

    run_id, state = run["run_id"], State(run["state"])
    if state is State.RUNNING:  # its owner is gone
        state = State.INTERRUPTED
    outcome = Outcome(run["outcome"]) if run["outcome"] else Outcome.LOST
    trainer = for_run(config, run["params"])["trainer"]
    tracker.begin(
        run_dir=data_dir / run["path"], run_id=run_id, sweep=run["sweep"], wandb_run_id=run["wandb_run_id"],
        attempt=run["attempts"], lease_epoch=max(run["lease_epoch"], rundir.largest_epoch(data_dir / run["path"])),
        config={**trainer, "trial": run["trial"], "seed": run["seed"]},
        metric=config["sweep"]["metric"], direction=config["sweep"]["direction"],
    )  # fmt: skip
    tracker.end(run_id=run_id, outcome=outcome, state=state, value=run["value"], summary=summary)
    wandb = tracker.settings.wandb
    deadline = time.monotonic() + wandb.init_timeout_s + wandb.finish_timeout_s + _MORE_S
    warnings: list[str] = []
    is_online = False
    while time.monotonic() < deadline:
        for event in tracker.poll():
            if event["event"] == "warning":
                warnings.append(str(event["text"]))
            is_online |= bool(event.get("wandb_url"))
            if event["event"] == "done":
                step, before = _last_step(run, data_dir=data_dir), there[0]
                if is_online and not warnings:
                    had = f"W&B had it up to step {before}" if before >= 0 else "W&B did not have it"
                    print(f"{run_id}: sent up to step {step}, {state} ({had})")
                    return True
                print(f"{run_id}: not all could be sent: {'; '.join(warnings) or 'W&B was not reached'}")
                return False
        descriptor = tracker.fileno()
        select.select([descriptor] if descriptor is not None else [], [], [], POLL_S)
    print(f"{run_id}: W&B did not take it in time")
    return False
