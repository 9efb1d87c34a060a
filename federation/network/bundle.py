"""The Flower app bundle that a run ships, made from the installed packages: the same sources, the same bytes.

It holds both apps whole and of `clients` the relay alone. Its SHA-256 is what a site approves.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Final

import audit
import federation
from federation.network.errors import RunControlError

RELAY_FILES: Final = ("__init__.py", "client_app.py", "errors.py", "link.py", "socket_link.py")
MANIFEST: Final = """\
[project]
name = "affidavit"
version = "0.1.0"
description = "Federated learning whose every claim can be proved."
license = "Apache-2.0"

[tool.flwr.app]
publisher = "affidavit"

[tool.flwr.app.components]
serverapp = "federation.server_app:app"
clientapp = "clients.client_app:app"

[tool.flwr.app.config]
home = ""
signer-home = ""
run = ""
principal = ""
hold-s = 10.0
poll-s = 0.05
discovery-s = 30.0
"""


def bundle_files() -> dict[str, bytes]:
    """Return the bundle's files by path."""
    packages = {"audit": _folder(audit.__file__), "federation": _folder(federation.__file__)}
    files = {"pyproject.toml": MANIFEST.encode()}
    for name, folder in packages.items():
        for path in sorted(folder.rglob("*.py")):
            files[f"{name}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()
    relay = packages["federation"].parent / "clients"
    for name in RELAY_FILES:
        try:
            files[f"clients/{name}"] = (relay / name).read_bytes()
        except FileNotFoundError as error:
            raise RunControlError(
                f"{relay / name} is not installed; install affidavit[relay] here"
            ) from error
    return files


@cache
def build_bundle() -> bytes:
    """Return the bundle.

    Raises:
        RunControlError: a part is not installed, or Flower does not take it.
    """
    from flwr.cli.build import build_fab_from_files

    try:
        data, _ = build_fab_from_files(bundle_files())
    except (ValueError, OSError) as error:
        raise RunControlError(f"the bundle cannot be built: {error}") from error
    return data


def bundle_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _folder(file: str | None) -> Path:
    if file is None:
        raise RunControlError("the packages are not installed as files")
    return Path(file).resolve().parent
