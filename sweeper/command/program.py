"""The program as a process: started, read, answered, asked to stop, and gone with its trainer."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Self

from sweeper import processes
from sweeper.command.protocol import Splitter
from sweeper.command.settings import Command
from sweeper.errors import ConfigError

_REFUSALS = {
    errno.ENOENT: "Correct trainer.argv or trainer.cwd; a script's #! line must name what is there, too.",
    errno.ENOTDIR: "Correct trainer.cwd.",
    errno.EACCES: "Make it executable, or put its interpreter first in trainer.argv.",
    errno.ENOEXEC: "Put its interpreter first in trainer.argv, or give it a #! line.",
}
_CHUNK_BYTES = 1 << 16
_MAX_CHUNKS = 64
"""Read at most so many at once, so that who prints without end does not keep us from everything else."""


class Program:
    """A running program; as a context manager it and its process group end with the block.

    Its stdout is a pipe to us, its stdin a pipe from us; its stderr is ours.

    HAZARD: for the trainer's main thread: the process dies with the thread that created it.

    Raises:
        ConfigError: It cannot be started.
    """

    def __init__(self, command: Command, environment: Mapping[str, str]) -> None:
        program = command.program(environment)
        try:
            self._process = subprocess.Popen(
                [program, *command.argv[1:]], env=environment, cwd=command.cwd,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                process_group=0, preexec_fn=processes.bound_to(os.getpid()),
            )  # fmt: skip
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            raise ConfigError(
                f"the program {program} cannot be started",
                why=f"{error.strerror} ({error.filename})",
                do=_REFUSALS[error.errno],
            ) from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._stdin, False)
        os.set_blocking(self._stdout, False)
        self._death = os.pidfd_open(self._process.pid)
        self._splitter = Splitter()
        self._is_closed = False  # its stdout
        self.is_over = False

    @property
    def pid(self) -> int:
        """Of the program itself; its process group has the same number."""
        return self._process.pid

    def read(self, *, wait_s: float) -> Iterator[tuple[bool, bytes]]:
        """Yield (is protocol, bytes) for what came; waits at most `wait_s` for anything to come.

        Once the program has ended, `is_over` is true and the last of what it printed is yielded.
        """
        watched = [self._death] if self._is_closed else [self._death, self._stdout]
        ready = select.select(watched, [], [], wait_s)[0]
        if self._death in ready:
            self.kill()  # what it left behind may hold its stdout open and print for ever
            self.is_over = True
        for _ in range(_MAX_CHUNKS):
            try:
                data = os.read(self._stdout, _CHUNK_BYTES)
            except BlockingIOError:
                break
            if not data:
                self._is_closed = True
                break
            yield from self._splitter.feed(data)
        if self.is_over or self._is_closed:
            yield from self._splitter.end()

    def answer(self, text: str) -> None:
        """Write one line to its stdin. One that does not read, or is gone, misses it."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._stdin, text.encode(errors="replace") + b"\n")

    def send_signal(self, number: int) -> None:
        """To the program itself; what it started is its own business."""
        # Not Popen's: that reaps, and a process number must stay ours until its group is ended.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL for it and its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> int:
        """End what is left of it; returns its return code."""
        return processes.kill_group(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
        os.close(self._death)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
