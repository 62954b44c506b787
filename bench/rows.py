"""The rows: what is measured, beside whom, over which floor, and what the goal is (DESIGN, section 9)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from bench import failures, floors, intervals, ours, peers, processes, trials
from bench.failures import Victim
from bench.processes import Failed
from bench.table import Cell, Goal, Line, Missing, Series, above, at_least, at_most, below

MEAN_KILL_S = 10.0
Say = Callable[[str], None]
Answers = list[dict[str, Any]]
"""What a crowd said, once for each repeat."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    fast_trials: int = 200
    slow_trials: int = 16
    ask_repeats: int = 3
    repeats: int = 5
    asks: int = 600
    claims: int = 64_000
    ask_limit_s: float = 6.0
    runs: int = 100_000
    window_s: float = 120.0
    logged_steps: int = 60_000
    size_mb: int = 300
    save_sizes_mb: tuple[int, ...] = (30, 300, 1200)


QUICK = Size(
    fast_trials=60,
    slow_trials=8,
    repeats=3,
    ask_repeats=1,
    asks=200,
    claims=6_400,
    ask_limit_s=3.0,
    window_s=40.0,
    logged_steps=30_000,
)


@dataclass(slots=True)
class Bench:
    """One run of the bench. Floors that several rows share are measured once.

    Attributes:
        say: Progress, for people.
        has_peers: False measures only ours and the floors.
    """

    size: Size
    say: Say
    has_peers: bool = True
    _import_torch: Series | None = None
    _restart: dict[str, list[float]] | None = None

    def import_torch_s(self) -> Series:
        """Floor of rows 2, 6 and 7."""
        if self._import_torch is None:
            self._import_torch = floors.import_torch_s(repeats=self.size.repeats)
        return self._import_torch

    def restart(self) -> dict[str, list[float]]:
        """Floor of rows 5, 6 and 7."""
        if self._restart is None:
            self._restart = floors.restart(repeats=self.size.repeats)
        return self._restart

    def beside(self, measure: Mapping[str, Callable[[], Cell]]) -> dict[str, Cell]:
        """Measure the peers one after the other."""
        cells: dict[str, Cell] = {}
        for name, act in measure.items() if self.has_peers else ():
            self.say(f"  {name}")
            cells[name] = act()
        return cells


def trial_cost(bench: Bench) -> Iterator[Line]:
    """Row 1."""
    size = bench.size
    training_s = floors.training_s()

    def cost(contender: Any, count: int) -> Cell:
        return trials.cost_ms(contender, trials=count, training_s=training_s, timeout_s=240)

    def of(name: str) -> Callable[[], Cell]:
        count = size.fast_trials if name in peers.FAST else size.slow_trials
        return lambda: cost(peers.trial_programs(count)[name], count)

    floor = floors.trial_ms(count=size.fast_trials, training_s=training_s)
    goal = Goal("≤ 1.3 × floor", at_most(1.3))
    title = "trial beyond its training, 2 workers"
    mine = cost(ours.trials(size.fast_trials), size.fast_trials)
    yield Line(
        "1",
        title,
        "ms",
        mine,
        floor,
        goal,
        bench.beside({name: of(name) for name in peers.trial_programs(1)}),
    )
    saving = cost(ours.trials(size.fast_trials, sweep="bench_tiny_resumable"), size.fast_trials)
    yield Line("1b", "the same with a last checkpoint", "ms", saving, floor, Goal("", lambda *_: None))


def first_start(bench: Bench) -> Iterator[Line]:
    """Row 2."""

    def start(contender: Any) -> Cell:
        return trials.first_start_s(contender, repeats=bench.size.repeats, timeout_s=60)

    others = {name: partial(start, contender) for name, contender in peers.trial_programs(2).items()}
    mine = start(ours.trials(2))
    goal = Goal("≤ 1.2 × floor", at_most(1.2))
    yield Line("2", "first trial's start", "s", mine, bench.import_torch_s(), goal, bench.beside(others))


def ask_tell(bench: Bench) -> Iterator[Line]:
    """Row 3."""
    size = bench.size
    for workers in (1, 4, 16):
        acts = {"sweeper": ours.asks, "floor": floors.transactions}
        if bench.has_peers:
            acts |= {f"Optuna, {kind}": partial(peers.asks, kind) for kind in ("sqlite", "journal")}
        answers: dict[str, Answers] = {name: [] for name in acts}
        for _, (name, act) in product(range(size.ask_repeats), acts.items()):
            bench.say(f"  {name}, {workers} workers")
            count = 4 * size.asks if name == "floor" else size.asks
            answers[name].append(_measured(act, workers=workers, acts=count, limit_s=size.ask_limit_s))
        mine, floor = answers.pop("sweeper"), answers.pop("floor")
        yield _rates(workers, mine, floor, answers)
        yield _latencies(workers, mine, floor, answers)


def _measured(act: Callable[..., dict[str, Any]], **arguments: Any) -> dict[str, Any]:
    try:
        return act(**arguments)
    except Failed as error:
        return {"error": str(error)}


def _cell(answers: Answers, key: str, scale: float = 1.0) -> Cell:
    errors = [answer["error"] for answer in answers if "error" in answer]
    return Missing(errors[0]) if errors else Series(tuple(scale * answer[key] for answer in answers))


def _rates(workers: int, mine: Answers, floor: Answers, others: dict[str, Answers]) -> Line:
    def reached(ours: Series, floor: Cell, peers: dict[str, Cell]) -> bool | None:
        journal = peers.get("Optuna, journal")
        is_ahead = ours.median > journal.median if isinstance(journal, Series) else True
        return ours.median >= floor.median / 2 and is_ahead if isinstance(floor, Series) else None

    cells = {name: _cell(answer, "rate_per_s") for name, answer in others.items()}
    goal = Goal("≥ floor / 2, > journal", reached)
    title = f"ask + tell, SQLite, {workers} workers"
    return Line("3", title, "per s", _cell(mine, "rate_per_s"), _cell(floor, "rate_per_s"), goal, cells)


def _latencies(workers: int, mine: Answers, floor: Answers, others: dict[str, Answers]) -> Line:
    def reached(ours: Series, floor: Cell, peers: dict[str, Cell]) -> bool | None:
        journal = peers.get("Optuna, journal")
        return ours.median <= journal.median / 2 if workers == 16 and isinstance(journal, Series) else None

    cells = {name: _cell(answer, "p99_s", 1e3) for name, answer in others.items()}
    goal = Goal("≤ journal / 2" if workers == 16 else "", reached)
    title = f"  p99 of one, {workers} workers"
    return Line("3", title, "ms", _cell(mine, "p99_s", 1e3), _cell(floor, "p99_s", 1e3), goal, cells)


def listing(bench: Bench) -> Iterator[Line]:
    """Row 4."""
    runs, repeats = bench.size.runs, 2 * bench.size.repeats
    with processes.scratch() as directory:
        try:
            database = ours.fill(directory, runs=runs, unfinished=100)
            mine: Cell = ours.listing_s(database, repeats=repeats)
            floor: Cell = floors.query_s(database, repeats=repeats)
        except Failed as error:
            mine = floor = Missing(str(error))
    others = bench.beside({"Optuna": lambda: peers.listing_s(runs=runs, unfinished=100)})
    yield Line(
        "4", f"list 100 unfinished among {runs:,}", "s", mine, floor, Goal("≤ 0.1 s", below(0.1)), others
    )


def trainer_killed(bench: Bench) -> Iterator[Line]:
    """Row 5."""
    floor = Series(tuple(bench.restart()["restart_s"]))
    yield _restarts(
        "5", "trainer killed → first new step", "trainer", bench, floor, Goal("≤ 0.3 s", below(0.3))
    )


def everything_killed(bench: Bench) -> Iterator[Line]:
    """Row 6."""
    load_s = Series(tuple(bench.restart()["restart_s"])).median
    floor = Series(tuple(1.0 * value for value in bench.import_torch_s().values), note=f"+ load {load_s:.2g}")

    def reached(ours: Series, floor: Cell, _: dict[str, Cell]) -> bool | None:
        return ours.median <= 1.2 * floor.median + load_s if isinstance(floor, Series) else None

    goal = Goal("≤ 1.2 × floor + load", reached)
    yield _restarts("6", "everything killed, relaunched → first new step", "everything", bench, floor, goal)


def _restarts(row: str, title: str, victim: Victim, bench: Bench, floor: Cell, goal: Goal) -> Line:
    repeats = bench.size.repeats

    def measure(contender: Any) -> Callable[[], Cell]:
        return lambda: failures.restart_s(contender, victim, repeats=repeats)

    mine = measure(ours.LONG_RUN)()
    others = bench.beside({contender.name: measure(contender) for contender in peers.LONG_RUNS})
    return Line(row, title, "s", mine, floor, goal, others)


def goodput(bench: Bench) -> Iterator[Line]:
    """Row 7."""
    step_s = floors.step_s()
    save_s = Series(tuple(bench.restart()["save_s"])).median
    restart_s = Series(tuple(bench.restart()["restart_s"])).median
    for victim, back_s, least in (
        ("trainer", restart_s, 0.95),
        ("everything", restart_s + bench.import_torch_s().median, 0.75),
    ):
        yield _goodputs(bench, victim, least, step_s=step_s, save_s=save_s, back_s=back_s)  # type: ignore[arg-type]


def _goodputs(
    bench: Bench, victim: Victim, least: float, *, step_s: float, save_s: float, back_s: float
) -> Line:
    def measure(contender: Any) -> Callable[[], Cell]:
        arguments = {"window_s": bench.size.window_s, "mean_s": MEAN_KILL_S, "step_s": step_s}
        return lambda: failures.goodput(contender, victim, **arguments)

    floor = Series(
        (failures.young_daly(save_s=save_s, restart_s=back_s, mean_s=MEAN_KILL_S),), note="Young/Daly"
    )
    mine = measure(ours.LONG_RUN)()
    others = bench.beside({contender.name: measure(contender) for contender in peers.LONG_RUNS})
    title = f"goodput, {victim} killed each {MEAN_KILL_S:.0f} s"
    return Line("7", title, "share", mine, floor, Goal(f"≥ {least}", above(least)), others)


def stall(bench: Bench) -> Iterator[Line]:
    """Row 8."""
    size_mb, repeats = bench.size.size_mb, bench.size.repeats

    def of(kind: str) -> Callable[[], Cell]:
        return lambda: peers.save_ms(kind, "stall_s", size_mb=size_mb, repeats=repeats)

    mine = ours.stall_ms(size_mb=size_mb, repeats=repeats)
    floor = floors.copy_ms(size_mb=size_mb, repeats=repeats)
    others = bench.beside({name: of(kind) for name, kind in peers.STALLS.items()})
    goal = Goal("≤ 1.3 × floor", at_most(1.3))
    yield Line("8", f"a {size_mb} MB save keeps the loop waiting", "ms", mine, floor, goal, others)


def saves(bench: Bench) -> Iterator[Line]:
    """Row 9, in three lines for each size."""
    for size_mb in bench.size.save_sizes_mb:
        mine, loads = ours.saves(size_mb=size_mb, repeats=bench.size.repeats)
        floor = floors.disk(size_mb=size_mb, repeats=bench.size.repeats)
        copy = floors.copy_ms(size_mb=size_mb, repeats=bench.size.repeats)
        others = {}
        if size_mb == bench.size.size_mb:
            makers = {name: peers.STALLS[name] for name in peers.TOTALS if name in peers.STALLS}
            others = bench.beside(
                {
                    name: partial(peers.save_ms, kind, "total_s", size_mb=size_mb, repeats=bench.size.repeats)
                    for name, kind in makers.items()
                }
            )
        ms = {key: Series(tuple(1e3 * value for value in mine[key])) for key in ("total_s", "blocked_s")}
        disk_ms = {key: Series(tuple(1e3 * value for value in floor[key])) for key in ("write_s", "read_s")}
        within, reading = Goal("≤ 1.3 × floor", at_most(1.3)), Goal("≤ 1.5 × floor", at_most(1.5))
        yield Line("9", f"a {size_mb} MB save blocks beside real steps", "ms", ms["blocked_s"], copy, within)
        yield Line(
            "9",
            f"a {size_mb} MB save in all, hashed",
            "ms",
            ms["total_s"],
            disk_ms["write_s"],
            within,
            others,
        )
        load_ms = Series(tuple(1e3 * value for value in loads))
        yield Line("9", f"load and verify {size_mb} MB, cold", "ms", load_ms, disk_ms["read_s"], reading)
        fast = Goal("≥ 0.9", above(0.9))
        yield Line(
            "9",
            f"training's speed beside a {size_mb} MB save",
            "share",
            Series((mine["speed"],)),
            Series((1.0,)),
            fast,
        )


def auto_interval(bench: Bench) -> Iterator[Line]:
    """Row 10."""
    mine, loads = ours.saves(size_mb=bench.size.size_mb, repeats=bench.size.repeats)
    blocked_s, took_s = (Series(tuple(mine[key])).median for key in ("blocked_s", "total_s"))
    for mtbf_s in (60.0, 600.0, 6000.0):
        auto, auto_s, best, best_s = intervals.compare(
            mtbf_s=mtbf_s, blocked_s=blocked_s, took_s=took_s, restart_s=Series(tuple(loads)).median
        )
        title = f"goodput of interval=auto ({auto_s:.3g} s; best fixed {best_s:.3g} s), failure each {mtbf_s:.0f} s"
        yield Line(
            "10", title, "share", Series((auto,)), Series((best,)), Goal("≥ 0.97 × best", at_least(0.97))
        )


def claims(bench: Bench) -> Iterator[Line]:
    """Row 11."""
    workers, size = 64, bench.size
    mine = [_measured(ours.claims, workers=workers, acts=size.claims, limit_s=600.0)]
    floor = [_measured(floors.commits, workers=workers, acts=size.claims, limit_s=600.0)]
    title = f"claim + release, PostgreSQL, {workers} workers, {size.claims:,} claims"
    goal = Goal("none twice", lambda mine, *_: isinstance(mine, Series))
    yield Line("11", title, "per s", _cell(mine, "rate_per_s"), _cell(floor, "rate_per_s"), goal, {})


def away(bench: Bench) -> Iterator[Line]:
    """Row 12."""
    online, disabled = ours.logged_s(steps=bench.size.logged_steps, repeats=bench.size.repeats)
    title = f"a training of {bench.size.logged_steps:,} steps while W&B is away"
    mine, floor = Series(tuple(online)), Series(tuple(disabled))
    yield Line("12", title, "s", mine, floor, Goal("≤ 1.02 × without W&B", at_most(1.02)))


ROWS: dict[str, tuple[str, Callable[[Bench], Iterator[Line]]]] = {
    "1": ("trial", trial_cost),
    "2": ("start", first_start),
    "3": ("ask", ask_tell),
    "4": ("list", listing),
    "5": ("trainer", trainer_killed),
    "6": ("everything", everything_killed),
    "7": ("goodput", goodput),
    "8": ("stall", stall),
    "9": ("saves", saves),
    "10": ("auto", auto_interval),
    "11": ("claims", claims),
    "12": ("away", away),
}
"""Number → (name, what measures it)."""


def chosen(words: list[str]) -> list[str]:
    """Numbers of the rows named by number or name; all when none is named. Raises KeyError."""
    numbers = {name: number for number, (name, _) in ROWS.items()}
    for word in words:
        if word not in ROWS and word not in numbers:
            raise KeyError(word)
    return [word if word in ROWS else numbers[word] for word in words] or list(ROWS)
