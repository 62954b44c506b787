"""Snapshots: the files of a checkpoint packed into shared memory at the speed of a copy."""

from __future__ import annotations

import contextlib
import copy
import mmap
import os
import weakref
from collections.abc import Iterator, Mapping
from typing import IO, Any, cast

import torch

from sweeper.images import PAGE_BYTES
from sweeper.trainer.saver import map_shared

_SPARE_BYTES = 1 << 20


class Memory:
    """Memory in which `torch.save` writes, kept from one save to the next.

    Fresh pages cost twenty times a copy, so they are made once: by the saver, or at the first save.
    The bytes of a file are exactly what plain `torch.load(weights_only=True)` reads.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("sweeper-checkpoint", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self.fd)
        self.size_bytes = 0
        self._map: mmap.mmap | None = None
        self._pinned = PinnedCopies()

    def grow(self, size_bytes: int) -> None:
        """Make room for so many bytes, in all."""
        if size_bytes > self.size_bytes:
            os.ftruncate(self.fd, size_bytes)
            self._map = map_shared(self.fd, size_bytes)
            self.size_bytes = size_bytes

    def pack(self, files: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """Write files one behind the other: name → (offset, size in bytes), each on a page.

        Args:
            files: Name → bytes, or a state for `torch.save`. It is read only until this returns.

        Raises:
            NoRoom: With the size that would do; nothing of it counts.
        """
        places = {}
        with _without_crc():
            end = 0
            for name, state in files.items():
                start = _page_after(end)
                writer = _Writer(self._map, start, self.size_bytes)
                if isinstance(state, bytes):
                    writer.write(state)
                else:
                    torch.save(self._pinned.of(state), cast(IO[bytes], writer))
                end = writer.end
                places[name] = (start, end - start)
        if end > self.size_bytes:
            raise NoRoom(_page_after(end + end // 8 + _SPARE_BYTES))
        return places

    def view(self, place: tuple[int, int]) -> memoryview:
        """The bytes at a place."""
        assert self._map is not None
        return memoryview(self._map)[place[0] : place[0] + place[1]]


class NoRoom(Exception):
    """The memory is too small; `size_bytes` would do."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self.size_bytes = size_bytes


class _Writer:
    """What `torch.save` writes to. Beyond the end of the memory it only counts."""

    def __init__(self, memory: mmap.mmap | None, start: int, limit: int) -> None:
        self._view = None if memory is None else memoryview(memory)
        self.end, self._limit = start, limit

    def write(self, data: Any) -> int:
        source = memoryview(data)
        size = source.nbytes
        if self.end + size <= self._limit:
            assert self._view is not None
            self._view[self.end : self.end + size] = source.cast("B")
        self.end += size
        return size

    def flush(self) -> None:
        """Nothing is held back."""


def _page_after(offset: int) -> int:
    return -(-offset // PAGE_BYTES) * PAGE_BYTES


@contextlib.contextmanager
def _without_crc() -> Iterator[None]:
    """The digest of the whole file is better than the CRC of each record, and costs no time here."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class PinnedCopies:
    """Host copies of tensors on devices: pinned, kept, and copied all at once on a side stream.

    Without it `torch.save` would copy one storage after the other into fresh pageable memory.
    Not proven on a GPU by this project's tests.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], torch.Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def of(self, state: Any) -> Any:
        """`state` with every CUDA tensor replaced by its host copy; itself if there is none."""
        copies: dict[int, torch.Tensor] = {}
        replaced = self._replace(state, copies)
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)
            stream.synchronize()
        return replaced if copies else state

    def _replace(self, value: Any, copies: dict[int, torch.Tensor]) -> Any:
        if isinstance(value, torch.Tensor):
            return self._copy(value, copies) if value.is_cuda else value
        if isinstance(value, dict):
            made = [(key, self._replace(item, copies)) for key, item in value.items()]
            if all(new is value[key] for key, new in made):
                return value
            replaced = copy.copy(value)
            replaced.update(made)
            return replaced
        if type(value) in (list, tuple):
            return type(value)(self._replace(item, copies) for item in value)
        return value

    def _copy(self, tensor: torch.Tensor, copies: dict[int, torch.Tensor]) -> torch.Tensor:
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        host = copies.get(storage.data_ptr())
        if host is None:
            key = (storage.data_ptr(), storage.nbytes())
            host = self._kept.get(key)
            if host is None:
                host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=True)
                self._kept = {**self._kept, key: host}
            stream = self._streams.setdefault(tensor.device, torch.cuda.Stream(tensor.device))  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            with torch.cuda.stream(stream):
                host.copy_(source, non_blocking=True)
            copies[storage.data_ptr()] = host
        return torch.empty(0, dtype=tensor.dtype).set_(
            host.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
        )
