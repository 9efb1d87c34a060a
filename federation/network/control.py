"""The coordinator's own line to its SuperLink: which nodes there are, runs to start and to stop.

SuperLink's Control API knows no authentication, so SuperLink listens on loopback alone and the gateway lets
no control route through. This is the one module that calls it; Flower is pinned to one minor version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab

from federation.network.errors import RunControlError

TIMEOUT_S: Final = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A SuperNode as SuperLink knows it."""

    node_id: int
    public_key: bytes  # PEM
    name: str
    status: str


@dataclass(frozen=True, slots=True)
class SuperLinkControl:
    address: str  # host:port on loopback
    ca: Path

    def nodes(self) -> tuple[Node, ...]:
        """Return the registered nodes.

        Raises:
            RunControlError: SuperLink does not answer.
        """
        with self._client() as client:
            answer = client.ListNodes(ListNodesRequest())
        return tuple(
            Node(node_id=node.node_id, public_key=bytes(node.public_key), name=node.name, status=node.status)
            for node in answer.nodes_info
            if node.status != "unregistered"
        )

    def register(self, public_key: bytes, name: str) -> int:
        """Register a node's PEM key; return its id."""
        with self._client() as client:
            return int(client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name)).node_id)

    def unregister(self, node_id: int) -> None:
        with self._client() as client:
            client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def start_run(self, bundle: bytes, config: Mapping[str, str | int | float | bool]) -> int:
        """Submit an app bundle; return SuperLink's number of the run."""
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        request = StartRunRequest(
            fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(config)), federation=""
        )
        with self._client() as client:
            answer = client.StartRun(request)
        if not answer.HasField("run_id"):
            raise RunControlError(f"SuperLink took no run: {answer.note or 'no reason given'}")
        return int(answer.run_id)

    def stop_run(self, number: int) -> bool:
        with self._client() as client:
            return bool(client.StopRun(StopRunRequest(run_id=number)).success)

    def run_status(self, number: int) -> str:
        """Return "pending", "running", "finished:completed", … or "" when SuperLink knows no such run."""
        with self._client() as client:
            answer = client.ListRuns(ListRunsRequest(run_id=number))
        run = answer.run_dict.get(number)
        if run is None:
            return ""
        status = run.status
        return f"{status.status}:{status.sub_status}" if status.sub_status else str(status.status)

    @contextmanager
    def _client(self) -> Iterator[ControlHttpClient]:
        client = ControlHttpClient.from_server_address(
            self.address, insecure=False, root_certificates=self.ca.read_bytes(), interceptors=()
        )
        try:
            yield client
        except httpx.HTTPStatusError as error:
            text = error.response.text[:200]
            raise RunControlError(f"SuperLink refuses ({error.response.status_code}): {text}") from error
        except httpx.HTTPError as error:
            raise RunControlError(
                f"SuperLink at {self.address} does not answer ({error}); "
                "is `affidavit coordinator up` running?"
            ) from error
        finally:
            client.close()
