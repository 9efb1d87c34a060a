"""Small HTTP servers for tests: one that answers as it is told, and one that is a site's real witness."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, bytes], tuple[int, bytes]]


@contextmanager
def answering(answer: Answer, **headers: str) -> Iterator[str]:
    """Yield the address of a server whose answers are `answer(path, body)`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            status, body = answer(self.path, self.rfile.read(size))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - the library's name

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """A caller that hangs up is what some tests are about."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def witnessing(server: Any) -> Iterator[str]:
    """Yield the address of a site's `WitnessServer`."""

    def answer(path: str, body: bytes) -> tuple[int, bytes]:
        if path.endswith("/add-checkpoint"):
            status, _, data = server.add_checkpoint(body)
        elif path == server._show:
            status, _, data = server._show_last(health=False)
        else:
            return 404, b"no such path\n"
        return status, data

    with answering(answer) as url:
        yield url
