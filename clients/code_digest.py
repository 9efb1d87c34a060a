"""What code made a statement: one digest over every source file that decides what a site releases."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

PACKAGES: Final = ("audit", "clients", "federation")


@cache
def agent_code() -> str:
    """Return SHA-256 over the sorted (path, SHA-256) list of every `.py` file of the agent's packages."""
    total = hashlib.sha256(b"affidavit/agent-code/v1\x00")
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"package {package} is not where the agent can name its code")
        folder = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(folder.rglob("*.py")):
            name = f"{package}/{path.relative_to(folder).as_posix()}"
            total.update(f"{name}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()
