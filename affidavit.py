"""The front door: the `affidavit` command and the names for notebooks. No logic, and nothing heavy until
asked for.

`affidavit verify` needs the standard library and `cryptography` alone; the other commands are Typer's and
load with the first of them. In Python: `affidavit.Charter`, `affidavit.simulate`, `affidavit.describe`,
`affidavit.verify`.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import click
    import typer

__all__ = ["Charter", "__version__", "describe", "main", "simulate", "verify"]  # noqa: F822 - by __getattr__

_PACKAGES: Final = ("audit", "federation", "clients", "server")
_LAST_PACKAGE_OF: Final = {  # the last one that adds to what begins with a word; others need all
    "db": "audit",
    "init": "federation", "log": "federation", "models": "federation",
    "charter": "clients", "demo": "clients", "identity": "clients", "runs": "clients", "train": "clients",
}  # fmt: skip
_NAMES: Final = {
    "Charter": ("federation.charter", "Charter"),
    "describe": ("federation.describe", "describe"),
    "simulate": ("clients.simulation", "simulate"),
    "verify": ("audit.verify", "verify_evidence"),
}

MANUAL: Final = """\
affidavit - federated learning whose every claim can be proved

Usage: affidavit COMMAND [OPTIONS]      affidavit COMMAND --help says more

Begin here
  demo                    four hospitals train, the log proves it, a stranger verifies (a minute)
  doctor                  is everything installed and in order?

Site engineer: your rows stay with you
  site join INVITATION    join a federation over the network
  site up | down NAME     start and stop what the site runs for it
  site standing | leave NAME
                          ask where the site stands; leave for good
  site rotate-keys NAME   new keys: --keys node, signing or all
  site add NAME           make the site's home: keys, population, lifetime budget
  site status NAME        what this site has spent, what it agreed to, and what waits for you
  site agent NAME         run the site's agent: rows, keys and budget in one process
  site review | accept | refuse RUN
                          a charter or a run: its cost, its code, your rules; say yes or no
  site bundle approve | withdraw FILE
                          which Flower bundles the relay may run
  site launcher FOLDER    the flwr-clientapp that confines them, for the SuperNode's PATH
  site predict ROWS       answers here, with the layers that never left this site
  site log export FILE    the site's own story, to compare with the federation's
  site follow NAME        begin to witness a log, under the policy you compared with the others
  site witness NAME       check that the log only grew, and cosign it
  site serve-witness NAME
                          answer the log's add-checkpoint requests (C2SP tlog-witness)
  charter sign            read a charter, agree to it with the site's key

Compliance officer: believe nothing, check everything
  verify FILE --policy P  walk an evidence file offline; exit code 0 means VALID, which it never
                          says without a policy that you got elsewhere
  log list | show | proof
                          search the log, read an entry, prove it is there
  log fsck                recompute the whole log from its bytes
  log export TARGET       the log as tlog-tiles, in a folder or an object store
  log policy              the log's keys, witnesses and quorum, to compare and then believe
  log prove-fork A B      a file that convicts a log of two histories; verify judges it
                          --receipt FILE: of a promise that it broke
  log publish             sign a checkpoint now; a running server does so by itself
  log rotate-key | compromise
                          give the log a new key; end a stolen one
  db upgrade              bring an older log's database to this release
  evidence export         a zip that proves one entry to a stranger
  evidence disclose       the same, with chosen fields opened and the others closed
  subject find | export | erase
                          one person: their pseudonym, all about them, or nothing any more
  identity new            your own key, with which you approve
  models approve | rollback
                          sign a version into or out of use
  models trial            try a version as a canary or a shadow of the live one
  policy show | check | test | apply FILE
                          the rules that decide; try new ones on past decisions, sign them in
  review show | record DECISION
                          a decision with legal effect is final once you say so
  runs updates RUN        how the sites' updates agree, and who stands apart

Data scientist: train on what you may not see
  charter new             a charter to fill in from a file's header; bounds are yours to say
  charter check           errors by line, and what the plan will cost each site
  train                   --charter my.yaml --site a=a.csv --site b=b.csv …
  models list | show | card
                          versions, gates, epsilon, who approved

Operator: keep it running
  coordinator init | up | status
                          a coordinator for sites on other machines, kept up
  site invite | approve | revoke | list
                          who may come
  runs start | list | show | follow | stop | plot
                          runs over the network
  runs resume RUN         go on with a run whose coordinator died; nothing is spent twice
  init                    a coordinator's home and a signer's
  serve                   the HTTP API
  keys create | rotate | list | revoke
                          API keys, their roles and terms
  status                  every setting and where its value came from
  backup | restore        a restore behind the signer's state is refused
  vault backup | restore | rotate-key | scrub
                          what may be erased, kept apart from the log

Homes are in .affidavit, or in --home or AFFIDAVIT_HOME. --json prints one document for scripts.
Exit codes: 0 done, 1 refused or failed (one line with a code), 2 wrong usage; `verify` has its own.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _leave_no_core_dump()
    shadow = shadowed_package()
    if shadow is not None:
        print(f"error command.shadowed: {_shadow_message(*shadow)}", file=sys.stderr)
        return 2
    if not given or given in (["--help"], ["-h"], ["help"]):
        print(MANUAL, end="")
        return 0
    if given == ["--version"]:
        print(f"affidavit {__getattr__('__version__')}")
        return 0
    if given[0] == "verify":
        from audit.verify.cli import main as verify_main

        return verify_main(given[1:])
    try:
        application = _command(given[0])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in _PACKAGES:
            raise
        print(
            f"error command.extra_missing: {error.name} is not installed; this installation only verifies. "
            "Install affidavit[all] for the other commands",
            file=sys.stderr,
        )
        return 2
    return _run(application, given)


def _leave_no_core_dump() -> None:
    """A crash must not write rows and keys to disk."""
    try:
        import resource
    except ImportError:  # not this system's way of dumping
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _run(application: click.Command, given: list[str]) -> int:
    import click
    import typer

    if "--help" in given:
        from audit.console import show_argument_help

        show_argument_help(application)
    try:
        outcome = application.main(given, prog_name="affidavit", standalone_mode=False)
    except click.exceptions.Abort:
        print("error command.aborted: nothing was done", file=sys.stderr)
        return 1
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "affidavit"
        message = error.format_message().partition(" Did you mean")[
            0
        ]  # typer's own, which leaves `verify` out
        message += _meant(message, context)
        if "--json" in given:
            typer.echo(json.dumps({"error": {"code": "command.usage", "message": message}}))
        print(f"error command.usage: {message} (see {path} --help)", file=sys.stderr)
        return 2
    return outcome if isinstance(outcome, int) else 0


def _meant(message: str, context: click.Context | None) -> str:
    """Return what to add where a command is misspelt: the names that look like it."""
    import difflib

    import click

    found = re.match(r"No such command '([^']*)'", message)
    if found is None or context is None or not isinstance(context.command, click.Group):
        return ""
    word, names = found.group(1), list(context.command.list_commands(context))
    if context.parent is None:
        names.append("verify")
        groups = {name: context.command.get_command(context, name) for name in names}
        inner = [f"{name} {word}" for name, group in groups.items() if word in getattr(group, "commands", ())]
    else:
        inner = []
    meant = (difflib.get_close_matches(word.lower(), names) + inner)[:3]
    return f" Did you mean {' or '.join(map(repr, meant))}?" if meant else ""


@cache
def _command(word: str) -> click.Command:
    """Return the command, or as much of it as its first word needs: a roll-back builds no hundred others."""
    import typer

    packages = _PACKAGES[: _PACKAGES.index(_LAST_PACKAGE_OF.get(word, _PACKAGES[-1])) + 1]
    application = build_application(packages)
    part = copy.copy(application)
    part.registered_commands = [found for found in application.registered_commands if found.name == word]
    part.registered_groups = [
        found
        for found in application.registered_groups
        if found.typer_instance is not None and found.typer_instance.info.name == word
    ]
    if part.registered_commands or part.registered_groups:
        return typer.main.get_group(part)
    return typer.main.get_command(build_application())


def build_application(packages: Sequence[str] = _PACKAGES) -> typer.Typer:
    """Compose the command from the four packages, or from the first of them."""
    for package in packages:
        _register(package)
    return _application()


@cache
def _application() -> typer.Typer:
    import typer

    return typer.Typer(
        name="affidavit", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
    )


@cache
def _register(package: str) -> None:
    importlib.import_module(f"{package}.commands").register(_application())


def shadowed_package() -> tuple[str, str] | None:
    """Return the first of our packages that another file hides on `sys.path`, and that file."""
    home = Path(__file__).resolve().parent
    for name in _PACKAGES:
        loaded = sys.modules.get(name)
        spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        if Path(spec.origin).resolve() != home / name / "__init__.py":
            return name, spec.origin
    return None


def _shadow_message(name: str, found: str) -> str:
    return f"{found} shadows affidavit's package {name!r}; run from another folder, or rename that file"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("affidavit")
        except PackageNotFoundError:
            return "0"
    if name in _NAMES:
        shadow = shadowed_package()
        if shadow is not None:
            raise ImportError(_shadow_message(*shadow))
        module, attribute = _NAMES[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'affidavit' has no attribute {name!r}")


if __name__ == "__main__":
    sys.exit(main())
