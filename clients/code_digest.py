"""What code made a statement: one digest over the agent's own source files."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path


@cache
def agent_code() -> str:
    """Return SHA-256 over the sorted (path, SHA-256) list of every `.py` file of this package."""
    folder = Path(__file__).parent
    total = hashlib.sha256(b"affidavit/agent-code/v1\x00")
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        total.update(f"{name}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()
