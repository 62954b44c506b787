"""A loop that is left early: `break` is the end of a training, an exception is none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import forked_ranks
import pytest
import torch
from alone import new_run
from crash import mini
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sweeper import checkpoints
from sweeper.errors import ConfigError
from sweeper.torch import Run, resumable
from sweeper.torch.loop import Loop

Batches = Callable[[], Iterator[Any]]
Body = Callable[[Loop, Batches], None]


@pytest.fixture
def directory() -> Iterator[Path]:
    with mini.fast_dir() as path:
        yield path / "left.r.00000"


def go(directory: Path, body: Body, **more: Any) -> Loop:
    """Train six batches an epoch, as `body` does it; it ends without an exception."""
    return train(new_run(directory), body, **more)


def train(run: Run, body: Body, **more: Any) -> Loop:
    torch.manual_seed(1)
    model = nn.Linear(2, 1)
    loader = DataLoader(TensorDataset(torch.ones(12, 2)), batch_size=2, shuffle=True)
    loop = resumable(run, model=model, optimizer=torch.optim.Adam(model.parameters()), loader=loader)

    def batches() -> Iterator[Any]:
        return loop.batches(epochs=2, **more)

    body(loop, batches)
    run.finish()
    return loop


def newest(directory: Path) -> tuple[dict[str, Any], set[str]]:
    """state.json of the newest checkpoint, and the names of its files."""
    (_, step), *_ = checkpoints.steps_on_disk(directory / "checkpoints")
    return json.loads((step / "state.json").read_text()), {path.name for path in step.iterdir()}


# --- break -----------------------------------------------------------------------------------


def plainly(loop: Loop, batches: Batches) -> None:
    for _ in batches():
        if loop.step == 4:
            break


def by_return(loop: Loop, batches: Batches) -> None:
    for _ in batches():
        if loop.step == 4:
            return


def in_a_try(loop: Loop, batches: Batches) -> None:
    try:
        for _ in batches():
            try:
                if loop.step == 4:
                    break
            finally:
                loop.report(loss=1.0)
    except ValueError:
        pass


def counted(loop: Loop, batches: Batches) -> None:
    for index, _ in enumerate(batches()):
        if index == 3:
            break


def sliced(loop: Loop, batches: Batches) -> None:
    for _ in islice(batches(), 4):
        pass


def wrapped(batches: Iterable[Any]) -> Iterator[Any]:
    """As progress bars are made."""
    try:
        for number, batch in enumerate(batches):
            yield batch
            print(number)
    finally:
        print("done")


def in_a_progress_bar(loop: Loop, batches: Batches) -> None:
    for _ in wrapped(wrapped(batches())):
        if loop.step == 4:
            break


def held(loop: Loop, batches: Batches) -> None:
    mine = batches()
    for _ in mine:
        if loop.step == 4:
            break


def held_for_ever(loop: Loop, batches: Batches) -> None:
    everywhere.append(batches())
    for _ in everywhere[-1]:
        if loop.step == 4:
            break


everywhere: list[Iterator[Any]] = []


def nothing_left(loop: Loop, batches: Batches) -> None:
    for _ in batches():
        pytest.fail("it is over")


@pytest.mark.parametrize(
    "body", [plainly, by_return, in_a_try, counted, sliced, in_a_progress_bar, held, held_for_ever]
)
def test_break_is_the_end(directory: Path, body: Body) -> None:
    go(directory, body)
    state, files = newest(directory)
    assert (state["global_step"], state["is_over"], "accumulated" in state) == (4, True, False)
    assert "gradients.pt" not in files
    loop = go(directory, nothing_left)
    assert (loop.step, loop.total_steps) == (4, 4)


@pytest.mark.parametrize(("batch", "step"), [(4, 1), (5, 1), (6, 2), (7, 2)])
def test_an_update_that_is_not_complete_does_not_count(directory: Path, batch: int, step: int) -> None:
    def body(loop: Loop, batches: Batches) -> None:
        for _ in batches():
            if 6 * loop.epoch + loop.step_in_epoch == batch:
                break

    go(directory, body, accumulate=3)
    state, files = newest(directory)
    assert (state["global_step"], state["is_over"], "accumulated" in state) == (step, True, False)
    assert "gradients.pt" not in files
    go(directory, nothing_left, accumulate=3)


def test_a_step_that_was_saved_already_is_saved_again_as_the_last(directory: Path) -> None:
    def body(loop: Loop, batches: Batches) -> None:
        for _ in batches():
            if loop.step == 1:
                loop.save()
            if loop.step_in_epoch == 4:  # the first of the second update
                break

    go(directory, body, accumulate=3)
    assert newest(directory)[0]["is_over"]
    go(directory, nothing_left, accumulate=3)


def test_a_loop_that_is_entered_again_goes_on(directory: Path) -> None:
    run = new_run(directory)

    def body(loop: Loop, batches: Batches) -> None:
        for _ in batches():
            if loop.step == 4:
                break
        seen = [loop.step for _ in loop.batches(epochs=2)]
        assert seen == list(range(5, 13))

    train(run, body)
    assert "is_over" not in newest(directory)[0]


# --- an exception ----------------------------------------------------------------------------


def raising(loop: Loop, batches: Batches) -> None:
    for _ in batches():
        if loop.step == 4:
            raise ZeroDivisionError


def raising_in_a_progress_bar(loop: Loop, batches: Batches) -> None:
    for _ in wrapped(batches()):
        if loop.step == 4:
            raise ZeroDivisionError


def raising_deeper(loop: Loop, batches: Batches) -> None:
    for _ in enumerate(batches()):
        if loop.step == 4:
            1 / 0  # noqa: B018


@pytest.mark.parametrize("body", [raising, raising_in_a_progress_bar, raising_deeper])
def test_an_exception_is_no_end(directory: Path, body: Body) -> None:
    def caught(loop: Loop, batches: Batches) -> None:
        with pytest.raises(ZeroDivisionError):
            body(loop, batches)

    go(directory, caught)
    assert "is_over" not in newest(directory)[0]
    seen: list[int] = []
    go(directory, lambda loop, batches: seen.extend(loop.step for _ in batches()))
    assert seen == list(range(5, 13))


# --- several ranks ---------------------------------------------------------------------------


def test_all_ranks_leave_together(directory: Path) -> None:
    for body in (plainly, nothing_left):
        ended = forked_ranks.attempt(directory, 2, lambda run, rank, body=body: train(run, body).step)
        assert ended.results == [4, 4]
        assert newest(directory)[0]["is_over"]


@pytest.mark.parametrize("left", [0, 1])
def test_a_rank_that_leaves_alone_is_named(directory: Path, left: int) -> None:
    def body(loop: Loop, batches: Batches) -> None:
        for _ in batches():
            if loop.step == 2 and loop._ranks.rank == left:
                break

    ended = forked_ranks.attempt(directory, 2, lambda run, rank: train(run, body))
    error = ended.results[1]
    assert isinstance(error, ConfigError)
    assert "they have left the loop at different steps" in str(error)
