"""Launching on SLURM, with its commands faked: what is asked, what is submitted, and what is refused in which words."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from sweeper import cli, embedded
from sweeper.errors import EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_NOT_WELL, EXIT_OK, ConfigError
from sweeper.launch import slurm as launching
from sweeper.launch.slurm import Submission, make_private
from sweeper.launch.slurm_worker import Worker
from sweeper.records import Sweep

pytestmark = pytest.mark.slow  # Hydra composes once a test

HERE = Path(__file__).parent
GOLDEN = HERE / "golden.sbatch"
PROGRAMS = ("sbatch", "squeue", "sacct", "scontrol", "srun", "scancel")
NOBODY = 65534
EVERY_KEY = (
    "launcher.n_workers=6", "launcher.partition=low", "launcher.account=physics", "launcher.qos=long",
    "launcher.constraint='a100|h100'", "launcher.timeout_min=90", "launcher.nodes=2", "launcher.tasks_per_node=2",
    "launcher.cpus_per_task=3", "launcher.gpus_per_node=2", "launcher.gres=nvme:1", "launcher.mem_gb=7.5",
    "launcher.array_parallelism=3", "launcher.signal_delay_s=45", "launcher.setup=['module load cuda','export A=\"b c\"']",
    "+launcher.additional_parameters={reservation: 'the week', exclusive: true, mail-type: FAIL}",
)  # fmt: skip


@dataclass
class Fake:
    """SLURM's commands, as `fake_slurm.py` plays them."""

    folder: Path
    answers: dict[str, tuple[int, str, str]] = field(default_factory=dict)

    def says(self, command: str, out: str = "", *, err: str = "", code: int = 0) -> None:
        """What a command that starts so prints from now on."""
        self.answers[command] = (code, out, err)
        (self.folder / "answers.json").write_text(json.dumps(self.answers))

    def calls(self) -> list[dict[str, Any]]:
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def scripts(self) -> list[str]:
        """The sbatch files that were submitted."""
        return [call["files"][0] for call in self.calls() if call["program"] == "sbatch" and call["files"]]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "fake"
    program.write_text(f"#!{sys.executable}\n{(HERE / 'fake_slurm.py').read_text()}")
    program.chmod(0o700)
    for name in PROGRAMS:
        (folder / name).symlink_to("fake")
    for name in [name for name in os.environ if name.startswith(("SWEEPER_", "SLURM_", "DATA_DIR"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    fake = Fake(folder)
    fake.says("sbatch --test-only", err="sbatch: Job 1 to start at 2026-11-25T09:48:38 using 1 processors on nodes n1 in partition low\n")  # fmt: skip
    fake.says("sbatch", "Submitted batch job 100\n")
    fake.says("squeue")
    return fake


@dataclass
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def sweeper(capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def run(*arguments: str) -> Said:
        code = cli.main(list(arguments))
        return Said(code, *capfd.readouterr())

    return run


@pytest.fixture
def launch(fake: Fake, sweeper: Callable[..., Said]) -> Callable[..., Said]:
    def run(*overrides: str) -> Said:
        return sweeper(
            "launch", "+sweep=simple", "launcher=slurm", "tracking.wandb.mode=disabled", *overrides
        )

    return run


GROUP = {"cpus_per_task": 1, "tasks_per_node": 1, "nodes": 1, "additional_parameters": {}, "setup": []}


def label(data_dir: Path) -> str:
    return Submission.of("simple", {"cpus_per_task": 1}, storage="sqlite:///x.db", data_dir=data_dir).label


def complete(data_dir: Path) -> None:
    """Note in the database that all trials are done."""
    with sqlite3.connect(data_dir / "sweeper.db") as connection:
        connection.execute("UPDATE sweeper_sweep SET n_trials=0")


def num_sweeps(data_dir: Path) -> int:
    """How many sweeps are recorded; none where there is no database."""
    if not (data_dir / "sweeper.db").exists():
        return 0
    with sqlite3.connect(data_dir / "sweeper.db") as connection:
        return int(connection.execute("SELECT count(*) FROM sweeper_sweep").fetchone()[0])


# --- the sbatch file ---------------------------------------------------------------------------


def placed(text: str, data_dir: Path) -> str:
    """A sbatch file without what differs from place to place."""
    named = {shlex.quote(sys.executable): "PYTHON", label(data_dir): "LABEL", str(data_dir): "DATA_DIR"}
    for found, name in named.items():
        text = text.replace(found, name)
    return text


def test_a_dry_run_prints_the_sbatch_file_and_asks_nobody(fake: Fake, launch: Any, tmp_path: Path) -> None:
    keys = yaml.safe_load((HERE.parents[1] / "conf/launcher/slurm.yaml").read_text())
    assert {key for key in keys if key != "kind"} == {
        o.partition("=")[0].lstrip("+").removeprefix("launcher.") for o in EVERY_KEY
    }
    said = launch("--dry-run", *EVERY_KEY)
    assert (said.code, said.err) == (EXIT_OK, "")
    script = said.out[said.out.index("#!/bin/bash") :]
    assert placed(script, tmp_path / "outputs") == GOLDEN.read_text()
    assert fake.calls() == []
    assert not list((tmp_path / "outputs").rglob("*"))


def test_the_sbatch_file_is_what_bash_reads() -> None:
    assert subprocess.run(["bash", "-n", str(GOLDEN)], capture_output=True, text=True).stderr == ""


def test_what_is_submitted_is_what_a_dry_run_shows(fake: Fake, launch: Any, tmp_path: Path) -> None:
    assert launch(*EVERY_KEY).code == EXIT_OK
    assert [placed(script, tmp_path / "outputs") for script in fake.scripts()] == [
        GOLDEN.read_text().rstrip("\n")
    ]
    asked = next(call for call in fake.calls() if call["argv"] == ["--test-only"])
    assert placed(asked["stdin"], tmp_path / "outputs") == GOLDEN.read_text()


def test_a_launch_returns_at_once_with_job_ids_and_where_to_look(launch: Any, tmp_path: Path) -> None:
    said = launch("launcher.n_workers=3")
    assert (said.code, said.out) == (EXIT_OK, "submitted 3 workers: 100_0, 100_1, 100_2\n")
    folder = tmp_path / "outputs/sweep/simple/slurm"
    hint, *rest = said.err.splitlines()
    assert hint.startswith("the database is SQLite: jobs on other machines than this one will refuse it")
    assert rest == [f"logs: {folder}", "follow with: python -m sweeper status simple --watch"]
    assert num_sweeps(tmp_path / "outputs") == 1


def test_a_pickle_holds_only_names(launch: Any, tmp_path: Path) -> None:
    launch("launcher.cpus_per_task=2")
    pickles = sorted((tmp_path / "outputs/sweep/simple/slurm").glob("*_submitted.pkl"))
    assert [path.name for path in pickles] == [f"100_{index}_submitted.pkl" for index in range(4)]
    data_dir = tmp_path / "outputs"
    worker = Worker("simple", f"sqlite:///{data_dir}/sweeper.db", str(data_dir), 2)
    assert {pickle.loads(path.read_bytes()).function for path in pickles} == {worker}


def test_places_with_blanks_and_quotes_stay_one_word(launch: Any, tmp_path: Path) -> None:
    data_dir = tmp_path / "a 'place' $(touch x)"
    said = launch("--dry-run", f'data_dir="{data_dir}"')
    (line,) = [line for line in said.out.splitlines() if line.startswith("srun ")]
    words = shlex.split(line)
    assert words[-1] == f"{data_dir}/sweep/simple/slurm"
    assert words[words.index("--output") + 1] == f"{data_dir}/sweep/simple/slurm/%A_%a_%t_log.out"


def test_a_worker_gets_all_cpus_that_were_asked_for(launch: Any) -> None:
    assert "--cpus-per-task=5 " in launch("--dry-run", "launcher.cpus_per_task=5").out.partition("\nsrun ")[2]
    assert "--cpus-per-task" not in launch("--dry-run").out.partition("\nsrun ")[2]


# --- what is missing ---------------------------------------------------------------------------


def squeue(data_dir: Path, *states: str) -> str:
    """Lines of squeue; a state may carry a reason: `PENDING|JobHeldUser`."""
    known = (state if "|" in state else f"{state}|None" for state in states)
    return "".join(f"{7 + number}|{state}|{label(data_dir)}\n" for number, state in enumerate(known))


@pytest.mark.parametrize("again", [["launch"], ["resume", "simple"]])
def test_going_on_submits_only_what_is_missing(
    fake: Fake, sweeper: Any, launch: Any, tmp_path: Path, again: list[str]
) -> None:
    launch()
    others = (
        "1|RUNNING|None|sweeper 0123456789ab\n2|RUNNING|None|(null)\n3|PENDING\n4|RUNNING|None|of my own\n"
    )
    over = squeue(tmp_path / "outputs", "COMPLETED", "TIMEOUT", "NODE_FAIL")
    fake.says("squeue", others + squeue(tmp_path / "outputs", "RUNNING", "PENDING") + over)
    fake.says("sbatch", "Submitted batch job 200\n")
    said = launch() if again == ["launch"] else sweeper(*again)
    assert (said.code, said.out) == (EXIT_OK, "submitted 2 workers: 200_0, 200_1\n")
    assert "#SBATCH --array=0-1%2\n" in fake.scripts()[-1]
    asked = next(call["argv"] for call in fake.calls() if call["program"] == "squeue")
    assert asked == ["--me", "--noheader", "--array", "--name=sweeper-simple", "--format=%i|%T|%r|%k"]


def test_held_jobs_are_no_workers_and_it_is_said_how_they_get_on(
    fake: Fake, launch: Any, tmp_path: Path
) -> None:
    held = (
        "PENDING|job requeued in held state",
        "PENDING|JobHeldUser",
        "REQUEUE_HOLD|launch failed requeued held",
    )
    fake.says("squeue", squeue(tmp_path / "outputs", "PENDING|Resources", *held))
    said = launch()
    assert said.out == "submitted 3 workers: 100_0, 100_1, 100_2\n"
    assert "3 workers of sweep simple are held by SLURM (JobHeldUser, job requeued in held state" in said.err
    assert "`scontrol release 8,9,10` lets them run" in said.err


def test_workers_that_are_being_requeued_are_waited_for_and_then_count(
    fake: Fake, launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "POLL_S", 0.01)
    monkeypatch.setattr(launching, "ENDING_WAIT_S", 0.2)
    fake.says("squeue", squeue(tmp_path / "outputs", "RUNNING", "RUNNING", "COMPLETING", "COMPLETING"))
    said = launch()
    assert "SLURM has 4 workers of sweep simple already (2 of them ending; launch again" in said.out
    assert "2 workers are ending or being requeued; waiting" in said.err
    assert fake.scripts() == []


def test_a_single_missing_worker_is_a_job_of_its_own(fake: Fake, launch: Any, tmp_path: Path) -> None:
    fake.says("squeue", squeue(tmp_path / "outputs", "RUNNING", "CONFIGURING", "SUSPENDED"))
    assert launch().out == "submitted 1 workers: 100\n"
    assert "--array" not in fake.scripts()[-1]


@pytest.mark.parametrize("num", [4, 5])
def test_a_launch_whose_workers_are_all_there_submits_nothing(
    fake: Fake, launch: Any, tmp_path: Path, num: int
) -> None:
    fake.says("squeue", squeue(tmp_path / "outputs", *["RUNNING"] * num))
    said = launch()
    assert said.out == f"SLURM has {num} workers of sweep simple already; nothing was submitted\n"
    assert (said.code, fake.scripts()) == (EXIT_OK, [])


def test_workers_beyond_what_is_left_are_not_submitted(fake: Fake, launch: Any) -> None:
    said = launch("sweep.n_trials=2", "launcher.n_workers=8")
    assert said.out == "submitted 2 workers: 100_0, 100_1\n"
    assert all("--array=0-1%2\n" in call["stdin"] for call in fake.calls() if call["argv"] == ["--test-only"])


def test_of_a_complete_sweep_nothing_is_submitted(
    fake: Fake, launch: Any, sweeper: Any, tmp_path: Path
) -> None:
    launch()
    complete(tmp_path / "outputs")
    before = fake.scripts()
    said = sweeper("resume", "simple")
    assert "sweep simple is complete" in said.err
    assert (said.code, fake.scripts()) == (EXIT_OK, before)


def test_workers_of_a_sweep_with_a_comment_of_its_own_are_known_again(
    fake: Fake, launch: Any, tmp_path: Path
) -> None:
    comment = "+launcher.additional_parameters.comment='paid by physics'"
    whole = f"paid by physics {label(tmp_path / 'outputs')}"
    assert f"#SBATCH --comment='{whole}'\n" in launch("--dry-run", comment).out
    fake.says("squeue", f"1|RUNNING|None|{whole}\n" * 4)
    assert "nothing was submitted" in launch(comment).out


# --- refusals ----------------------------------------------------------------------------------

REFUSALS = {
    "partition": (
        "sbatch: error: invalid partition specified: nowhere\nallocation failure: Invalid partition name specified\n",
        "invalid partition specified: nowhere",
    ),
    "time limit": (
        "allocation failure: Requested time limit is invalid (missing or exceeds some limit)\n",
        "allocation failure: Requested time limit is invalid (missing or exceeds some limit)",
    ),
    "option": (
        "sbatch: unrecognized option '--foo=1'\nTry \"sbatch --help\" for more information\n",
        "sbatch: unrecognized option '--foo=1'; Try \"sbatch --help\" for more information",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_slurm_refuses_is_said_in_its_words_and_nothing_is_recorded(
    fake: Fake, launch: Any, tmp_path: Path, what: str
) -> None:
    printed, words = REFUSALS[what]
    fake.says("sbatch --test-only", err=printed, code=1)
    said = launch()
    assert (said.code, said.out) == (EXIT_CONFIG, "")
    assert (
        said.err
        == f"sweeper: SLURM refuses the job: {words}. Nothing was started. Change launcher.* and launch again.\n"
    )
    assert num_sweeps(tmp_path / "outputs") == 0
    assert [call["argv"] for call in fake.calls()] == [["--test-only"]]


def test_a_submission_that_slurm_refuses_says_why(fake: Fake, launch: Any) -> None:
    fake.says("sbatch", err="sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy\n", code=1)  # fmt: skip
    said = launch()
    assert said.code == EXIT_CONFIG
    assert (
        "SLURM refuses the job: QOSMaxSubmitJobPerUserLimit; Batch job submission failed: Job violates"
        in said.err
    )


def test_when_squeue_fails_nothing_is_submitted(fake: Fake, launch: Any) -> None:
    fake.says(
        "squeue", err="slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n", code=1
    )
    said = launch()
    assert (said.code, said.out) == (EXIT_CONFIG, "")
    assert (
        "squeue does not answer. Nothing was submitted; try again when SLURM's controller is back."
        in said.err
    )
    assert fake.scripts() == []


def test_without_slurm_another_launcher_is_advised(
    launch: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    said = launch()
    assert said.code == EXIT_CONFIG
    assert (
        said.err
        == "sweeper: launcher=slurm needs SLURM's commands: there is no sbatch on the PATH. Use launcher=local.\n"
    )
    assert num_sweeps(tmp_path / "outputs") == 0


def test_a_key_that_there_is_not_is_refused_in_words_for_people(fake: Fake, launch: Any) -> None:
    said = launch("+launcher.foo=1")
    assert said.code == EXIT_CONFIG
    assert said.err == (
        "sweeper: launcher.foo is not known. What else sbatch can do is set by launcher.additional_parameters.\n"
    )
    assert "Did you mean launcher.partition?" in launch("--dry-run", "+launcher.partitoin=low").err
    assert fake.calls() == []


def refusal(tmp_path: Path, **launcher: Any) -> str:
    """Why the sbatch file of such a launcher group is refused."""
    group = {**GROUP, **launcher}
    with pytest.raises(ConfigError) as caught:
        Submission.of("simple", group, storage="sqlite:///x.db", data_dir=tmp_path).text(1)
    return str(caught.value)


@pytest.mark.parametrize("key", ["job_name", "name", "teardown", "use_srun", "srun_args"])
def test_what_the_launcher_sets_itself_cannot_be_set(tmp_path: Path, key: str) -> None:
    assert f"launcher.{key} is not known" in refusal(tmp_path, **{key: "x"})


BAD_VALUES = {
    "launcher.cpus_per_task=abc": "launcher.cpus_per_task='abc' is of no use. Use a whole number",
    "launcher.nodes=2-3": "launcher.nodes='2-3'", "launcher.nodes=-1": "launcher.nodes=-1",
    "launcher.array_parallelism=0": "launcher.array_parallelism=0", "launcher.tasks_per_node=x": "launcher.tasks_per_node",
    "launcher.mem_gb=abc": "launcher.mem_gb", "launcher.mem_gb=0.0001": "launcher.mem_gb",
    "launcher.setup=abc": "Use a list of lines of shell", "launcher.setup=[1,2]": "Use a list of lines of shell",
    "launcher.signal_delay_s=null": "launcher.signal_delay_s=None", "launcher.additional_parameters=abc": "{option: value}",
    "launcher.timeout_min=3": "leaves no time to train", "~launcher.nodes": "launcher.nodes is missing",
    "~launcher.n_workers": "launcher.n_workers", "~launcher": "launcher=None cannot be used",
    "storage.url=postgresql://u@h:notaport/d": "is not a database URL",
    "+launcher.additional_parameters.signal=USR1@3": "Choose launcher.signal_delay_s",
    "+launcher.additional_parameters.no_requeue=true": "jobs are always requeued",
    "+launcher.additional_parameters.mail={a:1}": "launcher.additional_parameters.mail",
    "+launcher.additional_parameters.out=x": "logs lie where", "+launcher.additional_parameters.no_req=true": "always requeued",
    "launcher.partition=[low,high]": "launcher.partition", "+launcher.exclude=[n1,n2]": "Use one text",
    "launcher.partition=true": "Use a text, or null", "launcher.mem_gb=inf": "launcher.mem_gb=inf",
    "data_dir=p%j%d": "SLURM reads %", "data_dir='a\\\\b'": "SLURM reads %",
}  # fmt: skip


@pytest.mark.parametrize(("override", "says"), BAD_VALUES.items())
def test_a_value_of_no_use_is_refused_with_its_key(fake: Fake, launch: Any, override: str, says: str) -> None:
    said = launch("--dry-run", override)
    assert (said.code, said.out.count("#!/bin/bash")) == (EXIT_CONFIG, 0), said.err
    assert says.lower() in said.err.lower()
    assert "mistake in sweeper" not in said.err


def test_no_time_limit_and_lists_reach_sbatch_as_they_are_meant(launch: Any) -> None:
    script = launch(
        "--dry-run",
        "launcher.timeout_min=null",
        "launcher.setup=null",
        "+launcher.additional_parameters={mail_type: [FAIL, END], exclusive: false, begin: null}",
    ).out
    assert "--time" not in script
    assert "#SBATCH --mail-type=FAIL,END\n" in script
    assert "exclusive" not in script
    assert "begin" not in script


@pytest.mark.parametrize("key", ["job_name", "job-name", "array"])
def test_what_workers_are_known_by_cannot_be_set_either(tmp_path: Path, key: str) -> None:
    assert "cannot be set" in refusal(tmp_path, additional_parameters={key: "x"})


@pytest.mark.parametrize(
    "override",
    [
        'launcher.partition="low\n#SBATCH --uid=0"',
        '+launcher.comment="mine\nrm -rf x"',
        '+launcher.additional_parameters.reservation="a\nb"',
        'data_dir="a\nb"',
    ],
)
def test_a_line_break_reaches_no_header(fake: Fake, launch: Any, tmp_path: Path, override: str) -> None:
    said = launch(override)
    assert (said.code, said.out) == (EXIT_CONFIG, "")
    assert "use printable characters only" in said.err
    assert fake.calls() == []
    assert not list(tmp_path.rglob("sweeper.db"))


@pytest.mark.parametrize("character", ["\n", "\r", "\0", "\x1b", "\x7f", "\u2028", "\udcff"])
def test_control_characters_are_refused_in_names_and_values_of_options(
    tmp_path: Path, character: str
) -> None:
    for options in (
        {"comment": f"a{character}b"},
        {"account": f"a{character}"},
        {f"mail{character}type": "ALL"},
    ):
        assert "use printable characters only" in refusal(tmp_path, additional_parameters=options)
        if character not in "\0\udcff":
            assert "use printable characters only" in refusal(tmp_path / f"a{character}b")


@pytest.mark.parametrize(
    "url", ["postgresql://me:CANARY@db/sweeper", "postgresql://me@db/sweeper?password=CANARY"]
)
def test_a_url_with_a_password_is_refused_with_advice(
    fake: Fake, launch: Any, tmp_path: Path, url: str
) -> None:
    for mode in (["--dry-run"], []):
        said = launch("storage=postgres", f'storage.url="{url}"', *mode)
        assert said.code == EXIT_CONFIG
        assert "a database URL with a password cannot be handed to SLURM jobs" in said.err
        assert (
            "Put the password into ~/.pgpass, or into a file that ?passfile= in storage.url names."
            in said.err
        )
        assert "CANARY" not in said.out + said.err
    assert fake.calls() == []
    assert holding(tmp_path / "outputs", "CANARY") == []


# --- whose directory ---------------------------------------------------------------------------


def test_the_folder_of_pickles_is_for_its_owner_only(launch: Any, tmp_path: Path) -> None:
    folder = tmp_path / "outputs/sweep/simple/slurm"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert launch().code == EXIT_OK
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def to_a_link(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    folder.symlink_to("elsewhere")


def to_a_dangling_link(folder: Path) -> None:
    folder.symlink_to("nowhere")


def to_a_file(folder: Path) -> None:
    folder.touch()


def to_anothers(folder: Path) -> None:
    folder.mkdir()
    if os.getuid() != 0:
        pytest.skip("only root can give a directory away")
    os.chown(folder, NOBODY, NOBODY)


@pytest.mark.parametrize("make", [to_a_link, to_a_dangling_link, to_a_file, to_anothers])
def test_a_folder_that_is_not_ones_own_is_refused(
    fake: Fake, launch: Any, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    folder = tmp_path / "outputs/sweep/simple/slurm"
    folder.parent.mkdir(parents=True)
    make(folder)
    said = launch()
    assert said.code == EXIT_CONFIG
    assert f"{folder} is not a directory of yours" in said.err
    assert fake.scripts() == []
    assert not [path for path in folder.parent.rglob("*") if path.suffix in (".pkl", ".sh")]


# --- following ---------------------------------------------------------------------------------


def test_waiting_ends_when_slurm_has_no_worker_any_more_and_says_how_to_go_on(
    launch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "POLL_S", 0.01)
    said = launch("--wait")
    assert said.code == EXIT_NOT_WELL
    assert (
        "SLURM has no worker of simple any more, and it is not complete: python -m sweeper resume simple"
        in said.err
    )


# --- secrets -----------------------------------------------------------------------------------


def holding(folder: Path, secret: str) -> list[Path]:
    """Files that hold a secret."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if secret.encode() in path.read_bytes()]


def test_a_key_of_the_environment_reaches_no_file_and_no_command_line(
    fake: Fake, launch: Any, sweeper: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "CANARY" + "0123456789abcdef" * 2)
    assert launch("+trainer.key=${oc.env:WANDB_API_KEY}", "launcher.partition=low").code == EXIT_OK
    assert sweeper("resume", "simple").code == EXIT_OK
    assert len(fake.scripts()) == 2
    assert "CANARY" not in json.dumps(fake.calls())
    assert list((tmp_path / "outputs").rglob("*.pkl"))
    assert holding(tmp_path / "outputs", "CANARY") == []


@pytest.fixture
def server(fake: Fake, tmp_path: Path) -> Iterator[str]:
    """A PostgreSQL whose password is in ~/.pgpass; its URL names none."""
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o711)  # root's server is another user's
        started = embedded.Server(Path(home) / "server")
        url = started.up()
        try:
            shutil.copy(started.password_file, tmp_path / ".pgpass")
            yield url.partition("?")[0]
        finally:
            started.down()


@pytest.mark.slow
def test_a_database_password_reaches_no_file_and_no_command_line(
    fake: Fake, launch: Any, sweeper: Any, server: str, tmp_path: Path
) -> None:
    password = (tmp_path / ".pgpass").read_text().strip().rpartition(":")[2]
    assert len(password) > 20
    assert launch("storage=postgres", f"storage.url='{server}'").out.startswith("submitted 4 workers")
    assert sweeper("--storage", server, "resume", "simple").code == EXIT_OK
    assert password not in json.dumps(fake.calls())
    assert holding(tmp_path / "outputs", password) == []
    (worker, *_) = {
        pickle.loads(path.read_bytes()).function for path in (tmp_path / "outputs").rglob("*_submitted.pkl")
    }
    assert worker.storage == server


def test_a_folder_that_somebody_else_can_swap_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "sweep" / "simple" / "slurm"
    folder.parent.mkdir(parents=True)
    folder.parent.parent.chmod(0o777)
    with pytest.raises(
        ConfigError, match=r"sweep is not safe .* everybody can write to it\. Make it yours alone"
    ):
        make_private(folder)
    folder.parent.parent.chmod(0o1777)
    make_private(folder)
    if os.getuid() == 0:
        os.chown(folder.parent, NOBODY, NOBODY)
        with pytest.raises(ConfigError, match=r"simple is not safe .* it is another user's"):
            make_private(folder)


def test_make_private_raises_what_people_can_read(tmp_path: Path) -> None:
    to_a_file(tmp_path / "slurm")
    with pytest.raises(ConfigError, match=re.escape("Remove it, or choose another data_dir or sweep.name.")):
        make_private(tmp_path / "slurm")


def test_following_outlives_a_controller_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Silence of squeue is no end of the workers; only its word is."""
    submission = Submission(
        "simple", {}, tmp_path, Worker("simple", f"sqlite:///{tmp_path}/sweeper.db", str(tmp_path), 1)
    )
    line = f"7|{{}}|None|{submission.label}\n"
    # Between the end of a job and its requeue there may be none for a moment.
    answers = iter(
        [None, None, line.format("RUNNING"), "", line.format("COMPLETING"), line.format("PENDING"), "", ""]
    )
    monkeypatch.setattr(launching.slurm, "run", lambda command: next(answers))
    monkeypatch.setattr(launching, "_is_complete", lambda sweep, storage: False)
    monkeypatch.setattr(launching, "POLL_S", 0.0)
    monkeypatch.setattr(launching.Display, "refresh", lambda self: None)  # there is no database to show
    storage = submission.worker.storage
    assert launching.follow(submission, storage=storage, data_dir=tmp_path) == EXIT_NOT_WELL
    assert next(answers, "all are asked for") == "all are asked for"
    said = capfd.readouterr().err
    assert said.count("squeue does not answer; asked again") == 1
    assert "SLURM has no worker of simple any more" in said


def test_who_stops_following_is_told_the_numbers_of_the_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not `scancel --name`: sweeps of other data directories may have the same name."""
    worker = Worker("simple", f"sqlite:///{tmp_path}/sweeper.db", str(tmp_path), 1)
    submission = Submission("simple", {}, tmp_path, worker)
    queue = "".join(f"{job}|RUNNING|None|{submission.label}\n" for job in ("12_0", "7_1", "7_3"))
    monkeypatch.setattr(launching.slurm, "run", lambda command: queue + "9|RUNNING|None|another\n")
    monkeypatch.setattr(launching, "_is_complete", lambda sweep, storage: False)
    monkeypatch.setattr(launching.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(launching.Display, "refresh", lambda self: None)
    assert launching.follow(submission, storage=worker.storage, data_dir=tmp_path) == EXIT_INTERRUPTED
    assert "the workers of simple go on; `scancel 7 12` ends them" in capfd.readouterr().err


def test_a_sbatch_that_does_not_answer_is_not_waited_for(
    fake: Fake, launch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "TEST_WAIT_S", 0.1)
    (fake.folder / "sbatch").unlink()
    (fake.folder / "sbatch").write_text("#!/bin/sh\nexec sleep 60\n")
    (fake.folder / "sbatch").chmod(0o700)
    said = launch()
    assert said.code == EXIT_CONFIG
    assert "sbatch --test-only does not answer within" in said.err


def test_a_database_of_this_machine_alone_is_said_to_be_one(fake: Fake, sweeper: Any) -> None:
    for host, is_said in (("127.0.0.1", True), ("10.0.0.7", False)):
        sweep = Sweep(
            1, "simple", 1, 0, 1, "loss", "minimize", {"launcher": {**GROUP, "n_workers": 1}}, False
        )
        launching.launch(
            sweep,
            storage=f"postgresql://u@{host}/d",
            data_dir=fake.folder.parent,
            num_left=1,
            is_waiting=False,
        )
        said = sweeper("--version").err
        assert ("`sweeper db up --host ADDRESS` starts one that they reach" in said) is is_said


def test_the_script_to_submit_by_hand_ends_as_ours_do() -> None:
    by_hand = (Path(launching.__file__).parents[2] / "slurm" / "worker.sbatch").read_text()
    assert by_hand.endswith(launching.AFTERWARDS)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[str]]]:
    """Runs the end of the batch script after workers that end so; returns its exit code and what it did."""
    did = tmp_path / "did"
    for name in ("sleep", "scontrol"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{did}\n')
        (tmp_path / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def run(*codes: int) -> tuple[int, list[str]]:
        did.write_text("")
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        worker = f"read code <{tmp_path}/codes; sed -i 1d {tmp_path}/codes; (exit $code)\n"
        (tmp_path / "job").write_text(f"#!/bin/bash\n{worker}{launching.AFTERWARDS}")
        done = subprocess.run(["bash", str(tmp_path / "job")], capture_output=True, text=True, timeout=60)
        assert done.stderr == ""
        return done.returncode, did.read_text().splitlines()

    return run


def test_a_worker_that_the_database_never_answered_asks_again_in_its_job_and_gives_up(job: Any) -> None:
    assert job(69, 69, 0) == (0, ["sleep 60"] * 2)
    assert job(*[69] * 25) == (69, ["sleep 60"] * 19)
    assert job(*[69] * 19, 137, *[69] * 19, 0) == (0, ["sleep 60"] * 38), "one that was killed had begun"


def test_a_worker_that_has_released_its_run_requeues_the_job(job: Any) -> None:
    code, did = job(75)
    assert (code, did[:3]) == (75, ["scontrol requeue 7", "sleep 60", "sleep 5"])


def test_a_worker_that_is_killed_is_started_again_unless_it_dies_at_once(job: Any) -> None:
    assert job(137, 137, 0) == (0, [])
    assert job(*[137] * 9) == (137, [])
    assert job(78) == (78, [])


def test_the_end_of_a_script_removes_orders_of_its_own_only(tmp_path: Path) -> None:
    """A job that is submitted from another job inherits that one's variables."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    inherited = {"SWEEPER_NODES_DIR": str(theirs), "SWEEPER_NODES": "1:1"}
    ours = f'export SWEEPER_NODES_DIR={tmp_path}/ours SWEEPER_NODES="$$:1"; mkdir "$SWEEPER_NODES_DIR"\n'
    for beginning in ("", ours):
        script = f"{beginning}(exit 3)\n{launching.AFTERWARDS}"
        done = subprocess.run(["bash", "-c", script], env={**os.environ, **inherited})
        assert done.returncode == 3
    assert theirs.is_dir()
    assert not (tmp_path / "ours").exists()
