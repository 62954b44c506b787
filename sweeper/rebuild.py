"""`sweeper rebuild`: make a lost database anew from run directories.

What is known of a run is what lies in its directory. Parameters, seeds, results and checkpoints
are all there; what is not (when attempts began, why early ones ended) is left out.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeper import checkpoints, processes, rundir
from sweeper.errors import EXIT_NOT_WELL, EXIT_OK, NotFound, SweeperError
from sweeper.records import ProcessId, Run
from sweeper.rundir import Damaged, Identity
from sweeper.states import State
from sweeper.store import NewSweep, Proposal, Restored, Store, create_database
from sweeper.tracking import read_rows


@dataclass(frozen=True, slots=True)
class Found:
    """One run directory, read."""

    directory: Path
    identity: Identity
    result: dict[str, Any] | None
    config: dict[str, Any]


def main(directory: Path, *, storage: str, data_dir: Path) -> int:
    """Rebuild every sweep below a data directory, or one sweep's directory.

    Raises:
        NotFound: There is no run directory.
        SweeperError: An owner of a run still lives, or the database knows the sweep already.
    """
    only = _one_sweep(directory)
    data_dir = directory.resolve().parents[1] if only is not None else directory
    found: dict[str, list[Found]] = defaultdict(list)
    damaged = []
    for run_dir in rundir.run_dirs(data_dir, only):
        _refuse_living_owner(run_dir)
        try:
            entry = read(run_dir)
        except (Damaged, FileNotFoundError, SweeperError) as error:
            damaged.append(run_dir)
            print(f"sweeper: {run_dir} is left out: {error}", file=sys.stderr)
            continue
        found[entry.identity.sweep].append(entry)
    if not found:
        raise NotFound(
            f"there is no run directory below {directory}",
            do="Name a data directory, or <data_dir>/sweep/<sweep>.",
        )
    create_database(storage)
    store = Store(storage)
    for name, entries in sorted(found.items()):
        if store.find_sweep(name) is not None:
            raise SweeperError(
                f"the database knows sweep {name!r} already",
                why="rebuild makes a lost one anew",
                do="Move the database file away first, or name a new one with --storage.",
            )
        restored = restore(name, entries, data_dir)
        store.restore(restored)
        open_runs = sum(1 for run in restored.runs if not run.state.is_final)
        print(
            f"sweep {name}: {len(restored.runs)} runs, {open_runs} of them incomplete; go on with: python -m sweeper resume {name}"
        )
    return EXIT_NOT_WELL if damaged else EXIT_OK


def _one_sweep(directory: Path) -> str | None:
    real = directory.resolve()
    return real.name if real.parent.name == "sweep" and (real / "runs").is_dir() else None


def _refuse_living_owner(run_dir: Path) -> None:
    try:
        marker = rundir.read_json(rundir.marker_path(run_dir))
        owner = ProcessId(
            host=marker["host"], machine_id=marker["machine_id"], boot_id=marker["boot_id"], pid_namespace=marker["pid_namespace"],
            uid=marker["uid"], pid=marker["pid"], start_ticks=marker["pid_start"], slurm_job_id=marker["slurm_job_id"],
        )  # fmt: skip
    except (FileNotFoundError, Damaged, KeyError):
        return
    if processes.proof_of_death(owner) is None:
        raise SweeperError(
            f"run {run_dir.name} may still have an owner (process {owner.pid} on {owner.host})",
            do="End that worker first; if its machine is gone for good, remove the marker file yourself.",
        )


def read(run_dir: Path) -> Found:
    """Read what a run directory says of its run. Raises Damaged."""
    import yaml

    identity = rundir.read_identity(run_dir)
    data = rundir.read_bytes(run_dir / rundir.CONFIG_FILE)
    if checkpoints.digest(data) != identity.config_digest:
        raise Damaged(f"{run_dir / rundir.CONFIG_FILE} is not the one this run began with")
    if b"&" in data and any(
        isinstance(event, yaml.AliasEvent) for event in yaml.parse(data, Loader=yaml.SafeLoader)
    ):
        raise Damaged(f"{run_dir / rundir.CONFIG_FILE} has YAML aliases, which are never written")
    config = yaml.safe_load(data)
    if not isinstance(config, dict) or not isinstance(config.get("sweep"), dict):
        raise Damaged(f"{run_dir / rundir.CONFIG_FILE} is not a run's configuration")
    return Found(run_dir, identity, rundir.read_result(run_dir), config)


def restore(name: str, entries: list[Found], data_dir: Path) -> Restored:
    """Sweep, trials, runs and lineage, as the database shall have them."""
    from sweeper.search import distribution_of, grid, is_grid

    newest = max(entries, key=lambda entry: entry.identity.number)
    config = {**newest.config}
    sweep = config["sweep"]
    config["space"] = {
        key: distribution_of(key, str(value)) for key, value in sorted(sweep["params"].items())
    }
    points = grid(config["space"]) if is_grid(config["sampler"]) else []
    # Trials of a grid are the points in order; a number without a directory waits again.
    new = NewSweep(name, sweep["seed"], sweep["n_trials"], sweep["metric"], sweep["direction"], config)
    runs = [_run(entry, entries, data_dir) for entry in sorted(entries, key=lambda e: e.identity.number)]
    by_trial = {run.trial: run for run in runs}  # the newest of a trial decides
    last = max(max(by_trial), len(points) - 1)
    trials = [_trial(number, by_trial.get(number), points, config["space"]) for number in range(last + 1)]
    return Restored(
        new=new,
        trials=trials,
        runs=runs,
        values={
            run.run_id: _value(entry)
            for run in runs
            for entry in entries
            if entry.identity.run_id == run.run_id
        },
        reasons={e.identity.run_id: str((e.result or {}).get("reason", "")) for e in entries},
        starts={
            e.identity.run_id: sorted(checkpoints.known_starts(e.directory / rundir.CHECKPOINTS_DIR))
            for e in entries
        },
        reports={
            run.trial: _reports(data_dir / run.path, sweep["metric"]) for run in runs if run.state.is_final
        },
        retried={str(e.identity.retry_of) for e in entries if e.identity.retry_of},
    )


def _run(entry: Found, entries: Iterable[Found], data_dir: Path) -> Run:
    identity = entry.identity
    root = entry.directory / rundir.CHECKPOINTS_DIR
    step = checkpoints.newest_valid(root, run_id=identity.run_id)
    replaced = any(other.identity.replaces == identity.run_id for other in entries)
    attempts = max(
        [
            1,
            *(
                int(log.stem.rpartition("_")[2])
                for log in (entry.directory / rundir.LOGS_DIR).glob("attempt_*.log")
                if log.stem.rpartition("_")[2].isdigit()
            ),
        ]
    )
    return Run(
        run_id=identity.run_id, sweep_id=0, number=identity.number, trial_id=0, trial=identity.trial, params=identity.params,
        seed=identity.seed, threads=identity.threads, path=rundir.relative_path(identity.sweep, identity.number),
        wandb_run_id=identity.wandb_run_id, state=_state(entry, is_replaced=replaced), lease_epoch=max(1, rundir.largest_epoch(entry.directory)),
        attempts=attempts, global_step=step or 0, total_steps=None, checkpoint_step=step, replaces=identity.replaces, retry_of=identity.retry_of,
    )  # fmt: skip


def _state(entry: Found, *, is_replaced: bool) -> State:
    """The state on disk; of a chain of replacements only the newest stays open."""
    if is_replaced:
        return State.SUPERSEDED
    try:
        state = State(str((entry.result or {}).get("state")))
    except ValueError:
        return State.INTERRUPTED
    return state if state.is_final and state is not State.SUPERSEDED else State.INTERRUPTED


def _value(entry: Found) -> float | None:
    value = (entry.result or {}).get("value")
    return float(value) if isinstance(value, int | float) else None


def _trial(number: int, run: Run | None, points: list[Proposal], space: dict[str, str]) -> Proposal:
    from sweeper.search import proposal

    if run is not None:
        return proposal(number, run.params, space)
    return points[number] if number < len(points) else Proposal(number, {}, {})


def _reports(run_dir: Path, metric: str) -> dict[int, float]:
    """Reported values of the sweep's metric, by step, from the metrics log."""
    path = run_dir / rundir.METRICS_FILE
    if not path.is_file():
        return {}
    return {int(row["step"]): float(row[metric]) for row in read_rows(path) if metric in row}
