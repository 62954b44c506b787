"""What was rented for a sweep, and what it cost: <data_dir>/sweep/NAME/vast/state.json.

INVARIANT: what is about to be rented is on disk, with its label, before it is asked for; so whatever
is rented can be found again, whenever a launcher dies. Holds no secret: it names variables only.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from sweeper import fsops
from sweeper.errors import ConfigError

LABEL = "sweeper:"
"""What the label of everything begins with that we rent. Nothing else is ever touched."""


@dataclass(slots=True)
class Rental:
    """One instance, from the intent to rent it until it is known to be gone. Times are seconds since 1970.

    Attributes:
        limit_s: How long the instance lets itself run.
        booked_at_s: Until when `spent_usd` is counted.
        heard: The last word of the script, as it stood in the log.
        ignored: A last word of before it was started again, which counts no more.
        why: Why it ended, or is given up.
        is_ending: It has to be destroyed, whatever comes.
        is_kept: It is stopped, and its disk may hold what nothing else does.
        was_kept: It was, and is started again.
    """

    number: int
    offer_id: int
    machine_id: int
    usd_h: float
    storage_usd_h: float
    limit_s: float
    intended_at_s: float
    booked_at_s: float
    instance_id: int | None = None
    up_at_s: float | None = None
    spent_usd: float = 0.0
    heard: str = ""
    ignored: str = ""
    why: str = ""
    is_ending: bool = False
    is_kept: bool = False
    was_kept: bool = False
    gone_at_s: float | None = None

    def book(self, now_s: float, *, usd_h: float) -> None:
        """Count the cost until now, at a price."""
        self.spent_usd += max(0.0, now_s - self.booked_at_s) * usd_h / 3600.0
        self.booked_at_s = max(now_s, self.booked_at_s)


@dataclass(slots=True)
class Ledger:
    """All instances of one series: of a sweep, from its launch until it is complete or has failed.

    Attributes:
        series: Part of the labels; another account, machine or data directory has another.
        command: The launch's arguments, to go on with.
        outcome: "" while it is open; done or failed.
    """

    path: Path
    sweep: str
    series: str
    command: list[str]
    began_at_s: float | None = None
    outcome: str = ""
    avoid: list[int] = field(default_factory=list)
    rentals: list[Rental] = field(default_factory=list)

    @classmethod
    def open(cls, data_dir: Path, sweep: str, command: Sequence[str] = ()) -> Ledger:
        """The sweep's series that is open, or a new one. Raises ConfigError for a file it cannot read."""
        found = cls.find(data_dir, sweep)
        if found is not None and not found.outcome:
            found.command = list(command) or found.command
            return found
        return cls(path_of(data_dir, sweep), sweep, secrets.token_hex(4), list(command))

    @classmethod
    def find(cls, data_dir: Path, sweep: str) -> Ledger | None:
        """The sweep's last series. Raises ConfigError for a file it cannot read."""
        path = path_of(data_dir, sweep)
        try:
            plain = json.loads(path.read_bytes())
            known = {field.name for field in fields(Rental)}
            rentals = [Rental(**{k: v for k, v in row.items() if k in known}) for row in plain["rentals"]]
            return cls(
                path, plain["sweep"], plain["series"], plain["command"], plain["began_at_s"],
                plain["outcome"], plain["avoid"], rentals,
            )  # fmt: skip
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} cannot be read", why=f"{type(error).__name__}: {error}",
                do=f"It tells which instances are rented: look at `sweeper vast list`, destroy those of {sweep}, and remove it.",
            ) from error  # fmt: skip

    def save(self) -> None:
        """Write it, atomically and durably."""
        plain = {"schema_version": 1, **asdict(self)}
        del plain["path"]
        os.makedirs(self.path.parent, mode=0o700, exist_ok=True)
        fsops.replace(self.path, (json.dumps(plain, indent=1) + "\n").encode())

    @property
    def current(self) -> Rental | None:
        """The instance that there is, or may be."""
        last = self.rentals[-1] if self.rentals else None
        return last if last is not None and last.gone_at_s is None else None

    @property
    def spent_usd(self) -> float:
        """Of all instances, as far as booked."""
        return sum(rental.spent_usd for rental in self.rentals)

    @property
    def prefix(self) -> str:
        """What the labels of this series begin with."""
        return f"{LABEL}{self.sweep}:{self.series}:"

    def label(self, rental: Rental) -> str:
        """One label for each intent: an instance that comes late is told from its successor."""
        return f"{self.prefix}{rental.number}"


def path_of(data_dir: Path, sweep: str) -> Path:
    """Where a sweep's ledger lies."""
    return data_dir / "sweep" / sweep / "vast" / "state.json"


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Be the only launcher of a ledger. Raises ConfigError when there is another on this machine."""
    os.makedirs(path.parent, mode=0o700, exist_ok=True)
    busy = ConfigError(
        f"another launcher follows {path.parent.parent.name} on VastAI",
        do="Leave it to that one, or end it; its instance goes on meanwhile.",
    )
    with fsops.held(path.with_name("lock"), busy=busy):
        yield
