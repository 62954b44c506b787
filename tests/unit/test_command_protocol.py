"""What a program may say, how it is told from what it prints, and what becomes of its files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweeper.checkpoints import Content, Draft
from sweeper.command import files
from sweeper.command.files import NotTaken, put_back, take
from sweeper.command.protocol import (
    MAX_LINE_BYTES,
    PREFIX,
    BadLine,
    Ready,
    Result,
    Row,
    SignOfLife,
    Splitter,
    parse,
)
from sweeper.errors import CheckpointRefused

# --- lines -------------------------------------------------------------------------------------

MEANINGS: dict[str, Any] = {
    '{"step": 12, "loss": 0.3}': Row(12, {"loss": 0.3}),
    '{"step": 0, "phase": "warm-up", "value": 1}': Row(0, {"phase": "warm-up", "value": 1}),
    '{"step": 3, "checkpoint": 3}': Row(3, {"checkpoint": 3}),
    '{"step": 3}': Row(3, {}),
    '{"step": 3, "loss": 1}': Row(3, {"loss": 1.0}),
    '{"checkpoint": 7}': Ready(7),
    '{"value": 2}': Result(2.0),
    "{}": SignOfLife(),
    "  {}\r\n": SignOfLife(),
}


@pytest.mark.parametrize("said", MEANINGS)
def test_what_lines_mean(said: str) -> None:
    assert parse(PREFIX + said.encode(), metric="loss") == MEANINGS[said]


def test_numbers_that_are_none_are_reported_as_they_are() -> None:
    row = parse(b'SWEEPER {"step": 1, "loss": NaN}', metric="loss")
    assert isinstance(row, Row)
    assert math.isnan(row.values["loss"])
    assert parse(b'SWEEPER {"value": -Infinity}', metric="loss") == Result(-math.inf)


BAD = [
    "",
    "step 12",
    "{",
    "[1]",
    "7",
    '{"step": "12"}',
    '{"step": 1.0}',
    '{"step": true}',
    '{"step": -1}',
    '{"step": 1000000000000}',
    '{"step": 1, "loss": "low"}',
    '{"step": 1, "loss": null}',
    '{"step": 1, "loss": true}',
    '{"step": 1, "more": [1]}',
    '{"checkpoint": 0}',
    '{"checkpoint": "7"}',
    '{"checkpoint": 7, "value": 1}',
    '{"value": null}',
    '{"value": "low"}',
    '{"loss": 0.3}',
    '{"value": 1' + "0" * 400 + "}",
    '{"value": ' + "1" * 5000 + "}",
    "[" * 100_000,
    '{"step": 1, "text": "' + "é" * 400_000 + '"}',
    "\xff",
]


@pytest.mark.parametrize("said", BAD, ids=lambda said: said[:30])
def test_what_means_nothing_is_a_bad_line(said: str) -> None:
    with pytest.raises(BadLine, match=r"."):
        parse(PREFIX + said.encode("latin-1", errors="replace"), metric="loss")


def split(*parts: bytes) -> list[tuple[bool, bytes]]:
    splitter = Splitter()
    return [*(one for part in parts for one in splitter.feed(part)), *splitter.end()]


def test_lines_are_told_from_output() -> None:
    data = b"hello\nSWEEPER {}\n SWEEPER {}\nSWEEPERS\nSWEEPER {}"
    assert split(data) == [
        (False, b"hello\n"),
        (True, b"SWEEPER {}\n"),
        (False, b" SWEEPER {}\n"),
        (False, b"SWEEPERS\n"),
        (True, b"SWEEPER {}"),
    ]


def test_output_does_not_wait_for_the_end_of_its_line() -> None:
    splitter = Splitter()
    assert list(splitter.feed(b"10 %")) == [(False, b"10 %")]
    assert list(splitter.feed(b"SWEEPER {}\n")) == [(False, b"SWEEPER {}\n")], "it is inside that line"
    assert list(splitter.feed(b"SWEEP")) == [], "this may become one"
    assert list(splitter.feed(b"ER {}\n")) == [(True, b"SWEEPER {}\n")]


def test_a_line_without_end_is_passed_on_in_parts() -> None:
    found = split(b"SWEEPER " + b"x" * MAX_LINE_BYTES, b"yz\nSWEEPER {}\n")
    assert [(is_said, len(text)) for is_said, text in found] == [
        (True, MAX_LINE_BYTES + 8),
        (False, 3),
        (True, 11),
    ]


@given(st.lists(st.sampled_from([b"SWEEPER ", b"SW", b"{}", b"\n", b"x", b"\r"]), max_size=12), st.data())
def test_how_bytes_arrive_changes_nothing(pieces: list[bytes], data: Any) -> None:
    whole = b"".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
    parts = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    found = split(*parts)
    assert b"".join(text for _, text in found) == whole
    said = [line for line in whole.split(b"\n") if line.startswith(PREFIX)]
    assert [text.rstrip(b"\n") for is_said, text in found if is_said] == said


# --- files -------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "program"
    for path, text in {
        "model.pth": "m",
        "state.json": "s",
        "a/b/c": "c",
        "a/ü \n": "u",
        ".hidden": "",
    }.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(text)
    (directory / "empty").mkdir()
    return directory


@pytest.fixture
def draft(tmp_path: Path) -> Draft:
    (tmp_path / "checkpoints").mkdir()
    return Draft(
        root=tmp_path / "checkpoints", run_id="s.r.00000", step=1, lease_epoch=1, lineage=((1, 0),),
        parent_step=None, config_digest="c",
    )  # fmt: skip


def take_all(draft: Draft, directory: Path, *, alive: Callable[[], None] = lambda: None) -> dict[str, str]:
    return take(draft, directory, reserved=frozenset({"state.json", "MANIFEST.json"}), alive=alive)


def test_files_come_back_as_they_were(draft: Draft, source: Path, tmp_path: Path) -> None:
    names = take_all(draft, source)
    assert names["model.pth"] == "model.pth"
    assert set(names) == {"model.pth", "state.json", "a/b/c", "a/ü \n", ".hidden"}
    assert set(names.values()) == {"model.pth", *(f"file_{number:05d}" for number in range(4))}
    assert names == take_all(again(draft), source), "names are a function of the paths"
    contents = {name: Content((draft.directory / name).read_bytes()) for name in names.values()}
    fd = os.open(draft.directory / "model.pth", os.O_RDONLY)
    contents["model.pth"] = Content(fd=fd)  # as large files come
    target = tmp_path / "restored"
    target.mkdir()
    put_back(names, contents, target)
    os.close(fd)
    found = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert found == {"model.pth": "m", "state.json": "s", "a/b/c": "c", "a/ü \n": "u", ".hidden": ""}


def again(draft: Draft) -> Draft:
    return Draft(
        root=draft.root, run_id=draft.run_id, step=2, lease_epoch=1, lineage=draft.lineage,
        parent_step=None, config_digest="c",
    )  # fmt: skip


def test_a_made_up_name_is_never_a_programs_own(draft: Draft, source: Path) -> None:
    (source / "file_00000").write_text("mine")
    names = take_all(draft, source)
    assert names["file_00000"] == "file_00000"
    assert len(set(names.values())) == len(names)


def test_nothing_is_no_checkpoint(draft: Draft, tmp_path: Path) -> None:
    (tmp_path / "nothing" / "deep").mkdir(parents=True)
    with pytest.raises(NotTaken, match=r"empty.*SWEEPER_CHECKPOINT_DIR"):
        take_all(draft, tmp_path / "nothing")


@pytest.mark.parametrize("kind", ["link", "directory-link", "pipe"])
def test_what_is_no_file_is_refused(draft: Draft, source: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(source / "odd")
    else:
        (source / "odd").symlink_to("model.pth" if kind == "link" else "a")
    with pytest.raises(NotTaken, match="odd is neither"):
        take_all(draft, source)


def test_too_many_files_are_refused(draft: Draft, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_FILES", 4)
    with pytest.raises(NotTaken, match="there are 5 files"):
        take_all(draft, source)


def test_a_file_that_changes_while_it_is_copied_is_noticed(
    draft: Draft, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_CHUNK_BYTES", 1)
    (source / "model.pth").write_bytes(b"12")
    write = type(draft).add

    def add(self: Draft, name: str, copy: Any) -> None:
        def while_it_writes(file: Any) -> None:
            real = file.write
            file.write = lambda data: (real(data), (source / "model.pth").write_bytes(b"longer than before"))
            copy(file)

        write(self, name, while_it_writes if name == "model.pth" else copy)

    monkeypatch.setattr(Draft, "add", add)
    with pytest.raises(NotTaken, match=r"model\.pth was changed while it was copied"):
        take_all(draft, source)


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "", "."])
def test_no_file_is_put_outside(tmp_path: Path, path: str) -> None:
    with pytest.raises(CheckpointRefused):
        put_back({path: "x"}, {"x": Content()}, tmp_path)
    with pytest.raises(CheckpointRefused):
        put_back({"a": "y"}, {"x": Content()}, tmp_path)
