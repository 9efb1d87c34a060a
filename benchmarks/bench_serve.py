"""Answers a CPU-second beside other servers: the same MLP 30-64-64-2, the same row, side by side in one run.

    python benchmarks/bench_serve.py [--part peers|scale|rows|all] [--seconds 3] [--repeats 9]
                                     [--connections 16] [--only NAME …] [--write]

Ours is the whole pipeline: an API key, Cedar's decision, the facts for it, metrics, and a durable entry in
the log before each answer. The others answer bare. Each runs as its users would run it, one worker, in an
environment of its own under build/ (made here by pip on first use; what cannot be installed is left out, and
why is said). CPU is that of the server's whole process tree, by /proc; load is `wrk -t1`.

The part `scale` runs ours with one worker and with two, over SQLite and over PostgreSQL, and counts beside
the server's CPU the database's and the load generator's: on two cores all of them share what two workers
would need for themselves. The part `rows` asks for many rows in one request.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

from serving_load import (  # noqa: E402 - after the path
    cpu_s,
    free_port,
    lua,
    milliseconds,
    ours,
    request_body,
    running,
    tree,
    wait_for,
    wrk,
)

PEERS = HERE / "serving_peers"
BUILD = ROOT / "build"
REST_S = 0.6  # after each turn, counted with it: what a server puts off is its own work too
PEERS_HEADING = "# Serving, side by side"
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


def measure(result: Result, server: Server, seconds: float, connections: int) -> None:
    pids = tree(server.pid)
    before = cpu_s(pids)
    text = wrk(server.url, server.script, seconds, connections)
    time.sleep(REST_S)
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
    parser.add_argument("--part", choices=("peers", "scale", "rows", "all"), default="all")
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--write", action="store_true", help="write docs/results/serving.md")
    asked = parser.parse_args()
    if shutil.which("wrk") is None:
        print("wrk is not installed: apt-get install wrk", file=sys.stderr)
        return 2
    known = ("ours", "two", "fastapi", "mlserver", "kserve", "bentoml")
    names = [name for name in known if not asked.only or name in asked.only]
    if asked.part in ("peers", "all"):
        show(page(*beside(names, asked), asked), write=asked.write)
    if asked.part in ("scale", "all") and not asked.only:
        from serving_scale import scale, scale_page

        show(scale_page(scale(asked), asked), write=asked.write)
    if asked.part in ("rows", "all") and not asked.only:
        from serving_rows import rows, rows_page

        show(rows_page(rows(asked, started), NAMES, asked), write=asked.write)
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


@dataclass(frozen=True)
class Server:
    """One that runs and answers."""

    name: str
    pid: int
    url: str
    script: Path
    path: str
    headers: dict[str, str]


def beside(names: list[str], asked: argparse.Namespace) -> tuple[dict[str, Result], dict[str, str]]:
    """Start all, ask each for some seconds in turn, again and again; return figures, and why some have none.

    All are up all the time, so that what disturbs the machine for a minute disturbs each of them alike.
    """
    results: dict[str, Result] = {}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as base, ExitStack() as stack:
        servers = []
        for name in names:
            server = started(name, Path(base), stack)
            if isinstance(server, str):
                skipped[name] = server
            else:
                servers.append(server)
                results[name] = Result(name)
                wrk(server.url, server.script, 2, asked.connections)
        for repeat in range(asked.repeats):
            for server in servers if repeat % 2 == 0 else servers[::-1]:
                measure(results[server.name], server, asked.seconds, asked.connections)
    return results, skipped


def started(name: str, base: Path, stack: ExitStack) -> Server | str:
    """Start one; return why it does not answer where it does not."""
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

    environ = {key: fill(value) for key, value in environ.items()}
    url = f"http://127.0.0.1:{ports[0]}"
    process = stack.enter_context(running([fill(part) for part in command], folder, environ))
    problem = wait_for(url + path, body, headers, process)
    if problem:
        tail = (folder / "out.txt").read_text(errors="replace").strip().splitlines()[-1:]
        return f"{problem}; {' '.join(tail)[:160]}"
    return Server(name, process.pid, url, lua(folder, path, body, headers), path, headers)


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
            f"{asked.seconds:g} s a turn, {asked.repeats} turns; medians. All are up all the time, on "
            f"CPython {platform.python_version()}. Load average at the end: {os.getloadavg()[0]:.1f} on "
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
        bare = [results[name].per_cpu_s for name in ("mlserver", "kserve") if name in results]
        if bare:
            ratios = [mine / max(others) for mine, *others in zip(own.per_cpu_s, *bare, strict=True)]
            ratio = statistics.median(ratios)
            lines.append(f"* aim, twice the better of MLServer and KServe: {ratio:.2f} times, the median of "
                         f"{len(ratios)} turns ({min(ratios):.2f} to {max(ratios):.2f}): "
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
