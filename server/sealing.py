"""What the server puts into the vault, durable before the entry that speaks of it is appended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from audit.disclosure import SealedPart
from audit.errors import AuditError
from audit.vault import Vault
from audit.vault_records import Sealed, SealRequest, VaultRequestError
from server.errors import LedgerUnavailableError, MalformedRequestError
from server.journal import Journal

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sealing:
    """Seals and waits."""

    vault: Vault
    journal: Journal
    timeout_s: float

    async def seal(
        self, *, kind: str, name: str, event_id: str, type: str, parts: Mapping[str, SealedPart]
    ) -> Sealed:
        """Seal `parts` for somebody.

        Raises:
            MalformedRequestError: `name` is no id that the vault takes.
            LedgerUnavailableError: the record is not, or not known to be, durable.
        """
        request = SealRequest(
            kind=kind, name=name, event_id=event_id, type=type, time=self.journal.now_text(), parts=parts
        )
        try:
            return await asyncio.wait_for(self.vault.seal_from_loop(request), self.timeout_s)
        except VaultRequestError as error:
            problem = [{"field": "subject", "problem": str(error)}]
            raise MalformedRequestError(str(error), fields=problem) from error
        except (AuditError, OSError, TimeoutError) as error:
            code = getattr(error, "code", error.__class__.__name__)
            _logger.error("a record did not become durable in the vault: %s: %s", code, error)
            raise LedgerUnavailableError(
                f"the vault could not keep this request ({code}); there is no answer"
            ) from error
