"""The front door that application code imports: `from jobs import submit_document`.

Its names are imported on first use: `docmill --help` and the parsing children need no database driver.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.batch import submit_batch, submit_batch_async
    from jobs.records import (
        batch_statistics,
        batch_statistics_async,
        fail_batch,
        fail_batch_async,
        fail_document,
        fail_document_async,
        get_batch,
        get_batch_async,
        get_document,
        get_document_async,
        list_batch_documents,
        list_batch_documents_async,
        retry_document,
        retry_document_async,
        retry_extraction,
        retry_extraction_async,
        run_summary,
        run_summary_async,
        should_reprocess,
        should_reprocess_async,
        update_batch,
        update_batch_async,
        update_document,
        update_document_async,
    )
    from jobs.removal import (
        cancel_batch,
        cancel_batch_async,
        cancel_document,
        cancel_document_async,
        delete_batch,
        delete_batch_async,
        delete_document,
        delete_document_async,
    )
    from jobs.submit import submit_document, submit_document_async
    from jobs.sync import sync_folder, sync_folder_async
    from models.records import (
        Advice,
        BatchRecord,
        BatchStatistics,
        DocumentRecord,
        Retry,
        RunSummary,
    )
    from models.submissions import Submission, SubmittedBatch

__all__ = [
    "Advice",
    "BatchRecord",
    "BatchStatistics",
    "DocumentRecord",
    "Retry",
    "RunSummary",
    "Submission",
    "SubmittedBatch",
    "batch_statistics",
    "batch_statistics_async",
    "cancel_batch",
    "cancel_batch_async",
    "cancel_document",
    "cancel_document_async",
    "delete_batch",
    "delete_batch_async",
    "delete_document",
    "delete_document_async",
    "fail_batch",
    "fail_batch_async",
    "fail_document",
    "fail_document_async",
    "get_batch",
    "get_batch_async",
    "get_document",
    "get_document_async",
    "list_batch_documents",
    "list_batch_documents_async",
    "retry_document",
    "retry_document_async",
    "retry_extraction",
    "retry_extraction_async",
    "run_summary",
    "run_summary_async",
    "should_reprocess",
    "should_reprocess_async",
    "submit_batch",
    "submit_batch_async",
    "submit_document",
    "submit_document_async",
    "sync_folder",
    "sync_folder_async",
    "update_batch",
    "update_batch_async",
    "update_document",
    "update_document_async",
]

_HOMES = {
    "Advice": "models.records",
    "BatchRecord": "models.records",
    "BatchStatistics": "models.records",
    "DocumentRecord": "models.records",
    "Retry": "models.records",
    "RunSummary": "models.records",
    "Submission": "models.submissions",
    "SubmittedBatch": "models.submissions",
    "batch_statistics": "jobs.records",
    "batch_statistics_async": "jobs.records",
    "cancel_batch": "jobs.removal",
    "cancel_batch_async": "jobs.removal",
    "cancel_document": "jobs.removal",
    "cancel_document_async": "jobs.removal",
    "delete_batch": "jobs.removal",
    "delete_batch_async": "jobs.removal",
    "delete_document": "jobs.removal",
    "delete_document_async": "jobs.removal",
    "fail_batch": "jobs.records",
    "fail_batch_async": "jobs.records",
    "fail_document": "jobs.records",
    "fail_document_async": "jobs.records",
    "get_batch": "jobs.records",
    "get_batch_async": "jobs.records",
    "get_document": "jobs.records",
    "get_document_async": "jobs.records",
    "list_batch_documents": "jobs.records",
    "list_batch_documents_async": "jobs.records",
    "retry_document": "jobs.records",
    "retry_document_async": "jobs.records",
    "retry_extraction": "jobs.records",
    "retry_extraction_async": "jobs.records",
    "run_summary": "jobs.records",
    "run_summary_async": "jobs.records",
    "should_reprocess": "jobs.records",
    "should_reprocess_async": "jobs.records",
    "submit_batch": "jobs.batch",
    "submit_batch_async": "jobs.batch",
    "submit_document": "jobs.submit",
    "submit_document_async": "jobs.submit",
    "sync_folder": "jobs.sync",
    "sync_folder_async": "jobs.sync",
    "update_batch": "jobs.records",
    "update_batch_async": "jobs.records",
    "update_document": "jobs.records",
    "update_document_async": "jobs.records",
}


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives (PEP 562). ImportError names a file of the application that is in the way."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(_HOMES[name]), name)
    except ImportError as error:
        package = str(error.name).partition(".")[0]
        file = Path(getattr(sys.modules.get(package), "__file__", None) or __file__)
        if package not in {"models", "sql"} or file.parent.parent == Path(__file__).parent.parent:
            raise
        raise ImportError(f"{file} hides docmill's own package {package!r}: give it another name.", name=package) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
