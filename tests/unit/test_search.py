"""Search spaces in Hydra's grammar, grids, and the classes of Optuna that a config may name."""

from __future__ import annotations

import json
from typing import Any

import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    json_to_distribution,
)

from sweeper.errors import ConfigError
from sweeper.search import MAX_GRID_POINTS, distribution_of, grid, is_grid, make

# --- the grammar -------------------------------------------------------------------------------

GRAMMAR: dict[str, BaseDistribution] = {
    "choice(1, 2)": CategoricalDistribution([1, 2]),
    "choice(0.5, 1e-3)": CategoricalDistribution([0.5, 1e-3]),
    "choice(true, false)": CategoricalDistribution([True, False]),
    "choice(relu, 'leaky relu', \"a,b\")": CategoricalDistribution(["relu", "leaky relu", "a,b"]),
    "choice(adam)": CategoricalDistribution(["adam"]),
    "32, 64": CategoricalDistribution([32, 64]),
    "sort(choice(3, 1, 2))": CategoricalDistribution([1, 2, 3]),
    "shuffle(choice(3, 1, 2))": CategoricalDistribution([3, 1, 2]),
    "bool(choice(0, 1))": CategoricalDistribution([False, True]),
    "range(1, 3)": IntDistribution(1, 2),
    "range(1, 10, 3)": IntDistribution(1, 7, step=3),
    "range(1, 11, 3)": IntDistribution(1, 10, step=3),
    "shuffle(range(1, 3))": IntDistribution(1, 2),
    "tag(log, range(1, 9))": IntDistribution(1, 8, log=True),
    "range(0.5, 5.5, step=1)": FloatDistribution(0.5, 4.5, step=1.0),
    "range(0, 0.3, 0.1)": FloatDistribution(0.0, 0.2, step=0.1),
    "float(range(1, 3))": FloatDistribution(1.0, 2.0, step=1.0),
    "interval(1, 5)": FloatDistribution(1.0, 5.0),
    "interval(-1.5, 1.5)": FloatDistribution(-1.5, 1.5),
    "tag(log, interval(1e-4, 1e-1))": FloatDistribution(1e-4, 1e-1, log=True),
    "int(interval(1, 5))": IntDistribution(1, 5),
    "tag(int, interval(1, 12))": IntDistribution(1, 12),
    "tag(log, int(interval(1, 5)))": IntDistribution(1, 5, log=True),
    "tag(int, log, interval(1, 12))": IntDistribution(1, 12, log=True),
}


@pytest.mark.parametrize("text", GRAMMAR)
def test_a_line_of_hydras_grammar_is_this_distribution(text: str) -> None:
    assert json_to_distribution(distribution_of("trainer.lr", text)) == GRAMMAR[text]


REFUSED = {
    "5": "one fixed value",
    "[1, 2]": "one fixed value",
    "": "one fixed value",
    "glob(*)": "neither choice(), range() nor interval()",
    "choice(": "no viable alternative",
    "choice()": "empty choice",
    "choice([1, 2], [3])": "texts, numbers or booleans",
    "choice(32, 32)": "two of its choices are equal",
    "choice(true, 1)": "two of its choices are equal",
    "range(5, 1)": "low <= high",
    "range(10, 1, -3)": "low <= high",
    "range(0, 1, 0)": "by zero",
    "range(0.0, 1.0, 0.0)": "by zero",
    "range(1, 1e400)": "infinity",
    "tag(log, range(0, 5))": "low >= 1",
    "tag(log, range(1, 9, 2))": "step is 1",
    "tag(log, range(0.1, 1, 0.1))": "step",
    "interval(5, 1)": "low <= high",
    "interval(0, inf)": "finite",
    "interval(nan, 1)": "finite",
    "tag(log, interval(0, 1))": "low > 0",
    "tag(int, interval(1.5, 3))": "whole numbers",
    "tag(lgo, interval(0, 1))": "no tag 'lgo'",
    "str(interval(1, 2))": "cannot be cast",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_search_space_is_refused_with_key_text_and_reason(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        distribution_of("trainer.lr", text)
    said = str(caught.value)
    assert said.startswith(f"sweep.params: trainer.lr: {text!r} is not a search space: ")
    assert REFUSED[text] in caught.value.why
    assert "Write e.g." in said
    assert "\n" not in said


@pytest.mark.parametrize("text", ["shuffle(choice(a, b, c, d, e, f, g, h))", "shuffle(8, 7, 6, 5, 4, 3)"])
def test_a_space_is_the_same_in_every_launch(text: str) -> None:
    assert len({distribution_of("trainer.lr", text) for _ in range(10)}) == 1


# --- grids -------------------------------------------------------------------------------------


def space(**texts: str) -> dict[str, str]:
    return {name: distribution_of(name, text) for name, text in texts.items()}


def points(**texts: str) -> list[dict[str, Any]]:
    return [dict(point.params) for point in grid(space(**texts))]


def test_a_grid_has_each_point_once_the_last_parameter_moving_fastest() -> None:
    assert points(a="choice(x, y)", b="range(1, 4)") == [
        {"a": a, "b": b} for a in ("x", "y") for b in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("range(1, 10, 4)", [1, 5, 9]),
        ("range(0.0, 1.0, 0.25)", [0.0, 0.25, 0.5, 0.75]),
        ("int(interval(1, 3))", [1, 2, 3]),
        ("choice(true, relu, 0.5)", [True, "relu", 0.5]),
    ],
)
def test_a_grid_walks_every_value_of_a_finite_parameter(text: str, values: list[Any]) -> None:
    assert [point["a"] for point in points(a=text)] == values


@pytest.mark.parametrize("text", ["interval(0, 1)", "tag(log, interval(1e-4, 1))", "tag(log, range(1, 9))"])
def test_a_grid_over_infinitely_many_values_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="sampler=grid cannot walk a"):
        points(a=text)


def test_a_grid_that_would_not_fit_is_refused_before_it_is_made() -> None:
    with pytest.raises(ConfigError, match=f"more than {MAX_GRID_POINTS:,}"):
        points(a="range(0, 1000000)", b="range(0, 1000000)")


def test_a_points_rows_are_what_optuna_would_store() -> None:
    (*_, last) = grid(space(a="choice(x, y)", b="range(1, 4)"))
    internal = {name: (value, json.loads(text)["name"]) for name, (value, text) in last.internal.items()}
    assert internal == {"a": (1.0, "CategoricalDistribution"), "b": (3.0, "IntDistribution")}


# --- classes by name ---------------------------------------------------------------------------


def test_a_sampler_is_made_with_its_arguments_and_seed() -> None:
    sampler = make({"_target_": "optuna.samplers.TPESampler", "n_startup_trials": 3}, kind="sampler", seed=1)
    assert isinstance(sampler, optuna.samplers.TPESampler)
    assert sampler._n_startup_trials == 3


def test_a_pruner_may_hold_another() -> None:
    wrapped = {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 7}
    pruner = make(
        {"_target_": "optuna.pruners.PatientPruner", "wrapped_pruner": wrapped, "patience": 2}, kind="pruner"
    )
    assert pruner._wrapped_pruner._n_startup_trials == 7


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"_target_": "optuna.samplers.NoSuchSampler"}, "has no attribute"),
        ({"_target_": "no_such_module.Sampler"}, "No module named"),
        ({"_target_": "RandomSampler"}, "Empty module name"),
        ({}, "Empty module name"),
        ({"_target_": "optuna.pruners.MedianPruner"}, "not an Optuna sampler"),
        ({"_target_": "os.system"}, "not an Optuna sampler"),
        ({"_target_": "optuna.samplers.QMCSampler"}, "counts its points"),
        ({"_target_": "optuna.samplers.TPESampler", "n_strtup_trials": 3}, "n_strtup_trials"),
    ],
)
def test_a_class_that_cannot_be_used_is_refused_by_name(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        make(config, kind="sampler")
    assert reason in caught.value.why


@pytest.mark.parametrize("value", [-1, "many"])
def test_a_value_that_optuna_refuses_is_a_configuration_error(value: object) -> None:
    with pytest.raises(ConfigError, match=r"pruner=optuna\.pruners\.PercentilePruner cannot be used"):
        make({"_target_": "optuna.pruners.PercentilePruner", "percentile": value}, kind="pruner")


def test_only_optunas_grid_sampler_is_a_grid() -> None:
    assert is_grid({"_target_": "optuna.samplers.GridSampler"})
    assert not is_grid({"_target_": "optuna.samplers.RandomSampler"})
    assert not is_grid({})
