"""What takes long and is the same for all tests is made by one of the workers of a run; the others read it."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock


def folder_of_all(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder that all workers of the run have."""
    base = factory.getbasetemp()
    found = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    found.mkdir(exist_ok=True)
    return found


def once(folder: Path, make: Callable[[Path], Any]) -> Any:
    """What is made in a folder of all workers, by the first that asks."""
    kept = folder / "made.pickle"
    with FileLock(folder / "lock"):
        if not kept.exists():
            kept.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(kept.read_bytes())
