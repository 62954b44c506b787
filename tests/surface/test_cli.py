"""The commands as people and programs use them: words, output, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from filled import Filled, commit_checkpoint, dead_process

from sweeper import cli, rundir
from sweeper.errors import Fenced, Released, StorageError
from sweeper.launch import command, settings
from sweeper.report import logs, status

VERBS = [
    "worker",
    "list",
    "status",
    "show",
    "best",
    "logs",
    "verify",
    "resume",
    "retry",
    "cancel",
    "rebuild",
    "vast",
    "db",
]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SWEEPER_STORAGE", "SWEEPER_DATA_DIR", "DATA_DIR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def filled(tmp_path: Path) -> Filled:
    return Filled(tmp_path / "outputs")


class Result(SimpleNamespace):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def sweeper(capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> Result:
        code = cli.main(list(arguments))
        captured = capfd.readouterr()
        return Result(code=code, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a recorder in the place of a module's function."""

    def put(module: str, function: str, *, returns: Any = 0, error: BaseException | None = None) -> list[Any]:
        calls: list[Any] = []

        def called(*arguments: Any, **options: Any) -> Any:
            calls.append((arguments, options))
            if error:
                raise error
            return returns

        stand_in = ModuleType(module)
        setattr(stand_in, function, called)
        monkeypatch.setitem(sys.modules, module, stand_in)
        return calls

    return put


# --- the command line ----------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(sweeper: Any, verb: str) -> None:
    result = sweeper(verb, "--help")
    assert result.code == 0
    assert f"usage: sweeper {verb}" in result.out
    assert "--storage" in result.out


def test_help_names_every_verb(sweeper: Any) -> None:
    result = sweeper("--help")
    assert result.code == 0
    assert all(f"\n  {verb} " in result.out for verb in ["launch", *VERBS])


def test_version(sweeper: Any) -> None:
    assert sweeper("--version").out == "sweeper 0.1.0\n"


def test_no_verb_is_a_usage_error(sweeper: Any) -> None:
    result = sweeper()
    assert (result.code, result.out) == (2, "")
    assert "usage: sweeper" in result.err


def test_unknown_verb_suggests(sweeper: Any) -> None:
    result = sweeper("lsit")
    assert (result.code, result.out) == (2, "")
    assert result.err == "sweeper: there is no command 'lsit'. Did you mean list?\n"
    assert "There are launch, worker, list" in sweeper("zzz").err


@pytest.mark.parametrize(
    "arguments",
    [["list", "--nonsense"], ["list", "--incompl"], ["list", "--state", "broken"], ["show"], ["db", "drop"]],
)
def test_usage_errors(sweeper: Any, arguments: list[str]) -> None:
    result = sweeper(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "usage:" in result.err


@pytest.mark.parametrize("before", [True, False])
def test_global_options_before_and_after_the_verb(sweeper: Any, tmp_path: Path, before: bool) -> None:
    filled = Filled(tmp_path / "elsewhere")
    filled.run(0)
    options = ["--data-dir", "elsewhere"]
    result = sweeper(*options, "list", "--json") if before else sweeper("list", "--json", *options)
    assert [row["path"] for row in result.json] == ["elsewhere/sweep/simple/runs/simple.r.00000"]


def test_options_win_over_environment_and_defaults(
    sweeper: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c", "outputs"):
        Filled(tmp_path / name).sweep(name)

    def looked_at(*arguments: str) -> str:
        return str(sweeper("status", "--json", *arguments).json[0]["sweep"])

    assert looked_at() == "outputs"
    monkeypatch.setenv("DATA_DIR", "a")
    assert looked_at() == "a"
    monkeypatch.setenv("SWEEPER_DATA_DIR", "b")
    assert looked_at() == "b"
    monkeypatch.setenv("SWEEPER_STORAGE", "sqlite:///c/sweeper.db")
    assert looked_at() == "c"
    assert looked_at("--storage", "sqlite:///a/sweeper.db") == "a"


def test_launch_gets_everything_unparsed(sweeper: Any, fake: Any) -> None:
    calls = fake("sweeper.launch.command", "main", returns=75)
    arguments = ["+sweep=simple", "--cfg", "job", "--help", "-m", "sweep.params={a: 'x y'}", "--storage"]
    assert sweeper("launch", *arguments).code == 75
    assert calls == [((arguments,), {"template": None})]


def test_launch_takes_global_options_as_overrides(sweeper: Any, fake: Any) -> None:
    calls = fake("sweeper.launch.command", "main")
    fake("sweeper.launch.ahead", "template_for", returns="ahead")
    sweeper("--debug", "--data-dir", "/tmp/a b", "launch", "+sweep=simple", "--debug")
    assert calls == [((["data_dir='/tmp/a b'", "+sweep=simple"],), {"template": "ahead"})]


@pytest.mark.parametrize(
    ("arguments", "is_ahead"),
    [
        ([], True),
        (["launcher.n_workers=2", "--config-dir", "mine"], True),
        (["launcher=local"], True),
        (["launcher=slurm"], False),
        (["--cfg", "job"], False),
        (["--dry-run"], False),
        (["--help"], False),
    ],
)
def test_torch_is_imported_ahead_only_for_local_workers(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], is_ahead: bool
) -> None:
    from sweeper.launch import ahead

    monkeypatch.setattr(ahead, "Template", object)
    assert (ahead.template_for(["+sweep=simple", *arguments]) is not None) == is_ahead


@pytest.mark.parametrize(
    ("arguments", "module", "function", "positional", "options"),
    [
        (
            ["worker", "simple"],
            "sweeper.worker",
            "main",
            ("simple",),
            {"name": None, "launcher_fd": None, "server_fd": None},
        ),
        (
            ["worker", "simple", "--name", "w1", "--launcher-fd", "3", "--server-fd", "4"],
            "sweeper.worker",
            "main",
            ("simple",),
            {"name": "w1", "launcher_fd": 3, "server_fd": 4},
        ),
        (["resume", "simple"], "sweeper.launch.command", "resume", ("simple",), {"template": "ahead"}),
        (["retry", "simple.r.00001"], "sweeper.manage", "retry", ("simple.r.00001",), {}),
        (["cancel", "simple"], "sweeper.manage", "cancel", ("simple",), {}),
        (["db", "upgrade"], "sweeper.manage", "upgrade", (), {}),
    ],
)
def test_verbs_that_act(
    sweeper: Any,
    fake: Any,
    arguments: list[str],
    module: str,
    function: str,
    positional: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    fake("sweeper.launch.ahead", "template_for", returns="ahead")
    calls = fake(module, function, returns=1)
    assert sweeper(*arguments).code == 1
    where = {"storage": "sqlite:///outputs/sweeper.db", "data_dir": Path("outputs")}
    assert calls == [(positional, {**where, **options})]


def test_rebuild_makes_the_database_where_the_directory_is(
    sweeper: Any, fake: Any, filled: Filled, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled.directory("simple.r.00000")
    calls = fake("sweeper.rebuild", "main")
    monkeypatch.setenv("DATA_DIR", "/elsewhere")
    sweeper("rebuild", "outputs")
    sweeper("rebuild", "outputs/sweep/simple")
    where = {"storage": "sqlite:///outputs/sweeper.db", "data_dir": Path("outputs")}
    assert calls == [((Path("outputs"),), where), ((Path("outputs/sweep/simple"),), where)]
    assert sweeper("rebuild", "nowhere").code == 1


# --- errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StorageError("the database is gone", why="no disk", do="Buy one."), 78),
        (Fenced("lost"), 76),
        (Released("handed back"), 75),
    ],
)
def test_our_errors_are_one_paragraph(sweeper: Any, fake: Any, error: Exception, code: int) -> None:
    fake("sweeper.worker", "main", error=error)
    result = sweeper("worker", "simple")
    assert (result.code, result.out, result.err) == (code, "", f"sweeper: {error}\n")


def test_traceback_only_with_debug(sweeper: Any, fake: Any) -> None:
    fake("sweeper.worker", "main", error=KeyError("x"))
    result = sweeper("worker", "simple")
    assert result.code == 1
    assert len(result.err.splitlines()) == 1
    assert "unexpected KeyError: 'x'" in result.err
    assert "--debug" in result.err
    assert "Traceback" in sweeper("worker", "simple", "--debug").err
    assert "Traceback" in sweeper("--debug", "worker", "simple").err


def test_hostile_error_text_does_not_reach_the_terminal(sweeper: Any) -> None:
    result = sweeper("show", "a\x1b[2J\nb")
    assert result.code == 1
    assert "\x1b" not in result.err
    assert len(result.err.splitlines()) == 1


def test_operating_system_errors_name_the_file(sweeper: Any, fake: Any) -> None:
    fake("sweeper.worker", "main", error=OSError(28, "No space left on device", "/data/x"))
    assert sweeper("worker", "s").err.startswith("sweeper: /data/x: No space left on device.")


def test_interrupt(sweeper: Any, fake: Any) -> None:
    fake("sweeper.worker", "main", error=KeyboardInterrupt())
    result = sweeper("worker", "simple")
    assert (result.code, result.err) == (130, "")


@pytest.mark.parametrize(("stop", "code"), [(None, 0), (75, 75), ("no", 1)])
def test_system_exit_is_an_exit_code(sweeper: Any, fake: Any, stop: object, code: int) -> None:
    fake("sweeper.worker", "main", error=SystemExit(stop))
    assert sweeper("worker", "simple").code == code


def test_closed_pipe_is_quiet(filled: Filled) -> None:
    for number in range(50):
        filled.run(number, params=json.dumps({"x": "y" * 5000}))
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "sweeper", "list", "--storage", filled.url]
    process = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (process.returncode, process.stderr) == (141, "")


# --- list ----------------------------------------------------------------------------------


def test_list(sweeper: Any, filled: Filled) -> None:
    filled.run(0, value=0.875, outcome="completed", global_step=500, total_steps=500, checkpoint_step=500)
    filled.run(1, state="running", global_step=120, total_steps=500, checkpoint_step=100)
    filled.run(2, state="running", owner=json.dumps(asdict(dead_process())))
    result = sweeper("list")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [
        "RUN             TRIAL  STATE      LEASE       STEP  CHECKPOINT  ATTEMPTS  VALUE  OUTCOME    PARAMS",
        "simple.r.00000      0  completed  -        500/500         500         1  0.875  completed  lr=0.01 width=32",
        "simple.r.00001      1  running    live     120/500         100         1      -  -          lr=0.01 width=32",
        "simple.r.00002      2  running    expired        0           -         1      -  -          lr=0.01 width=32",
    ]
    assert [row["run_id"] for row in sweeper("list", "--incomplete", "--json").json] == [
        "simple.r.00001",
        "simple.r.00002",
    ]
    assert [row["lease"] for row in sweeper("list", "simple", "--json").json] == ["none", "live", "expired"]
    assert sweeper("list", "--state", "failed").out == ""


@pytest.mark.parametrize(
    ("flags", "out"), [([], ""), (["--json"], "[]\n"), (["--incomplete", "--json"], "[]\n")]
)
def test_list_without_a_database(sweeper: Any, flags: list[str], out: str) -> None:
    result = sweeper("list", *flags)
    assert (result.code, result.out) == (0, out)
    assert result.err == "sweeper: there is no database yet at sqlite:///outputs/sweeper.db\n"


def test_list_of_an_unknown_sweep(sweeper: Any, tmp_path: Path) -> None:
    result = sweeper("list", "simple", "--json")
    assert (result.code, result.out) == (1, "")
    assert "sweep 'simple' does not exist" in result.err
    Filled(tmp_path / "outputs").sweep("simple")
    assert "Did you mean simple?" in sweeper("list", "simpl").err


def test_list_of_a_bad_database(sweeper: Any, tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "sweeper.db").write_text("nonsense" * 100)
    assert sweeper("list").code == 78
    assert sweeper("list", "--storage", "mysql://x:secret@y").code == 78
    assert "secret" not in sweeper("list", "--storage", "mysql://x:secret@y").err


def test_hostile_values_are_escaped(sweeper: Any, filled: Filled) -> None:
    run_id = filled.run(
        0,
        state="failed",
        outcome="crashed",
        reason="\x1b]0;owned\x07",
        params=json.dumps({"a\x1b[2J": "b\nc"}),
    )
    filled.attempt(run_id, outcome="crashed", reason="\x1b[1m", detail="Traceback\n  \x1b[31mValueError\n")
    run_dir = filled.directory(run_id)
    rundir.attempt_log(run_dir, 1).write_bytes(b"fine\n\x1b[2Jbad\xff\n")
    for arguments in (["list"], ["show", run_id], ["status", run_id], ["status"], ["status", "simple"]):
        result = sweeper(*arguments)
        assert result.code == 0
        assert not set("\x1b\x07\x9b") & set(result.out + result.err)
    assert sweeper("list", "--json").json[0]["params"] == {"a\x1b[2J": "b\nc"}


# --- status --------------------------------------------------------------------------------


def fill_a_sweep(filled: Filled) -> None:
    filled.sweep(n_trials=4)
    filled.run(0, value=0.9)
    filled.run(1, value=0.95, attempts=2, global_step=500)
    filled.attempt("simple.r.00001", 1, start_step=0, end_step=110, outcome="lost")
    filled.attempt("simple.r.00001", 2, start_step=100, end_step=500, outcome="completed")
    filled.run(2, state="failed")
    filled.run(3, state="running", global_step=120, total_steps=500)


def test_status_of_a_sweep(sweeper: Any, filled: Filled) -> None:
    fill_a_sweep(filled)
    result = sweeper("status", "simple")
    assert result.code == 0
    assert result.out.splitlines()[:4] == [
        "simple: 3 of 4 trials done (2 completed, 1 failed), 1 running",
        "best accuracy 0.95 by simple.r.00001: lr=0.01 width=32",
        "1 runs resumed: 100 steps recovered, 10 lost, goodput 0.980 (1 of 1 resumes went on)",
        "",
    ]
    assert "simple.r.00003      3  running  live   120/500" in result.out
    shown = sweeper("status", "simple", "--json").json
    assert shown["counts"]["done"] == 3
    assert shown["best"]["run_id"] == "simple.r.00001"
    assert [run["run_id"] for run in shown["open_runs"]] == ["simple.r.00003"]
    assert not shown["is_complete"]


def test_status_of_everything_and_of_a_run(sweeper: Any, filled: Filled) -> None:
    fill_a_sweep(filled)
    filled.sweep("other")
    assert [line.split()[0] for line in sweeper("status").out.splitlines()] == ["SWEEP", "other", "simple"]
    assert [sweep["sweep"] for sweep in sweeper("status", "--json").json] == ["other", "simple"]
    assert sweeper("status", "simple.r.00003", "--json").json["global_step"] == 120


def test_status_of_directories(sweeper: Any, filled: Filled, tmp_path: Path) -> None:
    fill_a_sweep(filled)
    filled.directory("simple.r.00003", marker=True)
    assert sweeper("status", "outputs/sweep/simple", "--json").json["sweep"] == "simple"
    assert sweeper("status", str(tmp_path / "outputs"), "--json").json[0]["sweep"] == "simple"
    run_dir = "outputs/sweep/simple/runs/simple.r.00003"
    assert sweeper("status", run_dir, "--json").json["path"] == run_dir
    assert sweeper("status", f"{tmp_path}/").code == 1


def test_status_of_directories_without_a_database(sweeper: Any, filled: Filled) -> None:
    done = filled.directory("simple.r.00000")
    rundir.write_result(done, lease_epoch=1, state="completed", value=0.5, reason="")
    commit_checkpoint(filled.directory("simple.r.00001", marker=True), step=40)
    filled.path.unlink()
    result = sweeper("status", "outputs/sweep/simple", "--json")
    assert result.code == 0
    assert "rebuild" in result.err
    assert result.json["counts"]["completed"] == 1
    (run,) = result.json["open_runs"]
    assert (run["run_id"], run["state"], run["lease"], run["checkpoint_step"]) == (
        "simple.r.00001",
        "running",
        "live",
        40,
    )
    assert sweeper("status", "outputs").out.splitlines()[1].startswith("simple")
    assert sweeper("status", "outputs/sweep/simple/runs/simple.r.00000", "--json").json["value"] == 0.5


def test_status_watch_prints_changes_until_complete(
    filled: Filled, capfd: pytest.CaptureFixture[str]
) -> None:
    filled.sweep(n_trials=1)
    filled.run(0, state="running", global_step=1, total_steps=9)
    changes = iter(["global_step=global_step", "global_step=5", "state='completed', value=0.5"])

    def sleep(_: float) -> None:
        filled.execute(f"UPDATE sweeper_run SET {next(changes)}")

    options: dict[str, Any] = {
        "storage": filled.url,
        "data_dir": filled.data_dir,
        "watch": True,
        "sleep": sleep,
    }
    assert status.main("simple", as_json=False, **options) == 0
    assert capfd.readouterr().out.splitlines() == [
        "simple: 0/1 done, 1 running, simple.r.00000 1/9",
        "simple: 0/1 done, 1 running, simple.r.00000 5/9",
        "simple: 1/1 done, best 0.5 (simple.r.00000)",
    ]
    assert status.main("simple", as_json=True, **options) == 0
    assert json.loads(capfd.readouterr().out)["is_complete"]


def test_status_watch_redraws_on_a_terminal(
    filled: Filled, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled.sweep(n_trials=1)
    filled.run(0, state="running")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

    def sleep(_: float) -> None:
        filled.execute("UPDATE sweeper_run SET state='completed'")

    status.main(
        "simple", storage=filled.url, data_dir=filled.data_dir, watch=True, as_json=False, sleep=sleep
    )
    assert "1 of 1 trials done" in capfd.readouterr().out


def test_status_of_nothing(sweeper: Any) -> None:
    assert sweeper("status", "--json").out == "[]\n"
    assert sweeper("status").out == ""
    assert sweeper("status", "--watch").code == 0
    assert sweeper("status", "simple").code == 1


# --- show and best -------------------------------------------------------------------------


def test_show(sweeper: Any, filled: Filled) -> None:
    run_id = filled.run(0, state="failed", outcome="crashed", reason="ValueError: no", attempts=2)
    filled.attempt(
        run_id, 1, start_step=0, end_step=40, checkpoint_step=40, outcome="lost", reason="its process is gone"
    )
    filled.attempt(
        run_id, 2, start_step=40, end_step=50, outcome="crashed", detail="Traceback\n  ValueError: no"
    )
    run_dir = filled.directory(run_id)
    commit_checkpoint(run_dir, step=20)
    newest = commit_checkpoint(run_dir, step=40)
    (newest / "model.pth").write_bytes(b"weights of step 4O")
    rundir.attempt_log(run_dir, 1).write_text("of the first\n")
    rundir.attempt_log(run_dir, 2).write_text("".join(f"line {number}\n" for number in range(9)))
    shown = sweeper("show", run_id, "--json").json
    assert shown["overrides"] == ["trainer.lr=0.01", "trainer.width=32"]
    assert [attempt["outcome"] for attempt in shown["history"]] == ["lost", "crashed"]
    assert shown["log"] == [f"line {number}" for number in range(4, 9)]
    assert [(c["step"], c["valid"]) for c in shown["checkpoints"]] == [(40, False), (20, True)]
    assert "model.pth has the wrong digest" in shown["checkpoints"][0]["reason"]
    assert shown["problems"] == []
    text = sweeper("show", run_id).out
    for part in (
        "failed (crashed)",
        "trainer.lr=0.01",
        "its process is gone",
        "ValueError: no",
        "line 8",
        "NO",
    ):
        assert part in text
    assert "line 3" not in text


def test_show_of_a_run_whose_directory_is_gone(sweeper: Any, filled: Filled) -> None:
    run_id = filled.run(0)
    result = sweeper("show", run_id)
    assert result.code == 0
    assert "problem: outputs/sweep/simple/runs/simple.r.00000/run.json is missing" in result.out
    assert "no checkpoint on disk" in result.out


def test_show_does_not_follow_links(sweeper: Any, filled: Filled, tmp_path: Path) -> None:
    run_id = filled.run(0)
    run_dir = filled.directory(run_id)
    secret = tmp_path / "secret"
    secret.write_text("secret\n")
    rundir.attempt_log(run_dir, 1).symlink_to(secret)
    os.mkfifo(rundir.attempt_log(run_dir, 2))
    for result in (sweeper("show", run_id), sweeper("logs", run_id)):
        assert "secret\n" not in result.out


def test_best(sweeper: Any, filled: Filled) -> None:
    run_id = filled.run(4, value=0.95, params=json.dumps({"trainer.lr": 0.01, "trainer.kind": "a b"}))
    filled.run(5, value=0.90)
    commit_checkpoint(filled.directory(run_id), step=500)
    weights = "outputs/sweep/simple/runs/simple.r.00004/checkpoints/step_00000500/model.pth"
    shown = sweeper("best", "simple", "--json").json
    assert (shown["run_id"], shown["value"], shown["weights"]) == (run_id, 0.95, weights)
    assert shown["command"] == (
        "python -m sweeper launch +sweep=simple sweep.name=simple-again sweep.n_trials=1 sweep.params=null "
        f"sweep.run_seed={shown['seed']} trainer.lr=0.01 'trainer.kind='\"'\"'a b'\"'\"''"
    )
    assert weights in sweeper("best", "simple").out


def test_best_names_the_newest_weights_that_are_whole(sweeper: Any, filled: Filled) -> None:
    run_dir = filled.directory(filled.run(0, value=0.9))
    commit_checkpoint(run_dir, step=10)
    (commit_checkpoint(run_dir, step=20) / "model.pth").unlink()
    result = sweeper("best", "simple")
    assert "step_00000010/model.pth" in result.out
    assert "step_00000020 is not valid: model.pth is missing" in result.err


def test_best_names_the_checkpoint_of_a_program_that_calls_its_weights_otherwise(
    sweeper: Any, filled: Filled
) -> None:
    commit_checkpoint(filled.directory(filled.run(0, value=0.9)), step=10, weights="net.bin")
    assert sweeper("best", "simple", "--json").json["weights"].endswith("checkpoints/step_00000010")


def test_best_of_nothing(sweeper: Any, filled: Filled) -> None:
    filled.run(0, state="running")
    result = sweeper("best", "simple")
    assert (result.code, result.out) == (1, "")
    assert "no completed trial yet" in result.err


# --- logs ----------------------------------------------------------------------------------


def test_logs_are_raw_and_in_order(sweeper: Any, filled: Filled) -> None:
    run_id = filled.run(0)
    run_dir = filled.directory(run_id)
    rundir.attempt_log(run_dir, 2).write_text("second\n")
    rundir.attempt_log(run_dir, 1).write_text("\x1b[31mfirst\n")
    (run_dir / "logs" / "notes.txt").write_text("not a log\n")
    result = sweeper("logs", run_id)
    assert (result.code, result.out) == (0, "\x1b[31mfirst\nsecond\n")
    assert result.err.splitlines() == [f"==> {run_id} attempt 1 <==", f"==> {run_id} attempt 2 <=="]


def test_logs_need_no_database(sweeper: Any, filled: Filled) -> None:
    run_dir = filled.directory("simple.r.00000")
    rundir.attempt_log(run_dir, 1).write_text("here\n")
    filled.path.unlink()
    assert sweeper("logs", "simple.r.00000").out == "here\n"
    assert sweeper("logs", "simple.r.00001").code == 1
    assert sweeper("logs", "../../etc").code == 1


def test_logs_follow_across_attempts_until_final(filled: Filled, capfd: pytest.CaptureFixture[str]) -> None:
    run_id = filled.run(0, state="running")
    run_dir = filled.directory(run_id, marker=True)
    first, second = rundir.attempt_log(run_dir, 1), rundir.attempt_log(run_dir, 2)
    first.write_text("a")

    def goes_on() -> Any:
        first.write_text("ab\n")
        yield
        second.write_text("c\n")
        yield
        second.write_text("c\nd\n")
        filled.execute("UPDATE sweeper_run SET state='completed'")
        yield

    story = goes_on()
    assert (
        logs.main(
            run_id, storage=filled.url, data_dir=filled.data_dir, follow=True, sleep=lambda _: next(story)
        )
        == 0
    )
    assert capfd.readouterr().out == "ab\nc\nd\n"
    assert next(story, "over") == "over"


# --- verify --------------------------------------------------------------------------------


def test_verify_without_a_database(sweeper: Any, filled: Filled, tmp_path: Path) -> None:
    good, bad = filled.directory("simple.r.00000"), filled.directory("simple.r.00001")
    commit_checkpoint(good, step=10)
    damaged = commit_checkpoint(bad, step=10)
    commit_checkpoint(bad, step=20)
    filled.path.unlink()
    assert sweeper("verify").code == 0
    (damaged / "model.pth").write_bytes(b"weights of step 1O")
    result = sweeper("verify", "--json")
    assert result.code == 1
    assert [(v["run_id"], v["step"], v["valid"]) for v in result.json] == [
        ("simple.r.00000", 10, True),
        ("simple.r.00001", 20, True),
        ("simple.r.00001", 10, False),
    ]
    text = sweeper("verify", "simple.r.00001")
    assert text.code == 1
    assert "step_00000010: model.pth has the wrong digest" in text.out
    assert "1 invalid" in text.err
    assert sweeper("verify", "simple.r.00000").code == 0


def test_verify_takes_any_directory_of_ours(sweeper: Any, filled: Filled, tmp_path: Path) -> None:
    run_dir = filled.directory("simple.r.00000")
    step = commit_checkpoint(run_dir, step=10)
    commit_checkpoint(run_dir, step=20)
    for directory, num in [
        (filled.data_dir, 2),
        (filled.data_dir / "sweep", 2),
        (filled.data_dir / "sweep" / "simple", 2),
        (run_dir.parent, 2),
        (run_dir, 2),
        (run_dir / "checkpoints", 2),
        (step, 1),
    ]:
        result = sweeper("verify", str(directory), "--json")
        assert (result.code, len(result.json)) == (0, num), directory
    copy = tmp_path / "copied"
    (run_dir / "checkpoints").rename(copy)
    assert [v["run_id"] for v in sweeper("verify", "copied", "--json").json] == ["simple.r.00000"] * 2
    assert len(sweeper("verify", "simple", "--json").json) == 0


def test_verify_of_a_checkpoint_of_another_run(sweeper: Any, filled: Filled) -> None:
    one, other = filled.directory("simple.r.00000"), filled.directory("simple.r.00001")
    commit_checkpoint(one, step=10).rename(other / "checkpoints" / "step_00000010")
    result = sweeper("verify", "simple.r.00001")
    assert result.code == 1
    assert "belongs to run 'simple.r.00000'" in result.out


def test_verify_with_a_damaged_identity(sweeper: Any, filled: Filled) -> None:
    run_dir = filled.directory("simple.r.00000")
    commit_checkpoint(run_dir, step=10)
    (run_dir / "run.json").write_text("{")
    result = sweeper("verify", "--json")
    assert result.code == 1
    assert [v["valid"] for v in result.json] == [False, True]
    assert "run.json" in result.json[0]["reason"]


def test_verify_of_nothing(sweeper: Any, tmp_path: Path) -> None:
    assert sweeper("verify", "--json").out == "[]\n"
    assert sweeper("verify", "simple.r.00000").code == 1
    assert sweeper("verify", "nowhere/at/all").code == 1
    assert sweeper("verify", str(tmp_path)).code == 1


# --- what a launch remembers ---------------------------------------------------------------


def test_a_secret_in_an_override_is_remembered_as_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-7f3a-do-not-store")
    typed = ["+sweep=simple", "+trainer.token=${oc.env:HF_TOKEN}", "trainer.epochs=2"]
    made = command.compose([*typed, "hydra.run.dir=."])
    assert made is not None
    again = command._again(typed, made[1])
    assert again == typed
    assert "canary" not in json.dumps(settings.read(made[0], command=again).new.config)


def test_verify_latest_prints_one_path_and_nothing_else(sweeper: Any, filled: Filled, tmp_path: Path) -> None:
    """What a shell script's `latest_ckpt` and `is_valid_ckpt` were."""
    run_dir = filled.directory("simple.r.00000")
    older, newest = commit_checkpoint(run_dir, step=10), commit_checkpoint(run_dir, step=20)
    for directory in (run_dir, run_dir / "checkpoints", f"{run_dir}/"):
        result = sweeper("verify", "--latest", str(directory))
        assert (result.code, result.out, result.err) == (0, f"{newest}\n", "")
    (newest / "model.pth").write_bytes(b"X")
    assert sweeper("verify", "--latest", str(run_dir)).out == f"{older}\n"
    run_dir.rename(tmp_path / "renamed")
    assert sweeper("verify", "--latest", "renamed").out == "renamed/checkpoints/step_00000010\n"
    assert sweeper("verify", "--latest", "renamed/checkpoints").out == "renamed/checkpoints/step_00000010\n"


def test_verify_latest_where_there_is_none(sweeper: Any, filled: Filled, tmp_path: Path) -> None:
    run_dir = filled.directory("simple.r.00000")
    damaged = commit_checkpoint(run_dir, step=10)
    (damaged / "model.pth").write_bytes(b"X")
    for directory in (run_dir, tmp_path / "nowhere", tmp_path):
        result = sweeper("verify", "--latest", str(directory))
        assert (result.code, result.out) == (1, "")
        assert f"{directory} has no valid checkpoint" in result.err
    assert sweeper("verify", "--latest", str(run_dir), "simple").code == 2
    assert sweeper("verify", "--latest", str(run_dir), "--json").code == 2


def test_verify_latest_of_what_holds_no_checkpoints(sweeper: Any, filled: Filled, tmp_path: Path) -> None:
    step = commit_checkpoint(filled.directory("simple.r.00000"), step=10)
    for path, what in [(step / "model.pth", "is a file"), (step, "is a checkpoint itself")]:
        result = sweeper("verify", "--latest", str(path))
        assert (result.code, result.out) == (1, "")
        assert f"{path} {what}. " in result.err
        assert "Traceback" not in result.err


def test_verify_of_a_directory_of_open_run(sweeper: Any, filled: Filled, tmp_path: Path) -> None:
    run_dir = filled.directory("simple.r.00000")
    commit_checkpoint(run_dir, step=10)
    (tmp_path / "mine").mkdir()
    (run_dir / "checkpoints").rename(tmp_path / "mine" / "checkpoints")
    result = sweeper("verify", str(tmp_path / "mine"), "--json")
    assert (result.code, [verdict["step"] for verdict in result.json]) == (0, [10])


def test_verify_latest_takes_no_checkpoint_of_another_run(sweeper: Any, filled: Filled) -> None:
    one, other = filled.directory("simple.r.00000"), filled.directory("simple.r.00001")
    mine = commit_checkpoint(other, step=5)
    commit_checkpoint(one, step=10).rename(other / "checkpoints" / "step_00000010")
    assert sweeper("verify", "--latest", str(other)).out == f"{mine}\n"
