"""Settings of all tests."""

from __future__ import annotations

import os

import hypothesis
import pytest

PLANTED = os.environ.get("EQUIVALENCE_PROFILE") == "mutants"
# The same examples every time, and nothing that a slow machine could fail. Of mistakes that plant.py planted any
# example will do, and is not made small.
hypothesis.settings.register_profile(
    "steady",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate] if PLANTED else list(hypothesis.Phase),
)
hypothesis.settings.load_profile("steady")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No test of ours asks how fast the machine is."""
    for item in items:
        test = getattr(item, "obj", None)
        if hypothesis.is_hypothesis_test(test):
            settings = test._hypothesis_internal_use_settings
            patient = settings.deadline is None and hypothesis.HealthCheck.too_slow in settings.suppress_health_check
            assert patient, f"{item.nodeid} depends on time: see the profile in tests/conftest.py"


@pytest.fixture(scope="session", autouse=True)
def _libraries_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What TVM packages compile is kept for the session alone, unless the environment names a folder."""
    os.environ.setdefault("QWENSPEC_CACHE", str(tmp_path_factory.mktemp("libraries")))
