"""`python -m bench [ROW ...] [--quick] [--json FILE]`: measure, and print one table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import peers, processes
from bench.processes import Failed
from bench.rows import QUICK, ROWS, Bench, Size, chosen
from bench.table import Goal, Line, Missing, render


def main() -> int:
    """Run the chosen rows. Returns 0, or 1 when a goal was missed."""
    options = parse()
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: sys.exit(130))
    processes.adopt_orphans()
    try:
        if not options.no_peers:
            peers.install(say)
        return measure(options)
    finally:
        processes.kill_all()


def parse() -> argparse.Namespace:
    """The command line."""
    names = ", ".join(f"{number} {name}" for number, (name, _) in ROWS.items())
    parser = argparse.ArgumentParser(prog="python -m bench", description=f"Rows: {names}.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="numbers or names; default: all")
    parser.add_argument("--quick", action="store_true", help="fewer repeats: a look, not a result")
    parser.add_argument("--no-peers", action="store_true", help="only ours and the floors")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")
    options = parser.parse_args()
    try:
        options.rows = chosen(options.rows)
    except KeyError as error:
        parser.error(f"there is no row {error.args[0]!r}: {names}")
    return options


def measure(options: argparse.Namespace) -> int:
    """Measure the chosen rows and print them."""
    bench = Bench(QUICK if options.quick else Size(), say, has_peers=not options.no_peers)
    before = machine()
    lines: list[Line] = []
    for row in options.rows:
        say(f"row {row}: {ROWS[row][0]}")
        lines.extend(lines_of(row, bench))
    if options.json:
        result = {"machine": before, "quick": options.quick, "lines": [line.to_json() for line in lines]}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(", ".join(f"{key} {value}" for key, value in before.items()))
    print("median (min–max); ratio and goal compare medians of this run\n")
    print(render(lines))
    return 1 if any(line.verdict == "NO" for line in lines) else 0


def lines_of(row: str, bench: Bench) -> list[Line]:
    """The lines of one row; a row that cannot be measured says why and the others go on."""
    name, function = ROWS[row]
    try:
        return list(function(bench))
    except (Failed, LookupError, ValueError, OSError) as error:
        return [
            Line(
                row,
                name,
                "",
                Missing(f"{type(error).__name__}: {error}"),
                Missing("not measured"),
                Goal("", lambda *_: None),
            )
        ]


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "optuna": metadata.version("optuna"),
        "at": time.strftime("%Y-%m-%d %H:%M"),
    }


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
