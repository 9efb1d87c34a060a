"""The closed lists of codes: why a site declines, and why a run failed."""

from __future__ import annotations

from typing import Final

REFUSAL_CODES: Final = frozenset(
    {
        "already_released",
        "bad_request",
        "base_model_mismatch",
        "budget_exhausted",
        "charter_not_approved",
        "contract_not_met",
        "internal_error",
        "ledger_behind_log",
        "participants_not_allowed",
        "population_busy",
        "purpose_not_allowed",
        "round_out_of_order",
        "run_not_accepted",
        "site_closed",
        "unwitnessed_history",
        # the site's own decisions, and its agent's door
        "bundle_not_approved",
        "model_not_allowed",
        "peer_not_allowed",
        "rate_limited",
        "refused_by_site",
        "waiting_for_site",
        # masked rounds
        "already_answered",
        "roster_not_proved",
        "survivors_not_agreed",
    }
)
"""All that a site ever says about why it did not answer; file, row and reason stay on its own console."""

RUN_FAILURE_CODES: Final = frozenset(
    {"coordinator_error", "not_enough_sites", "not_opened", "site_refused", "stopped"}
)
