"""Commands for a site's people: `site agent | review | accept | refuse | predict | launcher`, `site bundle
approve | withdraw`, `site log export`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit.console import CommandError, base_home, emit, guarded, table

if TYPE_CHECKING:
    from clients.home import SiteHome
    from clients.reviewing import SiteReview

bundle = typer.Typer(name="bundle", help="Which Flower bundles the relay may run.", no_args_is_help=True)
log = typer.Typer(name="log", help="The site's own log.", no_args_is_help=True)

Home = Annotated[
    Path | None, typer.Option("--home", help="Folder of the homes [AFFIDAVIT_HOME, .affidavit].")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
SiteName = Annotated[str, typer.Option("--site", help="The site; not needed where there is one only.")]
Target = Annotated[str, typer.Argument(help="A run that waits, a charter's digest, or a charter's file.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def register(site: typer.Typer) -> None:
    """Add these commands to `affidavit site`."""
    site.command("agent")(agent)
    site.command("review")(review)
    site.command("accept")(accept)
    site.command("refuse")(refuse)
    site.command("predict")(predict)
    site.command("launcher")(launcher)
    site.add_typer(bundle)
    site.add_typer(log)


@guarded
def agent(
    name: Annotated[str, typer.Argument(help="The site's name; not needed where there is one only.")] = "",
    run_folder: Annotated[
        Path | None,
        typer.Option(
            "--run", help="Where the socket goes, for relays of another user [HOME/sites/NAME/run]."
        ),
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Run a site's agent until stopped: the one process that sees rows, holds keys and spends the budget.

    Start it as the user who owns the site's home; it drops nothing by itself. Prints one line, or one JSON
    document, when it is ready.

    Exit codes: 0 stopped, 1 the home is incomplete or another agent runs, 2 wrong usage.
    """
    import logging
    import threading

    from clients.agent_process import serve, stopped_by_signals

    place = _site(home, name)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")

    def ready(found: dict[str, Any]) -> None:
        emit(found, f"agent of {found['site']} answers on {found['socket']}", as_json=as_json)

    stop = threading.Event()
    with stopped_by_signals(stop):
        serve(place, folder=run_folder, stop=stop, ready=ready)


@guarded
def review(target: Target, name: SiteName = "", home: Home = None, as_json: AsJson = False) -> None:
    """Show a charter or a run: its cost against what is left, its code, purposes and members, your rules.

    Exit codes: 0 done, 1 nothing of that name waits, 2 wrong usage.
    """
    import dataclasses

    from clients.reviewing import find_proposal, review_proposal

    place = _site(home, name)
    found = review_proposal(place, find_proposal(place, target))
    document = dataclasses.asdict(found) | {"problems": [str(problem) for problem in found.problems]}
    emit(document, _shown(found), as_json=as_json)


@guarded
def accept(
    target: Target, name: SiteName = "", yes: Yes = False, home: Home = None, as_json: AsJson = False
) -> None:
    """Say yes for the site. The agent tells the coordinator when it asks again; the lifetime cap stands.

    Exit codes: 0 accepted, 1 nothing of that name waits, or it passes the lifetime cap, 2 wrong usage.
    """
    from clients.reviewing import accept as accept_it
    from clients.reviewing import find_proposal, review_proposal

    place = _site(home, name)
    proposal = find_proposal(place, target)
    if not yes and not as_json:
        typer.echo(_shown(review_proposal(place, proposal)))
        typer.confirm("accept?", abort=True)
    said = accept_it(place, proposal)
    document = {"site": place.name, "id": proposal.id, "charter": said.charter, "decision": said.decision}
    emit(document, f"{place.name} accepts {proposal.id}", as_json=as_json)


@guarded
def refuse(
    target: Target,
    name: SiteName = "",
    reason: Annotated[
        str, typer.Option(help="The code that leaves the site; nothing else does.")
    ] = "refused_by_site",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Say no for the site: to a charter, to a run that waits, or to the further rounds of an open one.

    Exit codes: 0 refused, 1 nothing of that name waits or is open, or no such code, 2 wrong usage.
    """
    from clients.reviewing import DecisionError, find_proposal, withdraw
    from clients.reviewing import refuse as refuse_it

    place = _site(home, name)
    try:
        proposal = find_proposal(place, target)
    except DecisionError:
        said = withdraw(place, target, reason=reason)
    else:
        said = refuse_it(place, proposal, reason=reason)
    document = {
        "site": place.name,
        "run": said.run,
        "charter": said.charter,
        "decision": said.decision,
        "reason": said.reason,
    }
    emit(document, f"{place.name} refuses {said.run or said.charter}: {said.reason}", as_json=as_json)


@guarded
def launcher(
    into: Annotated[Path, typer.Argument(help="Folder that stands first in the SuperNode's PATH.")],
    scratch: Annotated[Path, typer.Option(help="Where bundles are unpacked; the relay user's own.")],
    name: SiteName = "",
    run_folder: Annotated[
        Path | None, typer.Option("--run", help="Folder of the agent's socket [run/ in the home].")
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Write the flwr-clientapp that runs approved bundles alone, confined and without secrets.

    Exit codes: 0 written, 1 no such site, or the folder cannot be written, 2 wrong usage.
    """
    from clients.agent_place import RUN
    from clients.launcher import install_stub

    place = _site(home, name)
    folder = (run_folder or place.path / RUN).absolute()
    stub = install_stub(into, agent=f"unix:{folder}", site=place.name, scratch=scratch)
    emit({"site": place.name, "stub": str(stub)}, f"wrote {stub}", as_json=as_json)


@bundle.command("approve")
@guarded
def approve_bundle(
    digest: Annotated[
        str,
        typer.Argument(help="SHA-256 of the bundle, its file (.fab), or own: what this installation makes."),
    ],
    name: SiteName = "",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Let the relay run this bundle. The agent trusts it with nothing all the same.

    Exit codes: 0 done, 1 no such site or file, 2 wrong usage.
    """
    from clients.reviewing import approve_bundle as approve_it
    from clients.reviewing import bundle_digest

    place, found = _site(home, name), _own_bundle() if digest == "own" else bundle_digest(digest)
    approve_it(place, found)
    emit({"site": place.name, "bundle": found}, f"{place.name} approves bundle {found}", as_json=as_json)


def _own_bundle() -> str:
    from federation.network.bundle import build_bundle
    from federation.network.bundle import bundle_digest as digest_of

    return digest_of(build_bundle())


@bundle.command("withdraw")
@guarded
def withdraw_bundle(
    digest: Annotated[str, typer.Argument(help="SHA-256 of the bundle, or its file (.fab).")],
    name: SiteName = "",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Take an approval back, from the next message on.

    Exit codes: 0 done, 1 no such site or file, 2 wrong usage.
    """
    from clients.reviewing import bundle_digest
    from clients.reviewing import withdraw_bundle as withdraw_it

    place, found = _site(home, name), bundle_digest(digest)
    withdraw_it(place, found)
    emit({"site": place.name, "bundle": found}, f"{place.name} withdraws bundle {found}", as_json=as_json)


@log.command("export")
@guarded
def export_log(
    out: Annotated[Path, typer.Argument(help="Where to write the copy.")],
    name: SiteName = "",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Copy the site's own log into one file, signed as it stands, to compare with the federation's.

    `affidavit verify LOG --policy POLICY --site COPY` compares the two. The copy holds codes, digests and
    budgets; no row and no update.

    Exit codes: 0 written, 1 the file exists or the log is damaged, 2 wrong usage.
    """
    from clients.site_log import SiteLog

    place = _site(home, name)
    opened = SiteLog.open(place.path, place.name)
    try:
        size = opened.export(out)
        key = opened.log_key
    finally:
        opened.close()
    document = {"site": place.name, "file": str(out), "entries": size, "log_key": key}
    emit(document, f"wrote {out}: {size} entries of {place.name}", as_json=as_json)


def _site(home: Path | None, name: str) -> SiteHome:
    from clients.home import SiteHome

    folder = base_home(home) / "sites"
    if not name:
        names = sorted(path.parent.name for path in folder.glob("*/site.yaml"))
        if len(names) != 1:
            raise CommandError(
                f"{folder}: holds {len(names)} sites; name one of {', '.join(names) or 'none'}",
                code="site.which",
            )
        name = names[0]
    return SiteHome.open(folder / name)


@guarded
def predict(
    rows: Annotated[Path, typer.Argument(help="A CSV file with a header; it stays where it is.")],
    run: Annotated[str, typer.Option("--run", help="The run that made the version.")],
    version: Annotated[Path, typer.Option("--version", help="The version's file, by its digest.")],
    name: SiteName = "",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Answer rows here, with what stays at this site: its local layers and its own intercept.

    Local: nothing is sent or entered, and there is no receipt. A server answers without what stays here.

    Exit codes: 0 answered, 1 the run, the file, the layers or a row do not fit, 2 wrong usage.
    """
    import dataclasses

    from clients.local_prediction import predict_here

    for path in (rows, version):
        if not path.is_file():
            raise CommandError(f"{path}: is no file", code="site.no_file")
    found = predict_here(_site(home, name), run, version.read_bytes(), rows.read_bytes())
    own = " and ".join(found.own) or "nothing of this site's own: the version itself"
    lines = [f"version {found.version[:16]}… with {own}; local, without a receipt"]
    lines += ["  ".join(f"{key} {value}" for key, value in answer.items()) for answer in found.answers]
    emit(dataclasses.asdict(found), "\n".join(lines), as_json=as_json)


def _shown(found: SiteReview) -> str:
    from audit.epsilon import epsilon_text
    from clients.reviewing import row_of_site_text

    before, after = epsilon_text(found.lifetime_before), epsilon_text(found.lifetime_after)
    left = f"{before} now, {after} afterwards, cap {found.lifetime_cap}"
    year = f"{epsilon_text(found.year_after)} afterwards" + (
        f", limit {found.year_limit}" if found.year_limit else ""
    )
    rows: list[list[object]] = [
        ["charter", f"{found.name}  {found.charter}"],
        ["run", f"{found.run} for model {found.model}" if found.run else "any under this charter"],
        ["author", found.author or "-"],
        ["coordinator's code", found.code or "-"],
        ["this agent's code", found.agent_code],
        ["bundles", ", ".join(found.bundles) or "none approved"],
        ["purposes", ", ".join(found.purposes)],
        ["members", ", ".join(found.members)],
        [
            "promise",
            f"epsilon {found.promised_epsilon} at delta {found.promised_delta}, {found.rounds} rounds",
        ],
        ["unit", f"one {found.unit}, {found.relation.replace('_', '/')}"],
        ["this run", f"epsilon {epsilon_text(found.run_epsilon)} at delta {found.delta}"],
        ["lifetime", left],
        ["whole site", found.whole_site or "no cap"],
        ["last 365 days", year],
        ["fits", "yes" if found.fits else "NO: no decision passes the lifetime cap"],
        ["rules", "; ".join(found.broken_rules) or "all met"],
        ["use of answers", "\n".join(found.use)],
        ["asks you about", ", ".join(found.asked_by) or "nothing"],
        ["decision", found.decision or "none yet"],
    ]
    if found.counts_on:
        rows.insert(11, ["counts on", found.counts_on])
    if found.row_epsilon is not None:
        rows.insert(11, ["a row", row_of_site_text(found.row_epsilon)])
    rows += [["data file", str(problem)] for problem in found.problems[:20]]
    return table("", ("", ""), rows)
