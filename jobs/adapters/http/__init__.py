"""One HTTP exchange with an outside service: timeouts, bounded bodies, and errors that say whose fault it was."""

from jobs.adapters.http.service import DIRECT, Answer, Direct, Service, Timeouts, read_json, service_id
from jobs.adapters.http.verdict import HttpStatusError
from models.errors import BadAnswer

__all__ = ["DIRECT", "Answer", "BadAnswer", "Direct", "HttpStatusError", "Service", "Timeouts", "read_json", "service_id"]
