"""Commands of a site's engineer: `site join | up | down | standing | leave | rotate-keys`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from audit.console import CommandError, base_home, emit, guarded

if TYPE_CHECKING:
    from clients.home import SiteHome
    from clients.network.joining import Joined
    from federation.network.invitation import Invitation
    from federation.network.supervisor import PartEvent

Home = Annotated[
    Path | None, typer.Option("--home", help="Folder of the homes [AFFIDAVIT_HOME, .affidavit].")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Name = Annotated[str, typer.Argument(help="The site's name: lower-case letters, digits, hyphens.")]


def register(site: typer.Typer) -> None:
    """Add these commands to the group `site`."""
    site.command("join")(join)
    site.command("up")(up)
    site.command("down")(down)
    site.command("standing")(standing)
    site.command("leave")(leave)
    site.command("rotate-keys")(rotate_keys)


@guarded
def join(
    invitation: Annotated[
        str, typer.Argument(help="The line that the operator sent; - reads it from stdin.")
    ],
    data: Annotated[Path | None, typer.Option(help="The data file (CSV or Parquet). It stays here.")] = None,
    population: Annotated[
        str | None, typer.Option(help="Who the people behind the data are; new files keep counting.")
    ] = None,
    lifetime_epsilon: Annotated[
        str | None, typer.Option(help="All that this population may ever spend.")
    ] = None,
    lifetime_delta: Annotated[str, typer.Option(help="Fixed for life.")] = "0.00001",
    node_hours: Annotated[
        int, typer.Option(min=1, max=8760, help="How long a node key lasts; `site up` renews it in time.")
    ] = 8760,
    wait_s: Annotated[
        float, typer.Option(min=0, help="For so long wait for the operator's approval.")
    ] = 86_400,
    start: Annotated[bool, typer.Option(help="Then stay in the foreground as `site up` does.")] = True,
    systemd: Annotated[
        Path | None, typer.Option(help="Write a systemd unit into this folder instead of starting.")
    ] = None,
    user: Annotated[str, typer.Option(help="With --systemd: the user that the site runs as.")] = "affidavit",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Join a federation: make the site's keys here, pin the coordinator, ask, wait for approval, start.

    Nothing but public keys is sent. The same command again goes on where it stopped.

    Exit codes: 0 joined (and stopped), 1 refused, or the coordinator is not who the invitation says, 2 wrong
    usage.
    """
    from clients.network.joining import join as ask
    from clients.network.joining import wait_for_approval
    from federation.network.invitation import Invitation

    base = base_home(home)
    line = sys.stdin.readline() if invitation == "-" else invitation
    read = Invitation.parse(line)
    place = _home_for(base, read, data, population, lifetime_epsilon, lifetime_delta)
    joined = ask(place, read, node_lifetime_s=node_hours * 3600.0)
    if joined.state == "requested" and not as_json:
        typer.echo(f"asked to join as {joined.site}; identity {joined.identity}")
        typer.echo("waiting for the operator, who should compare this key with you by telephone")
    joined = wait_for_approval(place, timeout_s=wait_s)
    emit(_shown(joined), f"{joined.site} belongs; home {joined.home}", as_json=as_json)
    if systemd is not None:
        from clients.network.systemd import write_unit

        path = write_unit(systemd, joined.site, base, user)
        typer.echo(f"wrote {path}; systemctl enable --now {path.stem}", err=True)
    elif start:
        sys.stdout.flush()
        rest = ["--json"] if as_json else []
        # a fresh process: this one has read the data and holds what that took
        os.execv(  # noqa: S606 - our own interpreter
            sys.executable,
            [sys.executable, "-P", "-m", "affidavit", "site", "up", joined.site, "--home", str(base), *rest],
        )


@guarded
def up(name: Name, home: Home = None, as_json: AsJson = False) -> None:
    """Start the agent, the SuperNode and the witness's watch, and keep them up until stopped.

    The agent starts once a charter was signed (`affidavit charter sign`). Logs are in the site's home.

    Exit codes: 0 stopped, 1 the site is up already or belongs nowhere, 2 wrong usage.
    """
    base = base_home(home)
    _stay_up(_open(base, name), base, as_json=as_json)


@guarded
def down(name: Name, home: Home = None, as_json: AsJson = False) -> None:
    """Stop what `site up` keeps up.

    Exit codes: 0 stopped, or it was not up, 1 it does not stop, 2 wrong usage.
    """
    from clients.network.starting import stop

    stopped = stop(_open(base_home(home), name))
    emit(
        {"site": name, "stopped": stopped},
        f"{name} {'stopped' if stopped else 'was not up'}",
        as_json=as_json,
    )


@guarded
def standing(name: Name, home: Home = None, as_json: AsJson = False) -> None:
    """Ask the coordinator where this site's request or membership stands.

    Exit codes: 0 requested or approved, 1 revoked, or nobody answers, 2 wrong usage.
    """
    from clients.network.joining import standing as ask
    from clients.network.joining import utc_now
    from clients.network.membership import network_folder
    from federation.network.invitation import parse_time
    from federation.network.pki import urgency_of

    place = _open(base_home(home), name)
    found = ask(place)
    expires = network_folder(place.path).read().node_expires
    urgency = urgency_of(parse_time(expires) - utc_now())
    document = {**_shown(found), "node_expires": expires, "urgency": urgency}
    warning = {
        "urgent": "\nURGENT: it ends within 7 days and was not renewed; is `site up` running?",
        "soon": "\nit ends within 30 days; `site up` renews it",
    }.get(urgency, "")
    emit(document, f"{name} is {found.state}; its node key ends {expires}{warning}", as_json=as_json)


@guarded
def leave(name: Name, home: Home = None, as_json: AsJson = False) -> None:
    """Leave the federation, by the site's own signature. The home stays: what was spent stays spent.

    Exit codes: 0 left, 1 it belongs nowhere, or nobody answers, 2 wrong usage.
    """
    from clients.network.joining import leave as say
    from clients.network.starting import stop

    place = _open(base_home(home), name)
    say(place)
    stop(place)
    emit({"site": name, "state": "left"}, f"{name} has left", as_json=as_json)


@guarded
def rotate_keys(
    name: Name,
    keys: Annotated[
        str, typer.Option(help="node, signing (for statements and key agreement), or all.")
    ] = "node",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Exchange keys for new ones, signed by the site's identity key.

    The node key opens the network; `site up` exchanges it by itself in the last thirty days of the old one.
    Statements that the old signing key made stay valid where they stand in the log. The identity key and the
    witness key stay: charters and other people's policies name them.

    Exit codes: 0 exchanged, 1 it belongs nowhere, is in a run, or nobody answers, 2 wrong usage.
    """
    from clients.network.joining import rotate_keys as exchange
    from clients.network.joining import rotate_signing_keys
    from clients.network.membership import network_folder
    from clients.network.starting import agent_of

    if keys not in ("node", "signing", "all"):
        raise CommandError(f"--keys is node, signing or all, not {keys!r}", code="command.usage")
    place = _open(base_home(home), name)
    document, lines = {"site": name}, []
    if keys in ("signing", "all"):
        before = agent_of(place)
        enrolled = rotate_signing_keys(place, is_up=lambda: before is not None and agent_of(place) == before)
        document |= {"statement_key": enrolled.statement_key, "agreement_key": enrolled.agreement_key}
        lines.append(f"{name} signs statements with {enrolled.statement_key} from here on")
    if keys in ("node", "all"):
        document |= {"node_key": exchange(place)}
        document |= {"node_expires": network_folder(place.path).read().node_expires}
        lines.append(
            f"{name} has a new node key until {document['node_expires']}; `site up` takes it by itself"
        )
    emit(document, lines, as_json=as_json)


def _stay_up(place: SiteHome, base: Path, *, as_json: bool) -> None:
    from dataclasses import asdict

    from clients.network.starting import carry_out

    def show(event: PartEvent) -> None:
        if as_json:
            typer.echo(json.dumps(asdict(event)))
        elif event.kind == "waiting":
            typer.echo(f"{event.name:<10} waits until a charter is signed: affidavit charter sign")
        else:
            more = (
                f" with status {event.status}, again in {event.wait_s:g} s" if event.kind == "exited" else ""
            )
            typer.echo(f"{event.name:<10} {event.kind}{more}")
        sys.stdout.flush()

    carry_out(place, base, show, lambda text: typer.echo(f"warning: {text}", err=True))


def _home_for(
    base: Path,
    invitation: Invitation,
    data: Path | None,
    population: str | None,
    epsilon: str | None,
    delta: str,
) -> SiteHome:
    from clients.home import SiteHome
    from clients.service import AddSiteRequest, add_site

    path = base / "sites" / invitation.site
    if (path / "site.yaml").exists():
        return SiteHome.open(path)
    if data is None:
        raise CommandError("give --data, the file that stays here", code="command.usage")
    if population is None and sys.stdin.isatty():
        population = typer.prompt("who are the people behind the data (such as: adult patients since 2015)")
    if epsilon is None and sys.stdin.isatty():
        epsilon = typer.prompt("the epsilon that these people may ever spend, over all runs (such as 10)")
    if population is None or epsilon is None:
        raise CommandError(
            "give --population and --lifetime-epsilon: both are this site's decision and have no default",
            code="command.usage",
        )
    return add_site(
        AddSiteRequest(
            home=path,
            name=invitation.site,
            data=data,
            population=population,
            lifetime_epsilon=epsilon,
            lifetime_delta=delta,
        )
    )


def _open(base: Path, name: str) -> SiteHome:
    from clients.home import SiteHome

    return SiteHome.open(base / "sites" / name)


def _shown(joined: Joined) -> dict[str, str]:
    return {
        "site": joined.site,
        "state": joined.state,
        "identity": joined.identity,
        "home": str(joined.home),
    }
