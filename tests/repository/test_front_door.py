"""The front door opens at once: help and plain import load no framework."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

FRAMEWORKS = {
    "fastapi",
    "flwr",
    "matplotlib",
    "numpy",
    "opacus",
    "pandas",
    "sklearn",
    "sqlalchemy",
    "sqlmodel",
    "torch",
}

SHOW_MODULES = """
import contextlib, io, json, sys
sys.argv = ["affidavit", *json.loads(sys.argv[1])]
import affidavit
shown = io.StringIO()
if len(sys.argv) > 1:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(shown):
        affidavit.main()
modules = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps({"modules": modules, "shown": shown.getvalue()}))
"""


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["verify", "--help"]], ids=["import", "help", "verify"]
)
def test_front_door_loads_no_framework(arguments, repository):
    done = subprocess.run(
        [sys.executable, "-c", SHOW_MODULES, json.dumps(arguments)],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    answer = json.loads(done.stdout.splitlines()[-1])
    assert not FRAMEWORKS & set(answer["modules"])
    if arguments:
        assert "verify" in answer["shown"]


def test_unknown_command_is_a_usage_error_without_a_traceback(repository):
    done = subprocess.run(
        [sys.executable, "-m", "affidavit", "no-such-command"],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "no-such-command" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_roll_back_waits_for_neither_numpy_nor_flower(repository):
    """The command that takes a bad version out of use must not spend its second on importing."""
    code = "import sys, federation.commands, federation.service; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert not {"flwr", "numpy", "torch", "grpc", "httpx"} & set(done.stdout.split())
