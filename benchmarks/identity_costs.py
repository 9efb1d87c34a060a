"""What identity and policy cost a request: CPU microseconds a call, least of five rounds.

    python benchmarks/identity_costs.py

"read" and "asked" are what each call cost before keys and decisions were remembered.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jwt
from argon2 import PasswordHasher
from cryptography.hazmat.primitives.asymmetric import rsa

from audit.principal import Principal, Question
from server.access import CedarAuthorizer, _ask, shipped_policies
from server.jwks import IssuerKeys
from server.keys import KeyStore
from server.oidc import Claims, TokenVerifier
from server.policy_tests import ORDINARY_CONTEXT, ORDINARY_MODEL
from server.quotas import Limit, Quotas


def cost_us(call: Callable[[], object], calls: int) -> float:
    """Return the least CPU time of a call over five rounds."""
    rounds = []
    for _ in range(5):
        begun = time.process_time()
        for _ in range(calls):
            call()
        rounds.append((time.process_time() - begun) / calls * 1e6)
    return min(rounds)


def main() -> None:
    """Print the table."""
    folder = Path(tempfile.mkdtemp())
    cheap = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    keys = KeyStore(folder, lambda: datetime.now(UTC), hasher=cheap, recheck_s=5)
    text, view = keys.create(role="consumer", region="eu")

    authorizer = CedarAuthorizer(shipped_policies())
    principal = Principal(id=view.principal, role="consumer", region="eu")
    question = Question(action="predict", resource="m", attributes=ORDINARY_MODEL, context=ORDINARY_CONTEXT)

    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    jwk = {**jwt.get_algorithm_by_name("RS256").to_jwk(private.public_key(), as_dict=True), "kid": "k"}
    found = IssuerKeys("https://issuer.example", "https://issuer.example/jwks", fetch=lambda _: _json(jwk))
    verifier = TokenVerifier(
        issuer="https://issuer.example", audience="a", keys=found, pseudonym=lambda i, s: "p-1",
        claims=Claims(role="role", region="region", models="models", site="site"),
        clock=lambda: datetime.now(UTC),
    )  # fmt: skip
    expires = datetime.now(UTC) + timedelta(hours=1)
    claims = {"iss": "https://issuer.example", "aud": "a", "sub": "s", "role": "consumer", "exp": expires}
    token = jwt.encode(claims, private, algorithm="RS256", headers={"kid": "k"})
    verifier.authenticate(token)

    quotas = Quotas(folder, lambda: datetime.now(UTC), (Limit(60, 10**9),))
    keys.authenticate(text)  # remembered for five seconds
    remembered = cost_us(lambda: keys.recall(text), 20_000)
    if keys.recall(text) is None:
        raise RuntimeError("too slow: the key was forgotten while it was measured")
    rows = [
        ("API key, its row read", cost_us(lambda: keys._row(view.key_id), 500)),
        ("API key, remembered", remembered),
        ("token, verified (RS256)", cost_us(lambda: verifier._verified(token), 500)),
        ("token, remembered", cost_us(lambda: verifier.recall(token), 20_000)),
        (
            "decision, Cedar asked",
            cost_us(lambda: _ask(authorizer._rules, "Model", principal, question), 500),
        ),
        ("decision, remembered", cost_us(lambda: authorizer.decide(principal, question), 20_000)),
        ("quota of one window, SQLite", cost_us(lambda: quotas.take("p", 1), 500)),
        ("the same, each of sixteen", cost_us(lambda: quotas.take_all([("p", 1)] * 16), 500) / 16),
    ]
    for name, figure in rows:
        print(f"{name:<30}{figure:>10.1f} us")


def _json(jwk: dict[str, object]) -> bytes:
    import json

    return json.dumps({"keys": [{**jwk, "use": "sig"}]}).encode()


if __name__ == "__main__":
    main()
