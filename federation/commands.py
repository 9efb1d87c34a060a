"""Commands about agreements and models: `init`, `charter new | check`, `models list | show | card | approve
| rollback`; those on the log's keys and policy are in `federation.log_commands`.

With --url the reading commands ask a running server; signing ones work on the coordinator's home, with the
person's own key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from audit.commands import log
from audit.console import CommandError, ask_api, base_home, emit, guarded, read_key, table
from federation import log_commands

if TYPE_CHECKING:
    from audit.keys import SigningKey
    from federation.coordinator import Coordinator
    from federation.registry import Version

charter = typer.Typer(name="charter", help="The agreement, one YAML file.", no_args_is_help=True)
models = typer.Typer(name="models", help="Versions, gates, approvals.", no_args_is_help=True)

Home = Annotated[
    Path | None, typer.Option("--home", help="Folder of the homes [AFFIDAVIT_HOME, .affidavit].")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Url = Annotated[str | None, typer.Option("--url", help="Ask the server at this address instead.")]
KeyFile = Annotated[
    Path | None, typer.Option("--key-file", help="File with the API key [AFFIDAVIT_API_KEY].")
]
Officer = Annotated[
    Path,
    typer.Option("--officer", help="Your identity: its home, or its key.pem. It never leaves this machine."),
]
Reason = Annotated[str, typer.Option(help="Why; it goes into the log.")]


def register(application: typer.Typer) -> None:
    """Add these commands to the front door."""
    application.command("init")(init)
    from federation.run_commands import register as register_runs

    application.add_typer(charter)
    application.add_typer(models)
    register_runs(application)
    log_commands.register(log)


@guarded
def init(
    origin: Annotated[str, typer.Argument(help="The log's name for life, such as log.example.org/oncology.")],
    database: Annotated[
        str | None,
        typer.Option(help="Where the log goes: a path, or postgresql://USER@HOST/DATABASE [log.db]."),
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make a coordinator's home with a new log, and a signer's home beside it.

    A password never stands in --database: it comes from AFFIDAVIT_DATABASE_PASSWORD or from the file that
    AFFIDAVIT_DATABASE_PASSWORD_FILE names. AFFIDAVIT_SIGNER_PASSPHRASE(_FILE) encrypts the signer's key.

    Exit codes: 0 done, 1 the homes exist or the name is no log's, 2 wrong usage.
    """
    from federation.coordinator import Coordinator

    base = base_home(home)
    with Coordinator.create(base / "coordinator", base / "signer", origin, database=database) as coordinator:
        document = {
            "origin": coordinator.origin,
            "log_key": coordinator.log_key,
            "coordinator": str(base / "coordinator"),
            "signer": str(base / "signer"),
        }
    lines = [
        f"log      {document['origin']}",
        f"log key  {document['log_key']}   (give it to the sites; it goes into every policy)",
        f"homes    {document['coordinator']}, {document['signer']}",
        "keep the signer's home out of every backup of the log",
    ]
    emit(document, lines, as_json=as_json)


@charter.command("new")
@guarded
def new_charter(
    source: Annotated[Path, typer.Option("--from", help="A CSV file; only its header is read.")],
    out: Annotated[Path, typer.Option(help="The new charter.")] = Path("charter.yaml"),
    label: Annotated[str | None, typer.Option(help="The column to predict; else the last one.")] = None,
    task: Annotated[str, typer.Option(help="binary, multiclass or regression.")] = "binary",
    unit: Annotated[str, typer.Option(help="What noise protects: row, or site (a whole site).")] = "row",
    as_json: AsJson = False,
) -> None:
    """Write a charter to fill in: a line for each column of the file.

    Bounds, units and categories are left for you to say: read from data, they would tell about it.

    Exit codes: 0 done, 1 the file has no header or the charter exists, 2 wrong usage.
    """
    from federation.draft import draft_charter, read_header

    if out.exists():
        raise CommandError(f"{out}: exists; give --out", code="charter.exists")
    header = read_header(source)
    text = draft_charter(header, label=label or header[-1], task=task, unit=unit)
    out.write_text(text, encoding="utf-8")
    emit(
        {"file": str(out), "columns": header},
        f"wrote {out}: fill in every TODO, then affidavit charter check {out}",
        as_json=as_json,
    )


@charter.command("check")
@guarded
def check_charter(
    file: Annotated[Path, typer.Argument(help="The charter.")], as_json: AsJson = False
) -> None:
    """Say what is wrong in a charter, by line, or what its plan will cost each site.

    Exit codes: 0 it is sound and the plan fits, 1 it is not, 2 wrong usage.
    """
    from federation.accounting import plan_cost, plan_report
    from federation.charter import Charter

    loaded = Charter.load(file)
    cost = plan_cost(loaded)
    document = {
        "charter": cost.charter,
        "fits": cost.fits,
        "sites": [
            {
                "site": site.site,
                "rounds": site.rounds,
                "epsilon": str(site.epsilon),
                "epsilon_pld": site.spent.pld_text,
                "epsilon_rdp": site.spent.rdp_text,
                "fits": site.fits,
            }
            for site in cost.sites
        ],
        "warnings": list(cost.warnings),
    }
    if loaded.secure is not None:
        document["tolerated"] = loaded.secure.tolerated
        document["colluders"] = loaded.secure.colluders(loaded.secure.least)
        document["epsilon_alone"] = cost.alone
    if cost.whole_site is not None:
        document["epsilon_whole_site"] = cost.whole_site
    if cost.row is not None:
        document["unit"] = "site"
        document["epsilon_row_of_site"] = cost.row if math.isfinite(cost.row) else None
    emit(document, plan_report(loaded).rstrip(), as_json=as_json)
    if not cost.fits:
        raise typer.Exit(1)


@models.command("list")
@guarded
def list_models(
    home: Home = None, url: Url = None, key_file: KeyFile = None, as_json: AsJson = False
) -> None:
    """List the registered models and which version is live.

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage.
    """
    if url:
        document = json.loads(ask_api(url, "/v1/models", key=read_key(None, key_file)))
    else:
        from federation.registry import LIVE, versions

        with _coordinator(home) as coordinator:
            found = versions(coordinator.ledger)
        names = sorted({version.model for version in found})
        document = {
            "models": [
                {
                    "name": name,
                    "live": next(
                        (v.digest for v in reversed(found) if v.model == name and v.state == LIVE), None
                    ),
                    "versions": sum(v.model == name for v in found),
                }
                for name in names
            ]
        }
    rows = [[item["name"], item["versions"], item["live"] or "none"] for item in document["models"]]
    emit(document, table("", ("model", "versions", "live"), rows) if rows else "no models", as_json=as_json)


@models.command("show")
@guarded
def show_model(
    model: Annotated[str, typer.Argument(help="The model's name.")],
    home: Home = None,
    url: Url = None,
    key_file: KeyFile = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's versions: state, gates, epsilon, who approved.

    Exit codes: 0 done, 1 there is no such model, refused or failed, 2 wrong usage.
    """
    if url:
        document = json.loads(ask_api(url, f"/v1/models/{model}", key=read_key(None, key_file)))
        listed = document["versions"]
    else:
        from federation.registry import versions

        with _coordinator(home) as coordinator:
            found = versions(coordinator.ledger, model)
        if not found:
            raise CommandError(f"no model {model!r} is registered", code="models.not_found")
        listed = [_shown(version) for version in reversed(found)]
        document = {"name": model, "versions": listed}
    rows = [
        [
            item["version"][:16],
            item["state"],
            "yes" if item["gates_passed"] else "NO",
            item["epsilon"],
            item["run"],
        ]
        for item in listed
    ]
    emit(document, table(model, ("version", "state", "gates", "epsilon", "run"), rows), as_json=as_json)


@models.command("card")
@guarded
def show_card(
    model: Annotated[str, typer.Argument(help="The model's name.")],
    version: Annotated[
        str | None, typer.Option(help="Digest or its beginning; else the live or newest one.")
    ] = None,
    form: Annotated[str, typer.Option(help="markdown, json or html, a page to print.")] = "markdown",
    out: Annotated[Path | None, typer.Option(help="Write the card to this file.")] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Print the model card, made from the log and the registry's files.

    Exit codes: 0 done, 1 there is no such version, 2 wrong usage.
    """
    from federation.model_card import card_of

    if form not in ("markdown", "json", "html"):
        raise CommandError(f"there is no form {form!r}; use markdown, json or html", code="usage.form")
    with _coordinator(home) as coordinator:
        found = _pick(coordinator, model, version)
        card = card_of(coordinator.ledger, found.digest, coordinator.blobs.find)
    text: str = getattr(card, form)()
    if out is not None:
        out.write_text(text, encoding="utf-8")
    shown = text.rstrip() if out is None else f"wrote {out}"
    emit({"version": found.digest, "card": text}, shown, as_json=as_json)


@models.command("approve")
@guarded
def approve_model(
    version: Annotated[str, typer.Argument(help="The version's digest, or at least its first eight digits.")],
    officer: Officer,
    live: Annotated[bool, typer.Option("--live", help="Also make it the version that answers.")] = False,
    reason: Reason = "",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Sign a version as approved, with your own key. You must be an officer of its charter, and not its
    author.

    Exit codes: 0 done, 1 a gate did not pass, you may not, or the state does not allow it, 2 wrong usage.
    """
    from audit.principal import LocalOwner
    from federation.registry import APPROVED, LIVE
    from federation.service import ApproveRequest, approve

    key = read_identity(officer)
    request = ApproveRequest(version=version, to_state=LIVE if live else APPROVED, reason=reason)
    with _coordinator(home) as coordinator:
        moved = approve(coordinator, _person(key), LocalOwner(), request, key)
    emit(_shown(moved), f"version {moved.digest} of {moved.model} is {moved.state}", as_json=as_json)


@models.command("trial")
@guarded
def try_model(
    version: Annotated[str, typer.Argument(help="The version's digest, or at least its first eight digits.")],
    officer: Officer,
    canary: Annotated[
        int | None, typer.Option(min=1, max=99, help="Let it answer this percent of the requests.")
    ] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Ask it beside the live version; it answers nobody.")
    ] = False,
    end: Annotated[bool, typer.Option("--end", help="End the trial: approved, as before.")] = False,
    reason: Reason = "",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Try an approved version beside the live one, signed with your own key.

    Exit codes: 0 done, 1 you may not, or the state does not allow it, 2 wrong usage.
    """
    from audit.principal import LocalOwner
    from federation.registry import APPROVED, CANARY, SHADOW
    from federation.service import TrialRequest, trial

    if [canary is not None, shadow, end].count(True) != 1:
        raise CommandError("give one of --canary PERCENT, --shadow and --end", code="usage.trial")
    key = read_identity(officer)
    request = TrialRequest(
        version=version,
        to_state=CANARY if canary else SHADOW if shadow else APPROVED,
        share=canary or 0,
        reason=reason,
    )
    with _coordinator(home) as coordinator:
        moved = trial(coordinator, _person(key), LocalOwner(), request, key)
    emit(_shown(moved), f"version {moved.digest} of {moved.model} is {moved.state}", as_json=as_json)


@models.command("rollback")
@guarded
def roll_back(
    model: Annotated[str, typer.Argument(help="The model's name.")],
    officer: Officer,
    version: Annotated[str, typer.Option(help="An earlier live version; else the one before.")] = "",
    reason: Reason = "",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make an earlier live version live again, signed with your own key.

    Exit codes: 0 done, 1 there is nothing to go back to, or you may not, 2 wrong usage.
    """
    from audit.principal import LocalOwner
    from federation.service import RollbackRequest, rollback

    key = read_identity(officer)
    with _coordinator(home) as coordinator:
        request = RollbackRequest(model=model, version=version, reason=reason)
        moved = rollback(coordinator, _person(key), LocalOwner(), request, key)
    emit(_shown(moved), f"version {moved.digest} of {moved.model} is {moved.state} again", as_json=as_json)


@contextmanager
def _coordinator(home: Path | None) -> Iterator[Coordinator]:
    from federation.coordinator import Coordinator

    base = base_home(home)
    with Coordinator.open(base / "coordinator") as coordinator:
        yield coordinator


def read_identity(path: Path) -> SigningKey:
    """Return a person's own key, from its home or its file."""
    import os

    from audit.keys import SigningKey

    file = path / "identity" / "key.pem" if path.is_dir() else path
    passphrase = os.environ.get("AFFIDAVIT_PASSPHRASE")
    return SigningKey.load(file, passphrase.encode() if passphrase else None)


def _person(key: SigningKey) -> Any:
    from audit.principal import Principal

    return Principal(id=key.verify_key.fingerprint, role="officer", key=key.text)


def _pick(coordinator: Coordinator, model: str, digest: str | None) -> Version:
    from federation.registry import LIVE, find_version, versions

    if digest:
        return find_version(coordinator.ledger, digest)
    found = versions(coordinator.ledger, model)
    if not found:
        raise CommandError(f"no model {model!r} is registered", code="models.not_found")
    return next((version for version in found if version.state == LIVE), found[-1])


def _shown(version: Version) -> dict[str, Any]:
    registered = version.registered
    return {
        "version": version.digest,
        "model": version.model,
        "state": version.state,
        "registered": version.time,
        "leaf_index": version.leaf_index,
        "run": registered.run,
        "charter": registered.charter,
        "gates_passed": version.gates_passed,
        "epsilon": max((site.run_epsilon for site in registered.costs), key=float, default=None),
        "approved_by": [t.body.officer for t in version.transitions if t.body.to_state == "approved"],
    }
