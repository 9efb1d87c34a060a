"""Load on a real server in processes of its own: callers that count what they were told."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

ROW = {"age": 51, "fever": True, "ward": "north"}
BODY = json.dumps({"purpose": "triage", "rows": [ROW]}).encode()


@dataclass
class Served:
    """A running `affidavit serve`."""

    process: subprocess.Popen
    url: str

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        found = []
        for child in map(int, children.split()):
            with suppress(OSError):
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(child)
        return found

    def connections(self, worker: int) -> int:
        """How many connections one worker holds."""
        port = f":{urlsplit(self.url).port:04X}"
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        ours = {row[9] for row in rows if row[1].endswith(port) and row[3] == "01"}
        held = 0
        for file in Path(f"/proc/{worker}/fd").iterdir():
            with suppress(OSError):
                held += str(file.readlink()).removeprefix("socket:[").removesuffix("]") in ours
        return held

    def is_ready(self) -> bool:
        host = urlsplit(self.url).netloc
        connection = http.client.HTTPConnection(host, timeout=5)
        try:
            connection.request("GET", "/readyz")
            reply = connection.getresponse()
            reply.read()
            return reply.status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


@contextmanager
def served(home: Path, *options: str, environ: dict[str, str] | None = None):
    """Run `affidavit serve` on this home until the block ends."""
    affidavit = Path(sys.executable).with_name("affidavit")
    with (home.parent / "serve.err").open("w") as errors:
        process = subprocess.Popen(
            [affidavit, "serve", "--home", str(home), "--port", "0", "--json", *options],
            stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, "AFFIDAVIT_LOG_LEVEL": "warning", **(environ or {})},
        )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert line, (home.parent / "serve.err").read_text()[-2000:]
        running = Served(process, json.loads(line)["url"])
        until = time.monotonic() + 180
        while not running.is_ready():
            assert time.monotonic() < until, "never ready"
            time.sleep(0.1)
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@dataclass
class Told:
    """What the callers were told."""

    answers: list[dict] = field(default_factory=list)
    shed: int = 0  # 429 or 503
    codes: set[str] = field(default_factory=set)  # of what was shed
    errors: list[str] = field(default_factory=list)
    broken: int = 0  # connections that ended without an answer


class Load:
    """Some callers, each one request after the other, until stopped."""

    def __init__(self, url: str, token: str, callers: int) -> None:
        self._host, self._token = urlsplit(url).netloc, token
        self.told = Told()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(callers)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _call(self) -> None:
        headers = {"Authorization": f"Bearer {self._token}"}
        connection = http.client.HTTPConnection(self._host, timeout=60)
        with closing(connection):
            self._ask(connection, headers)

    def _ask(self, connection: http.client.HTTPConnection, headers: dict[str, str]) -> None:
        while not self._stop.is_set():
            try:
                connection.request("POST", "/v1/models/toy/predict", BODY, headers)
                reply = connection.getresponse()
                data = reply.read()
            except (OSError, http.client.HTTPException):
                self.told.broken += 1
                connection.close()
                time.sleep(0.02)
                continue
            if reply.status == 200:
                answer = json.loads(data)
                self.told.answers.append(
                    {
                        "at": time.monotonic(),
                        "leaf_index": answer["entry"]["leaf_index"],
                        "leaf_hash": answer["entry"]["leaf_hash"],
                        "version": answer["version"],
                        "probability": answer["answers"][0]["probability"],
                    }
                )
            elif reply.status in (429, 503):
                self.told.shed += 1
                self.told.codes.add(json.loads(data)["code"])
                if not reply.getheader("Retry-After", "").isdigit():
                    self.told.errors.append(f"{reply.status} without Retry-After")
                time.sleep(0.05)
            else:
                self.told.errors.append(f"{reply.status} {data[:200]!r}")


def check_log(lab, told: Told, *, exactly: bool) -> int:
    """Compare answers with the log; return how many entries no caller was told of.

    Every answer is in the log, as it was told, by the version that it names. With `exactly` no entry is there
    that nobody was told of.
    """
    entries = {}
    after = None
    while True:
        page = lab.coordinator.ledger.search(type="prediction", after=after, limit=1000)
        entries.update({row.leaf_index: row for row in page})
        if len(page) < 1000:
            break
        after = page[-1].leaf_index
    places = [answer["leaf_index"] for answer in told.answers]
    assert len(set(places)) == len(places), "two answers share an entry"
    missing = [place for place in places if place not in entries]
    assert not missing, f"{len(missing)} answers are not in the log"
    for answer in told.answers:
        row = entries[answer["leaf_index"]]
        assert row.leaf_hash.hex() == answer["leaf_hash"]
        assert row.columns.version == answer["version"]
    untold = len(entries) - len(places)
    if exactly:
        assert untold == 0, f"{untold} entries that no caller was told of"
    return untold
