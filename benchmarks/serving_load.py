"""Servers under load for `bench_serve.py`: started, asked by `wrk`, and their CPU read from /proc."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PORT_WAIT_S = 60.0
TICKS = os.sysconf("SC_CLK_TCK")


def row() -> list[float]:
    return [round((k * 37 % 100) / 50 - 1, 4) for k in range(30)]


def request_body(rows: int = 1) -> str:
    inputs = [{"name": "rows", "shape": [rows, 30], "datatype": "FP32", "data": row() * rows}]
    return json.dumps({"inputs": inputs, "parameters": {"purpose": "triage"}})


def tree(pid: int) -> list[int]:
    found = [pid]
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += tree(int(child))
    return found


def cpu_s(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
    return total / TICKS


def wrk(url: str, script: Path, seconds: float, connections: int) -> str:
    return subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", "-s", str(script), url],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def milliseconds(text: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)(us|ms|s)", text).groups()
    return float(number) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[unit]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(command: list[str], folder: Path, environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "out.txt").open("wb") as out:
        process = subprocess.Popen(
            command, cwd=folder, stdout=out, stderr=out, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(url: str, body: str, headers: dict[str, str], process: subprocess.Popen[bytes]) -> str:
    until = time.monotonic() + PORT_WAIT_S
    last = ""
    while time.monotonic() < until and process.poll() is None:
        request = urllib.request.Request(  # noqa: S310 - our own address
            url, body.encode(), {"Content-Type": "application/json", **headers}
        )
        try:
            with urllib.request.urlopen(request, timeout=5) as reply:  # noqa: S310
                return "" if reply.status == 200 else f"status {reply.status}"
        except OSError as error:
            last = str(error)
            time.sleep(0.3)
    return f"it never answered ({last or 'it ended'})"


def lua(folder: Path, path: str, body: str, headers: dict[str, str]) -> Path:
    lines = ['wrk.method = "POST"', f'wrk.path = "{path}"', f"wrk.body = [[{body}]]"]
    lines += [f'wrk.headers["{name}"] = "{value}"' for name, value in headers.items()]
    script = folder / "request.lua"
    script.write_text("\n".join([*lines, 'wrk.headers["Content-Type"] = "application/json"']) + "\n")
    return script


def ours(
    folder: Path, workers: int, database: str | None = None
) -> tuple[list[str], dict[str, str], dict[str, str], str]:
    from serving_home import MODEL, make_home

    from server.journal import utc_now
    from server.keys import KeyStore

    if not (folder / "home").exists():
        make_home(folder / "home", database)
    store = KeyStore(folder / "home" / "coordinator", utc_now)
    key, _ = store.create(role="consumer")
    store.close()
    affidavit = str(Path(sys.executable).with_name("affidavit"))
    command = [affidavit, "serve", "--home", str(folder / "home"), "--port", "PORT", "--log-level", "warning"]
    if workers > 1:
        command += ["--workers", str(workers)]
    quota = {"AFFIDAVIT_QUOTA_ROWS_PER_MINUTE": "0", "AFFIDAVIT_QUOTA_ROWS_PER_DAY": "0"}
    return command, {"Authorization": f"Bearer {key}"}, quota, f"/v2/models/{MODEL}/infer"
