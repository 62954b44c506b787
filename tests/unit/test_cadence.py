"""When to save: both sides of every boundary, and the interval that Young and Daly found."""

from __future__ import annotations

import math
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweeper.torch.cadence import FIRST_AUTO_S, SLOWDOWN, Cadence, young_daly


def due(cadence: Cadence, *, steps: int = 0, seconds: float = 0.0, is_epoch_end: bool = False) -> bool:
    return cadence.is_due(steps=steps, seconds=seconds, is_epoch_end=is_epoch_end)


def test_no_rule_is_never_due() -> None:
    assert not due(Cadence(), steps=10**9, seconds=1e9, is_epoch_end=True)


def test_steps() -> None:
    assert not due(Cadence(every_n_steps=10), steps=9, seconds=1e9)
    assert due(Cadence(every_n_steps=10), steps=10)
    assert due(Cadence(every_n_steps=10), steps=11)


def test_seconds() -> None:
    assert not due(Cadence(every_s=1.5), seconds=1.4999, steps=10**9)
    assert due(Cadence(every_s=1.5), seconds=1.5)
    assert due(Cadence(every_s=0.0), seconds=0.0), "at each step"


def test_epoch_ends() -> None:
    assert not due(Cadence(at_epoch_end=True), steps=10**9, seconds=1e9)
    assert due(Cadence(at_epoch_end=True), is_epoch_end=True)


def test_the_first_rule_that_is_due_decides() -> None:
    cadence = Cadence(every_n_steps=10, every_s=60.0, at_epoch_end=True)
    assert due(cadence, steps=10)
    assert due(cadence, seconds=60.0)
    assert due(cadence, is_epoch_end=True)
    assert not due(cadence, steps=9, seconds=59.9)


def test_settings_are_read() -> None:
    settings = {"every_n_steps": 7, "every_s": 2.0, "at_epoch_end": True, "interval": "auto"}
    assert Cadence.of(settings, mtbf_s=9.0) == Cadence(7, 2.0, True, True, 9.0)
    assert Cadence.of({}, mtbf_s=9.0) == Cadence(mtbf_s=9.0)
    assert not Cadence.of({"interval": None}, mtbf_s=9.0).is_auto


def test_auto_takes_the_place_of_seconds_and_leaves_the_other_rules() -> None:
    auto = Cadence(every_n_steps=10, every_s=0.5, is_auto=True, mtbf_s=3600.0)
    assert not due(auto, seconds=0.9)
    assert due(auto, seconds=FIRST_AUTO_S), "before anything was measured"
    assert due(auto, steps=10)


def test_auto_counts_what_a_save_costs_the_training() -> None:
    auto = Cadence(is_auto=True, mtbf_s=1000.0)
    cost_s = 0.1 + SLOWDOWN * (2.1 - 0.1)
    assert auto.interval_s(blocked_s=0.1, took_s=2.1) == young_daly(cost_s, 1000.0)
    assert auto.interval_s(blocked_s=2.1, took_s=2.1) == young_daly(2.1, 1000.0), "saved at once"
    assert auto.interval_s(blocked_s=0.0, took_s=500.0) == 500.0, "never sooner than a save takes"


# --- Daly 2006, equation 37 ------------------------------------------------------------------


@pytest.mark.parametrize(("cost_s", "mtbf_s"), [(1.0, 3600.0), (0.05, 60.0), (300.0, 86400.0), (10.0, 6.0)])
def test_the_formula(cost_s: float, mtbf_s: float) -> None:
    d, m = cost_s, mtbf_s
    expected = sqrt(2 * d * m) * (1 + 1 / 3 * (d / (2 * m)) ** 0.5 + 1 / 9 * (d / (2 * m))) - d
    assert young_daly(d, m) == pytest.approx(expected, rel=1e-12)


def test_a_save_that_costs_more_than_the_time_between_two_failures() -> None:
    assert young_daly(2 * 50.0, 50.0) == 50.0
    assert young_daly(1000.0, 50.0) == 50.0
    assert young_daly(2 * 50.0 * (1 - 1e-9), 50.0) == pytest.approx(
        sqrt(2 * 100 * 50) * (1 + 1 / 3 + 1 / 9) - 100
    )


def test_limits() -> None:
    assert young_daly(0.0, 3600.0) == 0.0
    assert young_daly(1.0, math.inf) == math.inf
    assert young_daly(1e-6, 1e6) == pytest.approx(sqrt(2.0), rel=1e-3), "Young's first term"


@given(
    cost_s=st.floats(1e-4, 100.0),
    mtbf_s=st.floats(1.0, 1e7),
    factor=st.floats(0.25, 4.0).filter(lambda f: f != 1),
)
def test_no_other_interval_loses_less(cost_s: float, mtbf_s: float, factor: float) -> None:
    """Against Daly's complete model of the run time (equation 20), restart time left out."""

    def loss(interval_s: float) -> float:
        return math.expm1(min(700.0, (interval_s + cost_s) / mtbf_s)) / interval_s

    if cost_s < mtbf_s / 2:  # where he says that the estimate is good
        best = young_daly(cost_s, mtbf_s)
        assert loss(best) <= loss(best * factor) * 1.003
