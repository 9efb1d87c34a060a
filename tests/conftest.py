"""Fixtures for every package's tests: where the shared vectors lie, and things worth building once."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.soak_report import Report, recorder

if TYPE_CHECKING:
    from federation.coordinator import Coordinator

# A slow example is no fault of the code under test on a loaded machine, and every run sees the same ones.
settings.register_profile(
    "affidavit", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile("affidavit")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# Before Flower is first imported, also in processes that tests start: it tells nobody, and installs nothing.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")


def _without_collection(work: Callable[[], None]) -> Callable[[], None]:
    """Of slipcover's work, left out where a test measures memory, as what it keeps would count as the test's.

    It calls `sys._current_frames`: before Python 3.12 that holds a lock of the interpreter's
    which every new thread needs, and where a collection begins there, and a finalizer in it lets another
    thread run that starts a third, all of them wait for ever (CPython's gh-106883).
    """

    def run() -> None:
        if tracemalloc.is_tracing():
            return
        is_enabled = gc.isenabled()
        gc.disable()
        try:
            work()
        finally:
            if is_enabled:
                gc.enable()

    return run


# Slipcover walks every function of every module when a line has been counted this often after it was seen,
# to stop counting it. Fifty, its own figure, costs each worker more walks than they save.
_coverage = getattr(sys.modules.get("slipcover.pytest_plugin"), "_slipcover_instance", None)
if _coverage is not None:
    _coverage.d_miss_threshold = 5000
    # A thread that holds its lock while a test forks would leave it held in the child.
    os.register_at_fork(
        before=_coverage.lock.acquire,
        after_in_parent=_coverage.lock.release,
        after_in_child=_coverage.lock.release,
    )
    if hasattr(_coverage, "deinstrument_seen"):
        _coverage.deinstrument_seen = _without_collection(_coverage.deinstrument_seen)

# While modules are imported next to nothing becomes garbage, and what they made stays: look at neither again.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """Return `report(part, size=..., result=...)`: a row of docs/results/log.md when `make soak` runs."""
    return recorder(request.node.name)


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


@dataclass(frozen=True, slots=True)
class Trained:
    """A federation that has trained: four hospitals, a log, a live version. Copy it before you write to it.

    data/ (CSV files), charter.yaml, policy.txt, homes/coordinator, homes/signer, homes/sites/<name>,
    homes/officer, homes/scientist, and run.json, which names the run and the version.
    """

    folder: Path

    @property
    def run(self) -> str:
        return str(json.loads((self.folder / "run.json").read_text())["run"])

    @property
    def version(self) -> str:
        return str(json.loads((self.folder / "run.json").read_text())["version"])

    @property
    def policy(self) -> str:
        return (self.folder / "policy.txt").read_text(encoding="utf-8")

    def copy(self, folder: Path) -> Trained:
        shutil.copytree(self.folder, folder)
        return Trained(folder)

    def open(self) -> Coordinator:
        """Open the coordinator's home; the caller closes it."""
        from federation.coordinator import Coordinator

        return Coordinator.open(self.folder / "homes" / "coordinator", self.folder / "homes" / "signer")


@pytest.fixture(scope="session")
def trained(build_once: Callable[[str, Callable[[Path], None]], Path]) -> Trained:
    """The one trained federation that tests share; read it in place, or `copy` it."""
    return Trained(build_once("trained", _train))


def _train(folder: Path) -> None:
    from audit.principal import LocalOwner, Principal
    from clients.demo_data import demo_charter, write_demo_files
    from clients.home import SiteHome
    from clients.identity import Identity
    from clients.simulation import run_federation
    from federation.charter import Charter
    from federation.coordinator import Coordinator
    from federation.service import ApproveRequest, RegisterRequest, approve, register

    files = write_demo_files(folder / "data")
    homes = {
        name: SiteHome.create(
            folder / "homes" / "sites" / name,
            name=name,
            data=path,
            population=f"patients of {name}",
            lifetime_epsilon="20",
            lifetime_delta="0.00001",
            auto_approve=True,
        )
        for name, path in files.sites.items()
    }
    officer = Identity.create(folder / "homes" / "officer")
    scientist = Identity.create(folder / "homes" / "scientist")
    text = demo_charter(
        public=files.public,
        identities={name: home.keys().identity.text for name, home in homes.items()},
        officers={"olsen": officer.public},
        epsilon="6",
        rounds=4,
    )
    (folder / "charter.yaml").write_text(text, encoding="utf-8")
    owner = LocalOwner()
    with Coordinator.create(
        folder / "homes" / "coordinator", folder / "homes" / "signer", "tests/log"
    ) as log:
        run = run_federation(Charter.parse(text), homes, log, scientist.key, public_set=files.public)
        version = register(log, Principal(id="curie", role="scientist"), owner, RegisterRequest(run=run.run))
        live = ApproveRequest(version=version.digest, to_state="live", reason="gates passed")
        approve(log, Principal(id="olsen", role="officer", key=officer.public), owner, live, officer.key)
        log.publish()
    (folder / "policy.txt").write_text(homes["northgate"].policy().format(), encoding="utf-8")
    (folder / "run.json").write_text(
        json.dumps({"run": run.run, "version": version.digest}), encoding="utf-8"
    )
