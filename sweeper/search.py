"""Optuna, behind one door: propose the next trial, judge a report, describe a space.

Sampling is reproducible: the parameters of trial k are a function of the sweep's seed, k, and
the finished trials that are known. A fresh sampler is made for each trial, seeded by (seed, k),
and it sees trials that are still running as nothing (`constant_liar` is off in `conf/`).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import itertools
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from hashlib import sha256
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
    json_to_distribution,
)
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from sweeper.errors import ConfigError
from sweeper.optuna_rows import TrialRow
from sweeper.records import Params, ParamValue, Proposal, Run, Sweep
from sweeper.store import Store

optuna.logging.set_verbosity(optuna.logging.WARNING)

MAX_GRID_POINTS = 1_000_000
_json_to_distribution = lru_cache(maxsize=10_000)(json_to_distribution)


# --- making samplers and pruners -----------------------------------------------------------


def make(config: Mapping[str, Any], *, kind: str, **more: Any) -> Any:
    """Build the class named by `_target_` with the group's other keys as arguments.

    Args:
        config: A `sampler` or `pruner` group.
        kind: The group's name, for messages.
        more: Extra arguments, passed only if the class takes them.

    Raises:
        ConfigError: There is no such class, or it refuses its arguments.
    """
    target = str(config.get("_target_"))
    try:
        factory, taken = _class_named(target, kind)
        arguments = {key: _build(value, kind) for key, value in config.items() if key != "_target_"}
        return factory(**arguments, **{key: value for key, value in more.items() if key in taken})
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{kind}={target} cannot be used",
            why=str(error),
            do=f"Name a class of Optuna in {kind}._target_.",
        ) from error


@lru_cache(maxsize=100)  # a sampler is made for each trial, and a signature costs more than that
def _class_named(target: str, kind: str) -> tuple[type[Any], frozenset[str]]:
    """A class of Optuna and the names of its arguments."""
    module, _, name = target.rpartition(".")
    factory = getattr(importlib.import_module(module), name)
    base = optuna.samplers.BaseSampler if kind == "sampler" else optuna.pruners.BasePruner
    if not (inspect.isclass(factory) and issubclass(factory, base)):
        raise TypeError(f"{target} is not an Optuna {kind}")
    if factory is optuna.samplers.QMCSampler:
        raise TypeError("it counts its points in the study's attributes, which workers do not share here")
    return factory, frozenset(inspect.signature(factory).parameters)


def _build(value: Any, kind: str) -> Any:
    return make(value, kind=kind) if isinstance(value, Mapping) and "_target_" in value else value


def is_grid(sampler: Mapping[str, Any]) -> bool:
    """Whether the sampler walks a grid; its points are then enqueued when the sweep is created."""
    return str(sampler.get("_target_", "")).endswith(".GridSampler")


def grid(space: Mapping[str, str]) -> list[Proposal]:
    """Every point of a finite space, each exactly once, the last parameter moving fastest.

    Raises:
        ConfigError: A parameter has no finite set of values.
    """
    distributions = {name: _json_to_distribution(text) for name, text in space.items()}
    axes = {name: _values(name, distribution) for name, distribution in distributions.items()}
    size = math.prod(len(values) for values in axes.values())
    if size > MAX_GRID_POINTS:
        raise ConfigError(
            f"the grid has {size:,} points, more than {MAX_GRID_POINTS:,}", do="Give it fewer values."
        )
    points = itertools.product(*axes.values())
    return [
        _proposal(number, dict(zip(axes, point, strict=True)), distributions)
        for number, point in enumerate(points)
    ]


def _values(name: str, distribution: BaseDistribution) -> list[ParamValue]:
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)  # type: ignore[arg-type]
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, FloatDistribution) and distribution.step:
        count = round((distribution.high - distribution.low) / distribution.step) + 1
        return [distribution.low + index * distribution.step for index in range(count)]
    raise ConfigError(
        f"sampler=grid cannot walk {name}, which has infinitely many values",
        do="Use choice(…) or range(…) for it, or another sampler.",
    )


# --- the space -----------------------------------------------------------------------------


def space_of(params: Mapping[str, Any]) -> dict[str, str]:
    """`sweep.params` → parameter: JSON of its distribution; a list is a choice. Raises ConfigError."""
    return {key: distribution_of(key, _as_text(value)) for key, value in sorted(params.items())}


def _as_text(value: Any) -> str:
    return f"choice({', '.join(map(str, value))})" if isinstance(value, list) else str(value)


@lru_cache(maxsize=1_000)
def distribution_of(key: str, text: str) -> str:
    """One line of `sweep.params` in Hydra's override grammar → JSON of an Optuna distribution.

    `choice(a, b)`, `range(1, 10)`, `interval(0, 1)`, with `tag(log, …)`, `tag(int, …)` or
    `int(interval(…))` around them. Source: the grammar of Hydra's overrides and the meaning
    hydra-optuna-sweeper gives it.

    Raises:
        ConfigError: It is no search space.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
        sweep = override.value()
        if not override.is_sweep_override():
            raise ValueError("it is one fixed value; set it as an override instead")
        if unknown := set(getattr(sweep, "tags", ())) - {"log", "int"}:
            raise ValueError(f"there is no tag {min(unknown)!r}, only log and int")
        if isinstance(sweep, ChoiceSweep):
            sweep.shuffle = False  # the order of choices must be the same in every launch
            made: BaseDistribution = _choices(list(override.sweep_iterator()))
        elif isinstance(sweep, IntervalSweep):
            made = _interval(sweep.start, sweep.end, tags=set(sweep.tags))
        elif isinstance(sweep, RangeSweep):
            made = _range(sweep.start, sweep.stop, sweep.step, log="log" in sweep.tags)
        else:
            raise ValueError("it is neither choice(), range() nor interval()")
    except (HydraException, ValueError, TypeError, ArithmeticError) as error:
        raise ConfigError(
            f"sweep.params: {key}: {text!r} is not a search space",
            why=str(error).splitlines()[0],
            do="Write e.g. tag(log, interval(1e-4, 1e-1)), choice(32, 64) or range(1, 9).",
        ) from error
    return distribution_to_json(made)


def _choices(values: list[Any]) -> CategoricalDistribution:
    from hydra.core.override_parser.types import QuotedString

    plain = [value.text if isinstance(value, QuotedString) else value for value in values]
    if not plain or not all(isinstance(value, str | int | float | bool) for value in plain):
        raise ValueError("choices must be texts, numbers or booleans")
    if len(set(plain)) != len(plain):
        raise ValueError("two of its choices are equal")
    return CategoricalDistribution(plain)


def _interval(start: Any, end: Any, *, tags: set[str]) -> BaseDistribution:
    if not math.isfinite(end - start):
        raise ValueError("its ends must be finite numbers")
    if "int" not in tags and not (isinstance(start, int) and isinstance(end, int)):
        return FloatDistribution(float(start), float(end), log="log" in tags)
    if int(start) != start or int(end) != end:
        raise ValueError("the ends of an interval of whole numbers must be whole numbers")
    return IntDistribution(int(start), int(end), log="log" in tags)


def _range(start: Any, stop: Any, step: Any, *, log: bool) -> BaseDistribution:
    if all(isinstance(value, int) for value in (start, stop, step)):
        return IntDistribution(start, start + (stop - 1 - start) // step * step, log=log, step=step)
    count = math.ceil((stop - start) / step - 1e-9)
    return FloatDistribution(float(start), float(start + (count - 1) * step), log=log, step=float(step))


# --- proposing and judging -----------------------------------------------------------------


class Search:
    """Asks and judges for one sweep, against an in-memory view of the study kept up to date.

    Args:
        store: Where the study is.
        sweep: The sweep; its `config` holds `space`, `sampler` and `pruner`.
    """

    def __init__(self, store: Store, sweep: Sweep) -> None:
        self._store = store
        self._sweep = sweep
        self._sampler = sweep.config["sampler"]
        self._pruner = sweep.config["pruner"]
        self._space = {
            name: _json_to_distribution(text) for name, text in sorted(sweep.config["space"].items())
        }
        self._view = _View()
        optuna.create_study(
            storage=self._view,
            study_name=sweep.name,
            direction=optuna.study.StudyDirection[sweep.direction.upper()],
        )

    def propose(self) -> Proposal | None:
        """The next trial: one that waits, else a sampled one. None when a grid is exhausted."""
        waiting, number = self._store.queue(self._sweep.study_id)
        if waiting is not None:
            return self._complete(waiting)
        if is_grid(self._sampler):
            return None
        params, attrs = self._sample(number, fixed={})
        return _proposal(number, params, self._space, system_attrs=attrs)

    def _complete(self, waiting: TrialRow) -> Proposal:
        """A WAITING trial has some or all of its parameters fixed; the rest is sampled."""
        fixed: dict[str, Any] = json.loads(waiting.system_attrs.get("fixed_params", "{}"))
        for name, (value, text) in waiting.params.items():
            fixed[name] = _json_to_distribution(text).to_external_repr(value)
        known = self._usable(fixed, waiting.number)
        params, attrs = (
            self._sample(waiting.number, fixed=known) if len(known) < len(self._space) else (known, {})
        )
        retry_of = json.loads(waiting.system_attrs.get("sweeper:retry_of", "null"))
        return _proposal(
            waiting.number,
            params,
            self._space,
            waiting_id=waiting.trial_id,
            system_attrs=attrs,
            retry_of=retry_of,
        )

    def _usable(self, fixed: Mapping[str, Any], number: int) -> Params:
        """The fixed parameters, as the space has them. Raising would stop the sweep for good."""
        known = {}
        for name, value in fixed.items():
            distribution = self._space.get(name)
            if distribution is None:
                continue
            try:
                known[name] = distribution.to_external_repr(distribution.to_internal_repr(value))
            except (ValueError, TypeError) as error:
                warnings.warn(
                    f"trial {number} waits with {name}={value!r}; sampled instead: {error}", stacklevel=2
                )
        return known

    def _sample(self, number: int, *, fixed: Params) -> tuple[Params, dict[str, Any]]:
        sampler = make(self._sampler, kind="sampler", seed=_seed(self._sweep.seed, number))
        if not isinstance(sampler, optuna.samplers.RandomSampler):
            self._refresh()
        trial = _frozen_new(number)
        study = self._study()
        with self._view.asking(trial):
            sampler.before_trial(study, trial)
            relative = sampler.sample_relative(
                study, trial, self._relative_space(sampler, study, trial, fixed)
            )
            for name, distribution in self._space.items():
                if name in fixed:
                    value = fixed[name]
                elif distribution.single():
                    value = _only(distribution)
                elif name in relative:
                    value = relative[name]
                else:
                    value = sampler.sample_independent(study, trial, name, distribution)
                trial.params[name], trial.distributions[name] = value, distribution
        return trial.params, dict(self._view.written)

    def _relative_space(
        self, sampler: BaseSampler, study: optuna.Study, trial: FrozenTrial, fixed: Params
    ) -> dict[str, BaseDistribution]:
        """The parameters that the sampler draws together."""
        space = {name: d for name, d in self._space.items() if name not in fixed and not d.single()}
        draws_all = type(sampler) is TPESampler and sampler._is_multivariate(study) and not sampler._group
        if draws_all or not space:
            return space  # as TPE would find, after a look at every trial (170 ms at 10,000)
        inferred = sampler.infer_relative_search_space(study, trial)
        return {name: distribution for name, distribution in inferred.items() if name in space}

    def judge(self, run: Run, *, step: int, value: float) -> tuple[bool, dict[str, Any]]:
        """Whether the pruner would stop this run at `step`, and what it wants remembered.

        Nothing is stored here: `Store.report` writes value, verdict and attributes together.
        """
        if self._pruner is None or str(self._pruner.get("_target_", "")).endswith(".NopPruner"):
            return False, {}
        self._refresh(always=(run.trial,))
        trial = self._view.trials[run.trial]
        trial.intermediate_values[step] = value
        self._view.written.clear()
        pruner = make(self._pruner, kind="pruner")
        verdict = bool(pruner.prune(self._study(), trial))
        return verdict, dict(self._view.written)

    def _study(self) -> optuna.Study:
        # HAZARD: a Study caches its trials until its own ask(); a new one has an empty cache.
        return optuna.load_study(study_name=self._sweep.name, storage=self._view)

    def _refresh(self, *, always: Sequence[int] = ()) -> None:
        view = self._view
        changed = sorted(view.unfinished | set(always))
        for row in self._store.trials(self._sweep.study_id, after=len(view.trials) - 1, numbers=changed):
            trial = _frozen(row)
            if row.number < len(view.trials):
                view.trials[row.number] = trial
            else:
                view.trials.append(trial)
            (view.unfinished.discard if trial.state.is_finished() else view.unfinished.add)(row.number)


class _View(InMemoryStorage):
    """A study whose trials are set from outside; what samplers and pruners write is collected."""

    def __init__(self) -> None:
        super().__init__()
        self.trials: list[FrozenTrial] = []
        self.unfinished: set[int] = set()
        self.written: dict[str, Any] = {}
        self._asked: FrozenTrial | None = None

    @contextlib.contextmanager
    def asking(self, trial: FrozenTrial) -> Iterator[None]:
        """`trial` is in the study while a sampler is asked about it, as it is with Optuna's own ask."""
        self._asked = trial
        self.written.clear()
        try:
            yield
        finally:
            self._asked = None

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        trials, asked = self.trials, self._asked
        if asked is not None:
            trials = [*trials[: asked.number], asked, *trials[asked.number + 1 :]]
        return [trial for trial in trials if states is None or trial.state in states]

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return next(trial for trial in self.trials if trial._trial_id == trial_id)

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        done = [trial for trial in self.trials if trial.state == TrialState.COMPLETE]
        if not done:
            raise ValueError("No trials are completed yet.")
        pick = max if self.get_study_directions(study_id)[0].name == "MAXIMIZE" else min
        return pick(done, key=lambda trial: float(trial.values[0]))

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.written[key] = value
        for index in range(len(self.trials) - 1, -1, -1):
            if self.trials[index]._trial_id == trial_id:
                # HAZARD: a copy, as Optuna's storages make. Successive halving counts the value in
                # the trials it fetched before it writes, and then once more.
                trial = self.trials[index] = copy.copy(self.trials[index])
                trial.system_attrs = {**trial.system_attrs, key: value}
                break


def proposal(number: int, params: Params, space: Mapping[str, str]) -> Proposal:
    """A trial with given parameters; those outside the space are left out of Optuna's rows."""
    distributions = {name: _json_to_distribution(text) for name, text in space.items()}
    return _proposal(
        number, {name: value for name, value in params.items() if name in distributions}, distributions
    )


def _seed(sweep_seed: int, number: int) -> int:
    return int.from_bytes(sha256(f"sampler:{sweep_seed}:{number}".encode()).digest()[:4], "big")


def _only(distribution: BaseDistribution) -> Any:
    return distribution.choices[0] if isinstance(distribution, CategoricalDistribution) else distribution.low  # type: ignore[attr-defined]


def _proposal(number: int, params: Params, space: Mapping[str, BaseDistribution], **more: Any) -> Proposal:
    internal = {
        name: (float(space[name].to_internal_repr(value)), _to_json(space[name]))
        for name, value in params.items()
    }
    return Proposal(number, params, internal, **more)


@lru_cache(maxsize=10_000)
def _to_json(distribution: BaseDistribution) -> str:
    return distribution_to_json(distribution)


def _frozen_new(number: int) -> FrozenTrial:
    return FrozenTrial(
        number=number, state=TrialState.RUNNING, value=None, datetime_start=datetime.now(), datetime_complete=None,
        params={}, distributions={}, user_attrs={}, system_attrs={}, intermediate_values={}, trial_id=-1,
    )  # fmt: skip


def _frozen(row: TrialRow) -> FrozenTrial:
    distributions = {name: _json_to_distribution(text) for name, (_, text) in row.params.items()}
    return FrozenTrial(
        number=row.number,
        state=TrialState[row.state],
        value=row.value,
        datetime_start=_time(row.started_at),
        datetime_complete=_time(row.completed_at),
        params={name: distributions[name].to_external_repr(value) for name, (value, _) in row.params.items()},
        distributions=distributions,
        user_attrs={},
        system_attrs={key: json.loads(text) for key, text in row.system_attrs.items()},
        intermediate_values=row.reports,
        trial_id=row.trial_id,
    )


def _time(value: Any) -> datetime | None:
    return datetime.fromisoformat(value) if isinstance(value, str) else value
