"""`sweeper rebuild`: make a lost database anew from run directories.

What is known of a run is what lies in its directory. Parameters, seeds, results and checkpoints
are all there; what is not (when attempts began, why early ones ended) is left out.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sweeper import checkpoints, processes, rundir
from sweeper.database import create_database
from sweeper.errors import EXIT_NOT_WELL, EXIT_OK, ConfigError, NotFound, SweeperError
from sweeper.records import NewSweep, Proposal, Run
from sweeper.recovery import MAX_FLOAT, final_state
from sweeper.report.hints import next_command
from sweeper.restored import Restored
from sweeper.rundir import Damaged, Identity
from sweeper.states import State
from sweeper.store import Store
from sweeper.tracking import last_step, read_rows

MAX_TRIALS = 1_000_000
"""A larger number in a run.json is damage: every number below it becomes a trial."""


@dataclass(frozen=True, slots=True)
class Found:
    """One run directory, read. A finished run may do without its configuration."""

    directory: Path
    identity: Identity
    result: dict[str, Any] | None
    config: dict[str, Any] | None = None
    space: dict[str, str] | None = None

    @property
    def state(self) -> State | None:
        """The final state it ended in. A result older than anything else there is a fenced owner's."""
        is_last = self.result is not None and self.result.get("lease_epoch") == rundir.largest_epoch(
            self.directory
        )
        return final_state(self.result) if self.result is not None and is_last else None


def main(directory: Path, *, storage: str, data_dir: Path) -> int:
    """Rebuild every sweep below a data directory, or one sweep's directory.

    Everything is read and checked before anything is written.

    Raises:
        NotFound: There is no run directory.
        SweeperError: An owner of a run still lives, or the database knows the sweep already.
    """
    only = _one_sweep(directory)
    data_dir = directory.resolve().parents[1] if only is not None else directory
    found, is_whole = _find(data_dir, only)
    if not found:
        raise NotFound(
            f"there is no run directory below {directory}",
            do="Name a data directory, or <data_dir>/sweep/<sweep>.",
        )
    restored = []
    for name, entries in sorted(found.items()):
        try:
            restored.append(restore(name, entries, data_dir))
        except ConfigError as error:
            is_whole = _leave_out(data_dir / "sweep" / name, error)
    create_database(storage)
    store = Store(storage)
    for sweep in restored:
        if store.find_sweep(sweep.new.name) is not None:
            raise SweeperError(
                f"the database knows sweep {sweep.new.name!r} already",
                why="rebuild makes a lost one anew",
                do="Move the database file away first, or name a new one with --storage.",
            )
    for sweep in restored:
        store.restore(sweep)
        command = next_command("resume", sweep.new.name, storage=storage, data_dir=data_dir)
        open_runs = sum(1 for run in sweep.runs if not run.state.is_final)
        print(
            f"sweep {sweep.new.name}: {len(sweep.runs)} runs, {open_runs} of them incomplete; go on with: {command}"
        )
    store.close()
    return EXIT_OK if is_whole else EXIT_NOT_WELL


def read_back(name: str, data_dir: Path) -> Restored | None:
    """One sweep as its run directories tell of it; None when none of them can be read.

    Raises:
        SweeperError: An owner of a run still lives, or no run has its configuration.
    """
    found, _ = _find(data_dir, name)
    return restore(name, found[name], data_dir) if found.get(name) else None


def _one_sweep(directory: Path) -> str | None:
    real = directory.resolve()
    return real.name if real.parent.name == "sweep" and (real / "runs").is_dir() else None


def _find(data_dir: Path, only: str | None) -> tuple[dict[str, list[Found]], bool]:
    """The runs below a data directory by sweep, and whether none had to be left out."""
    found: dict[str, list[Found]] = defaultdict(list)
    is_whole = True
    for link in _links(data_dir, only):
        is_whole = _leave_out(link, "it is a symbolic link")
    for run_dir in rundir.run_dirs(data_dir, only):
        _refuse_living_owner(run_dir)
        try:
            entry = read(run_dir)
        except (FileNotFoundError, SweeperError) as error:
            is_whole = _leave_out(run_dir, error)
        else:
            found[entry.identity.sweep].append(entry)
    return found, is_whole


def _links(data_dir: Path, only: str | None) -> list[Path]:
    runs = (data_dir / "sweep").glob(f"{only or '*'}/runs/*")
    return sorted(path for path in runs if rundir.RUN_ID.match(path.name) and path.is_symlink())


def _leave_out(path: Path, why: object) -> bool:
    print(f"sweeper: {path} is left out: {why}", file=sys.stderr)
    return False


def _refuse_living_owner(run_dir: Path) -> None:
    owner = rundir.read_owner(run_dir)
    if owner is not None and processes.proof_of_death(owner) is None:
        raise SweeperError(
            f"run {run_dir.name} may still have an owner (process {owner.pid} on {owner.host})",
            do="End that worker first; if its machine is gone for good, remove the marker file yourself.",
        )


def read(run_dir: Path) -> Found:
    """Read what a run directory says of its run.

    Raises:
        FileNotFoundError: It has no run.json or config.yaml.
        Damaged: One of them is not what was written.
    """
    identity = rundir.read_identity(run_dir)
    if identity.sweep != run_dir.parent.parent.name:
        raise Damaged(f"{run_dir} lies in the directory of another sweep")
    if identity.trial >= MAX_TRIALS:
        raise Damaged(f"{run_dir / rundir.RUN_FILE} has trial number {identity.trial}")
    try:
        result = rundir.read_result(run_dir)
    except Damaged as error:
        print(f"sweeper: {error}; {identity.run_id} is taken for incomplete", file=sys.stderr)
        result = None
    found = Found(run_dir, identity, result)
    try:
        config = rundir.read_config(run_dir, identity.config_digest)
        return replace(found, config=config, space=_space_of(config, identity))
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        ConfigError,
        Damaged,
        FileNotFoundError,
    ) as error:
        damage = Damaged(f"{run_dir / rundir.CONFIG_FILE} is not this run's configuration", why=str(error))
        if found.state is None:
            raise damage from error
        print(f"sweeper: {damage}; the result of {identity.run_id} is kept", file=sys.stderr)
        return found


def _space_of(config: dict[str, Any], identity: Identity) -> dict[str, str]:
    """The space of the run's sweep, after a look at all that is made of its configuration."""
    from sweeper.search import proposal, space_of

    sweep = config["sweep"]
    numbers, texts = (sweep["seed"], sweep["n_trials"]), (sweep["metric"], config["sampler"]["_target_"])
    if sweep["direction"] not in ("minimize", "maximize") or sweep["name"] != identity.sweep:
        raise ValueError("its sweep is another one")
    if not all(type(number) is int for number in numbers) or not all(isinstance(text, str) for text in texts):
        raise TypeError("its values are of other types")
    space = space_of(sweep["params"])
    proposal(identity.trial, identity.params, space)
    return space


def restore(name: str, entries: list[Found], data_dir: Path) -> Restored:
    """Sweep, trials, runs and lineage, as the database shall have them.

    Raises:
        ConfigError: No run has its configuration, or the sweep's grid cannot be walked.
    """
    from sweeper.search import grid, is_grid

    entries = sorted(entries, key=lambda entry: entry.identity.number)
    config, space = next(((e.config, e.space) for e in reversed(entries) if e.config), (None, None))
    if config is None or space is None:
        raise ConfigError(f"no run of sweep {name!r} has its configuration")
    config = {**config, "space": space}
    entries = [entry for entry in entries if entry.config or _fits(entry, space)]
    sweep = config["sweep"]
    points = grid(space) if is_grid(config["sampler"]) else []
    # Trials of a grid are the points in order; a number without a directory waits again.
    n_trials = min(sweep["n_trials"], len(points)) if points else sweep["n_trials"]
    states = _states(entries)
    runs = [_run(entry, states[entry.identity.run_id]) for entry in entries]
    by_trial = {run.trial: run for run in runs}
    last = max(max(by_trial), len(points) - 1)
    by_id = {entry.identity.run_id: entry for entry in entries}
    return Restored(
        new=NewSweep(name, sweep["seed"], n_trials, sweep["metric"], sweep["direction"], config),
        trials=[_trial(number, by_trial.get(number), points, space) for number in range(last + 1)],
        runs=runs,
        values={run_id: _value(entry) for run_id, entry in by_id.items()},
        reasons={run_id: str((entry.result or {}).get("reason", "")) for run_id, entry in by_id.items()},
        outcomes={run_id: _outcome(entry) for run_id, entry in by_id.items()},
        starts={run_id: _starts(entry) for run_id, entry in by_id.items()},
        ends={run.run_id: _end(by_id[run.run_id], run) for run in runs},
        reports={
            run.trial: _reports(by_id[run.run_id].directory, sweep["metric"])
            for run in runs
            if run.state.is_final and _has_pruner(config)
        },
        retried={entry.identity.retry_of for entry in entries if entry.identity.retry_of},
        next_run=_next_run(entries[-1].directory.parent),
    )


def _fits(entry: Found, space: dict[str, str]) -> bool:
    """Whether a run without its configuration has parameters of the sweep's space."""
    from sweeper.search import proposal

    try:
        proposal(entry.identity.trial, entry.identity.params, space)
    except (KeyError, TypeError, ValueError) as error:
        _leave_out(entry.directory, Damaged(f"its parameters are not of the sweep's space: {error}"))
        return False
    return True


def _states(entries: Sequence[Found]) -> dict[str, State]:
    """One run decides each trial: the one that was finished, else the newest. The others are superseded."""
    deciding: dict[int, Found] = {}
    for entry in entries:
        before = deciding.get(entry.identity.trial)
        if before is None or before.state is None or entry.state is not None:
            deciding[entry.identity.trial] = entry
    return {
        entry.identity.run_id: (entry.state or State.INTERRUPTED)
        if deciding[entry.identity.trial] is entry
        else State.SUPERSEDED
        for entry in entries
    }


def _run(entry: Found, state: State) -> Run:
    identity = entry.identity
    step = checkpoints.newest_valid(entry.directory / rundir.CHECKPOINTS_DIR, run_id=identity.run_id)
    return Run(
        run_id=identity.run_id, sweep_id=0, number=identity.number, trial_id=0, trial=identity.trial, params=identity.params,
        seed=identity.seed, threads=identity.threads, path=rundir.relative_path(identity.sweep, identity.number),
        wandb_run_id=identity.wandb_run_id, state=state, lease_epoch=max(1, rundir.largest_epoch(entry.directory)),
        attempts=_attempts(entry.directory), global_step=step or 0, total_steps=None, checkpoint_step=step,
        replaces=identity.replaces, retry_of=identity.retry_of,
    )  # fmt: skip


def _attempts(run_dir: Path) -> int:
    numbers = (log.stem.rpartition("_")[2] for log in (run_dir / rundir.LOGS_DIR).glob("attempt_*.log"))
    return max([1, *(int(number) for number in numbers if number.isdecimal() and len(number) < 9)])


def _starts(entry: Found) -> list[tuple[int, int]]:
    return sorted(checkpoints.known_starts(entry.directory / rundir.CHECKPOINTS_DIR))


def _end(entry: Found, run: Run) -> int:
    return max(run.global_step, last_step(entry.directory / rundir.METRICS_FILE) or 0)


def _value(entry: Found) -> float | None:
    return (
        float(entry.result["value"])
        if _is_number((entry.result or {}).get("value")) and entry.result
        else None
    )


def _outcome(entry: Found) -> str | None:
    from sweeper.states import Outcome

    told = (entry.result or {}).get("outcome")
    return str(told) if entry.state is not None and told in set(Outcome) else None


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) <= MAX_FLOAT)


def _trial(number: int, run: Run | None, points: list[Proposal], space: dict[str, str]) -> Proposal:
    from sweeper.search import proposal

    if run is not None:
        return proposal(number, run.params, space)
    return points[number] if number < len(points) else Proposal(number, {}, {})


def _next_run(runs_dir: Path) -> int:
    """Above every number in use, whether or not its directory could be read."""
    matches = (rundir.RUN_ID.match(path.name) for path in runs_dir.iterdir())
    return 1 + max(int(match[2]) for match in matches if match)


def _has_pruner(config: Mapping[str, Any]) -> bool:
    pruner = config.get("pruner")
    return isinstance(pruner, dict) and not str(pruner.get("_target_")).endswith(".NopPruner")


def _reports(run_dir: Path, metric: str) -> dict[int, float]:
    """Reported values of the sweep's metric, by step, from the metrics log."""
    found: dict[int, float] = {}
    for row in read_rows(run_dir / rundir.METRICS_FILE):
        step, value = row.get("step"), row.get(metric)
        if type(step) is int and 0 <= step < 2**31 and value is not None and _is_number(value):
            found.setdefault(step, float(value))
    return found
