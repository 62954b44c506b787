"""Checkpoints as bytes: every damage is seen, nothing foreign is let in, and the order of a commit."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sweeper import checkpoints, fsops, manifests
from sweeper.checkpoints import Draft
from sweeper.errors import CheckpointRefused, Fenced
from sweeper.manifests import MANIFEST, Manifest
from sweeper.retention import Keep, Kept

RUN = "simple.r.00003"
FILES = {"model.pth": 300, "optimizer.pt": 200, "rng_state.pt": 150, "state.json": 60}
NUM_FLIPS = 2000


def draft(root: Path, step: int, *, epoch: int = 1, run_id: str = RUN, salt: int = 0) -> Draft:
    made = Draft(root, run_id, step, epoch, ((epoch, 0),), None, "config")
    for name, size in FILES.items():
        made.add_bytes(name, random.Random(f"{step}:{name}:{salt}").randbytes(size))
    return made


def commit(made: Draft) -> Path:
    checkpoints.commit(
        made, check_lease=lambda: None, record=lambda _: None, committed_at="2025-01-31T12:00:00Z"
    )
    return made.root / checkpoints.step_name(made.step)


def refusal(directory: Path, **changes: Any) -> str:
    """Why a checkpoint is refused; the test fails when it is not."""
    with pytest.raises(CheckpointRefused) as caught:
        checkpoints.validate(directory, **{"run_id": RUN, "config_digest": "config", **changes})
    return str(caught.value)


def is_valid(directory: Path) -> bool:
    checkpoints.validate(directory, run_id=RUN, config_digest="config")
    return True


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory in memory where there is one: a thousand fsyncs are not what is tested."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="sweeper-unit-", dir=base) as name:
        yield Path(name)


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """One committed checkpoint, of step 7."""
    return commit(draft(tmp_path, 7))


# --- damage ------------------------------------------------------------------------------------


def test_every_flipped_bit_is_seen(step: Path) -> None:
    """2,000 seeded positions, spread over all files of the checkpoint, the manifest included."""
    bits = [(path, bit) for path in sorted(step.iterdir()) for bit in range(path.stat().st_size * 8)]
    chosen = random.Random(2).sample(bits, NUM_FLIPS)
    assert {path.name for path, _ in chosen} == {*FILES, MANIFEST}
    unseen = []
    for path, bit in chosen:
        with open(path, "r+b", buffering=0) as file:
            byte = os.pread(file.fileno(), 1, bit // 8)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << bit % 8]), bit // 8)
            (found,) = checkpoints.inspect(step.parent, run_id=RUN)
            os.pwrite(file.fileno(), byte, bit // 8)
        if found.reason is None or path.name not in found.reason:
            unseen.append((path.name, bit, found.reason))
    assert unseen == []
    assert is_valid(step)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_every_truncation_and_every_extra_byte_is_seen(step: Path, name: str) -> None:
    path = step / name
    before = path.read_bytes()
    for size in {0, 1, len(before) // 2, len(before) - 1}:
        path.write_bytes(before[:size])
        assert name in refusal(step)
    for tail in (b"\0", b"\n", b" "):
        path.write_bytes(before + tail)
        assert name in refusal(step)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_missing_file_is_named(step: Path, name: str) -> None:
    (step / name).unlink()
    assert f"{name} is missing" in refusal(step)


@pytest.mark.parametrize("name", ["extra.pt", ".hidden", "model.pth.tmp", "a\nb"])
def test_an_extra_file_is_named(step: Path, name: str) -> None:
    (step / name).touch()
    assert "does not belong to it" in refusal(step)


def test_files_of_another_checkpoint_are_seen(step: Path) -> None:
    other = commit(draft(step.parent, 8))
    for name in FILES:
        before = (step / name).read_bytes()
        shutil.copy(other / name, step / name)
        assert f"{name} has the wrong digest" in refusal(step)
        (step / name).write_bytes(before)
    shutil.copy(other / MANIFEST, step / MANIFEST)
    assert "of step 8" in refusal(step)


def test_a_file_under_another_name_of_the_same_size_is_seen(tmp_path: Path) -> None:
    made = Draft(tmp_path, RUN, 1, 1, ((1, 0),), None, "config")
    made.add_bytes("a.pt", b"one")
    made.add_bytes("b.pt", b"two")
    where = commit(made)
    (where / "a.pt").rename(where / "c.pt")
    (where / "b.pt").rename(where / "a.pt")
    (where / "c.pt").rename(where / "b.pt")
    assert "wrong digest" in refusal(where)


def test_a_renamed_directory_is_seen(step: Path) -> None:
    other = step.rename(step.parent / "step_00000009")
    assert "of step 7, not of step_00000009" in refusal(other)


def test_another_runs_checkpoint_is_seen(tmp_path: Path) -> None:
    assert "belongs to run 'simple.r.00004'" in refusal(commit(draft(tmp_path, 7, run_id="simple.r.00004")))


def test_another_configuration_is_seen(step: Path) -> None:
    assert "another config.yaml" in refusal(step, config_digest="other")


def test_nothing_is_committed_without_its_manifest(tmp_path: Path) -> None:
    (tmp_path / "step_00000007").mkdir()
    assert "never finished" in refusal(tmp_path / "step_00000007")
    assert "cannot be read" in refusal(tmp_path / "step_00000008")


# --- hostile ------------------------------------------------------------------------------------


def test_links_are_not_followed(step: Path) -> None:
    outside = step.parent / "outside"
    shutil.copytree(step, outside)
    (step / "model.pth").unlink()
    (step / "model.pth").symlink_to(outside / "model.pth")
    assert "model.pth cannot be read" in refusal(step)
    shutil.rmtree(step)
    step.symlink_to(outside)
    assert "not a directory" in refusal(step)
    step.unlink()
    shutil.copytree(outside, step)
    (step / MANIFEST).unlink()
    (step / MANIFEST).symlink_to(outside / MANIFEST)
    assert "cannot be read" in refusal(step)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", ["model.pth", MANIFEST])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(step: Path, name: str) -> None:
    (step / name).unlink()
    os.mkfifo(step / name)
    assert "not a regular file" in refusal(step)


def test_a_directory_in_place_of_a_file_is_refused(step: Path) -> None:
    (step / "model.pth").unlink()
    (step / "model.pth").mkdir()
    assert "model.pth" in refusal(step)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_another_users_directory_is_refused(step: Path) -> None:
    os.chown(step, 12345, 12345)
    assert "another user" in refusal(step)


def test_a_manifest_of_200_mb_is_refused_unread(step: Path) -> None:
    os.truncate(step / MANIFEST, 200 << 20)
    assert "more than" in refusal(step)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"7",
        b"\xff\xfe",
        b"{" * 100_000,
        b'{"step": 1e999}',
        b'"' + b"\\ud800" * 9 + b'"',
    ],
)
def test_a_manifest_that_is_none_is_refused(step: Path, text: bytes) -> None:
    (step / MANIFEST).write_bytes(text)
    assert f"{MANIFEST} is damaged" in refusal(step)


def forge(directory: Path, changes: dict[str, Any]) -> None:
    """Write a manifest that agrees with its own digest, whatever nonsense it says."""
    body = json.loads((directory / MANIFEST).read_text()) | changes
    del body["manifest_digest"]
    body["manifest_digest"] = manifests.digest(manifests._canonical(body))
    (directory / MANIFEST).write_bytes(manifests._canonical(body))


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "7"},
        {"step": 7.0},
        {"step": None},
        {"step": -7},
        {"step": True},
        {"lease_epoch": "1"},
        {"lease_epoch": [1]},
        {"lineage": [["1", 0]]},
        {"lineage": [[1e999, 0]]},
        {"lineage": [[1]]},
        {"lineage": {"1": 0}},
        {"parent_step": "x"},
        {"world_size": {}},
        {"files": []},
        {"files": {"model.pth": 3}},
        {"files": {"model.pth": {"size_bytes": -1, "digest": ""}}},
        {"files": {"model.pth": {"size_bytes": "300", "digest": ""}}},
        {"files": {"../model.pth": {"size_bytes": 1, "digest": ""}}},
        {"files": {"/etc/passwd": {"size_bytes": 1, "digest": ""}}},
        {"files": {MANIFEST: {"size_bytes": 1, "digest": ""}}},
        {"files": {}},
        {"run_id": None},
        {"schema_version": 2},
        {"algorithm": "md5"},
        {"surplus": 1},
    ],
    ids=str,
)
def test_a_forged_manifest_is_refused_not_obeyed(step: Path, changes: dict[str, Any]) -> None:
    forge(step, changes)
    refusal(step)
    assert checkpoints.newest_valid(step.parent, run_id=RUN) is None
    checkpoints.known_starts(step.parent)


def test_a_manifest_is_read_back_as_it_was_written() -> None:
    manifest = Manifest(RUN, 7, 2, ((1, 0), (2, 5)), 5, "config", 4, {"model.pth": (3, "abc")})
    read = manifests.parse_manifest(manifest.to_bytes())
    assert read.body() == manifest.body()
    assert read.to_bytes() == manifest.to_bytes()


# --- committing ---------------------------------------------------------------------------------


def test_the_order_of_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file durable before the manifest, the directory before the lease is asked, the name
    before the database hears of it, the database before the pointer."""
    seen: list[str] = []
    monkeypatch.setattr(fsops, "probe", lambda operation, path: seen.append(f"{operation} {path.name}"))
    made = draft(tmp_path, 7)
    checkpoints.commit(
        made,
        check_lease=lambda: seen.append("LEASE"),
        record=lambda manifest: seen.append(f"DATABASE {manifest.step}"),
        committed_at="now",
    )
    drafted = made.directory.name
    expected = [f"mkdir {drafted}"]
    for name in (*FILES, MANIFEST):
        expected += [f"create {name}", f"write {name}", f"fsync {name}"]
    expected += [
        f"fsync_dir {drafted}",
        "LEASE",
        "rename step_00000007",
        f"fsync_dir {tmp_path.name}",
        "DATABASE 7",
    ]
    assert seen[: len(expected)] == expected
    assert [word.split()[0] for word in seen[len(expected) :]] == [
        "create",
        "write",
        "fsync",
        "rename",
        "fsync_dir",
    ]
    assert "rename trainer_checkpoint.json" in seen[len(expected) :]


def test_the_pointer_says_what_was_committed(step: Path) -> None:
    pointer = json.loads((step.parent / checkpoints.POINTER).read_text())
    manifest = manifests.read_manifest(step)
    assert pointer == {
        "schema_version": 1,
        "run_id": RUN,
        "step": 7,
        "lease_epoch": 1,
        "directory": "step_00000007",
        "manifest_digest": manifest.digest,
        "committed_at": "2025-01-31T12:00:00Z",
    }


def test_fenced_by_the_database_the_pointer_stays(step: Path) -> None:
    def fenced(manifest: Manifest) -> None:
        raise Fenced("lost")

    before = (step.parent / checkpoints.POINTER).read_bytes()
    with pytest.raises(Fenced):
        checkpoints.commit(draft(step.parent, 8), check_lease=lambda: None, record=fenced, committed_at="now")
    assert (step.parent / checkpoints.POINTER).read_bytes() == before


def test_a_refusal_inside_a_writer_that_hides_it_is_still_the_disks(tmp_path: Path, monkeypatch) -> None:
    """torch.save turns an OSError in the middle of an archive into a RuntimeError."""

    def full(operation: str, path: Path) -> None:
        if operation == "write":
            raise OSError(errno.ENOSPC, "No space left on device")

    def hides(file: checkpoints.DigestingFile) -> None:
        try:
            file.write(bytes(1 << 20))
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0") from None

    made = Draft(tmp_path, RUN, 1, 1, ((1, 0),), None, "config")
    monkeypatch.setattr(fsops, "probe", full)
    with pytest.raises(OSError, match="No space left"):
        made.add("model.pth", hides)


@pytest.mark.parametrize("size", [100, 64 << 10, 1 << 20, 3 << 20])
def test_what_is_written_in_pieces_is_written_whole(tmp_path: Path, size: int) -> None:
    """Small pieces are collected, large ones are not; the digest is of the bytes on disk."""
    data = random.Random(size).randbytes(4 << 20)

    def write(file: checkpoints.DigestingFile) -> None:
        for start in range(0, len(data), size):
            file.write(memoryview(data)[start : start + size])
            file.write(b"|")

    made = Draft(tmp_path, RUN, 7, 1, ((1, 0),), None, "config")
    made.add("model.pth", write)
    expected = b"".join(data[start : start + size] + b"|" for start in range(0, len(data), size))
    assert (made.directory / "model.pth").read_bytes() == expected
    assert made.files["model.pth"] == (len(expected), manifests.digest(expected))
    assert is_valid(commit(made))


def test_a_discarded_draft_is_gone_and_a_committed_one_stays(tmp_path: Path) -> None:
    refused = draft(tmp_path, 1)
    refused.discard()
    assert list(tmp_path.iterdir()) == []
    kept = draft(tmp_path, 2)
    where = commit(kept)
    kept.discard()
    assert is_valid(where)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_only_an_occupied_name_is_moved_aside(step: Path, monkeypatch, number: int) -> None:
    def refuse(operation: str, path: Path) -> None:
        if operation == "rename":
            raise OSError(number, os.strerror(number), str(path))

    made = draft(step.parent, 7, epoch=2)
    monkeypatch.setattr(fsops, "probe", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        commit(made)
    assert is_valid(step)


def test_what_was_moved_aside_comes_back_when_the_second_rename_fails(step: Path, monkeypatch) -> None:
    renames: list[str] = []

    def refuse(operation: str, path: Path) -> None:
        if operation == "rename":
            renames.append(path.name)
            if len(renames) == 3:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    made = draft(step.parent, 7, epoch=2)
    monkeypatch.setattr(fsops, "probe", refuse)
    with pytest.raises(OSError, match="Input/output"):
        commit(made)
    assert renames[0] == renames[2] == step.name
    assert manifests.read_manifest(step).lease_epoch == 1


# --- finding ------------------------------------------------------------------------------------


def test_only_exact_names_are_checkpoints(tmp_path: Path) -> None:
    good = ["step_00000001", "step_00000020", "step_123456789"]
    for name in [
        *good,
        "step_1",
        "step_0000000x",
        "step_000000001",
        "step_00000002.tmp",
        ".step_00000003",
        "step_00000004\n",
    ]:
        (tmp_path / name).mkdir()
    assert [path.name for _, path in checkpoints.steps_on_disk(tmp_path)] == good[::-1]
    assert checkpoints.steps_on_disk(tmp_path / "absent") == []


def test_inspect_names_each_reason_and_changes_nothing(tmp_path: Path) -> None:
    steps = [commit(draft(tmp_path, number)) for number in (1, 2, 3)]
    (steps[1] / "model.pth").write_bytes(b"x")
    shutil.rmtree(steps[2])
    steps[2].touch()
    before = sorted(map(str, tmp_path.rglob("*")))
    found = {item.step: item.reason for item in checkpoints.inspect(tmp_path, run_id=RUN)}
    assert found[1] is None
    assert "model.pth has 1 bytes instead of 300" in str(found[2])
    assert "not a directory" in str(found[3])
    assert sorted(map(str, tmp_path.rglob("*"))) == before


# --- pruning ------------------------------------------------------------------------------------


def steps(root: Path) -> list[int]:
    return [number for number, _ in checkpoints.steps_on_disk(root)]


def prune(root: Path, *, keep_last: int = 2, **more: Any) -> list[int]:
    return checkpoints.prune(root, run_id=RUN, rules=Keep(last=keep_last), known_good={}, **more)


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for number in (1, 2, 3, 4):
        commit(draft(tmp_path, number))
    assert prune(tmp_path) == [2, 1]
    assert steps(tmp_path) == [4, 3]
    assert list((tmp_path / checkpoints.TRASH).iterdir()) == []


def test_prune_counts_only_valid_ones(tmp_path: Path) -> None:
    for number in (1, 2, 3, 4, 5):
        commit(draft(tmp_path, number))
    for number in (3, 4):
        (tmp_path / checkpoints.step_name(number) / "state.json").write_bytes(b"x")
    assert prune(tmp_path) == [1]
    assert steps(tmp_path) == [5, 4, 3, 2]


def test_prune_never_removes_the_only_valid_one(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        commit(draft(tmp_path, number))
        if number > 1:
            (tmp_path / checkpoints.step_name(number) / MANIFEST).unlink()
    assert prune(tmp_path) == []
    assert steps(tmp_path) == [3, 2, 1]


def test_prune_verifies_each_checkpoint_once(tmp_path: Path, monkeypatch) -> None:
    for number in (1, 2, 3):
        commit(draft(tmp_path, number))
    looked: list[str] = []
    real = checkpoints.validate
    monkeypatch.setattr(
        checkpoints, "validate", lambda path, **more: (looked.append(path.name), real(path, **more))[1]
    )
    known = {3: Kept(3)}
    for _ in range(3):
        checkpoints.prune(tmp_path, run_id=RUN, rules=Keep(last=2), known_good=known)
    assert looked == ["step_00000002"]


def test_what_a_link_points_at_is_not_pruned(tmp_path: Path) -> None:
    """`step_00000001` → somebody's home directory."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("…")
    root = tmp_path / "checkpoints"
    root.mkdir()
    (root / "step_00000001").symlink_to(precious)
    for number in (2, 3, 4):
        commit(draft(root, number))
    prune(root)
    checkpoints.clean(root, lease_epoch=9)
    assert (precious / "thesis.tex").read_text() == "…"
    assert steps(root) == [4, 3]


def test_a_trash_that_is_a_link_is_not_emptied(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / "photos").mkdir(parents=True)
    root = tmp_path / "checkpoints"
    root.mkdir()
    (root / checkpoints.TRASH).symlink_to(precious)
    for number in (1, 2, 3):
        commit(draft(root, number))
    with pytest.raises(FileExistsError):
        prune(root)
    checkpoints.clean(root, lease_epoch=9)
    assert (precious / "photos").is_dir()


# --- condemning and cleaning --------------------------------------------------------------------


def test_condemned_checkpoints_are_kept_but_shadow_nothing(tmp_path: Path) -> None:
    old = commit(draft(tmp_path, 2))
    bad = commit(draft(tmp_path, 4))
    checkpoints.condemn(tmp_path, [bad])
    again = commit(draft(tmp_path, 4, salt=1))
    checkpoints.condemn(tmp_path, [again])
    assert steps(tmp_path) == [2]
    assert len(list((tmp_path / checkpoints.CONDEMNED).glob("step_00000004-*"))) == 2
    assert is_valid(old)


def test_clean_takes_what_older_attempts_left_and_nothing_else(tmp_path: Path) -> None:
    kept = commit(draft(tmp_path, 2))
    draft(tmp_path, 4, epoch=1)
    mine = draft(tmp_path, 4, epoch=3)
    (tmp_path / ".trainer_checkpoint.json.12345678.tmp").touch()
    (tmp_path / checkpoints.TRASH).mkdir()
    (tmp_path / checkpoints.TRASH / "step_00000001-ab").mkdir()
    (tmp_path / "notes.txt").touch()
    checkpoints.clean(tmp_path, lease_epoch=3)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {kept.name, mine.directory.name, checkpoints.POINTER, "notes.txt"}
    checkpoints.clean(tmp_path / "absent", lease_epoch=3)


def test_a_late_rename_finds_nothing_left_to_rename(tmp_path: Path) -> None:
    """An owner stopped between its question and its rename; the next one cleaned and went on."""
    late = draft(tmp_path, 4, epoch=1)

    def stopped_here() -> None:
        checkpoints.clean(tmp_path, lease_epoch=2)
        commit(draft(tmp_path, 4, epoch=2))

    with pytest.raises(FileNotFoundError):
        checkpoints.commit(late, check_lease=stopped_here, record=lambda _: None, committed_at="now")
    assert manifests.read_manifest(tmp_path / "step_00000004").lease_epoch == 2


def test_was_ever_committed(tmp_path: Path) -> None:
    assert not checkpoints.was_ever_committed(tmp_path / "absent")
    made = draft(tmp_path, 1)
    assert not checkpoints.was_ever_committed(tmp_path)
    where = commit(made)
    assert checkpoints.was_ever_committed(tmp_path)
    shutil.rmtree(where)
    assert checkpoints.was_ever_committed(tmp_path), "the pointer remembers"
    (tmp_path / checkpoints.POINTER).unlink()
    assert not checkpoints.was_ever_committed(tmp_path)
    checkpoints.condemn(tmp_path, [commit(draft(tmp_path, 2))])
    (tmp_path / checkpoints.POINTER).unlink()
    assert checkpoints.was_ever_committed(tmp_path), "so does what was condemned"
