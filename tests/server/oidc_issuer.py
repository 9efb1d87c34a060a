"""An OpenID Connect issuer as a process of its own: discovery, keys, tokens, rotation, and ways to fail.

`python oidc_issuer.py` prints its address. GET /.well-known/openid-configuration, /jwks; POST /token (client
credentials) signs ordinary claims, POST /sign whatever it is told, POST /rotate makes a new key, POST /behave
sets how /jwks answers: "well", "error", "garbage", "huge", "redirect", "empty", "slow".
"""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

ALGORITHMS = {"RS256": "RSA", "ES256": "EC", "EdDSA": "OKP"}


def new_key(algorithm: str):
    if algorithm == "RS256":
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return (
        ec.generate_private_key(ec.SECP256R1())
        if algorithm == "ES256"
        else ed25519.Ed25519PrivateKey.generate()
    )


class Issuer:
    """The keys by id, and the newest of each algorithm."""

    def __init__(self) -> None:
        self.url, self.behaviour, self.jwks_reads, self.count = "", "well", 0, 0
        self.keys: dict[str, tuple[str, object]] = {}
        for algorithm in ALGORITHMS:
            self.rotate(algorithm)

    def rotate(self, algorithm: str, *, drop: bool = False) -> str:
        if drop:
            self.keys = {kid: found for kid, found in self.keys.items() if found[0] != algorithm}
        self.count += 1
        kid = f"{algorithm.lower()}-{self.count}"
        self.keys[kid] = algorithm, new_key(algorithm)
        return kid

    def newest(self, algorithm: str) -> str:
        return [kid for kid, found in self.keys.items() if found[0] == algorithm][-1]

    def jwks(self) -> dict:
        keys = []
        for kid, (algorithm, key) in self.keys.items():
            public = jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key(), as_dict=True)
            keys.append({**public, "kid": kid, "use": "sig", "alg": algorithm})
        shared = {"kty": "oct", "kid": "shared", "k": "c2hhcmVkLXNlY3JldC1zaGFyZWQtc2VjcmV0LXNoYXJlZA"}
        small = jwt.get_algorithm_by_name("RS256").to_jwk(SMALL.public_key(), as_dict=True)
        return {"keys": [*keys, shared, {**small, "kid": "small", "use": "sig"}]}

    def sign(self, asked: dict) -> str:
        algorithm = asked.get("alg", "RS256")
        kid = asked.get("kid", self.newest(algorithm))
        key = SMALL if kid == "small" else self.keys[asked.get("key", kid)][1]
        headers = {"kid": kid, **asked.get("headers", {})}
        return jwt.encode(asked["claims"], key, algorithm=algorithm, headers=headers)


SMALL = rsa.generate_private_key(public_exponent=65537, key_size=1024)
ISSUER = Issuer()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        if self.path == "/.well-known/openid-configuration":
            self.answer(
                {
                    "issuer": ISSUER.url,
                    "jwks_uri": f"{ISSUER.url}/jwks",
                    "token_endpoint": f"{ISSUER.url}/token",
                }
            )
        elif self.path == "/jwks":
            ISSUER.jwks_reads += 1
            self.jwks(ISSUER.behaviour)
        elif self.path == "/reads":
            self.answer({"reads": ISSUER.jwks_reads})
        else:
            self.send_error(404)

    def jwks(self, behaviour: str) -> None:
        if behaviour == "error":
            self.send_error(500)
        elif behaviour == "garbage":
            self.answer_bytes(b"<html>not keys</html>")
        elif behaviour == "huge":
            self.answer_bytes(b'{"keys": [' + b" " * (2 << 20) + b"]}")
        elif behaviour == "redirect":
            self.send_response(302)
            self.send_header("Location", f"{ISSUER.url}/jwks-elsewhere")
            self.end_headers()
        elif behaviour == "empty":
            self.answer({"keys": []})
        else:
            if behaviour == "slow":
                time.sleep(0.5)
            self.answer(ISSUER.jwks())

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if self.path == "/token":
            now = int(time.time())
            claims = {"iss": ISSUER.url, "iat": now, "exp": now + 300, "jti": str(ISSUER.count), **asked}
            self.answer(
                {"access_token": ISSUER.sign({"claims": claims}), "token_type": "Bearer", "expires_in": 300}
            )
        elif self.path == "/sign":
            self.answer({"token": ISSUER.sign(asked)})
        elif self.path == "/rotate":
            self.answer({"kid": ISSUER.rotate(asked["alg"], drop=asked.get("drop", False))})
        elif self.path == "/behave":
            ISSUER.behaviour = asked["how"]
            self.answer({})
        else:
            self.send_error(404)

    def answer(self, document: dict) -> None:
        self.answer_bytes(json.dumps(document).encode())

    def answer_bytes(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ISSUER.url = f"http://127.0.0.1:{server.server_address[1]}"
    print(ISSUER.url, flush=True)
    sys.stdin.close()
    server.serve_forever()
