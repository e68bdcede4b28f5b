"""One HTTP exchange with an outside service: timeouts, bounded bodies, and errors that say whose fault it was."""

from jobs.adapters.http.service import Answer, Service, Through, Timeouts, directly, read_json

__all__ = ["Answer", "Service", "Through", "Timeouts", "directly", "read_json"]
