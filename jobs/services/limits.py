"""What may be spent: which documents may not pay for a call, in words. Whether they may is decided where its intent is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from jobs.services.terms import Terms
from models.errors import CostLimitReached


def limit_reached(over: Iterable[Mapping[str, Any]], terms: Terms) -> CostLimitReached:
    """Return the error for what the SQL function over_cost found."""
    return CostLimitReached({payer["doc_id"]: _why(payer, terms) for payer in over})


def _why(payer: Mapping[str, Any], terms: Terms) -> str:
    of_batch = payer["scope"] == "batch"
    setting = "MAX_COST_PER_BATCH" if of_batch else "MAX_COST_PER_DOCUMENT"
    limit = terms.max_cost_per_batch if of_batch else terms.max_cost_per_document
    whose = f'The batch "{payer["batch_id"]}"' if of_batch else f'The document "{payer["doc_id"]}"'
    one = f' for the document "{payer["doc_id"]}"' if of_batch else ""
    name = terms.service.rpartition(" key:")[0] or terms.service
    return (
        f"{whose} has cost {_amount(payer['spent'])}, and a call to {name}{one} would cost about {_amount(payer['cost'])} more: "
        f"that is over {setting}={_amount(limit)}. The call was not made."
    )


def _amount(value: object) -> str:
    """Return an amount as people write it, with six digits after the point at most, none of them needless."""
    text = f"{Decimal(str(value)):.6f}"
    return text.rstrip("0").rstrip(".")
