"""Commands for operators: `serve`, `keys create | rotate | list | revoke`, `status`, `doctor`, `backup`,
`restore`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit.console import CommandError, ask_api, base_home, emit, guarded, read_key, table
from server import policy_commands, subject_commands

if TYPE_CHECKING:
    import socket

    from server.journal import Journal
    from server.keys import KeyStore

keys = typer.Typer(name="keys", help="API keys and their roles.", no_args_is_help=True)

Home = Annotated[
    Path | None, typer.Option("--home", help="Folder of the homes [AFFIDAVIT_HOME, .affidavit].")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Url = Annotated[str | None, typer.Option("--url", help="Ask the server at this address instead.")]
KeyFile = Annotated[
    Path | None, typer.Option("--key-file", help="File with an operator's key [AFFIDAVIT_API_KEY].")
]


def register(application: typer.Typer) -> None:
    """Add these commands to the front door."""
    from server.network.commands import register as register_network

    register_network(application)
    application.command("serve")(serve)
    application.add_typer(keys)
    application.command("status")(status)
    application.command("doctor")(doctor)
    application.command("backup")(backup)
    application.command("restore")(restore)
    subject_commands.register(application)
    policy_commands.register(application)


@guarded
def serve(
    home: Home = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on [AFFIDAVIT_HOST, 127.0.0.1].")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one [AFFIDAVIT_PORT, 8000].")] = None,
    policies: Annotated[Path | None, typer.Option(help="Cedar file in place of the shipped rules.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning, error.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that answer on the port [AFFIDAVIT_WORKERS, 1].")
    ] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="Also speak the inference protocol over gRPC [AFFIDAVIT_GRPC_PORT].")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Serve the HTTP API until stopped. Its description is at /docs.

    With --workers a supervisor starts so many processes, and starts each again that dies. SIGTERM turns
    /readyz to 503 for AFFIDAVIT_DRAIN_S seconds, then finishes what is under way.

    With --json the first line of standard output is {"url": …} once the socket listens.

    Exit codes: 0 stopped, 1 it could not start, 2 wrong usage.
    """
    import logging

    from federation.coordinator import Coordinator
    from server import logs, metric_files
    from server.settings import load_settings, unknown_variables

    flags = {
        "host": host,
        "port": port,
        "policies": policies,
        "log_level": log_level,
        "workers": workers,
        "grpc_port": grpc_port,
    }
    settings = load_settings(flags=flags, base=home).settings
    level = settings.log_level.upper()
    if level not in logging.getLevelNamesMapping():
        raise CommandError(f"log_level {settings.log_level!r} is unknown; use info", code="server.settings")
    logs.configure(settings.log_format, level)
    for line in unknown_variables(os.environ):
        logging.getLogger(__name__).warning("%s", line)
    from audit.location import log_location

    place = log_location(settings.coordinator_home)
    if place.path is not None and not place.path.is_file():
        raise CommandError(
            f"{settings.coordinator_home}: no log here; make one with `affidavit init`, or give --home",
            code="audit.ledger_missing",
        )
    with Coordinator.open(settings.coordinator_home, settings.signer_home) as coordinator:
        coordinator.publisher.step()  # who may not sign is told here, in one line
    if settings.workers > 1 and settings.grpc_port == 0:
        raise CommandError("grpc_port 0 is one worker's; name a port that all share", code="server.settings")
    from server.app import create_app
    from server.workers import Supervisor, run_worker, stopping_gently

    create_app(settings)  # what is wrong with the policies is told before anything listens
    listener = _listen(settings.host, settings.port)
    url = f"http://{settings.address(listener.getsockname()[1])}"
    emit({"url": url}, f"listening on {url}   (description: {url}/docs)", as_json=as_json)
    sys.stdout.flush()
    with stopping_gently():
        if settings.workers == 1:
            run_worker(settings, listener, level.lower())
            return
        with closing(metric_files.prepare(settings.coordinator_home / metric_files.FOLDER)):
            if Supervisor(settings, listener, level.lower()).run():
                raise CommandError("no worker could be kept alive; the log says why", code="server.workers")


@keys.command("create")
@guarded
def create_key(
    role: Annotated[str, typer.Option(help="node, officer, scientist, consumer or operator.")],
    expires: Annotated[
        str | None, typer.Option(help="RFC 3339, such as 2026-12-31T08:00:00Z; else never.")
    ] = None,
    note: Annotated[str, typer.Option(help="For your own memory; never in the log.")] = "",
    site: Annotated[str, typer.Option(help="For role node: the site whose entries it may read.")] = "",
    region: Annotated[str, typer.Option(help="Where its holder asks from, such as eu.")] = "",
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="The only model it may ask; may be given several times."),
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option(help="A client certificate (PEM) in place of a secret; see `mtls_header` in the docs."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the key to this new file (0600), do not print it.")
    ] = None,
    home: Home = None,
    url: Url = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key. Its text is shown once; the store keeps an argon2id hash.

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage.
    """
    models, fingerprint = model or [], _fingerprint(certificate) if certificate is not None else ""
    if url:
        body = {
            "role": role, "note": note, "site": site, "region": region, "models": models,
            "certificate": fingerprint, **({"expires": expires} if expires else {}),
        }  # fmt: skip
        answer = ask_api(url, "/v1/keys", key=read_key(None, key_file), method="POST", body=body)
        document: dict[str, Any] = json.loads(answer)
    else:
        from dataclasses import asdict

        from server import key_service

        with _parts(home) as (store, journal):
            made = key_service.create_key(
                store, journal, role=role, expires=expires, note=note, site=site, region=region,
                models=tuple(models), certificate=fingerprint,
            )  # fmt: skip
        document = {"key": made.text, **asdict(made.view), "entry": made.entry}
    _hand_over(document, out, as_json=as_json)


@keys.command("rotate")
@guarded
def rotate_key(
    key_id: Annotated[str, typer.Argument(help="The key's id, from `affidavit keys list`.")],
    overlap: Annotated[int, typer.Option(min=0, help="Seconds for which the old key still counts.")] = 86_400,
    out: Annotated[
        Path | None, typer.Option(help="Write the key to this new file (0600), do not print it.")
    ] = None,
    home: Home = None,
    url: Url = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a successor for the same principal, role and terms; the old key ends after the overlap.

    Exit codes: 0 done, 1 there is no such key, it stands no more, refused or failed, 2 wrong usage.
    """
    if url:
        answer = ask_api(
            url, f"/v1/keys/{key_id}/rotate", key=read_key(None, key_file), method="POST",
            body={"overlap_s": overlap},
        )  # fmt: skip
        document: dict[str, Any] = json.loads(answer)
    else:
        from dataclasses import asdict

        from server import key_service

        with _parts(home) as (store, journal):
            made = key_service.rotate_key(store, journal, key_id, overlap_s=overlap)
        document = {"key": made.text, **asdict(made.view), "entry": made.entry}
    _hand_over(document, out, as_json=as_json)


@keys.command("list")
@guarded
def list_keys(home: Home = None, url: Url = None, key_file: KeyFile = None, as_json: AsJson = False) -> None:
    """List the keys: id, role, pseudonym, dates; never a secret.

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage.
    """
    if url:
        document = json.loads(ask_api(url, "/v1/keys", key=read_key(None, key_file)))
    else:
        from dataclasses import asdict

        with _parts(home) as (store, _):
            document = {"keys": [asdict(key) for key in store.list()]}
    columns = ("key_id", "role", "principal", "expires", "revoked", "note")
    rows = [[key[column] for column in columns] for key in document["keys"]]
    emit(document, table("", columns, rows) if rows else "no keys", as_json=as_json)


@keys.command("revoke")
@guarded
def revoke_key(
    key_id: Annotated[str, typer.Argument(help="The key's id, from `affidavit keys list`.")],
    home: Home = None,
    url: Url = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Revoke a key at once and for good.

    Exit codes: 0 done, 1 there is no such key, refused or failed, 2 wrong usage.
    """
    if url:
        answer = ask_api(url, f"/v1/keys/{key_id}", key=read_key(None, key_file), method="DELETE")
        document = json.loads(answer)
    else:
        from dataclasses import asdict

        from server import key_service

        with _parts(home) as (store, journal):
            document = asdict(key_service.revoke_key(store, journal, key_id))
    emit(document, f"revoked {key_id} ({document['role']})", as_json=as_json)


@guarded
def status(home: Home = None, as_json: AsJson = False) -> None:
    """Show every setting, where its value came from, and what the homes hold.

    Exit codes: 0 done, 1 a setting is wrong, 2 wrong usage.
    """
    from server.settings import load_settings

    loaded = load_settings(base=home)
    values = {
        name: {"value": str(value) if isinstance(value, Path) else value, "source": loaded.sources[name]}
        for name, value in loaded.settings.model_dump().items()
    }
    state = _home_state(base_home(home), loaded.settings.coordinator_home, loaded.settings.signer_home)
    rows = [[name, item["value"], item["source"]] for name, item in values.items()]
    shown = table("", ("setting", "value", "source"), rows)
    lines = "\n".join(f"{name:<12} {value}" for name, value in state.items())
    emit({"settings": values, "homes": state}, f"{shown}\n\n{lines}", as_json=as_json)


@guarded
def doctor(home: Home = None, as_json: AsJson = False) -> None:
    """Check Python, the installed extras, the homes and the log, and name the fix for what is wrong.

    Exit codes: 0 all is well, 1 something is wrong, 2 wrong usage.
    """
    from server.doctor import examine

    found = examine(base_home(home))
    rows = [
        ["ok" if check.ok else ("--" if check.optional else "WRONG"), check.name, check.detail]
        for check in found
    ]
    bad = [check for check in found if not check.ok and not check.optional]
    document = {
        "ok": not bad,
        "checks": [{"name": c.name, "ok": c.ok, "optional": c.optional, "detail": c.detail} for c in found],
    }
    emit(document, table("", ("", "check", "what was found, and the fix"), rows), as_json=as_json)
    if bad:
        raise typer.Exit(1)


@guarded
def backup(
    file: Annotated[Path, typer.Argument(help="The new backup, such as affidavit-2026-12-31.tar.gz.")],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Back up the coordinator's home while it runs. The signer's home is never in it, nor the vault with what
    may be erased (`affidavit vault backup`) and its key: keep those apart.

    Exit codes: 0 done, 1 failed, 2 wrong usage.
    """
    from dataclasses import asdict

    from server.backup import backup as make

    report = make(base_home(home) / "coordinator", file)
    shown = f"wrote {file}: {report.files} files, {report.tree_size} entries of {report.origin}"
    emit(asdict(report), shown, as_json=as_json)


@guarded
def restore(
    file: Annotated[Path, typer.Argument(help="A backup made by `affidavit backup`.")],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Restore the coordinator's home, unless that would take the log behind what the signer has signed.

    Exit codes: 0 done, 1 refused (restore.behind_signer, restore.fork) or failed, 2 wrong usage.
    """
    from dataclasses import asdict

    from server.backup import restore as put_back

    base = base_home(home)
    report = put_back(file, base / "coordinator")
    shown = (
        f"restored {report.tree_size} entries of {report.origin} to {report.path}; check: affidavit log fsck"
    )
    emit(asdict(report), shown, as_json=as_json)


def _listen(host: str, port: int) -> socket.socket:
    import errno
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # by its protocol an event loop knows connections that must not wait for small packets to fill (Nagle)
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1024)
    except UnicodeError as error:
        listener.close()
        raise CommandError(f"{host}: is no host; give an address of this machine as --host") from error
    except OSError as error:
        listener.close()
        ours = not isinstance(error, socket.gaierror) and error.errno != errno.EADDRNOTAVAIL
        fix = "choose another --port" if ours else "give an address of this machine as --host"
        raise CommandError(f"{host} port {port}: {error.strerror}; {fix}") from error
    return listener


@contextmanager
def _parts(home: Path | None) -> Iterator[tuple[KeyStore, Journal]]:
    """Yield the key store and a journal of the home on this machine."""
    from audit.ledger import Ledger
    from audit.location import log_location
    from server.journal import Journal, utc_now
    from server.keys import KeyStore
    from server.monitoring import Monitoring

    folder = base_home(home) / "coordinator"
    with Ledger.open(log_location(folder)) as ledger, closing(KeyStore(folder, utc_now)) as store:
        yield store, Journal(ledger, utc_now, Monitoring(), timeout_s=30)


def _hand_over(document: dict[str, Any], out: Path | None, *, as_json: bool) -> None:
    """Show a key's text, or write it to a file; a certificate's key has none."""
    who = f"id      {document['key_id']}   role {document['role']}"
    if not document["key"]:
        emit(document, f"{who}\nwhoever holds the certificate is known by it", as_json=as_json)
        return
    if out is not None:
        _write_secret(out, document.pop("key"))
        document["file"] = str(out)
    shown = f"key     {document.get('key', out)}\n{who}\nkeep it: nobody can show it again"
    emit(document, shown, as_json=as_json)


def _fingerprint(path: Path) -> str:
    from cryptography import x509
    from cryptography.hazmat.primitives.hashes import SHA256

    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).fingerprint(SHA256()).hex()
    except ValueError as error:
        raise CommandError(f"{path}: holds no PEM certificate", code="keys.bad_request") from error


def _write_secret(path: Path, text: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise CommandError(f"{path}: exists; choose a new file for the key") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(text + "\n")


def _home_state(base: Path, coordinator: Path, signer: Path) -> dict[str, str]:
    from audit.errors import AuditError
    from audit.ledger import Ledger
    from audit.location import log_location

    state = {"homes": str(base)}
    try:
        with Ledger.open(log_location(coordinator)) as ledger:
            state["log"] = f"{ledger.origin}, {ledger.tree_size} entries"
    except AuditError as error:
        state["log"] = f"none ({error})"
    state["signer"] = "present" if signer.is_dir() else "none"
    for role in ("sites", "officers"):
        folder = base / role
        names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        state[role] = ", ".join(names) or "none"
    return state
