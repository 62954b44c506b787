"""Files written from memory: every size, with and without O_DIRECT, has the bytes and the digest."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
from pathlib import Path

import pytest
from blake3 import blake3

from sweeper import checkpoints, fsops, images
from sweeper.checkpoints import Draft
from sweeper.errors import CheckpointRefused
from sweeper.images import PAGE_BYTES

CHUNK = 4 * PAGE_BYTES
SIZES = sorted(
    {
        max(0, edge + off)
        for edge in (0, PAGE_BYTES, 2 * PAGE_BYTES, CHUNK, 2 * CHUNK, 3 * CHUNK, 7 * CHUNK)
        for off in (-PAGE_BYTES, -1, 0, 1, 513, PAGE_BYTES)
    }
)
LARGEST = 8 * CHUNK
DATA = random.Random(5).randbytes(LARGEST)


@pytest.fixture(scope="module")
def memory() -> memoryview:
    """Page-aligned, as the memory of a snapshot is."""
    made = mmap.mmap(-1, LARGEST)
    made[:] = DATA
    return memoryview(made)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(images, "_DIRECT_FROM_BYTES", 1)


def check(path: Path, memory: memoryview, size: int) -> None:
    digest = images.write(path, memory[:size])
    assert path.read_bytes() == DATA[:size], size
    assert digest == blake3(DATA[:size]).hexdigest(), size
    assert path.stat().st_mode & 0o777 == 0o600


def test_every_size_around_a_border(tmp_path: Path, memory: memoryview) -> None:
    for size in SIZES:
        check(tmp_path / f"{size}", memory, size)


def test_a_file_system_that_refuses_direct_files(
    tmp_path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = os.open, []

    def refuse(path: object, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT:
            os.close(real(path, flags & ~os.O_DIRECT, *more))  # ext4 leaves the new file behind
            seen.append(flags)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    for size in SIZES:
        check(tmp_path / f"{size}", memory, size)
    assert len(seen) == len([size for size in SIZES if size])


def test_a_file_system_that_takes_direct_files_but_no_direct_writes(
    tmp_path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def refuse(fd: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    for size in SIZES:
        check(tmp_path / f"direct-{size}", memory, size)


def test_a_kernel_that_takes_a_part_at_a_time(
    tmp_path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, real_write = os.pwrite, os.write
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:PAGE_BYTES], at))
    check(tmp_path / "many", memory, 3 * CHUNK + 5)
    monkeypatch.setattr(images, "_DIRECT_FROM_BYTES", LARGEST)
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:1000]))
    check(tmp_path / "few", memory, CHUNK + 5)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_refusal_in_any_thread_is_raised(
    tmp_path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = os.pwrite
    for bad in range(5):

        def refuse(fd: int, data: memoryview, at: int, bad: int = bad) -> int:
            if at == bad * CHUNK:
                raise OSError(number, os.strerror(number))
            return real(fd, data, at)

        monkeypatch.setattr(os, "pwrite", refuse)
        with pytest.raises(OSError, match=os.strerror(number)):
            images.write(tmp_path / f"{bad}", memory[: 4 * CHUNK + 1])


def test_a_bug_in_a_thread_is_no_good_file(
    tmp_path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise ValueError("bug")

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(ValueError, match="bug"):
        images.write(tmp_path / "model.pth", memory[:CHUNK])


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path, memory: memoryview) -> None:
    (tmp_path / "model.pth").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        images.write(tmp_path / "model.pth", memory[:CHUNK])
    assert (tmp_path / "model.pth").read_bytes() == b"precious"


def test_no_file_is_left_open(tmp_path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    check(tmp_path / "good", memory, 3 * CHUNK + 1)
    monkeypatch.setattr(fsops, "fsync_file", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "bad")))
    with pytest.raises(OSError, match="bad"):
        images.write(tmp_path / "bad", memory[: CHUNK + 1])
    assert len(os.listdir("/proc/self/fd")) == before


# --- reading ---------------------------------------------------------------------------------


def test_the_digest_of_a_large_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    for size in SIZES:
        path.write_bytes(DATA[:size])
        with open(path, "rb") as file:
            assert images.digest_of(file.fileno(), size) == blake3(DATA[:size]).hexdigest()
            if size:
                assert images.digest_of(file.fileno(), size + 1) == blake3(DATA[:size]).hexdigest()


def test_large_files_are_checked_as_small_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: memoryview
) -> None:
    monkeypatch.setattr(images, "MAPPED_FROM_BYTES", CHUNK)
    draft = Draft(tmp_path, "run", 1, 1, ((1, 0),), None, "config")
    draft.add_image("large.pth", memory[: CHUNK + 7])
    draft.add_image("small.pt", memory[:100])
    checkpoints.commit(draft, check_lease=lambda: None, record=lambda _: None, committed_at="now")
    directory, before = tmp_path / "step_00000001", len(os.listdir("/proc/self/fd"))
    _, contents = checkpoints.validate(directory, run_id="run", keep=True)
    large, small = contents["large.pth"], contents["small.pt"]
    assert (small.data, small.fd) == (DATA[:100], None)
    assert large.fd is not None
    assert os.pread(large.fd, LARGEST, 0) == DATA[: CHUNK + 7]
    large.close()
    large.close()
    checkpoints.validate(directory, run_id="run")
    with open(directory / "small.pt", "r+b") as file:  # the last one checked
        file.write(b"X")
    with pytest.raises(CheckpointRefused, match=r"small\.pt has the wrong digest"):
        checkpoints.validate(directory, run_id="run", keep=True)
    with open(directory / "large.pth", "r+b") as file:
        file.seek(CHUNK + 6)
        file.write(bytes([DATA[CHUNK + 6] ^ 1]))
    with pytest.raises(CheckpointRefused, match=r"large\.pth has the wrong digest"):
        checkpoints.validate(directory, run_id="run", keep=True)
    assert len(os.listdir("/proc/self/fd")) == before
