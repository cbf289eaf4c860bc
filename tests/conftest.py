"""Shared by all tests: the backend's banner, independence of tests, full float32 precision."""

import json
from pathlib import Path

import keras
import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_report_header():
    return f"keras {keras.__version__}, backend {keras.config.backend()}"


@pytest.fixture(autouse=True)
def _independent():
    keras.utils.set_random_seed(0)
    yield
    keras.utils.clear_session(free_memory=False)


@pytest.fixture(scope="session")
def golden_cases():
    return json.loads((GOLDEN / "cases.json").read_text())
