"""Fixtures for every package's tests: where the shared vectors lie, and things worth building once."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# Before Flower is first imported, also in processes that tests start: it tells nobody, and installs nothing.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared_vectors() -> Path:
    """The vectors beside the repository (merkle, jcs, ed25519), read in place."""
    return _beside_repository("vectors")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data sets beside the repository, read in place."""
    return _beside_repository("data")


@pytest.fixture(scope="session")
def build_once(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Callable[[str, Callable[[Path], None]], Path]:
    """Return `build(name, make) -> folder`: `make(folder)` runs once a test session, whatever the workers.

    The folder is shared by all workers, so tests read it or copy it and never write to it. A `make` that
    raises leaves nothing behind; the next caller tries again and fails with the same error.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def build(name: str, make: Callable[[Path], None]) -> Path:
        done = shared / f"built-{name}"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                draft = Path(tmp_path_factory.mktemp(f"draft-{name}"))
                make(draft)
                draft.rename(done)
        return done

    return build


def _beside_repository(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"the shared {name} are not beside this checkout")
    return folder
