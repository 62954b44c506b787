"""What a loop saves, and when: beside the training, asked for, pinned, the best, for other tools."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alone import Alone, new_run
from crash import mini
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sweeper import checkpoints, fsops, manifests
from sweeper.errors import CheckpointError, ConfigError, SweeperError
from sweeper.torch import Preempted, Run, find_latest, resumable, saves
from sweeper.torch.loop import Loop
from sweeper.trainer import saver
from sweeper.trainer.saver import Done

STEPS = 12


@pytest.fixture
def directory() -> Iterator[Path]:
    with mini.fast_dir() as path:
        yield path / "save.r.00000"


@pytest.fixture(autouse=True)
def _not_for_slowness(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine any save may take long enough for a saver; here it is size that decides."""
    monkeypatch.setattr(saves, "BESIDE_FROM_S", float("inf"))


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small, it is saved beside the training."""
    monkeypatch.setattr(saves, "BESIDE_FROM_BYTES", 0)


def go(run: Run, each: Callable[[Loop], None] = lambda loop: None, *, epochs: int = 3) -> Loop:
    """Train four steps an epoch; `each` is called in each of them."""
    torch.manual_seed(2)
    model = nn.Linear(2, 3)
    optimizer = torch.optim.Adam(model.parameters())
    loader = DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2, shuffle=True)
    loop = resumable(run, model=model, optimizer=optimizer, loader=loader)
    for (inputs,) in loop.batches(epochs=epochs):
        optimizer.zero_grad()
        model(inputs).sum().backward()
        optimizer.step()
        each(loop)
    run.finish()
    return loop


def steps(run: Run) -> list[int]:
    return [step for step, _ in checkpoints.steps_on_disk(run.checkpoints_dir)]


def link(run: Run) -> Alone:
    return run._link  # type: ignore[return-value]


# --- beside the training -----------------------------------------------------------------------


def test_training_goes_on_while_a_saver_is_stopped(directory: Path, beside: None) -> None:
    """At most one save is in flight; what was due meanwhile is saved when there is room."""
    run = new_run(directory, checkpoint={"every_n_steps": 1, "keep_last": 50})
    begun: list[int] = []

    def each(loop: Loop) -> None:
        process = loop._saves._saver
        if process is not None and not begun:  # it makes room for the first save
            begun.append(loop.step)
            os.kill(process._process.pid, signal.SIGSTOP)  # type: ignore[attr-defined]
        elif process is not None and loop.step < 8:
            assert loop._saves.is_busy or loop.step == begun[0] + 1
            begun.append(loop.step)
        if process is not None and loop.step == 8:
            os.kill(process._process.pid, signal.SIGCONT)  # type: ignore[attr-defined]

    go(run, each)
    assert begun[-1] == 7, "no step waited"
    assert steps(run)[0] == STEPS
    assert find_latest(directory) == run.checkpoints_dir / checkpoints.step_name(STEPS)


def test_a_save_that_takes_for_ever_is_complained_of(
    directory: Path, beside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saves, "COMPLAIN_AFTER_S", 0.0)
    run = new_run(directory, checkpoint={"every_n_steps": 1})

    def each(loop: Loop) -> None:
        if loop.step == 3:
            loop._saves.wait()
            os.kill(loop._saves._saver._process.pid, signal.SIGSTOP)  # type: ignore[union-attr]
        if loop.step == 8:
            os.kill(loop._saves._saver._process.pid, signal.SIGCONT)  # type: ignore[union-attr]
            loop._saves.wait()

    go(run, each)
    texts = [said["text"] for said in link(run).said("complaint")]
    assert len([text for text in texts if "a save has been under way" in text]) >= 1
    assert steps(run)[0] == STEPS


def test_a_saver_that_hangs_is_ended_and_its_work_done(
    directory: Path, beside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saves, "HANGS_AFTER_S", 0.2)
    run = new_run(directory, checkpoint={"every_n_steps": 1, "keep_last": 50})
    stopped: list[int] = []

    def each(loop: Loop) -> None:
        if loop.step == 4:
            loop._saves.wait()
            stopped.append(loop._saves._saver._process.pid)  # type: ignore[union-attr]
            os.kill(stopped[0], signal.SIGSTOP)

    started = time.monotonic()
    loop = go(run, each)
    assert time.monotonic() - started < 20
    assert set(steps(run)) >= {4, STEPS}
    assert not Path(f"/proc/{stopped[0]}").exists()
    assert not loop.is_saving
    texts = [said["text"] for said in link(run).said("complaint")]
    assert len([text for text in texts if "the saver hung for" in text]) == 1


def test_a_saver_that_hangs_while_it_makes_room_costs_no_checkpoint(
    directory: Path, beside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saves, "HANGS_AFTER_S", 0.2)
    monkeypatch.setattr(saver.Saver, "allocate", stopping(saver.Saver.allocate))
    run = new_run(directory, checkpoint={"every_n_steps": 4})
    go(run, lambda loop: time.sleep(0.1))
    assert steps(run)[0] == STEPS
    assert len(steps(run)) >= 3
    assert len([said for said in link(run).said("complaint") if "hung" in said["text"]]) == 1


def stopping(request: Callable[..., None]) -> Callable[..., None]:
    def stop(self: saver.Saver, *args: Any, **more: Any) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)
        request(self, *args, **more)

    return stop


def test_a_stop_waits_less_for_a_saver_that_hangs(
    directory: Path, beside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM, and a worker, kill what does not stop in time."""
    monkeypatch.setattr(saves, "HANGS_AFTER_STOP_S", 0.2)
    run = new_run(directory, checkpoint={"every_n_steps": 1})

    def each(loop: Loop) -> None:
        if loop.step == 4:
            loop._saves.wait()
            os.kill(loop._saves._saver._process.pid, signal.SIGSTOP)  # type: ignore[union-attr]
        if loop.step == 6:
            run._link.stop_reason = "asked to"  # type: ignore[misc]

    started = time.monotonic()
    with pytest.raises(Preempted):
        go(run, each)
    assert time.monotonic() - started < 20
    assert steps(run)[0] == 6


def test_never_two_saves_in_flight(directory: Path, beside: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = saver.Saver.save
    calls: list[int] = []

    def save(self: saver.Saver, plan: Any, *args: Any, **more: Any) -> None:
        assert not self.is_busy
        calls.append(plan.step)
        real(self, plan, *args, **more)

    monkeypatch.setattr(saver.Saver, "save", save)
    run = new_run(directory, checkpoint={"every_n_steps": 1, "keep_last": 50})
    go(run, epochs=10)
    assert calls == sorted(set(calls))
    assert sorted(steps(run)) == calls
    assert calls[-1] == 40


def test_small_states_start_no_saver(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "start_process", lambda *_: pytest.fail("a saver was started"))
    run = new_run(directory, checkpoint={"every_n_steps": 4, "keep_last": 9})
    go(run)
    assert steps(run) == [12, 8, 4]


def test_async_save_may_be_forbidden(directory: Path, beside: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "start_process", lambda *_: pytest.fail("a saver was started"))
    run = new_run(directory, checkpoint={"every_n_steps": 4, "keep_last": 9, "async_save": False})
    go(run)
    assert steps(run) == [12, 8, 4]


def test_both_ways_have_the_same_bytes(directory: Path, beside: None) -> None:
    runs = [
        new_run(
            directory / name / "save.r.00000", checkpoint={"every_n_steps": 4, "async_save": name == "beside"}
        )
        for name in ("beside", "inline")
    ]
    for run in runs:
        go(run)
    one, other = (run.checkpoints_dir / checkpoints.step_name(STEPS) for run in runs)
    assert [path.read_bytes() for path in sorted(one.iterdir()) if path.name != manifests.MANIFEST] == [
        path.read_bytes() for path in sorted(other.iterdir()) if path.name != manifests.MANIFEST
    ]


# --- asked for ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_beside", [False, True], ids=["inline", "beside"])
def test_a_step_that_is_asked_for_is_saved_itself(
    directory: Path, is_beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saves, "BESIDE_FROM_BYTES", 0 if is_beside else 1 << 30)
    run = new_run(directory, checkpoint={"keep_last": 2})
    pinned = (2, 3, 6)
    go(run, lambda loop: loop.save(pin=True) if loop.step in pinned else None)
    assert steps(run) == [12, 6, 3, 2]
    flags = [
        manifests.read_manifest(path).is_pinned for _, path in checkpoints.steps_on_disk(run.checkpoints_dir)
    ]
    assert flags == [False, True, True, True]


def test_a_pinned_save_that_was_refused_pins_the_next_one(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(directory, checkpoint={"every_n_steps": 5, "keep_last": 2})
    refused: list[Path] = []

    def once(operation: str, path: Path) -> None:
        if operation == "fsync" and path.name == "model.pth" and not refused:
            refused.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fsops, "probe", once)
    go(run, lambda loop: loop.save(pin=True) if loop.step == 2 else None)
    assert "step 2 could not be saved" in link(run).said("complaint")[0]["text"]
    found = {
        step: manifests.read_manifest(path).is_pinned
        for step, path in checkpoints.steps_on_disk(run.checkpoints_dir)
    }
    assert [step for step, is_pinned in found.items() if is_pinned] == [min(found)]


def test_the_last_step_is_pinned_after_it_was_saved(directory: Path) -> None:
    run = new_run(directory)
    loop = go_until_the_end(run)
    assert steps(run) == [STEPS]
    loop.save(pin=True)
    run.finish()
    ((_, newest),) = checkpoints.steps_on_disk(run.checkpoints_dir)
    assert manifests.read_manifest(newest).is_pinned
    assert find_latest(directory) == newest


def go_until_the_end(run: Run) -> Loop:
    loop = resumable(run, model=nn.Linear(2, 1), loader=DataLoader(TensorDataset(torch.ones(12, 2))))
    for _ in loop.batches(epochs=1):
        pass
    return loop


# --- a disk that refuses the last but one --------------------------------------------------------


def test_a_save_that_failed_does_not_keep_the_last_step_from_being_saved(
    directory: Path, beside: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What became of it is known only at the last boundary."""
    run = new_run(directory, checkpoint={"every_n_steps": 5, "keep_last": 50})
    refusal = Done("save", 0.1, 11, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere/model.pth"))
    real = saves.Saves.poll

    def poll(self: saves.Saves) -> Done | None:
        is_last = loops[-1].step == STEPS
        return refusals.pop() if is_last and refusals else real(self)

    refusals, loops = [refusal], list[Loop]()
    monkeypatch.setattr(saves.Saves, "poll", poll)
    go(run, loops.append)
    assert steps(run)[0] == STEPS
    (text,) = [said["text"] for said in link(run).said("complaint")]
    assert "checkpoint of step 11 could not be saved" in text
    assert "'/somewhere/model.pth'" in text
    assert "Make room on that disk." in text


def test_a_disk_that_refuses_the_last_step_is_told_with_what_to_do(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(directory)

    def full(operation: str, path: Path) -> None:
        if operation == "fsync" and path.name == "model.pth":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(fsops, "probe", full)
    with pytest.raises(
        CheckpointError, match="the checkpoint of the last step, 12, could not be saved"
    ) as caught:
        go(run)
    assert "model.pth" in str(caught.value)
    assert "Make room on that disk. Then run it again" in str(caught.value)


def test_the_end_of_each_epoch_is_saved(directory: Path, beside: None) -> None:
    """Where a save was in flight then, one follows as soon as there is room."""
    run = new_run(directory, checkpoint={"at_epoch_end": True, "keep_last": 50})

    def each(loop: Loop) -> None:
        if loop.step == 6:  # room was asked for at step 4; the save of step 6 is held up
            loop._saves.wait()
            os.kill(loop._saves._saver._process.pid, signal.SIGSTOP)  # type: ignore[union-attr]
        elif loop.step == 10:
            os.kill(loop._saves._saver._process.pid, signal.SIGCONT)  # type: ignore[union-attr]
            loop._saves.wait()

    go(run, each)
    assert steps(run) == [12, 10, 6]


# --- the best ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("direction", "best"), [("minimize", 3), ("maximize", 5)])
def test_the_best_by_the_metric_are_kept(directory: Path, direction: str, best: int) -> None:
    values = {3: 0.1, 4: float("nan"), 5: 0.9, 6: float("inf")}
    run = new_run(
        directory, checkpoint={"every_n_steps": 1, "keep_last": 2, "keep_best": 1}, direction=direction
    )
    loop = go(run, lambda loop: loop.report(loss=values.get(loop.step, 0.5)))
    assert steps(run) == [12, 11, best]
    assert loop.best_value == (0.1 if direction == "minimize" else float("inf"))


def test_every_kth_is_kept(directory: Path) -> None:
    run = new_run(directory, checkpoint={"every_n_steps": 1, "keep_last": 2, "keep_every_n_steps": 4})
    go(run)
    assert steps(run) == [12, 11, 8, 4]


# --- for other tools -----------------------------------------------------------------------------


@pytest.mark.parametrize("is_beside", [False, True], ids=["inline", "beside"])
def test_weights_are_exported(directory: Path, is_beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saves, "BESIDE_FROM_BYTES", 0 if is_beside else 1 << 30)
    run = new_run(
        directory, checkpoint={"every_n_steps": 5, "export_weights": "out/{stage}_{lr}_{trial}.pth"}
    )
    go(run)
    exported = directory / "out" / "train_0.1_0.pth"
    weights = torch.load(exported, weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {"weight": (3, 2), "bias": (3,)}
    assert (
        exported.read_bytes() == (run.checkpoints_dir / checkpoints.step_name(12) / "model.pth").read_bytes()
    )
    assert os.listdir(directory / "out") == [exported.name]


def test_an_export_is_there_whenever_its_checkpoint_is(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two, a run that was done would never make up for it."""
    run = new_run(directory, checkpoint={"export_weights": "weights.pth"})
    seen: list[str] = []
    monkeypatch.setattr(fsops, "probe", lambda operation, path: seen.append(f"{operation} {path.name}"))
    go(run)
    assert seen.index("rename weights.pth") < seen.index("rename step_00000012")


def test_an_export_that_is_refused_costs_no_checkpoint(directory: Path) -> None:
    run = new_run(directory, checkpoint={"export_weights": "/proc/nowhere/x.pth"})
    go(run)
    assert steps(run) == [12]
    assert "weights could not be exported to /proc/nowhere/x.pth" in link(run).said("complaint")[0]["text"]


def test_a_pattern_that_cannot_be_filled_in_is_said_before_the_first_step(directory: Path) -> None:
    run = new_run(directory, checkpoint={"export_weights": "out/{hidden}.pth"})
    with pytest.raises(ConfigError, match="'hidden'") as caught:
        go(run, lambda loop: pytest.fail("a step was trained"))
    assert caught.value.exit_code == 78
    assert "It may name lr, run_id, stage, trial." in str(caught.value)


# --- what cannot be used -------------------------------------------------------------------------


def spoil(run: Run, step: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Change state.json of a checkpoint, as another version of us might have written it."""
    old = run.checkpoints_dir / checkpoints.step_name(step)
    manifest, contents = checkpoints.validate(old, run_id=run.run_id, keep=True)
    state = json.loads(contents["state.json"].data)
    change(state)
    draft = checkpoints.Draft(
        run.checkpoints_dir,
        run.run_id,
        step,
        manifest.lease_epoch,
        manifest.lineage,
        None,
        manifest.config_digest,
    )
    for name, content in contents.items():
        draft.add_bytes(name, json.dumps(state).encode() if name == "state.json" else content.data)
    checkpoints.commit(draft, check_lease=lambda: None, record=lambda _: None, committed_at="now")


def test_another_torch_is_refused_and_the_older_one_used(directory: Path) -> None:
    run = new_run(directory, checkpoint={"every_n_steps": 4})
    go(run)
    spoil(run, 12, lambda state: state["metadata"].update(torch="1.13.1"))
    again = new_run(directory, checkpoint={"every_n_steps": 4})
    assert go(again).step == STEPS
    assert again.start_step == 8
    assert link(again).said("refused")[0]["reason"] == (
        f"it was made with torch 1.13.1, this is torch {torch.__version__}"
    )


@pytest.mark.parametrize("where", ["reading", "unpickling", "applying"])
@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory_for_one_leads_to_the_next(
    directory: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    go(new_run(directory, checkpoint={"every_n_steps": 4}))
    failing = {
        "reading": (checkpoints, "_read_all"),
        "unpickling": (torch, "load"),
        "applying": (torch.optim.Adam, "load_state_dict"),
    }[where]
    real, left = getattr(*failing), [1]

    def once(*args: Any, **more: Any) -> Any:
        if left:
            left.pop()
            raise error
        return real(*args, **more)

    run = new_run(directory, checkpoint={"every_n_steps": 4})
    monkeypatch.setattr(*failing, once)
    go(run)
    assert run.start_step == 8
    assert [said["reason"] for said in link(run).said("refused")] == [
        "there was not enough memory to load it"
    ]


def test_another_architecture_of_a_part_is_named_and_nothing_changed(directory: Path) -> None:
    def build(width: int) -> tuple[nn.Module, nn.Module, Any]:
        torch.manual_seed(width)
        loader = DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2)
        return nn.Linear(2, 3), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, width)), loader

    model, teacher, loader = build(3)
    run = new_run(directory)
    for _ in resumable(run, model=model, teacher=teacher, loader=loader).batches(epochs=1):
        pass
    run.finish()
    model, teacher, loader = build(5)
    before = [tensor.clone() for part in (model, teacher) for tensor in part.state_dict().values()]
    run = new_run(directory)
    with pytest.raises(
        SweeperError,
        match=r"parameter 1.weight has shape \(3, 2\) in the checkpoint, \(5, 2\) in the teacher",
    ):
        resumable(run, model=model, teacher=teacher, loader=loader)
    after = [tensor for part in (model, teacher) for tensor in part.state_dict().values()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


class Early:
    """A part whose state is none at first, and later whatever it is given."""

    best: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]


def go_with(run: Run, early: Early, each: Callable[[Loop], None] = lambda loop: None) -> Loop:
    loader = DataLoader(TensorDataset(torch.ones(24, 2)), batch_size=2)
    loop = resumable(run, model=nn.Linear(2, 1), early=early, loader=loader)
    for _ in loop.batches(epochs=1):
        each(loop)
    run.finish()
    return loop


def test_a_state_that_becomes_one_that_could_not_be_restored_is_refused(directory: Path) -> None:
    run, early = new_run(directory, checkpoint={"every_n_steps": 1, "keep_last": 50}), Early()

    def each(loop: Loop) -> None:
        early.best = {3: 0.5, 5: np.float64(0.25)}.get(loop.step, early.best)

    with pytest.raises(
        ConfigError, match=r"could never be restored: optimizer.pt holds early.best, a numpy.float64"
    ) as caught:
        go_with(run, early, each)
    assert "\x1b" not in str(caught.value)
    assert steps(run) == [4, 3, 2, 1], "nothing is saved that could not be read"
    again = Early()
    assert go_with(new_run(directory), again).step == STEPS
    assert again.best == 0.5


def test_what_was_saved_and_cannot_be_read_is_left_alone(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are good: the training must change, and no fresh run takes its place."""
    run, early = new_run(directory, checkpoint={"every_n_steps": 4}), Early()
    early.best = np.float64(0.25)
    with monkeypatch.context() as patch:
        patch.setattr("sweeper.torch.loop.check_restorable", lambda states: None)
        go_with(run, early)
    before = steps(run)
    again = new_run(directory)
    with pytest.raises(
        ConfigError, match=r"step 12: optimizer.pt does not hold plain tensors: Unsupported"
    ) as caught:
        go_with(again, Early())
    assert caught.value.exit_code == 78
    assert "\x1b" not in str(caught.value)
    assert steps(again) == before


def test_a_secret_of_the_training_is_not_written(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.yaml keeps an interpolation as its text, and so does a checkpoint."""
    monkeypatch.setenv("HF_TOKEN", "canary-of-a-secret")
    run = new_run(directory, checkpoint={"every_n_steps": 3})
    run.config = OmegaConf.create({"trainer": {"token": "${oc.env:HF_TOKEN}"}})
    go(run)
    written = [path for path in directory.rglob("*") if path.is_file()]
    assert any("oc.env:HF_TOKEN" in path.read_text() for path in written if path.name == "state.json")
    assert not [path for path in written if b"canary-of-a-secret" in path.read_bytes()]
