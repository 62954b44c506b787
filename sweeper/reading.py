"""The read-only view of the database, for people and programs.

SQLite is read through the standard library, so that `sweeper list` answers in a tenth of a
second; a server is read through SQLAlchemy (`sweeper.reading_server`), imported only then. Both
run the same SQL text. Rows are plain dicts; `sweeper.reading_rows` says what is in them.
"""

from __future__ import annotations

import json
import os

from sweeper.errors import ConfigError, NotFound, StorageError
from sweeper.version_table import HEAD, VERSION_TABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Any, NoReturn, Self

    from sweeper.costs import Resumption, Steps
    from sweeper.reading_rows import AttemptRow, Counts, Database, Progress, RunRow, SweepRow


_TABLES = {"sweeper_sweep", "sweeper_run", "sweeper_attempt"}
_NEAR_AMONG = 5_000

_SWEEP_COLUMNS = "sweep_id, name, seed, n_trials, metric, direction, is_cancelled, created_at"

_RUNS = """
SELECT r.run_id, s.name AS sweep, r.number, r.trial, r.params, r.seed, r.path, r.wandb_run_id,
  r.state, r.outcome, r.reason, r.value, r.owner, r.worker, r.lease_epoch, r.lease_until,
  r.attempts, r.global_step, r.total_steps, r.checkpoint_step, r.replaces, r.retry_of, r.is_retried
FROM sweeper_run r JOIN sweeper_sweep s ON s.sweep_id = r.sweep_id
"""

# INVARIANT: word for word the condition of the partial index sweeper_run_incomplete, else
# SQLite does not use it and reads every run.
_IS_INCOMPLETE = "r.state IN ('running', 'interrupted')"

_COUNTS = """
SELECT state, COUNT(*) AS num_runs,
  SUM(CASE WHEN is_retried THEN 1 ELSE 0 END) AS num_retried,
  SUM(CASE WHEN attempts > 1 THEN 1 ELSE 0 END) AS num_resumed
FROM sweeper_run WHERE sweep_id = :sweep_id GROUP BY state
"""

_ATTEMPTS = """
SELECT run_id, attempt, lease_epoch, owner, started_at, went_on_at, ended_at, start_step, end_step,
  checkpoint_step, outcome, reason, detail
FROM sweeper_attempt WHERE run_id = :run_id ORDER BY attempt
"""

_NEWEST_IDS = """
SELECT run_id FROM sweeper_run WHERE sweep_id = (SELECT sweep_id FROM sweeper_sweep WHERE name = :sweep)
ORDER BY number DESC LIMIT :num
"""


class Reading:
    """Reads one database and never changes it; a context manager.

    A database that does not exist, or whose tables are not all there yet, reads as empty.

    Args:
        storage: `sqlite:///PATH` or the SQLAlchemy URL of a PostgreSQL database.
        busy_timeout_s: How long to wait for a lock that keeps readers out.

    Raises:
        StorageError: It is not a database, of another version, locked, or not reachable.
    """

    def __init__(self, storage: str, *, busy_timeout_s: float = 5.0) -> None:
        self._url = hide_password(storage)
        self._db = _open(storage, url=self._url, busy_timeout_s=busy_timeout_s)
        try:
            self.exists = self._db is not None and self._is_whole(self._db)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; safe to repeat."""
        if self._db is not None:
            self._db.close()
            self._db = None

    @property
    def url(self) -> str:
        """The storage URL looked at, with the password hidden."""
        return self._url

    # --- sweeps ----------------------------------------------------------------------------

    def sweeps(self) -> list[SweepRow]:
        """All sweeps, by name."""
        rows: list[Any] = self._rows(f"SELECT {_SWEEP_COLUMNS} FROM sweeper_sweep ORDER BY name")
        return [_sweep_row(row) for row in rows]

    def sweep(self, name: str) -> SweepRow:
        """One sweep. Raises NotFound."""
        rows = self._rows(f"SELECT {_SWEEP_COLUMNS} FROM sweeper_sweep WHERE name = :name", name=name)
        if not rows:
            self._no_sweep(name)
        return _sweep_row(rows[0])

    def config(self, name: str) -> dict[str, Any]:
        """The composed configuration of the sweep's last launch. Raises NotFound."""
        rows = self._rows("SELECT config FROM sweeper_sweep WHERE name = :name", name=name)
        if not rows:
            self._no_sweep(name)
        config: dict[str, Any] = _from_json(rows[0]["config"], of=f"config of sweep {name}")
        return config

    def counts(self, sweep: str) -> Counts:
        """How many runs of a sweep are where. Raises NotFound."""
        return self._counts(self.sweep(sweep))

    def best(self, sweep: str) -> RunRow | None:
        """The completed run with the best value, the earliest of equals; None when there is none.

        Raises:
            NotFound: There is no such sweep.
        """
        return self._best(self.sweep(sweep))

    def progress(self, sweep: str) -> Progress:
        """Everything a progress display shows, read in one transaction. Raises NotFound."""
        if self._db is not None:
            self._db.begin()
        try:
            row = self.sweep(sweep)
            counts = self._counts(row)
            open_runs = self.runs(sweep, incomplete=True)
            steps, resumption = self._costs("r.sweep_id = :id", row["sweep_id"])
            return {
                "sweep": sweep,
                "metric": row["metric"],
                "direction": row["direction"],
                "is_cancelled": row["is_cancelled"],
                "is_complete": not open_runs and (row["is_cancelled"] or counts["done"] >= row["n_trials"]),
                "counts": counts,
                "steps": steps,
                "resumption": resumption,
                "best": self._best(row),
                "open_runs": open_runs,
            }
        finally:
            if self._db is not None:
                self._db.end()

    def _counts(self, sweep: SweepRow) -> Counts:
        rows = {row["state"]: row for row in self._rows(_COUNTS, sweep_id=sweep["sweep_id"])}
        num = {state: int(row["num_runs"]) for state, row in rows.items()}
        retried = int(rows["failed"]["num_retried"]) if "failed" in rows else 0
        completed, pruned, failed = (num.get(state, 0) for state in ("completed", "pruned", "failed"))
        return {
            "n_trials": sweep["n_trials"],
            "done": completed + pruned + failed - retried,
            "running": num.get("running", 0),
            "interrupted": num.get("interrupted", 0),
            "completed": completed,
            "pruned": pruned,
            "failed": failed,
            "superseded": num.get("superseded", 0),
            "cancelled": num.get("cancelled", 0),
            "retried": retried,
            "resumed": sum(int(row["num_resumed"]) for row in rows.values()),
        }

    def _best(self, sweep: SweepRow) -> RunRow | None:
        order = "DESC" if sweep["direction"].lower() == "maximize" else "ASC"
        where = "WHERE r.sweep_id = :sweep_id AND r.state = 'completed' AND r.value IS NOT NULL"
        rows = self._rows(
            f"{_RUNS} {where} ORDER BY r.value {order}, r.number LIMIT 1", sweep_id=sweep["sweep_id"]
        )
        return _run_row(rows[0]) if rows else None

    def run_costs(self, run_id: str) -> tuple[Steps, Resumption]:
        """What failures cost a run, and how resuming it went."""
        return self._costs("r.run_id = :id", run_id)

    def resumption(self, sweep: str) -> Resumption:
        """How resuming went in a sweep. Raises NotFound."""
        return self._costs("r.sweep_id = :id", self.sweep(sweep)["sweep_id"])[1]

    def _costs(self, where: str, id: object) -> tuple[Steps, Resumption]:
        from sweeper import costs  # a listing does without

        if self._db is None or not self.exists:
            return costs.nothing()

        def query(sql: str) -> dict[str, Any]:
            (row,) = self._rows(sql, id=id)
            return row

        return costs.steps_of(query, where), costs.resumption_of(query, where)

    # --- runs ------------------------------------------------------------------------------

    def runs(
        self, sweep: str | None = None, *, incomplete: bool = False, state: str | None = None
    ) -> list[RunRow]:
        """Runs by sweep and number: all, those of one sweep, the unfinished, those in one state.

        Raises:
            NotFound: `sweep` is named, but does not exist.
        """
        conditions: list[str] = []
        parameters: dict[str, object] = {}
        if sweep is not None:
            # The + keeps SQLite from walking all runs of the sweep instead of the unfinished ones.
            conditions.append(f"{'+' if incomplete else ''}r.sweep_id = :sweep_id")
            parameters["sweep_id"] = self.sweep(sweep)["sweep_id"]
        if incomplete:
            conditions.append(_IS_INCOMPLETE)
        if state is not None:
            conditions.append("r.state = :state")
            parameters["state"] = state
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        rows = self._rows(f"{_RUNS} {where} ORDER BY s.name, r.number", **parameters)
        return [_run_row(row) for row in rows]

    def run(self, run_id: str) -> RunRow:
        """One run. Raises NotFound."""
        rows = self._rows(f"{_RUNS} WHERE r.run_id = :run_id", run_id=run_id)
        if not rows:
            self._no_run(run_id)
        return _run_row(rows[0])

    def attempts(self, run_id: str) -> list[AttemptRow]:
        """The attempts of a run in order. Raises NotFound."""
        self.run(run_id)
        rows: list[Any] = self._rows(_ATTEMPTS, run_id=run_id)
        for row in rows:
            row["owner"] = _owner(row["owner"], of=f"attempt {row['attempt']} of {run_id}")
        return rows

    # --- inside ----------------------------------------------------------------------------

    def _rows(self, sql: str, **parameters: object) -> list[dict[str, Any]]:
        if self._db is None or not self.exists:
            return []
        return self._db.rows(sql, parameters)

    def _is_whole(self, db: Database) -> bool:
        tables = db.tables()
        if VERSION_TABLE in tables:
            versions = [row["version_num"] for row in db.rows(f"SELECT version_num FROM {VERSION_TABLE}", {})]
            if not versions:
                return False
            _check_version(max(versions), self._url)
        return tables >= _TABLES

    def _no_sweep(self, name: str) -> NoReturn:
        if not self.exists:
            raise NotFound(f"sweep {name!r} does not exist", why=self._nothing())
        known = [row["name"] for row in self.sweeps()]
        has = f"{self._url} has {_some(known)}" if known else f"{self._url} has no sweep"
        raise NotFound(f"sweep {name!r} does not exist", why=has, do=_did_you_mean(name, known))

    def _no_run(self, run_id: str) -> NoReturn:
        if not self.exists:
            raise NotFound(f"run {run_id!r} does not exist", why=self._nothing())
        sweep = run_id.partition(".r.")[0]
        known = [row["run_id"] for row in self._rows(_NEWEST_IDS, sweep=sweep, num=_NEAR_AMONG)]
        if not known:
            sweeps = [row["name"] for row in self.sweeps()]
            raise NotFound(
                f"run {run_id!r} does not exist",
                why=f"{self._url} has runs of {_some(sweeps)}" if sweeps else f"{self._url} has no sweep",
                do=_did_you_mean(sweep, sweeps) or "`sweeper list` shows every run.",
            )
        number = run_id.partition(".r.")[2]
        meant = f"{sweep}.r.{int(number):05d}" if number.isdecimal() else ""
        raise NotFound(
            f"run {run_id!r} does not exist",
            why=f"the newest run of sweep {sweep} in {self._url} is {known[0]}",
            do=f"Did you mean {meant}?" if meant in known else f"`sweeper list {sweep}` shows them all.",
        )

    def _nothing(self) -> str:
        return f"there is no database yet at {self._url}"


# --- rows ----------------------------------------------------------------------------------


def _sweep_row(row: Any) -> SweepRow:
    row["is_cancelled"] = bool(row["is_cancelled"])
    result: SweepRow = row
    return result


def _run_row(row: Any) -> RunRow:
    row["params"] = _from_json(row["params"], of=f"parameters of {row['run_id']}")
    row["owner"] = _owner(row["owner"], of=row["run_id"]) if row["state"] == "running" else None
    row["is_retried"] = bool(row["is_retried"])
    result: RunRow = row
    return result


def _owner(text: str | None, *, of: str) -> dict[str, Any] | None:
    return _from_json(text, of=f"owner of {of}") if text else None


def _from_json(text: str, *, of: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise StorageError(f"the {of} in the database cannot be read", why=f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise StorageError(f"the {of} in the database cannot be read", why="not a JSON object")
    return value


def _check_version(found: str, url: str) -> None:
    if found == HEAD:
        return
    if found > HEAD:
        raise StorageError(
            f"the database {url} is newer than this sweeper",
            why=f"its tables have version {found}, this code knows {HEAD}",
            do="Install the newer sweeper that wrote it.",
        )
    raise StorageError(
        f"the database {url} is older than this sweeper",
        why=f"its tables have version {found}, this code needs {HEAD}",
        do="Run `sweeper db upgrade`.",
    )


def _some(names: list[str], *, limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _did_you_mean(name: str, known: list[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=3)
    return f"Did you mean {' or '.join(near)}?" if near else ""


# --- storage URLs --------------------------------------------------------------------------


def default_storage(data_dir: str) -> str:
    """The database of a data directory, where none is named."""
    return f"sqlite:///{os.path.join(data_dir, 'sweeper.db')}"


def hide_password(storage: str) -> str:
    """The storage URL with passwords replaced by `***`, for messages."""
    import re

    hidden = re.sub(r"(://[^:/@]*):.*@", r"\1:***@", storage)
    return re.sub(r"([?&][^=&]*password=)[^&]*", r"\1***", hidden, flags=re.IGNORECASE)


def sqlite_path(storage: str) -> str | None:
    """The file of a `sqlite:///PATH` URL; None when the URL is of another kind of database."""
    scheme, separator, rest = storage.partition("://")
    if not separator or scheme.partition("+")[0] != "sqlite":
        return None
    path = rest.removeprefix("/").partition("?")[0]
    if path in ("", ":memory:"):
        raise StorageError(
            f"{storage} cannot be used",
            why="a database in memory is seen by one process only",
            do="Name a file: sqlite:///PATH.",
        )
    return path


def _open(storage: str, *, url: str, busy_timeout_s: float) -> Database | None:
    path = sqlite_path(storage)
    if path is None:
        if not storage.startswith("postgresql"):
            raise ConfigError(
                f"storage {url!r} is not a database that sweeper can use",
                do="Use sqlite:///PATH or postgresql://USER@HOST/DATABASE.",
            )
        from sweeper.reading_server import Server

        return Server(storage, url=url, timeout_s=busy_timeout_s)
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StorageError(
            f"the database {url} cannot be opened", why=error.strerror or str(error)
        ) from error
    return _Sqlite(path, url=url, timeout_s=busy_timeout_s)


# --- SQLite --------------------------------------------------------------------------------


class _Sqlite:
    """One SQLite file, opened read-only. Source: sqlite.org/uri.html, sqlite.org/wal.html."""

    def __init__(self, path: str, *, url: str, timeout_s: float) -> None:
        import sqlite3

        self._url, self._timeout_s = url, timeout_s
        self._error = sqlite3.Error
        name = os.path.abspath(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
        try:
            self._connection = sqlite3.connect(
                f"file:{name}?mode=ro", uri=True, timeout=timeout_s, isolation_level=None
            )
        except sqlite3.Error as error:
            raise self._storage_error(error) from error

    def rows(self, sql: str, parameters: Mapping[str, object]) -> list[dict[str, Any]]:
        try:
            cursor = self._connection.execute(sql, parameters)
            names = [column[0] for column in cursor.description or ()]
            return [dict(zip(names, row, strict=True)) for row in cursor]
        except self._error as error:
            raise self._storage_error(error) from error

    def tables(self) -> set[str]:
        return {row["name"] for row in self.rows("SELECT name FROM sqlite_master WHERE type = 'table'", {})}

    def begin(self) -> None:
        self.rows("BEGIN", {})

    def end(self) -> None:
        if self._connection.in_transaction:
            self.rows("ROLLBACK", {})

    def close(self) -> None:
        self._connection.close()

    def _storage_error(self, error: Exception) -> StorageError:
        text = str(error)
        if "locked" in text or "busy" in text:
            return StorageError(
                f"the database {self._url} is locked",
                why=f"another process held it for more than {self._timeout_s:g} s ({text})",
                do="Try again; a process stopped in the middle of a write must be continued or killed first.",
            )
        if "not a database" in text or "malformed" in text:
            return StorageError(
                f"{self._url} is not a usable database",
                why=text,
                do="Check --storage; if the file is damaged, move it away and run `sweeper rebuild DATA_DIR`.",
            )
        return StorageError(
            f"the database {self._url} cannot be read",
            why=text,
            do="Check that the path names a SQLite file which you may read.",
        )
