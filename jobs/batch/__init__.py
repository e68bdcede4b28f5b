"""Batches: submitting folders, lists and zip archives, and unpacking the archives."""

from jobs.batch.front import is_folder, submit_batch, submit_batch_async, submit_file, submit_folder
from jobs.batch.storing import is_zip
from jobs.batch.submission import BatchSubmission, Entry, FileResult, Listener, Looked

__all__ = [
    "BatchSubmission", "Entry", "FileResult", "Listener", "Looked", "is_folder", "is_zip", "submit_batch", "submit_batch_async",
    "submit_file", "submit_folder",
]  # fmt: skip
