"""The read-only view: what it finds, what it refuses, and that it changes nothing."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from filled import Filled

from sweeper.errors import ConfigError, NotFound, StorageError
from sweeper.reading import Reading, default_storage, hide_password, sqlite_path


@pytest.fixture
def filled(tmp_path: Path) -> Filled:
    return Filled(tmp_path / "data")


def test_runs_come_by_sweep_and_number(filled: Filled) -> None:
    for sweep, number in [("b", 1), ("a", 10), ("a", 2)]:
        filled.run(number, sweep=sweep)
    with Reading(filled.url) as reading:
        assert [run["run_id"] for run in reading.runs()] == ["a.r.00002", "a.r.00010", "b.r.00001"]
        assert [run["run_id"] for run in reading.runs("a")] == ["a.r.00002", "a.r.00010"]


def test_incomplete_and_state_filter(filled: Filled) -> None:
    for number, state in enumerate(["completed", "running", "interrupted", "failed"]):
        filled.run(number, state=state)
    filled.run(0, sweep="other", state="running")
    with Reading(filled.url) as reading:
        assert [run["state"] for run in reading.runs("simple", incomplete=True)] == ["running", "interrupted"]
        assert [run["sweep"] for run in reading.runs(incomplete=True)] == ["other", "simple", "simple"]
        assert [run["number"] for run in reading.runs(state="failed")] == [3]
        assert reading.runs(incomplete=True, state="failed") == []


@pytest.mark.parametrize("sweep", [None, "simple"])
def test_incomplete_runs_are_found_through_their_index(
    filled: Filled, sweep: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled.run(0)
    statements: list[tuple[str, dict[str, object]]] = []
    with Reading(filled.url) as reading:
        rows = reading._rows
        monkeypatch.setattr(reading, "_rows", lambda sql, **p: statements.append((sql, p)) or rows(sql, **p))  # type: ignore[func-returns-value]
        reading.runs(sweep, incomplete=True)
        sql, parameters = statements[-1]
        plans = [row["detail"] for row in rows(f"EXPLAIN QUERY PLAN {sql}", **parameters)]
    assert any("sweeper_run_incomplete" in plan for plan in plans)


def test_json_columns_are_decoded(filled: Filled) -> None:
    run_id = filled.run(3, state="running")
    with Reading(filled.url) as reading:
        run = reading.run(run_id)
        assert reading.config("simple") == {"sweep": {"name": "simple"}}
    assert run["params"] == {"trainer.lr": 0.01, "trainer.width": 32}
    assert run["owner"] is not None
    assert run["owner"]["pid"] > 0
    assert run["is_retried"] is False


def test_json_that_is_damaged_is_an_error_with_the_run(filled: Filled) -> None:
    filled.run(3, params="{")
    with Reading(filled.url) as reading, pytest.raises(StorageError, match=r"simple\.r\.00003"):
        reading.runs()


def test_counts(filled: Filled) -> None:
    states = [
        "completed",
        "completed",
        "pruned",
        "failed",
        "running",
        "interrupted",
        "superseded",
        "cancelled",
    ]
    for number, state in enumerate(states):
        filled.run(number, state=state, attempts=1 + (state == "completed"))
    filled.run(20, state="failed", is_retried=True)
    with Reading(filled.url) as reading:
        assert reading.counts("simple") == {
            "n_trials": 20,
            "done": 4,
            "running": 1,
            "interrupted": 1,
            "completed": 2,
            "pruned": 1,
            "failed": 2,
            "superseded": 1,
            "cancelled": 1,
            "retried": 1,
            "resumed": 2,
        }


@pytest.mark.parametrize(("direction", "best"), [("maximize", 1), ("minimize", 0)])
def test_best_is_the_earliest_of_the_best_completed(filled: Filled, direction: str, best: int) -> None:
    filled.sweep(direction=direction)
    for number, value in enumerate([0.5, 0.9, 0.9, 0.5]):
        filled.run(number, value=value)
    filled.run(4, state="pruned", value=2.0)
    filled.run(5, state="pruned", value=-2.0)
    filled.run(6, value=None)
    with Reading(filled.url) as reading:
        run = reading.best("simple")
    assert run is not None
    assert run["number"] == best


def test_best_of_nothing_is_none(filled: Filled) -> None:
    filled.run(0, state="running", value=None)
    with Reading(filled.url) as reading:
        assert reading.best("simple") is None


def test_steps_tell_what_failures_cost(filled: Filled) -> None:
    # 0..120, killed; from the checkpoint at 100 to 250, killed before it said where it starts;
    # from 250 to 300.
    resumed = filled.run(0, attempts=4, global_step=300)
    filled.attempt(resumed, 1, start_step=0, end_step=120, outcome="lost")
    filled.attempt(resumed, 2, start_step=100, end_step=250, outcome="preempted")
    filled.attempt(resumed, 3, start_step=None, end_step=250, outcome="lost")
    filled.attempt(resumed, 4, start_step=250, end_step=300, outcome="completed")
    with Reading(filled.url) as reading:
        steps = reading.progress("simple")["steps"]
    assert steps == {"trained": 320, "recovered": 350, "lost": 20, "goodput": 300 / 320}


def test_steps_of_a_superseded_run_are_all_lost(filled: Filled) -> None:
    run_id = filled.run(0, state="superseded", global_step=80)
    filled.attempt(run_id, 1, start_step=0, end_step=80, outcome="crashed")
    with Reading(filled.url) as reading:
        steps = reading.progress("simple")["steps"]
    assert steps == {"trained": 80, "recovered": 0, "lost": 80, "goodput": 0.0}


def test_steps_of_a_running_attempt_end_where_it_is(filled: Filled) -> None:
    run_id = filled.run(0, state="running", global_step=70)
    filled.attempt(run_id, 1, start_step=0)
    with Reading(filled.url) as reading:
        assert reading.progress("simple")["steps"]["trained"] == 70


@pytest.mark.parametrize("state", ["running", "interrupted", "completed"])
def test_an_attempt_that_is_over_does_not_go_on_with_its_run(filled: Filled, state: str) -> None:
    run_id = filled.run(0, state=state, attempts=2, global_step=50)
    filled.attempt(run_id, 1, start_step=0, outcome="lost")  # where it ended is not known
    filled.attempt(run_id, 2, start_step=25, end_step=50 if state == "completed" else 40)
    with Reading(filled.url) as reading:
        steps = reading.progress("simple")["steps"]
    trained = 15 if state == "interrupted" else 25
    assert steps == {"trained": trained, "recovered": 25, "lost": 0, "goodput": 1.0}


def test_resumption_tells_how_resuming_went(filled: Filled) -> None:
    # 100 steps in 50 s, lost at 100; from 80 after 4 s for 20 s; a resume that failed; one after 6 s, for 30 s.
    run_id = filled.run(0, attempts=4, global_step=200)
    timed = {"num_gpus": 2}
    filled.attempt(
        run_id,
        1,
        start_step=0,
        end_step=100,
        outcome="lost",
        started_at=0.0,
        went_on_at=1.0,
        ended_at=51.0,
        **timed,
    )
    filled.attempt(
        run_id,
        2,
        start_step=80,
        end_step=120,
        outcome="preempted",
        started_at=60.0,
        went_on_at=64.0,
        ended_at=84.0,
        **timed,
    )
    filled.attempt(
        run_id, 3, start_step=None, end_step=120, outcome="crashed", started_at=90.0, ended_at=91.0
    )
    filled.attempt(
        run_id,
        4,
        start_step=120,
        end_step=180,
        outcome="completed",
        started_at=94.0,
        went_on_at=100.0,
        ended_at=130.0,
        **timed,
    )
    given_up = filled.run(1, state="superseded")
    filled.attempt(
        given_up,
        1,
        start_step=0,
        end_step=10,
        outcome="crashed",
        started_at=0.0,
        went_on_at=1.0,
        ended_at=2.0,
    )
    with Reading(filled.url) as reading:
        resumption = reading.progress("simple")["resumption"]
        _, of_run = reading.run_costs(run_id)
    seconds_saved = 200 * 100 / 200  # 80 + 120 steps at half a second
    expected = {
        "tried": 3, "succeeded": 2, "failed": 1, "fallbacks": 1, "latency_s": 5.0,
        "success_rate": 2 / 3, "failure_rate": 1 / 3, "fallback_rate": 1 / 3,
        "seconds_saved": seconds_saved, "gpu_seconds_saved": 2 * seconds_saved,
    }  # fmt: skip
    assert resumption == expected
    assert of_run == {**expected, "fallbacks": 0, "fallback_rate": 0.0}


def test_progress(filled: Filled) -> None:
    filled.sweep(n_trials=2)
    filled.run(0, value=0.9)
    filled.run(1, state="running", global_step=5, total_steps=10)
    with Reading(filled.url) as reading:
        progress = reading.progress("simple")
        assert not progress["is_complete"]
        assert [run["number"] for run in progress["open_runs"]] == [1]
        assert progress["best"] is not None
        assert progress["best"]["value"] == 0.9
        filled.execute("UPDATE sweeper_run SET state='completed'")
        assert reading.progress("simple")["is_complete"]


def test_cancelled_sweep_is_complete_once_nothing_runs(filled: Filled) -> None:
    filled.sweep(n_trials=5, is_cancelled=True)
    filled.run(0, state="cancelled")
    with Reading(filled.url) as reading:
        assert reading.progress("simple")["is_complete"]


def test_attempts_come_in_order(filled: Filled) -> None:
    run_id = filled.run(0)
    for attempt in (2, 1):
        filled.attempt(run_id, attempt)
    with Reading(filled.url) as reading:
        assert [row["attempt"] for row in reading.attempts(run_id)] == [1, 2]


# --- what is not there ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["missing", "missing directory", "empty file", "no tables", "no version yet"]
)
def test_no_database_yet_reads_as_empty(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "sweeper.db"
    if kind == "missing directory":
        path = tmp_path / "nowhere" / "sweeper.db"
    elif kind == "empty file":
        path.touch()
    elif kind == "no tables":
        sqlite3.connect(path).execute("CREATE TABLE studies (x)")
    elif kind == "no version yet":
        Filled(tmp_path, version=None)
    with Reading(f"sqlite:///{path}") as reading:
        assert not reading.exists
        assert reading.sweeps() == []
        assert reading.runs() == []
        with pytest.raises(NotFound, match="no database yet"):
            reading.runs("simple")
        with pytest.raises(NotFound, match="no database yet"):
            reading.run("simple.r.00000")
        with pytest.raises(NotFound):
            reading.progress("simple")
    assert kind not in ("missing", "missing directory") or not path.exists()


def test_unknown_sweep_says_which_exist(filled: Filled) -> None:
    filled.sweep("simple")
    filled.sweep("other")
    with Reading(filled.url) as reading, pytest.raises(NotFound) as caught:
        reading.runs("simpel")
    assert "other, simple" in str(caught.value)
    assert "Did you mean simple?" in str(caught.value)
    assert str(filled.path) in str(caught.value)


def test_unknown_run_says_what_is_near(filled: Filled) -> None:
    for number in range(12):
        filled.run(number)
    with Reading(filled.url) as reading:
        with pytest.raises(NotFound, match=r"Did you mean simple\.r\.00003\?"):
            reading.run("simple.r.3")
        with pytest.raises(NotFound, match=r"Did you mean simple\?"):
            reading.attempts("simpel.r.00003")
        with pytest.raises(NotFound, match="has runs of simple"):
            reading.run("nothing-like-it")


# --- what is refused -----------------------------------------------------------------------


def test_newer_and_older_versions_are_refused(tmp_path: Path) -> None:
    newer, older = Filled(tmp_path / "a", version="9999"), Filled(tmp_path / "b", version="0000")
    with pytest.raises(StorageError, match=r"newer.*9999.*0002.*Install"):
        Reading(newer.url)
    with pytest.raises(StorageError, match=r"older.*db upgrade"):
        Reading(older.url)


def test_not_a_database(tmp_path: Path) -> None:
    path = tmp_path / "sweeper.db"
    path.write_bytes(b"this is no database, and longer than a header would be " * 20)
    with pytest.raises(StorageError, match=r"not a usable database.*rebuild"):
        Reading(f"sqlite:///{path}")


def test_a_directory_is_not_a_database(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        Reading(f"sqlite:///{tmp_path}")


def test_locked_database(filled: Filled) -> None:
    filled.run(0)
    with sqlite3.connect(filled.path, isolation_level=None) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StorageError, match=r"locked.*Try again"):
            Reading(filled.url, busy_timeout_s=0.0)


def test_a_writer_does_not_keep_readers_out(filled: Filled) -> None:
    filled.run(0)
    with sqlite3.connect(filled.path, isolation_level=None) as writer:
        writer.execute("PRAGMA journal_mode=WAL")
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM sweeper_run")
        with Reading(filled.url, busy_timeout_s=0.0) as reading:
            assert len(reading.runs()) == 1


def test_reading_cannot_write(filled: Filled) -> None:
    with Reading(filled.url) as reading, pytest.raises(StorageError, match="readonly"):
        reading._rows("DELETE FROM sweeper_run")


def test_progress_is_one_picture(filled: Filled, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is committed between two of its statements is not half seen."""
    filled.execute("PRAGMA journal_mode=WAL")
    filled.run(0, state="running")
    with Reading(filled.url) as reading:
        count = reading._counts

        def count_then_change(*arguments: object) -> object:
            result = count(*arguments)  # type: ignore[arg-type]
            filled.execute("UPDATE sweeper_run SET state='completed'")
            return result

        monkeypatch.setattr(reading, "_counts", count_then_change)
        progress = reading.progress("simple")
    assert progress["counts"]["running"] == len(progress["open_runs"]) == 1


@pytest.mark.parametrize("name", ["a#b", "a%20b", "a b", "ä"])
def test_any_file_name_works(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "sweeper.db"
    path.parent.mkdir()
    sqlite3.connect(path).execute("CREATE TABLE t (x)")
    with Reading(f"sqlite:///{path}") as reading:
        assert reading.sweeps() == []


# --- URLs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///outputs/sweeper.db", "outputs/sweeper.db"),
        ("sqlite:////tmp/sweeper.db", "/tmp/sweeper.db"),
        ("sqlite+pysqlite:////tmp/sweeper.db?timeout=5", "/tmp/sweeper.db"),
        ("postgresql://host/db", None),
    ],
)
def test_sqlite_path(url: str, path: str | None) -> None:
    assert sqlite_path(url) == path


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "sqlite:///:memory:"])
def test_memory_is_refused(url: str) -> None:
    with pytest.raises(StorageError, match="one process only"):
        Reading(url)


@pytest.mark.parametrize("url", ["mysql://host/db", "outputs/sweeper.db", ""])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="not a database that sweeper can use"):
        Reading(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:se:c@ret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://host/db?user=me&password=secret", "postgresql://host/db?user=me&password=***"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("sqlite:////tmp/a:b/sweeper.db", "sqlite:////tmp/a:b/sweeper.db"),
    ],
)
def test_passwords_are_hidden(url: str, shown: str) -> None:
    assert hide_password(url) == shown


def test_default_storage_is_in_the_data_directory() -> None:
    assert default_storage("outputs") == "sqlite:///outputs/sweeper.db"
    assert default_storage("/data") == "sqlite:////data/sweeper.db"
