"""The way to outside services: breaker, budget and ledger, which all workers share, around every call that an adapter makes."""

from jobs.services.front import Service
from jobs.services.own import OwnServices, service_name
from jobs.services.terms import Prices, Terms, terms_of

__all__ = ["OwnServices", "Prices", "Service", "Terms", "service_name", "terms_of"]
