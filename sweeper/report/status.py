"""`sweeper status`: how far sweeps and runs are, once or again and again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper import clock, costs, rundir
from sweeper.errors import NotFound
from sweeper.reading import Reading, default_storage
from sweeper.report import places, rows, tables
from sweeper.states import State

if TYPE_CHECKING:
    from sweeper.reading_rows import Progress, RunRow

_REDRAW_S = 1.0


def main(
    name: str | None,
    *,
    storage: str | None,
    data_dir: Path,
    watch: bool,
    as_json: bool,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Print the state of everything, of a sweep, of a run, or of a directory of ours.

    With `watch` it goes on until what is watched is complete: redrawn on a terminal, otherwise
    one line (one JSON text) whenever something changed.

    Args:
        name: A sweep, a run, a directory; None for every sweep.
        storage: None for the default database of the data directory looked at.

    Raises:
        NotFound: There is no such sweep, run or directory.
    """

    def look() -> Status:
        return look_at(name, storage=storage, data_dir=data_dir)

    status = look()
    for note in status.notes:
        print(f"sweeper: {tables.escape(note)}", file=sys.stderr)
    if not watch:
        _print_if_any(status.json() if as_json else status.text(width=tables.terminal_width()))
    elif sys.stdout.isatty() and not as_json:
        _redraw(look, sleep=sleep)
    else:
        _print_changes(look, as_json=as_json, sleep=sleep)
    return 0


def _print_if_any(text: str) -> None:
    if text:
        print(text, flush=True)


# --- looking -------------------------------------------------------------------------------


class Status:
    """What one look found: sweeps (`all` of them or one) or a single run."""

    def __init__(
        self,
        *,
        sweeps: Sequence[dict[str, Any]] = (),
        run: dict[str, Any] | None = None,
        is_one: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        self.sweeps = list(sweeps)
        self.run = run
        self.is_one = is_one
        self.notes = list(notes)

    @property
    def is_complete(self) -> bool:
        """Whether nothing more will happen to what was looked at."""
        if self.run is not None:
            return not self.run["incomplete"]
        return all(sweep["is_complete"] for sweep in self.sweeps)

    def json(self, *, indent: int | None = 2) -> str:
        """A run's row, one sweep, or an array of sweeps."""
        if self.run is not None:
            return rows.to_json(self.run, indent=indent)
        return rows.to_json(self.sweeps[0] if self.is_one else self.sweeps, indent=indent)

    def line(self) -> str:
        """All in one line, for a log."""
        if self.run is not None:
            return _run_line(self.run)
        return "; ".join(sweep_line(sweep) for sweep in self.sweeps)

    def text(self, *, width: int | None = None) -> str:
        """For people: a paragraph and the unfinished runs, or a table of sweeps."""
        if self.run is not None:
            return tables.runs_table([self.run], width=width)
        if self.is_one:
            return sweep_text(self.sweeps[0], width=width)
        return _sweeps_table(self.sweeps, width=width) if self.sweeps else ""


def look_at(name: str | None, *, storage: str | None, data_dir: Path) -> Status:
    """Find out how `name` is; arguments and errors as in `main`."""
    if name is not None and places.looks_like_path(name):
        return _look_at_directory(Path(name), storage=storage)
    try:
        return _in_database(name, storage=storage, data_dir=data_dir)
    except NotFound:
        if name is None or not Path(name).is_dir():
            raise
        return _look_at_directory(Path(name), storage=storage)


def _in_database(name: str | None, *, storage: str | None, data_dir: Path) -> Status:
    with Reading(storage or default_storage(str(data_dir))) as reading:
        if name is None:
            notes = [] if reading.exists else [f"there is no database yet at {reading.url}"]
            progress = [reading.progress(sweep["name"]) for sweep in reading.sweeps()]
            return Status(sweeps=[sweep_view(one, data_dir=data_dir) for one in progress], notes=notes)
        if rundir.RUN_ID.match(name):
            steps, resumption = reading.run_costs(name)
            row = _row(reading.run(name), data_dir=data_dir)
            return Status(run={**row, "steps": steps, "resumption": resumption})
        return Status(sweeps=[sweep_view(reading.progress(name), data_dir=data_dir)], is_one=True)


def _look_at_directory(directory: Path, *, storage: str | None) -> Status:
    place = places.place_of(directory)
    data_dir = places.relative(place.data_dir)
    try:
        status = _in_database(place.run_id or place.sweep, storage=storage, data_dir=data_dir)
    except NotFound:
        return _from_disk(place, data_dir=data_dir)
    is_known = status.run is not None or status.sweeps
    return status if is_known else _from_disk(place, data_dir=data_dir)


def _from_disk(place: places.Place, *, data_dir: Path) -> Status:
    notes = [
        f"not in the database; this is what the directories tell (`sweeper rebuild {data_dir}` makes it anew)"
    ]
    runs: list[RunRow] = []
    for run_dir in place.run_dirs():
        try:
            runs.append(places.disk_run(run_dir))
        except (rundir.Damaged, FileNotFoundError) as error:
            notes.append(f"{run_dir} is left out: {error}")
    if place.run_id is not None:
        if not runs:
            raise NotFound(f"{place.run_id} cannot be read from its directory", why=notes[-1])
        steps, resumption = costs.nothing()
        row = _row(runs[0], data_dir=data_dir)
        return Status(run={**row, "steps": steps, "resumption": resumption}, notes=notes)
    names = [place.sweep] if place.sweep else sorted({run["sweep"] for run in runs})
    sweeps = [
        sweep_view(_progress([run for run in runs if run["sweep"] == name], sweep=name), data_dir=data_dir)
        for name in names
    ]
    return Status(sweeps=sweeps, is_one=place.sweep is not None, notes=notes)


def _progress(runs: list[RunRow], *, sweep: str) -> Progress:
    """What directories alone tell of a sweep: neither its size nor its direction."""
    num = {state.value: sum(run["state"] == state for run in runs) for state in State}
    open_runs = [run for run in runs if run["state"] in (State.RUNNING, State.INTERRUPTED)]
    done = num["completed"] + num["pruned"] + num["failed"]
    steps, resumption = costs.nothing()
    return {
        "sweep": sweep,
        "metric": "value",
        "direction": "",
        "is_cancelled": False,
        "is_complete": not open_runs,
        "counts": {
            "n_trials": done + len(open_runs),
            "done": done,
            "running": num["running"],
            "interrupted": num["interrupted"],
            "completed": num["completed"],
            "pruned": num["pruned"],
            "failed": num["failed"],
            "superseded": num["superseded"],
            "cancelled": num["cancelled"],
            "retried": 0,
            "resumed": sum(run["attempts"] > 1 for run in runs),
        },
        "steps": steps,
        "resumption": resumption,
        "best": None,
        "open_runs": open_runs,
    }


def _row(run: RunRow, *, data_dir: Path) -> dict[str, Any]:
    (row,) = rows.run_rows([run], data_dir=str(data_dir), now_s=clock.wall_s())
    return row


def sweep_view(progress: Progress, *, data_dir: Path) -> dict[str, Any]:
    """A sweep as programs see it: the progress, with its runs as rows of the contract."""
    best = progress["best"]
    return {
        **progress,
        "best": _row(best, data_dir=data_dir) if best else None,
        "open_runs": [_row(run, data_dir=data_dir) for run in progress["open_runs"]],
    }


# --- as text -------------------------------------------------------------------------------


def sweep_line(sweep: dict[str, Any]) -> str:
    """One line: trials done, running, resumed, best so far, and each running trial's step."""
    counts, best = sweep["counts"], sweep["best"]
    parts = [f"{sweep['sweep']}: {counts['done']}/{counts['n_trials']} done"]
    parts += [
        f"{counts[key]} {key}" for key in ("running", "interrupted", "failed", "resumed") if counts[key]
    ]
    if best:
        parts.append(f"best {tables.number(best['value'])} ({best['run_id']})")
    parts += [
        f"{run['run_id']} {tables.steps(run)}" for run in sweep["open_runs"] if run["state"] == State.RUNNING
    ]
    return tables.escape(", ".join(parts))


def _run_line(run: dict[str, Any]) -> str:
    value = "" if run["value"] is None else f", value {tables.number(run['value'])}"
    return tables.escape(f"{run['run_id']}: {run['state']}, step {tables.steps(run)}{value}")


def sweep_text(sweep: dict[str, Any], *, width: int | None = None) -> str:
    """A paragraph about the sweep, then the table of its unfinished runs."""
    lines = [_counts_line(sweep)]
    if sweep["best"]:
        best = sweep["best"]
        value, params = tables.number(best["value"]), tables.short_params(best["params"])
        lines.append(f"best {sweep['metric']} {value} by {best['run_id']}: {params}")
    if sweep["counts"]["resumed"]:
        lines.append(_cost_line(sweep))
    text = "\n".join(tables.escape(line) for line in lines)
    return f"{text}\n\n{tables.runs_table(sweep['open_runs'], width=width)}" if sweep["open_runs"] else text


def _counts_line(sweep: dict[str, Any]) -> str:
    counts = sweep["counts"]
    kinds = [f"{counts[key]} {key}" for key in ("completed", "pruned", "failed") if counts[key]]
    parts = [
        f"{counts['done']} of {counts['n_trials']} trials done" + (f" ({', '.join(kinds)})" if kinds else "")
    ]
    parts += [
        f"{counts[key]} {key}"
        for key in ("running", "interrupted", "superseded", "cancelled", "retried")
        if counts[key]
    ]
    end = " — cancelled" if sweep["is_cancelled"] else " — complete" if sweep["is_complete"] else ""
    return f"{sweep['sweep']}: {', '.join(parts)}{end}"


def _cost_line(sweep: dict[str, Any]) -> str:
    steps = sweep["steps"]
    goodput = "" if steps["goodput"] is None else f", goodput {steps['goodput']:.3f}"
    cost = f"{steps['recovered']} steps recovered, {steps['lost']} lost{goodput}"
    resumption = sweep["resumption"]
    latency = (
        "" if resumption["latency_s"] is None else f", {resumption['latency_s']:.1f} s from claim to training"
    )
    tries = f" ({resumption['succeeded']} of {resumption['tried']} resumes went on{latency})"
    return f"{sweep['counts']['resumed']} runs resumed: {cost}{tries if resumption['tried'] else ''}"


def _sweeps_table(sweeps: Sequence[dict[str, Any]], *, width: int | None) -> str:
    headers = (
        "SWEEP",
        "DONE",
        "TRIALS",
        "RUNNING",
        "INTERRUPTED",
        "FAILED",
        "RESUMED",
        "GOODPUT",
        "BEST",
        "BEST RUN",
    )
    cells = []
    for sweep in sweeps:
        counts, best = sweep["counts"], sweep["best"]
        keys = ("done", "n_trials", "running", "interrupted", "failed", "resumed")
        cells.append(
            (
                sweep["sweep"],
                *(str(counts[key]) for key in keys),
                tables.number(sweep["steps"]["goodput"], digits=3),
                tables.number(best["value"]) if best else "-",
                best["run_id"] if best else "-",
            )
        )
    return tables.table(headers, cells, width=width)


# --- watching ------------------------------------------------------------------------------


def _print_changes(look: Callable[[], Status], *, as_json: bool, sleep: Callable[[float], None]) -> None:
    last = None
    while True:
        status = look()
        text = status.json(indent=None) if as_json else status.line()
        if text != last:
            _print_if_any(text)
            last = text
        if status.is_complete:
            return
        sleep(_REDRAW_S)


def _redraw(look: Callable[[], Status], *, sleep: Callable[[float], None]) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    status = look()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(Text(status.text(width=console.width), no_wrap=True), refresh=True)
            if status.is_complete:
                return
            sleep(_REDRAW_S)
            status = look()
