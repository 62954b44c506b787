"""The one door: what each operation does, announces, refuses, and leaves behind when it fails."""

from __future__ import annotations

import ast
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

import sweeper
from sweeper import fsops


class Recorder:
    """Writes down announcements; raises OSError at one of them."""

    def __init__(self, fail: str | None = None) -> None:
        self.seen: list[str] = []
        self.fail = fail

    def __call__(self, operation: str, path: Path) -> None:
        self.seen.append(operation)
        if operation == self.fail:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recorder]:
    def install(fail: str | None = None) -> Recorder:
        recorder = Recorder(fail)
        monkeypatch.setattr(fsops, "probe", recorder)
        return recorder

    return install


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# --- replace and create ------------------------------------------------------------------------


def test_replace_syncs_the_new_bytes_before_they_take_the_name(tmp_path: Path, record) -> None:
    seen = record().seen
    fsops.replace(tmp_path / "a", b"new")
    assert seen == ["create", "write", "fsync", "rename", "fsync_dir"]
    assert content(tmp_path) == {"a": b"new"}


@pytest.mark.parametrize("fail", ["create", "write", "fsync", "rename"])
def test_a_failed_replace_leaves_the_old_bytes_and_nothing_else(tmp_path: Path, record, fail: str) -> None:
    (tmp_path / "a").write_bytes(b"old")
    record(fail)
    with pytest.raises(OSError, match="Input/output error"):
        fsops.replace(tmp_path / "a", b"new")
    assert content(tmp_path) == {"a": b"old"}


def test_create_never_replaces(tmp_path: Path, record) -> None:
    seen = record().seen
    fsops.create(tmp_path / "a", b"first")
    assert seen == ["create", "write", "fsync", "link", "unlink", "fsync_dir"]
    with pytest.raises(FileExistsError):
        fsops.create(tmp_path / "a", b"second")
    assert content(tmp_path) == {"a": b"first"}


@pytest.mark.parametrize("fail", ["create", "write", "fsync", "link"])
def test_a_failed_create_leaves_nothing(tmp_path: Path, record, fail: str) -> None:
    record(fail)
    with pytest.raises(OSError, match="Input/output error"):
        fsops.create(tmp_path / "a", b"new")
    assert content(tmp_path) == {}


def test_a_failed_fsync_is_not_repeated(tmp_path: Path, record) -> None:
    seen = record("fsync").seen
    with pytest.raises(OSError, match="Input/output error"):
        fsops.write_new(tmp_path / "a", b"x")
    assert seen.count("fsync") == 1


def test_new_files_are_for_their_owner_only(tmp_path: Path) -> None:
    fsops.write_new(tmp_path / "file", b"x")
    fsops.make_dir(tmp_path / "dir")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "dir").stat().st_mode) == 0o700


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "link").symlink_to("target")
    with pytest.raises(FileExistsError):
        fsops.write_new(tmp_path / "link", b"x")
    fsops.replace(tmp_path / "link", b"x")
    assert (tmp_path / "target").read_bytes() == b"precious"


def test_a_kernel_that_takes_one_byte_at_a_time_gets_them_all(tmp_path: Path, monkeypatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data[:1])))
    fsops.write_new(tmp_path / "a", b"all of it")
    assert (tmp_path / "a").read_bytes() == b"all of it"


def test_temporary_names_are_recognised_and_never_the_same(tmp_path: Path) -> None:
    names = {fsops.temporary_name(tmp_path / "metrics.jsonl").name for _ in range(100)}
    assert len(names) == 100
    assert all(map(fsops.is_temporary, names))
    assert not any(map(fsops.is_temporary, ("metrics.jsonl", ".trash", "a.tmp", "step_00000001")))


# --- directories -------------------------------------------------------------------------------


def test_make_dir_takes_an_existing_directory_but_no_link_to_one(tmp_path: Path) -> None:
    fsops.make_dir(tmp_path / "dir")
    fsops.make_dir(tmp_path / "dir", exist_ok=True)
    (tmp_path / "link").symlink_to("dir")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(FileExistsError):
            fsops.make_dir(tmp_path / name, exist_ok=True)


def test_remove_tree_follows_no_link_anywhere(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_bytes(b"x")
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    (tree / "below" / "link").symlink_to(precious)
    (tree / "file").touch()
    fsops.remove_tree(tree)
    assert not tree.exists()
    (tmp_path / "link").symlink_to(precious)
    fsops.remove_tree(tmp_path / "link")
    assert content(tmp_path / "precious") == {"data": b"x"}
    assert not (tmp_path / "link").is_symlink()


def test_remove_tree_takes_what_somebody_else_removes_meanwhile(tmp_path: Path, monkeypatch) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a").touch()

    def helpful(operation: str, path: Path) -> None:
        if operation == "unlink" and path.exists():
            path.unlink()
            tree.rmdir()

    monkeypatch.setattr(fsops, "probe", helpful)
    fsops.remove_tree(tree)
    fsops.remove_tree(tree)
    assert not tree.exists()


def test_copy_prefix_copies_exactly_so_many_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    fsops.copy_prefix(tmp_path / "a", tmp_path / "b", 4)
    assert (tmp_path / "b").read_bytes() == b"0123"
    with pytest.raises(OSError, match="fewer than 11 bytes"):
        fsops.copy_prefix(tmp_path / "a", tmp_path / "c", 11)


# --- one door ----------------------------------------------------------------------------------

_DURABLE = ("checkpoints", "rundir", "worker", "supervisor", "trainer/run", "trainer/main", "torch/loop")
_OS_CALLS = {
    "rename",
    "replace",
    "link",
    "symlink",
    "mkdir",
    "makedirs",
    "rmdir",
    "unlink",
    "remove",
    "fsync",
    "truncate",
}
_PATH_CALLS = {
    "rename",
    "mkdir",
    "rmdir",
    "unlink",
    "touch",
    "write_text",
    "write_bytes",
    "symlink_to",
    "hardlink_to",
}


@pytest.mark.parametrize("module", _DURABLE)
def test_no_durable_operation_goes_past_the_door(module: str) -> None:
    """Whatever changes a run directory announces itself, so that the crash tests can strike there."""
    source = (Path(sweeper.__file__).parent / f"{module}.py").read_text()
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    found = []
    for function in calls:
        if not isinstance(function, ast.Attribute):
            continue
        owner = function.value.id if isinstance(function.value, ast.Name) else ""
        if owner in ("os", "shutil") and (function.attr in _OS_CALLS or owner == "shutil"):
            found.append(ast.unparse(function))
        if owner not in ("os", "fsops") and function.attr in _PATH_CALLS:
            found.append(ast.unparse(function))
    assert found == []
