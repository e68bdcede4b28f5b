"""Connections that do not wait for ever: a server that hangs, or a wire that has gone silent, ends no question by itself."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import DictRow

_GRACE = 1.0  # seconds more than the server has, whose own word that a question took too long leaves the connection whole


class ImpatientConnection(psycopg.AsyncConnection[DictRow]):
    """A connection that is closed when nothing comes back for `patience` seconds and a moment: psycopg.OperationalError."""

    patience = 10.0
    """Seconds. Whoever changes it tells the server the same as statement_timeout."""

    async def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        """Do as psycopg does, for so long."""
        try:
            return await super().wait(gen, *args, **{"timeout": self.patience + _GRACE, **kwargs})
        except psycopg.OperationalError as error:
            if self.pgconn.transaction_status != TransactionStatus.ACTIVE:
                raise
            # Cancelling would need an answer too.
            self.pgconn.finish()
            raise psycopg.OperationalError(f"The server gave no answer within {self.patience + _GRACE:.3g} s.") from error
