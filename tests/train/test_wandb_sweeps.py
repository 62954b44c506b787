"""Sweeps as a user starts them, with the real W&B client against the loopback server, hit by everything."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from wandb_server import API_KEY, WandbServer

from sweeper.tracking import read_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
LIMIT_S = 60.0
NUM_KILLS, NUM_TERMS, SEED = 20, 10, 20261125
STEPS_BETWEEN = 6
CANARY = "CANARY" + "0123456789abcdef" * 2
WHO = ("launch", "worker", "sweeper.tracking.server", "wandb-core", "sweeper.trainer.server")


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"in {LIMIT_S:.0f} s it did not happen that {what}"
        time.sleep(0.02)
    return answer


@dataclass
class Sweep:
    """One sweep in a directory of its own."""

    place: Path
    server: WandbServer | None
    more: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        if not (self.place / "gate").exists():
            self.open_gate(1 << 30)

    @property
    def data_dir(self) -> Path:
        return self.place / "outputs"

    @property
    def environment(self) -> dict[str, str]:
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SWEEPER_", "WANDB_")) and not key.lower().endswith("_proxy")
        }
        url = {"WANDB_BASE_URL": self.server.url, "WANDB_API_KEY": API_KEY} if self.server else {}
        return {
            **kept, **url, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
            "GATE": str(self.place / "gate"), "HOME": str(self.place), "OMP_NUM_THREADS": "1",
            "SWEEPER_DATA_DIR": str(self.data_dir), "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1", **self.more,
        }  # fmt: skip

    def open_gate(self, step: int) -> None:
        """Let the training go on to this step."""
        (self.place / "gate.new").write_text(str(step))
        (self.place / "gate.new").replace(self.place / "gate")

    def start(self, *overrides: str) -> subprocess.Popen[bytes]:
        mode = [] if self.server else ["tracking.wandb.mode=disabled"]
        command = [
            sys.executable, "-m", "sweeper", "launch", "+sweep=simple", "sweep.n_trials=1", "sampler=random",
            "launcher.n_workers=1", "trainer._target_=gated_trainer.train", "checkpoint.every_n_steps=5",
            "checkpoint.every_s=null", "tracking.tensorboard.enabled=false", "retry.max_lost=100", *mode, *overrides,
        ]  # fmt: skip
        with open(self.place / "log", "ab") as log:
            return subprocess.Popen(
                command, env=self.environment, cwd=self.place, stdout=log, stderr=log, start_new_session=True
            )

    def start_sync(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "sweeper", "sync", "simple"]
        with open(self.place / "log", "ab") as log:
            return subprocess.Popen(command, env=self.environment, cwd=self.place, stdout=log, stderr=log)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sweeper", *arguments], env=self.environment, cwd=self.place, capture_output=True, text=True
        )  # fmt: skip

    def log(self) -> str:
        return (self.place / "log").read_text()

    def run_dirs(self) -> list[Path]:
        return sorted(self.data_dir.glob("sweep/simple/runs/*.r.*"))

    def rows(self, number: int = 0) -> list[dict[str, Any]]:
        return list(read_rows(self.run_dirs()[number] / "metrics.jsonl")) if self.run_dirs() else []

    def step(self) -> int:
        rows = self.rows()
        return int(rows[-1]["step"]) if rows else 0

    def wandb_run(self, number: int = 0) -> Any:
        assert self.server is not None
        identity = json.loads((self.run_dirs()[number] / "run.json").read_text())
        return self.server.runs[identity["wandb_run_id"]]

    def processes(self) -> dict[int, str]:
        """pid → which of `WHO`, of everything that belongs to this sweep."""
        mark, found = f"GATE={self.place / 'gate'}".encode(), {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                        names = [name for name in WHO if name in line]
                        if names:
                            found[int(entry.name)] = names[0]
        return found


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    for place in tmp_path.iterdir():
        for pid in Sweep(place, None).processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def same(history: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """Each global step is there exactly once, in order, with the values of the log."""
    assert [row["global_step"] for row in history] == [row["step"] for row in rows]
    assert [row["_step"] for row in history] == [row["step"] for row in rows]
    for there, row in zip(history, rows, strict=True):
        assert {key: there[key] for key in row if key != "step"} == {
            k: v for k, v in row.items() if k != "step"
        }


def test_a_run_hit_by_kills_and_terms_is_in_wandb_as_if_undisturbed(
    tmp_path: Path, server: WandbServer
) -> None:
    """20 SIGKILLs to random processes, 10 SIGTERMs to random process groups, W&B's service among them."""
    last = (NUM_KILLS + NUM_TERMS + 1) * STEPS_BETWEEN
    epochs = f"trainer.epochs={-(-last // 10)}"
    calm = Sweep(tmp_path / "calm", None)
    assert calm.start(epochs).wait(timeout=LIMIT_S) == 0, calm.log()

    storm, chance = Sweep(tmp_path / "storm", server), random.Random(SEED)
    storm.open_gate(STEPS_BETWEEN)
    launcher = storm.start(epochs)
    events = [signal.SIGKILL] * NUM_KILLS + [signal.SIGTERM] * NUM_TERMS
    chance.shuffle(events)
    hit: set[str] = set()
    for number, what in enumerate(events, start=1):
        storm.open_gate(number * STEPS_BETWEEN)

        def is_there(step: int = (number - 1) * STEPS_BETWEEN + chance.randint(1, STEPS_BETWEEN)) -> bool:
            nonlocal launcher
            if launcher.poll() is not None:
                assert launcher.poll() in (75, -signal.SIGKILL, -signal.SIGTERM), storm.log()[-4000:]
                launcher = storm.start(epochs)
            return storm.step() >= step

        until(is_there, f"the training is there before blow {number}")
        pid, name = chance.choice(sorted(storm.processes().items()))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, what) if what is signal.SIGKILL else os.killpg(os.getpgid(pid), what)
            hit.add(f"{what.name} {name}")
    storm.open_gate(1 << 30)
    while (code := launcher.wait(timeout=LIMIT_S)) in (75, -signal.SIGKILL, -signal.SIGTERM):
        launcher = storm.start(epochs)
    assert code == 0, storm.log()[-4000:]

    assert len(hit) >= 6, hit
    assert storm.rows() == calm.rows()
    run = storm.wandb_run()
    same(run.history, calm.rows())
    assert server.violations == {}
    assert (run.state, list(server.runs)) == ("finished", [run.name])
    assert run.summary["sweeper/attempts"] >= 5
    assert run.summary["train_loss"] == calm.rows()[-1]["train_loss"]
    assert run.summary["sweeper/steps_recovered"] > 0


def test_a_server_that_is_away_all_the_time_gets_everything_by_sync(
    tmp_path: Path, server: WandbServer
) -> None:
    sweep = Sweep(tmp_path / "away", server)
    server.go_away()
    launcher = sweep.start(
        "sweep.n_trials=2", "trainer.epochs=3", "tracking.wandb.finish_timeout=1", "+tracking.wandb.init_timeout=1",
    )  # fmt: skip
    assert launcher.wait(timeout=LIMIT_S) == 0, sweep.log()
    said = sweep.run("sync", "simple")
    assert (said.returncode, said.stdout) == (1, "")
    assert "W&B does not answer" in said.stderr

    server.come_back()
    said = sweep.run("sync", "simple")
    assert said.returncode == 0, said.stdout + said.stderr
    assert said.stdout.splitlines() == [
        f"simple.r.0000{number}: sent up to step 30, completed (W&B did not have it)" for number in range(2)
    ]
    for number in range(2):
        run = sweep.wandb_run(number)
        same(run.history, sweep.rows(number))
        assert run.state == "finished"
        assert run.summary["sweeper/goodput"] == 1.0
    assert server.violations == {}
    again = sweep.run("sync")
    assert again.stdout.splitlines() == [f"simple.r.0000{number}: W&B has it all" for number in range(2)]

    others = [sweep.start_sync() for _ in range(3)]
    codes = sorted(process.wait(timeout=LIMIT_S) for process in others)
    assert codes[0] == 0
    assert server.violations == {}


def test_must_without_the_run_ends_the_worker_and_loses_nothing(tmp_path: Path, server: WandbServer) -> None:
    sweep = Sweep(tmp_path / "must", server)
    sweep.open_gate(20)
    launcher = sweep.start("trainer.epochs=500")
    until(lambda: sweep.step() >= 20, "20 steps are trained")
    launcher.send_signal(signal.SIGTERM)
    until(lambda: "stopping" in sweep.log(), "it stops")
    sweep.open_gate(22)
    assert launcher.wait(timeout=LIMIT_S) == 75
    name = sweep.wandb_run().name
    with server.changed:
        del server.runs[name]
    launcher = sweep.start("trainer.epochs=500", "tracking.wandb.resume=must")
    sweep.open_gate(30)
    until(lambda: sweep.step() >= 30, "the training goes on meanwhile")
    until(lambda: server.operations.count("RunResumeStatus") >= 2, "the client asks")
    for step in range(31, 5000):  # it stops at a step boundary
        sweep.open_gate(step)
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(timeout=0.05)
            break
    assert launcher.returncode == 78, sweep.log()
    assert "Check the run's id, the key, and its access to project simple" in sweep.log()
    assert json.loads(sweep.run("status", "simple.r.00000", "--json").stdout)["state"] == "interrupted"

    sweep.open_gate(1 << 30)
    assert sweep.start("trainer.epochs=500").wait(timeout=LIMIT_S) == 0, sweep.log()
    same(sweep.wandb_run().history, sweep.rows())


def weights(sweep: Sweep) -> list[bytes]:
    """The final weights of each run."""
    found = (max(path.glob("checkpoints/step_*")) / "model.pth" for path in sweep.run_dirs())
    return [path.read_bytes() for path in found]


def test_a_run_goes_on_on_a_machine_that_has_nothing_but_wandb(tmp_path: Path, server: WandbServer) -> None:
    """Machine A trains trials 0 and half of 1, and dies. B fetches one run, C the whole sweep."""
    calm = Sweep(tmp_path / "calm", None)
    assert calm.start("sweep.n_trials=3", "trainer.epochs=5").wait(timeout=LIMIT_S) == 0, calm.log()

    common = (
        "sweep.n_trials=3", "trainer.epochs=5", "tracking.wandb.upload_checkpoints=last",
        "+trainer.token=${oc.env:HF_TOKEN}", "+tracking.wandb.group=mine",
    )  # fmt: skip
    there = Sweep(tmp_path / "a", server, more={"GATED_FROM": "1", "HF_TOKEN": CANARY})
    there.open_gate(25)
    there.start(*common)
    until(lambda: len(there.run_dirs()) == 2 and len(there.rows(1)) == 25, "the second trial trains")
    name = json.loads((there.run_dirs()[1] / "run.json").read_text())["wandb_run_id"]
    until(lambda: server.versions(f"{name}-checkpoint"), "a checkpoint is in W&B")
    for pid in there.processes():
        os.kill(pid, signal.SIGKILL)
    until(lambda: not there.processes(), "machine A is dead")
    there.data_dir.rename(tmp_path / "burnt")

    server.runs[name].display_name = "my favourite"  # people may rename it
    alone = Sweep(tmp_path / "b", server, more={"HF_TOKEN": CANARY})
    fetching = (*common, f"resume_from_wandb={name}", "tracking.wandb.resume=must")
    alone.open_gate(40)
    interrupted = alone.start(*fetching)
    until(lambda: alone.run_dirs() and alone.step() == 40, "machine B trains")
    os.killpg(interrupted.pid, signal.SIGKILL)
    until(lambda: interrupted.poll() is not None, "its launcher is gone")
    alone.open_gate(1 << 30)
    launched = alone.start(*fetching)
    assert launched.wait(timeout=LIMIT_S) == 0, alone.log()
    assert "[W&B] simple.r.00001: fetched (step" in alone.log()
    assert [path.name for path in alone.run_dirs()] == ["simple.r.00001"]
    assert weights(alone) == weights(calm)[1:2]
    assert "no checkpoint found" not in "".join(p.read_text() for p in alone.data_dir.rglob("attempt_*.log"))
    same(server.runs[name].history, calm.rows(1))
    assert (server.runs[name].state, server.violations, len(server.runs)) == ("finished", {}, 2)

    whole = Sweep(tmp_path / "c", server, more={"HF_TOKEN": CANARY})
    assert whole.start(*common, "resume_from_wandb=simple").wait(timeout=LIMIT_S) == 0, whole.log()
    results = [json.loads((path / "result.json").read_text())["value"] for path in whole.run_dirs()]
    assert results == [json.loads((path / "result.json").read_text())["value"] for path in calm.run_dirs()]
    assert len(server.runs) == 3
    assert weights(whole) == weights(calm)
    assert server.violations == {}

    secrets = (CANARY.encode(), API_KEY.encode())
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    uploaded = [file.path for file in server.backend.blobs.values() if file.is_there]
    assert len(uploaded) > 10
    assert [path for path in (*written, *uploaded) if any(s in path.read_bytes() for s in secrets)] == []
    assert CANARY not in json.dumps(server.state(), default=str)


def test_a_key_that_is_revoked_in_the_middle_is_told_and_costs_no_row(
    tmp_path: Path, server: WandbServer
) -> None:
    sweep = Sweep(tmp_path / "revoked", server)
    sweep.open_gate(20)
    launcher = sweep.start("trainer.epochs=5", "tracking.wandb.finish_timeout=3")
    until(lambda: server.runs and sweep.wandb_run().steps[-1:] == [19], "rows come")
    server.revoke()
    sweep.open_gate(1 << 30)
    assert launcher.wait(timeout=LIMIT_S) == 0, sweep.log()
    assert "`sweeper sync` sends" in sweep.log()
    server.accept()
    said = sweep.run("sync", "simple.r.00000")
    assert said.returncode == 0, said.stdout + said.stderr
    same(sweep.wandb_run().history, sweep.rows())
    assert server.violations == {}


def test_what_wandb_has_is_hostile_or_damaged(tmp_path: Path, server: WandbServer) -> None:
    """A damaged checkpoint is left out for the one before; names that lead elsewhere are refused; here is kept."""
    there = Sweep(tmp_path / "a", server)
    overrides = ("trainer.epochs=3", "tracking.wandb.upload_checkpoints=all")
    there.open_gate(20)
    launcher = there.start(*overrides)
    name = until(lambda: next(iter(server.runs), None), "W&B knows the run")
    until(lambda: len(server.versions(f"{name}-checkpoint")) >= 2, "two checkpoints are in W&B")
    os.killpg(launcher.pid, signal.SIGKILL)
    for pid in there.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not there.processes(), "machine A is dead")
    *_, before, newest = server.versions(f"{name}-checkpoint")
    weights = next(file for path, file in newest.files.items() if path.endswith("model.pth"))
    data = bytearray(weights.path.read_bytes())
    data[100] ^= 1
    weights.path.write_bytes(data)

    fresh = Sweep(tmp_path / "b", server)
    assert fresh.start(*overrides, f"resume_from_wandb={name}").wait(timeout=LIMIT_S) == 0, fresh.log()
    step = before.metadata["step"]
    assert f"going on from step {step}" in fresh.log()
    assert f"step_{newest.metadata['step']:08d}" in fresh.log()
    same(server.runs[name].history, fresh.rows())

    # Once more: what is here is as far. On A, it is not, and stays unless that is asked for.
    again = fresh.start(*overrides, "resume_from_wandb=simple")
    assert again.wait(timeout=LIMIT_S) == 0
    assert "kept as it is here (finished)" in fresh.log()
    (run_dir,) = there.run_dirs()
    marker = run_dir / "mine"
    marker.write_text("")
    there.data_dir.joinpath("sweeper.db").unlink()
    there.open_gate(1 << 30)
    refused = there.start(*overrides, "resume_from_wandb=simple.r.00000")
    assert refused.wait(timeout=LIMIT_S) == 78, there.log()
    assert "resume.overwrite=true" in there.log()
    assert marker.exists()
    taken = there.start(*overrides, "resume_from_wandb=simple.r.00000", "resume.overwrite=true")
    assert taken.wait(timeout=LIMIT_S) == 0, there.log()
    assert not marker.exists()
    assert [path.name for path in there.data_dir.rglob("mine")] == ["mine"], "moved aside, not deleted"
    unknown = Sweep(tmp_path / "c", server)
    assert unknown.start("resume_from_wandb=simple.r.00009").wait(timeout=LIMIT_S) == 1
    assert "W&B has no simple.r.00009 in project simple. Check the id, the key" in unknown.log()
