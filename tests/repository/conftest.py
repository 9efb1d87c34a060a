"""A wheel built from this tree, and a bare virtual environment that holds it and cryptography alone."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest


@dataclass(frozen=True, slots=True)
class BareInstall:
    """The wheel as a stranger has it: an interpreter of its own and `cryptography`, no more."""

    folder: Path

    def run(
        self, command: Sequence[str], *, cwd: Path, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        executable, *arguments = command
        return subprocess.run(
            [str(self.folder / "bin" / executable), *arguments],
            cwd=cwd,
            env=environment or {},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture(scope="session")
def wheel(repository: Path, build_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    def build(folder: Path) -> None:
        _run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=repository)

    return next(build_once("wheel", build).glob("*.whl"))


@pytest.fixture(scope="session")
def bare_install(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> BareInstall:
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    _run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "--no-deps",
            "--no-index",
            str(wheel),
        ],
        cwd=folder,
    )
    site_packages = next((folder / "lib").glob("python*/site-packages"))
    for name in ("cryptography", "cffi", "pycparser"):
        for link in _top_level(name):
            (site_packages / link.name).symlink_to(link)
    return BareInstall(folder)


def _top_level(name: str) -> set[Path]:
    """What the distribution puts directly into site-packages."""
    installed = distribution(name)
    site_packages = Path(str(installed.locate_file("")))
    first_parts = {file.parts[0] for file in installed.files or () if file.parts[0] != ".."}
    return {site_packages / part for part in first_parts if part != "__pycache__"}


def _run(command: list[str], *, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}"
