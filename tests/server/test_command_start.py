"""Everyday commands start at once: what each may load on its way, told module by module and not by the clock.

A roll-back in one command within a second is a promise, and most of that second is its own start.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.server.test_runtime import second, swap

SERVING = {"cedarpy", "fastapi", "grpc", "onnxruntime", "starlette", "uvicorn"}
LEARNING = {"flwr", "matplotlib", "numpy", "pandas", "scipy", "torch"}
MAPPING = {"alembic", "pydantic", "sqlalchemy.dialects.postgresql", "sqlalchemy.orm", "sqlmodel"}
OTHERS_PARTS = {"clients.site_commands", "federation.charter", "httpx", "server.commands"}

ASKED = """
import contextlib, io, json, sys
import affidavit
shown = io.StringIO()
with contextlib.redirect_stdout(shown):
    code = affidavit.main(json.loads(sys.argv[1]))
print(json.dumps({"code": code, "shown": shown.getvalue(), "modules": sorted(sys.modules)}))
"""


def run(repository, *words):
    """Run one command in a process of its own; return what it printed and which modules it loaded."""
    done = subprocess.run(
        [sys.executable, "-c", ASKED, json.dumps([*map(str, words)])],
        cwd=repository, capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert told["code"] == 0, done.stderr
    return told["shown"], set(told["modules"])


def test_roll_back_loads_what_it_needs_and_no_more(lab, repository, tmp_path):
    newer = second(lab)
    swap(lab, lab.version, newer, from_state="approved")
    lab.officer.save(tmp_path / "key.pem", None)
    where = ("--home", lab.folder)
    shown, modules = run(repository, "models", "rollback", "toy", "--officer", tmp_path / "key.pem", *where)
    assert lab.version in shown
    assert not (SERVING | LEARNING | MAPPING | OTHERS_PARTS) & modules
    assert "audit.watchers" not in modules, "no witness has an address here"


@pytest.mark.parametrize(
    ("words", "too_much"),
    [
        (["models", "list"], SERVING | LEARNING | MAPPING | OTHERS_PARTS),
        (["log", "list"], SERVING | LEARNING | MAPPING | OTHERS_PARTS),
        (["runs", "list"], SERVING | LEARNING | {"alembic", "sqlmodel", "server.commands"}),
        (["keys", "list"], SERVING | LEARNING | {"alembic"}),
        (["status"], SERVING | LEARNING | {"alembic", "sqlmodel"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_looked_at_every_day_loads_no_framework(lab, repository, words, too_much):
    _, modules = run(repository, *words, "--home", lab.folder)
    assert not too_much & modules
