"""Commands on the log's keys and on whom to believe: `log policy | rotate-key | compromise`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from audit.console import CommandError, ask_api, base_home, emit, guarded

Home = Annotated[
    Path | None, typer.Option("--home", help="Folder of the homes [AFFIDAVIT_HOME, .affidavit].")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Url = Annotated[str | None, typer.Option("--url", help="Ask the server at this address instead.")]
Reason = Annotated[str, typer.Option(help="Why; it goes into the log.")]


def register(log: typer.Typer) -> None:
    """Add these commands to `affidavit log`."""
    log.command("policy")(show_policy)
    log.command("rotate-key")(rotate_key)
    log.command("compromise")(declare_compromised)


@guarded
def rotate_key(
    overlap: Annotated[
        int, typer.Option(min=0, help="For so many more entries both keys sign; then the new one alone.")
    ] = 10_000,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Give the log a new key. Readers add its line to their policy before the old key retires.

    Exit codes: 0 done, 1 refused (the last change is not over) or failed, 2 wrong usage.
    """
    from federation.coordinator import Coordinator

    with Coordinator.open(base_home(home) / "coordinator") as coordinator:
        placed = coordinator.rotate_log_key(overlap)
        coordinator.publish()
        document = {
            "log_key": coordinator.log_key,
            "retire_at": coordinator.signer.ring.retire_at,
            "leaf_index": placed.leaf_index,
        }
    lines = [
        f"new log key  {document['log_key']}",
        f"entry {document['leaf_index']} says so; the old key retires at size {document['retire_at']}",
        f"every policy needs a second line: log {document['log_key']}   (all of it: affidavit log policy)",
    ]
    emit(document, lines, as_json=as_json)


@guarded
def declare_compromised(
    reason: Reason,
    valid_size: Annotated[
        int | None,
        typer.Option(min=0, help="The last size whose checkpoint was ours; default: the one signed last."),
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Say in the log that somebody else may have its key, and sign with a new one from now on.

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage.
    """
    from federation.coordinator import Coordinator

    with Coordinator.open(base_home(home) / "coordinator") as coordinator:
        placed = coordinator.declare_compromised(reason, valid_size=valid_size)
        coordinator.publish()
        document = {"log_key": coordinator.log_key, "leaf_index": placed.leaf_index}
    lines = [
        f"new log key  {document['log_key']}",
        f"entry {document['leaf_index']} ends the old one, whose line leaves every policy at once",
        "the new policy: affidavit log policy",
    ]
    emit(document, lines, as_json=as_json)


@guarded
def show_policy(
    out: Annotated[Path | None, typer.Option(help="Write the file here.")] = None,
    address: Annotated[
        list[str] | None,
        typer.Option("--address", help="SITE=URL where that site serves as a witness; once for each."),
    ] = None,
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Print the policy that the log proposes to its readers: its keys, its sites as witnesses, their quorum.

    Ask again after a key change. It is a proposal: whoever runs the log wrote it, so compare it with what
    the other members hold before you believe it. With addresses it serves as policy.txt in the coordinator's
    home: those witnesses are offered every checkpoint, and asked before another signer takes over.

    Exit codes: 0 done, 1 failed, 2 wrong usage.
    """
    from audit.tlog_policy import Policy

    urls = dict(_address(text) for text in address or [])
    if url:
        text = ask_api(url, "/v1/audit/policy", key="").decode()
        found = Policy.parse(text).with_urls(urls)
    else:
        from audit.ledger import Ledger
        from audit.location import log_location
        from federation.trust import log_policy

        with Ledger.open(log_location(base_home(home) / "coordinator")) as ledger:
            found = log_policy(ledger).with_urls(urls)
    unknown = sorted(set(urls) - {witness.name for witness in found.witnesses})
    if unknown:
        raise CommandError(f"--address names {', '.join(unknown)}: no enrolled site", code="log.no_such_site")
    text = found.format()
    if out is not None:
        out.write_text(text, encoding="utf-8")
    document = {
        "policy": text,
        "logs": [log.verifier.vkey for log in found.logs],
        "witnesses": [witness.name for witness in found.witnesses],
        "quorum": found.quorum,
    }
    emit(document, text.rstrip() if out is None else f"wrote {out}", as_json=as_json)


def _address(text: str) -> tuple[str, str]:
    name, separator, url = text.partition("=")
    if not separator or not url.startswith(("http://", "https://")):
        raise CommandError(f"--address {text!r}: write SITE=https://…", code="command.usage")
    return name, url
