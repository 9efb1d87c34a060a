"""A server of the own federation, run in this process, and the same homes from every side."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from audit.console import call_api
from audit.errors import AuditError
from federation.errors import FederationError
from server.app import create_app
from server.errors import ServerError
from server.settings import Settings


@dataclass(frozen=True)
class Served:
    """A running server and the same homes, from every side."""

    own: Any
    url: str
    keys: dict[str, str]
    key_files: dict[str, Any]
    context: Any

    def http(self, role: str, method: str, path: str, body: Any = None) -> tuple[str, Any]:
        status, data, _ = call_api(self.url, path, key=self.keys[role], method=method, body=body)
        document = json.loads(data)
        return ("ok", document) if status < 400 else (document["code"], document)

    def command(self, *arguments: object) -> tuple[str, Any]:
        result = self.own.run(*arguments, "--json")
        return self._outcome(result)

    def remote(self, role: str, *arguments: object) -> tuple[str, Any]:
        result = self.own.run(*arguments, "--url", self.url, "--key-file", self.key_files[role], "--json")
        return self._outcome(result)

    def python(self, call: Callable[[], Any]) -> tuple[str, Any]:
        try:
            return "ok", call()
        except (AuditError, FederationError, ServerError) as error:
            return error.code, error

    @staticmethod
    def _outcome(result: Any) -> tuple[str, Any]:
        document = result.json
        return (document["error"]["code"], document) if result.code else ("ok", document)


@contextmanager
def serving(own: Any) -> Iterator[Served]:
    own.approve()
    keys, files = {}, {}
    for role in ("officer", "operator", "consumer", "node"):
        files[role] = own.folder / f"{role}.key"
        assert own.run("keys", "create", "--role", role, "--out", files[role]).code == 0
        keys[role] = files[role].read_text().strip()
    settings = Settings(
        coordinator_home=own.homes / "coordinator", signer_home=own.homes / "signer", publish_interval_s=3_600
    )
    app = create_app(settings)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Served(own, f"http://127.0.0.1:{port}", keys, files, app.state.context)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
