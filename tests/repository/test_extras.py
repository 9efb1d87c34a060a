"""Each extra alone carries its entry modules: every third-party module outside its closure is blocked."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ENTRY_MODULES = {
    "": ["affidavit", "audit.verify", "audit.verify.cli", "audit.entries", "audit.epsilon", "audit.replay"],
    "cli": ["affidavit", "audit.commands"],
    "accounting": ["federation.accounting"],
    "agent": ["clients.agent", "clients.service"],
    "witness": ["clients.witness_server", "clients.service"],
    "relay": ["clients.client_app"],
    "coordinator": ["federation.service", "federation.server_app", "federation.coordinator"],
    "server": ["server.app"],
    "notebooks": ["affidavit"],
}
NEVER = {
    "": {"flwr", "numpy", "pydantic", "sqlmodel", "torch", "typer"},
    "agent": {"flwr", "fastapi"},
    "witness": {"flwr", "numpy", "pandas", "torch"},
    "relay": {"torch", "pandas", "opacus", "dp-accounting"},
    "coordinator": {"torch", "pandas", "opacus"},
    "server": {"flwr", "pandas", "opacus"},
}

IMPORT_BEHIND_A_WALL = """
import json, sys
task = json.load(sys.stdin)

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is not in this extra", name=name)

blocked = set(task["blocked"])
for name in [name for name in sys.modules if name.partition(".")[0] in blocked]:
    del sys.modules[name]  # what start-up files brought in
sys.meta_path.insert(0, Wall())
for name in task["modules"]:
    __import__(name)
"""


@pytest.fixture(scope="module")
def installed() -> Mapping[str, list[str]]:
    """Every top-level module that is installed, and the distributions that bring it."""
    return packages_distributions()


@pytest.mark.parametrize("extra", ENTRY_MODULES, ids=lambda extra: extra or "bare")
def test_extra_alone_imports_its_entry_modules(extra, repository, installed):
    allowed = _closure(repository, [extra])
    blocked = sorted(
        name
        for name, owners in installed.items()
        if name.isidentifier()
        and not {canonicalize_name(owner) for owner in owners} & {*allowed, "affidavit"}
    )
    assert "torch" in blocked or "torch" in allowed, "the wall knows no torch, so it guards nothing"
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_BEHIND_A_WALL],
        input=json.dumps({"blocked": blocked, "modules": ENTRY_MODULES[extra]}),
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("extra", "forbidden"), NEVER.items(), ids=lambda value: value or "bare")
def test_extra_does_not_install_what_it_must_not_hold(extra, forbidden, repository):
    assert not _closure(repository, [extra]) & forbidden


def test_wall_stops_a_module_outside_the_closure(repository):
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_BEHIND_A_WALL],
        input=json.dumps({"blocked": ["numpy"], "modules": ["numpy.linalg"]}),
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "not in this extra" in done.stderr


def test_everything_but_the_tools_is_in_all(repository):
    extras = set(_project(repository)["optional-dependencies"]) - {"all", "dev", "simulation"}
    assert _closure(repository, ["all"]) == _closure(repository, sorted(extras))


def test_tested_set_pins_exactly_what_the_extras_install(repository):
    pins = _pins(repository)
    closure = _closure(repository, ["", *_project(repository)["optional-dependencies"]])
    assert not closure - set(pins), "not pinned in constraints.txt"
    assert not set(pins) - closure, "pinned in constraints.txt, but nothing needs it"


def test_pins_satisfy_every_declared_range(repository):
    project, pins = _project(repository), _pins(repository)
    extras = project["optional-dependencies"].values()
    declared = [*project["dependencies"], *(line for lines in extras for line in lines)]
    for requirement in map(Requirement, declared):
        if requirement.name != "affidavit":
            pin = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pin), f"{requirement} excludes the pinned {pin}"


def test_this_environment_is_the_tested_set(repository):
    for name, pin in _pins(repository).items():
        assert distribution(name).version.partition("+")[0] == pin, f"{name} differs from constraints.txt"


def _project(repository: Path) -> dict[str, object]:
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


def _pins(repository: Path) -> dict[str, str]:
    lines = (repository / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


_ACCELERATED = ("nvidia-", "cuda-", "triton")


def _closure(repository: Path, extras: list[str]) -> set[str]:
    """Names of every distribution that `affidavit[extras]` brings, by the metadata of what is installed."""
    project = _project(repository)
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [("affidavit", extra) for extra in extras] + [("affidavit", "")]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        if name == "affidavit":
            lines = project["optional-dependencies"].get(extra, []) if extra else project["dependencies"]
        else:
            found.add(name)
            try:
                lines = distribution(name).requires or []
            except PackageNotFoundError:
                pytest.fail(f"{name} is declared but not installed: run make install")
        for requirement in map(Requirement, lines):
            if name == "torch" and canonicalize_name(requirement.name).startswith(_ACCELERATED):
                continue  # what a build of torch for graphics cards brings, as the index chooses
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                target = canonicalize_name(requirement.name)
                waiting += [(target, ""), *((target, wanted) for wanted in requirement.extras)]
    return found
