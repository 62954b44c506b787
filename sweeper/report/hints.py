"""Commands to type next, complete with the places that the user named."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from sweeper.reading import default_storage, hide_password


def next_command(*words: str, storage: str, data_dir: Path) -> str:
    """`python -m sweeper … WORDS` that works where this one was typed; no password in it."""
    places: list[str] = []
    usual = os.environ.get("SWEEPER_DATA_DIR") or os.environ.get("DATA_DIR") or "./outputs"
    if Path(usual) != data_dir:
        places += ["--data-dir", str(data_dir)]
    if storage not in (
        default_storage(str(data_dir)),
        default_storage(usual),
        os.environ.get("SWEEPER_STORAGE"),
    ):
        places += ["--storage", hide_password(storage)]
    return shlex.join(["python", "-m", "sweeper", *places, *words])
