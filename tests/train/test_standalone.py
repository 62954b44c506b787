"""open_run: a script of one's own, killed, stopped, started twice, changed and moved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crash import mini
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sweeper import checkpoints, processes, rundir
from sweeper.errors import EXIT_RELEASED, ConfigError, SweeperError
from sweeper.report.verify import latest
from sweeper.torch import find_latest, open_run, resumable, saves
from sweeper.torch.standalone import PreemptedExit
from sweeper.trainer import server
from sweeper.trainer.main import prepare_process

STEPS = 12
FILES = ("model.pth", "optimizer.pt", "rng_state.pt", "state.json")
Each = Callable[[Any], None]


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    server.warm_up()  # or each forked script would import for two seconds


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(
        saves, "BESIDE_FROM_S", float("inf")
    )  # the machine may be busy: steps are counted here
    with mini.fast_dir() as path:
        yield path


def script(
    directory: Path, each: Each = lambda loop: None, *, num_workers: int = 0, width: int = 4, **more: Any
) -> None:
    """What a user would write, with a report in each step."""
    with open_run(directory, **{"seed": 5, "every_s": None, "every_n_steps": 5, **more}) as run:
        model = nn.Sequential(nn.Linear(2, width), nn.Dropout(0.5), nn.Linear(width, 1))
        optimizer = torch.optim.AdamW(model.parameters())
        data = TensorDataset(torch.arange(16.0).reshape(8, 2) / 16)
        loader = DataLoader(data, batch_size=2, shuffle=True, num_workers=num_workers)
        loop = resumable(run, model=model, optimizer=optimizer, loader=loader)
        for (inputs,) in loop.batches(epochs=3):
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            optimizer.step()
            loop.report(loss=loss)
            each(loop)


def forked(directory: Path, each: Each = lambda loop: None, **more: Any) -> int:
    """Run the script in a process of its own; returns its wait status."""

    def run() -> int:
        torch.set_num_threads(1)
        try:
            script(directory, each, **more)
        except SystemExit as end:
            return int(end.code or 0)
        except SweeperError as error:
            print(error)
            return error.exit_code
        return 0

    return mini.forked(run, log=directory.parent / "log.txt")


def printed(directory: Path) -> str:
    return (directory.parent / "log.txt").read_text()


def end_of(directory: Path) -> list[bytes]:
    step = find_latest(directory)
    assert step is not None
    assert step.name == checkpoints.step_name(STEPS)
    return [*((step / name).read_bytes() for name in FILES), (directory / rundir.METRICS_FILE).read_bytes()]


def die(loop: Any) -> None:
    if loop.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def whole(base: Path) -> list[bytes]:
    assert forked(base / "whole") == 0
    assert "no checkpoint found, starting fresh" in printed(base / "whole")
    return end_of(base / "whole")


# --- interrupted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_killed_and_started_again(base: Path, whole: list[bytes], num_workers: int) -> None:
    """At once: loader processes that outlive it by seconds do not keep the directory."""
    directory = base / "mine"
    assert mini.was_killed(forked(directory, die, num_workers=num_workers))
    assert forked(directory, num_workers=num_workers) == 0, printed(directory)
    assert "mine: going on from step 5" in printed(directory)
    assert end_of(directory) == whole


def test_killed_while_a_saver_works(base: Path, whole: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saves, "BESIDE_FROM_BYTES", 0)

    def each(loop: Any) -> None:
        if loop.step == 6:
            loop._saves.wait()
            os.kill(loop._saves._saver._process.pid, signal.SIGSTOP)
        if loop.step == 7:
            assert loop._saves.is_busy
            die(loop)

    assert mini.was_killed(forked(base / "mine", each))
    assert forked(base / "mine") == 0, printed(base / "mine")
    assert end_of(base / "mine") == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_it_at_a_checkpoint(base: Path, whole: list[bytes], number: int) -> None:
    def each(loop: Any) -> None:
        if loop.step == 7:
            os.kill(os.getpid(), number)

    status = forked(base / "mine", each)
    assert os.waitstatus_to_exitcode(status) == EXIT_RELEASED == 75
    assert f"stopped at a checkpoint (got {signal.Signals(number).name}); run it again" in printed(
        base / "mine"
    )
    assert forked(base / "mine") == 0
    assert "going on from step 7" in printed(base / "mine")
    assert end_of(base / "mine") == whole


def test_signals_to_loader_processes_and_saver_are_no_end(
    base: Path, whole: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal and SLURM send theirs to all processes of a job."""
    monkeypatch.setattr(saves, "BESIDE_FROM_BYTES", 0)

    def each(loop: Any) -> None:
        if loop.step in (2, 7):
            for pid in processes.children():
                for number in processes.NOT_FOR_CHILDREN:
                    os.kill(pid, number)

    assert forked(base / "mine", each, num_workers=2) == 0, printed(base / "mine")
    assert end_of(base / "mine") == whole


def test_the_stop_passes_except_exception(base: Path) -> None:
    def each(loop: Any) -> None:
        loop._run._link.stop_reason = "now"

    with pytest.raises(PreemptedExit) as caught:
        script(base / "mine", each, signals=())
    assert caught.value.code == 75
    assert not isinstance(caught.value, Exception)
    script(base / "mine", signals=())  # the lock is free again, in this very process


def test_a_run_that_is_done_is_done(base: Path, whole: list[bytes]) -> None:
    assert forked(base / "whole", lambda loop: os._exit(3)) == 0
    assert end_of(base / "whole") == whole


# --- two at once -----------------------------------------------------------------------------------


def test_a_second_process_is_refused(base: Path) -> None:
    with open_run(base / "mine", signals=()):
        status = forked(base / "mine")
        assert os.waitstatus_to_exitcode(status) == 1
        assert "mine is open in another process. Wait for it, or use another directory." in printed(
            base / "mine"
        )
        with pytest.raises(SweeperError, match="is open in another process"):
            open_run(base / "mine", signals=())
    assert forked(base / "mine") == 0


def test_an_error_gives_the_directory_back_and_ends_the_saver(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saves, "BESIDE_FROM_BYTES", 0)
    savers: list[int] = []

    def each(loop: Any) -> None:
        if loop._saves._saver is not None:
            savers.append(loop._saves._saver._process.pid)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        script(base / "mine", each, signals=())
    assert not Path(f"/proc/{savers[0]}").exists()
    script(base / "mine", signals=())


def test_signals_are_given_back(base: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with open_run(base / "mine"):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    with pytest.raises(ZeroDivisionError), open_run(base / "mine"):
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_signals_cannot_be_taken_in_another_thread(base: Path) -> None:
    raised: list[Exception] = []

    def use() -> None:
        try:
            open_run(base / "mine")
        except ConfigError as error:
            raised.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert "Call it in the main thread, or with signals=()." in str(raised[0])
    script(base / "mine", signals=())


def test_a_rank_of_several_is_refused_by_name(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"this is one of 4 ranks.*launcher.ranks_per_worker=4"):
        open_run(base / "mine")


def test_a_directory_that_cannot_be_one(base: Path) -> None:
    (base / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"file/mine cannot be used as the directory of a run: .*Not a dir"
    ) as caught:
        open_run(base / "file" / "mine")
    assert "Give open_run a directory that can be written" in str(caught.value)
    with pytest.raises(ConfigError, match=r"cannot be used as the directory of a run"):
        open_run("/proc/mine")


# --- changed ---------------------------------------------------------------------------------------


def test_another_configuration_is_named_and_the_bits_stay(base: Path) -> None:
    script(base / "mine", signals=(), width=32, config={"width": 32})
    before = find_latest(base / "mine")
    assert before is not None
    with pytest.raises(
        SweeperError, match="step 12: the checkpoint has width 32, the configuration has 64"
    ) as caught:
        script(base / "mine", signals=(), width=64, config={"width": 64})
    assert str(caught.value).endswith("Put the script back as it was, or give it another directory.")
    assert find_latest(base / "mine") == before, "it can be put back"
    script(base / "mine", signals=(), width=32, config={"width": 32})


def test_a_damaged_checkpoint_leads_to_the_one_before(base: Path, whole: list[bytes]) -> None:
    mini.damage(base / "whole" / "checkpoints" / "step_00000012")
    assert find_latest(base / "whole") == base / "whole" / "checkpoints" / "step_00000010"
    assert forked(base / "whole") == 0
    assert "checkpoint step 12 refused: model.pth has the wrong digest" in printed(base / "whole")
    assert end_of(base / "whole") == whole


def test_a_directory_that_was_renamed_goes_on(base: Path, whole: list[bytes]) -> None:
    mini.was_killed(forked(base / "before", die))
    (base / "before").rename(base / "after")
    assert forked(base / "after") == 0
    assert "before: going on from step 5" in printed(base / "after")
    assert end_of(base / "after") == whole


def test_values_that_json_does_not_know_are_configuration_all_the_same(base: Path) -> None:
    config = {
        "data": Path("/data"),
        "sizes": (1, 2),
        "nested": {"lr": 0.1},
        "none": None,
        "rate": np.float32(0.5),
    }
    for _ in range(2):
        script(base / "mine", signals=(), config=config)


@pytest.mark.parametrize(
    "setting",
    [
        {"every_s": "abc"}, {"every_s": -1}, {"every_n_steps": 0}, {"every_n_steps": "10"}, {"keep_last": 1},
        {"keep_best": -1}, {"keep_every_n_steps": -3}, {"export_weights": 5}, {"interval": "Auto"}, {"interval": 30},
        {"async_save": "no"}, {"at_epoch_end": "no"}, {"direction": "min"}, {"seed": "x"}, {"metric": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_that_cannot_be_used(base: Path, setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ConfigError) as caught:
        open_run(base / "mine", **setting)
    assert f"{name}={value!r} cannot be used. Use " in str(caught.value)
    assert not (base / "mine").exists()


def test_no_such_setting(base: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"there is no setting keep_lots\. There are every_n_steps, every_s,"
    ):
        open_run(base / "mine", keep_lots=3)
    with pytest.raises(
        ConfigError, match=r"names .hidden., which is not there\. It may name run_id, stage, trial, width"
    ):
        open_run(base / "mine", config={"width": 3}, export_weights="{hidden}.pth")


def test_a_metric_that_is_no_number_is_no_best(base: Path) -> None:
    loops: list[Any] = []

    def each(loop: Any) -> None:
        loop.report(accuracy=[0.5, float("nan"), 0.7][loop.step % 3])
        loops.append(loop)

    script(
        base / "mine", each, signals=(), metric="accuracy", direction="maximize", keep_best=1, every_n_steps=1
    )
    assert loops[-1].best_value == 0.7
    kept = [step for step, _ in checkpoints.steps_on_disk(base / "mine" / "checkpoints")]
    assert kept == [12, 11, 10, 2]


# --- the newest checkpoint ---------------------------------------------------------------------------


def test_find_latest(base: Path, whole: list[bytes], capsys: pytest.CaptureFixture[str]) -> None:
    root = base / "whole" / "checkpoints"
    assert find_latest(base / "nowhere") is None
    assert find_latest(base / "whole") == find_latest(root) == root / "step_00000012"
    assert latest(str(base / "whole")) == 0
    assert capsys.readouterr().out == f"{root / 'step_00000012'}\n"


# --- a script as it is --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_script_from_the_shell(base: Path) -> None:
    """With a big state, so that the real saver works; twice terminated, once killed."""
    path = base / "script.py"
    path.write_text(SCRIPT)
    run_dir = base / "out" / "mine"
    whole = subprocess.run([sys.executable, path, base / "whole", "0"], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    codes = [
        subprocess.run([sys.executable, path, run_dir, how], capture_output=True, text=True).returncode
        for how in ("9", "15", "15", "0")
    ]
    assert codes == [-9, 75, 75, 0]
    ends = [find_latest(directory) for directory in (base / "whole", run_dir)]
    assert (
        [(end / name).read_bytes() for end in ends[:1] for name in FILES]
        == [  # type: ignore[operator]
            (end / name).read_bytes()
            for end in ends[1:]
            for name in FILES  # type: ignore[operator]
        ]
    )


SCRIPT = """
import os, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from sweeper.torch import open_run, resumable

torch.set_num_threads(1)
with open_run(sys.argv[1], seed=1, every_n_steps=3) as run:
    model = nn.Linear(1200, 1200)
    optimizer = torch.optim.Adam(model.parameters())
    loader = DataLoader(TensorDataset(torch.ones(40, 1200)), batch_size=2, shuffle=True)
    loop = resumable(run, model=model, optimizer=optimizer, loader=loader)
    first = loop.step
    for (x,) in loop.batches(epochs=1):
        optimizer.zero_grad()
        model(x + torch.rand_like(x)).square().mean().backward()
        optimizer.step()
        if loop.step == first + 6 and sys.argv[2] != "0":
            os.kill(os.getpid(), int(sys.argv[2]))
"""


def test_generators_are_seeded(base: Path) -> None:
    drawn = []
    for name in ("one", "other"):
        with open_run(base / name, seed=11, signals=()) as run:
            drawn.append(torch.rand(3).tolist())
            prepare_process(run.spec)
            assert torch.rand(3).tolist() == drawn[-1]
    assert drawn[0] == drawn[1]
