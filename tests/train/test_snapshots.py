"""Snapshots in memory: the bytes that plain `torch.load` reads, of every kind of tensor, large or small."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import new_run
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sweeper import checkpoints, images
from sweeper.checkpoints import Content
from sweeper.errors import CheckpointRefused, ConfigError
from sweeper.images import PAGE_BYTES
from sweeper.torch import Preempted, resumable
from sweeper.torch.memory import Memory, NoRoom
from sweeper.torch.state import check_restorable, load


def strange() -> dict[str, Any]:
    tied = torch.randn(5, 3)
    base = torch.arange(60.0).reshape(6, 10)
    return {
        "tied": tied,
        "head": tied,
        "view": tied[1:],
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": torch.ones(1, 4).expand(3, 4),
        "bfloat16": torch.randn(7).to(torch.bfloat16),
        "half": torch.randn(7).half(),
        "float8": torch.randn(8).to(torch.float8_e4m3fn),
        "bool": torch.tensor([True, False]),
        "complex": torch.randn(2, dtype=torch.complex64),
        "int8": torch.arange(-3, 3, dtype=torch.int8),
        "none_at_all": torch.empty(0, 4),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "sparse": torch.eye(4).to_sparse(),
        "csr": torch.eye(4).to_sparse_csr(),
        "parameter": nn.Parameter(torch.randn(2)),
        "nested": [1, 2.5, "text", None, True, (3, {"deep": torch.ones(2)})],
        "ordered": collections.OrderedDict(a=1),
        "bytes": b"\x00\xff",
    }


def packed(memory: Memory, files: dict[str, Any]) -> dict[str, bytes]:
    try:
        places = memory.pack(files)
    except NoRoom as room:
        memory.grow(room.size_bytes)
        places = memory.pack(files)
    assert all(start % PAGE_BYTES == 0 for start, _ in places.values())
    return {name: bytes(memory.view(place)) for name, place in places.items()}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        if one.layout != torch.strided:
            one, other = one.to_dense(), other.to_dense()
        alike = (type(one), one.dtype, one.shape) == (type(other), other.dtype, other.shape)
        raw = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
        return alike and torch.equal(*raw)
    if isinstance(one, dict):
        return (
            type(one) is type(other)
            and list(one) == list(other)
            and all(same(one[key], other[key]) for key in one)
        )
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_plain_torch_reads_what_was_packed() -> None:
    state = strange()
    image = packed(Memory(), {"state.json": b"{}", "model.pth": state, "empty": b""})["model.pth"]
    read = torch.load(io.BytesIO(image), weights_only=True)
    assert same(state, read)
    assert read["tied"].untyped_storage().data_ptr() == read["view"].untyped_storage().data_ptr(), (
        "still tied"
    )
    buffer = io.BytesIO()
    torch.save({"tied": state["tied"]}, buffer)
    buffer.seek(0)
    assert same(torch.load(buffer, weights_only=True)["tied"], read["tied"])


def test_memory_is_used_again_and_grows_only_when_it_must() -> None:
    memory = Memory()
    small, large = {"a": torch.ones(10)}, {"a": torch.ones(600_000)}
    first = packed(memory, {"model.pth": small})["model.pth"]
    size = memory.size_bytes
    large_image = packed(memory, {"model.pth": large})["model.pth"]
    assert memory.size_bytes > size
    assert same(torch.load(io.BytesIO(large_image), weights_only=True), large)
    size = memory.size_bytes
    assert packed(memory, {"model.pth": small})["model.pth"] == first
    assert memory.size_bytes == size


def test_a_crc_of_torchs_is_left_as_it_was() -> None:
    packed(Memory(), {"model.pth": {"a": torch.ones(3)}})
    assert torch.serialization.get_crc32_options() is True


@pytest.mark.parametrize(
    "bad", [object(), [{1: re.compile("x")}], lambda: 0], ids=["object", "pattern", "not-even-pickled"]
)
def test_what_could_never_be_restored_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match="could never be restored"):
        check_restorable({"optimizer.pt": {"part": bad}})


def test_dicts_of_other_kinds_are_tried_as_what_they_are() -> None:
    check_restorable(
        {"optimizer.pt": {"a": collections.OrderedDict(x=torch.ones(2)), "b": collections.Counter("abc")}}
    )
    with pytest.raises(ConfigError):
        check_restorable({"optimizer.pt": collections.defaultdict(lambda: 0, x=torch.ones(2))})


# --- files that are mapped -------------------------------------------------------------------


def attempt(directory: Path, *, stop: bool = False, **more: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Linear(40, 40)
    optimizer = torch.optim.Adam(model.parameters())
    loader = DataLoader(TensorDataset(torch.ones(8, 40)), batch_size=2, shuffle=True)
    run = new_run(directory, checkpoint={"every_n_steps": 1}, **more)
    loop = resumable(run, model=model, optimizer=optimizer, loader=loader)
    with contextlib.suppress(Preempted):
        for (inputs,) in loop.batches(epochs=1):
            optimizer.zero_grad()
            model(inputs).sum().backward()
            optimizer.step()
            if stop and loop.step == 2:
                run._link.stop_reason = "asked to"  # type: ignore[misc]
        run.finish()
    return model, optimizer


def test_a_resume_from_mapped_files_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt(tmp_path / "whole.r.00000")
    attempt(tmp_path / "mapped.r.00000", stop=True)
    monkeypatch.setattr(images, "MAPPED_FROM_BYTES", PAGE_BYTES)
    attempt(tmp_path / "mapped.r.00000")
    assert not [fd for fd in os.listdir("/proc/self/fd") if "/checkpoints/" in target(fd)]
    last = checkpoints.step_name(4)
    for name in ("model.pth", "optimizer.pt", "rng_state.pt", "state.json"):
        files = [tmp_path / f"{run}.r.00000" / "checkpoints" / last / name for run in ("whole", "mapped")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def test_what_was_mapped_outlives_its_file(tmp_path: Path) -> None:
    state = {"a": torch.randn(5000)}
    torch.save(state, tmp_path / "model.pth")
    content = Content(fd=os.open(tmp_path / "model.pth", os.O_RDONLY))
    read = load("model.pth", content)
    content.close()
    (tmp_path / "model.pth").unlink()
    assert same(read, state)
    read["a"] += 1


@pytest.mark.parametrize("name", ["model.pth", "optimizer.pt"])
def test_damage_in_a_mapped_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    attempt(tmp_path / "x.r.00000")
    monkeypatch.setattr(images, "MAPPED_FROM_BYTES", PAGE_BYTES)
    path = tmp_path / "x.r.00000" / "checkpoints" / checkpoints.step_name(4) / name
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    run = new_run(tmp_path / "x.r.00000")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointRefused, match=f"{name} has the wrong digest"):
        run.read(path.parent)
    assert len(os.listdir("/proc/self/fd")) == before
