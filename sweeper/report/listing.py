"""`sweeper list`."""

from __future__ import annotations

import sys

from sweeper import clock
from sweeper.reading import Reading
from sweeper.report import rows, tables


def main(
    sweep: str | None, *, storage: str, data_dir: str, incomplete: bool, state: str | None, as_json: bool
) -> int:
    """Print runs as a table or as a JSON array; nothing (`[]`) where no database is yet."""
    with Reading(storage) as reading:
        found = reading.runs(sweep, incomplete=incomplete, state=state)
        exists, url = reading.exists, reading.url
    listed = rows.run_rows(found, data_dir=data_dir, now_s=clock.wall_s())
    if as_json:
        print(rows.to_json(listed))
    elif listed:
        print(tables.runs_table(listed, width=tables.terminal_width()))
    if not exists:
        print(f"sweeper: there is no database yet at {tables.escape(url)}", file=sys.stderr)
    return 0
