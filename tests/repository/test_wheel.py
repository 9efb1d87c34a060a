"""The wheel holds the front door and the four packages, and alone it is a working verifier."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGES = ("audit", "federation", "clients", "server")


def test_wheel_holds_the_front_door_and_the_four_packages_only(wheel, repository):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"affidavit.py", *PACKAGES}
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]
    for package in PACKAGES:
        files = {path.relative_to(repository).as_posix() for path in (repository / package).rglob("*.*")}
        sources = {name for name in files if "__pycache__" not in name}
        assert sources, f"{package} is empty"
        assert sources <= set(names), f"missing from the wheel: {sorted(sources - set(names))}"


def test_bare_install_requires_cryptography_and_nothing_else(wheel):
    metadata = _metadata(wheel)
    always = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert [line.split("<")[0].split(">")[0] for line in always] == ["cryptography"]
    assert metadata["License-Expression"] == "Apache-2.0"


def test_wheel_carries_its_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
        assert b"Apache License" in archive.read(licence)


def test_api_shows_its_reference_from_the_wheel_and_from_no_other_host(wheel, tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from fastapi import FastAPI; import server.reference\n"
        "assert server.reference.__file__.startswith(sys.argv[1]), server.reference.__file__\n"
        "print(server.reference.render(FastAPI(title='wheel').openapi()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(wheel)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "<h1>wheel" in done.stdout
    assert "//" not in done.stdout
    with zipfile.ZipFile(wheel) as archive:
        sources = {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")}
    assert not [name for name, text in sources.items() if re.search(r"\bcdn\.|jsdelivr|unpkg", text)]


def test_bare_environment_lacks_every_framework(bare_install, tmp_path):
    names = ["torch", "numpy", "flwr", "typer", "yaml"]
    probe = f"from importlib.util import find_spec; print([n for n in {names} if find_spec(n)])"
    assert bare_install.run(["python", "-c", probe], cwd=tmp_path).stdout.strip() == "[]"


def test_bare_install_shows_how_to_verify(bare_install, tmp_path):
    done = bare_install.run(["affidavit", "verify", "--help"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--policy" in done.stdout


def test_bare_install_refuses_a_file_that_is_no_evidence(bare_install, tmp_path):
    (tmp_path / "evidence.zip").write_bytes(b"not a zip")
    done = bare_install.run(["affidavit", "verify", "evidence.zip"], cwd=tmp_path)
    assert done.returncode not in (0, 3), done.stdout
    assert "Traceback" not in done.stderr


def test_bare_install_names_the_extra_that_a_command_needs(bare_install, tmp_path):
    done = bare_install.run(["affidavit", "train", "--charter", "c.yaml"], cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "affidavit[" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_command_works_from_a_folder_with_a_server_of_its_own(bare_install, tmp_path):
    (tmp_path / "server.py").write_text("raise SystemExit('the wrong server')\n")
    done = bare_install.run(["affidavit", "verify", "--help"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("arguments", [["verify", "--help"], ["--help"], ["status"]], ids=" ".join)
def test_module_run_names_the_file_that_shadows_a_package(bare_install, tmp_path, name, arguments):
    shadow = tmp_path / f"{name}.py"
    shadow.write_text("raise SystemExit('a stranger of the same name')\n")
    _assert_names_shadow(
        bare_install.run(["python", "-m", "affidavit", *arguments], cwd=tmp_path), shadow=shadow
    )


def test_module_run_names_a_folder_that_shadows_a_package(bare_install, tmp_path):
    shadow = tmp_path / "server"
    shadow.mkdir()
    (shadow / "__init__.py").write_text("PORT = 8080\n")
    _assert_names_shadow(
        bare_install.run(["python", "-m", "affidavit", "verify", "--help"], cwd=tmp_path), shadow=shadow
    )


def test_command_names_a_package_shadowed_through_the_search_path(bare_install, tmp_path):
    shadow = tmp_path / "audit.py"
    shadow.write_text("")
    done = bare_install.run(
        ["affidavit", "verify", "--help"], cwd=tmp_path, environment={"PYTHONPATH": str(tmp_path)}
    )
    _assert_names_shadow(done, shadow=shadow)


def test_import_names_the_file_that_shadows_a_package(bare_install, tmp_path):
    shadow = tmp_path / "server.py"
    shadow.write_text("")
    done = bare_install.run(["python", "-c", "import affidavit; affidavit.simulate"], cwd=tmp_path)
    assert done.returncode != 0
    assert "shadow" in done.stderr.lower()
    assert str(shadow) in done.stderr


def test_module_run_ignores_a_plain_folder_of_the_same_name(bare_install, tmp_path):
    (tmp_path / "server").mkdir()
    done = bare_install.run(["python", "-m", "affidavit", "verify", "--help"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def _assert_names_shadow(done, *, shadow: Path) -> None:
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "shadow" in said.lower()
    assert str(shadow) in said
    assert "Traceback" not in said


def _metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))
