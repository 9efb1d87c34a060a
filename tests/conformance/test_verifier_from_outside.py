"""The verifier as a stranger runs it: a process of its own, no environment, no other package of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime

import pytest


@pytest.fixture(scope="session")
def case(build_once, make_world):
    """A folder with evidence, policy and receipt of an honest federation, dated by the real clock."""

    def make(folder):
        world = make_world()
        index, opened = world.whole()
        world.publish(at=datetime.now(UTC))
        (folder / "evidence.zip").write_bytes(world.evidence(index, opened=opened))
        (folder / "policy.txt").write_text(world.policy)
        (folder / "receipt.json").write_text(json.dumps(world.receipt(index)))
        (folder / "stranger.txt").write_text(make_world().policy)

    return build_once("conformance-evidence", make)


def run(case, *arguments, code=None):
    start = ["-c", code] if code else ["-m", "audit.verify"]
    return subprocess.run(
        [sys.executable, "-I", *start, *arguments],
        cwd=case,
        env={},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_stranger_verifies_with_an_empty_environment(case):
    done = run(
        case, "evidence.zip", "--policy", "policy.txt", "--receipt", "receipt.json", "--max-age", "3600"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("VALID")


def test_json_parses_and_agrees_with_the_exit_code(case):
    done = run(case, "evidence.zip", "--policy", "policy.txt", "--json", "--replay")
    document = json.loads(done.stdout)
    assert (document["verdict"], document["exit_code"], done.returncode) == ("VALID", 0, 0)


def test_without_a_policy_the_exit_code_is_three(case):
    done = run(case, "evidence.zip")
    assert done.returncode == 3
    assert "SELF-CONSISTENT ONLY" in done.stdout


def test_another_federation_s_policy_makes_it_invalid(case):
    assert run(case, "evidence.zip", "--policy", "stranger.txt").returncode == 1


def test_a_flipped_bit_makes_it_invalid(case, tmp_path):
    data = bytearray((case / "evidence.zip").read_bytes())
    data[len(data) // 3] ^= 1
    changed = tmp_path / "changed.zip"
    changed.write_bytes(data)
    done = run(case, str(changed), "--policy", "policy.txt")
    assert done.returncode == 1
    assert "FAIL" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "FILE"),
        (("missing.zip",), "missing.zip"),
        (("evidence.zip", "--policy", "missing.txt"), "missing.txt"),
        (("evidence.zip", "--policy", "evidence.zip"), "evidence.zip"),
        (("evidence.zip", "--policy", "receipt.json"), "receipt.json"),
        (("evidence.zip", "--receipt", "missing.json"), "missing.json"),
        (("evidence.zip", "--max-age", "1e3"), "1e3"),
        (("evidence.zip", "--polizy", "policy.txt"), "--polizy"),
        (("evidence.zip", "policy.txt"), "policy.txt"),
        ((".",), "."),
    ],
)
def test_wrong_usage_names_what_is_wrong_and_exits_with_two(case, arguments, named):
    done = run(case, *arguments)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_the_verifier_loads_nothing_but_the_standard_library_and_cryptography(case):
    code = "import sys; before = set(sys.modules); import audit.verify.cli; print(*set(sys.modules) - before)"
    done = run(case, code=code)
    assert done.returncode == 0
    tops = {name.partition(".")[0] for name in done.stdout.split()}
    foreign = {name for name in tops if name not in sys.stdlib_module_names and not name.startswith("_")}
    assert foreign <= {"audit", "cryptography", "cffi"}


@pytest.mark.parametrize(
    ("claimed", "word", "code"),
    [("3.9", "ATTESTED", "epsilon.bound_only"), ("3", "FAIL", "epsilon.claimed_lower")],
)
def test_without_an_accountant_a_claim_below_the_bound_is_attested_or_disproved(
    tmp_path, make_world, claimed, word, code
):
    """The bare install cannot recompute a PLD: it says so, and still refuses what an attack disproves."""

    def claim(world, body):
        lower = (replace(item, run_epsilon=claimed, lifetime_epsilon=claimed) for item in body.epsilons)
        return replace(body, epsilons=tuple(lower))

    def terms(charter):
        charter["privacy"].update(sample_rate="0.5", noise_multiplier="1.5", epsilon="9")

    world = make_world(charter_changes=terms, before={"version.registered": claim})
    index, opened = world.whole()
    world.publish(at=datetime.now(UTC))
    (tmp_path / "evidence.zip").write_bytes(world.evidence(index, opened=opened))
    (tmp_path / "policy.txt").write_text(world.policy)
    bare = (
        "import sys; sys.modules['dp_accounting'] = None; "
        "from audit.verify.cli import main; main(sys.argv[1:])"
    )
    done = run(tmp_path, "evidence.zip", "--policy", "policy.txt", "--json", code=bare)
    step = next(s for s in json.loads(done.stdout)["steps"] if s["title"] == "Epsilon")
    assert (step["word"], step["code"]) == (word, code), step
