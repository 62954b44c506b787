"""Checkpoints as artifacts: the real client against the tests' own W&B server.

What this does not prove is said in `wandb_server`.
"""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sweeper import checkpoints, manifests, processes, rundir
from sweeper.rundir import Identity
from sweeper.states import Outcome, State
from sweeper.tracking import (
    MetricsLog,
    TensorboardSettings,
    Tracker,
    TrackingSettings,
    WandbSettings,
    orphans,
    wandb_checkpoints,
)
from sweeper.tracking.messages import Begin
from sweeper.tracking.wandb_checkpoints import CheckpointUploader, Version, best_value, decide_removal

sys.path.insert(0, str(Path(__file__).parents[1]))
from wandb_client import own_client
from wandb_server import API_KEY, WandbServer

RUN_ID = "s.r.00001"
WANDB_ID = f"{RUN_ID}.{os.getpid():08x}"
NAME = wandb_checkpoints.collection_name(WANDB_ID)
CONFIG = b"seed: 1\nstorage: ${oc.env:SWEEPER_STORAGE}\n"


def begin_of(run_dir: Path, *, mode: str = "last", attempt: int = 1, **more: Any) -> Begin:
    settings = WandbSettings(project="proj", upload_checkpoints=mode)
    fields: dict[str, Any] = {
        "run_id": RUN_ID,
        "sweep": "s",
        "wandb_run_id": WANDB_ID,
        "attempt": attempt,
        "lease_epoch": attempt,
        "config": {},
        "settings": TrackingSettings(settings, TensorboardSettings(is_enabled=False)),
        "metric": "loss",
        **more,
    }
    return Begin(run_dir=str(run_dir), **fields)


# --- decisions -----------------------------------------------------------------------------


def versions(*given: tuple[int, int, float | None]) -> list[Version]:
    return [Version(step, epoch, f"{step}.{epoch}", value) for step, epoch, value in given]


@pytest.mark.parametrize(
    ("mode", "gone"),
    [("last", {"10.1", "30.1"}), ("best", {"10.1", "20.1", "30.1"}), ("all", set())],
)
def test_old_versions_go_and_those_of_lost_owners_first(tmp_path: Path, mode: str, gone: set[str]) -> None:
    """Epoch 2 went on from step 20: step 30 of epoch 1 is no part of the run any more."""
    there = versions((10, 1, 3.0), (20, 1, 2.0), (30, 1, 1.0), (40, 2, 0.5), (50, 3, 0.1))
    begin = begin_of(tmp_path, attempt=2, start_step=20, keep_last=2)
    assert decide_removal(there, there[3], mode=mode, begin=begin) == gone


@pytest.mark.parametrize(("direction", "best"), [("minimize", 2.0), ("maximize", 3.0)])
def test_the_best_is_one_that_counts(tmp_path: Path, direction: str, best: float) -> None:
    there = versions(
        (10, 1, 3.0), (20, 1, 2.0), (15, 1, None), (18, 1, float("nan")), (30, 1, 1.0), (31, 1, 9.0)
    )
    begin = begin_of(tmp_path, attempt=2, start_step=20, direction=direction)
    assert best_value(there, begin) == best


@pytest.mark.parametrize("metadata", [None, {}, {"step": "1", "lease_epoch": 1, "manifest_digest": "d"}, []])
def test_foreign_metadata_is_no_version(metadata: object) -> None:
    assert Version.read(metadata) is None


# --- with the client -----------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "sweep" / "s" / "runs" / RUN_ID
    identity = Identity(
        run_id=RUN_ID, sweep="s", number=1, trial=0, params={"trainer.lr": 0.1}, seed=1, threads=1,
        wandb_run_id=WANDB_ID, config_digest=manifests.digest(CONFIG), code_version="1", created_at="now",
    )  # fmt: skip
    rundir.create(path, identity, config=CONFIG, overrides=rundir.overrides_yaml(identity.params))
    return path


def commit(
    run_dir: Path,
    step: int,
    *,
    value: float | None = None,
    epoch: int = 1,
    start: int = 0,
    size: int = 1000,
) -> None:
    """Log rows up to `step` and commit a checkpoint of it, as a trainer does."""
    path = run_dir / rundir.METRICS_FILE
    offset = path.stat().st_size if path.exists() else 0
    with MetricsLog(path, offset=offset) as log:
        log.write(step, {"loss": 0.0 if value is None else value})
        offset = log.sync()
    draft = checkpoints.Draft(
        run_dir / rundir.CHECKPOINTS_DIR, run_id=RUN_ID, step=step, lease_epoch=epoch, lineage=((epoch, start),),
        parent_step=None, config_digest=manifests.digest(CONFIG), value=value,
    )  # fmt: skip
    draft.add_bytes("model.pth", os.urandom(size))
    draft.add_bytes("rng_state.pt", b"the same in every checkpoint")
    draft.add_bytes("state.json", json.dumps({"metrics_offset": offset}).encode())
    checkpoints.commit(draft, check_lease=lambda: None, record=lambda manifest: None, committed_at="now")


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As `own_client`."""
    with own_client(tmp_path, monkeypatch):
        yield


@pytest.fixture
def server(environment: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server
        assert server.unknown == [], "the client asks for what is not served"


@dataclass
class Attempt:
    """An attempt's W&B run and its uploader, in this process."""

    run: Any
    uploader: CheckpointUploader
    warnings: list[str] = field(default_factory=list)

    def until(self, condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
        """Pump, as the tracker does, until the condition holds."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            began = time.monotonic()
            self.uploader.pump()
            assert time.monotonic() - began < 0.3, "it waited for something"
            assert time.monotonic() < deadline, self.warnings
            time.sleep(0.01)

    def end(self, timeout_s: float = 20.0) -> bool:
        self.run.finish()
        return self.uploader.finish(timeout_s)


Start = Callable[..., Attempt]


@pytest.fixture
def start(run_dir: Path, tmp_path: Path) -> Iterator[Start]:
    """Begins attempts, whose W&B runs are over with the test."""
    import wandb

    runs: list[Any] = []

    def start(*, mode: str = "last", online: bool = True, **more: Any) -> Attempt:
        settings = wandb.Settings(
            mode="online" if online else "offline",
            console="off",
            disable_git=True,
            x_disable_stats=True,
            x_graphql_retry_wait_min_seconds=0.1,
            x_graphql_retry_wait_max_seconds=0.2,
            x_file_transfer_retry_wait_min_seconds=0.1,
            x_file_transfer_retry_wait_max_seconds=0.2,
        )
        run = wandb.init(
            id=WANDB_ID, project="proj", dir=tmp_path, resume="allow", settings=settings, reinit="create_new"
        )
        runs.append(run)
        warnings: list[str] = []
        begin = begin_of(run_dir, mode=mode, **more)
        return Attempt(run, CheckpointUploader(run, begin, warn=warnings.append), warnings)

    yield start
    for run in runs:
        run.finish()


def steps(server: WandbServer) -> list[int]:
    return [artifact.metadata["step"] for artifact in server.versions(NAME)]


def left_behind(run_dir: Path) -> list[str]:
    return [name for name in os.listdir(run_dir) if "wandb_upload" in name]


@pytest.mark.slow
def test_last_keeps_the_newest_and_removes_the_older_after_the_commit(
    server: WandbServer, start: Start, run_dir: Path
) -> None:
    attempt = start(keep_last=2)
    for step in (10, 20, 30, 40):
        commit(run_dir, step)
        attempt.until(lambda step=step: step in steps(server))
    assert attempt.end()
    assert steps(server) == [30, 40]
    older, newest = server.versions(NAME)
    assert (newest.aliases, older.aliases) == (["latest", "step-00000040"], ["step-00000030"])
    assert newest.type == "sweeper-checkpoint"
    manifest = manifests.read_manifest(run_dir / "checkpoints" / "step_00000040")
    assert newest.metadata == {
        "run_id": RUN_ID,
        "step": 40,
        "lease_epoch": 1,
        "manifest_digest": manifest.digest,
        "mode": "last",
        "value": None,
    }
    # What does not change is sent once for all versions.
    for name in ("run.json", "config.yaml", "train_config_overrides.yaml"):
        assert newest.files[name] is older.files[name]
        assert newest.files[name].num_uploads == 1
    assert attempt.warnings == []
    assert left_behind(run_dir) == []


@pytest.mark.slow
def test_of_those_committed_during_an_upload_only_the_newest_follows(
    server: WandbServer, start: Start, run_dir: Path
) -> None:
    attempt = start(keep_last=5)
    delay = server.fault("artifact", delay_s=60)
    commit(run_dir, 10)
    attempt.until(lambda: delay.hits)
    for step in (20, 30, 40):
        commit(run_dir, step)
        attempt.uploader.pump()
    server.lift()
    assert attempt.end()
    assert steps(server) == [10, 40]


@pytest.mark.slow
@pytest.mark.parametrize(("direction", "uploaded"), [("minimize", [10, 20, 40]), ("maximize", [10, 30])])
def test_best_is_uploaded_when_it_improves_and_is_alone(
    server: WandbServer, start: Start, run_dir: Path, direction: str, uploaded: list[int]
) -> None:
    attempt = start(mode="best", direction=direction)
    seen: list[int] = []
    for step, value in ((10, 3.0), (20, 2.0), (25, None), (30, 5.0), (40, 1.0)):
        commit(run_dir, step, value=value)
        if step in uploaded:
            attempt.until(lambda step=step: steps(server) == [step])
            seen += steps(server)
        attempt.uploader.pump()
    assert attempt.end()
    assert [a.metadata["step"] for a in server.artifacts] == uploaded == seen
    (best,) = server.versions(NAME)
    assert sorted(best.aliases) == ["best", "latest", f"step-{uploaded[-1]:08d}"]
    # A later attempt knows the best value from W&B.
    later = start(mode="best", direction=direction, attempt=2, start_step=40)
    commit(run_dir, 50, value=4.0, epoch=2, start=40)
    assert later.end()
    assert steps(server) == [uploaded[-1]]


@pytest.mark.slow
def test_all_are_uploaded_though_they_were_pruned_meanwhile(
    server: WandbServer, start: Start, run_dir: Path
) -> None:
    attempt = start(mode="all", keep_last=2)
    with server.failing("artifact", delay_s=60):
        for step in (10, 20, 30, 40):
            commit(run_dir, step, value=1.0 / step)
            attempt.uploader.pump()
        shutil.rmtree(run_dir / "checkpoints" / "step_00000010")
        shutil.rmtree(run_dir / "checkpoints" / "step_00000020")
    assert attempt.end()
    assert steps(server) == [10, 20, 30, 40]
    assert server.versions(NAME)[-1].aliases == ["latest", "step-00000040", "best"]
    assert left_behind(run_dir) == []


@pytest.mark.slow
def test_a_prune_during_the_upload_harms_nothing_and_all_bytes_come_back(
    server: WandbServer, start: Start, run_dir: Path, tmp_path: Path
) -> None:
    import wandb

    attempt = start()
    commit(run_dir, 10)
    commit(run_dir, 20, size=5 << 20)
    checkpoint = run_dir / "checkpoints" / "step_00000020"
    expected = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    rows = (run_dir / "metrics.jsonl").read_bytes()
    delay = server.fault("artifact", delay_s=60)
    attempt.until(lambda: delay.hits)
    checkpoints.condemn(run_dir / "checkpoints", [checkpoint])
    shutil.rmtree(run_dir / "checkpoints" / checkpoints.CONDEMNED)
    with MetricsLog(run_dir / "metrics.jsonl", offset=len(rows)) as log:
        log.write(21, {"loss": 0.0})
    server.lift()
    assert attempt.end()
    artifact = wandb.Api().artifact(f"me/proj/{NAME}:latest")
    down = Path(artifact.download(root=str(tmp_path / "down" / RUN_ID), skip_cache=True))
    assert sorted(str(path.relative_to(down)) for path in down.rglob("*") if path.is_file()) == sorted(
        [
            *("run.json", "config.yaml", "train_config_overrides.yaml", "metrics.jsonl"),
            *("checkpoints/stage_status.json", "checkpoints/trainer_checkpoint.json"),
            *(f"checkpoints/step_00000020/{name}" for name in expected),
        ]
    )
    rebuilt = down / "checkpoints" / "step_00000020"
    assert {path.name: path.read_bytes() for path in rebuilt.iterdir()} == expected
    for name in ("run.json", "config.yaml", "train_config_overrides.yaml"):
        assert (down / name).read_bytes() == (run_dir / name).read_bytes()
    assert (down / "metrics.jsonl").read_bytes() == rows
    identity = rundir.read_identity(down)
    manifest, _ = checkpoints.validate(rebuilt, run_id=RUN_ID, config_digest=identity.config_digest)
    pointer = json.loads((down / "checkpoints" / "trainer_checkpoint.json").read_bytes())
    assert (pointer["step"], pointer["manifest_digest"]) == (20, manifest.digest)
    status = json.loads((down / "checkpoints" / "stage_status.json").read_bytes())
    assert status["stages"] == [{"name": "train", "state": "running", "global_step": 20}]


@pytest.mark.slow
def test_what_w_and_b_has_is_not_uploaded_again_by_a_later_attempt(
    server: WandbServer, start: Start, run_dir: Path
) -> None:
    first = start()
    commit(run_dir, 10)
    assert first.end()
    before = server.requests["upload"], len(server.artifacts)
    later = start(attempt=2, start_step=10)
    later.until(lambda: server.operations[-1] == "ProjectArtifacts")
    assert later.end()
    assert len(server.artifacts) == before[1]
    last = start(attempt=3, start_step=10)
    commit(run_dir, 20, epoch=3, start=10)
    assert last.end()
    assert steps(server) == [10, 20]


@pytest.mark.slow
def test_only_whole_checkpoints_of_this_attempt_s_run_are_uploaded(
    server: WandbServer, start: Start, run_dir: Path
) -> None:
    root = run_dir / "checkpoints"
    for step in (10, 20, 30, 40, 50):
        commit(run_dir, step)
    (root / "step_00000020" / "MANIFEST.json").unlink()
    (root / "step_00000030" / "model.pth").write_bytes(b"torn")
    (root / ".tmp-1-abcd").mkdir()
    os.rename(root / "step_00000050", root / "step_00000055")
    attempt = start(mode="all", attempt=2, start_step=10)  # step 40 is of an owner that had lost the run
    commit(run_dir, 70, epoch=2, start=10)
    assert attempt.end()
    assert steps(server) == [10, 70]


# --- failures ------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_upload_that_fails_is_one_warning_and_tried_again(
    server: WandbServer, start: Start, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_checkpoints, "RETRY_S", 0.05)
    attempt = start()
    refusal = server.fault("artifact", status=403)
    commit(run_dir, 10)
    attempt.until(lambda: refusal.hits > 20)
    assert len(attempt.warnings) == 1
    assert "step 10 was not uploaded" in attempt.warnings[0]
    server.lift()
    attempt.until(lambda: steps(server) == [10])
    assert attempt.end()
    assert len(attempt.warnings) == 1


@pytest.mark.slow
def test_a_server_that_is_away_ends_the_waiting_in_bounded_time(
    server: WandbServer, start: Start, run_dir: Path
) -> None:
    attempt = start()
    with server.away():
        commit(run_dir, 10)
        began = time.monotonic()
        attempt.until(lambda: time.monotonic() > began + 0.5)
        assert not attempt.uploader.finish(1.0)
        assert time.monotonic() - began < 3.0
    assert attempt.warnings == [f"{RUN_ID}: the checkpoint of step 10 was not uploaded to W&B in 1 s"]
    assert steps(server) == []
    assert left_behind(run_dir) == []
    assert (run_dir / "checkpoints" / "step_00000010" / "model.pth").exists()


@pytest.mark.slow
def test_offline_nothing_is_uploaded_and_one_line_says_so(
    environment: None, start: Start, run_dir: Path
) -> None:
    attempt = start(online=False)
    commit(run_dir, 10)
    attempt.uploader.pump()
    attempt.uploader.pump()
    assert attempt.end()
    assert attempt.warnings == [f"{RUN_ID}: no checkpoints are uploaded while W&B is offline"]
    assert left_behind(run_dir) == []


@pytest.mark.slow
def test_a_run_that_has_gone_on_elsewhere_is_left_alone(
    server: WandbServer, start: Start, run_dir: Path, tmp_path: Path
) -> None:
    """This machine was cut off, another one resumed from W&B, and this one is back."""
    attempt = start()
    commit(run_dir, 10)
    attempt.until(lambda: steps(server) == [10])
    server.versions(NAME)[0].metadata["lease_epoch"] = 2
    commit(run_dir, 20)
    attempt.until(lambda: attempt.warnings)
    assert "the run has gone on elsewhere (lease epoch 2)" in attempt.warnings[0]
    commit(run_dir, 30)
    assert attempt.end()
    assert (steps(server), len(attempt.warnings)) == ([10], 1)


@pytest.mark.slow
def test_a_run_with_a_newer_owner_here_is_left_alone(
    server: WandbServer, start: Start, run_dir: Path
) -> None:
    attempt = start()
    rundir.write_marker(run_dir, attempt=2, lease_epoch=2, owner=processes.identify(), started_at="")
    commit(run_dir, 10)
    assert attempt.end()
    assert "the run has a newer owner" in attempt.warnings[0]
    assert steps(server) == []


@pytest.mark.slow
def test_without_hard_links_files_are_copied(
    server: WandbServer, start: Start, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Any, target: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    commit(run_dir, 10)
    attempt = start()
    monkeypatch.setattr(os, "link", link)
    assert attempt.end()
    model = server.versions(NAME)[0].files["checkpoints/step_00000010/model.pth"]
    assert model.read() == (run_dir / "checkpoints" / "step_00000010" / "model.pth").read_bytes()


@pytest.mark.slow
def test_versions_that_cannot_be_removed_go_with_the_next(
    server: WandbServer, start: Start, run_dir: Path
) -> None:
    attempt = start(keep_last=2)
    with server.failing("DeleteArtifact", status=403):
        for step in (10, 20, 30):
            commit(run_dir, step)
            attempt.until(lambda step=step: step in steps(server))
        attempt.until(lambda: attempt.warnings)
    assert "could not be removed" in attempt.warnings[0]
    commit(run_dir, 40)
    assert attempt.end()
    assert steps(server) == [30, 40]


# --- in the tracker process ----------------------------------------------------------------


class Hired:
    """A tracker process, as a worker holds it."""

    def __init__(self, run_dir: Path, log_path: Path, *, finish_timeout_s: float = 30.0) -> None:
        self.run_dir = run_dir
        self.events: list[dict[str, Any]] = []
        settings = WandbSettings(project="proj", upload_checkpoints="last", finish_timeout_s=finish_timeout_s)
        self.tracker = Tracker.start(
            TrackingSettings(settings, TensorboardSettings(is_enabled=False)), log_path=log_path
        )

    def begin(self, *, attempt: int = 1, start_step: int = 0) -> None:
        self.tracker.begin(
            run_dir=self.run_dir, run_id=RUN_ID, sweep="s", wandb_run_id=WANDB_ID, attempt=attempt,
            lease_epoch=attempt, config={}, metric="loss", start_step=start_step,
        )  # fmt: skip

    def end(self) -> list[dict[str, Any]]:
        self.tracker.end(run_id=RUN_ID, outcome=Outcome.COMPLETED, state=State.COMPLETED)
        return self.wait_for("done")

    def wait_for(self, name: str, timeout_s: float = 60.0) -> list[dict[str, Any]]:
        deadline = time.monotonic() + timeout_s
        while not any(event["event"] == name for event in self.events):
            descriptor = self.tracker.fileno()
            assert descriptor is not None, self.events
            assert time.monotonic() < deadline, self.events
            select.select([descriptor], [], [], 0.2)
            self.events += self.tracker.poll()
        return self.events

    def warnings(self) -> list[str]:
        return [event["text"] for event in self.events if event["event"] == "warning"]


@pytest.fixture
def hire(run_dir: Path, tmp_path: Path) -> Iterator[Callable[..., Hired]]:
    hired: list[Hired] = []

    def hire(**more: Any) -> Hired:
        hired.append(Hired(run_dir, tmp_path / "tracker.log", **more))
        return hired[-1]

    yield hire
    for one in hired:
        one.tracker.close(0)
    assert orphans.end(orphans.RUN_VARIABLE, WANDB_ID) == [], "a W&B service was left behind"


@pytest.mark.slow
def test_rows_flow_and_the_end_is_told_while_an_upload_takes_long(
    server: WandbServer, hire: Callable[..., Hired], run_dir: Path, tmp_path: Path
) -> None:
    worker = hire()
    delay = server.fault("artifact", delay_s=5, times=1)
    commit(run_dir, 1, size=20 << 20)
    worker.begin()
    assert server.wait_for(lambda: delay.hits)
    began = time.monotonic()
    size = (run_dir / "metrics.jsonl").stat().st_size
    with MetricsLog(run_dir / "metrics.jsonl", offset=size) as log:
        for step in range(2, 300):
            log.write(step, {"loss": 1.0})
    run = server.runs[WANDB_ID]
    assert server.wait_for(lambda: len(run.history) > 290)
    assert time.monotonic() - began < 4.0
    worker.tracker.end(run_id=RUN_ID, outcome=Outcome.COMPLETED, state=State.COMPLETED)
    assert server.wait_for(lambda: run.state == "finished")
    assert server.versions(NAME) == []
    worker.wait_for("done")
    assert (steps(server), run.steps, server.violations) == ([1], list(range(1, 300)), {})
    assert worker.warnings() == []
    assert left_behind(run_dir) == []
    # The key is in nothing that was written or sent.
    key = API_KEY.encode()
    assert [path for path in tmp_path.rglob("*") if path.is_file() and key in path.read_bytes()] == []
    assert [blob.name for blob in server.backend.blobs.values() if blob.is_there and key in blob.read()] == []


@pytest.mark.slow
def test_an_upload_that_was_killed_leaves_no_half_and_is_made_again(
    server: WandbServer, hire: Callable[..., Hired], run_dir: Path
) -> None:
    first = hire()
    delay = server.fault("artifact", delay_s=60)
    commit(run_dir, 10)
    first.begin()
    assert server.wait_for(lambda: delay.hits)
    assert first.tracker.pid is not None
    os.kill(first.tracker.pid, signal.SIGKILL)
    first.tracker.close(0)
    server.lift()
    assert left_behind(run_dir) != []
    assert [artifact.state for artifact in server.artifacts] == ["PENDING"]
    second = hire()
    second.begin(attempt=2, start_step=10)
    second.end()
    assert steps(server) == [10]
    assert second.warnings() == []
    assert left_behind(run_dir) == []


@pytest.mark.slow
def test_an_upload_without_end_is_given_up_in_time_and_the_run_s_end_is_told(
    server: WandbServer, hire: Callable[..., Hired], run_dir: Path
) -> None:
    worker = hire(finish_timeout_s=2.0)
    delay = server.fault("artifact", delay_s=60)
    commit(run_dir, 10)
    worker.begin()
    assert server.wait_for(lambda: delay.hits)
    began = time.monotonic()
    worker.end()
    assert time.monotonic() - began < 6.0
    assert (server.runs[WANDB_ID].state, server.runs[WANDB_ID].steps) == ("finished", [10])
    assert ["step 10 was not uploaded" in text for text in worker.warnings()] == [True]
    assert server.versions(NAME) == []
