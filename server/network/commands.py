"""Commands of the operator: `coordinator init | up | status`, `site invite | approve | revoke | list`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit.console import CommandError, base_home, emit, guarded, table

if TYPE_CHECKING:
    from federation.network.membership import Membership
    from federation.network.roster import Member
    from federation.network.supervisor import PartEvent

coordinator = typer.Typer(name="coordinator", help="The federation's meeting point.", no_args_is_help=True)

Home = Annotated[
    Path | None, typer.Option("--home", help="Folder of the homes [AFFIDAVIT_HOME, .affidavit].")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
SiteName = Annotated[str, typer.Argument(help="The site's name, as `affidavit site list` shows it.")]


def register(application: typer.Typer) -> None:
    """Add these commands to the front door; `site` is the group that `clients` made."""
    application.add_typer(coordinator)
    for group in application.registered_groups:
        if group.typer_instance is not None and group.typer_instance.info.name == "site":
            group.typer_instance.command("invite")(invite)
            group.typer_instance.command("approve")(approve)
            group.typer_instance.command("revoke")(revoke)
            group.typer_instance.command("list")(list_sites)


@coordinator.command("init")
@guarded
def init(
    origin: Annotated[str, typer.Argument(help="The log's name for life, such as log.example.org/oncology.")],
    host: Annotated[str, typer.Option(help="Name or address under which the sites reach this machine.")],
    port: Annotated[
        int, typer.Option(min=1, max=65_535, help="The gateway's port: the only one to open.")
    ] = 8443,
    bind: Annotated[str, typer.Option(help="Address that the gateway listens on.")] = "0.0.0.0",  # noqa: S104
    superlink_port: Annotated[int, typer.Option(min=1, max=65_535, help="SuperLink's, on loopback.")] = 18443,
    api_port: Annotated[int, typer.Option(min=1, max=65_535, help="The API's, on loopback.")] = 8000,
    cert: Annotated[Path | None, typer.Option(help="Your own certificate chain (PEM).")] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    ca: Annotated[Path | None, typer.Option(help="The CA that signed it (PEM); sites pin it.")] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make a coordinator: log and signer (unless `affidavit init` did), CA, certificates, settings.

    Exit codes: 0 done, 1 it exists already or a certificate does not fit, 2 wrong usage.
    """
    from federation.coordinator import Coordinator
    from federation.network.pki import LOOPBACK, Pki
    from federation.network.settings import NetworkHome, NetworkSettings

    base = base_home(home)
    own = (cert, key, ca)
    if any(own) and not all(own):
        raise CommandError("give --cert, --key and --ca together, or none of them", code="command.usage")
    settings = NetworkSettings(
        public_host=host, bind=bind, port=port, superlink_port=superlink_port, api_port=api_port
    )
    if not (base / "coordinator" / "config.yaml").exists():
        Coordinator.create(base / "coordinator", base / "signer", origin).close()
    with Coordinator.open(base / "coordinator") as opened:
        if opened.origin != origin:
            raise CommandError(f"the log here is {opened.origin}, not {origin}", code="network.error")
        log_key = opened.log_key
    network = NetworkHome.create(base / "coordinator", settings)
    folder = network.pki.folder
    if cert is not None and key is not None and ca is not None:
        pki = Pki.adopt(folder, cert=cert, key=key, ca=ca, name=origin)
    else:
        pki = Pki.create(folder, tuple(dict.fromkeys((host, *LOOPBACK))), name=origin)
    document = {
        "origin": origin,
        "log_key": log_key,
        "address": settings.address,
        "ca_fingerprint": pki.ca_fingerprint(),
        "home": str(base / "coordinator"),
    }
    lines = [
        f"log          {origin}",
        f"log key      {log_key}",
        f"gateway      {settings.address}   (open this port, and no other)",
        f"CA           SHA-256 {document['ca_fingerprint']}",
        "next         affidavit coordinator up, then affidavit site invite NAME",
    ]
    emit(document, lines, as_json=as_json)


@coordinator.command("up")
@guarded
def up(home: Home = None, as_json: AsJson = False) -> None:
    """Start SuperLink, SuperExec, the API and the gateway, and keep them up until stopped.

    Logs are in the home's network/logs. With --json each line of standard output is one event; the line
    {"kind": "ready", "name": "gateway", …} says that sites can come.

    Exit codes: 0 stopped, 1 it could not start, 2 wrong usage.
    """
    from dataclasses import asdict

    from server.network.starting import carry_out

    def show(event: PartEvent) -> None:
        typer.echo(json.dumps(asdict(event)) if as_json else _event_line(event))
        sys.stdout.flush()

    def warn(text: str) -> None:
        typer.echo(f"warning: {text}", err=True)

    carry_out(base_home(home), show, warn)


@coordinator.command("status")
@guarded
def status(home: Home = None, as_json: AsJson = False) -> None:
    """Show the gateway's address, the days that certificates have left, and who belongs.

    Exit codes: 0 done, 1 no coordinator here, 2 wrong usage.
    """
    from federation.network.settings import NetworkHome
    from server.network.starting import certificate_rows

    base = base_home(home)
    address = NetworkHome.open(base / "coordinator").settings().address
    certificates = certificate_rows(base)
    with _membership(base) as membership:
        sites = [_shown(member) for member in membership.roster.refresh()]
    lines = [f"gateway  {address}"]
    lines += [
        f"{row['name']:<8} {row['days_left']} days left, until {row['ends']}{_urgent(row)}"
        for row in certificates
    ]
    lines += [f"site     {item['site']}  {item['state']}{_urgent(item)}" for item in sites]
    emit({"address": address, "certificates": certificates, "sites": sites}, lines, as_json=as_json)


@guarded
def invite(
    label: Annotated[str, typer.Argument(help='What people call the site, such as "St Mary".')],
    name: Annotated[str, typer.Option(help="Its name in charters and log; else made from the label.")] = "",
    valid_hours: Annotated[int, typer.Option(help="For so long the invitation can be used.")] = 72,
    auto_approve: Annotated[
        bool, typer.Option("--auto-approve", help="Whoever shows this line is let in; nobody looks.")
    ] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Print an invitation: one line that lets one site ask to join, once. Send it like a password.

    Exit codes: 0 done, 1 the site belongs already, 2 wrong usage.
    """
    from federation.network.membership import InviteRequest
    from federation.network.settings import NetworkHome

    base = base_home(home)
    network = NetworkHome.open(base / "coordinator")
    with _membership(base) as membership:
        made = membership.invite(
            InviteRequest(label=label, name=name, valid_hours=valid_hours, auto_approve=auto_approve),
            address=network.settings().address,
            ca=network.pki.ca_fingerprint(),
            log_key=_log_key(base),
        )
    document = {"site": made.site, "invitation": made.format(), "expires": made.expires}
    emit(document, made.format(), as_json=as_json)
    if not as_json:
        typer.echo(f"for {made.site}, until {made.expires}; at the site: affidavit site join …", err=True)


@guarded
def approve(name: SiteName, home: Home = None, as_json: AsJson = False) -> None:
    """Let a site in whose request is waiting. Compare its identity key with the site by telephone first.

    Exit codes: 0 done, 1 nothing waits, 2 wrong usage.
    """
    with _membership(base_home(home)) as membership:
        member = membership.approve(name)
    emit(_shown(member), f"{name} belongs now; identity {member.identity_key}", as_json=as_json)


@guarded
def revoke(
    name: SiteName,
    reason: Annotated[str, typer.Option(help="Why; it goes into the log.")] = "",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Shut a site out, within half a second: its invitation, its request, its node key.

    Exit codes: 0 done, 1 there is nothing to revoke, 2 wrong usage.
    """
    with _membership(base_home(home)) as membership:
        gone = membership.revoke(name, reason)
    emit({"sites": [_shown(member) for member in gone]}, f"{name} is shut out", as_json=as_json)


@guarded
def list_sites(home: Home = None, as_json: AsJson = False) -> None:
    """List invitations, requests and members, from the log.

    Exit codes: 0 done, 1 no coordinator here, 2 wrong usage.
    """
    with _membership(base_home(home)) as membership:
        sites = [_shown(member) for member in membership.roster.refresh()]
    columns = ("site", "label", "state", "identity_key", "node_expires", "reason")
    rows = [[item[column] for column in columns] for item in sites]
    emit({"sites": sites}, table("", columns, rows) if rows else "nobody was invited yet", as_json=as_json)


def _shown(member: Member) -> dict[str, str]:
    from federation.network.membership import utc_now

    return {
        "site": member.site,
        "label": member.label,
        "state": member.standing(utc_now()),
        "identity_key": member.identity_key,
        "invited_until": member.invited_until,
        "node_expires": member.node_expires,
        "reason": member.reason,
        "urgency": _urgency_of(member),
    }


def _urgency_of(member: Member) -> str:
    from federation.network.membership import utc_now

    return member.urgency(utc_now())


def _urgent(row: Mapping[str, Any]) -> str:
    return {"urgent": "  URGENT: ends within 7 days", "soon": "  ends within 30 days"}.get(row["urgency"], "")


@contextmanager
def _membership(base: Path) -> Iterator[Membership]:
    from audit.ledger import Ledger
    from audit.location import log_location
    from federation.network.membership import Membership
    from federation.network.settings import NetworkHome

    folder = base / "coordinator"
    network = NetworkHome.open(folder)
    with Ledger.open(log_location(folder)) as ledger:
        yield Membership(ledger, network.folder)


def _log_key(base: Path) -> str:
    from federation.coordinator import Coordinator

    with Coordinator.open(base / "coordinator") as opened:
        return opened.log_key


def _event_line(event: PartEvent) -> str:
    more = f" with status {event.status}, again in {event.wait_s:g} s" if event.kind == "exited" else ""
    return f"{event.name:<10} {event.kind}{more}"
