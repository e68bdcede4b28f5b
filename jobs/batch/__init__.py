"""Batches: submitting folders, lists and zip archives, and unpacking the archives."""

from jobs.batch.front import entries_of, is_folder, submit_batch, submit_batch_async, submit_file, submit_folder
from jobs.batch.storing import is_zip
from jobs.batch.submission import BatchSubmission, Entry, FileResult, Listener, Looked, told_apart

__all__ = [
    "BatchSubmission", "Entry", "FileResult", "Listener", "Looked", "entries_of", "is_folder", "is_zip", "submit_batch",
    "submit_batch_async", "submit_file", "submit_folder", "told_apart",
]  # fmt: skip
