"""trainer=command: from configuration to the words a program gets. No shell, nothing made of strings."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module

from sweeper.command.settings import Command
from sweeper.errors import EXIT_CONFIG, ConfigError
from sweeper.launch import settings


def words(**trainer: Any) -> list[str]:
    return list(Command.from_config({"argv": ["prog"], **trainer}).argv)[1:]


ARGS = {"width": 64, "lr": 1e-05, "name": "a b", "nesterov": True, "seed": None}


@pytest.mark.parametrize(
    ("arg_format", "expected"),
    [
        ("--{name} {value}", ["--lr", "1e-05", "--name", "a b", "--nesterov", "true", "--width", "64"]),
        ("--{name}={value}", ["--lr=1e-05", "--name=a b", "--nesterov=true", "--width=64"]),
        ("{name}={value}", ["lr=1e-05", "name=a b", "nesterov=true", "width=64"]),
        ("-D {name}={value}", ["-D", "lr=1e-05", "-D", "name=a b", "-D", "nesterov=true", "-D", "width=64"]),
        ("{value}", ["1e-05", "a b", "true", "64"]),
    ],
)
def test_args_become_words_in_the_order_of_their_names(arg_format: str, expected: list[str]) -> None:
    assert words(args=ARGS, arg_format=arg_format) == expected


def test_a_value_is_one_word_whatever_is_in_it() -> None:
    strange = "$(rm -rf /); {name} {value}\n'\""
    assert words(args={"x": strange}) == ["--x", strange]


def test_groups_of_args_have_dots() -> None:
    assert words(args={"optimizer": {"lr": 0.1}}, arg_format="{name}={value}") == ["optimizer.lr=0.1"]


def test_args_take_a_place_of_their_own() -> None:
    assert words(argv=["prog", "train", "{args}", "--", 7], args={"lr": 0.1}) == [
        *("train", "--lr", "0.1", "--", "7")
    ]
    assert words(argv=["prog", "{args}"]) == []


def test_defaults() -> None:
    made = Command.from_config({"argv": ["prog"]})
    assert (made.argv, dict(made.env), made.cwd) == (("prog",), {}, None)
    assert (made.stop_signal, made.grace_s, made.total_steps) == (signal.SIGTERM, 15.0, None)


def test_variables_are_texts() -> None:
    made = Command.from_config({"argv": ["p"], "env": {"A": 1, "B": True, "C": None, "D": "x=y"}})
    assert made.env == {"A": "1", "B": "true", "C": None, "D": "x=y"}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"argv": "python train.py"}, "trainer.argv"),
    ({"argv": []}, "trainer.argv"),
    ({"argv": "???"}, "trainer.argv"),
    ({"argv": ["p", None]}, "trainer.argv"),
    ({"argv": ["p", ["q"]]}, "trainer.argv"),
    ({"argv": ["p\0"]}, "zero byte"),
    ({"argv": ["p", "{args}", "{args}"]}, "more than once"),
    ({"args": {"sizes": [1, 2]}}, "trainer.args.sizes"),
    ({"args": 5}, "trainer.args=5"),
    ({"arg_format": "--{name}"}, "trainer.arg_format"),
    ({"arg_format": "--{key} {value}"}, "trainer.arg_format"),
    ({"arg_format": None}, "trainer.arg_format"),
    ({"env": ["A=1"]}, "trainer.env"),
    ({"env": {"A=B": 1}}, "A=B"),
    ({"cwd": 5.5}, ""),
    ({"stop_signal": "SIGNOTHING"}, "SIGNOTHING"),
    ({"grace_s": "long"}, "trainer.grace_s"),
    ({"grace_s": -1}, "trainer.grace_s"),
    ({"total_steps": 0}, "trainer.total_steps"),
]


@pytest.mark.parametrize(("trainer", "named"), [case for case in REFUSED if case[1]])
def test_what_cannot_be_used_is_named(trainer: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Command.from_config({"argv": ["prog"], **trainer})
    assert named in str(caught.value)
    assert caught.value.exit_code == EXIT_CONFIG


# --- the program -------------------------------------------------------------------------------


def program(*argv: str, path: str = os.defpath, **trainer: Any) -> str:
    return Command.from_config({"argv": list(argv), **trainer}).program({"PATH": path})


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "bin" / "trainit"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_it_is_found_on_path(script: Path) -> None:
    assert program("trainit", path=str(script.parent)) == str(script)


def test_python_is_ours_where_path_has_none(tmp_path: Path) -> None:
    assert program("python", path=str(tmp_path)) == str(Path(sys.executable).with_name("python"))


def test_a_path_is_seen_from_cwd(script: Path) -> None:
    assert program("bin/trainit", cwd=str(script.parents[1])) == str(script)
    assert program(str(script)) == str(script)


@pytest.mark.parametrize("name", ["no-such-program", "/no/such/program", "./conf"])
def test_one_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=r"was not found") as caught:
        program(name)
    assert name in str(caught.value)
    assert caught.value.do


def test_a_launch_refuses_what_no_worker_could_start() -> None:
    base = ["sweep.name=x", "trainer=command"]
    with initialize_config_module("sweeper_conf", version_base="1.3"):
        for argv, named in [("[no-such-program]", "no-such-program"), ("[]", "names no program")]:
            with pytest.raises(ConfigError, match=named):
                settings.read(compose("config", overrides=[*base, f"trainer.argv={argv}"]))
        with pytest.raises(ConfigError, match=r"trainer\.argv names no program"):
            settings.read(compose("config", overrides=base))
        ranks = ["trainer.argv=[python]", "launcher.ranks_per_worker=2"]
        with pytest.raises(ConfigError, match="torchrun"):
            settings.read(compose("config", overrides=[*base, *ranks]))
        cfg = compose(
            "config",
            overrides=[*base, "trainer.argv=[python,train.py]", "+trainer.args.lr=0.1",
                       "+sweep.params={trainer.args.lr: 'interval(0.1, 0.2)'}"],
        )  # fmt: skip
        assert set(settings.read(cfg).new.config["space"]) == {"trainer.args.lr"}
