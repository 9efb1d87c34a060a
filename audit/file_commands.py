"""Commands that make files of a log: `log export` (tlog-tiles), `log prove-fork` (proof of misbehaviour)."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer

from audit.console import CommandError, base_home, emit, guarded
from audit.merkle import NodeSource

Home = Annotated[
    Path | None, typer.Option("--home", help="Folder of the homes [AFFIDAVIT_HOME, .affidavit].")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

_MAX_NOTE_FILE: Final = 64 << 20


def register(log: typer.Typer) -> None:
    """Add these commands to `affidavit log`."""
    log.command("export")(export)
    log.command("prove-fork")(prove_fork)


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

    Entry bundles hold every entry: put them where only readers of the log can reach them.

    Exit codes: 0 done, 1 refused (the target holds another log or history) or failed, 2 wrong usage.
    """
    from audit.ledger import Ledger
    from audit.location import log_location
    from audit.tiles_export import export_tiles

    with Ledger.open(log_location(base_home(home) / "coordinator")) as ledger:
        note = ledger.latest_checkpoint()
        if note is None:
            raise CommandError("no checkpoint yet; start the server once", code="evidence.no_checkpoint")
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
def prove_fork(
    first: Annotated[Path, typer.Argument(help="A checkpoint, a .tlog-proof, or an evidence file.")],
    second: Annotated[Path, typer.Argument(help="Another one of the same log, of any size.")],
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
    as_json: AsJson = False,
) -> None:
    """Write a file that convicts a log of having signed two histories; `affidavit verify` judges it.

    Two checkpoints of one size need nothing else. Otherwise the larger tree must say what its first entries
    are: give its --log, or a --proof. Signatures are judged by `verify`, against a policy.

    Exit codes: 0 written, 1 the checkpoints are consistent, or nothing shows that they are not, 2 wrong
    usage.
    """
    from audit.checkpoints import parse_checkpoint_note
    from audit.misbehaviour import prove_fork as prove

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
    emit(
        document,
        f"wrote {out}: {found.kind}, {told}\ncheck it: affidavit verify {out} --policy POLICY",
        as_json=as_json,
    )


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
