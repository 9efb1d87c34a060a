"""What generated requests may hear beside what the OpenAPI document says; loaded by schemathesis itself."""

from __future__ import annotations

from typing import Any

import schemathesis


@schemathesis.check
def answers_or_says_not_yet(ctx: Any, response: Any, case: Any) -> None:
    """No 5xx, but for a wait that ran out: 503 `audit.not_yet` with the seconds after which to ask again."""
    if response.status_code < 500:
        return
    is_wait = response.status_code == 503 and response.json().get("code") == "audit.not_yet"
    assert is_wait, f"server error {response.status_code}"
    assert int(response.headers["retry-after"][0]) > 0, "a wait that ran out says when to ask again"
