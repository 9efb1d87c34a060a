"""What signs for a coordinator's home: the signer that `config.yaml` names, and whom it must ask first.

`policy.txt` in the home is the operator's own C2SP tlog-policy: the witnesses with an address are asked
before this home takes over from another signer, and are offered every checkpoint (`audit.watchers`). Without
the file fail-over knows only what the database holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from audit.errors import AuditError, LocationError, PolicyFileError, SignerMissingError
from audit.ledger import Ledger
from audit.ledger_keys import KnownKeys
from audit.location import CONFIG, read_secret
from audit.publisher import Publisher
from audit.signer import Signer
from audit.tlog_policy import Policy

if TYPE_CHECKING:
    from audit.watchers import Watchers

POLICY_FILE: Final = "policy.txt"
PASSPHRASE: Final = "AFFIDAVIT_SIGNER_PASSPHRASE"  # noqa: S105 - the name of a variable


def signer_passphrase(environ: Mapping[str, str] | None = None) -> bytes | None:
    """Return what encrypts the signer's keys at rest, from the environment or the file that it names."""
    text = read_secret(PASSPHRASE, environ)
    return None if text is None else text.encode()


def signer_home_of(home: Path) -> Path:
    """Return the signer's home that a coordinator's home names.

    Raises:
        LocationError: `config.yaml` is missing, unreadable, or names none.
    """
    import yaml

    path = home / CONFIG
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Path(document["signer_home"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError) as error:
        raise LocationError(f"{path}: names no signer_home; it is written by `affidavit init`") from error


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
