"""Ranks without torchrun: forked from the test process, over gloo, in tenths of a second."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from alone import Alone, Seen, new_run, plain
from torch import nn

from sweeper.channel import NoLink
from sweeper.torch import Preempted, Run, resumable
from sweeper.trainer.main import prepare_process
from sweeper.trainer.ranks import Follower

LIMIT_S = 60
torch.set_num_threads(1)
os.environ["GLOO_SOCKET_IFNAME"] = "lo"


@dataclass(frozen=True, slots=True)
class Ended:
    """How each rank ended: its wait status, and what it returned or raised."""

    statuses: list[int]
    results: list[Any]


def attempt(
    directory: Path, world_size: int, act: Callable[[Run, int], Any], *, ranks_s: float = 20.0, **more: Any
) -> Ended:
    """The next attempt of a run, on so many ranks, each of which calls `act(run, rank)`."""
    spec = new_run(directory, num_ranks=world_size, ranks_s=ranks_s, **more).spec
    config = new_run(directory, **more).config
    meeting = directory / f"meeting.{spec.attempt}"
    meeting.unlink(missing_ok=True)
    sys.stdout.flush()
    pids = []
    for rank in range(world_size):
        if (pid := os.fork()) == 0:
            run = Run(spec, Alone(), config=config) if rank == 0 else Follower(spec, NoLink(), config=config)
            _be_rank(run, rank, world_size, meeting, act)
        pids.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    results = []
    for rank in range(world_size):
        path = directory / f"result.{rank}"
        results.append(pickle.loads(path.read_bytes()) if path.exists() else None)
        path.unlink(missing_ok=True)
    return Ended(statuses, results)


def _be_rank(run: Run, rank: int, world_size: int, meeting: Path, act: Callable[[Run, int], Any]) -> None:
    code = 0
    try:
        signal.alarm(LIMIT_S)
        store = dist.FileStore(str(meeting), world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=run.spec.ranks_s)
        )
        prepare_process(run.spec)
        result: Any = act(run, rank)
    except BaseException as error:  # noqa: BLE001 - nothing may return into the frames of pytest
        traceback.print_exc()
        result, code = error, 1
    try:
        (run.directory / f"result.{rank}").write_bytes(pickle.dumps(result))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def read(
    directory: Path,
    world_size: int,
    make: Callable[[int], Any],
    *,
    epochs: int,
    stop_after: int | None = None,
    **more: Any,
) -> list[Seen]:
    """Read through a loop on each rank, as `alone.read`; raises what the first rank raised."""

    def act(run: Run, rank: int) -> Seen:
        loop = resumable(run, model=nn.Linear(1, 1, bias=False), loader=make(rank))
        seen: Seen = []
        try:
            for batch in loop.batches(epochs=epochs):
                seen.append((loop.epoch, plain(batch), torch.rand(()).item()))
                if rank == 0 and len(seen) == stop_after:
                    run._link.stop_reason = "asked to"  # type: ignore[misc]
        except Preempted:
            return seen
        run.finish()
        return seen

    ended = attempt(directory, world_size, act, **more)
    for result in ended.results:
        if isinstance(result, BaseException):
            raise result
    return ended.results
