"""Tests against real servers: skipped where `make sglang` was not run, and left out of `make test`."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_mopd.student.random_init import write_random_model
from tests.comparison import small_model

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if PYTHON.exists():
        return
    missing = pytest.mark.skip(reason=f"{PYTHON} is not there; run `make sglang`")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(missing)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `model` (no weights), `student` and the teachers `a`, `b`, `c`, as in the tests of whole runs."""
    folder = tmp_path_factory.mktemp("sglang-models")
    small_model(folder / "model")
    for seed, name in enumerate(("student", "a", "b", "c")):
        write_random_model(folder / name, folder / "model", seed)
    return folder
