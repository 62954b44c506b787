"""Renting, following, replacing and ending, with the real client: whatever happens, nothing is left running."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vast_server import Box, VastServer, offer

from sweeper.errors import EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_NOT_WELL, EXIT_OK
from sweeper.launch.vast import renting

pytestmark = pytest.mark.slow

STATE = Path("outputs/sweep/simple/vast/state.json")


def meanwhile(act: Callable[[], object]) -> threading.Thread:
    """Do something while a launch follows."""
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def begun(server: VastServer, number: int = 0) -> Box | None:
    """The n-th instance, as soon as it trains."""
    boxes = list(server.boxes.values())
    path = boxes[number].work / "sweeper-simple" / "trained" if len(boxes) > number else None
    return boxes[number] if path is not None and path.exists() else None


def state() -> dict[str, Any]:
    return json.loads(STATE.read_text())


# --- what goes well ----------------------------------------------------------------------------


def test_a_sweep_is_rented_for_trained_and_everything_ends(launch: Any, server: VastServer) -> None:
    said = launch("trainer.batch_size=16", "sweep.n_trials=3")
    assert (said.code, server.running()) == (EXIT_OK, []), said.err + server.logs()
    assert "done: the sweep is complete; 1 instance, $0.00, none is left" in said.err
    (box,) = server.boxes.values()
    (trained,) = (box.work / "sweeper-simple/trained").read_text().splitlines()
    wanted = ["trainer.batch_size=16", "launcher=local", "sweep.name=simple", "sweep.n_trials=3"]
    assert [word for word in wanted if word not in trained.split()] == []
    assert "launcher=vast" not in trained
    assert box.body["label"] == f"sweeper:simple:{state()['series']}:1"
    assert (box.body["image"], box.body["disk"], box.body["price"]) == ("vastai/pytorch:@vastai-automatic-tag", 32.0, None)  # fmt: skip
    assert len(box.body["onstart"]) <= 4048
    assert Path(".vast/onstart.sh").read_text().startswith("#!/usr/bin/env bash")
    assert not Path("outputs/sweeper.db").exists()


def test_dry_run_shows_offer_cost_and_script_and_rents_nothing(launch: Any, server: VastServer) -> None:
    said = launch("--dry-run", "launcher.interruptible=true", "launcher.budget_usd=3")
    assert said.code == EXIT_OK
    assert "would rent: offer 101, 1x RTX 4090 in Iceland, IS, reliability 0.990, interruptible, with a bid of $0.2400" in said.out  # fmt: skip
    assert "costs: $0.2500 per hour; at most $3.00 in 12.0 h (budget $3.00, time limit 24 h)" in said.out
    assert Path(".vast/onstart.sh").read_text() in said.out
    assert (server.creations, STATE.exists()) == ([], False)


def test_an_outbid_instance_is_gone_before_another_is_rented(
    launch: Any, server: VastServer, instances: Any
) -> None:
    instances.train("touch $FAKE/training; [ -e $FAKE/go ] || { sleep 60 & wait; }")

    def outbid() -> None:
        box = server.until(lambda: begun(server))
        server.until((instances.folder / "training").exists)
        (instances.folder / "go").touch()
        server.interrupt(box)

    helper = meanwhile(outbid)
    said = launch("launcher.interruptible=true")
    helper.join()
    assert (said.code, server.running(), len(server.boxes)) == (EXIT_OK, [], 2), said.err + server.logs()
    assert server.most_at_once == 1
    assert "is gone (it was outbid (stopped)); another takes its place" in said.err
    assert [creation["price"] for creation in server.creations] == [0.24, 0.24]
    assert [rental["why"] for rental in state()["rentals"]] == ["it was outbid (stopped)", "the sweep is complete"]  # fmt: skip


def test_an_instance_that_nobody_heard_is_followed_by_one_that_says_how_it_stands(
    launch: Any, server: VastServer
) -> None:
    """Its last word was missed: the next finds everything done."""
    server.is_heard_out = False
    server.fault("request_logs", times=10**6, status=500)

    def listen() -> None:
        server.until(lambda: len(server.boxes) == 2)
        server.is_heard_out = True
        server.faults.clear()

    meanwhile(listen)
    said = launch()
    assert (said.code, server.running(), len(server.boxes)) == (EXIT_OK, [], 2), said.err + server.logs()
    assert "it is gone (nobody heard why)" in said.err


# --- what fails: nothing is left ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (dict(what="POST /api/v0/bundles", times=99, status=500), "the server says 500"),
        (
            dict(what="POST /api/v0/bundles", times=99, status=200, body="<html>"),
            "it failed: Expecting value",
        ),
        (dict(what="POST /api/v0/bundles", times=99, status=401, body='{"msg": "no"}'), "Check VAST_API_KEY"),
        (dict(what="PUT /api/v0/asks", times=99, status=404, body='{"msg": "gone"}'), "could not be rented"),
        (dict(what="PUT /api/v0/asks", times=99, status=403, body='{"msg": "no credit"}'), "no credit"),
    ],
)
def test_a_launch_that_cannot_rent_says_why(
    launch: Any, server: VastServer, setup: dict[str, Any], words: str
) -> None:
    server.offers += [offer(number) for number in range(110, 118)]
    server.fault(**setup)
    said = launch()
    assert (said.code, server.running()) == (EXIT_NOT_WELL, [])
    assert words in said.err


def test_nothing_that_fits(launch: Any, server: VastServer) -> None:
    said = launch("launcher.max_usd_h=0.01")
    assert (said.code, server.creations) == (EXIT_NOT_WELL, [])
    assert "nothing on VastAI fits: num_gpus=1 disk_space>=32 reliability>=0.95 dph_total<=0.01" in said.err


@pytest.mark.parametrize("how", ["answer lost", "not done"])
def test_a_create_without_an_answer_is_looked_for(launch: Any, server: VastServer, how: str) -> None:
    server.fault("PUT /api/v0/asks", status=500, body="oops", kind="text/plain", is_done=how == "answer lost")
    said = launch()
    assert (said.code, server.running(), server.most_at_once) == (EXIT_OK, [], 1), said.err
    assert len(server.boxes) == 1
    assert ("by its label" in said.err) == (how == "answer lost")


def test_an_instance_that_never_comes_up(launch: Any, server: VastServer) -> None:
    server.keep_loading = True
    server.offers += [offer(number) for number in range(110, 118)]
    said = launch("launcher.up_within_s=0.2")
    assert (said.code, server.running(), len(server.boxes)) == (EXIT_NOT_WELL, [], 3), said.err
    assert "3 machines in a row did not come up" in said.err
    assert len({box.offer["machine_id"] for box in server.boxes.values()}) == 3


@pytest.mark.parametrize(
    ("overrides", "train", "word"),
    [
        (("launcher.setup=['exit 3']",), "true", "failed: setup: exit 3 of: exit 3"),
        (("launcher.git_url=/nowhere/at/all",), "true", "failed: git clone: exit"),
        ((), "exit 1", "failed: sweeper launch: exit 1"),
    ],
)
def test_what_fails_on_the_instance_ends_it(
    launch: Any, server: VastServer, instances: Any, overrides: tuple[str, ...], train: str, word: str
) -> None:
    instances.train(train)
    said = launch(*overrides)
    assert (said.code, server.running(), len(server.boxes)) == (EXIT_NOT_WELL, [], 1), (
        said.err + server.logs()
    )
    assert f"sweep simple: {word}" in said.err


def test_the_time_limit_ends_it_and_counts_on_in_the_next_launch(
    launch: Any, server: VastServer, instances: Any
) -> None:
    instances.train("sleep 60 & wait")
    said = launch("launcher.time_limit_h=0.0012")
    assert (said.code, server.running()) == (EXIT_NOT_WELL, []), said.err + server.logs()
    assert "sweep simple is not complete on VastAI" in said.err
    num = len(server.boxes)
    again = launch("launcher.time_limit_h=0.0012")
    assert (again.code, len(server.boxes)) == (EXIT_NOT_WELL, num)
    assert "the time limit is reached" in again.err
    instances.train("true")
    more = launch("launcher.time_limit_h=1")
    assert (more.code, server.running()) == (EXIT_OK, [])


def test_the_budget_ends_it_even_if_the_instance_does_not(
    launch: Any, server: VastServer, instances: Any
) -> None:
    """Its own request to be destroyed never arrives; the launcher's does."""
    instances.train("sleep 60 & wait")
    server.environment["VAST_URL"] = "http://127.0.0.1:9"
    said = launch("launcher.budget_usd=0.0003")
    assert (said.code, server.running()) == (EXIT_NOT_WELL, []), said.err + server.logs()
    assert "the budget is spent" in said.err


def test_a_destroy_that_is_refused_is_tried_again(launch: Any, server: VastServer, instances: Any) -> None:
    instances.train("exit 1")
    server.environment["VAST_URL"] = "http://127.0.0.1:9"
    server.fault("DELETE", times=6, status=429, body="API requests too frequent", kind="text/plain")
    renting_leave, renting.planning.LEAVE_S = renting.planning.LEAVE_S, 0.5
    try:
        said = launch()
    finally:
        renting.planning.LEAVE_S = renting_leave
    assert (said.code, server.running()) == (EXIT_NOT_WELL, []), said.err


def test_a_destroy_that_never_works_is_loud(
    launch: Any, server: VastServer, instances: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    instances.train("exit 1")
    server.fault("DELETE", times=10**6, status=500)
    monkeypatch.setattr(renting, "END_WITHIN_S", 1.0)
    monkeypatch.setattr(renting.planning, "LEAVE_S", 0.5)
    said = launch()
    (box,) = server.there()
    assert said.code == EXIT_NOT_WELL
    assert f"INSTANCE {box.number} MAY STILL RUN, AND COST" in said.err
    assert f"vastai destroy instance {box.number} -y" in said.err
    server.faults.clear()
    again = launch("launcher.budget_usd=0.000001")
    assert (again.code, server.running(), len(server.boxes)) == (EXIT_NOT_WELL, [], 1), again.err


def test_listings_that_do_not_come_or_lie_once_change_nothing(
    launch: Any, server: VastServer, instances: Any
) -> None:
    instances.train("while [ ! -e $FAKE/go ]; do sleep 0.1; done")

    def trouble() -> None:
        server.until(lambda: begun(server))
        empty = '{"instances": [], "next_token": null}'
        for fault in (
            dict(status=429, body="API requests too frequent", kind="text/plain", times=3),
            dict(status=200, body="<html>busy</html>", kind="text/html", times=1),
            dict(status=200, body=empty, times=1),
            dict(status=200, body='[{"x": 1}]', times=1),
            dict(status=0, times=3),
        ):
            made = server.fault("GET /api/v1/instances", **fault)
            server.until(lambda made=made: made.times == 0)
            calls = len(server.calls)
            server.until(lambda calls=calls: any("v1/instances" in call for call in server.calls[calls:]))
        (instances.folder / "go").touch()

    helper = meanwhile(trouble)
    said = launch()
    helper.join()
    assert (said.code, server.running(), len(server.boxes)) == (EXIT_OK, [], 1), said.err + server.logs()


def test_a_copy_that_fails_keeps_the_instance_and_the_next_launch_completes_it(
    launch: Any, server: VastServer, instances: Any
) -> None:
    instances.overrides["launcher.save"] = "['test -e \"$FAKE/store\"']"
    said = launch()
    (box,) = server.there()
    assert (said.code, box.actual, box.pids()) == (EXIT_NOT_WELL, "stopped", []), said.err + server.logs()
    assert f"INSTANCE {box.number} IS STOPPED, NOT DESTROYED" in said.err
    assert "it costs $0.24 a day" in said.err
    (instances.folder / "store").touch()
    again = launch()
    assert (again.code, server.running(), len(server.boxes)) == (EXIT_OK, [], 1), again.err + server.logs()


# --- launchers that end --------------------------------------------------------------------------


def start(launch_overrides: dict[str, str], *more: str) -> subprocess.Popen[str]:
    overrides = [f"{key}={value}" for key, value in launch_overrides.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "sweeper", "launch", "+sweep=simple", *overrides, *more],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip


def test_a_killed_launcher_is_followed_by_another_or_by_nobody(
    client: Path, launch: Any, sweeper: Any, server: VastServer, instances: Any
) -> None:
    instances.train("while [ ! -e $FAKE/go ]; do sleep 0.1; done")
    first = start(instances.overrides)
    server.until(lambda: begun(server))
    server.until(lambda: '"up_at_s": 1' in STATE.read_text())
    first.kill()
    first.wait()
    assert len(server.running()) == 1
    second = start(instances.overrides)
    assert second.stderr is not None
    server.until(lambda: "going on with instance" in second.stderr.readline())
    second.send_signal(signal.SIGINT)
    _, err = second.communicate(timeout=30)
    assert second.returncode == EXIT_INTERRUPTED
    assert "goes on without this launcher, and ends itself" in err
    assert "End it now: sweeper vast destroy simple" in err
    server.is_heard_out = False
    (instances.folder / "go").touch()
    server.until(lambda: server.running() == [])
    server.is_heard_out = True
    third = sweeper("resume", "simple")
    assert (third.code, server.running(), server.most_at_once) == (EXIT_OK, [], 1), third.err


def test_a_launcher_that_died_before_it_knew_its_instance_finds_it(
    client: Path, launch: Any, server: VastServer, instances: Any
) -> None:
    first = start(instances.overrides)
    server.on_create = first.kill
    first.wait()
    server.on_create = lambda: None
    server.until(lambda: server.boxes)
    assert state()["rentals"][0]["instance_id"] is None
    said = launch()
    assert (said.code, server.running(), len(server.boxes)) == (EXIT_OK, [], 1), said.err


def test_two_launchers_do_not_follow_one_sweep(
    client: Path, launch: Any, server: VastServer, instances: Any
) -> None:
    instances.train("while [ ! -e $FAKE/go ]; do sleep 0.1; done")
    first = start(instances.overrides)
    server.until(lambda: begun(server))
    said = launch()
    assert said.code == EXIT_CONFIG
    assert "another launcher follows simple on VastAI" in said.err
    (instances.folder / "go").touch()
    first.communicate(timeout=60)
    assert (first.returncode, server.running()) == (EXIT_OK, [])


# --- verbs -----------------------------------------------------------------------------------------


def test_verbs_touch_only_what_carries_our_label(
    launch: Any, sweeper: Any, server: VastServer, instances: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sweeper.launch.vast import verbs

    monkeypatch.setattr(verbs, "PAUSE_S", 0.05)
    instances.train("echo in training; sleep 60 & wait")
    body = {"onstart": "sleep 60", "env": {}, "label": "mine", "image": "i", "price": None}
    server.answer("PUT", "/api/v0/asks/103/", body, "ac" * 32)
    assert launch("--detach").code == EXIT_OK
    foreign, own = server.there()
    server.until(lambda: begun(server, 1))
    listed = sweeper("vast", "list", "--json")
    assert [row["instance_id"] for row in json.loads(listed.out)] == [own.number]
    assert f"{own.number}  simple  running  1x RTX 4090  0.4000" in sweeper("vast", "list").out
    assert "in training" in sweeper("vast", "logs", "simple").out
    for action in ("logs", "stop", "destroy"):
        assert sweeper("vast", action, str(foreign.number)).code == EXIT_NOT_WELL
        assert sweeper("vast", action, "mine").code == EXIT_NOT_WELL
    assert sweeper("vast", "stop", "simple").code == EXIT_OK
    assert (own.actual, foreign.actual) == ("stopped", "running")
    assert sweeper("vast", "destroy", "simple").code == EXIT_OK
    assert server.there() == [foreign]


# --- secrets -----------------------------------------------------------------------------------------

CANARY = "CANARY" + "0123456789abcdef" * 2


def test_keys_are_in_the_environment_of_the_instance_and_nowhere_else(
    vastai: Path,
    launch: Any,
    server: VastServer,
    instances: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SWEEPER_VASTAI", str(vastai))  # a process of its own for each call
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setenv("SPACED", f"{CANARY} and more, with spaces=signs")
    instances.train('[ "$SPACED" = "$WANDB_API_KEY and more, with spaces=signs" ]')
    seen: list[str] = []

    def look() -> None:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and entry.name != str(os.getpid()):
                try:
                    seen.append((entry / "cmdline").read_bytes().decode(errors="replace"))
                except OSError:
                    continue

    server.on_create = look
    said = launch("launcher.env=[WANDB_API_KEY,SPACED]", "+trainer.key=${oc.env:WANDB_API_KEY}")
    assert (said.code, server.running()) == (EXIT_OK, []), said.err + server.logs()
    (creation,) = server.creations
    assert creation.pop("env") == {"WANDB_API_KEY": CANARY, "SPACED": f"{CANARY} and more, with spaces=signs"}
    assert any("runpy" in line for line in seen), "the client was seen while it waited"
    assert CANARY not in "".join(seen)
    assert CANARY not in json.dumps(creation) + said.err + said.out + server.logs()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    key = "ac" * 32
    assert [path for path in files if key.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    "override",
    [f"+trainer.key={CANARY}", f"launcher.setup=['export KEY={CANARY}']", f"launcher.query='x={CANARY}'"],
)
def test_a_key_in_an_override_or_a_line_is_refused(
    launch: Any, server: VastServer, override: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    said = launch(override)
    assert (said.code, server.creations) == (EXIT_CONFIG, [])
    assert "would hold the value of WANDB_API_KEY" in said.err
    assert CANARY not in said.err


def test_a_client_that_would_show_values_is_refused(
    launch: Any, server: VastServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(os.environ["SWEEPER_VASTAI"])} "$@"\n')
    wrapper.chmod(0o700)
    monkeypatch.setenv("SWEEPER_VASTAI", str(wrapper))
    said = launch()
    assert (said.code, server.creations) == (EXIT_CONFIG, [])
    assert "is not a script that names its Python" in said.err


def test_without_a_copy_or_a_client_or_a_variable_nothing_is_rented(
    launch: Any, server: VastServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "needs a place where the sweep survives" in launch("launcher.save=[]").err
    assert "mirror.url is a directory" in launch("launcher.save=[]", "mirror.url=x", "--dry-run").err
    assert "launcher.env names NO_SUCH" in launch("launcher.env=[NO_SUCH]").err
    monkeypatch.setenv("QUOTED", "it's")
    assert "its value has quotes" in launch("launcher.env=[QUOTED]").err
    monkeypatch.setenv("SWEEPER_VASTAI", "/nowhere/vastai")
    said = launch()
    assert (said.code, server.creations) == (EXIT_CONFIG, [])
    assert re.search("needs the program `vastai`.*pipx install vastai", said.err)


def test_a_directory_is_made_whole_before_lines_carry_it_away(launch: Any, server: VastServer) -> None:
    said = launch("--dry-run", f"mirror.url={Path.cwd()}/copy")
    (save,) = [line for line in said.out.splitlines() if line.startswith("save=(")]
    assert (said.code, save.index("copies check") < save.index("exit 0")) == (EXIT_OK, True)


def test_a_server_that_does_not_answer_is_one_sentence_with_what_to_do(
    sweeper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAST_URL", "http://127.0.0.1:9")
    said = sweeper("vast", "list")
    assert (said.code, said.out) == (EXIT_NOT_WELL, "")
    assert said.err.startswith(
        "sweeper: vastai show instances: VastAI does not answer: 127.0.0.1: Connection refused. Check the network"
    )
    assert len(said.err.splitlines()) == 1
    assert "requests.exceptions" not in said.err
