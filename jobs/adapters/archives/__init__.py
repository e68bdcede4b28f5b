"""Zip archives: listing and unpacking them, and the gate for documents that are archives inside.

What reads an archive's bytes runs in a sandbox child; the rest runs in the worker."""

from jobs.adapters.archives.extraction import unpack_members
from jobs.adapters.archives.listing import list_archive
from jobs.adapters.archives.members import ArchiveLimits, Listing, Member, Unpacked, refuse_strange
from jobs.adapters.archives.package import check_package
from jobs.adapters.archives.recognition import is_archive
from jobs.adapters.archives.workspace import remove_leftovers, workspace

__all__ = [
    "ArchiveLimits",
    "Listing",
    "Member",
    "Unpacked",
    "check_package",
    "is_archive",
    "list_archive",
    "refuse_strange",
    "remove_leftovers",
    "unpack_members",
    "workspace",
]
