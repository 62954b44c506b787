"""A real SLURM for the tests below: one cluster for each pytest process, so that `-n` shares none between two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from testbed import Testbed, missing_programs


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    """A cluster of four nodes that lives as long as the session."""
    if missing := missing_programs():
        pytest.skip(f"no SLURM here: {', '.join(missing)} missing (slurm/testbed/install gets them)")
    testbed = Testbed(tmp_path_factory.mktemp("slurm"))
    testbed.up()
    try:
        yield testbed
    finally:
        testbed.down()


@pytest.fixture
def testbed(cluster: Testbed) -> Iterator[Testbed]:
    """The session's cluster, with every node idle; what the test kills and submits is put right behind it."""
    yield cluster
    cluster.reset()
