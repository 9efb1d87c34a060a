"""Commands about the log: `log list | show | proof | fsck`, `db upgrade` and `evidence export`;
`log export | prove-fork` are in `audit.file_commands`.

With --url they ask a running server; without, they read the coordinator's home on this machine.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit import file_commands
from audit.console import CommandError, ask_api, base_home, emit, guarded, read_key, table
from audit.file_commands import cover_here
from audit.principal import LocalOwner, Principal

if TYPE_CHECKING:
    from audit.ledger import Ledger
    from audit.location import Location

log = typer.Typer(name="log", help="Search the log, read an entry, prove it is there.", no_args_is_help=True)
db = typer.Typer(name="db", help="The log's database.", no_args_is_help=True)
evidence = typer.Typer(name="evidence", help="Files that prove an entry to a stranger.", no_args_is_help=True)

Home = Annotated[
    Path | None, typer.Option("--home", help="Folder of the homes [AFFIDAVIT_HOME, .affidavit].")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Url = Annotated[str | None, typer.Option("--url", help="Ask the server at this address instead.")]
KeyFile = Annotated[
    Path | None, typer.Option("--key-file", help="File with the API key [AFFIDAVIT_API_KEY].")
]
Index = Annotated[int, typer.Argument(help="The entry's place in the log, from 0.", min=0)]


def register(application: typer.Typer) -> None:
    """Add these commands to the front door."""
    file_commands.register(log)
    application.add_typer(log)
    application.add_typer(db)
    application.add_typer(evidence)


@log.command("list")
@guarded
def list_entries(
    type: Annotated[str | None, typer.Option(help="Entry type, such as prediction.")] = None,
    actor: Annotated[str | None, typer.Option(help="Who wrote it.")] = None,
    version: Annotated[str | None, typer.Option(help="Model version (digest).")] = None,
    run: Annotated[str | None, typer.Option(help="Training run.")] = None,
    site: Annotated[str | None, typer.Option(help="Site.")] = None,
    model: Annotated[str | None, typer.Option(help="Model.")] = None,
    principal: Annotated[str | None, typer.Option(help="The pseudonym that an entry names.")] = None,
    subject: Annotated[str | None, typer.Option(help="About this person, by your own id.")] = None,
    pseudonym: Annotated[str | None, typer.Option(help="About the person of this pseudonym.")] = None,
    decision: Annotated[str | None, typer.Option(help="allowed or denied.")] = None,
    since: Annotated[str | None, typer.Option(help="From this time on (RFC 3339, UTC).")] = None,
    until: Annotated[str | None, typer.Option(help="Before this time.")] = None,
    after: Annotated[int | None, typer.Option(help="Continue after this leaf index.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="At most so many.")] = 50,
    home: Home = None,
    url: Url = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """List entries that match every filter, in log order.

    Exit codes: 0 done (also when nothing matches), 1 refused or failed, 2 wrong usage.
    """
    filters = {
        "type": type, "actor": actor, "version": version, "run": run, "site": site, "model": model,
        "principal": principal, "decision": decision,
        "since": since, "until": until, "after": after, "limit": limit,
    }  # fmt: skip
    if subject is not None:
        if pseudonym is not None:
            raise typer.BadParameter("give --subject or --pseudonym, not both")
        pseudonym = _pseudonym(home, url, key_file, subject)
    if url:
        from urllib.parse import urlencode

        filters["pseudonym"] = pseudonym
        query = urlencode({name: value for name, value in filters.items() if value is not None})
        found = json.loads(ask_api(url, f"/v1/audit/entries?{query}", key=read_key(None, key_file)))
    else:
        from audit.service import SearchRequest, search_entries

        asked = SearchRequest(**filters, subject=pseudonym)  # type: ignore[arg-type]
        with _ledger(home) as ledger:
            rows = search_entries(ledger, _owner(), LocalOwner(), asked)
        listed = [{"leaf_index": row.leaf_index, "entry": json.loads(row.body)} for row in rows]
        found = {"entries": listed, "next": rows[-1].leaf_index if len(rows) == limit else None}
    lines = [
        [
            item["leaf_index"],
            item["entry"]["time"],
            item["entry"]["type"],
            item["entry"]["actor"],
            _about(item),
        ]
        for item in found["entries"]
    ]
    shown = table("", ("index", "time", "type", "actor", "about"), lines) if lines else "nothing matches"
    if found["next"] is not None:
        shown += f"\nmore: --after {found['next']}"
    emit(found, shown, as_json=as_json)


@log.command("show")
@guarded
def show_entry(
    index: Index, home: Home = None, url: Url = None, key_file: KeyFile = None, as_json: AsJson = False
) -> None:
    """Show one entry: its fields, its leaf hash, and its exact bytes.

    Exit codes: 0 done, 1 refused or there is no such entry, 2 wrong usage.
    """
    if url:
        found = json.loads(ask_api(url, f"/v1/audit/entries/{index}", key=read_key(None, key_file)))
    else:
        from audit.merkle import hash_leaf
        from audit.service import read_entry

        with _ledger(home) as ledger:
            data = read_entry(ledger, _owner(), LocalOwner(), index)
        found = {
            "leaf_index": index,
            "leaf_hash": hash_leaf(data).hex(),
            "entry": json.loads(data),
            "bytes": base64.b64encode(data).decode(),
        }
    lines = [f"entry {index}   leaf hash {found['leaf_hash']}", json.dumps(found["entry"], indent=2)]
    emit(found, lines, as_json=as_json)


@log.command("proof")
@guarded
def prove_entry(
    index: Index,
    out: Annotated[Path | None, typer.Option(help="Write the tlog-proof file here.")] = None,
    home: Home = None,
    url: Url = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Prove that an entry is in the log, under its newest checkpoint (C2SP tlog-proof).

    On the log's own machine a checkpoint is signed first where none covers the entry yet.

    Exit codes: 0 done, 1 refused, no such entry, or no checkpoint covers it and none can be signed here, 2
    wrong usage.
    """
    from audit.tlog_proof import TlogProof

    if url:
        document = json.loads(ask_api(url, f"/v1/audit/entries/{index}/proof", key=read_key(None, key_file)))
    else:
        document = _prove_here(home, index)
    proof = TlogProof(
        leaf_index=index,
        hashes=tuple(base64.b64decode(node) for node in document["proof"]),
        checkpoint_note=document["checkpoint"].encode(),
    ).format()
    if out is not None:
        out.write_bytes(proof)
    emit(document, proof.decode() if out is None else f"wrote {out}", as_json=as_json)


@log.command("fsck")
@guarded
def check_log(home: Home = None, as_json: AsJson = False) -> None:
    """Recompute every hash, column and tree node of the log from its entries' bytes, and check that every
    stored checkpoint is signed by a key of the log.

    Exit codes: 0 the log is whole, 1 it is not (the first bad thing is named), 2 wrong usage.
    """
    from audit.entries import columns_of
    from audit.errors import LedgerSchemaError
    from audit.fsck import fsck
    from audit.ledger_keys import UnsignedCheckpointError, check_notes

    place = _place(home)
    if place.path is not None and not place.path.is_file():
        raise CommandError(f"{place}: no log here; give --home", code="audit.ledger_missing")
    report = fsck(place, columns_of=columns_of)
    if not report.ok:
        raise CommandError(
            f"{report.where}: {report.detail} ({report.entries} entries before it are good)",
            code=f"fsck.{report.problem}",
        )
    signed: int | None = None
    try:
        with _ledger(home) as ledger:
            signed = check_notes(ledger)
    except UnsignedCheckpointError as error:
        raise CommandError(str(error), code="fsck.checkpoint") from error
    except LedgerSchemaError:
        told = "its checkpoints' signatures are read after `affidavit db upgrade`"
    else:
        told = f"{signed} signed checkpoints"
    document = {"ok": True, "entries": report.entries, "checkpoints": signed}
    emit(document, f"the log is whole: {report.entries} entries, {told}", as_json=as_json)


@db.command("upgrade")
@guarded
def upgrade_database(home: Home = None, as_json: AsJson = False) -> None:
    """Bring the log's database to this release's schema; entries, proofs and checkpoints stay as they are.

    Exit codes: 0 done (also when there was nothing to do), 1 refused or failed, 2 wrong usage.
    """
    from dataclasses import asdict

    from audit.upgrade import upgrade

    report = upgrade(_place(home))
    same = report.before == report.after
    shown = f"{report.location}: schema {report.after}" + (
        ", nothing to do" if same else f", was {report.before}"
    )
    emit(asdict(report), shown, as_json=as_json)


@evidence.command("export")
@guarded
def export(
    index: Annotated[int | None, typer.Argument(help="The entry's place in the log, from 0.", min=0)] = None,
    version: Annotated[str | None, typer.Option(help="A model version's whole story, by its digest.")] = None,
    run: Annotated[str | None, typer.Option(help="A training run's whole story.")] = None,
    since: Annotated[str | None, typer.Option(help="Every entry from this time on (RFC 3339, UTC).")] = None,
    until: Annotated[str | None, typer.Option(help="Every entry before this time.")] = None,
    type: Annotated[str | None, typer.Option(help="Every entry of this type.")] = None,
    principal: Annotated[str | None, typer.Option(help="Every entry that names this pseudonym.")] = None,
    out: Annotated[Path, typer.Option(help="Where to write the zip.")] = Path("evidence.zip"),
    answer: Annotated[
        Path | None, typer.Option(help="The answer you were given (JSON): adds its receipt and opened rows.")
    ] = None,
    home: Home = None,
    url: Url = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Write a zip that proves an entry, and all that led to it, to a stranger.

    Or a version, or a run; or every entry that matches a time, a type or a pseudonym, each proved to be in
    the log. On the log's own machine a checkpoint is signed first where none covers the entries yet.

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage.
    """
    terms = {
        "version": version, "run": run, "since": since, "until": until, "type": type, "principal": principal,
    }  # fmt: skip
    asked = {name: value for name, value in terms.items() if value is not None}
    if (index is None) == (not asked):
        raise CommandError("give an entry's index, or terms such as --version", code="command.usage")
    receipt, opened, context = _answer_parts(answer)
    if url:
        from urllib.parse import urlencode

        path = f"?{urlencode(asked)}" if index is None else f"/{index}"
        data = ask_api(url, f"/v1/audit/evidence{path}", key=read_key(None, key_file))
    else:
        data = _export_here(base_home(home), index, asked)
    if receipt is not None or opened is not None:
        from audit.service import add_answer

        data = add_answer(data, receipt=receipt, opened=opened, context=context)
    out.write_bytes(data)
    emit(
        {"file": str(out), "size_bytes": len(data)},
        f"wrote {out} ({len(data):,} bytes)\ncheck it: affidavit verify {out} --policy POLICY",
        as_json=as_json,
    )


def _ledger(home: Path | None) -> Ledger:
    from audit.ledger import Ledger

    return Ledger.open(_place(home))


def _place(home: Path | None) -> Location:
    from audit.location import log_location

    return log_location(base_home(home) / "coordinator")


def _pseudonym(home: Path | None, url: str | None, key_file: Path | None, subject: str) -> str:
    """Return a person's pseudonym, or nobody's; the id is sent in a body, which no proxy keeps."""
    from audit.subjects import NOBODY, find_subject
    from audit.vault_home import open_vault
    from audit.vault_records import SubjectUnknownError

    try:
        if url:
            answer = ask_api(
                url,
                "/v1/subjects/find",
                key=read_key(None, key_file),
                method="POST",
                body={"subject": subject},
            )
            return str(json.loads(answer)["pseudonym"])
        with _ledger(home) as ledger, open_vault(base_home(home) / "coordinator", ledger.origin) as vault:
            return find_subject(vault, _owner(), LocalOwner(), subject)
    except (SubjectUnknownError, CommandError) as error:
        if error.code != SubjectUnknownError.code:
            raise
        return NOBODY


def _owner() -> Principal:
    return Principal(id="owner", role="operator")


def _prove_here(home: Path | None, index: int) -> dict[str, Any]:
    from audit.checkpoints import parse_checkpoint_note
    from audit.merkle import hash_leaf
    from audit.service import prove_entry as prove

    with _ledger(home) as ledger:
        cover_here(ledger, base_home(home) / "coordinator", index)
        proof = prove(ledger, _owner(), LocalOwner(), index)
        leaf_hash = hash_leaf(ledger.entry(index)).hex()
    return {
        "leaf_index": index,
        "leaf_hash": leaf_hash,
        "tree_size": parse_checkpoint_note(proof.checkpoint_note).tree_size,
        "proof": [base64.b64encode(node).decode() for node in proof.hashes],
        "checkpoint": proof.checkpoint_note.decode(),
    }


def _export_here(base: Path, index: int | None, asked: dict[str, str]) -> bytes:
    from audit.service import SearchRequest, export_asked, export_entry

    def blob(digest: str) -> bytes | None:
        path = base / "coordinator" / "blobs" / digest[:2] / digest
        data = path.read_bytes() if path.is_file() else None
        if data is not None and hashlib.sha256(data).hexdigest() != digest:
            raise CommandError(
                f"{path}: is altered; restore it from a backup", code="federation.blob_altered"
            )
        return data

    with _ledger(base) as ledger:
        cover_here(ledger, base / "coordinator", ledger.tree_size - 1 if index is None else index)
        if index is not None:
            return export_entry(ledger, blob, _owner(), LocalOwner(), index)
        return export_asked(ledger, blob, _owner(), LocalOwner(), SearchRequest(**asked))  # type: ignore[arg-type]


def _answer_parts(path: Path | None) -> tuple[Any, Any, tuple[int, str, str] | None]:
    """Return receipt, opened rows, and what opens the context, of an answer of either protocol."""
    if path is None:
        return None, None, None
    from audit.canonical import parse_strict
    from audit.errors import AuditError

    document: Any = parse_strict(path.read_bytes(), allow_floats=True)
    told = document.get("parameters") if isinstance(document, dict) else None
    if isinstance(told, dict):  # the inference protocol's parameters are JSON texts
        try:
            document = {
                name: parse_strict(str(told[name]).encode(), allow_floats=True)
                for name in ("receipt", "opened", "sealed")
                if name in told
            }
        except AuditError as error:
            raise CommandError(
                f"{path}: parameters: receipt, opened or sealed is no JSON: {error}"
            ) from error
    if not isinstance(document, dict) or "receipt" not in document or "opened" not in document:
        raise CommandError(
            f"{path}: is not an answer of the API; it needs receipt and opened, or has them in parameters"
        )
    receipt, sealed = document["receipt"], document.get("sealed")
    if sealed is None:
        return receipt, document["opened"], None
    try:
        context = (int(receipt["leaf_index"]), str(sealed["context_salt"]), str(sealed["context"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CommandError(f"{path}: sealed has no context, or receipt no leaf_index") from error
    return receipt, document["opened"], context


def _about(item: dict[str, Any]) -> str:
    body = item["entry"]["body"]
    parts = [str(body[name])[:24] for name in ("model", "site", "run", "round", "reason") if body.get(name)]
    return " ".join(parts)
