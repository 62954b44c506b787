"""When to save: a pure decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

FIRST_AUTO_S = 1.0
SLOWDOWN = 0.1
"""What a training loses of its speed while a save is written beside it, measured in bench/."""


@dataclass(frozen=True, slots=True)
class Cadence:
    """`checkpoint.*`: whichever rule is due first. The last step is always saved.

    Attributes:
        every_n_steps: Optimizer updates since the last save; None: no such rule.
        every_s: Seconds since the last save; None: no such rule.
        at_epoch_end: Save at the end of each epoch.
        is_auto: `checkpoint.interval=auto`: the seconds are found by Young and Daly instead.
        mtbf_s: Mean time between failures of a run of this sweep, as observed.
    """

    every_n_steps: int | None = None
    every_s: float | None = None
    at_epoch_end: bool = False
    is_auto: bool = False
    mtbf_s: float = 3600.0

    @classmethod
    def of(cls, settings: Mapping[str, Any], *, mtbf_s: float) -> Cadence:
        """From the settings of a run."""
        return cls(
            every_n_steps=settings.get("every_n_steps"),
            every_s=settings.get("every_s"),
            at_epoch_end=bool(settings.get("at_epoch_end")),
            is_auto=settings.get("interval") == "auto",
            mtbf_s=mtbf_s,
        )

    def interval_s(self, *, blocked_s: float, took_s: float) -> float | None:
        """Seconds between two saves, from what the last one cost; None: no such rule.

        Args:
            blocked_s: How long the loop stood still; 0 before the first save.
            took_s: How long the save took in all, beside the training.
        """
        if not self.is_auto:
            return self.every_s
        if took_s == 0.0:
            return FIRST_AUTO_S
        cost_s = blocked_s + SLOWDOWN * max(0.0, took_s - blocked_s)
        return max(took_s, young_daly(cost_s, self.mtbf_s))

    def is_due(
        self, *, steps: int, seconds: float, is_epoch_end: bool, blocked_s: float = 0.0, took_s: float = 0.0
    ) -> bool:
        """Whether to save now, so many steps and seconds after the last save."""
        if self.every_n_steps and steps >= self.every_n_steps:
            return True
        if self.at_epoch_end and is_epoch_end:
            return True
        interval_s = self.interval_s(blocked_s=blocked_s, took_s=took_s)
        return interval_s is not None and seconds >= interval_s


def young_daly(cost_s: float, mtbf_s: float) -> float:
    """The interval between saves that loses the least, for saves that cost `cost_s`.

    Source: J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart
    dumps", Future Generation Computer Systems 22 (2006), equation 37; its first term is J. W.
    Young's (CACM 17, 1974).
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2 * mtbf_s)
    return sqrt(2 * cost_s * mtbf_s) * (1 + sqrt(ratio) / 3 + ratio / 9) - cost_s
