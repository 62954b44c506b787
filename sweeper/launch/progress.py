"""What a launch shows: a live table on a terminal, plain lines without one, a table at the end."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Self

from sweeper.errors import EXIT_NOT_WELL, EXIT_OK, StorageError
from sweeper.reading import Reading
from sweeper.report import tables
from sweeper.report.hints import next_command
from sweeper.report.rows import run_rows
from sweeper.report.status import sweep_line, sweep_view
from sweeper.states import State

PLAIN_EVERY_S = 10.0
LIVE_EVERY_S = 0.25
BAR_FROM_COLUMNS = 100


class Display:
    """Progress on stderr. A context manager; `refresh` is cheap and may be called often."""

    def __init__(self, sweep: str, *, storage: str) -> None:
        self._sweep, self._storage = sweep, storage
        self._is_live = sys.stderr.isatty()
        self._live: Any = None
        self._shown_at_s = 0.0
        self._last_line = ""

    def __enter__(self) -> Self:
        if self._is_live:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def line(self, text: str) -> None:
        """Print one line above the live table."""
        if self._live is not None:
            self._live.console.print(tables.escape(text), markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def refresh(self) -> None:
        """Show the state of the sweep, if it is time to."""
        now = time.monotonic()
        if now - self._shown_at_s < (LIVE_EVERY_S if self._is_live else PLAIN_EVERY_S):
            return
        self._shown_at_s = now
        try:
            with Reading(self._storage) as reading:
                progress = reading.progress(self._sweep)
        except StorageError as error:
            self.line(f"[LAUNCH] {error}")
            return
        if self._live is not None:
            self._live.update(_picture(progress, width=self._live.console.width), refresh=True)
            return
        text = sweep_line(sweep_view(progress, data_dir=Path()))
        if text != self._last_line:
            self._last_line = text
            self.line(text)


def _picture(progress: Any, *, width: int) -> Any:
    """One line a running trial: its step is what must be seen, then its id, the rest as there is room."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    counts, best = progress["counts"], progress["best"]
    head = f"{progress['sweep']}  {counts['done']}/{counts['n_trials']} trials done, {counts['running']} running, {counts['resumed']} resumed"
    if counts["failed"]:
        head += f", {counts['failed']} failed"
    if best:
        head += f"   best {progress['metric']} {tables.number(best['value'])} ({best['run_id']})"
    grid = Table.grid(padding=(0, 2))
    open_runs = progress["open_runs"]
    longest = {
        "run": max((len(run["run_id"]) for run in open_runs), default=0),
        "step": max((len(tables.steps(run)) for run in open_runs), default=0),
    }
    columns = ["run", *(["bar"] if width >= BAR_FROM_COLUMNS else []), "step", "attempt", "params"]
    for name in columns:
        is_needed = name in ("run", "step")
        grid.add_column(no_wrap=True, overflow="ellipsis", min_width=longest[name] if is_needed else None)
    for run in progress["open_runs"]:
        total = run["total_steps"] or 0
        bar = ProgressBar(
            total=total or 1, completed=min(run["global_step"], total) if total else 0, width=30
        )
        cells = {
            "run": run["run_id"],
            "bar": bar,
            "step": tables.steps(run),
            "attempt": f"attempt {run['attempts']}" if width >= BAR_FROM_COLUMNS else f"#{run['attempts']}",
            "params": tables.escape(tables.short_params(run["params"])),
        }
        grid.add_row(*(cells[name] for name in columns))
    return Group(Text(head, style="bold"), grid)


def final_report(sweep: str, *, storage: str, data_dir: Path, is_late: bool = False) -> int:
    """Print the table of trials and the best; returns 1 when a trial failed or is missing, else 0.

    `is_late`: the launch ended because of sweep.stop_after_s; then trials may be missing.
    """
    with Reading(storage) as reading:
        runs = [run for run in reading.runs(sweep) if run["state"] != State.SUPERSEDED]
        progress = reading.progress(sweep)
    say = partial(next_command, storage=storage, data_dir=data_dir)
    rows = run_rows(runs, data_dir=str(data_dir), now_s=time.time())
    print(tables.runs_table(rows))
    best = progress["best"]
    if best:
        print(
            f"\nbest {progress['metric']} {tables.number(best['value'])}: {best['run_id']} ({tables.short_params(best['params'])})"
        )
        print("more: " + say("best", sweep) + "\n      " + say("show", best["run_id"]))
    failed = [run["run_id"] for run in runs if run["state"] == State.FAILED and not run["is_retried"]]
    if failed:
        print(f"{len(failed)} failed: {say('show', failed[0])}", file=sys.stderr)
    left = progress["counts"]["n_trials"] - progress["counts"]["done"]
    if is_late and left and not failed:
        print(f"{left} trials are left; go on with: {say('resume', sweep)}", file=sys.stderr)
        return EXIT_OK
    return EXIT_NOT_WELL if failed or not progress["is_complete"] else EXIT_OK
