"""Storage on a local or shared file system."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Self
from uuid import uuid4

from jobs.adapters.storage.durable import FILE_MODE, is_empty, make_folder, regular, sync, write_all
from jobs.adapters.storage.faults import folder_faults, storage_fault, storage_faults
from jobs.adapters.storage.fingerprints import Fingerprint, fingerprint
from jobs.adapters.storage.names import folder_name
from jobs.adapters.storage.sources import read_blocks
from jobs.adapters.storage.uploads import Copy, StoredUpload, Upload, place_uploads
from jobs.adapters.stored_file import StoredFile
from models.documents import FileType
from models.errors import ConfigurationError, DocmillError, PermanentError
from models.settings import Settings

_BLOCK = 1 << 20  # characters
_prepared: set[Path] = set()
"""Bases that this process has made, or found there."""


class LocalStorage:
    """Files below one base path, named relative to it with `/` between the parts. Safe with any number of threads, processes and hosts.

    A name that leaves the base, or is at fault otherwise, is a PermanentError; trouble with the storage itself (failing) a RetryableError,
    and a StorageAway if it holds for every file (not there, full, read-only).
    """

    def __init__(
        self, base: Path, uploads_dir: str = "uploads", extracted_dir: str = "extracted", temp_dir: str = "temp", logs_dir: str = "logs"
    ) -> None:
        self.base = Path(os.path.realpath(base))
        self.uploads_dir, self.extracted_dir, self.temp_dir, self.logs_dir = uploads_dir, extracted_dir, temp_dir, logs_dir

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """Return the storage that the STORAGE_* settings describe. Creates nothing."""
        return cls(
            settings.storage_base_path,
            settings.storage_uploads_dir,
            settings.storage_extracted_dir,
            settings.storage_temp_dir,
            settings.storage_logs_dir,
        )

    @classmethod
    def prepared(cls, settings: Settings) -> Self:
        """Return the storage, with its base and the folder of uploads made where they are not there.

        Once in a process: a base that is gone or empty later has been unmounted.
        """
        storage = cls.from_settings(settings)
        if storage.base not in _prepared:
            if storage.base.exists() and not storage.base.is_dir():
                raise ConfigurationError(f"STORAGE_BASE_PATH={str(storage.base)!r} is no folder.")
            with folder_faults(storage.base, storage.uploads_dir):
                make_folder(storage.base / storage.uploads_dir)
            _prepared.add(storage.base)
        return storage

    def is_away(self) -> bool:
        """Say whether the base is not there or holds nothing, as where it is not mounted, or has never been in use. OSError."""
        return is_empty(self.base)

    def resolve(self, relative: str) -> Path:
        """Return the absolute path, symbolic links followed. PermanentError if it leaves the base."""
        name = PurePosixPath(relative)
        if "\0" in relative or name.is_absolute() or ".." in name.parts:
            raise PermanentError(f"Stored file {relative!r} must be named by a relative path without '..' and NUL.")
        try:
            path = Path(os.path.realpath(self.base / name))
        except UnicodeEncodeError:
            raise PermanentError(f"Stored file {relative!r} has a name that the file system cannot hold.") from None
        if not path.is_relative_to(self.base):
            raise PermanentError(f"Stored file {relative!r} leads out of the storage at {self.base} through a symbolic link.")
        return path

    def file(self, relative: str) -> StoredFile:
        """Return a stored file for a sandbox's child to read. PermanentError if it would lie outside of the base."""
        return StoredFile(self.resolve(relative), base=self.base)

    def ensure_directory(self, relative: str) -> Path:
        """Create a folder with its parents unless it exists, durably; return its path. ConfigurationError where the base can hold none."""
        path = self.resolve(relative)
        with folder_faults(self.base, relative):
            make_folder(path, self.base)
        return path

    def size(self, relative: str) -> int:
        """Return the size of a stored file in bytes."""
        with storage_faults(self.base, relative):
            return regular(self.resolve(relative).stat()).st_size

    def stamp(self, relative: str) -> tuple[int, int]:
        """Return what another content of a stored file changes: its size in bytes and the time of its last change in ns."""
        with storage_faults(self.base, relative):
            status = regular(self.resolve(relative).stat())
        return status.st_size, status.st_mtime_ns

    @contextmanager
    def open(self, relative: str) -> Iterator[BinaryIO]:
        """Open a stored file for reading; errors inside of the block are the storage's too."""
        path = self.resolve(relative)
        with storage_faults(self.base, relative):
            regular(path.stat())
            with path.open("rb") as file:
                yield file

    def fingerprint(self, relative: str) -> Fingerprint:
        """Return size and SHA-256 of a stored file, read in blocks."""
        with self.open(relative) as file:
            return fingerprint(file)

    def read(self, relative: str, max_bytes: int) -> bytes:
        """Return a stored file's content. PermanentError if it is larger than `max_bytes`."""
        path = self.resolve(relative)
        with storage_faults(self.base, relative):
            regular(path.stat())
            with path.open("rb") as file:
                content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise PermanentError(f"Stored file {relative!r} is larger than the {max_bytes:,} bytes that may be read here.")
        return content

    def write(self, relative: str, content: bytes | str, *, durable: bool = True) -> Path:
        """Write a file atomically, replacing what was there; a reader sees the old content or the new. Text is stored as UTF-8.

        Not `durable`: after a power failure it may be missing or cut short; costs no wait for the disk.
        """
        path = self.resolve(relative)
        with storage_faults(self.base, relative):
            temporary, _, _ = self._write_temporary(_blocks(content), durable=durable)
            try:
                make_folder(path.parent, self.base)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            if durable:
                sync(path.parent)
        return path

    def touch(self, relative: str) -> bool:
        """Have `discard` take a stored file for one that has just been stored; tell whether it is there."""
        path = self.resolve(relative)
        with storage_faults(self.base, relative):
            try:
                os.utime(path)
            except FileNotFoundError:
                return False
        return True

    def delete(self, relative: str) -> bool:
        """Remove a stored file; tell whether there was one."""
        path = self.resolve(relative)
        with storage_faults(self.base, relative):
            try:
                path.unlink()
            except FileNotFoundError:
                return False
        return True

    def list_files(self, pattern: str, folder: str = "") -> list[str]:
        """Return the sorted names of the regular files in a folder that match a glob pattern (`*.md`, `**/*.md`), relative to the base."""
        shape = PurePosixPath(pattern)
        if "\0" in pattern or shape.is_absolute() or ".." in shape.parts or not shape.parts:
            raise PermanentError(f"Pattern {pattern!r} must be relative, without '..' and NUL.")
        start = self.resolve(folder)
        with storage_faults(self.base, folder):
            inside = (path for path in start.glob(pattern) if Path(os.path.realpath(path)).is_relative_to(self.base))
            return sorted(path.relative_to(self.base).as_posix() for path in inside if path.is_file())

    def detect_type(self, relative: str, file_name: str = "") -> FileType:
        """Return the coarse type of a stored file, decided by its content; `file_name`, the submitter's, helps where that is not enough."""
        from jobs.adapters.sniff import sniff  # noqa: PLC0415 - submitting a file needs no sniffer

        path = self.resolve(relative)
        with storage_faults(self.base, relative):
            regular(path.stat())
            return sniff(path, file_name or path.name).file_type

    def store_upload(
        self, doc_id: str, source: Path | bytes | BinaryIO, max_bytes: int, name: str = "", limit_name: str = "MAX_FILE_SIZE_MB"
    ) -> StoredUpload:
        """Copy a submitted file to `uploads/<SHA-256 of doc_id>/<SHA-256 of content>`, durably and in flat memory.

        The same content is kept once. An open file is read from where it stands. `name` is what errors call it, `limit_name` what sets
        `max_bytes`. SubmitError: missing, not a regular file, unreadable, larger than `max_bytes`. RetryableError: it changed meanwhile, or
        the storage is failing, or, as a StorageAway, not there, full or read-only. After an error nothing is left behind.
        """
        (stored,) = self.store_uploads([Upload(doc_id, source, max_bytes, name, limit_name)])
        if isinstance(stored, DocmillError):
            raise stored
        return stored

    def store_uploads(self, uploads: Sequence[Upload]) -> list[StoredUpload | DocmillError]:
        """Do as `store_upload` does with several files, which wait for the disk together; return what it returns or raises for each."""
        copied: list[tuple[str, Copy] | DocmillError] = []
        try:
            copied.extend(map(self._copied, uploads))
            return self._placed(copied)
        finally:
            for copy in copied:
                if not isinstance(copy, DocmillError):
                    copy[1].temporary.unlink(missing_ok=True)

    def take_upload(self, doc_id: str, finished: Path, size: int, sha256: str) -> StoredUpload:
        """Move a finished file of known content from the temp folder to where `store_upload` would have copied it, durably."""
        folder = self._folder_of(doc_id)
        with storage_faults(self.base, folder):
            copy = Copy(self.base, finished, self.resolve(folder) / sha256, size)
        (stored,) = self._placed([(folder, copy)])
        if isinstance(stored, DocmillError):
            raise stored
        finished.unlink(missing_ok=True)
        return stored

    def _folder_of(self, doc_id: str) -> str:
        return f"{self.uploads_dir}/{folder_name(doc_id)}"

    def _copied(self, upload: Upload) -> tuple[str, Copy] | DocmillError:
        """Return the folder that a document's files lie in, and a copy of one on its way there."""
        name = upload.name or (str(upload.source) if isinstance(upload.source, Path) else "upload")
        folder = self._folder_of(upload.doc_id)
        try:
            path = self.resolve(folder)
            with storage_faults(self.base, folder):
                blocks = read_blocks(upload.source, name, upload.max_bytes, upload.limit_name)
                temporary, size, digest = self._write_temporary(blocks, durable=False)
        except DocmillError as error:
            return error
        return folder, Copy(self.base, temporary, path / digest, size)

    def _placed(self, copied: Sequence[tuple[str, Copy] | DocmillError]) -> list[StoredUpload | DocmillError]:
        faults = iter(place_uploads([copy[1] for copy in copied if not isinstance(copy, DocmillError)]))
        stored: list[StoredUpload | DocmillError] = []
        for found in copied:
            if isinstance(found, DocmillError):
                stored.append(found)
            elif (fault := next(faults)) is not None:
                stored.append(storage_fault(fault, self.base, found[0]))
            else:
                folder, copy = found
                stored.append(StoredUpload(f"{folder}/{copy.target.name}", copy.size, copy.target.name))
        return stored

    async def store_upload_async(self, doc_id: str, source: Path | bytes | BinaryIO, max_bytes: int, name: str = "") -> StoredUpload:
        """Do as `store_upload` does, in a thread."""
        return await asyncio.to_thread(self.store_upload, doc_id, source, max_bytes, name)

    def _write_temporary(self, blocks: Iterable[bytes | memoryview], *, durable: bool) -> tuple[Path, int, str]:
        """Write blocks to a new file in the temp folder; return it with size and SHA-256. On any error it is removed again."""
        folder = self.base / self.temp_dir
        path = folder / f"{uuid4().hex}.part"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, FILE_MODE)
        except FileNotFoundError:
            make_folder(folder, self.base)
            descriptor = os.open(path, flags, FILE_MODE)
        size, digest = 0, hashlib.sha256()
        try:
            with open(descriptor, "wb", buffering=0) as file:  # noqa: PTH123 - Path.open takes no descriptor
                for block in blocks:
                    write_all(descriptor, block)
                    digest.update(block)
                    size += len(block)
                if durable:
                    os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path, size, digest.hexdigest()


def _blocks(content: bytes | str) -> Iterator[bytes]:
    """Yield a content in pieces: a large text must not lie in memory a second time."""
    if isinstance(content, bytes):
        yield content
        return
    for start in range(0, len(content), _BLOCK):
        yield content[start : start + _BLOCK].encode()
