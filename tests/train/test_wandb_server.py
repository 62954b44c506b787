"""What the real client and `wandb.Api` do with the tests' own W&B server, with and without faults.

What this does not prove is said in `wandb_server`.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from wandb_client import own_client
from wandb_server import API_KEY, Apart, WandbServer

pytestmark = pytest.mark.slow

PROJECT = "proj"
Init = Callable[..., Any]


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As `own_client`."""
    with own_client(tmp_path, monkeypatch):
        yield


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server
        assert server.unknown == [], "the client asks for what is not served"


@pytest.fixture
def init(tmp_path: Path) -> Iterator[Init]:
    """`wandb.init` that retries after short waits; its runs are over with the test."""
    import wandb

    runs: list[Any] = []

    def init(run_id: str = "r1", **more: Any) -> Any:
        settings = wandb.Settings(
            console="off",
            disable_git=True,
            x_disable_stats=True,
            init_timeout=10,
            x_graphql_retry_wait_min_seconds=0.1,
            x_graphql_retry_wait_max_seconds=0.2,
            x_file_stream_retry_wait_min_seconds=0.1,
            x_file_stream_retry_wait_max_seconds=0.2,
            x_file_transfer_retry_wait_min_seconds=0.1,
            x_file_transfer_retry_wait_max_seconds=0.2,
        )
        run = wandb.init(
            id=run_id, project=PROJECT, dir=tmp_path, settings=settings, reinit="create_new", **more
        )
        runs.append(run)
        return run

    yield init
    for run in runs:
        run.finish()


def api() -> Any:
    import wandb

    return wandb.Api()


def log(run: Any, first: int, last: int) -> None:
    for step in range(first, last + 1):
        run.log({"loss": 1 / (step + 1)}, step=step)


def log_artifact(run: Any, path: Path, files: dict[str, bytes], aliases: list[str]) -> Any:
    import wandb

    artifact = wandb.Artifact("weights", "model", metadata={"size": len(files)})
    for name, data in files.items():
        source = path / name.replace("/", "_")
        source.write_bytes(data)
        artifact.add_file(str(source), name=name)
    return run.log_artifact(artifact, aliases=aliases).wait(timeout=30)


# --- runs ----------------------------------------------------------------------------------


def test_a_run_is_read_back_whole(server: WandbServer, init: Init, tmp_path: Path) -> None:
    run = init(group="g", config={"lr": 0.1, "model": {"width": 32}}, name="first", tags=["a"])
    log(run, 0, 1999)
    (tmp_path / "note.txt").write_text("hello")
    run.save(str(tmp_path / "note.txt"), base_path=str(tmp_path), policy="now")
    run.summary["best"] = 0.5
    run.finish()
    read = api().run(f"me/{PROJECT}/r1")
    assert (read.name, read.state, read.group, read.tags) == ("first", "finished", "g", ["a"])
    assert read.config == {"lr": 0.1, "model": {"width": 32}}
    assert read.summary["best"] == 0.5
    assert [row["_step"] for row in read.scan_history()] == list(range(2000))
    assert [row["loss"] for row in read.scan_history(keys=["loss"])] == [1 / (i + 1) for i in range(2000)]
    assert read.lastHistoryStep == 1999
    assert "note.txt" in [file.name for file in read.files()]
    read.file("note.txt").download(root=str(tmp_path / "down"))
    assert (tmp_path / "down" / "note.txt").read_text() == "hello"
    assert server.violations == {}


def test_states_are_those_of_the_client_s_end(server: WandbServer, init: Init) -> None:
    for name, exit_code in (("good", 0), ("bad", 3)):
        init(name).finish(exit_code=exit_code)
    run = init("preempted")
    run.mark_preempting()
    assert server.wait_for(lambda: server.runs["preempted"].state == "preempting")
    run.finish(exit_code=1)
    for name in ("alive", "silent"):
        init(name)
    server.runs["silent"].crash_after_s = 0.0
    states = {run.id: run.state for run in api().runs(f"me/{PROJECT}")}
    assert states == {
        "good": "finished",
        "bad": "failed",
        "preempted": "preempted",
        "alive": "running",
        "silent": "crashed",
    }
    init("bad", resume="must")
    assert server.runs["bad"].state == "running"


def test_runs_are_found_by_group_config_and_state(server: WandbServer, init: Init) -> None:
    for number, group in enumerate("aab"):
        init(f"r{number}", group=group, config={"lr": number}).finish()

    def found(**filters: Any) -> list[str]:
        return [run.id for run in api().runs(f"me/{PROJECT}", filters=filters)]

    assert found() == ["r0", "r1", "r2"]
    assert found(group="a") == ["r0", "r1"]
    assert found(**{"config.lr": {"$gt": 0}, "state": "finished"}) == ["r1", "r2"]
    assert found(**{"$or": [{"group": "b"}, {"config.lr.value": 0}]}) == ["r0", "r2"]
    assert len(api().runs(f"me/{PROJECT}", filters={"group": "zzz"})) == 0


def test_a_resume_goes_on_behind_the_last_row(server: WandbServer, init: Init) -> None:
    run = init(config={"lr": 1})
    log(run, 0, 9)
    run.finish(exit_code=1)
    run = init(resume="must")
    assert (run.resumed, run.starting_step) == (True, 10)
    log(run, 10, 19)
    run.finish()
    assert server.runs["r1"].steps == list(range(20))
    assert server.runs["r1"].exit_codes == [1, 0]
    assert server.violations == {}


def test_what_does_not_exist_is_refused_in_the_client_s_words(server: WandbServer, init: Init) -> None:
    import wandb

    with pytest.raises(wandb.errors.UsageError, match="does not exist"):
        init(resume="must")
    init("other").finish()  # the project is there now
    with pytest.raises(wandb.errors.UsageError, match="does not exist"):
        init("r2", resume="must")
    with pytest.raises(wandb.errors.CommError, match="Could not find run"):
        api().run(f"me/{PROJECT}/r1")
    with pytest.raises(wandb.errors.CommError, match="not found"):
        api().artifact(f"me/{PROJECT}/nothing:latest")


def test_rows_that_break_the_rules_are_noted(server: WandbServer, init: Init) -> None:
    run = init()
    log(run, 0, 2)
    run.finish()
    post(server, 3, [4, 4])
    post(server, 5, [3])
    post(server, 9, [10])
    post(server, 0, [7])
    assert server.violations["r1"] == [
        "step 4 is there already",
        "step 3 comes after 4",
        "a hole in the lines: 6 are there, 9 was written",
        "line 0 (step 0) was overwritten",
    ]


def post(server: WandbServer, offset: int, steps: list[int]) -> None:
    lines = [json.dumps({"_step": step}) for step in steps]
    body = {"files": {"wandb-history.jsonl": {"offset": offset, "content": lines}}}
    request = urllib.request.Request(
        f"{server.url}/files/me/{PROJECT}/r1/file_stream",
        json.dumps(body).encode(),
        {"Authorization": "Basic " + base64.b64encode(f"api:{API_KEY}".encode()).decode()},
    )
    urllib.request.urlopen(request, timeout=5).close()


# --- artifacts -----------------------------------------------------------------------------


def test_artifacts_have_versions_aliases_and_their_bytes(
    server: WandbServer, init: Init, tmp_path: Path
) -> None:
    run = init()
    big = os.urandom(3 << 20)
    log_artifact(run, tmp_path, {"a/big.bin": big, "small": b"1"}, ["latest", "one"])
    log_artifact(run, tmp_path, {"a/big.bin": big, "small": b"2"}, ["latest", "two"])
    again = log_artifact(run, tmp_path, {"a/big.bin": big, "small": b"2"}, ["latest", "three"])
    assert again.version == "v1"
    run.use_artifact("weights:one")
    run.finish()
    versions = list(api().artifacts("model", f"me/{PROJECT}/weights"))
    assert [(v.version, sorted(v.aliases)) for v in versions] == [
        ("v1", ["latest", "three", "two"]),
        ("v0", ["one"]),
    ]
    read = api().run(f"me/{PROJECT}/r1")
    assert [a.name for a in read.logged_artifacts()] == ["weights:v0", "weights:v1"]
    assert [a.name for a in read.used_artifacts()] == ["weights:v0"]
    latest = api().artifact(f"me/{PROJECT}/weights:latest")
    assert (latest.metadata, latest.size, latest.file_count) == ({"size": 2}, len(big) + 1, 2)
    down = Path(latest.download(root=str(tmp_path / "down"), skip_cache=True))
    assert (down / "a" / "big.bin").read_bytes() == big
    assert (down / "small").read_bytes() == b"2"
    # The same bytes were sent once.
    assert [file.num_uploads for file in server.versions("weights")[1].files.values()] == [1, 1]
    assert (
        server.versions("weights")[0].files["a/big.bin"] is server.versions("weights")[1].files["a/big.bin"]
    )


def test_versions_are_removed_with_their_bytes(server: WandbServer, init: Init, tmp_path: Path) -> None:
    import wandb

    run = init()
    for number in range(3):
        log_artifact(run, tmp_path, {"same": b"same", "own": b"%d" % number}, ["latest", f"step-{number}"])
    run.finish()
    first = api().artifact(f"me/{PROJECT}/weights:step-0")
    with pytest.raises(wandb.errors.CommError, match="has aliases"):
        first.delete()
    first.delete(delete_aliases=True)
    assert [v.version for v in server.versions("weights")] == ["v1", "v2"]
    assert server.backend.num_collected == 2  # its own file and its manifest
    latest = api().artifact(f"me/{PROJECT}/weights:latest").download(root=str(tmp_path / "down"))
    assert sorted(os.listdir(latest)) == ["own", "same"]


def test_a_version_whose_upload_was_cut_off_is_not_seen(
    server: WandbServer, init: Init, tmp_path: Path
) -> None:
    import wandb

    run = init()
    log_artifact(run, tmp_path, {"own": b"1"}, ["latest"])
    with server.failing("upload", status=403), pytest.raises(ValueError, match="giving up"):
        log_artifact(run, tmp_path, {"own": b"2"}, ["latest"])
    assert [v.state for v in server.artifacts] == ["COMMITTED", "PENDING"]
    assert wandb.Api().artifact(f"me/{PROJECT}/weights:latest").version == "v0"
    assert log_artifact(run, tmp_path, {"own": b"2"}, ["latest"]).version == "v1"


# --- keys and faults -----------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_was_revoked_ends_the_start(server: WandbServer, init: Init, status: int) -> None:
    import wandb

    server.revoke(status=status)
    with pytest.raises(wandb.errors.CommError):
        init()
    server.accept()
    wandb.teardown()
    init().finish()
    assert server.runs["r1"].state == "finished"


def test_a_key_that_is_revoked_in_the_middle_loses_rows_and_ends_nothing(
    server: WandbServer, init: Init
) -> None:
    run = init()
    log(run, 0, 9)
    assert server.wait_for(lambda: len(server.runs["r1"].history) >= 9)
    server.revoke()
    log(run, 10, 19)
    run.finish()
    assert server.runs["r1"].state == "running"
    assert len(server.runs["r1"].history) < 20


def test_faults_are_survived_with_each_row_once(server: WandbServer, init: Init, tmp_path: Path) -> None:
    run = init()
    faults = [
        server.fault("file_stream", drop="after", times=1),
        server.fault("file_stream", status=500, times=1),
        server.fault("upload", drop="before", times=1),
        server.fault("CommitArtifact", drop="after", times=1),
        server.fault("graphql", delay_s=0.2, times=2),
    ]
    log(run, 0, 99)
    log_artifact(run, tmp_path, {"own": b"1"}, ["latest"])
    assert server.wait_for(lambda: all(fault.hits == fault.times for fault in faults))
    run.finish()
    assert server.runs["r1"].steps == list(range(100))
    assert [v.version for v in server.versions("weights")] == ["v0"]
    assert server.violations == {}


def test_a_server_that_was_away_gets_all_rows_afterwards(server: WandbServer, init: Init) -> None:
    run = init()
    url = server.url
    log(run, 0, 9)
    assert server.wait_for(lambda: len(server.runs["r1"].history) >= 9)
    with server.away():
        with pytest.raises(urllib.error.URLError, match="refused"):
            urllib.request.urlopen(url, timeout=5)
        log(run, 10, 19)
        # The client's next request is refused meanwhile.
        time.sleep(1.2)
    run.finish()
    assert server.url == url
    assert server.runs["r1"].steps == list(range(20))
    assert (server.runs["r1"].state, server.violations) == ("finished", {})


def test_a_request_waits_until_its_fault_is_lifted(server: WandbServer, init: Init) -> None:
    run = init()
    fault = server.fault("file_stream", delay_s=60)
    log(run, 0, 9)
    assert server.wait_for(lambda: fault.hits > 0)
    server.lift(fault)
    run.finish()
    assert server.runs["r1"].steps == list(range(10))


# --- as a process of its own ---------------------------------------------------------------


def test_it_runs_as_a_process_and_shows_what_it_knows(init: Init, monkeypatch: pytest.MonkeyPatch) -> None:
    with Apart() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        server.command("fault", kind="file_stream", status=500, times=1)
        run = init(group="g")
        log(run, 0, 9)
        run.finish()
        state = server.wait_for(lambda state: state["runs"]["r1"]["state"] == "finished")
        assert state["runs"]["r1"]["steps"] == list(range(10))
        assert state["runs"]["r1"]["group"] == "g"
        assert state["faults"][0]["hits"] == 1
        assert (state["violations"], state["unknown"]) == ({}, [])
        server.command("away", seconds=0.3)
        with pytest.raises((urllib.error.URLError, ConnectionError, TimeoutError)):  # noqa: PT012
            while True:
                server.state()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                assert "r1" in server.state()["runs"]
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
