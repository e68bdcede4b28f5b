"""The front door that application code imports: `from jobs import submit_document`."""

from jobs.submit import submit_document, submit_document_async
from models.submissions import Submission

__all__ = ["Submission", "submit_document", "submit_document_async"]
