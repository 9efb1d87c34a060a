"""What signs for a coordinator's home: the signer that `config.yaml` names, and whom it must ask first.

`policy.txt` in the home is the operator's own C2SP tlog-policy: the witnesses with an address are asked
before this home takes over from another signer, and are offered every checkpoint (`audit.watchers`). Without
the file fail-over knows only what the database holds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from audit.errors import AuditError, LocationError, PolicyFileError, SignerElsewhereError, SignerMissingError
from audit.ledger import Ledger
from audit.ledger_keys import KnownKeys
from audit.location import CONFIG, log_location, read_secret
from audit.publisher import Publisher
from audit.signer import Signer
from audit.tlog_policy import Policy

if TYPE_CHECKING:
    from audit.watchers import Watchers

POLICY_FILE: Final = "policy.txt"
SIGNER: Final = "AFFIDAVIT_SIGNER_HOME"
PASSPHRASE: Final = "AFFIDAVIT_SIGNER_PASSPHRASE"  # noqa: S105 - the name of a variable

_BESIDE: Final = "signer"


def signer_passphrase(environ: Mapping[str, str] | None = None) -> bytes | None:
    """Return what encrypts the signer's keys at rest, from the environment or the file that it names."""
    text = read_secret(PASSPHRASE, environ)
    return None if text is None else text.encode()


def signer_home_of(
    home: Path, environ: Mapping[str, str] | None = None, *, config: Path | None = None
) -> Path:
    """Return the signer's home of a coordinator's home, by the one rule that every command follows.

    AFFIDAVIT_SIGNER_HOME comes first, then `signer_home` of the server's own settings in `config.yaml`, then
    the `signer_home` that `affidavit init` wrote there. A relative path counts from the coordinator's home,
    so a home that is moved takes its signer along. An absolute one counts as it is; where its whole folder is
    gone and a signer lies beside the home, the home was moved with it, and that one is meant.
    `config` is another place of `config.yaml`, for a home that is not in its place yet.

    Raises:
        LocationError: `config.yaml` is missing, unreadable, or names none.
        SignerElsewhereError: the absolute path is another home's signer: this home is a copy.
    """
    chosen = (os.environ if environ is None else environ).get(SIGNER)
    if chosen:
        return Path(chosen)
    path = config or home / CONFIG
    named = _named(path)
    if named is None:
        raise LocationError(f"{path}: names no signer_home; it is written by `affidavit init`")
    if not named.is_absolute():
        return Path(os.path.abspath(home / named))
    beside = Path(os.path.abspath(home)).parent / _BESIDE
    has_own = beside.is_dir() and not _is_same(beside, named)
    if has_own and not named.parent.exists():  # a disk that is not mounted leaves the folder that it goes to
        return beside
    other = named.parent / "coordinator"
    if (
        (other / CONFIG).is_file()
        and not _is_same(other, home)
        and (has_own or _are_apart(home, other, environ))
    ):
        raise SignerElsewhereError(config=path, named=named, other=other, beside=beside if has_own else None)
    return named


def named_for(home: Path, signer_home: Path) -> str:
    """Return how a home names its signer: by the way from the home where both lie in one folder, which may
    be moved or copied as a whole, else by an absolute path.
    """
    at, signer = Path(os.path.abspath(home)), Path(os.path.abspath(signer_home))
    return f"../{signer.name}" if signer.parent == at.parent else str(signer)


def _named(path: Path) -> Path | None:
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LocationError(f"{path}: names no signer_home; it is written by `affidavit init`") from error
    if not isinstance(document, dict):
        return None
    section = document.get("server")
    own = section.get("signer_home") if isinstance(section, dict) else None
    named = own or document.get("signer_home")
    return Path(named) if isinstance(named, str) and named else None


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _are_apart(home: Path, other: Path, environ: Mapping[str, str] | None) -> bool:
    """Whether two homes keep their logs in two files: then one signer cannot sign for both."""
    one, two = log_location(home, environ).path, log_location(other, environ).path
    return one is not None and two is not None and not _is_same(one, two)


def watchers_of(home: Path, origin: str) -> Watchers | None:
    """Return the witnesses that the home's own policy names; None without such a file.

    Raises:
        PolicyFileError: the file is no policy, or of another log.
    """
    path = home / POLICY_FILE
    try:
        policy = Policy.parse(path.read_text(encoding="utf-8"))
        policy.log_for(origin)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, AuditError) as error:
        raise PolicyFileError(f"{path}: {error}; correct it, or remove it to ask no witness") from error
    from audit.watchers import Watchers  # only who has witnesses speaks HTTP

    return Watchers(policy, origin)


def publisher_of(ledger: Ledger, signer: Signer, watchers: Watchers | None) -> Publisher:
    """Return the publisher of a log, which asks the witnesses before it takes over from another."""
    keys = KnownKeys(ledger)
    return Publisher(
        ledger,
        signer,
        policy=watchers.policy if watchers is not None else None,
        views=() if watchers is None else (watchers.seen,),
        counts=lambda vkey, size: keys.now().check(vkey, size, witnessed=True),
    )


def publish_here(home: Path, ledger: Ledger) -> bytes:
    """Publish a checkpoint of the log as it is now, with the signer on this machine, through the lease.

    Raises:
        SignerMissingError: the signer's home is not on this machine; names what to run, and where.
        AuditError: as `Publisher.publish`.
    """
    place = signer_home_of(home)
    try:
        signer = Signer.open(place, signer_passphrase())
    except SignerMissingError as error:
        raise SignerMissingError(
            f"no checkpoint covers the log yet, and its signer ({place}) is not here: run "
            "`affidavit serve` or `affidavit log publish` where it is, then try again"
        ) from error
    signer.check_extended_by(ledger)
    publisher = publisher_of(ledger, signer, watchers_of(home, ledger.origin))
    try:
        return publisher.publish()
    finally:
        publisher.close()
