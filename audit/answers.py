"""How much of an answer a charter lets out: so many decimals, or the label alone.

A model's exact confidence tells more about it than a decision needs: it is what extraction and membership
attacks feed on. A charter's `answers` rounds it before it is committed and given, so that neither the answer
nor its opened entry holds more. The verifier recomputes the exact answer and checks that the one given is
its rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any, Final

from audit.decimals import decimal_text, parse_decimal
from audit.errors import AuditError

EXACT: Final = 6  # decimals of an answer that is not rounded further
_NUMBERS: Final = ("probability", "value")


class AnswerTermsError(AuditError):
    """A charter's `answers` is malformed; the message names the key."""

    code = "audit.answer_terms"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerTerms:
    """What a charter says of the answers given under it; absent: six decimals, and no cache."""

    decimals: int = EXACT
    label_only: bool = False
    cache: bool = False

    @classmethod
    def of_charter(cls, charter: Mapping[str, Any]) -> AnswerTerms:
        """Read the terms from a charter's canonical JSON values.

        Raises:
            AnswerTermsError: they are out of range, or leave nothing to answer.
        """
        part = charter.get("answers")
        if part is None:
            return cls()
        if not isinstance(part, Mapping) or set(part) != {"decimals", "label_only", "cache"}:
            raise AnswerTermsError("answers holds exactly decimals, label_only and cache")
        decimals, flags = part["decimals"], (part["label_only"], part["cache"])
        if type(decimals) is not int or not 0 <= decimals <= EXACT:
            raise AnswerTermsError(f"answers.decimals is a whole number from 0 to {EXACT}")
        if any(type(flag) is not int or flag not in (0, 1) for flag in flags):
            raise AnswerTermsError("answers.label_only and answers.cache are 0 or 1")
        if flags[0] and charter["task"] == "regression":
            raise AnswerTermsError("answers.label_only leaves nothing of a regression's answer")
        return cls(decimals=decimals, label_only=bool(flags[0]), cache=bool(flags[1]))

    def released(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        """Return what leaves of an answer by `audit.models.answer_of`.

        >>> AnswerTerms(decimals=1).released({"label": "ill", "probability": "0.849999"})
        {'label': 'ill', 'probability': '0.8'}
        """
        if self.label_only:
            return {"label": answer["label"]}
        if self.decimals == EXACT:
            return dict(answer)
        shown = dict(answer)
        for name in _NUMBERS:
            if name in shown:
                shown[name] = self._rounded(shown[name])
        if "probabilities" in shown:
            shown["probabilities"] = [self._rounded(text) for text in shown["probabilities"]]
        return shown

    @property
    def is_restricted(self) -> bool:
        """Whether less than the exact answer goes out, so that nothing may go out that tells the rest."""
        return self.label_only or self.decimals < EXACT

    @property
    def slack(self) -> Decimal:
        """How far a rounded number may lie from the exact one."""
        return Decimal(0) if self.decimals == EXACT else Decimal(5).scaleb(-self.decimals - 1)

    def is_rounded(self, value: Decimal) -> bool:
        """Whether a number has no more decimals than the terms allow."""
        exponent = value.as_tuple().exponent
        return isinstance(exponent, int) and exponent >= -self.decimals

    def _rounded(self, text: str) -> str:
        grain = Decimal(1).scaleb(-self.decimals)
        return decimal_text(parse_decimal(text).quantize(grain, rounding=ROUND_HALF_EVEN))
