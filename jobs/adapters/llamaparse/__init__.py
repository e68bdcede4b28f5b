"""Parsing by LlamaParse, version 2 of its HTTP API."""

from jobs.adapters.llamaparse.answers import FailedPage, HostedPages, to_parsed_file
from jobs.adapters.llamaparse.client import JobLost, JobOverdue, LlamaParse, make_llamaparse
from jobs.adapters.llamaparse.formats import extension_of, refusal
from jobs.adapters.llamaparse.page_count import count_pages, guess_pages

__all__ = [
    "FailedPage",
    "HostedPages",
    "JobLost",
    "JobOverdue",
    "LlamaParse",
    "count_pages",
    "extension_of",
    "guess_pages",
    "make_llamaparse",
    "refusal",
    "to_parsed_file",
]
