"""One HTTP exchange with an outside service: timeouts, bounded bodies, and errors that say whose fault it was."""

from jobs.adapters.exchange.service import DIRECT, Answer, Direct, Service, Timeouts, read_json

__all__ = ["DIRECT", "Answer", "Direct", "Service", "Timeouts", "read_json"]
