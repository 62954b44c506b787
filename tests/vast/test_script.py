"""The script that an instance runs: its text, and what it does when it is run for real, once and twice."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from vast_server import Box, VastServer, offer

from sweeper.errors import ConfigError
from sweeper.launch.vast import script as scripting
from sweeper.launch.vast.plan import Plan

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden.onstart.sh"
HOSTILE = (
    "it's", 'say "hi"', "$(touch hacked)", "`touch hacked`", "a;touch hacked", "a\\", "--", "*", "~", "@SWEEP@",
    "${HOME}", "!!", "é→", "#no", " ", "&& touch hacked",
)  # fmt: skip


def plan(**changes: Any) -> Plan:
    group = yaml.safe_load((ROOT / "conf/launcher/vast.yaml").read_text())
    return Plan.of({**group, **changes})


def text_of(made: Plan, *launch: str, limit_s: float = 3600.0, is_fresh: bool = False) -> str:
    return scripting.script(made, "simple", "5e71e5ed", limit_s=limit_s, launch=launch, is_fresh=is_fresh)


def usual() -> str:
    made = plan(
        git_url="https://github.com/me/mine", git_branch="night", data=["python get.py 'a b'"],
        save=['rclone copy "$SWEEPER_DATA_DIR" store:mine'], restore=['rclone copy store:mine "$SWEEPER_DATA_DIR"'],
    )  # fmt: skip
    launch = scripting.arguments(
        ["+sweep=simple", "trainer.device=cuda", "launcher=vast", "launcher.max_usd_h=1", "data_dir=/here"],
        made, sweep="simple", n_trials=20,
    )  # fmt: skip
    return text_of(made, "sweeper", "launch", *launch)


def test_the_script_is_the_one_that_was_read_and_found_good() -> None:
    assert usual() == GOLDEN.read_text()


def test_a_shell_reads_it_as_it_is_meant(vastai: Path) -> None:
    checked = subprocess.run(
        [str(vastai.with_name("shellcheck")), "--severity=style", "--exclude=SC2016", "-"],
        input=usual(),
        capture_output=True,
        text=True,
    )
    assert checked.stdout == ""


def test_packed_it_has_room_for_overrides() -> None:
    assert len(scripting.packed(usual())) < scripting.MAX_CHARACTERS - 100


def test_what_does_not_fit_is_refused_with_what_to_do() -> None:
    noise = [os.urandom(900).hex()]
    with pytest.raises(ConfigError, match="into a file of the repository"):
        scripting.packed(text_of(plan(data=noise)))


def test_hostile_values_reach_the_sweep_unchanged(tmp_path: Path) -> None:
    """Each as an argument of the launch and as a line of data, through packing and bash."""
    python = tmp_path / "a b" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/bash\nprintf "%s\\0" "$@" >"$SWEEPER_WORKSPACE/arguments"\nmkdir -p "$SWEEPER_DATA_DIR/sweep/$SWEEP/runs"\n')  # fmt: skip
    python.chmod(0o700)
    lines = [f"printf '%s\\0' {shlex.quote(value)} >>\"$SWEEPER_WORKSPACE/lines\"" for value in HOSTILE]
    made = plan(python=str(python), data=lines, auto_shutdown=False, linger_s=0, git_branch=None)
    onstart = tmp_path / "onstart"
    text = text_of(made, *HOSTILE)
    short = "\n".join(line.strip() for line in text.splitlines())
    onstart.write_text(short)
    work = tmp_path / "workspace"
    environment = {
        "PATH": os.environ["PATH"], "SWEEPER_WORKSPACE": str(work), "HOME": str(tmp_path),
        "CONTAINER_ID": "1", "CONTAINER_API_KEY": "k", "VAST_URL": "http://127.0.0.1:9",
    }  # fmt: skip
    work.mkdir()
    log = tmp_path / "log"
    with open(log, "w") as out:
        done = subprocess.run(["bash", str(onstart)], env=environment, cwd=tmp_path, stdout=out, stderr=out, timeout=60)  # fmt: skip
    try:
        assert done.returncode == 0, log.read_text()
        arguments = (work / "arguments").read_text().split("\0")
        assert arguments[1 : 1 + len(HOSTILE)] == list(HOSTILE)
        assert (work / "lines").read_text().split("\0")[:-1] == list(HOSTILE)
        assert not list(tmp_path.rglob("hacked"))
    finally:
        Box(1, {}, {}, tmp_path).kill()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"git_url": "https://me:pw12345678@host/x"}, "GIT_TOKEN"),
        ({"git_url": "https://ghp_TOKEN@github.com/me/mine"}, r"git_url='…' .*GIT_TOKEN"),
        ({"git_url": "HTTP://ghp_TOKEN@host/x"}, "GIT_TOKEN"),
        ({"git_url": "ssh://git:pw12345678@host/x"}, "GIT_TOKEN"),
        ({"git_url": "--upload-pack=touch"}, "can begin with a dash"),
        ({"git_branch": "x"}, "needs launcher.git_url"),
        ({"env": ["VAST_API_KEY"]}, "stays here"),
        ({"env": ["A=b"]}, "names of variables only"),
        ({"gpu_name": "RTX 4090 num_gpus>0"}, "VastAI's name"),
        ({"budget_usd": 0}, "above 0"),
        ({"time_limit_h": None}, "Use a number"),
        ({"bid_usd_h": 0.1}, "interruptible=true"),
        ({"n_worker": 1}, "not known"),
        ({"setup": "pip install ."}, "list of texts"),
        ({"python": "env/bin/python"}, "absolute"),
    ],
)
def test_what_could_only_fail_later_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(**changes)


@pytest.mark.parametrize(
    "url", ["https://github.com/me/a@b", "ssh://git@github.com/me/mine", "git@github.com:me/mine", "/mnt/a@b"]
)
def test_an_address_without_a_secret_is_taken(url: str) -> None:
    assert plan(git_url=url).git_url == url


def test_a_configuration_of_this_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not on the instance"):
        scripting.arguments(["--config-dir", "/home/me/conf", "+sweep=x"], plan(), sweep="x", n_trials=1)
    assert scripting.arguments(["--config-dir", "mine", "+sweep=x"], plan(), sweep="x", n_trials=1)[:2] == ["--config-dir", "mine"]  # fmt: skip


# --- run for real ------------------------------------------------------------------------------


@pytest.fixture
def rented(server: VastServer, instances: Any) -> Callable[..., Box]:
    """An instance that runs the script of a plan, without any launcher."""

    def rent(limit_s: float = 600.0, is_fresh: bool = False, series: str = "5e71e5ed", **changes: Any) -> Box:
        made = plan(**{"python": str(instances.folder / "python"), "linger_s": 0, "poll_s": 0.1, **changes})
        text = scripting.script(
            made, "simple", series, limit_s=limit_s, launch=["sweeper"], is_fresh=is_fresh
        )
        number = 200 + len(server.boxes)
        server.offers.append(offer(number))
        body = {"onstart": text, "env": {}, "label": "sweeper:simple:5e71e5ed:1", "image": "i", "price": None}
        server.answer("PUT", f"/api/v0/asks/{number}/", body, "ac" * 32)
        return list(server.boxes.values())[-1]

    return rent


def trained(box: Box) -> int:
    path = box.work / "sweeper-simple" / "trained"
    return len(path.read_text().splitlines()) if path.exists() else 0


def said(box: Box) -> list[str]:
    return re.findall(r"\[ONSTART 5e71e5ed\] (.*)", box.log.read_text())


@pytest.mark.slow
def test_it_ends_the_instance_when_it_is_done(server: VastServer, rented: Any) -> None:
    box = rented(data=["echo data >>$SWEEPER_WORKSPACE/data"])
    server.until(lambda: server.running() == [])
    assert any(line.startswith("finished: done") for line in said(box))
    assert not (box.work.parent / "home" / ".ssh").exists()


@pytest.mark.slow
def test_it_goes_on_after_a_restart_and_does_nothing_twice(
    server: VastServer, rented: Any, instances: Any
) -> None:
    instances.train("echo x >>$SWEEPER_WORKSPACE/begun; [ -e $FAKE/go ] || sleep 60")
    box = rented(setup=["echo s >>$SWEEPER_WORKSPACE/setup"], data=["echo d >>$SWEEPER_WORKSPACE/data"])
    home = box.work / "sweeper-simple"
    server.until((box.work / "begun").exists)
    (home / "outputs/sweep/simple/kept").touch()
    (instances.folder / "go").touch()
    server.restart(box)
    server.until(lambda: server.running() == [])
    assert ((box.work / "setup").read_text(), (box.work / "data").read_text(), trained(box)) == (
        "s\n",
        "d\n",
        2,
    )
    assert (home / "outputs/sweep/simple/kept").exists()
    assert [line.partition(":")[0] for line in said(box)].count("began") == 2


@pytest.mark.slow
def test_the_limit_ends_it_while_an_install_hangs(server: VastServer, rented: Any) -> None:
    box = rented(limit_s=3, setup=["trap '' TERM; while true; do sleep 1; done"], grace_s=1)
    server.until(lambda: server.running() == [], seconds=20)
    assert any("the limit of 3 s is reached" in line for line in said(box))


@pytest.mark.slow
def test_a_training_is_stopped_before_the_limit_and_its_copy_made(
    server: VastServer, rented: Any, instances: Any
) -> None:
    instances.train("sleep 60 & wait")
    box = rented(limit_s=8, grace_s=8, save=['touch "$SWEEPER_WORKSPACE/saved"'])
    server.until(lambda: server.running() == [], seconds=20)
    assert any(line.startswith("finished: cut: the limit of 8 s is near") for line in said(box))
    assert (box.work / "saved").exists()


@pytest.mark.slow
def test_a_killed_script_does_not_leave_its_instance(server: VastServer, rented: Any, instances: Any) -> None:
    instances.train("touch $FAKE/begun; sleep 60 & wait")
    box = rented(save=['touch "$SWEEPER_WORKSPACE/saved"'])
    server.until((instances.folder / "begun").exists)
    assert box.process is not None
    os.kill(box.process.pid, signal.SIGKILL)
    server.until(lambda: server.running() == [], seconds=20)
    assert any(line.startswith("finished: lost: this script was killed") for line in said(box))
    assert (box.work / "saved").exists()


@pytest.mark.slow
def test_a_refused_destroy_is_asked_for_again(server: VastServer, rented: Any) -> None:
    server.fault("DELETE", times=2, status=429, body="API requests too frequent", kind="text/plain")
    rented()
    server.until(lambda: server.running() == [], seconds=20)
    assert sum(call.startswith("DELETE") for call in server.calls) == 1


@pytest.mark.slow
def test_what_may_be_the_only_copy_is_stopped_and_then_gets_another_try(
    server: VastServer, rented: Any
) -> None:
    box = rented(save=['[ -e "$FAKE/store" ]'])
    server.until(lambda: box.actual == "stopped" and not box.pids(), seconds=40)
    assert any("THE COPY IS NOT COMPLETE" in line for line in said(box))
    assert (box.work / "sweeper-simple/outputs/sweep/simple").exists()
    Path(server.environment["FAKE"], "store").touch()
    server.restart(box)
    server.until(lambda: server.running() == [])
    assert trained(box) == 2


@pytest.mark.slow
def test_fresh_clears_what_it_made_and_nothing_else(server: VastServer, rented: Any, instances: Any) -> None:
    """A disk that is used again: first with what somebody else put there, then with an earlier series' outputs."""
    box = rented(auto_shutdown=False)
    home = box.work / "sweeper-simple"
    server.until(lambda: any(line.startswith("finished: done") for line in said(box)))
    kept = home / "outputs/sweep/simple/model.pth"
    kept.touch()
    box.kill()
    box.body["onstart"] = text_of(plan(python=str(instances.folder / "python"), linger_s=0, poll_s=0.1, auto_shutdown=False), "sweeper", is_fresh=True)  # fmt: skip
    box.start(server.url, server.environment)
    server.until(lambda: sum(line.startswith("finished: done") for line in said(box)) == 2)
    assert kept.exists(), "of the same series: a restart, not a fresh start"
    box.kill()
    (home / "outputs/.onstart").write_text("another0\n")
    box.start(server.url, server.environment)
    server.until(lambda: sum(line.startswith("finished: done") for line in said(box)) == 3)
    assert not kept.exists()
    box.kill()
    (home / "outputs/.onstart").unlink()
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.touch()
    box.start(server.url, server.environment)
    server.until(lambda: any(line.startswith("finished: failed") for line in said(box)))
    assert kept.exists()


@pytest.mark.slow
def test_without_a_key_of_its_own_it_does_not_begin(server: VastServer, rented: Any) -> None:
    server.environment["CONTAINER_API_KEY"] = ""
    box = rented()
    server.until(lambda: any(line.startswith("finished: failed: VastAI gave no") for line in said(box)))
    assert trained(box) == 0
