"""The way to outside services: breaker, budget and ledger, which all workers share, around every call that an adapter makes."""

from jobs.services.front import Service
from jobs.services.terms import Prices, Terms, terms_of

__all__ = ["Prices", "Service", "Terms", "terms_of"]
