"""The metrics log: rows survive cuts, zombies, torn writes and a disk that refuses."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest

from sweeper import fsops
from sweeper.tracking.metrics import MAX_ROW_BYTES, Follower, MetricsLog, last_step, read_rows


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def steps(path: Path) -> list[object]:
    return [row["step"] for row in read_rows(path)]


def write_steps(log: MetricsLog, *numbers: int) -> int:
    for number in numbers:
        log.write(number, {"loss": 1 / (number + 1)})
    return log.sync()


# --- writing -------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_written(path: Path) -> None:
    row = {"loss": 0.1 + 0.2, "count": 3, "note": 'quoted "text"\nwith a newline', "is_last": True}
    with MetricsLog(path) as log:
        log.write(7, row)
    assert list(read_rows(path)) == [{"step": 7, **row}]


def test_non_finite_numbers_are_strict_json_and_come_back(path: Path) -> None:
    with MetricsLog(path) as log:
        log.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["b"] == "Infinity"
    (row,) = read_rows(path)
    assert math.isnan(float(row["a"]))
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


class Scalar:
    """What NumPy's and torch's scalars look like from outside."""

    def __init__(self, value: object) -> None:
        self.value = value

    def item(self) -> object:
        return self.value


def test_scalars_with_item_are_taken(path: Path) -> None:
    with MetricsLog(path) as log:
        log.write(1, {"a": Scalar(0.5), "b": Scalar(math.nan)})
    (row,) = read_rows(path)
    assert row["a"] == 0.5
    assert math.isnan(float(row["b"]))


@pytest.mark.parametrize("value", [None, [1.0], {"a": 1}, Scalar([1.0]), b"x"])
def test_other_values_are_refused_by_name_and_nothing_is_written(path: Path, value: object) -> None:
    with MetricsLog(path) as log:
        with pytest.raises(TypeError, match="'bad'"):
            log.write(1, {"good": 1, "bad": value})
        assert log.sync() == 0


def test_a_row_cannot_name_its_own_step_or_be_huge(path: Path) -> None:
    with MetricsLog(path) as log:
        with pytest.raises(ValueError, match="global step"):
            log.write(1, {"step": 2})
        with pytest.raises(ValueError, match="bytes"):
            log.write(1, {"text": "x" * MAX_ROW_BYTES})
    assert steps(path) == []


def test_sync_returns_the_length_of_the_file(path: Path) -> None:
    with MetricsLog(path) as log:
        assert write_steps(log, 1, 2) == path.stat().st_size == log.size_bytes


# --- cutting -------------------------------------------------------------------------------


def test_opening_at_an_offset_cuts_what_lies_behind_it(path: Path) -> None:
    with MetricsLog(path) as log:
        offset = write_steps(log, 1, 2)
        write_steps(log, 3, 4)
    with MetricsLog(path, offset=offset) as log:
        write_steps(log, 3)
    assert log.warning == ""
    assert steps(path) == [1, 2, 3]


def test_the_cut_makes_a_new_file_even_when_nothing_is_cut_off(path: Path) -> None:
    zombie = MetricsLog(path)
    offset = write_steps(zombie, 1)
    with MetricsLog(path, offset=offset) as log:
        zombie.write(2, {"loss": 666})
        zombie.sync()
        write_steps(log, 2)
    assert [row.get("loss") for row in read_rows(path)] == [1 / 2, 1 / 3]


@pytest.mark.parametrize("tail", ["", '{"step": 3, "lo'])
def test_a_log_that_is_too_short_keeps_its_whole_rows_and_says_so(path: Path, tail: str) -> None:
    with MetricsLog(path) as log:
        size = write_steps(log, 1, 2)
    with path.open("a") as file:
        file.write(tail)
    with MetricsLog(path, offset=size + 1000) as log:
        assert str(size) in log.warning
        assert "1000" not in log.warning or str(size + 1000) in log.warning
        write_steps(log, 3)
    assert steps(path) == [1, 2, 3]


def test_an_offset_inside_a_row_keeps_the_rows_before_it(path: Path) -> None:
    with MetricsLog(path) as log:
        size = write_steps(log, 1)
        write_steps(log, 2)
    with MetricsLog(path, offset=size + 5) as log:
        assert "inside a row" in log.warning
    assert steps(path) == [1]


def test_a_missing_log_is_started_with_a_warning(path: Path) -> None:
    with MetricsLog(path, offset=100) as log:
        assert "missing" in log.warning
        write_steps(log, 1)
    assert steps(path) == [1]


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text('{"step": 1}\n')
    path.symlink_to(other)
    assert steps(path) == []
    with MetricsLog(path, offset=0) as log:
        write_steps(log, 5)
    assert other.read_text() == '{"step": 1}\n'
    assert steps(path) == [5]


# --- staying in place ----------------------------------------------------------------------


def test_the_owner_puts_its_log_back_when_another_file_is_there(path: Path) -> None:
    with MetricsLog(path) as log:
        write_steps(log, 1, 2)
        assert not log.ensure_in_place()
        with MetricsLog(path) as usurper:
            write_steps(usurper, 9)
        assert log.ensure_in_place()
        assert not log.ensure_in_place()
        write_steps(log, 3)
    assert steps(path) == [1, 2, 3]


def test_the_owner_puts_its_log_back_when_it_was_deleted(path: Path) -> None:
    with MetricsLog(path) as log:
        write_steps(log, 1)
        path.unlink()
        assert log.ensure_in_place()
        write_steps(log, 2)
    assert steps(path) == [1, 2]


# --- a disk that refuses -------------------------------------------------------------------


def test_a_torn_write_is_taken_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write

    def write_a_part(fd: int, data: memoryview) -> int:
        if len(data) > 5:
            return real_write(fd, data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    with MetricsLog(path) as log:
        write_steps(log, 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write_a_part)
            with pytest.raises(OSError, match="No space"):
                log.write(2, {"x": 1})
        write_steps(log, 2)
    assert steps(path) == [1, 2]
    assert path.read_bytes().count(b"\n") == 2


def test_after_a_failed_fsync_the_rows_go_to_a_new_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(operation: str, path: Path) -> None:
        if operation == "fsync":
            raise OSError(errno.EIO, "Input/output error")

    with MetricsLog(path) as log:
        log.write(1, {})
        before = path.stat().st_ino
        with monkeypatch.context() as patch:
            patch.setattr(fsops, "probe", fail)
            with pytest.raises(OSError, match="Input/output"):
                log.sync()
        assert log.sync() == path.stat().st_size
        assert path.stat().st_ino != before
    assert steps(path) == [1]


@pytest.mark.parametrize("operation", ["create", "write", "fsync", "rename"])
def test_a_cut_that_fails_leaves_the_old_log(
    path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    with MetricsLog(path) as log:
        offset = write_steps(log, 1, 2)
    before = path.read_bytes()

    def fail(name: str, path: Path) -> None:
        if name == operation:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fsops, "probe", fail)
        with pytest.raises(OSError, match="No space"):
            MetricsLog(path, offset=offset)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


# --- reading and following -----------------------------------------------------------------


def test_damaged_lines_and_a_torn_end_are_left_out(path: Path) -> None:
    lines = ['{"step": 1}', "{", "[1]", '{"loss": 1}', '{"step": "1"}', "", '{"step": 2}', '{"step": 3']
    path.write_text("\n".join(lines))
    assert steps(path) == [1, 2]


def test_a_line_without_end_does_not_fill_the_memory(path: Path) -> None:
    path.write_bytes(b'{"step": 1}\n' + b"x" * (5 * MAX_ROW_BYTES) + b'\n{"step": 2}\n')
    assert steps(path) == [1, 2]


def test_reading_from_an_offset(path: Path) -> None:
    with MetricsLog(path) as log:
        offset = write_steps(log, 1, 2)
        write_steps(log, 3)
    assert [row["step"] for row in read_rows(path, offset)] == [3]


def followed(follower: Follower) -> list[object]:
    return [row["step"] for row in follower.rows()]


def test_a_follower_gives_each_complete_row_once(path: Path) -> None:
    follower = Follower(path)
    assert followed(follower) == []
    with path.open("wb", buffering=0) as file:
        file.write(b'{"step": 1}\n{"st')
        assert followed(follower) == [1]
        file.write(b'ep": 2}')
        assert followed(follower) == []
        file.write(b"\n")
        assert followed(follower) == [2]
    assert followed(follower) == []


def test_a_follower_goes_on_through_a_cut_and_repeats_nothing(path: Path) -> None:
    follower = Follower(path)
    with MetricsLog(path) as log:
        offset = write_steps(log, 1, 2)
        write_steps(log, 3, 4)
        assert followed(follower) == [1, 2, 3, 4]
    with MetricsLog(path, offset=offset) as log:
        write_steps(log, 3)
        assert followed(follower) == []
        write_steps(log, 4, 5)
        assert followed(follower) == [5]


def test_a_follower_tells_rows_of_one_step_apart(path: Path) -> None:
    follower = Follower(path)
    with MetricsLog(path) as log:
        log.write(1, {"loss": 1})
        assert followed(follower) == [1]
    with MetricsLog(path) as log:
        log.write(1, {"loss": 1})
        log.write(1, {"accuracy": 1})
        assert list(follower.rows()) == [{"step": 1, "accuracy": 1}]


def test_a_follower_stops_when_the_new_file_is_not_ours(path: Path) -> None:
    follower = Follower(path, may_follow=lambda: False)
    with MetricsLog(path) as log:
        write_steps(log, 1)
    assert followed(follower) == [1]
    with MetricsLog(path) as log:
        write_steps(log, 2)
    assert followed(follower) == []
    assert follower.is_over


def test_a_follower_waits_while_the_file_is_missing(path: Path) -> None:
    follower = Follower(path)
    with MetricsLog(path) as log:
        write_steps(log, 1)
    assert followed(follower) == [1]
    path.unlink()
    assert followed(follower) == []
    with MetricsLog(path) as log:
        write_steps(log, 1, 2)
    assert followed(follower) == [2]


# --- the last step -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "step"),
    [
        (b"", None),
        (b'{"step": 7}\n', 7),
        (b'{"step": 7}\n{"step": 8}\n{"step": 9', 8),
        (b'{"step": 7}\nnothing\n[]\n', 7),
        (b'{"step": 7}\n{"step": 1e9}\n{"step": 10000000000000}\n{"step": -1}\n', 7),
        (b'{"step": 7}\n' + b"x" * (MAX_ROW_BYTES + 5) + b"\n", 7),
        (b'{"step": 7}\n{"step": 8, "text": "' + b"x" * 600_000 + b'"}\n', 8),
        (b'{"step": 7}\n' + 1000 * b"\n", None),
    ],
)
def test_the_last_step_is_read_from_the_end(path: Path, content: bytes, step: int | None) -> None:
    path.write_bytes(content)
    assert last_step(path) == step


def test_without_a_log_there_is_no_last_step(path: Path) -> None:
    assert last_step(path) is None
