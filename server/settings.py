"""The server's settings: one frozen object, read at the edge, each value with its source.

Order: flag > environment > file > default. The file is `config.yaml` in the coordinator's home, under the key
`server`; the environment names are `AFFIDAVIT_` and the setting's name in capitals.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from audit.errors import LocationError
from audit.signing_home import signer_home_of
from server.errors import SettingsError

PREFIX: Final = "AFFIDAVIT_"
OTHER_VARIABLES: Final = frozenset({  # what commands and agents read besides the server's settings
    "AGENT", "API_KEY", "DATABASE", "DATABASE_PASSWORD", "DATABASE_PASSWORD_FILE", "DEBUG", "HOME",
    "PASSPHRASE", "RELAY_BELL", "SIGNER_PASSPHRASE", "SIGNER_PASSPHRASE_FILE", "SITES", "SUPERNODE_POLL_S",
    "VAULT", "VAULT_PASSPHRASE", "VAULT_PASSPHRASE_FILE",
})  # fmt: skip
_OF_KUBERNETES: Final = re.compile(r"SERVICE_|PORT_[0-9]+_")


class Settings(BaseModel, frozen=True, extra="forbid"):
    """All that the server may be told."""

    coordinator_home: Path = Path(".affidavit/coordinator")
    signer_home: Path = Path(".affidavit/signer")
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    grpc_port: Annotated[int, Field(ge=0, le=65_535)] | None = (
        None  # the inference protocol over gRPC; else off
    )
    workers: Annotated[int, Field(ge=1, le=64)] = 1  # processes that answer on one port
    worker_silence_s: Annotated[float, Field(ge=2, le=3_600)] = 60.0  # a stuck worker is replaced
    drain_s: Annotated[float, Field(ge=0, le=300)] = 0.0  # unready for so long before it stops
    policies: Path | None = None  # a Cedar file in place of the shipped rules
    max_body_bytes: Annotated[int, Field(ge=1_024, le=64 * 2**20)] = 1_048_576
    max_rows: Annotated[int, Field(ge=1, le=16_384)] = 1_024  # of one request: one entry, a tree of rows
    max_header_bytes: Annotated[int, Field(ge=4_096, le=2**20)] = 65_536  # request line and header fields
    header_timeout_s: Annotated[float, Field(gt=0, le=600)] = 10.0  # from a request's first byte
    max_connections: Annotated[int, Field(ge=16, le=1_000_000)] = 4_096  # of a worker
    body_timeout_s: Annotated[float, Field(gt=0, le=600)] = 10.0
    request_timeout_s: Annotated[float, Field(gt=0, le=3_600)] = 30.0
    max_in_flight: Annotated[int, Field(ge=1, le=65_536)] = 512  # requests that a worker takes at once
    shed_latency_s: Annotated[float, Field(gt=0, le=600)] = 1.0  # slower answers lower that number
    access_log: bool = True  # a line for each request
    log_format: Literal["ecs", "text"] = "ecs"
    otlp_endpoint: str = ""  # an OTLP/HTTP collector's address for traces; "": none are made
    trace_share: Annotated[float, Field(ge=0, le=1)] = 0.01  # of the requests
    explain_timeout_s: Annotated[float, Field(gt=0, le=600)] = 10.0
    answer_cache_size: Annotated[int, Field(ge=0, le=1_000_000)] = (
        4_096  # requests; 0: none, whatever a charter
    )
    answer_cache_s: Annotated[float, Field(gt=0, le=86_400)] = 300.0
    publish_interval_s: Annotated[float, Field(gt=0, le=3_600)] = 0.5  # a checkpoint is at most so old
    merge_delay_s: Annotated[int, Field(ge=1, le=86_400)] = 3_600
    checkpoint_late_s: Annotated[float, Field(ge=1, le=86_400)] = 1_800.0  # then nothing is answered
    key_cache_s: Annotated[float, Field(ge=0, le=600)] = 60.0
    key_recheck_s: Annotated[float, Field(ge=0, le=5)] = 2.0  # a revocation elsewhere takes at most so long
    rules_follow_s: Annotated[float, Field(gt=0, le=5)] = 1.0  # so do changed rules and raised alarms
    quota_rows_per_minute: Annotated[int, Field(ge=0)] = 0  # of one principal, over all workers; 0: no limit
    quota_rows_per_day: Annotated[int, Field(ge=0)] = 0
    oidc_issuer: str = ""  # the `iss` of bearer tokens; "": API keys alone
    oidc_audience: str = ""  # the `aud` that a token must name
    oidc_jwks_url: str = ""  # where its keys are; "": as its openid-configuration says
    oidc_role_claim: str = "affidavit_role"
    oidc_region_claim: str = "affidavit_region"
    oidc_models_claim: str = "affidavit_models"
    oidc_site_claim: str = "affidavit_site"
    oidc_stale_s: Annotated[float, Field(ge=0, le=86_400)] = 3_600.0  # old keys count so long, issuer down
    mtls_header: str = ""  # holds the client certificate, set by a proxy; "": no such identity
    mtls_trusted_proxies: tuple[str, ...] = ()  # the addresses or networks that may set it
    public_tiles: bool = False  # hash tiles without a key: for a log whose size and rate are no secret
    log_level: str = "INFO"

    @model_validator(mode="after")
    def _keeps_its_promises(self) -> Settings:
        """An answer's receipt promises a checkpoint within `merge_delay_s`."""
        if "checkpoint_late_s" in self.model_fields_set and self.checkpoint_late_s > self.merge_delay_s:
            raise ValueError("checkpoint_late_s: at most merge_delay_s, which receipts promise")
        return self

    @model_validator(mode="after")
    def _has_a_port_for_each(self) -> Settings:
        if self.grpc_port is not None and self.grpc_port == self.port != 0:
            raise ValueError(f"grpc_port: {self.port} is the port of HTTP; choose another")
        return self

    def address(self, port: int) -> str:
        """Return host and port as URLs write them: an IPv6 address stands in brackets."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"

    @property
    def late_s(self) -> float:
        """How long an entry may wait for a checkpoint before nothing is answered any more."""
        return min(self.checkpoint_late_s, self.merge_delay_s)

    @field_validator("mtls_trusted_proxies", mode="before")
    @classmethod
    def _by_commas(cls, value: Any) -> Any:
        """The environment holds one text."""
        return tuple(filter(None, value.replace(" ", "").split(","))) if isinstance(value, str) else value


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Return, for each AFFIDAVIT_… of the environment that nothing reads, what to tell the operator.

    What Kubernetes sets for a service of that name (AFFIDAVIT_SERVICE_HOST, AFFIDAVIT_PORT_80_TCP) is let be.
    """
    known = {name.upper() for name in Settings.model_fields} | OTHER_VARIABLES
    told = []
    for name in sorted(name.removeprefix(PREFIX) for name in environ if name.startswith(PREFIX)):
        if name in known or _OF_KUBERNETES.match(name):
            continue
        close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
        meant = f"; {PREFIX}{close[0]} is one" if close else ""
        told.append(f"{PREFIX}{name} is no setting, and is ignored{meant}")
    return told


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSettings:
    settings: Settings
    sources: Mapping[str, str]  # setting -> "flag" | "environment NAME" | "file PATH" | "default"


def load_settings(
    *,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    base: Path | None = None,
) -> LoadedSettings:
    """Collect the settings from every source.

    Args:
        flags: what the command line gave; a value of None was not given.
        environ: the environment; the process's own when None.
        base: the folder that holds the homes, in place of `.affidavit`.

    Raises:
        SignerElsewhereError: the home is a copy, and names the original's signer.
        SettingsError: a value or a name is not one of `Settings`; the message says where it came from.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    sources: dict[str, str] = dict.fromkeys(Settings.model_fields, "default")
    if base is None and environ.get(PREFIX + "HOME"):
        base, origin = Path(environ[PREFIX + "HOME"]), f"environment {PREFIX}HOME"
    else:
        origin = "flag"
    if base is not None:
        for name, role in (("coordinator_home", "coordinator"), ("signer_home", "signer")):
            values[name], sources[name] = base / role, origin
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    for name in Settings.model_fields:
        variable = PREFIX + name.upper()
        if environ.get(variable):
            values[name], sources[name] = environ[variable], f"environment {variable}"
    for name, value in given.items():
        values[name], sources[name] = value, "flag"
    home = Path(values.get("coordinator_home", Settings().coordinator_home))
    path = home / "config.yaml"
    for name, value in _file_values(path).items():
        if sources.get(name, "default") == "default":
            values[name], sources[name] = value, f"file {path}"
    signer = PREFIX + "SIGNER_HOME"
    if not environ.get(signer) and "signer_home" not in given:
        with contextlib.suppress(LocationError):  # no home yet, or one that names no signer
            values["signer_home"], sources["signer_home"] = signer_home_of(home, environ), f"file {path}"
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        source = sources.get(name, "flag")
        raise SettingsError(f"{name} (from {source}): {first['msg']}; correct it there") from error
    return LoadedSettings(settings=settings, sources=sources)


def _file_values(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: is not readable YAML ({error}); correct or remove it") from error
    section = (document or {}).get("server") or {} if isinstance(document, dict) or document is None else None
    if not isinstance(section, dict):
        raise SettingsError(f"{path}: `server` must hold settings by name")
    unknown = sorted(set(section) - set(Settings.model_fields))
    if unknown:
        raise SettingsError(f"{path}: unknown settings {unknown}; known are {sorted(Settings.model_fields)}")
    return {str(name): value for name, value in section.items()}
