"""`sweeper vast list | logs | stop | destroy`: what carries our label, and nothing else."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

from sweeper import clock
from sweeper.errors import EXIT_OK, NotFound, UsageError
from sweeper.launch.vast.client import Client, Instance, VastError
from sweeper.launch.vast.ledger import LABEL, Ledger
from sweeper.launch.vast.renting import destroy_all
from sweeper.report import tables

PAUSE_S = 2.0


def main(action: str, name: str | None, *, data_dir: Path, num_lines: int, as_json: bool) -> int:
    """Do one of them; returns the exit code.

    Args:
        name: A sweep, or the number of an instance. `list` shows all without it.
        num_lines: How many lines of the log to show.
        as_json: Of `list`, for programs.
    """
    client = Client()
    ours = [instance for instance in client.instances() if instance.label.startswith(LABEL)]
    if action == "list":
        shown = [i for i in ours if name is None or name in (_sweep(i), str(i.instance_id))]
        print(json.dumps([_plain(i) for i in shown], indent=1)) if as_json else _print(shown)
        return EXIT_OK
    if name is None:
        raise UsageError(f"vast {action} needs a sweep, or the number of an instance")
    chosen = _choose(ours, name, data_dir)
    numbers = [instance.instance_id for instance in chosen]
    if action == "logs":
        for number in numbers:
            print(client.logs(number, num_lines=num_lines), end="")
        return EXIT_OK
    if action == "stop":
        return _stop(client, numbers)
    destroy_all(client, numbers, pause=_pause)
    print(f"destroyed: {', '.join(map(str, numbers))}")
    return EXIT_OK


def _choose(ours: list[Instance], name: str, data_dir: Path) -> list[Instance]:
    """The instances that a name means. Raises NotFound, UsageError."""
    found = [i for i in ours if str(i.instance_id) == name] or [i for i in ours if _sweep(i) == name]
    ledger = None if name.isdigit() else Ledger.find(data_dir, name)
    if ledger is not None and len({_series(i) for i in found}) > 1:
        found = [i for i in found if i.label.startswith(ledger.prefix)]
    if not found:
        raise NotFound(
            f"no instance on VastAI is ours and of {name!r}",
            do="`sweeper vast list` shows those that are; what has no label of sweeper is never touched.",
        )
    if len({_series(i) for i in found}) > 1:
        numbers = ", ".join(str(i.instance_id) for i in found)
        raise UsageError(
            f"several launches of {name} have instances: {numbers}", do="Name one of the numbers."
        )
    return found


def _sweep(instance: Instance) -> str:
    return instance.label.removeprefix(LABEL).partition(":")[0]


def _series(instance: Instance) -> str:
    return instance.label.rpartition(":")[0]


def _stop(client: Client, numbers: list[int]) -> int:
    """Stop, and see that it was taken. Raises VastError when that cannot be seen."""
    for number in numbers:
        client.stop(number)
    began_s = clock.awake_s()
    while True:
        still = [i for i in client.instances() if i.instance_id in numbers and i.intended != "stopped"]
        if not still:
            print(f"stopped: {', '.join(map(str, numbers))}; their disks stay, and are paid for")
            return EXIT_OK
        if clock.awake_s() - began_s > 60:
            raise VastError(
                f"instance {', '.join(str(i.instance_id) for i in still)} does not stop",
                do="Try again, or `sweeper vast destroy` it.",
            )
        _pause()


def _pause() -> None:
    threading.Event().wait(PAUSE_S)


def _plain(instance: Instance) -> dict[str, Any]:
    return {
        "instance_id": instance.instance_id, "sweep": _sweep(instance), "label": instance.label,
        "state": instance.actual or None, "intended": instance.intended or None, "gpu": instance.gpu,
        "usd_per_hour": instance.usd_h, "started_at": instance.started_at_s or None,
    }  # fmt: skip


def _print(instances: list[Instance]) -> None:
    if not instances:
        print("nothing of ours is rented", file=sys.stderr)
        return
    now_s = clock.wall_s()
    rows = [
        [
            str(i.instance_id), _sweep(i), i.actual or "being provided", i.gpu, f"{i.usd_h:.4f}",
            f"{max(0.0, now_s - i.started_at_s) / 3600:.1f} h" if i.started_at_s else "?", i.label,
        ]
        for i in instances
    ]  # fmt: skip
    print(tables.table(["instance", "sweep", "state", "gpu", "$/h", "age", "label"], rows))
