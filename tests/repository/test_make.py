"""make says what it lacks before it installs anything, and installs nothing twice."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

INSTALLED_PARTS = ("Makefile", "pyproject.toml", "constraints.txt")


@pytest.fixture
def clone(tmp_path: Path, repository: Path) -> Path:
    """What an installation reads, in a folder with nothing installed."""
    for name in INSTALLED_PARTS:
        shutil.copy(repository / name, tmp_path / name)
    return tmp_path


def test_make_alone_lists_the_targets(clone):
    done = _make(clone)
    assert done.returncode == 0
    for target in ("demo", "test", "test-first", "check", "soak", "bench", "bench-dp", "results", "clean"):
        assert f"make {target} " in done.stdout


def test_the_first_releases_tests_are_files_that_exist_each_once_and_of_every_part(repository):
    names = (repository / "tests" / "first_release.txt").read_text().split()
    assert len(names) == len(set(names))
    assert all((repository / name).is_file() for name in names)
    parts = {name.split("/")[1] for name in names}
    later = {"faults", "network"}
    assert parts == {path.parent.name for path in repository.glob("tests/*/test_*.py")} - later


def test_the_first_releases_tests_say_their_time_and_fail_with_them(clone):
    _pretend_installed(clone)
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "ran: $*"\nexit 3\n')
    python.chmod(0o755)
    done = _make(clone, "test-first", "PYTEST_OPTIONS=-k merkle")
    assert done.returncode == 2
    assert "@tests/first_release.txt -k merkle" in done.stdout
    assert "the tests of tests/first_release.txt took" in done.stdout


@pytest.mark.parametrize("python", ["no-such-python", "old-python"])
def test_make_refuses_an_interpreter_that_is_too_old_or_absent(clone, python):
    old = clone / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(old.stat().st_mode | stat.S_IXUSR)
    done = _make(clone, "install", f"PYTHON={clone / python}")
    assert done.returncode == 2
    assert "3.11 or newer" in done.stderr
    assert not (clone / ".venv").exists()


def test_make_refuses_an_old_interpreter_in_an_existing_environment(clone):
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = _make(clone, "install")
    assert done.returncode == 2
    assert "remove it" in done.stderr


def test_make_installs_nothing_the_second_time(clone):
    _pretend_installed(clone)
    done = _make(clone, "--question", "install")
    assert done.returncode == 0, "make would install again"


@pytest.mark.parametrize("changed", ["constraints.txt", "pyproject.toml"])
def test_make_installs_again_when_the_requirements_change(clone, changed):
    _pretend_installed(clone)
    path = clone / changed
    path.write_text(path.read_text().replace("cryptography", "cryptography2", 1))
    assert _make(clone, "--question", "install").returncode == 1


def test_make_keeps_the_environment_when_only_a_tools_settings_change(clone):
    _pretend_installed(clone)
    path = clone / "pyproject.toml"
    path.write_text(path.read_text().replace("line-length = 110", "line-length = 111"))
    assert _make(clone, "--question", "install").returncode == 0


def test_make_keeps_the_environment_when_a_checkout_only_touches_the_files(clone):
    _pretend_installed(clone)
    for name in INSTALLED_PARTS:
        os.utime(clone / name)
    assert _make(clone, "--question", "install").returncode == 0


def test_ci_runs_the_checks_then_the_tests_and_fails_with_them(repository, tmp_path):
    log = _run_ci(repository, tmp_path, check=0, test=0)
    assert log.returncode == 0
    assert log.stdout.splitlines() == [
        "ran check",
        "ran test",
        "== 3 passed in 1s ==",
        "more",
        "== 3 passed in 1s ==",
    ]
    assert _run_ci(repository, tmp_path, check=0, test=1).returncode != 0
    failed = _run_ci(repository, tmp_path, check=1, test=0)
    assert failed.returncode != 0
    assert "ran test" not in failed.stdout


def _pretend_installed(clone: Path) -> None:
    (clone / ".venv").mkdir()
    recipe = _make(clone, "--dry-run", "install").stdout
    stamp = recipe.rpartition("touch ")[2].strip()
    (clone / stamp).touch()


def _run_ci(repository: Path, folder: Path, *, check: int, test: int) -> subprocess.CompletedProcess[str]:
    (folder / ".ci").mkdir(exist_ok=True)
    shutil.copy(repository / ".ci" / "run", folder / ".ci" / "run")
    tab = "\t"
    (folder / "Makefile").write_text(
        f"check:\n{tab}@echo ran check; exit {check}\n"
        f"test:\n{tab}@echo ran test; echo '== 3 passed in 1s =='; echo more; exit {test}\n"
    )
    return subprocess.run(
        [str(folder / ".ci" / "run")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=_environment(),
    )


def _make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=_environment(),
    )


def _environment() -> dict[str, str]:
    """This process's environment without what an outer make passes down."""
    return {
        name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
    }
