"""Commands that make files of a log: `log export` (tlog-tiles), `log prove-fork` (proof of misbehaviour), and
`log publish`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from audit.console import CommandError, ask_api, base_home, call_api, emit, guarded, read_key
from audit.merkle import NodeSource

if TYPE_CHECKING:
    from audit.ledger import Ledger
    from audit.misbehaviour import Misbehaviour
    from audit.receipts import Receipt

Home = Annotated[
    Path | None, typer.Option("--home", help="Folder of the homes [AFFIDAVIT_HOME, .affidavit].")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

_MAX_NOTE_FILE: Final = 64 << 20


def register(log: typer.Typer) -> None:
    """Add these commands to `affidavit log`."""
    log.command("export")(export)
    log.command("prove-fork")(prove_fork)
    log.command("publish")(publish)


@guarded
def export(
    target: Annotated[str, typer.Argument(help="A folder, or a URL such as s3://bucket/log (fsspec).")],
    hashes_only: Annotated[
        bool, typer.Option("--hashes-only", help="No entry bundles: a tree for witnesses.")
    ] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Write the log as a C2SP tlog-tiles tree, up to its newest checkpoint; again: only what is new.

    On the log's own machine what is not under a checkpoint yet is put under one first. Entry bundles hold
    every entry: put them where only readers of the log can reach them.

    Exit codes: 0 done, 1 refused (the target holds another log or history) or failed, 2 wrong usage.
    """
    from audit.ledger import Ledger
    from audit.location import log_location
    from audit.tiles_export import export_tiles

    folder = base_home(home) / "coordinator"
    with Ledger.open(log_location(folder)) as ledger:
        note = cover_here(ledger, folder, ledger.tree_size - 1)
        done = export_tiles(ledger, note, target, entries=not hashes_only)
    document = {
        "target": target,
        "tree_size": done.tree_size,
        "previous_size": done.previous_size,
        "files_written": done.files_written,
        "bytes_written": done.bytes_written,
    }
    grown = f"{done.tree_size} entries ({done.previous_size} before)"
    emit(document, f"{target}: {grown}, {done.files_written} files written", as_json=as_json)


@guarded
def publish(home: Home = None, as_json: AsJson = False) -> None:
    """Sign a checkpoint of the log as it is now, or show the one of the process that signs for it.

    Needs the signer's home on this machine. A running server does this by itself.

    Exit codes: 0 done, 1 the signer is elsewhere, refuses, or a witness does not answer, 2 wrong usage.
    """
    from audit.checkpoints import parse_checkpoint_note
    from audit.ledger import Ledger
    from audit.location import log_location
    from audit.signing_home import publish_here

    folder = base_home(home) / "coordinator"
    with Ledger.open(log_location(folder)) as ledger:
        note = publish_here(folder, ledger)
    found = parse_checkpoint_note(note)
    document = {
        "origin": found.origin,
        "tree_size": found.tree_size,
        "root_hash": found.root_hash.hex(),
        "checkpoint": note.decode(),
    }
    emit(document, note.decode().rstrip(), as_json=as_json)


def cover_here(ledger: Ledger, home: Path, leaf_index: int) -> bytes:
    """Return a checkpoint that holds the leaf, signed here and now where there is none.

    Raises:
        SignerMissingError: there is none, and the signer is not on this machine; names what to run.
        AuditError: the signer refuses.
    """
    from audit.checkpoints import parse_checkpoint_note
    from audit.signing_home import publish_here

    note = ledger.latest_checkpoint()
    if note is not None and not parse_checkpoint_note(note).tree_size <= leaf_index < ledger.tree_size:
        return note
    return publish_here(home, ledger)


@guarded
def prove_fork(
    first: Annotated[
        Path | None, typer.Argument(help="A checkpoint, a .tlog-proof, or an evidence file.")
    ] = None,
    second: Annotated[Path | None, typer.Argument(help="Another one of the same log, of any size.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write the proof.")] = Path("fork.json"),
    log: Annotated[
        str | None,
        typer.Option(
            "--log",
            help="The larger tree, needed to convict: a log file, its URL or a folder of tiles.",
        ),
    ] = None,
    offered: Annotated[
        Path | None, typer.Option("--proof", help="The consistency proof you were given: base64 lines.")
    ] = None,
    receipt: Annotated[
        Path | None,
        typer.Option(help="A receipt, or an answer with one: was it kept in the checkpoint FIRST?"),
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", help="With --receipt: ask this server, in place of FIRST.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", help="File with the API key [AFFIDAVIT_API_KEY].")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a file that convicts a log of having signed two histories; `affidavit verify` judges it.

    Two checkpoints of one size need nothing else. Otherwise the larger tree must say what its first entries
    are: give its --log, or a --proof. With --receipt and one later checkpoint (or --url): the log's own
    promise against its own tree. Signatures are judged by `verify`, against a policy.

    Exit codes: 0 written, 1 the log is consistent and kept its promise, or nothing shows otherwise, 2 wrong
    usage.
    """
    from audit.checkpoints import parse_checkpoint_note
    from audit.misbehaviour import prove_fork as prove

    if receipt is not None:
        if second is not None or (first is None) == (url is None):
            raise CommandError("--receipt takes one later checkpoint, or --url", code="command.usage")
        found = _broken_promise(receipt, first, log, url, read_key(None, key_file))
    elif first is None or second is None or url is not None:
        raise CommandError("give two checkpoints, or --receipt", code="command.usage")
    else:
        notes = [_note(path) for path in (first, second)]
        size = max(parse_checkpoint_note(note).tree_size for note in notes)
        with _tree(log, size) as larger:
            found = prove(notes[0], notes[1], larger=larger, offered=_proof(offered))
    out.write_bytes(found.encode())
    document = {
        "file": str(out),
        "kind": found.kind,
        "origin": found.origin,
        "conclusive": found.kind != "unproved",
    }
    told = "convicts the log" if found.kind != "unproved" else "asks the log for a proof; convicts nobody yet"
    if found.kind == "receipt" and not found.leaf_hashes:
        told = "convicts the log once its witnesses cosigned this checkpoint after the deadline"
    emit(
        document,
        f"wrote {out}: {found.kind}, {told}\ncheck it: affidavit verify {out} --policy POLICY",
        as_json=as_json,
    )


def _broken_promise(
    path: Path, checkpoint: Path | None, log: str | None, url: str | None, key: str
) -> Misbehaviour:
    """What shows that a receipt was not kept; `NoMisbehaviourError` when it was."""
    from audit.checkpoints import parse_checkpoint_note
    from audit.misbehaviour import Misbehaviour, prove_broken_promise
    from audit.receipts import Receipt

    promised = _receipt(path)
    if checkpoint is not None:
        note = _note(checkpoint)
        with _tree(log, parse_checkpoint_note(note).tree_size) as tree:
            return prove_broken_promise(promised, note, tree)
    index = promised.leaf_index
    status, data, _ = call_api(url or "", f"/v1/audit/entries/{index}/proof", key=key)
    if status == 404:  # the log has no such entry: the checkpoint that its witnesses cosign says so
        note = ask_api(url or "", "/v1/audit/checkpoint?meeting=true", key="")
        return prove_broken_promise(promised, note)
    if status >= 400:
        raise CommandError(
            f"{url} shows no proof of leaf {index} to you ({status}): an officer or a site's key sees it",
            code="log.not_shown",
        )
    try:
        document = json.loads(data)
        made = Misbehaviour(
            kind="receipt",
            notes=(document["checkpoint"].encode(),),
            leaf_index=index,
            leaf_hashes=(bytes.fromhex(document["leaf_hash"]),),
            paths=(tuple(base64.b64decode(item) for item in document["proof"]),),
            receipt=Receipt.from_json(promised.to_json()),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CommandError(f"{url} does not answer as a log", code="command.unreachable") from error
    made.contradiction()
    return made


def _receipt(path: Path) -> Receipt:
    """A receipt by itself, or inside an answer of the API."""
    from audit.canonical import parse_strict
    from audit.receipts import Receipt

    document = parse_strict(path.read_bytes(), allow_floats=True)
    inside = document.get("receipt", document) if isinstance(document, dict) else document
    return Receipt.from_json(inside)


def _note(path: Path) -> bytes:
    """The checkpoint in a file of any of our kinds."""
    from audit.evidence import read_evidence
    from audit.tlog_proof import HEADER, TlogProof

    if path.stat().st_size > _MAX_NOTE_FILE:
        raise CommandError(f"{path}: is too large", code="command.usage")
    data = path.read_bytes()
    if data.startswith(b"PK"):
        return read_evidence(data).checkpoint
    if data.startswith(HEADER.encode()):
        return TlogProof.parse(data).checkpoint_note
    return data


def _proof(path: Path | None) -> Sequence[bytes] | None:
    if path is None:
        return None
    try:
        return [base64.b64decode(line, validate=True) for line in path.read_text("ascii").split()]
    except ValueError as error:
        raise CommandError(f"{path}: is not lines of base64", code="audit.malformed_proof") from error


@contextmanager
def _tree(place: str | None, tree_size: int) -> Iterator[NodeSource | None]:
    """Nodes of the larger tree, from a log or a folder of tiles."""
    from audit.ledger import Ledger
    from audit.tiles import TileTree

    if place is None:
        yield None
    elif "://" not in place and (folder := Path(place)).is_dir():
        yield TileTree(lambda name: (folder / name).read_bytes(), tree_size).node
    else:
        with Ledger.open(place) as ledger:
            yield ledger.node
