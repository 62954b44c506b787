"""Several ranks, for real: torchrun, gloo, DDP and FSDP2; killed, hung, and resumed on another number of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks_trainer
import torch
from crash import mini
from crash.mini import Place

from sweeper import checkpoints, rundir
from sweeper.torch.order import EpochOrder

EPOCHS = 4
LIMIT_S = 240.0


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    with mini.fast_dir() as path:
        yield path


def new_place(
    data_dir: Path, *, ranks: int = 2, retry: dict[str, int] | None = None, **trainer: Any
) -> Place:
    asked = {"kind": "ddp", "epochs": EPOCHS, "lr": 0.05, "at": 5, "rank": 1, "act": "none", "attempts": 1}
    return mini.new_place(
        data_dir,
        trainer={"_target_": "ranks_trainer.train", **asked, **trainer},
        checkpoint={"every_n_steps": 3, "every_s": None, "keep_last": 2},
        launcher={"kind": "local", "n_workers": 1, "ranks_per_worker": ranks},
        lease={"heartbeat_s": 5.0, "ttl_s": 60.0, "progress_s": 0, "grace_s": 20.0, "ranks_s": 5.0},
        retry={"max_lost": 20, "max_crashed": 1, "max_oom": 0, **(retry or {})},
        space={"trainer.lr": mini.search.distribution_of("trainer.lr", "interval(0.05, 0.0500001)")},
    )


def worker(place: Place) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "SWEEPER_DATA_DIR": str(place.data_dir),
        "SWEEPER_THREADS": "1",
    }
    argv = [sys.executable, "-m", "sweeper", "worker", mini.SWEEP, "--name", "a"]
    return subprocess.Popen(
        argv, env=environment, cwd=place.data_dir, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def work(place: Place) -> int:
    """A real worker until it ends."""
    process = worker(place)
    assert process.stderr is not None
    with open(place.log, "a") as log:
        for line in process.stderr:
            log.write(line)
    return process.wait(LIMIT_S)


def set_ranks(place: Place, ranks: int) -> None:
    from sweeper.store import Store

    store = Store(place.url)
    sweep = store.sweep(mini.SWEEP)
    launcher = {**sweep.config["launcher"], "ranks_per_worker": ranks}
    store.update_sweep(mini.SWEEP, n_trials=sweep.n_trials, config={**sweep.config, "launcher": launcher})
    store.close()


def end_of(place: Place) -> dict[str, bytes]:
    """The files of the last checkpoint and the metrics log."""
    (_, newest), *_ = checkpoints.steps_on_disk(place.root())
    files = {
        name: (newest / name).read_bytes() for name in os.listdir(newest) if name.endswith((".pth", ".pt"))
    }
    return {**files, "metrics": (place.run_dir() / rundir.METRICS_FILE).read_bytes()}


def outcomes(place: Place) -> list[str]:
    rows = place.rows("SELECT outcome FROM sweeper_attempt ORDER BY run_id, attempt")
    return [row["outcome"] for row in rows]


def attempt_log(place: Place, attempt: int) -> str:
    return rundir.attempt_log(place.run_dir(), attempt).read_text()


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def undisturbed(base: Path, request: pytest.FixtureRequest) -> tuple[str, dict[str, bytes]]:
    place = new_place(base / f"undisturbed-{request.param}", kind=request.param)
    assert work(place) == 0, place.printed()
    return request.param, end_of(place)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_ranks_end_with_the_same_bytes(undisturbed: tuple[str, dict[str, bytes]], base: Path) -> None:
    kind, end = undisturbed
    assert {"rng_state.pt", "rng_state.rank1.pt"} <= set(end)
    place = new_place(base / f"{kind}-killed", kind=kind, act="kill")
    assert work(place) == 0, place.printed()
    assert outcomes(place) == ["lost", "completed"]
    assert "ended by SIGKILL" in place.printed()
    assert end_of(place) == end


def samples_seen(place: Place) -> dict[int, Counter[int]]:
    """Epoch → how often each sample counted: of each attempt only the steps that its successor did not repeat."""
    starts = {
        row["attempt"]: row["start_step"]
        for row in place.rows("SELECT attempt, start_step FROM sweeper_attempt")
    }
    seen: dict[int, Counter[int]] = {}
    for path in place.run_dir().glob("seen.*.txt"):
        attempt = int(path.name.split(".")[1])
        until = starts.get(attempt + 1, 10**9)
        for line in path.read_text().splitlines():
            epoch, step, *indices = map(int, line.split())
            if step <= until:
                seen.setdefault(epoch, Counter()).update(indices)
    return seen


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_ranks_then_one_then_four(base: Path) -> None:
    """Each sample of each epoch is seen exactly once, and the log says that the bits differ from there on."""
    place = new_place(base / "reshard", act="kill the worker", rank=0, attempts=2, at=4)
    for ranks in (2, 1, 4):
        set_ranks(place, ranks)
        work(place)
    assert outcomes(place) == ["lost", "lost", "completed"]
    assert samples_seen(place) == {epoch: Counter(range(ranks_trainer.SIZE)) for epoch in range(EPOCHS)}
    assert "from 2 ranks to 1" in attempt_log(place, 2)
    assert "from 1 ranks to 4" in attempt_log(place, 3)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_rank_that_raises_is_a_crash_of_the_attempt(base: Path) -> None:
    place = new_place(base / "raises", act="raise", attempts=9)
    assert work(place) == 0, place.printed()
    # A newer checkpoint pays for a crash: there may be more attempts.
    row, *_ = place.rows("SELECT outcome, reason, detail FROM sweeper_attempt ORDER BY attempt")
    assert row["outcome"] == "crashed"
    assert "this rank has had enough" in row["detail"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_what_another_rank_raises_is_told_as_what_it_is(base: Path) -> None:
    place = new_place(base / "memory", act="memory")
    assert work(place) == 0, place.printed()
    row, *_ = place.rows("SELECT outcome, reason FROM sweeper_attempt ORDER BY attempt")
    assert (row["outcome"], row["reason"]) == ("oom", "rank 1: MemoryError: no room on this rank")
    place = new_place(base / "misconfigured", act="misconfigure")
    assert work(place) == 78, place.printed()
    assert outcomes(place) == ["preempted"]
    assert "rank 1: this rank was set up wrong. Set it up right." in place.printed()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_is_lost_and_soon_over(base: Path, rank: int) -> None:
    """The others give it 5 s; nobody waits for it after that."""
    place = new_place(base / f"stopped-{rank}", act="stop", rank=rank, retry={"max_lost": 0})
    started = time.monotonic()
    work(place)
    assert time.monotonic() - started < 40, "and not 30 s more for the one that is stopped"
    assert outcomes(place)[0] == "lost"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_rank_that_hangs_ends_the_attempt(undisturbed: tuple[str, dict[str, bytes]], base: Path) -> None:
    """After `lease.ranks_s`; the attempt is lost, and the next one ends with the same bytes."""
    kind, end = undisturbed
    place = new_place(base / f"hangs-{kind}", kind=kind, act="hang")
    assert work(place) == 0, place.printed()
    assert outcomes(place) == ["lost", "completed"]
    assert end_of(place) == end


# --- the order of samples ----------------------------------------------------------------------


def orders(size: int, world_size: int, **more: Any) -> list[EpochOrder]:
    asked = {"batch_size": 4, "drop_last": False, "shuffle": True, "seed": 3, **more}
    return [EpochOrder(size, rank=rank, world_size=world_size, **asked) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [4, 7, 8, 9, 16, 17, 33, 50])
def test_ranks_share_an_epoch(size: int, world_size: int) -> None:
    shares = [list(order) for order in orders(size, world_size)]
    assert {len(share) for share in shares} == {len(orders(size, world_size)[0])}, "as many steps on each"
    assert sorted(index for share in shares for batch in share for index in batch) == list(range(size))
    assert all(batch for share in shares for batch in share)


@pytest.mark.parametrize("change", [(2, 1), (1, 2), (2, 4), (4, 2), (3, 4)])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_what_is_left_of_an_epoch_is_shared_out_anew(change: tuple[int, int], steps: int) -> None:
    before, after = change
    seen: list[int] = []
    position = 0
    for order in orders(50, before):
        batches = list(order)
        seen += [index for batch in batches[:steps] for index in batch]
    for _ in range(steps):
        position = orders(50, before)[0].after(position)
    for order in orders(50, after):
        order.position = position
        seen += [index for batch in order for index in batch]
    assert sorted(seen) == list(range(50))


def test_one_rank_sees_what_it_always_saw() -> None:
    """The order of one rank is that of the permutation, in batches."""
    (order,) = orders(10, 1)
    order.epoch = 2
    generator = torch.Generator().manual_seed(mini_seed(order))
    whole = torch.randperm(10, generator=generator).tolist()
    assert list(order) == [whole[:4], whole[4:8], whole[8:]]


def mini_seed(order: EpochOrder) -> int:
    from sweeper.torch.order import derived_seed

    return derived_seed(order.seed, "order", order.epoch)
