"""The script that an instance runs at each start: onstart.sh, filled in and packed."""

from __future__ import annotations

import base64
import os
import re
import shlex
import zlib
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files

from sweeper.errors import ConfigError
from sweeper.launch.settings import is_secret
from sweeper.launch.vast.plan import Plan

MAX_CHARACTERS = 4048
"""Of an on-start script. Source: VastAI's API reference, PUT /asks/{id}/, `onstart`."""

_PLACE = re.compile(r"@([A-Z_]+)@")


def script(
    plan: Plan,
    sweep: str,
    series: str,
    *,
    limit_s: float,
    launch: Sequence[str],
    is_fresh: bool,
    wandb: str = "",
) -> str:
    """The script with every value quoted for the shell.

    Args:
        limit_s: When the instance ends itself, in any case.
        launch: The module that launches the sweep there, and its arguments.
        is_fresh: Clear what an earlier series made on this disk, and bring no copy back.
    """
    values: dict[str, str] = {
        "SWEEP": sweep,
        "SERIES": series,
        "LIMIT_S": str(max(1, int(limit_s))),
        "GRACE_S": str(int(min(plan.grace_s, limit_s / 4))),
        "LINGER_S": f"{plan.linger_s:g}",
        "RETRY_S": str(round(plan.poll_s)),
        "SHUTDOWN": "yes" if plan.auto_shutdown else "no",
        "FRESH": "yes" if is_fresh else "no",
        "GIT_URL": plan.git_url or "",
        "GIT_BRANCH": plan.git_branch or "",
        "PYTHON": plan.python or "",
    }
    lists: dict[str, Iterable[str]] = {
        "SETUP": plan.setup_lines, "DATA": plan.data, "RESTORE": plan.restore, "SAVE": plan.save, "LAUNCH": launch,
    }  # fmt: skip
    filled = {name: shlex.quote(value) for name, value in values.items()}
    filled |= {name: " ".join(map(shlex.quote, items)) for name, items in lists.items()}
    template = files("sweeper.launch.vast").joinpath("onstart.sh").read_text(encoding="utf-8")
    # In one pass: a value that looks like a place stays as it is.
    return _PLACE.sub(lambda match: filled[match[1]], template)


def packed(text: str) -> str:
    """The script as VastAI takes it: short enough, to be unpacked by the image's Python.

    Raises:
        ConfigError: It is too long all the same.
    """
    lines = (line.strip() for line in text.splitlines())
    short = "\n".join(line for line in lines if line and not line.startswith("#"))
    body = base64.b85encode(zlib.compress(short.encode(), 9)).decode()
    # b85 has no quote and no backslash.
    result = (
        '#!/bin/bash\nw="${SWEEPER_WORKSPACE:-/workspace}"\nmkdir -p "$w"\n'
        "python3 -c 'import base64,sys,zlib;sys.stdout.buffer.write(zlib.decompress(base64.b85decode(sys.argv[1])))' "
        f'\'{body}\' >"$w/onstart.sh" && exec bash "$w/onstart.sh"\n'
    )
    if len(result) > MAX_CHARACTERS:
        raise ConfigError(
            f"the script of the instance has {len(result)} characters, packed; VastAI takes {MAX_CHARACTERS}",
            do="Put lines of launcher.setup and launcher.data into a file of the repository, and overrides into a sweep of your own (+sweep=, --config-dir).",
        )
    return result


_OURS = ("data_dir", "launcher", "storage", "hydra")


def arguments(command: Sequence[str], plan: Plan, *, sweep: str, n_trials: int) -> list[str]:
    """Of `sweeper launch` on the instance: what was typed here, without what belongs to this machine.

    Raises:
        ConfigError: A configuration of this machine's own is named by an absolute path.
    """
    kept = []
    for argument in command:
        key = argument.lstrip("+~").partition("=")[0].partition(".")[0]
        is_override = "=" in argument and not argument.startswith("-")
        if (is_override or argument.startswith("~")) and key in _OURS:
            continue
        kept.append(argument)
    for at, argument in enumerate(kept):
        option, _, value = argument.partition("=")
        if option in ("--config-dir", "-cd"):
            value = value or (kept[at + 1] if at + 1 < len(kept) else "")
            if os.path.isabs(value) or value.startswith(".."):
                raise ConfigError(
                    f"{option} {value} is not on the instance",
                    do="Name a directory in the repository, relative to it.",
                )
    own = {
        "launcher": "local",
        "launcher.n_workers": plan.n_workers,
        "launcher.gpus_per_worker": plan.gpus_per_worker,
        "launcher.ranks_per_worker": plan.ranks_per_worker,
        "sweep.name": sweep,
        "sweep.n_trials": n_trials,
    }
    return [*kept, *(f"{key}={value}" for key, value in own.items()), *plan.overrides]


def environment(plan: Plan, here: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that are handed on. Raises ConfigError when one is not set here."""
    missing = [name for name in plan.env if not here.get(name)]
    if missing:
        raise ConfigError(
            f"launcher.env names {', '.join(missing)}", why="not set here", do="Set it, or take it out."
        )
    return {name: here[name] for name in plan.env}


def refuse_secrets(texts: Iterable[str], plan: Plan, here: Mapping[str, str] = os.environ) -> None:
    """Refuse a text that holds a secret of this environment. Raises ConfigError, naming the variable."""
    secrets = {
        name: value for name, value in here.items()
        if len(value) >= 8 and (is_secret(name, value) or (name in plan.env and len(value) >= 16))
    }  # fmt: skip
    for text in texts:
        for name, value in secrets.items():
            if value in text:
                raise ConfigError(
                    f"the script of the instance would hold the value of {name}",
                    why="an override or a line of launcher.setup, data, restore or save has it",
                    do=f"Write ${{oc.env:{name}}} in overrides, ${name} in lines, and name it in launcher.env.",
                )
