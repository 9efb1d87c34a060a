"""A site's home: what its people decided, and where its agent keeps what it must not lose.

    site.yaml      name, population, data file, rules, lifetime budget
    policy.txt     which log and which witnesses this site believes (C2SP tlog-policy)
    keys/          the site's private keys
    ledger.db      the odometer; odometer.json is its high-water mark, kept apart
    witness.json   the last checkpoint this site cosigned
    log.db         the site's own log, with its key in log-signer/ (`clients.site_log`)
    proposals/     charters and runs that wait for this site's people
    run/           the agent's socket, unless it is kept elsewhere

The population is the name of the people behind the data. Its pseudonym is drawn once and stays: new files
under the same population keep counting on the same odometer.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final

import yaml
from pydantic import BaseModel, Field, StringConstraints, ValidationError, field_validator

from audit._files import locked, write_durably
from audit.errors import AuditError
from audit.notes import NoteVerifier
from audit.tlog_policy import Policy
from audit.witness import Witness
from clients.errors import HomeError
from clients.identity import SiteKeys
from clients.rules import Rules, exact

SITE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_CONFIG: Final = "site.yaml"
_FIXES: Final = {"extra_forbidden": "remove it, or correct its name", "missing": "add it"}


class Population(BaseModel, frozen=True, extra="forbid"):
    name: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    pseudonym: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


class LifetimeBudget(BaseModel, frozen=True, extra="forbid"):
    """What this population may spend in all, whatever any charter says; only the site can raise it."""

    epsilon: Annotated[Decimal, Field(gt=0, le=1000)]
    delta: Annotated[Decimal, Field(gt=0, lt=Decimal("0.1"))]
    whole_site_epsilon: Annotated[Decimal, Field(gt=0, le=1000)] | None = None  # for all rows together

    @field_validator("epsilon", "delta", "whole_site_epsilon", mode="before")
    @classmethod
    def _decimals(cls, value: Any) -> Any:
        return None if value is None else exact(value)


class SiteConfig(BaseModel, frozen=True, extra="forbid"):
    name: Annotated[str, StringConstraints(pattern=rf"^{SITE_NAME.pattern}$")]
    operator: Annotated[str, StringConstraints(pattern=rf"^({SITE_NAME.pattern})?$")] = ""
    population: Population
    data: Path
    lifetime: LifetimeBudget
    rules: Rules
    relay_uids: tuple[Annotated[int, Field(ge=0, strict=True)], ...] = ()  # who may speak to the agent, too


@dataclass(frozen=True, slots=True)
class SiteHome:
    path: Path
    config: SiteConfig

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        name: str,
        data: Path,
        population: str,
        lifetime_epsilon: str,
        lifetime_delta: str,
        auto_approve: bool,
        purposes: tuple[str, ...] = (),
        operator: str = "",
    ) -> SiteHome:
        """Make a site's home with new keys and a new population pseudonym.

        Raises:
            HomeError: the home exists, or a value is not allowed.
            IdentityError: the keys cannot be written.
        """
        from clients.ledger import SiteLedger
        from clients.site_log import SiteLog

        if (path / _CONFIG).exists():
            raise HomeError(path, "is a site's home already", "choose another folder; a site is added once")
        document = {
            "name": name,
            "operator": operator,
            "population": {"name": population, "pseudonym": secrets.token_hex(16)},
            "data": str(data.resolve()),
            "lifetime": {"epsilon": lifetime_epsilon, "delta": lifetime_delta},
            "rules": {"auto_approve": auto_approve, "approved_charters": (), "purposes": purposes},
        }
        home = cls(path, _validated(path / _CONFIG, document))
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        keys = SiteKeys.create(path / "keys")
        SiteLedger.create(home.ledger_path, home.high_water_path).close()
        SiteLog.create(path, name, home.config.population.pseudonym, keys).close()
        home._write()
        return home

    @classmethod
    def open(cls, path: Path) -> SiteHome:
        """Read a site's home.

        Raises:
            HomeError: there is none, or `site.yaml` breaks a rule; names the key and the fix.
        """
        config = path / _CONFIG
        try:
            document = yaml.safe_load(config.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise HomeError(config, "is missing", "make the site with `affidavit site add`") from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise HomeError(config, f"cannot be read: {error}", "mend or restore the file") from error
        return cls(path, _validated(config, document))

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def local_layers_path(self) -> Path:
        """Parameters of layers that stay at this site."""
        return self.path / "local_layers"

    @property
    def ledger_path(self) -> Path:
        return self.path / "ledger.db"

    @property
    def high_water_path(self) -> Path:
        return self.path / "odometer.json"

    @property
    def witness_path(self) -> Path:
        return self.path / "witness.json"

    def keys(self) -> SiteKeys:
        return SiteKeys.open(self.path / "keys")

    @property
    def follows_a_log(self) -> bool:
        """Whether this site believes a policy and witnesses its log."""
        return self.witness_path.exists()

    def stamp(self) -> tuple[int, int, int]:
        """Return what changes whenever `site.yaml` is written."""
        found = (self.path / _CONFIG).stat()
        return found.st_mtime_ns, found.st_size, found.st_ino

    def approve(self, digest: str) -> SiteHome:
        """Return the home with one more approved charter, added to `site.yaml` as it is now."""
        return self._with_rules(lambda rules: {"approved_charters": _added(rules.approved_charters, digest)})

    def disapprove(self, digest: str) -> SiteHome:
        """Return the home with one approved charter less."""
        return self._with_rules(
            lambda rules: {"approved_charters": tuple(set(rules.approved_charters) - {digest})}
        )

    def approve_bundle(self, digest: str) -> SiteHome:
        """Return the home with one more approved bundle."""
        return self._with_rules(lambda rules: {"approved_bundles": _added(rules.approved_bundles, digest)})

    def withdraw_bundle(self, digest: str) -> SiteHome:
        """Return the home with one approved bundle less."""
        return self._with_rules(
            lambda rules: {"approved_bundles": tuple(set(rules.approved_bundles) - {digest})}
        )

    def refreshed(self) -> SiteHome:
        """Return the home with the rules that `site.yaml` holds now, and everything else as it was read."""
        rules = SiteHome.open(self.path).config.rules
        return self if rules == self.config.rules else self._replaced(rules)

    def policy(self) -> Policy:
        """Read the site's own trust file.

        Raises:
            HomeError: it is missing or malformed.
        """
        path = self.path / "policy.txt"
        try:
            return Policy.parse(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise HomeError(
                path, "is missing", "ask the federation's members for their policy, compare it"
            ) from error
        except (AuditError, UnicodeDecodeError) as error:
            raise HomeError(path, str(error), "mend the file") from error

    def join(self, policy: Policy, *, new_key: bool = False) -> None:
        """Believe this policy, and begin to follow its log as a witness, or go on under its newer keys.

        `new_key` is its people's word that a log which shares no key with the present policy is the same:
        they compared it, as after a theft.

        Raises:
            HomeError: the site follows another log already, or the log has none of the keys believed so far.
        """
        keys = self._log_keys(policy)
        if self.witness_path.exists():
            before = self._log_keys(self.policy())
            if before[0].name != keys[0].name:
                raise HomeError(
                    self.path, "follows another log already", "keep its policy, or add a new site"
                )
            if not new_key and not set(before) & set(keys):
                raise HomeError(
                    self.path,
                    "believes none of this policy's keys of the log",
                    "compare the new key with the other members, then say so with --new-key",
                )
        else:
            Witness.create(self.witness_path, self.keys().witness_signer(self.name), keys)
        write_durably(self.path / "policy.txt", policy.format().encode())

    def witness(self) -> Witness:
        """Open this site's witness.

        Raises:
            HomeError: the site follows no log yet, or the witness's state is gone or damaged.
        """
        keys = self._log_keys(self.policy())
        try:
            return Witness(self.witness_path, self.keys().witness_signer(self.name), keys)
        except AuditError as error:
            raise HomeError(self.witness_path, str(error), "restore it from the site's own backup") from error

    def _with_rules(self, change: Callable[[Rules], dict[str, Any]]) -> SiteHome:
        """Change the rules in the file as it is now; the agent and the site's people may both do so."""
        with locked(self.path / ".site.lock", 10.0):
            current = SiteHome.open(self.path).config
            changed = current.rules.model_copy(update=change(current.rules))
            home = SiteHome(self.path, current.model_copy(update={"rules": changed}))
            _validated(self.path / _CONFIG, home._document())
            home._write()
        return home

    def _replaced(self, rules: Rules) -> SiteHome:
        return SiteHome(self.path, self.config.model_copy(update={"rules": rules}))

    def _document(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json", by_alias=True, exclude_none=True)

    def _log_keys(self, policy: Policy) -> tuple[NoteVerifier, ...]:
        origins = sorted({log.origin for log in policy.logs})
        if len(origins) != 1:
            raise HomeError(self.path, f"the policy names {len(origins)} logs", "a site follows exactly one")
        return policy.keys_of(origins[0])

    def _write(self) -> None:
        document = self._document()
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
        write_durably(self.path / _CONFIG, text.encode())


def _added(digests: tuple[str, ...], digest: str) -> tuple[str, ...]:
    return tuple(sorted({*digests, digest}))


def _validated(path: Path, document: object) -> SiteConfig:
    try:
        return SiteConfig.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise HomeError(path, f"{key}: {first['msg']}", _FIXES.get(first["type"], "mend this key")) from error
