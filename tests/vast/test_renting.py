"""Renting, following, replacing and ending, with the real client: whatever happens, nothing is left running."""

from __future__ import annotations

from typing import Any

import pytest
from vast_server import VastServer

from sweeper.errors import EXIT_OK

pytestmark = pytest.mark.slow


def test_a_sweep_is_rented_for_trained_and_everything_ends(launch: Any, server: VastServer) -> None:
    said = launch()
    assert (said.code, server.running()) == (EXIT_OK, []), said.err + server.logs()
    assert "done: the sweep is complete; 1 instance," in said.err
