"""Being here puts `tests/` on the import path, for the helpers that several folders share."""

import os

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Under .ci/run a skipped test is a failed one: CI has everything that tests need."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("SWEEPER_NO_SKIP") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
