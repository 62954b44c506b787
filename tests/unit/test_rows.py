"""The JSON contract, leases as onlookers judge them, and text that is safe for a terminal."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from filled import Filled, dead_process

from sweeper import alive, processes
from sweeper.reading import Reading
from sweeper.report import rows, tables

NOW_S = 1000.0


def run(**changes: Any) -> Any:
    row = {
        "run_id": "simple.r.00003",
        "sweep": "simple",
        "number": 3,
        "trial": 3,
        "params": {"trainer.lr": 0.01},
        "seed": 7,
        "path": "sweep/simple/runs/simple.r.00003",
        "wandb_run_id": "simple.r.00003.abcdef01",
        "state": "running",
        "outcome": None,
        "reason": None,
        "value": None,
        "owner": asdict(processes.identify()),
        "worker": "w0",
        "lease_epoch": 1,
        "lease_until": NOW_S + 60,
        "attempts": 1,
        "global_step": 120,
        "total_steps": 500,
        "checkpoint_step": 100,
        "replaces": None,
        "retry_of": None,
        "is_retried": False,
    }
    return {**row, **changes}


def as_row(**changes: Any) -> dict[str, Any]:
    (row,) = rows.run_rows([run(**changes)], data_dir="outputs", now_s=NOW_S)
    return row


def test_the_contract() -> None:
    row = as_row()
    owner = row.pop("owner")
    assert owner.endswith(f":{processes.identify().pid}")
    assert row == {
        "run_id": "simple.r.00003",
        "sweep": "simple",
        "number": 3,
        "trial": 3,
        "state": "running",
        "incomplete": True,
        "lease": "live",
        "global_step": 120,
        "total_steps": 500,
        "checkpoint_step": 100,
        "attempts": 1,
        "value": None,
        "outcome": None,
        "reason": None,
        "params": {"trainer.lr": 0.01},
        "seed": 7,
        "path": "outputs/sweep/simple/runs/simple.r.00003",
        "wandb_run_id": "simple.r.00003.abcdef01",
        "replaces": None,
        "retry_of": None,
    }


def test_every_field_comes_from_the_database(tmp_path: Path) -> None:
    filled = Filled(tmp_path)
    filled.run(0)
    with Reading(filled.url) as reading:
        (row,) = rows.run_rows(reading.runs(), data_dir=str(tmp_path), now_s=NOW_S)
    assert set(row) == set(rows.FIELDS)
    assert row["path"] == str(tmp_path / "sweep/simple/runs/simple.r.00000")


@pytest.mark.parametrize(
    ("state", "incomplete"),
    [("running", True), ("interrupted", True), ("completed", False), ("superseded", False)],
)
def test_incomplete(state: str, incomplete: bool) -> None:
    assert as_row(state=state)["incomplete"] is incomplete


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lease_until": NOW_S}, "live"),
        ({"lease_until": NOW_S - 0.001}, "expired"),
        ({"lease_until": None}, "expired"),
        ({"owner": asdict(dead_process())}, "expired"),
        ({"owner": None}, "live"),
        ({"owner": {"pid": 1}}, "live"),
        ({"owner": {**asdict(processes.identify()), "pid": -1}}, "live"),
        ({"owner": {**asdict(processes.identify()), "boot_id": "x", "host": "elsewhere"}}, "live"),
        ({"state": "interrupted", "lease_until": None}, "none"),
        ({"state": "completed"}, "none"),
    ],
)
def test_lease(changes: dict[str, Any], expected: str) -> None:
    assert as_row(**changes)["lease"] == expected


def test_only_a_running_run_has_an_owner() -> None:
    assert as_row(state="interrupted")["owner"] is None
    owner = {"host": "node1", "pid": 42, "slurm_job_id": "7_1"}
    assert as_row(owner=owner)["owner"] == "node1:42 (job 7_1)"


@pytest.mark.parametrize("process", [processes.identify(), dead_process(), processes.identify(1)])
def test_both_proofs_of_death_agree(process: Any) -> None:
    assert alive.proof_of_death(process) == processes.proof_of_death(process)


@pytest.mark.parametrize(
    ("value", "text"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")]
)
def test_json_is_strict(value: float, text: str) -> None:
    shown = rows.to_json([{"value": value, "params": {"a": [value, 1.5]}}])
    assert json.loads(shown, parse_constant=pytest.fail) == [{"value": text, "params": {"a": [text, 1.5]}}]


def test_json_is_ascii() -> None:
    assert rows.to_json({"name": "\x1b[31mä\u202e"}).isascii()


# --- tables --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ä 漢字 ->", "plain ä 漢字 ->"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\x9b31m", "\\x9b31m"),
        ("a\nb\rc\td", "a\\nb\\rc\\td"),
        ("\x07\x08\x7f", "\\x07\\x08\\x7f"),
        ("safe\u202eexe.txt", "safe\\u202eexe.txt"),
        ("\u2028", "\\u2028"),
        ("\udc80", "\\udc80"),
    ],
)
def test_escape(text: str, shown: str) -> None:
    assert tables.escape(text) == shown


def test_table_is_aligned() -> None:
    text = tables.table(("RUN", "STEP", "PARAMS"), [("a", "5", "lr=1"), ("long", "120/500", "lr=10")])
    assert text.splitlines() == [
        "RUN      STEP  PARAMS",
        "a           5  lr=1",
        "long  120/500  lr=10",
    ]


def test_table_counts_wide_letters() -> None:
    text = tables.table(("NAME", "X"), [("漢字漢", "a"), ("b", "c")])
    assert text.splitlines() == ["NAME    X", "漢字漢  a", "b       c"]


def test_table_cuts_the_last_column_only_on_a_terminal() -> None:
    cells = [("simple.r.00003", "lr=0.01 width=32")]
    assert "width=32" in tables.table(("RUN", "PARAMS"), cells)
    assert tables.table(("RUN", "PARAMS"), cells, width=24).splitlines()[1] == "simple.r.00003  lr=0.01…"
    assert "PARAMS" in tables.table(("RUN", "PARAMS"), cells, width=1)


def test_table_escapes_cells() -> None:
    assert "\x1b" not in tables.table(("RUN",), [("\x1b[31m",)])


def test_short_params() -> None:
    assert tables.short_params({"trainer.lr": 0.0123456, "trainer.width": 64}) == "lr=0.01235 width=64"
    assert tables.short_params({"model.lr": 1, "head.lr": 2}) == "model.lr=1 head.lr=2"
    assert tables.short_params({}) == ""
