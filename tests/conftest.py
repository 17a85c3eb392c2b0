"""Settings of all tests."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _libraries_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What TVM packages compile is kept for the session alone, unless the environment names a folder."""
    os.environ.setdefault("QWENSPEC_CACHE", str(tmp_path_factory.mktemp("libraries")))
