"""Commands for sites and data scientists: `demo`, `train`, `identity new`, `site add | status | follow |
witness | serve-witness`, `charter sign`; those of a site's agent and people are in `clients.site_commands`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit.console import CommandError, base_home, emit, guarded, table

if TYPE_CHECKING:
    from clients.home import SiteHome
    from clients.identity import Identity

identity = typer.Typer(name="identity", help="A person's own key.", no_args_is_help=True)
site = typer.Typer(name="site", help="A site: one data holder.", no_args_is_help=True)

Home = Annotated[
    Path | None, typer.Option("--home", help="Folder of the homes [AFFIDAVIT_HOME, .affidavit].")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Name = Annotated[str, typer.Argument(help="The site's name: lower-case letters, digits, hyphens.")]


def register(application: typer.Typer) -> None:
    """Add these commands to the front door."""
    from clients.network.commands import register as register_network

    register_network(site)
    application.command("demo")(demo)
    application.command("train")(train)
    from clients import resume_commands, site_commands

    site_commands.register(site)
    resume_commands.register(application)
    application.add_typer(identity)
    application.add_typer(site)
    for group in application.registered_groups:
        if group.typer_instance is not None and group.typer_instance.info.name == "charter":
            group.typer_instance.command("sign")(sign_charter)


@guarded
def demo(
    folder: Annotated[
        Path, typer.Option(help="Where to put everything; replaced when it is the demo's.")
    ] = Path("affidavit-demo"),
    engine: Annotated[str, typer.Option(help="inprocess, or ray (an extra).")] = "inprocess",
    network: Annotated[
        bool, typer.Option("--network", help="Over real network connections, each hospital a machine.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Four hospitals train a model with privacy, an officer approves it, the API answers, a stranger
    verifies.

    Everything is real and stays in one folder. About a minute on two cores.

    Exit codes: 0 every link held, 1 one did not (its code is named), 2 wrong usage.
    """
    import dataclasses

    from clients.demo_screen import Screen

    _quiet()
    outcome: Any
    if network:
        from clients.demo_network import run_network_demo

        outcome = run_network_demo(folder, Screen(quiet=as_json))
        if not as_json:
            typer.echo(f"{outcome.verdict} in {outcome.seconds:.0f} s; everything is in {folder}")
    else:
        from clients.demo import run_demo

        outcome = run_demo(folder, Screen(quiet=as_json), engine=_engine(engine))
    if as_json:
        emit(dataclasses.asdict(outcome), "", as_json=True)


@guarded
def train(
    charter: Annotated[Path, typer.Option(help="The charter.")],
    sites: Annotated[
        list[str],
        typer.Option("--site", help="NAME=FILE, once for each site of the charter (CSV or Parquet)."),
    ],
    author: Annotated[Path, typer.Option(help="Home of the identity that signs the run (`identity new`).")],
    public_set: Annotated[
        Path | None, typer.Option(help="The public set's file; without it no gate can pass.")
    ] = None,
    agree: Annotated[
        bool, typer.Option("--agree", help="Agree to the charter for every site here; all are yours.")
    ] = False,
    engine: Annotated[str, typer.Option(help="inprocess, or ray (an extra).")] = "inprocess",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Train on your own files: every site's agent runs on this machine, each with its own home and budget.

    The coordinator's home and the sites' homes must exist (`init`, `site add`). Registers the version;
    approve it with `affidavit models approve`.

    Exit codes: 0 trained and registered, 1 refused or failed
    (the log says why), 2 wrong usage.
    """
    from audit.principal import LocalOwner, Principal
    from clients.demo_screen import Screen
    from clients.service import approve_charter
    from clients.simulation import run_federation
    from federation.charter import Charter
    from federation.coordinator import Coordinator
    from federation.service import RegisterRequest
    from federation.service import register as register_version

    _quiet()
    base, loaded, person = base_home(home), Charter.load(charter), _identity(author)
    files = _named_files(sites)
    if sorted(files) != sorted(loaded.site_names):
        raise CommandError(
            f"--site names {sorted(files)}, the charter names {sorted(loaded.site_names)}", code="train.sites"
        )
    homes = {name: _site_home(base, name, path) for name, path in files.items()}
    for name, place in homes.items():
        rules = place.config.rules
        if agree:
            homes[name] = approve_charter(place, loaded.canonical().decode())
        elif not rules.auto_approve and loaded.digest not in rules.approved_charters:
            raise CommandError(
                f"site {name} has not agreed; run `affidavit charter sign {charter} --site {name}`, or add "
                "--agree when all these sites are yours",
                code="train.not_agreed",
            )
    screen = Screen(quiet=as_json)
    with Coordinator.open(base / "coordinator") as coordinator:
        with screen.training(loaded.plan.rounds):
            run = run_federation(
                loaded, homes, coordinator, person.key,
                public_set=public_set, engine=_engine(engine), on_event=screen.event,
            )  # fmt: skip
        scientist = Principal(id=person.key.verify_key.fingerprint, role="scientist", key=person.public)
        version = register_version(coordinator, scientist, LocalOwner(), RegisterRequest(run=run.run))
        screen.gates(version.registered)
    document = {
        "run": run.run,
        "model": run.model,
        "version": version.digest,
        "gates_passed": version.gates_passed,
        "epsilon": max((item.run_epsilon for item in version.registered.costs), key=float, default=None),
    }
    shown = f"run {run.run}\nversion {version.digest} of {run.model} is registered as a candidate"
    emit(document, shown, as_json=as_json)


@identity.command("new")
@guarded
def new_identity(
    name: Annotated[str, typer.Argument(help="A name for the home, such as your own.")],
    role: Annotated[
        str, typer.Option(help="officer or scientist: only the folder it goes into.")
    ] = "officer",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make your own key. A passphrase is taken from AFFIDAVIT_PASSPHRASE; with none the file alone protects
    it.

    Exit codes: 0 done, 1 there is one already, 2 wrong usage.
    """
    import os

    from clients.home import SITE_NAME
    from clients.identity import Identity

    if role not in ("officer", "scientist"):
        raise CommandError(f"role {role!r}: choose officer or scientist", code="identity.role")
    if not SITE_NAME.fullmatch(name):
        raise CommandError(f"name {name!r}: lower-case letters, digits, hyphens", code="identity.name")
    passphrase = os.environ.get("AFFIDAVIT_PASSPHRASE")
    made = Identity.create(base_home(home) / f"{role}s" / name, passphrase.encode() if passphrase else None)
    document = {"name": name, "role": role, "key": made.public, "home": str(made.home)}
    emit(document, f"key   {made.public}   (this goes into the charter)\nhome  {made.home}", as_json=as_json)


@site.command("add")
@guarded
def add(
    name: Name,
    data: Annotated[Path, typer.Option(help="The data file (CSV or Parquet). It never leaves this machine.")],
    population: Annotated[
        str, typer.Option(help="Who the people behind the data are; new files keep counting.")
    ],
    lifetime_epsilon: Annotated[str, typer.Option(help="All that this population may ever spend.")],
    lifetime_delta: Annotated[
        str, typer.Option(help="Fixed for life; below one in the number of people.")
    ] = "0.00001",
    operator: Annotated[
        str,
        typer.Option(help="Who runs this site's machines, if they run other sites too: those count once."),
    ] = "",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make a site's home: keys, a population with a random pseudonym, and its lifetime budget.

    Exit codes: 0 done, 1 the home exists or the file cannot be read, 2 wrong usage.
    """
    from clients.service import AddSiteRequest, add_site

    made = add_site(
        AddSiteRequest(
            home=base_home(home) / "sites" / name,
            name=name,
            data=data,
            population=population,
            lifetime_epsilon=lifetime_epsilon,
            lifetime_delta=lifetime_delta,
            operator=operator,
        )
    )
    key = made.keys().identity.text
    document = {"name": name, "identity": key, "home": str(made.path)}
    emit(
        document,
        f"site      {name}\nidentity  {key}   (this goes into the charter)\nhome      {made.path}",
        as_json=as_json,
    )


@site.command("status")
@guarded
def site_status(name: Name, home: Home = None, as_json: AsJson = False) -> None:
    """Show what a site has spent for life, what it agreed to, what waits for you, and how its agent is.

    Exit codes: 0 done, 1 no such site, or its ledger was put back, 2 wrong usage.
    """
    import dataclasses

    from audit.epsilon import epsilon_text
    from clients.agent_place import running
    from clients.service import status

    place = _open_site(base_home(home), name)
    found, agent = status(place), running(place)
    rows = [
        ("site", f"{found.name}, machines run by {found.operator}" if found.operator else found.name),
        ("people", f"{found.population} (in the log: {found.pseudonym})"),
        ("data", found.data),
        ("budget for life", f"epsilon {found.cap_epsilon} at delta {found.cap_delta}"),
        ("spent", f"epsilon {epsilon_text(found.lifetime_epsilon)} in {found.releases} releases"),
        ("spent or reserved", f"epsilon {epsilon_text(found.committed_epsilon)}"),
        ("whole site", _whole(found.whole_site_epsilon, found.whole_site_cap)),
        ("not delivered", found.undelivered or "none"),
        ("open runs", "\n".join(found.open_runs) or "none"),
        ("agreed charters", "\n".join(found.approved_charters) or "none"),
        ("cosigned the log", _followed(found.witnessed_size, name)),
        ("waits for you", "\n".join(found.waiting) or "nothing"),
        ("agent", "not running" if agent is None else f"since {agent['since']}, on {agent['socket']}"),
    ]
    emit(dataclasses.asdict(found) | {"agent": agent}, table("", ("", ""), rows), as_json=as_json)


def _whole(epsilon: float | None, cap: str) -> str:
    from audit.epsilon import epsilon_text

    spent = "not bounded" if epsilon is None else f"epsilon {epsilon_text(epsilon)} for all rows together"
    return f"{spent}, cap {cap or 'none'}"


@site.command("follow")
@guarded
def follow(
    name: Name,
    policy: Annotated[
        Path, typer.Option(help="The policy file, compared with the other members (`affidavit log policy`).")
    ],
    new_key: Annotated[
        bool, typer.Option("--new-key", help="The log has a wholly new key, and you compared it.")
    ] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Follow a log as its witness, under this policy; again, when the log has changed its key.

    Exit codes: 0 done, 1 it is another log or shares no key with the policy believed so far, 2 wrong usage.
    """
    from audit.tlog_policy import Policy

    place = _open_site(base_home(home), name)
    place.join(Policy.parse(policy.read_text(encoding="utf-8")), new_key=new_key)
    witness = place.witness()
    document = {"site": name, "origin": witness.log.name, "keys": [key.vkey for key in witness.log_keys]}
    emit(document, f"{name} follows {witness.log.name} ({len(witness.log_keys)} keys)", as_json=as_json)


@site.command("witness")
@guarded
def witness(
    name: Name,
    url: Annotated[str, typer.Option("--url", help="The coordinator's API.")],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Check that the log only grew since this site last looked, and cosign it.

    Exit codes: 0 cosigned, 1 the log was rewritten or does not answer: keep everything and tell the
    members, 2 wrong usage.
    """
    from clients.service import witness_once

    size = witness_once(_open_site(base_home(home), name), url)
    emit({"site": name, "tree_size": size}, f"{name} cosigned the log of {size} entries", as_json=as_json)


@site.command("serve-witness")
@guarded
def serve_witness(
    name: Name,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on.")] = 8010,
    prefix: Annotated[str, typer.Option(help="Path before add-checkpoint, such as /witness.")] = "",
    home: Home = None,
) -> None:
    """Answer the log's `add-checkpoint` requests (C2SP tlog-witness) until stopped.

    Needs this site's witness key and state only. What convicts the log goes into the site's home, folder
    misbehaviour.

    Exit codes: 0 stopped, 1 no such site, or it follows no log yet, 2 wrong usage.
    """
    from clients.witness_server import WitnessServer, serve

    place = _open_site(base_home(home), name)
    if prefix and (not prefix.startswith("/") or prefix.endswith("/")):
        raise CommandError(f"--prefix {prefix!r}: begin with / and end without", code="command.usage")
    witness = place.witness()
    typer.echo(f"witness {name} of {witness.log.name}: http://{host}:{port}{prefix}/add-checkpoint", err=True)
    serve(WitnessServer(witness, place.path, prefix=prefix), host=host, port=port)


@guarded
def sign_charter(
    file: Annotated[Path, typer.Argument(help="The charter.")],
    name: Annotated[str, typer.Option("--site", help="The site that agrees.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Show what a charter would cost this site and what its file lacks, then agree to it.

    The agent signs with the site's key when the coordinator asks. Problems in the file are shown here only.

    Exit codes: 0 agreed, 1 not agreed: it does not fit the lifetime budget or is not for this site, 2 wrong
    usage.
    """
    from audit.epsilon import epsilon_text
    from clients.reviewing import row_of_site_text
    from clients.service import approve_charter, review
    from federation.charter import Charter

    text = Charter.load(file).canonical().decode()
    place = _open_site(base_home(home), name)
    found = review(place, text)
    lines = [
        f"charter   {found.charter}",
        f"releases  {found.releases}, epsilon {epsilon_text(found.charter_epsilon)} for one {found.unit}",
        f"lifetime  {epsilon_text(found.lifetime_after)} of {place.config.lifetime.epsilon} afterwards",
        *([f"a row     {row_of_site_text(found.row_epsilon)}"] if found.row_epsilon is not None else []),
        *([f"counts on {found.counts_on}"] if found.counts_on else []),
        *[f"file      {problem}" for problem in found.problems[:20]],
    ]
    if not found.fits:
        raise CommandError(
            "\n".join([*lines, "does not fit this site's lifetime budget"]), code="site.budget_exhausted"
        )
    if not yes and not as_json:
        typer.echo("\n".join(lines))
        typer.confirm("agree?", abort=True)
    place = approve_charter(place, text)
    if (place.path / "network" / "membership.json").exists():
        from clients.network.joining import follow_members

        follow_members(place, Charter.load(file))
    document = {
        "charter": found.charter,
        "site": name,
        "epsilon": found.charter_epsilon,
        "unit": found.unit,
        "lifetime_after": found.lifetime_after,
        "problems": [str(problem) for problem in found.problems],
    }
    emit(document, f"{name} agrees to {found.charter}", as_json=as_json)


def _followed(size: int | None, name: str) -> str:
    return f"{size} entries" if size is not None else f"not yet; affidavit site follow {name} --policy FILE"


def _open_site(base: Path, name: str) -> SiteHome:
    from clients.home import SiteHome

    return SiteHome.open(base / "sites" / name)


def _site_home(base: Path, name: str, data: Path) -> SiteHome:
    from clients.home import SiteHome

    found = SiteHome.open(base / "sites" / name)
    if found.config.data.resolve() != data.resolve():
        raise CommandError(
            f"site {name} reads {found.config.data}, not {data}; change `data` in its site.yaml",
            code="train.other_file",
        )
    return found


def _named_files(sites: list[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for text in sites:
        name, separator, file = text.partition("=")
        if not separator or not name or not file or name in files:
            raise CommandError(f"--site {text!r}: write NAME=FILE, each name once", code="train.sites")
        files[name] = Path(file)
    return files


def _identity(home: Path) -> Identity:
    import os

    from clients.identity import Identity

    passphrase = os.environ.get("AFFIDAVIT_PASSPHRASE")
    return Identity.open(home, passphrase.encode() if passphrase else None)


def _engine(name: str) -> Any:
    if name not in ("inprocess", "ray"):
        raise CommandError(f"engine {name!r}: choose inprocess or ray", code="command.usage")
    return name


def _quiet() -> None:
    """Keep Flower's own log lines out of the tables."""
    import logging

    logging.getLogger("flwr").setLevel(logging.ERROR)
