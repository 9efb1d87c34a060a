"""Answers a CPU-second beside other servers: the same MLP 30-64-64-2, the same row, side by side in one run.

    python benchmarks/bench_serve.py [--part peers|scale|all] [--seconds 5] [--repeats 5] [--connections 16]
                                     [--only NAME …] [--write]

Ours is the whole pipeline: an API key, Cedar's decision, the facts for it, metrics, and a durable entry in
the log before each answer. The others answer bare. Each runs as its users would run it, one worker, in an
environment of its own under build/ (made here by pip on first use; what cannot be installed is left out, and
why is said). CPU is that of the server's whole process tree, by /proc; load is `wrk -t1`.

The part `scale` runs ours with one worker and with two, over SQLite and over PostgreSQL, and counts beside
the server's CPU the database's and the load generator's: on two cores all of them share what two workers
would need for themselves.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEERS = HERE / "serving_peers"
BUILD = ROOT / "build"
PORT_WAIT_S = 60.0
TICKS = os.sysconf("SC_CLK_TCK")
ENVIRONMENTS = {  # name -> what pip installs
    "mlserver": ["mlserver==1.7.1", "onnxruntime", "uvloop<0.22"],
    "kserve": ["kserve==0.21.0", "onnxruntime"],
    "bentoml": ["bentoml==1.4.39", "onnxruntime"],
}


@dataclass
class Result:
    name: str
    per_cpu_s: list[float] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    errors: int = 0


def row() -> list[float]:
    return [round((k * 37 % 100) / 50 - 1, 4) for k in range(30)]


def request_body() -> str:
    inputs = [{"name": "rows", "shape": [1, 30], "datatype": "FP32", "data": row()}]
    return json.dumps({"inputs": inputs, "parameters": {"purpose": "triage"}})


def environment(name: str) -> Path | str:
    """Return the interpreter of a peer's environment, or why there is none."""
    python = BUILD / f"bench-{name}" / "bin" / "python"
    whole = python.parent.parent / "whole"  # written last: an installation that broke off is begun again
    if whole.exists():
        return python
    shutil.rmtree(python.parent.parent, ignore_errors=True)
    BUILD.mkdir(exist_ok=True)
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(python.parent.parent)], capture_output=True, text=True, check=False
    )
    if made.returncode == 0:
        made = subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", *ENVIRONMENTS[name]],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if made.returncode:
        shutil.rmtree(python.parent.parent, ignore_errors=True)
        return (made.stderr.strip().splitlines() or ["pip failed"])[-1][:200]
    whole.touch()
    return python


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
    import socket

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


def measure(result: Result, pid: int, url: str, script: Path, seconds: float, connections: int) -> None:
    wrk(url, script, 2, connections)
    pids = tree(pid)
    before = cpu_s(pids)
    text = wrk(url, script, seconds, connections)
    spent = cpu_s(pids) - before
    count = int(re.search(r"([0-9]+) requests in", text).group(1))
    failed = re.search(r"Non-2xx or 3xx responses: ([0-9]+)", text)
    sockets = re.search(r"Socket errors: (.*)", text)
    result.errors += int(failed.group(1)) if failed else 0
    result.errors += sum(map(int, re.findall(r"[0-9]+", sockets.group(1)))) if sockets else 0
    result.per_cpu_s.append(count / spent)
    result.per_s.append(float(re.search(r"Requests/sec: +([0-9.]+)", text).group(1)))
    result.p50_ms.append(milliseconds(re.search(r"50% +(\S+)", text).group(1)))
    result.p99_ms.append(milliseconds(re.search(r"99% +(\S+)", text).group(1)))


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


def peer(name: str, python: Path | str, folder: Path) -> tuple[list[str], dict[str, str], str]:
    """Return command, environment and path of one peer; its folder holds the weights."""
    common = {"BENCH_PORT": "PORT", "BENCH_MODEL": str(folder / "model.onnx")}
    match name:
        case "fastapi":
            return [str(python), str(PEERS / "plain_fastapi.py")], common, "/v2/models/bench/infer"
        case "kserve":
            return [str(python), str(PEERS / "kserve_server.py")], common, "/v2/models/bench/infer"
        case "mlserver":
            shutil.copy(PEERS / "mlserver_model.py", folder)
            settings = {"name": "bench", "implementation": "mlserver_model.Bench"}
            (folder / "model-settings.json").write_text(json.dumps(settings))
            command = [str(Path(python).with_name("mlserver")), "start", str(folder)]
            environ = {**common, "MLSERVER_PARALLEL_WORKERS": "0", "MLSERVER_HTTP_PORT": "PORT",
                       "MLSERVER_GRPC_PORT": "PORT2", "MLSERVER_METRICS_PORT": "PORT3",
                       "PYTHONPATH": str(folder)}  # fmt: skip
            return command, environ, "/v2/models/bench/infer"
        case _:
            bento = str(Path(python).with_name("bentoml"))
            command = [bento, "serve", "bento_service:Bench", "--port", "PORT"]
            shutil.copy(PEERS / "bento_service.py", folder)
            return command, {**common, "BENTOML_DO_NOT_TRACK": "1"}, "/infer"


def export(path: Path) -> None:
    """The peers run the very file that ours serves, under the protocol's own names."""
    from serving_home import LAYERS

    from audit.models import initial_weights
    from federation.onnx_export import export_onnx

    path.write_bytes(export_onnx(LAYERS, initial_weights(LAYERS, "ab" * 32), 30))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("peers", "scale", "all"), default="all")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--write", action="store_true", help="write docs/results/serving.md")
    asked = parser.parse_args()
    if shutil.which("wrk") is None:
        print("wrk is not installed: apt-get install wrk", file=sys.stderr)
        return 2
    sys.path[:0] = [str(HERE), str(ROOT)]
    known = ("ours", "two", "fastapi", "mlserver", "kserve", "bentoml")
    names = [name for name in known if not asked.only or name in asked.only]
    if asked.part != "scale":
        results: dict[str, Result] = {}
        skipped: dict[str, str] = {}
        with tempfile.TemporaryDirectory() as base:
            for repeat in range(asked.repeats):
                for name in names if repeat % 2 == 0 else names[::-1]:
                    if name not in skipped:
                        problem = one(name, Path(base), results, asked)
                        if problem:
                            skipped[name] = problem
        show(page(results, skipped, asked), write=asked.write)
    if asked.part != "peers" and not asked.only:
        show(scale_page(scale(asked), asked), write=asked.write)
    return 0


def show(text: str, *, write: bool) -> None:
    """Print a part, and put it in place of the page's part with the same heading."""
    print(text)
    if not write:
        return
    path = ROOT / "docs" / "results" / "serving.md"
    parts = re.split(r"(?m)^(?=## )", path.read_text(encoding="utf-8"))
    heading = text.split("\n", 1)[0]
    at = next((k for k, part in enumerate(parts) if part.startswith(heading + "\n")), None)
    if at is None:
        parts.append("\n" + text)
    else:
        parts[at] = text + ("\n" if at + 1 < len(parts) else "")
    path.write_text("".join(parts), encoding="utf-8")


def one(name: str, base: Path, results: dict[str, Result], asked: argparse.Namespace) -> str:
    folder = base / name
    folder.mkdir(exist_ok=True)
    body, headers = request_body(), {}
    if name in ("ours", "two"):
        command, headers, environ, path = ours(folder, 2 if name == "two" else 1)
    else:
        python = sys.executable if name == "fastapi" else environment(name)
        if not isinstance(python, Path) and name != "fastapi":
            return f"cannot be installed: {python}"
        export(folder / "model.onnx")
        command, environ, path = peer(name, python, folder)
        if name == "bentoml":
            body = json.dumps({"request": json.loads(body)})
    ports = [str(free_port()) for _ in range(3)]

    def fill(text: str) -> str:
        return ports[("PORT", "PORT2", "PORT3").index(text)] if text in ("PORT", "PORT2", "PORT3") else text

    command = [fill(part) for part in command]
    environ = {key: fill(value) for key, value in environ.items()}
    url = f"http://127.0.0.1:{ports[0]}"
    with running(command, folder, environ) as process:
        problem = wait_for(url + path, body, headers, process)
        if problem:
            tail = (folder / "out.txt").read_text(errors="replace").strip().splitlines()[-1:]
            return f"{problem}; {' '.join(tail)[:160]}"
        result = results.setdefault(name, Result(name))
        measure(result, process.pid, url, lua(folder, path, body, headers), asked.seconds, asked.connections)
    return ""


@dataclass
class Scaled:
    """One database with so many workers: a CPU-second is one of any process, a second one of the clock."""

    database: str
    workers: int
    per_s: list[float] = field(default_factory=list)
    per_cpu_s: list[float] = field(default_factory=list)  # of the workers' CPU
    busy: list[tuple[float, ...]] = field(default_factory=list)  # cores: each worker's, database's, load's
    p99_ms: list[float] = field(default_factory=list)
    errors: int = 0


def scale(asked: argparse.Namespace) -> list[Scaled] | str:
    """Return what one and two workers do over each database; a text where something cannot run."""
    found: list[Scaled] = []
    with tempfile.TemporaryDirectory() as base, postgresql() as server:
        for database in ("SQLite", "PostgreSQL") if server else ("SQLite",):
            url = server.new_database() if server and database == "PostgreSQL" else None
            pair = [Scaled(database, workers) for workers in (1, 2)]
            for repeat in range(asked.repeats):
                for each in pair if repeat % 2 == 0 else pair[::-1]:
                    problem = scaled(each, Path(base) / database, url, server, asked)
                    if problem:
                        return f"{database}, {each.workers} workers: {problem}"
            found += pair
    return found


@contextmanager
def postgresql() -> Iterator[Any]:
    """A server of our own where its binaries are installed, as the tests start one, else None."""
    spec = importlib.util.spec_from_file_location("bench_postgresql", ROOT / "tests" / "postgresql.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.why_not():
        yield None
        return
    with module.running_server() as server:
        yield server


def scaled(each: Scaled, folder: Path, url: str | None, server: Any, asked: argparse.Namespace) -> str:
    folder.mkdir(exist_ok=True)
    command, headers, environ, path = ours(folder, each.workers, url)
    port = str(free_port())
    address = f"http://127.0.0.1:{port}"
    body = request_body()
    with running([port if part == "PORT" else part for part in command], folder, environ) as process:
        problem = wait_for(address + path, body, headers, process)
        if problem:
            return problem
        script = lua(folder, path, body, headers)
        wrk(address, script, 4, SCALE_CONNECTIONS)  # until both workers are up and warm
        own = [process.pid] if each.workers == 1 else workers_of(process.pid)
        postmaster = int((server.folder / "data" / "postmaster.pid").read_text().split()[0]) if url else 0
        before = [cpu_s([pid]) for pid in own], cpu_s(tree(postmaster)) if url else 0.0
        children = os.times()
        text = wrk(address, script, asked.seconds, SCALE_CONNECTIONS)
        after = os.times()
        load = after.children_user + after.children_system - children.children_user - children.children_system
        spent = [cpu_s([pid]) - begun for pid, begun in zip(own, before[0], strict=True)]
        of_database = (cpu_s(tree(postmaster)) if url else 0.0) - before[1]
    count = int(re.search(r"([0-9]+) requests in", text).group(1))
    failed = re.search(r"Non-2xx or 3xx responses: ([0-9]+)", text)
    each.errors += int(failed.group(1)) if failed else 0
    each.per_s.append(count / asked.seconds)
    each.per_cpu_s.append(count / sum(spent))
    each.busy.append(tuple(value / asked.seconds for value in (*spent, of_database, load)))
    each.p99_ms.append(milliseconds(re.search(r"99% +(\S+)", text).group(1)))
    return ""


def workers_of(supervisor: int) -> list[int]:
    """The processes that answer: of a supervisor's children those that serve, not multiprocessing's own."""
    found = []
    for pid in tree(supervisor)[1:]:
        with suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


SCALE_CONNECTIONS = 64
PEERS_HEADING = "# Serving, side by side"
SCALE_HEADING = "## One worker and two"


def scale_page(found: list[Scaled] | str, asked: argparse.Namespace) -> str:
    if isinstance(found, str):
        return f"{SCALE_HEADING}\n\nNot measured: {found}\n"
    lines = [
        SCALE_HEADING,
        "",
        (
            f"`make bench-serve`, part `scale`: {SCALE_CONNECTIONS} connections, {asked.seconds:g} s, "
            f"{asked.repeats} repeats in turns; medians. {os.cpu_count()} cores, which workers, database and "
            f"load generator share; load average at the end: {os.getloadavg()[0]:.1f}."
        ),
        "",
        (
            "| log in | workers | requests a second | a CPU-second of the workers | cores of each worker | "
            "of the database | of the load | p99 ms | errors |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        middle = sorted(each.busy, key=lambda busy: busy[:-2])[len(each.busy) // 2]
        cores = " + ".join(f"{value:.2f}" for value in middle[:-2])
        lines.append(
            f"| {each.database} | {each.workers} | {statistics.median(each.per_s):.0f} | "
            f"{statistics.median(each.per_cpu_s):.0f} | {cores} | {middle[-2]:.2f} | {middle[-1]:.2f} | "
            f"{statistics.median(each.p99_ms):.1f} | {each.errors} |"
        )
    lines.append("")
    for one_worker, two in zip(found[::2], found[1::2], strict=True):
        seen = statistics.median(two.per_s) / statistics.median(one_worker.per_s)
        kept = statistics.median(two.per_cpu_s) / statistics.median(one_worker.per_cpu_s)
        lines.append(
            f"* {one_worker.database}: two workers gave {seen:.2f} times the requests of one here. "
            f"A CPU-second of two gave {kept:.2f} times what one's gives: two free cores would give "
            f"at most {2 * kept:.2f} times (aim 1.7)."
        )
    return "\n".join(lines) + "\n"


NAMES = {
    "ours": "Affidavit: key, Cedar, facts, metrics, durable entry",
    "two": "the same with two workers",
    "fastapi": "plain FastAPI + pydantic + ONNX Runtime",
    "mlserver": "MLServer 1.7.1, parallel_workers=0, bare",
    "kserve": "KServe 0.21.0 server, bare",
    "bentoml": "BentoML 1.4.39, async API, bare",
}


def page(results: dict[str, Result], skipped: dict[str, str], asked: argparse.Namespace) -> str:
    lines = [
        PEERS_HEADING,
        "",
        (
            f"`make bench-serve`: MLP 30-64-64-2, one row a request, {asked.connections} connections, "
            f"{asked.seconds:g} s, {asked.repeats} repeats in turns; medians. CPython "
            f"{platform.python_version()} for all. Load average at the end: {os.getloadavg()[0]:.1f} on "
            f"{os.cpu_count()} cores, shared with the load generator."
        ),
        "",
        "| server | requests a CPU-second | requests a second | p50 ms | p99 ms | errors |",
        "|---|---|---|---|---|---|",
    ]
    for result in sorted(results.values(), key=lambda r: -statistics.median(r.per_cpu_s)):
        values = (result.per_cpu_s, result.per_s, result.p50_ms, result.p99_ms)
        shown = [f"{statistics.median(v):.0f}" if k < 2 else f"{statistics.median(v):.2f}"
                 for k, v in enumerate(values)]  # fmt: skip
        lines.append(f"| {NAMES[result.name]} | {' | '.join(shown)} | {result.errors} |")
    lines += ["", *[f"* {NAMES[name]}: left out, {why}" for name, why in skipped.items()]]
    own = results.get("ours")
    if own:
        mine = statistics.median(own.per_cpu_s)
        bare = [statistics.median(results[n].per_cpu_s) for n in ("mlserver", "kserve") if n in results]
        if bare:
            ratio = mine / max(bare)
            lines.append(f"* aim, twice the better of MLServer and KServe: {ratio:.2f} times, "
                         f"{'met' if ratio >= 2 else 'missed'}")  # fmt: skip
    for name, workers in (("ours", "one worker"), ("two", "two workers")):
        if name in results:
            p99 = statistics.median(results[name].p99_ms)
            lines.append(
                f"* aim, p99 under 10 ms, {workers}: {p99:.1f} ms, {'met' if p99 < 10 else 'missed'}"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
