"""Parsing by LlamaParse, version 2 of its HTTP API."""

from jobs.adapters.llamaparse.answers import FailedPage, HostedPages, to_parsed_file
from jobs.adapters.llamaparse.client import JobLost, LlamaParse, make_llamaparse
from jobs.adapters.llamaparse.formats import extension_of, refusal

__all__ = [
    "FailedPage",
    "HostedPages",
    "JobLost",
    "LlamaParse",
    "extension_of",
    "make_llamaparse",
    "refusal",
    "to_parsed_file",
]
