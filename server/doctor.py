"""What `affidavit doctor` looks at: the interpreter, the extras, the homes, the log and the signer."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sqlite3
import sys
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from audit.errors import AuditError

_EXTRAS: Final = {
    "agent": ("torch", "pandas", "pandera", "pyarrow", "sqlmodel"),
    "relay": ("flwr",),
    "coordinator": ("flwr", "sqlmodel", "alembic", "matplotlib", "onnx"),
    "server": ("fastapi", "uvicorn", "cedarpy", "argon2", "prometheus_client", "onnxruntime", "grpc", "jwt"),
    "witness": ("httpx", "sqlmodel", "uvicorn"),
    "explain": ("captum", "fairlearn"),
    "tracing": ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"),
    "postgresql": ("psycopg",),
    "accounting": ("dp_accounting",),
    "notebooks": ("nbclient", "sklearn"),
    "simulation": ("ray",),
}
_FREE_BYTES: Final = 512 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    name: str
    ok: bool
    detail: str
    optional: bool = False


def examine(base: Path) -> tuple[Check, ...]:
    """Look at everything; nothing is changed."""
    checks = [_python(), _sqlite(), _cryptography(), *_extras(), _disk(base)]
    coordinator = base / "coordinator"
    if any((coordinator / name).is_file() for name in ("log.db", "config.yaml")):
        checks += [_log(coordinator), _signer(base), _private(base), *_certificates(coordinator)]
    else:
        detail = f"no coordinator's home in {base}; `affidavit init` makes one, or give --home"
        checks.append(Check(name="homes", ok=False, optional=True, detail=detail))
    return tuple(checks)


def _python() -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    return Check(name="python", ok=sys.version_info >= (3, 11), detail=f"{found}; 3.11 or newer is needed")


def _sqlite() -> Check:
    ok = sqlite3.sqlite_version_info >= (3, 37, 0)
    return Check(name="sqlite", ok=ok, detail=f"{sqlite3.sqlite_version}; 3.37 or newer is needed")


def _cryptography() -> Check:
    try:
        return Check(name="cryptography", ok=True, detail=version("cryptography"))
    except PackageNotFoundError:
        return Check(name="cryptography", ok=False, detail="missing; install affidavit again")


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a dotted name, what it lies in is missing
        return False


def _extras() -> list[Check]:
    checks = []
    for extra, modules in _EXTRAS.items():
        missing = [name for name in modules if not _is_there(name)]
        detail = f"lacks {', '.join(missing)}; install affidavit[{extra}]" if missing else "installed"
        checks.append(Check(name=f"extra {extra}", ok=not missing, optional=True, detail=detail))
    return checks


def _disk(base: Path) -> Check:
    place = next(path for path in (base, *base.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    return Check(
        name="disk", ok=free > _FREE_BYTES, detail=f"{free // 2**20} MiB free at {place}; keep 512 MiB"
    )


def _log(coordinator: Path) -> Check:
    from audit.ledger import Ledger
    from audit.location import log_location

    try:
        with Ledger.open(log_location(coordinator)) as ledger:
            return Check(name="log", ok=True, detail=f"{ledger.origin}, {ledger.tree_size} entries")
    except AuditError as error:
        return Check(name="log", ok=False, detail=f"{error}; run `affidavit log fsck`")


def _signer(base: Path) -> Check:
    from audit.ledger import Ledger
    from audit.location import log_location
    from audit.signer import Signer
    from audit.signing_home import signer_home_of, signer_passphrase

    try:
        signed = Signer.open(signer_home_of(base / "coordinator"), signer_passphrase()).state().checkpoint
        with Ledger.open(log_location(base / "coordinator")) as ledger:
            size = ledger.tree_size
            ok = signed.tree_size <= size and (
                signed.tree_size == 0 or ledger.root_at(signed.tree_size) == signed.root_hash
            )
    except AuditError as error:
        return Check(name="signer", ok=False, detail=str(error))
    said = f"signed {signed.tree_size} of {size} entries"
    fix = "" if ok else "; the log is not what was signed: stop, restore a newer backup, do not sign on"
    return Check(name="signer", ok=ok, detail=said + fix)


def _certificates(coordinator: Path) -> list[Check]:
    if not (coordinator / "network" / "network.yaml").is_file():
        return []
    from federation.network.errors import NetworkError
    from federation.network.settings import NetworkHome

    try:
        states = NetworkHome.open(coordinator).pki.states()
    except NetworkError as error:
        return [Check(name="certificates", ok=False, detail=str(error))]
    return [
        Check(
            name=f"certificate {state.name}",
            ok=state.urgency != "urgent" and state.left > timedelta(0),
            detail=f"{state.days_left} days left"
            + ("; `coordinator up` renews it" if state.renews else "; see docs/network.md, Certificates"),
        )
        for state in states
    ]


def _private(base: Path) -> Check:
    open_files = [
        str(path) for path in base.rglob("*.pem") if path.is_file() and os.stat(path).st_mode & 0o077
    ]
    detail = f"open to others: {', '.join(open_files)}; chmod 600" if open_files else "for their owner alone"
    return Check(name="private keys", ok=not open_files, detail=detail)
