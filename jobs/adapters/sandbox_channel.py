"""What goes between a worker and a sandbox's child: length, kind and a pickle over a pair of sockets that only these two hold.

The child is not trusted: it may have been taken over by what it parsed. Its pickles may name docmill's own frozen data and errors, and
nothing that could run code here.
"""

from __future__ import annotations

import asyncio
import importlib
import pickle
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

HEAD = struct.Struct("<cQ")
CALL, READY, PART, ANSWER = b"C", b"R", b"P", b"A"
MOST_FILES = 8
"""That may go along with a call."""
_LONG = 100_000
"""Characters of a text from which on it is worth going another way to a child."""
_PIECE = 200_000
"""Characters of such a text that are encoded and sent at once."""
_ALLOWED = frozenset({"jobs.adapters.archives.members", "jobs.adapters.sandbox_child", "models.documents", "models.errors"})


@dataclass(frozen=True, slots=True)
class LongText:
    """Where a text stands that goes behind its call. Pickled as it is, it would keep its UTF-8 beside it for as long as it lives."""

    size: int
    """Bytes."""
    from_end: int
    """Bytes from its beginning to the end of the message."""

    def text(self, message: bytes | bytearray) -> str:
        """Return it."""
        start = len(message) - self.from_end
        return str(memoryview(message)[start : start + self.size], "utf-8", "surrogatepass")


def without_long_texts(args: Sequence[Any]) -> tuple[tuple[Any, ...], list[tuple[int, str]]]:
    """Return arguments with a LongText in the place of each long text, and these with their sizes, as they go behind the call."""
    sent, behind = list(args), 0
    texts: list[tuple[int, str]] = []
    for place, value in reversed(list(enumerate(args))):
        if isinstance(value, str) and len(value) > _LONG:
            size = sum(map(len, utf8_pieces(value)))
            behind += size
            sent[place] = LongText(size, behind)
            texts.insert(0, (size, value))
    return tuple(sent), texts


def utf8_pieces(text: str) -> Iterator[bytes]:
    """Yield a text's UTF-8, lone surrogates included, of which only a piece is in memory at a time."""
    for start in range(0, len(text), _PIECE):
        yield text[start : start + _PIECE].encode("utf-8", "surrogatepass")


class _Careful(pickle.Unpickler):
    """Makes plain values and instances of classes that are defined in the modules above; anything else is an UnpicklingError."""

    def find_class(self, module: str, name: str) -> Any:
        if module in _ALLOWED and name.isidentifier():
            found = getattr(importlib.import_module(module), name, None)
            # A pickle sets attributes of what brings no way of its own to be set, as enumerations: of the class and its members here.
            if isinstance(found, type) and found.__module__ == module and hasattr(found, "__setstate__"):
                return found
        raise pickle.UnpicklingError(f"a sandbox's child may not send {module}.{name}")


class _View:
    """Bytes as a file, of which only what is read is copied."""

    def __init__(self, data: bytes | bytearray) -> None:
        self._data, self._at = data, 0

    def read(self, size: int) -> bytes:
        start, self._at = self._at, min(len(self._data), self._at + size)
        return bytes(memoryview(self._data)[start : self._at])

    def readline(self) -> bytes:
        end = self._data.find(b"\n", self._at) + 1 or len(self._data)
        return self.read(end - self._at)


def loads_carefully(data: bytes | bytearray) -> Any:
    """Return what a child has pickled. Raises pickle.UnpicklingError, or anything else, on what no child of good will sends."""
    return _Careful(_View(data)).load()


class _Parts:
    """A file that keeps what is written as it is given: what is large is not copied."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def write(self, part: bytes) -> int:
        self.parts.append(part)
        return len(part)


def pickled(value: Any) -> list[bytes]:
    """Return a pickle, in parts."""
    made = _Parts()
    pickle.dump(value, made, protocol=pickle.HIGHEST_PROTOCOL)
    return made.parts


async def send_call(sock: socket.socket, payload: Sequence[bytes], files: Sequence[int], behind: Sequence[tuple[int, str]] = ()) -> None:
    """Send a call, whose parts follow each other, with open files, and texts and their sizes behind it. OSError if the child is gone."""
    loop = asyncio.get_running_loop()
    head = HEAD.pack(CALL, sum(map(len, payload)) + sum(size for size, _ in behind))
    # The child has taken in every call before, so there is room for a few bytes.
    sent = socket.send_fds(sock, [head], list(files)) if files else sock.send(head)
    for part in chain((head[sent:], *payload), *(utf8_pieces(text) for _, text in behind)):
        if part:
            await loop.sock_sendall(sock, part)


async def receive(sock: socket.socket, most: int) -> tuple[bytes, bytearray]:
    """Return the kind and content of what a child sends next. EOFError or OSError if it is gone, ValueError for more than `most` bytes."""
    kind, length = HEAD.unpack(await read_exactly(sock, HEAD.size))
    if length > most:
        raise ValueError(f"{length:,} bytes, more than the {most:,} that are allowed")
    return kind, await read_exactly(sock, length)


async def read_exactly(sock: socket.socket, length: int) -> bytearray:
    """Return so many bytes; EOFError or OSError if the other end is gone before."""
    loop = asyncio.get_running_loop()
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = await loop.sock_recv_into(sock, view)
        if count == 0:
            raise EOFError("the child has closed its end")
        view = view[count:]
    return data


def send_blocking(sock: socket.socket, kind: bytes, payload: bytes) -> None:
    """The child's side: send something."""
    sock.sendall(HEAD.pack(kind, len(payload)))
    sock.sendall(payload)


def receive_blocking(sock: socket.socket) -> tuple[bytearray, list[int]]:
    """The child's side: return a call and the files that came with it. EOFError if the parent is gone."""
    head, files, _, _ = socket.recv_fds(sock, HEAD.size, MOST_FILES)
    head += _read_blocking(sock, HEAD.size - len(head)) if head else b""
    if not head:
        raise EOFError("the parent has closed its end")
    return _read_blocking(sock, HEAD.unpack(head)[1]), list(files)


def _read_blocking(sock: socket.socket, length: int) -> bytearray:
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = sock.recv_into(view)
        if count == 0:
            raise EOFError("the parent has closed its end")
        view = view[count:]
    return data
