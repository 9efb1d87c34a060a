"""Commands about a person and about the vault: `subject find | export | erase`, `evidence disclose`,
`vault backup | restore | rotate-key`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit.commands import evidence
from audit.console import ask_api, base_home, emit, guarded, read_key
from audit.principal import LocalOwner, Principal

if TYPE_CHECKING:
    from audit.vault import Vault
    from federation.coordinator import Coordinator

subject = typer.Typer(name="subject", help="One person, by your own id for them.", no_args_is_help=True)
vault = typer.Typer(name="vault", help="What the log must be able to forget.", no_args_is_help=True)

Home = Annotated[
    Path | None, typer.Option("--home", help="Folder of the homes [AFFIDAVIT_HOME, .affidavit].")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Url = Annotated[str | None, typer.Option("--url", help="Ask the server at this address instead.")]
KeyFile = Annotated[
    Path | None, typer.Option("--key-file", help="File with an officer's key [AFFIDAVIT_API_KEY].")
]
Person = Annotated[str, typer.Argument(help="Your own id for the person, as predictions named it.")]


def register(application: typer.Typer) -> None:
    """Add these commands to the front door."""
    application.add_typer(subject)
    application.add_typer(vault)
    evidence.command("disclose")(disclose)


@subject.command("find")
@guarded
def find(
    person: Person, home: Home = None, url: Url = None, key_file: KeyFile = None, as_json: AsJson = False
) -> None:
    """Show the pseudonym under which entries speak of a person.

    Exit codes: 0 done, 1 unknown, erased or refused, 2 wrong usage.
    """
    if url:
        document = json.loads(_post(url, "/v1/subjects/find", key_file, {"subject": person}))
    else:
        from audit.subjects import find_subject

        with _parts(home) as (_, store):
            document = {"pseudonym": find_subject(store, _owner(), LocalOwner(), person)}
    emit(document, document["pseudonym"], as_json=as_json)


@subject.command("export")
@guarded
def export(
    person: Person,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the zip.")] = Path("subject.zip"),
    home: Home = None,
    url: Url = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Write everything about a person, opened and proved (GDPR Art. 15). The file is theirs: guard it.

    Exit codes: 0 done, 1 unknown, erased or refused, 2 wrong usage.
    """
    if url:
        data = _post(url, "/v1/subjects/export", key_file, {"subject": person})
    else:
        from audit.subjects import begin_export, build_export

        with _parts(home) as (coordinator, store):
            body = begin_export(
                coordinator.ledger, store, _owner(), LocalOwner(), person, request_id=secrets.token_hex(16)
            )
            place = coordinator.append(body, "vault")
            coordinator.publish()
            data = build_export(coordinator.ledger, store, place.leaf_index)
    _write_private(out, data)
    emit(
        {"file": str(out), "size_bytes": len(data)},
        f"wrote {out} ({len(data):,} bytes)\ncheck it: affidavit verify {out} --policy POLICY",
        as_json=as_json,
    )


@subject.command("erase")
@guarded
def erase(
    person: Person,
    request_id: Annotated[
        str | None, typer.Option(help="Your file number; it goes into the log, so it must name nobody.")
    ] = None,
    reader: Annotated[
        bool, typer.Option("--reader", help="The person is a principal (p-…): erase what they searched for.")
    ] = False,
    home: Home = None,
    url: Url = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Erase a person for good (GDPR Art. 17). Entries and proofs stay, and speak of nobody any more.

    The same --request-id again gives the same answer, and finishes what a crash cut off.

    Exit codes: 0 erased, 1 unknown, erased before or refused, 2 wrong usage.
    """
    asked = request_id or secrets.token_hex(16)
    if url and reader:
        raise typer.BadParameter("--reader works on the coordinator's home, not with --url")
    if url:
        body = {"subject": person, "request_id": asked}
        document = json.loads(_post(url, "/v1/subjects/erase", key_file, body))
    else:
        from audit.subjects import erase_subject
        from audit.vault_records import PERSON, READER

        with _parts(home) as (coordinator, store):
            done = erase_subject(
                coordinator.ledger,
                store,
                _owner(),
                LocalOwner(),
                person,
                request_id=asked,
                time=_time(coordinator),
                kind=READER if reader else PERSON,
            )
        document = {
            "pseudonym": done.subject,
            "records": done.records,
            "entry": {"leaf_index": done.leaf_index, "leaf_hash": done.leaf_hash},
            "scrubbed": not done.left,
            "left": done.left,
        }
    shown = f"erased: {document['records']} records; entry {document['entry']['leaf_index']} says so"
    if not document["scrubbed"]:
        shown += f"\nnot gone everywhere yet: {document['left']}"
    emit(document, shown, as_json=as_json)


@guarded
def disclose(
    index: Annotated[int, typer.Argument(help="The entry's place in the log, from 0.", min=0)],
    field: Annotated[
        list[str] | None, typer.Option(help="Field to open, such as age or row.0.output.label; repeat it.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Open every field.")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the zip.")] = Path("evidence.zip"),
    home: Home = None,
    url: Url = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Write an entry's evidence with chosen fields opened; the others stay closed to whoever reads it.

    Exit codes: 0 done, 1 refused, erased or no such field, 2 wrong usage.
    """
    if bool(field) == everything:
        raise typer.BadParameter("name what to open with --field, or give --all")
    fields = field or []
    if url:
        from urllib.parse import urlencode

        query = urlencode([("field", name) for name in fields])
        data = ask_api(url, f"/v1/audit/entries/{index}/disclosed?{query}", key=read_key(None, key_file))
    else:
        from audit.entries import EvidenceExported
        from audit.subjects import disclose as build

        with _parts(home) as (coordinator, store):
            coordinator.publish()
            data = build(
                coordinator.ledger, store, coordinator.blobs.find, _owner(), LocalOwner(), index, fields
            )
            body = EvidenceExported(
                leaf_index=index,
                scope="disclosed",
                principal="owner",
                digest=hashlib.sha256(data).hexdigest(),
            )
            coordinator.append(body, "vault")
    _write_private(out, data)
    emit(
        {"file": str(out), "size_bytes": len(data)},
        f"wrote {out} ({len(data):,} bytes)\ncheck it: affidavit verify {out} --policy POLICY",
        as_json=as_json,
    )


@vault.command("backup")
@guarded
def backup(
    file: Annotated[Path, typer.Argument(help="The new file. Keep it apart from the home's backups.")],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Copy the vault, without its master key `vault.key`: keep that in a third place.

    Exit codes: 0 done, 1 failed, 2 wrong usage.
    """
    from audit.location import vault_location
    from audit.vault_backup import backup_vault

    size = backup_vault(vault_location(base_home(home) / "coordinator"), file)
    emit({"file": str(file), "size_bytes": size}, f"wrote {file} ({size:,} bytes)", as_json=as_json)


@vault.command("restore")
@guarded
def restore(
    file: Annotated[Path, typer.Argument(help="Made by `affidavit vault backup`.")],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Put a vault back; whoever the log says was erased since is erased in it first.

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage.
    """
    from audit.location import vault_location
    from audit.vault_backup import restore_vault
    from audit.vault_home import KEY_FILE, vault_passphrase
    from federation.coordinator import Coordinator

    folder = base_home(home) / "coordinator"
    with Coordinator.open(folder) as coordinator:
        done = restore_vault(
            file,
            vault_location(folder),
            folder / KEY_FILE,
            vault_passphrase(),
            coordinator.ledger,
            origin=coordinator.origin,
            before=_before(coordinator),
        )
    document = {"forgotten": done.forgotten, "finished": done.finished, "swept": done.swept}
    shown = f"restored; {done.forgotten} people were erased again"
    emit(document, shown, as_json=as_json)


@vault.command("scrub")
@guarded
def scrub(home: Home = None, as_json: AsJson = False) -> None:
    """Make the vault agree with the log, and rewrite the pages that erasures freed.

    Exit codes: 0 done, 1 something still holds traces (said, with the remedy), 2 wrong usage.
    """
    with _parts(home) as (_, store):
        done = store.scrub()
    emit({"scrubbed": bool(done), "left": done.left}, done.left or "rewritten", as_json=as_json)
    if not done:
        raise typer.Exit(1)


@vault.command("rotate-key")
@guarded
def rotate_key(home: Home = None, as_json: AsJson = False) -> None:
    """Wrap every person's key anew. Earlier backups of the vault, and whatever of erased keys a disk or a
    write-ahead log still holds, are closed for good: make a new backup after it.

    Exit codes: 0 done, 1 failed, 2 wrong usage.
    """
    with _parts(home) as (_, store):
        people = store.rotate_key()
    emit({"people": people}, f"{people} keys wrapped anew; make a new vault backup now", as_json=as_json)


@contextmanager
def _parts(home: Path | None) -> Iterator[tuple[Coordinator, Vault]]:
    """Yield the coordinator and its vault, which agrees with the log."""
    from audit.subjects import reconcile
    from audit.vault_home import open_vault
    from federation.coordinator import Coordinator

    folder = base_home(home) / "coordinator"
    with (
        Coordinator.open(folder) as coordinator,
        open_vault(folder, coordinator.origin) as store,
    ):
        reconcile(coordinator.ledger, store, before=_before(coordinator))
        yield coordinator, store


def _time(coordinator: Coordinator, *, earlier_s: int = 0) -> str:
    moment = coordinator.clock.now() - timedelta(seconds=earlier_s)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _before(coordinator: Coordinator) -> str:
    from audit.subjects import ORPHAN_AGE_S

    return _time(coordinator, earlier_s=ORPHAN_AGE_S)


def _owner() -> Principal:
    return Principal(id="owner", role="operator")


def _post(url: str, path: str, key_file: Path | None, body: dict[str, Any]) -> bytes:
    return ask_api(url, path, key=read_key(None, key_file), method="POST", body=body)


def _write_private(path: Path, data: bytes) -> None:
    from audit._files import write_durably

    write_durably(path, data)
