"""A PostgreSQL server of the tests' own, started from installed binaries as somebody who is not root."""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_ROLE = "affidavit"


class PostgresqlServer:
    """One cluster in a folder, reached through a Unix socket only. fsync stays on: its loss is under test."""

    def __init__(self, binaries: Path, folder: Path, account: pwd.struct_passwd | None) -> None:
        self.binaries, self.folder, self.account = binaries, folder, account
        self._numbers = itertools.count()

    def run(self, program: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        who: dict[str, Any] = {}
        if self.account is not None:
            who = {"user": self.account.pw_uid, "group": self.account.pw_gid, "extra_groups": []}
        command = [str(self.binaries / program), *arguments]
        with (self.folder / "output").open("a+") as output:
            done = subprocess.run(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True,
                timeout=60, check=False, **who,
            )  # fmt: skip
        if check and done.returncode:
            raise RuntimeError(f"{program}: {(self.folder / 'output').read_text()[-2000:]}")
        return done

    def initialise(self) -> None:
        self.run(
            "initdb", "-D", str(self.folder / "data"), "-U", _ROLE, "--auth=trust", "-E", "UTF8", "--no-sync"
        )
        settings = (
            "listen_addresses = ''\n"
            f"unix_socket_directories = '{self.folder}'\n"
            "max_connections = 60\nshared_buffers = 32MB\nlog_min_messages = fatal\n"
        )
        with (self.folder / "data" / "postgresql.conf").open("a") as file:
            file.write(settings)

    def start(self) -> None:
        self.run("pg_ctl", "start", "-w", "-D", str(self.folder / "data"), "-l", str(self.folder / "log"))

    def stop(self, mode: str = "fast") -> None:
        self.run("pg_ctl", "stop", "-w", "-m", mode, "-D", str(self.folder / "data"), check=False)

    def url(self, database: str) -> str:
        return f"postgresql://{_ROLE}@/{database}?host={self.folder}"

    def new_database(self) -> str:
        """Return the URL of an empty database."""
        name = f"log{next(self._numbers)}"
        self.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def new_schema(self) -> str:
        """Return the URL of an empty schema: as good as a database for a log, and made at once."""
        name = f"log{next(self._numbers)}"
        self.execute(f'CREATE SCHEMA "{name}"')
        return f"{self.url('postgres')}&options=-csearch_path%3D{name}"

    def execute(self, statement: str, url: str = "") -> list[tuple[Any, ...]]:
        import psycopg

        with psycopg.connect(url or self.url("postgres"), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []


def why_not() -> str:
    """Say why no server can run here; empty when one can."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "psycopg is not installed; install affidavit[postgresql]"
    if _binaries() is None:
        return "no PostgreSQL server binaries (initdb, pg_ctl) are installed here"
    if os.geteuid() != 0:
        return ""
    account = _account()
    if account is None:
        return "PostgreSQL refuses to run as root, and there is no user 'postgres' or 'nobody' to run it as"
    try:
        subprocess.run(["true"], user=account.pw_uid, group=account.pw_gid, extra_groups=[], check=True)
    except (OSError, subprocess.SubprocessError):
        return f"PostgreSQL refuses to run as root, and this root may not become {account.pw_name!r}"
    return ""


@contextlib.contextmanager
def running_server() -> Iterator[PostgresqlServer]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    binaries = _binaries()
    assert binaries is not None
    account = _account() if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="pg-"))  # a socket's path must be short
    if account is not None:
        os.chown(folder, account.pw_uid, account.pw_gid)
    folder.chmod(0o755)
    server = PostgresqlServer(binaries, folder, account)
    try:
        server.initialise()
        server.start()
        yield server
    finally:
        server.stop("immediate")
        shutil.rmtree(folder, ignore_errors=True)


def _binaries() -> Path | None:
    found = shutil.which("pg_ctl")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").is_file()), None)


def _account() -> pwd.struct_passwd | None:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return None
