"""Whose copy it is: one object a generation, created conditionally, numbered without gaps.

INVARIANT: whoever holds generation n may write only while there is no n + 1. A machine that comes back
from the dead finds it, and stops.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from sweeper import fsops, rundir
from sweeper.errors import ConfigError, Fenced, SweeperError
from sweeper.mirror.bucket import Bucket

TOKEN_FILE = "mirror.json"
MAX_GENERATION_BYTES = 64 << 10
_ADVICE = (
    "Nothing more is written from here. To go on here all the same, launch with a fresh data directory (data_dir=…): "
    "it takes over in its turn and fetches the newer copy."
)
_NAME = re.compile(r"generations/([0-9]{8})\.json\Z")


@dataclass(frozen=True, slots=True)
class Generation:
    """Who holds the copy: the newest generation does.

    Attributes:
        token: Random; the holder's data directory has the same.
    """

    number: int
    host: str
    claimed_at: str
    token: str = ""

    def __str__(self) -> str:
        return f"generation {self.number} held by {self.host} since {self.claimed_at}"


@dataclass(frozen=True, slots=True)
class Token:
    """mirror.json of a data directory: which generation of which copy is its own.

    Attributes:
        is_restored: Everything that the copy held when it was claimed is here, database included.
    """

    url: str
    sweep: str
    generation: int
    token: str
    is_restored: bool = False
    schema_version: int = 1


class Step(StrEnum):
    """What a launch does about the copy."""

    GO_ON = "go on"
    CLAIM = "claim"
    REFUSE = "refuse"


def decide(token: Token | None, newest: Generation | None, *, url: str) -> tuple[Step, str]:
    """What a launch does about the copy, and why."""
    if token is None or token.url != url:
        return (
            Step.CLAIM,
            "there is no copy yet" if newest is None else "this data directory holds none of it",
        )
    if newest is None:  # emptied on purpose, or a bucket of the same name
        return Step.CLAIM, "the copy that this data directory held is gone"
    if (newest.number, newest.token) == (token.generation, token.token):
        return Step.GO_ON, "it is this data directory's"
    return Step.REFUSE, f"it has {newest}, and this data directory holds generation {token.generation}"


def name_of(number: int) -> str:
    """The object's name."""
    return f"generations/{number:08d}.json"


def newest(bucket: Bucket) -> Generation | None:
    """The newest generation there is. Raises OSError."""
    numbers = [int(match[1]) for name in bucket.names("generations/") if (match := _NAME.match(name))]
    return read(bucket, max(numbers)) if numbers else None


def read(bucket: Bucket, number: int) -> Generation:
    """One that exists; what cannot be read of it is `unknown`. Raises OSError."""
    data: dict[str, Any] = bucket.read_json(name_of(number), limit_bytes=MAX_GENERATION_BYTES)
    texts = {key: _printable(data.get(key)) for key in ("host", "claimed_at", "token")}
    return Generation(number, texts["host"] or "unknown", texts["claimed_at"] or "unknown", texts["token"])


def _printable(value: object) -> str:
    return value[:200] if isinstance(value, str) and value.isprintable() else ""


def claim(bucket: Bucket, number: int) -> Generation:
    """Become the holder of generation `number`.

    Raises:
        Fenced: Somebody else did.
        OSError: The store refused; whether it took the object is not known.
    """
    mine = Generation(
        number, socket.gethostname(), datetime.now(UTC).isoformat(timespec="seconds"), secrets.token_hex(16)
    )
    try:
        bucket.create(name_of(number), rundir.to_json({"schema_version": 1, **asdict(mine)}))
    except OSError as error:
        # Whatever was said: a client may have repeated a request that had been taken.
        try:
            there = read(bucket, number)
        except FileNotFoundError:
            raise error from None
        if there.token != mine.token:
            raise Fenced(
                f"somebody else has just claimed this copy: {there}",
                do="Nothing was started. Let it work, or launch again to take over from it.",
            ) from error
    return mine


def check(bucket: Bucket, number: int) -> None:
    """Raise Fenced when somebody has taken over from generation `number`; OSError when that cannot be told."""
    if bucket.exists(name_of(number + 1)):
        raise Fenced(overtaken(newest(bucket) or read(bucket, number + 1), number))


def overtaken(newer: Generation, number: int) -> str:
    """The sentence of a machine that stops itself."""
    return (
        f"{newer.host} has taken over the copy (generation {newer.number}, claimed {newer.claimed_at}; "
        f"this data directory holds generation {number})"
    )


def fenced(sweep: str, reason: str) -> Fenced:
    """The error of a machine whose copy was taken over."""
    return Fenced(f"sweep {sweep} goes on elsewhere", why=reason, do=_ADVICE)


# --- the data directory's end ------------------------------------------------------------------


def token_path(data_dir: Path, sweep: str) -> Path:
    """Where a data directory keeps its token."""
    return data_dir / "sweep" / sweep / TOKEN_FILE


def read_token(data_dir: Path, sweep: str) -> Token | None:
    """The token, or None. Raises SweeperError when what is there is none."""
    path = token_path(data_dir, sweep)
    try:
        data = rundir.read_json(path)
    except FileNotFoundError:
        return None
    try:
        token = Token(**data)
    except TypeError as error:
        raise rundir.Damaged(f"{path} is not what was written", why=str(error)) from error
    kinds = (
        (token.url, str),
        (token.sweep, str),
        (token.generation, int),
        (token.token, str),
        (token.is_restored, bool),
    )
    if any(type(value) is not kind for value, kind in kinds) or token.sweep != sweep:
        raise SweeperError(f"{path} is not what was written", do="Move it away; the next launch claims anew.")
    return token


def write_token(data_dir: Path, token: Token) -> None:
    """Put the token in place, 0600, durably."""
    path = token_path(data_dir, token.sweep)
    os.makedirs(path.parent, mode=0o700, exist_ok=True)
    fsops.replace(path, rundir.to_json(asdict(token)))


def check_token(url: str | None, sweep: str, *, data_dir: Path) -> Token | None:
    """The token for the copy at `url`; None where nothing is copied. Asks nobody.

    Raises:
        ConfigError: This data directory holds none, or has not fetched everything yet.
    """
    if url is None:
        return None
    token = read_token(data_dir, sweep)
    if token is None or token.url != url or not token.is_restored:
        raise ConfigError(
            f"{data_dir} holds no generation of the copy {url}",
            do=f"`sweeper launch` with mirror.url={url} claims it, and fetches what there is of sweep {sweep}.",
        )
    return token
