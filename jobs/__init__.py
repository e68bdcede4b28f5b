"""The front door that application code imports: `from jobs import submit_document`.

Its names are imported on first use: `docmill --help` and the parsing children need no database driver.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.batch import submit_batch, submit_batch_async
    from jobs.submit import submit_document, submit_document_async
    from jobs.sync import sync_folder, sync_folder_async
    from models.submissions import Submission, SubmittedBatch

__all__ = [
    "Submission",
    "SubmittedBatch",
    "submit_batch",
    "submit_batch_async",
    "submit_document",
    "submit_document_async",
    "sync_folder",
    "sync_folder_async",
]

_HOMES = {
    "Submission": "models.submissions",
    "SubmittedBatch": "models.submissions",
    "submit_batch": "jobs.batch",
    "submit_batch_async": "jobs.batch",
    "submit_document": "jobs.submit",
    "submit_document_async": "jobs.submit",
    "sync_folder": "jobs.sync",
    "sync_folder_async": "jobs.sync",
}


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
