"""TensorBoard beside a sweep: when it is started, where, what is said, and that nothing is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sweeper import processes
from sweeper.errors import ConfigError
from sweeper.launch import tensorboard
from sweeper.launch.tensorboard import Board, BoardSettings, free_port

STANDS_IN = "import time; time.sleep(60)"


def settings(**board: Any) -> BoardSettings:
    return BoardSettings.from_config({"tensorboard": board})


def until(condition: Callable[[], Any], what: str, limit_s: float = 60.0) -> Any:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"it did not happen that {what}")


def is_gone(pid: int) -> bool:
    return processes.start_ticks(pid) is None


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(tensorboard, "PROGRAM", ("-c", STANDS_IN))
    return []


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("board", "is_wanted"),
    [
        ({}, False),
        ({"dir": "/tmp/tf"}, True),
        ({"dir": ""}, False),
        ({"dir": "/tmp/tf", "auto": 1}, True),
        ({"dir": "/tmp/tf", "auto": True}, True),
        ({"dir": "/tmp/tf", "auto": 0}, False),
        ({"dir": "/tmp/tf", "auto": False}, False),
        ({"dir": "/tmp/tf", "enabled": False}, False),
        ({"dir": None, "auto": 1}, False),
    ],
)
def test_it_is_wanted_where_all_runs_write_to_one_place(board: dict[str, Any], is_wanted: bool) -> None:
    assert settings(**board).is_wanted == is_wanted


def test_a_sweep_of_an_older_version_has_defaults() -> None:
    assert settings(dir="/tmp/tf") == BoardSettings("/tmp/tf", True, 6006, "localhost")
    assert BoardSettings.from_config({}) == BoardSettings()


@pytest.mark.parametrize(
    "board",
    [{"auto": "perhaps"}, {"auto": 2}, {"port": "http"}, {"port": 70000}, {"port": True}, {"host": ""}],
)
def test_what_cannot_be_used_is_named(board: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"tracking\.tensorboard\.{next(iter(board))}=") as caught:
        settings(**board)
    assert caught.value.do


# --- ports -------------------------------------------------------------------------------------


def test_a_taken_port_is_passed_over(taken: int) -> None:
    found = free_port("localhost", taken)
    assert found != taken
    assert free_port("127.0.0.1", found) == found


def test_any_port() -> None:
    assert free_port("localhost", 0) > 0


def test_a_host_that_is_not_here() -> None:
    with pytest.raises(socket.gaierror):
        free_port("no.such.host.invalid", 6006)


# --- what is said ------------------------------------------------------------------------------


def test_not_wanted_is_not_started(said: list[str], tmp_path: Path) -> None:
    with Board(settings(dir=str(tmp_path), auto=0), say=said.append) as board:
        board.start()
        board.look()
    assert said == []


def test_it_is_told_where_it_is_and_ends_with_the_block(said: list[str], tmp_path: Path, taken: int) -> None:
    with Board(settings(dir=str(tmp_path / "a" / "b"), port=taken), say=said.append) as board:
        board.start()
        board.look()
        assert board._process is not None
        pid = board._process.pid
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    assert is_gone(pid)
    port = int(words[words.index(b"--port") + 1])
    assert port != taken
    assert said == [f"[TENSORBOARD] http://localhost:{port}/ (pid {pid}) shows {tmp_path}/a/b"]
    assert words[words.index(b"--logdir") + 1] == os.fsencode(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_one_that_ignores_the_end_is_killed(
    said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = "import signal, time, pathlib, sys; signal.signal(15, 1); pathlib.Path(sys.argv[2], 'up').touch(); time.sleep(60)"
    monkeypatch.setattr(tensorboard, "PROGRAM", ("-c", deaf))
    monkeypatch.setattr(tensorboard, "END_WAIT_S", 0.1)
    with Board(settings(dir=str(tmp_path)), say=said.append) as board:
        board.start()
        until((tmp_path / "up").exists, "it was up")
        assert board._process is not None
        pid = board._process.pid
    assert is_gone(pid)


def test_one_that_dies_at_once_is_one_warning(
    said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard, "PROGRAM", ("-c", "raise SystemExit('no protobuf here')"))
    with Board(settings(dir=str(tmp_path)), say=said.append) as board:
        board.start()
        until(lambda: board.look() or len(said) > 1, "it died")
        board.look()
    assert len(said) == 2
    assert "(exit code 1: no protobuf here)" in said[1]
    assert f"tensorboard --logdir {tmp_path}" in said[1]


def test_one_whose_port_was_taken_meanwhile_is_started_elsewhere(
    said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    """Two launches at once: each finds the port free, one gets it."""
    real = tensorboard.free_port
    monkeypatch.setattr(tensorboard, "free_port", lambda host, wanted: taken)
    monkeypatch.setattr(tensorboard, "PROGRAM", ("-c", "raise SystemExit(1)"))
    with Board(settings(dir=str(tmp_path)), say=said.append) as board:
        board.start()
        monkeypatch.setattr(tensorboard, "free_port", real)
        monkeypatch.setattr(tensorboard, "PROGRAM", ("-c", STANDS_IN))
        until(lambda: board.look() or len(said) > 1, "it was started again")
        board.look()
    assert f":{taken}/" in said[0]
    assert f":{taken}/" not in said[1]
    assert [line.startswith("[TENSORBOARD] http://") for line in said] == [True, True]


@pytest.mark.parametrize(
    ("board", "reason"),
    [
        ({"dir": "/proc/nowhere"}, "/proc/nowhere"),
        ({"dir": "/tmp", "host": "no.such.host.invalid"}, "cannot listen on the host 'no.such.host.invalid'"),
        (
            {"dir": "/tmp", "host": "192.0.2.1"},
            "set TB_HOST, or tracking.tensorboard.host, to one of this machine",
        ),
    ],
)
def test_what_keeps_it_from_starting_is_one_warning(
    said: list[str], board: dict[str, Any], reason: str
) -> None:
    with Board(settings(**board), say=said.append) as made:
        made.start()
        made.look()
    (line,) = said
    assert line.startswith("[TENSORBOARD] no TensorBoard beside this sweep: ")
    assert reason in line


def test_not_installed_is_one_warning(
    said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with Board(settings(dir=str(tmp_path)), say=said.append) as board:
        board.start()
    (line,) = said
    assert "not installed" in line
    assert "TB_AUTO=0" in line


def test_it_gets_no_database_password(
    said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEPER_STORAGE", "postgresql://me:secret@db/sweeper")
    monkeypatch.setenv("PGPASSWORD", "secret")
    with Board(settings(dir=str(tmp_path)), say=said.append) as board:
        board.start()
        assert board._process is not None
        assert b"secret" not in Path(f"/proc/{board._process.pid}/environ").read_bytes()


# --- the real program --------------------------------------------------------------------------

LAUNCHER = """
import sys, time
from sweeper.launch.tensorboard import Board, BoardSettings
with Board(BoardSettings(sys.argv[1], port=0), say=lambda text: print(text, flush=True)) as board:
    board.start()
    while sys.stdin.readline():
        board.look()
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_killed", [False, True], ids=["ended", "killed"])
def test_the_real_one_serves_and_goes_with_its_launcher(tmp_path: Path, is_killed: bool) -> None:
    (tmp_path / "simple" / "simple.r.00000").mkdir(parents=True)
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert launcher.stdin is not None
    assert launcher.stdout is not None
    line = launcher.stdout.readline()
    url, pid = line.split()[1], int(line.split("(pid ")[1].split(")")[0])
    until(lambda: f'"data_location": "{tmp_path}"' in read(f"{url}data/environment"), "it served")
    family = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    if is_killed:
        launcher.send_signal(signal.SIGKILL)
    else:
        launcher.stdin.close()
    code = launcher.wait(30)
    if not is_killed:
        assert code == 0
        assert [one for one in family if not is_gone(one)] == []
    until(lambda: all(map(is_gone, family)), "nothing was left")


def read(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""
