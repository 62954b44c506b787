"""What a launch starts before it has read anything else: torch takes longest to import."""

from __future__ import annotations

from collections.abc import Sequence

from sweeper.trainer.warm import Template


def template_for(argv: Sequence[str]) -> Template | None:
    """A template, if this looks like a launch of local workers. It may still turn out to be none."""
    flags = [argument for argument in argv if argument.startswith("-")]
    only_reads = any(not flag.startswith(("--config-dir", "--config-path", "-cd", "-cp")) for flag in flags)
    is_elsewhere = any(a.startswith("launcher=") and a != "launcher=local" for a in argv)
    return None if only_reads or is_elsewhere else Template()
