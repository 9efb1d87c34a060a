from __future__ import annotations

import subprocess
import sys

import pytest

STANDALONE = [
    "canonical",
    "checkpoints",
    "commitments",
    "errors",
    "keys",
    "merkle",
    "notes",
    "receipts",
    "signer",
    "tlog_policy",
    "tlog_proof",
    "witness",
]
ALLOWED = {"audit", "cryptography", "cffi", "_cffi_backend", "_openssl"}


def test_core_loads_the_standard_library_and_cryptography_only() -> None:
    imports = "; ".join(f"import audit.{name}" for name in STANDALONE)
    script = f"import sys; before = set(sys.modules); {imports}; print(*(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    foreign = {name.split(".")[0] for name in out.split()} - sys.stdlib_module_names - ALLOWED
    assert foreign == set()


@pytest.mark.parametrize("name", ["audit", "audit.errors"])
def test_package_itself_loads_nothing(name: str) -> None:
    script = f"import sys; before = set(sys.modules); import {name}; print(*(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert {module.split(".")[0] for module in out.split()} <= {"audit", "__future__"}
