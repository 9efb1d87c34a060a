"""What a site keeps of its membership: `<home>/network/`.

membership.json   where the coordinator is, its log's key, the invitation's hash, the node key's end
ca.pem            the CA that the invitation pinned
node.key          the key that the SuperNode authenticates with (P-384, OpenSSH)
task.secret       what the relay shows to the SuperNode, so that nobody else on the machine is given a task
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from audit._files import write_durably
from clients.errors import ClientsError, HomeError
from federation.network.invitation import parse_time
from federation.network.pki import read_node_key

FILE: Final = "membership.json"


class NotJoinedError(ClientsError):
    """The site belongs to no federation yet."""

    code = "site.not_joined"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteMembership:
    """Everything but the keys; `approved` is what the coordinator said last."""

    address: str
    log: str  # vkey
    invitation: str  # hash
    label: str
    node_expires: str
    approved: bool
    node_lifetime_s: float = 365 * 86_400.0  # of a node key, from its making

    @property
    def url(self) -> str:
        return f"https://{self.address}"


@dataclass(frozen=True, slots=True)
class NetworkFolder:
    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def node_key(self) -> Path:
        return self.folder / "node.key"

    @property
    def next_node_key(self) -> Path:
        return self.folder / "node.key.next"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def sockets(self) -> Path:
        return self.folder / "run"

    @property
    def bell(self) -> Path:
        """Where the SuperNode rings for the relay."""
        return self.sockets / "bell"

    @property
    def task_secret(self) -> Path:
        """What the relay shows to the SuperNode for each task."""
        return self.folder / "task.secret"

    @property
    def pid_file(self) -> Path:
        return self.folder / "up.pid"

    def exists(self) -> bool:
        return (self.folder / FILE).is_file()

    def write(self, membership: SiteMembership) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_durably(self.folder / FILE, json.dumps(dataclasses.asdict(membership), indent=1).encode())

    def read(self) -> SiteMembership:
        """Read the membership.

        Raises:
            NotJoinedError: there is none.
            HomeError: the file is damaged.
        """
        path = self.folder / FILE
        try:
            document: Any = json.loads(path.read_bytes())
            membership = SiteMembership(**document)
            parse_time(membership.node_expires)
        except FileNotFoundError as error:
            raise NotJoinedError(
                f"{self.folder.parent}: belongs to no federation; run `affidavit site join INVITATION`"
            ) from error
        except (OSError, ValueError, TypeError) as error:
            raise HomeError(
                path, f"cannot be read: {error}", "restore it from the site's own backup"
            ) from error
        return membership

    def node_public_key(self) -> str:
        return read_node_key(self.node_key)


def network_folder(home: Path) -> NetworkFolder:
    """Return the network folder of a site's home."""
    return NetworkFolder(home / "network")
