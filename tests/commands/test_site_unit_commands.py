"""The front door where the unit is the site: a charter is begun, checked, agreed to, run and verified."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import done, run_command, write_rows

SITES = ("alpha", "beta", "delta", "gamma", "zeta")
CHARTER = """
name: own
task: binary
features:
  - {{name: age, type: number, unit: years, lower: 0, upper: 100}}
  - {{name: dose, type: number, unit: mg, lower: 0, upper: 10}}
label: {{name: outcome, classes: ["no", "yes"]}}
model: {{family: logistic_regression}}
plan: {{rounds: 2, learning_rate: 1, local_steps: 8, local_learning_rate: 2, minimum_sites: 4}}
privacy:
  {{unit: site, relation: replace_one, epsilon: 6, delta: 0.001, max_update_norm: 2, noise_multiplier: 1}}
secure_aggregation: {{tolerated: 1}}
sites:
{sites}
public_set: {{digest: {public}, rows: 60}}
gates: [{{metric: auc, source: public_set, margin_over_baseline: -0.5}}]
purposes: [triage]
officers: [{{name: olsen, key: "{olsen}"}}]
"""


def make(folder: Path) -> Path:
    """A log, five sites and a charter file; nobody has agreed to it."""
    homes = folder / "homes"
    for seed, name in enumerate((*SITES, "public")):
        write_rows(folder / f"{name}.csv", 60, seed)
    done("init", "tests.example/sites", "--home", homes)
    olsen = done("identity", "new", "olsen", "--home", homes)
    done("identity", "new", "curie", "--role", "scientist", "--home", homes)
    keys = {
        name: done(
            "site", "add", name, "--data", folder / f"{name}.csv", "--population", f"people of {name}",
            "--lifetime-epsilon", "6", "--lifetime-delta", "0.001", "--home", homes,
        )["identity"]
        for name in SITES
    }  # fmt: skip
    members = "\n".join(
        f'  - {{name: {name}, identity: "{key}", nominal_rows: 1}}' for name, key in keys.items()
    )
    public = hashlib.sha256((folder / "public.csv").read_bytes()).hexdigest()
    charter = folder / "charter.yaml"
    charter.write_text(CHARTER.format(sites=members, public=public, olsen=olsen["key"]))
    return charter


@pytest.fixture(scope="module")
def charter(build_once: Any, tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("site-unit")
    return make(folder)


def test_the_check_says_what_it_covers(charter: Path) -> None:
    found = done("charter", "check", charter)
    assert (found["unit"], found["fits"]) == ("site", True)
    assert found["epsilon_row_of_site"] == pytest.approx(float(found["sites"][0]["epsilon_pld"]), abs=1e-3)
    assert "its site's protection and none of its own" in run_command("charter", "check", charter).out


def test_central_noise_is_not_to_be_had_without_its_name(charter: Path, tmp_path: Path) -> None:
    path = tmp_path / "charter.yaml"
    path.write_text(charter.read_text().replace("secure_aggregation: {tolerated: 1}\n", ""))
    result = run_command("charter", "check", path)
    assert result.code == 1
    assert "charter.yaml:11: privacy.unit" in result.err
    assert "everybody trusts the coordinator, and this release does not offer it" in result.err


def test_a_charter_is_begun_for_sites(charter: Path, tmp_path: Path) -> None:
    source, new = charter.parent / "alpha.csv", tmp_path / "new.yaml"
    done("charter", "new", "--from", source, "--out", new, "--unit", "site")
    assert "unit: site" in new.read_text()
    left = run_command("charter", "check", new)
    assert left.code == 1
    assert "max_update_norm" in left.err
    other = run_command("charter", "new", "--from", source, "--out", tmp_path / "x.yaml", "--unit", "ward")
    assert other.code == 1
    assert "neither row nor site" in other.err


def test_the_whole_way_to_evidence_that_verifies(charter: Path) -> None:
    folder = charter.parent
    homes = folder / "homes"
    shown = run_command("site", "review", charter, "--site", "alpha", "--home", homes)
    assert "one site, replace/one" in shown.out
    assert "none of its own" in " ".join(shown.out.split())
    review = done("site", "review", charter, "--site", "alpha", "--home", homes)
    assert review["unit"] == "site"
    assert review["row_epsilon"] == pytest.approx(review["run_epsilon"], rel=1e-6)
    assert review["lifetime_after"] == pytest.approx(review["row_epsilon"], rel=1e-6)
    for name in SITES:
        agreed = done("charter", "sign", charter, "--site", name, "--yes", "--home", homes)
        assert agreed["unit"] == "site"
    sites = [part for name in SITES for part in ("--site", f"{name}={folder}/{name}.csv")]
    done(
        "train", "--charter", charter, *sites, "--author", homes / "scientists" / "curie",
        "--public-set", folder / "public.csv", "--home", homes,
    )  # fmt: skip
    status = done("site", "status", "alpha", "--home", homes)
    assert status["releases"] == 2
    assert status["lifetime_epsilon"] == pytest.approx(review["run_epsilon"], rel=1e-6)
    last = done("log", "list", "--type", "run.completed", "--home", homes)["entries"][-1]
    evidence = folder / "evidence.zip"
    exported = run_command("evidence", "export", str(last["leaf_index"]), "--out", evidence, "--home", homes)
    assert exported.code == 0, exported.err
    assert zipfile.is_zipfile(evidence)
    policy = folder / "policy.txt"
    policy.write_text(run_command("log", "policy", "--home", homes).out)
    found = run_command("verify", evidence, "--policy", policy)
    assert found.code == 0, found.out + found.err
    assert "VALID" in found.out
    assert "one site, replace/one" in " ".join(found.out.split())
    # another run would pass the cap of 6 that the site set for a row: it is refused before anything leaves
    again = run_command(
        "train", "--charter", charter, *sites, "--author", homes / "scientists" / "curie",
        "--public-set", folder / "public.csv", "--home", homes, "--json",
    )  # fmt: skip
    assert (again.code, again.json["error"]["code"]) == (1, "federation.run_failed")
    assert done("site", "status", "alpha", "--home", homes)["releases"] == 2
