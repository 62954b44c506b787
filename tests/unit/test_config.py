"""The configuration of one trial, as plain values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sweeper.config import LAUNCH_ONLY, for_run, put, to_yaml
from sweeper.errors import EXIT_CONFIG, ConfigError

CONFIG: dict[str, Any] = {
    "trainer": {"lr": 0.1, "width": 16, "optimizer": {"momentum": None}},
    "sweep": {"name": "simple", "params": {"trainer.lr": "interval(0, 1)"}},
    "space": {"trainer.lr": "{}"},
    "stop_at": 1.0,
}


def test_a_trials_parameters_are_put_in_place_and_the_sweeps_own_stay() -> None:
    before = copy.deepcopy(CONFIG)
    made = for_run(CONFIG, {"trainer.lr": 0.5, "trainer.optimizer.momentum": 0.9})
    assert made["trainer"] == {"lr": 0.5, "width": 16, "optimizer": {"momentum": 0.9}}
    assert before == CONFIG


def test_what_only_a_launch_needs_is_left_out() -> None:
    assert set(for_run(CONFIG, {})) == set(CONFIG) - set(LAUNCH_ONLY)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("trainer.lrr", "there is lr, optimizer, width"),
        ("trainer.optimizer.lr", "there is momentum"),
        ("trainer.lr.lr", "there is nothing"),
        ("model.width", "there is nothing"),
        ("trainer.optimizer", "a group of settings, not a value"),
        ("", "there is space, stop_at, sweep, trainer"),
    ],
)
def test_a_parameter_outside_the_configuration_is_refused_with_what_there_is(key: str, said: str) -> None:
    before = copy.deepcopy(CONFIG)
    with pytest.raises(ConfigError) as caught:
        put(CONFIG, key, 1)
    assert said in str(caught.value)
    assert f"the parameter {key} is" in str(caught.value)
    assert caught.value.exit_code == EXIT_CONFIG
    assert before == CONFIG


values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
plain = st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), values | st.lists(values, max_size=3))


@settings(max_examples=50, deadline=None)
@given(config=plain)
def test_yaml_gives_back_the_same_values(config: dict[str, Any]) -> None:
    assert repr(yaml.safe_load(to_yaml(config))) == repr(dict(sorted(config.items())))


@pytest.mark.parametrize(
    "value", [1e-5, 3e-4, 1e16, -0.0, 0.1 + 0.2, 5e-324, float("inf"), 10**20, "0x10", "no", "1e-5"]
)
def test_numbers_keep_their_bits_and_texts_stay_texts_for_omegaconf_too(value: object) -> None:
    data = to_yaml({"trainer": {"lr": value}})
    assert repr(OmegaConf.create(data.decode()).trainer.lr) == repr(value)


def test_the_same_configuration_has_the_same_bytes() -> None:
    assert to_yaml({"b": 1, "a": {"d": 1, "c": 2}}) == to_yaml({"a": {"c": 2, "d": 1}, "b": 1})
