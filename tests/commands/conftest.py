"""Commands run in this process, and one small federation of somebody's own data, trained by them alone."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

import affidavit

CHARTER = """
affidavit: 1
name: own
task: binary
features:
  - {{name: age, type: number, unit: years, lower: 0, upper: 100}}
  - {{name: dose, type: number, unit: mg, lower: 0, upper: 10}}
label: {{name: outcome, classes: ["no", "yes"]}}
model: {{family: logistic_regression}}
plan: {{strategy: fedavg, rounds: 2, learning_rate: 4, round_timeout_s: 20, minimum_sites: 2}}
privacy:
  unit: row
  relation: add_remove
  epsilon: 6
  delta: 0.00001
  max_grad_norm: 1
  noise_multiplier: 1.5
sites:
  - {{name: alpha, identity: "{alpha}", nominal_rows: 120}}
  - {{name: beta, identity: "{beta}", nominal_rows: 120}}
public_set: {{digest: {public}, rows: 60}}
gates:
  - {{metric: auc, source: public_set, margin_over_baseline: 0.05}}
purposes: [triage]
officers:
  - {{name: olsen, key: "{olsen}"}}
"""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run_command(*arguments: object) -> Result:
    """Run the front door in this process; standard output and error are what a shell would see."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    with redirect_stdout(out), redirect_stderr(err):
        code = affidavit.main([str(argument) for argument in arguments])
    return Result(code, *(_text(stream) for stream in (out, err)))


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    stream.seek(0)
    return stream.read()


def done(*arguments: object) -> Any:
    result = run_command(*arguments, "--json")
    assert result.code == 0, result.err
    return result.json


def write_rows(path: Path, rows: int, seed: int) -> None:
    random = Random(seed)
    lines = ["age,dose,outcome"]
    for _ in range(rows):
        age, dose = random.uniform(20, 80), random.uniform(1, 9)
        lines.append(f"{age:.2f},{dose:.3f},{'yes' if age / 10 + dose > 10 else 'no'}")
    path.write_text("\n".join(lines) + "\n")


def make_federation(folder: Path) -> None:
    homes = folder / "homes"
    for name, rows, seed in (("alpha", 120, 1), ("beta", 120, 2), ("public", 60, 3)):
        write_rows(folder / f"{name}.csv", rows, seed)
    done("init", "tests.example/own", "--home", homes)
    olsen = done("identity", "new", "olsen", "--home", homes)
    curie = done("identity", "new", "curie", "--role", "scientist", "--home", homes)
    sites = {
        name: done(
            "site", "add", name, "--data", folder / f"{name}.csv", "--population", f"people of {name}",
            "--lifetime-epsilon", "5", "--home", homes,
        )["identity"]
        for name in ("alpha", "beta")
    }  # fmt: skip
    public = hashlib.sha256((folder / "public.csv").read_bytes()).hexdigest()
    charter = folder / "charter.yaml"
    charter.write_text(CHARTER.format(**sites, public=public, olsen=olsen["key"]))
    assert done("charter", "check", charter)["fits"]
    for name in sites:
        done("charter", "sign", charter, "--site", name, "--yes", "--home", homes)
    trained = done(
        "train", "--charter", charter, "--site", f"alpha={folder}/alpha.csv", "--site",
        f"beta={folder}/beta.csv", "--author", curie["home"], "--public-set", folder / "public.csv",
        "--home", homes,
    )  # fmt: skip
    (folder / "trained.json").write_text(json.dumps({**trained, "folder": str(folder)}))


@dataclass(frozen=True)
class Own:
    """The trained federation, in a copy that one test may change."""

    folder: Path
    version: str

    @property
    def homes(self) -> Path:
        return self.folder / "homes"

    @property
    def officer(self) -> Path:
        return self.homes / "officers" / "olsen"

    def run(self, *arguments: object) -> Result:
        return run_command(*arguments, "--home", self.homes)

    def approve(self) -> None:
        result = self.run("models", "approve", self.version, "--officer", self.officer, "--live")
        assert result.code == 0, result.err


@pytest.fixture
def run() -> Callable[..., Result]:
    return run_command


@pytest.fixture(scope="session")
def trained_own(build_once):
    return build_once("own-federation", make_federation)


@pytest.fixture
def own(trained_own, tmp_path):
    return copy_of(trained_own, tmp_path / "own")


@pytest.fixture(scope="module")
def shared_own(trained_own, tmp_path_factory):
    """A copy that the tests of one file share; they only ever add to it."""
    return copy_of(trained_own, tmp_path_factory.mktemp("shared") / "own")


def copy_of(trained_own: Path, folder: Path) -> Own:
    shutil.copytree(trained_own, folder)
    config = folder / "homes" / "coordinator" / "config.yaml"
    config.write_text(f"origin: tests.example/own\nsigner_home: {folder}/homes/signer\n")
    trained = json.loads((folder / "trained.json").read_text())
    for path in (folder / "homes" / "sites").glob("*/site.yaml"):
        path.write_text(path.read_text().replace(trained["folder"], str(folder)))
    return Own(folder, trained["version"])


@pytest.fixture(scope="module")
def served(shared_own):
    """The approved federation behind a running server; started only for the files that ask for it."""
    from tests.commands.serving import serving

    with serving(shared_own) as running:
        yield running
