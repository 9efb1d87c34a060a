"""How a coordinator is reached: `<home>/network/network.yaml`, written by `affidavit coordinator init`."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import yaml
from pydantic import BaseModel, Field, StringConstraints, ValidationError

from audit._files import write_durably
from federation.network.errors import NetworkError
from federation.network.pki import Pki

FILE: Final = "network.yaml"

Port = Annotated[int, Field(ge=1, le=65_535)]


class NetworkSettings(BaseModel, frozen=True, extra="forbid"):
    """Where what listens. Only the gateway is meant for others; the rest is loopback."""

    public_host: Annotated[str, StringConstraints(min_length=1, max_length=253)]  # what invitations name
    bind: str = "0.0.0.0"  # noqa: S104 - the gateway is the one thing that the world may reach
    port: Port = 8443
    superlink_port: Port = 18443
    api_port: Port = 8000
    max_body_bytes: Annotated[int, Field(ge=1 << 20, le=256 << 20)] = 8 << 20
    body_timeout_s: Annotated[float, Field(gt=0, le=600)] = 30.0
    requests_per_s: Annotated[float, Field(gt=0)] = 60.0  # a node
    burst: Annotated[int, Field(ge=1)] = 400
    certificate_s: Annotated[float, Field(ge=15, le=90 * 86_400)] = (
        90 * 86_400
    )  # how long the gateway's lasts
    superexec_poll_s: Annotated[float, Field(gt=0, le=10)] = 0.5

    @property
    def address(self) -> str:
        host = f"[{self.public_host}]" if ":" in self.public_host else self.public_host
        return f"{host}:{self.port}"

    @property
    def superlink(self) -> str:
        return f"127.0.0.1:{self.superlink_port}"


@dataclass(frozen=True, slots=True)
class NetworkHome:
    """The `network` folder in a coordinator's home."""

    folder: Path

    @classmethod
    def create(cls, coordinator_home: Path, settings: NetworkSettings) -> NetworkHome:
        """Write the settings and the secret that SuperExec shows to SuperLink.

        Raises:
            NetworkError: they are there already.
        """
        home = cls(coordinator_home / "network")
        if (home.folder / FILE).exists():
            raise NetworkError(
                f"{home.folder / FILE} exists; edit it, and start `affidavit coordinator up` anew"
            )
        home.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_durably(home.superexec_secret, secrets.token_hex(32).encode())
        text = yaml.safe_dump(settings.model_dump(), sort_keys=False)
        write_durably(home.folder / FILE, text.encode())
        return home

    @classmethod
    def open(cls, coordinator_home: Path) -> NetworkHome:
        """Raises NetworkError when `coordinator init` was not run."""
        home = cls(coordinator_home / "network")
        if not (home.folder / FILE).is_file():
            raise NetworkError(
                f"{coordinator_home}: has no network part; run `affidavit coordinator init` first"
            )
        return home

    @classmethod
    def exists(cls, coordinator_home: Path) -> bool:
        """Whether `coordinator init` was run there."""
        return (coordinator_home / "network" / FILE).is_file()

    def settings(self) -> NetworkSettings:
        """Read the settings.

        Raises:
            NetworkError: names the key and what is wrong with it.
        """
        path = self.folder / FILE
        try:
            document: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
            return NetworkSettings.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "the file"
            raise NetworkError(f"{path}: {key}: {first['msg']}; mend this key") from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise NetworkError(f"{path}: cannot be read: {error}") from error

    @property
    def pki(self) -> Pki:
        return Pki(self.folder / "tls")

    @property
    def superexec_secret(self) -> Path:
        return self.folder / "superexec.secret"

    @property
    def superlink_database(self) -> Path:
        return self.folder / "superlink.db"

    @property
    def flower_home(self) -> Path:
        return self.folder / "flower"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"
