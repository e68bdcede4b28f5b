"""Storage: no name leads out of it, no half-written file is ever seen, no submission is stored in part."""

import errno
import hashlib
import io
import os
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.adapters.sandbox import ProcessSandbox
from jobs.adapters.storage import LocalStorage, StoredUpload, Upload, discard, safe_display_name
from jobs.adapters.storage.faults import source_faults, storage_faults
from jobs.adapters.stored_file import StoredFile
from models.errors import ConfigurationError, PermanentError, RetryableError, StorageAway, SubmitError
from models.settings import Settings

ROOT = Path(__file__).parents[2]
LIMIT = 10_000_000


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    (tmp_path / "base" / "uploads").mkdir(parents=True)
    return LocalStorage(tmp_path / "base")


def stored_files(storage: LocalStorage) -> list[str]:
    return storage.list_files("**/*")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a\0b", "..", "uploads/../../x", "\ud800"])
def test_a_name_that_leaves_the_base_is_refused_everywhere(storage: LocalStorage, name: str) -> None:
    for use in (storage.resolve, storage.ensure_directory, storage.size, storage.delete, storage.detect_type):
        with pytest.raises(PermanentError):
            use(name)
    with pytest.raises(PermanentError):
        storage.read(name, LIMIT)
    with pytest.raises(PermanentError):
        storage.write(name, b"x")
    with pytest.raises(PermanentError):
        storage.list_files("*", name)


def test_symbolic_links_are_followed_inside_and_refused_outside(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret.txt").write_text("secret")
    storage.write("real/file.txt", "inside")
    (storage.base / "out").symlink_to(tmp_path / "outside")
    (storage.base / "in").symlink_to(storage.base / "real")
    (storage.base / "circle").symlink_to(storage.base / "circle")
    assert storage.read("in/file.txt", LIMIT) == b"inside"
    for name in ("out", "out/secret.txt", "out/new.txt"):
        with pytest.raises(PermanentError, match="symbolic link"):
            storage.resolve(name)
    assert "out/secret.txt" not in storage.list_files("*/*.txt")
    with pytest.raises(PermanentError, match="circle"):
        storage.size("circle")


@given(st.text(max_size=30))
def test_whatever_resolves_lies_inside(name: str) -> None:
    storage = LocalStorage(Path("/nonexistent/base"))
    try:
        path = storage.resolve(name)
    except PermanentError:
        return
    assert path.is_relative_to(storage.base)


def test_a_write_replaces_the_whole_file_or_nothing(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write("a/b.md", "old")
    storage.write("a/b.md", "näw", durable=False)
    assert storage.read("a/b.md", LIMIT).decode() == "näw"
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(RetryableError, match="full"):
        storage.write("a/b.md", "newer")
    assert storage.read("a/b.md", LIMIT).decode() == "näw"
    assert stored_files(storage) == ["a/b.md"]


def test_reading_names_what_is_wrong_with_the_file(storage: LocalStorage) -> None:
    storage.write("a/file", b"12345")
    os.mkfifo(storage.base / "pipe")
    for name, fault in (
        ("none", "does not exist"),
        ("a", "is a folder"),
        ("pipe", "not a regular file"),
        ("a/file/x", "a file where a folder"),
    ):
        for use in (storage.size, lambda name: storage.read(name, LIMIT), storage.detect_type, storage.fingerprint):
            with pytest.raises(PermanentError, match=fault):
                use(name)
    with pytest.raises(PermanentError, match="larger than the 4 bytes"):
        storage.read("a/file", 4)
    assert (storage.size("a/file"), storage.read("a/file", 5)) == (5, b"12345")
    with pytest.raises(PermanentError, match="is a folder"):
        storage.write("a", b"x")
    with pytest.raises(PermanentError, match="a file where a folder is meant"):
        storage.ensure_directory("a/file")


def test_files_are_listed_by_pattern_and_deleted(storage: LocalStorage) -> None:
    for name in ("x/b.md", "x/a.md", "x/deep/c.md", "x/d.txt"):
        storage.write(name, b"x")
    assert storage.list_files("*.md", "x") == ["x/a.md", "x/b.md"]
    assert storage.list_files("**/*.md", "x") == ["x/a.md", "x/b.md", "x/deep/c.md"]
    assert storage.list_files("*", "nowhere") == []
    assert (storage.delete("x/a.md"), storage.delete("x/a.md")) == (True, False)
    for pattern in ("../*", "/etc/*", "", "a\0"):
        with pytest.raises(PermanentError):
            storage.list_files(pattern)


@pytest.mark.parametrize("kind", ["path", "bytes", "open file"])
def test_an_upload_lies_where_its_document_and_content_say(storage: LocalStorage, tmp_path: Path, kind: str) -> None:
    content = os.urandom(2_500_000)
    (tmp_path / "f").write_bytes(content)
    sources: dict[str, Path | bytes | io.BytesIO] = {"path": tmp_path / "f", "bytes": content, "open file": io.BytesIO(content)}
    source = sources[kind]
    stored = storage.store_upload("../weird id", source, LIMIT)
    digest = hashlib.sha256(content).hexdigest()
    assert stored.file_path == f"uploads/{hashlib.sha256(b'../weird id').hexdigest()}/{digest}"
    assert (stored.size, stored.sha256) == (len(content), digest)
    assert storage.read(stored.file_path, LIMIT) == content
    assert stored_files(storage) == [stored.file_path]


def test_the_same_content_is_kept_and_a_damaged_copy_is_healed(storage: LocalStorage) -> None:
    first = storage.store_upload("d", b"content", LIMIT)
    path = storage.resolve(first.file_path)
    inode = path.stat().st_ino
    assert storage.store_upload("d", b"content", LIMIT) == first
    assert path.stat().st_ino == inode
    path.write_bytes(b"CONTENT")
    assert storage.store_upload("d", b"content", LIMIT) == first
    assert path.read_bytes() == b"content"
    assert storage.store_upload("d", b"other", LIMIT).file_path != first.file_path
    assert len(stored_files(storage)) == 2


def test_equal_uploads_at_once_all_succeed(storage: LocalStorage) -> None:
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda _: storage.store_upload("d", b"x" * 100_000, LIMIT), range(40)))
    assert len(set(results)) == 1
    assert stored_files(storage) == [results[0].file_path]


async def test_an_upload_can_be_awaited(storage: LocalStorage) -> None:
    assert (await storage.store_upload_async("d", b"x", LIMIT)).size == 1


def test_uploads_are_stored_together_each_with_its_own_fate(storage: LocalStorage, tmp_path: Path) -> None:
    again = storage.store_upload("again", b"again", LIMIT)
    uploads = [Upload(f"d{number}", b"%d" % number, LIMIT) for number in range(20)]
    uploads += [Upload("again", b"again", LIMIT), Upload("gone", tmp_path / "gone", LIMIT), Upload("large", b"x" * 100, 99)]
    *sound, kept, gone, large = storage.store_uploads(uploads)
    for number, stored in enumerate(sound):
        assert isinstance(stored, StoredUpload)
        assert storage.read(stored.file_path, LIMIT) == b"%d" % number
    assert kept == again
    assert isinstance(gone, SubmitError) and "does not exist" in str(gone)
    assert isinstance(large, SubmitError) and "larger" in str(large)
    assert len(stored_files(storage)) == 21, "nothing is left behind"


@pytest.mark.parametrize("count", [1, 16])
def test_no_upload_has_its_name_before_its_content_is_on_the_disk_nor_is_reported_before_its_name_is(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    storage.ensure_directory("uploads")
    storage.ensure_directory("temp")
    synced: list[str] = []
    moved: dict[str, list[str]] = {}
    replace, fsync = Path.replace, os.fsync

    def noted_sync(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

    def noted_replace(path: Path, target: Path) -> Path:
        assert str(path) in synced
        moved[str(target)] = list(synced)
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    stored = storage.store_uploads([Upload(f"d{number}", b"x", LIMIT) for number in range(count)])
    assert len(moved) == count == len(stored)
    for target, before in moved.items():
        folder = str(Path(target).parent)
        assert folder in synced and folder not in before
    assert synced.index(str(storage.base / "uploads")) >= count, "the folders are made by then"
    assert len(synced) == 2 * count + 1


def test_a_disk_that_fails_one_file_fails_no_other_and_keeps_nothing_of_it(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.ensure_directory("uploads")
    fsync = os.fsync
    failing = iter([False, False, True])

    def sometimes(descriptor: int) -> None:
        if str(Path(f"/proc/self/fd/{descriptor}").readlink()).endswith(".part") and next(failing, False):
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sometimes)
    stored = storage.store_uploads([Upload(f"d{number}", b"x", LIMIT) for number in range(5)])
    assert sorted(type(each).__name__ for each in stored) == ["RetryableError", *["StoredUpload"] * 4]
    assert len(stored_files(storage)) == 4


def test_a_folder_that_cannot_be_made_durable_stores_nothing_that_it_holds(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.ensure_directory("uploads")
    fsync = os.fsync

    def fails_above(descriptor: int) -> None:
        if str(Path(f"/proc/self/fd/{descriptor}").readlink()).endswith("uploads"):
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_above)
    stored = storage.store_uploads([Upload(f"d{number}", b"x", LIMIT) for number in range(3)])
    assert all(isinstance(each, RetryableError) for each in stored)


def test_a_folder_that_vanishes_while_a_file_is_moved_there_is_made_again(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, times = Path.replace, iter([1, 2])

    def late(path: Path, target: Path) -> Path:
        if next(times, None):
            target.parent.rmdir()
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", late)
    assert storage.read(storage.store_upload("d", b"x", LIMIT).file_path, LIMIT) == b"x"


def test_what_cannot_be_submitted_is_refused_by_name_and_leaves_nothing(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 101)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    cases: list[tuple[Path | bytes | io.BytesIO, str]] = [
        (tmp_path / "none", "none' does not exist"),
        (tmp_path / "large", "large' is larger than the 100 bytes that MAX_FILE_SIZE_MB"),
        (tmp_path / "folder", "folder' is a folder"),
        (tmp_path / "pipe", "pipe' is not a regular file"),
        (Path("/dev/zero"), "zero' is not a regular file"),
        (tmp_path / ("n" * 300), "too long a name"),
        (b"x" * 101, "is larger than the 100 bytes"),
        (io.BytesIO(b"x" * 101), "is larger"),
    ]
    for source, fault in cases:
        with pytest.raises(SubmitError, match=fault):
            storage.store_upload("d", source, 100)
    assert stored_files(storage) == []
    assert storage.store_upload("d", b"x" * 100, 100).size == 100


def test_an_empty_file_is_stored_so_that_validate_can_say_what_is_wrong(storage: LocalStorage, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    stored = [storage.store_upload("d", source, LIMIT) for source in (tmp_path / "empty", b"", io.BytesIO())]
    assert {upload.size for upload in stored} == {0}
    assert storage.read(stored[0].file_path, LIMIT) == b""


def test_an_endless_stream_is_stopped_at_the_limit(storage: LocalStorage) -> None:
    class Endless(io.RawIOBase):
        given = 0

        def read(self, size: int = -1) -> bytes:
            self.given += size
            return b"x" * size

    source = Endless()
    with pytest.raises(SubmitError, match="larger"):
        storage.store_upload("d", source, LIMIT)  # type: ignore[arg-type]  # a raw stream reads like a BinaryIO
    assert source.given < 2 * LIMIT
    assert stored_files(storage) == []


def test_text_streams_are_a_programming_error(storage: LocalStorage) -> None:
    with pytest.raises(TypeError, match="binary mode"):
        storage.store_upload("d", io.StringIO("x"), LIMIT)  # type: ignore[arg-type]  # this is what must fail
    assert stored_files(storage) == []


@pytest.mark.parametrize("change", ["grows", "shrinks", "is rewritten"])
def test_a_file_that_changes_while_it_is_copied_is_refused(
    storage: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = tmp_path / "moving.txt"
    path.write_bytes(b"x" * 3_000_000)
    os.utime(path, (1, 1))

    def meddle(descriptor: int, block: bytes | memoryview) -> None:
        if change == "grows":
            with path.open("ab") as file:
                file.write(b"more")
        elif change == "shrinks":
            os.truncate(path, 2_500_000)
        else:
            path.open("r+b").write(b"y")
        os.write(descriptor, block)

    monkeypatch.setattr("jobs.adapters.storage.local.write_all", meddle)
    with pytest.raises(RetryableError, match=r"moving.txt' changed while"):
        storage.store_upload("d", path, LIMIT)
    assert stored_files(storage) == []


def test_uploads_take_flat_memory(storage: LocalStorage, tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as file:
        file.truncate(64_000_000)
    with (tmp_path / "big").open("rb") as stream:
        for source in (tmp_path / "big", stream):
            tracemalloc.start()
            storage.store_upload("d", source, 64_000_000)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 8_000_000


def _in_small_mount(options: str, tmp_path: Path, then: str = "") -> str:
    """Store 1 MB into a small file system of its own; return the name of the error and its message."""
    code = (
        "import sys; from pathlib import Path; from jobs.adapters.storage import LocalStorage\n"
        "try: LocalStorage(Path(sys.argv[1])).store_upload('d', b'x' * 1_000_000, 10**9)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "print('left:', [str(p) for p in Path(sys.argv[1]).rglob('*') if p.is_file()])\n"
    )
    (tmp_path / "mount").mkdir()
    script = f'mount -t tmpfs -o {options} none "$1" || exit 77; mkdir "$1/uploads"; {then} exec "$2" -c "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path / "mount"), sys.executable, code]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=60)
    if not done.stdout:
        pytest.skip(f"this machine does not let tests mount a file system: {done.stderr.strip()}")
    return done.stdout


def test_a_full_storage_is_retryable_and_keeps_nothing(tmp_path: Path) -> None:
    said = _in_small_mount("size=256k", tmp_path)
    assert said.startswith("StorageAway") and "STORAGE_BASE_PATH) is full" in said and "left: []" in said


def test_a_read_only_storage_is_retryable_and_says_so(tmp_path: Path) -> None:
    said = _in_small_mount("size=8m", tmp_path, 'mount -o remount,ro "$1";')
    assert said.startswith("StorageAway") and "is read-only" in said


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (errno.ENOSPC, StorageAway, "is full"),
        (errno.EDQUOT, StorageAway, "disk quota"),
        (errno.EROFS, StorageAway, "read-only"),
        (errno.ESTALE, StorageAway, "file server"),
        (errno.EACCES, RetryableError, "does not let this user in"),
        (errno.EIO, RetryableError, "failed"),
        (errno.EXDEV, RetryableError, "must lie on one"),
        (errno.ENOENT, PermanentError, "does not exist"),
    ],
)
def test_trouble_with_the_storage_itself_is_nobodys_fault(storage: LocalStorage, code: int, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words) as raised, storage_faults(storage.base, "name"):
        raise OSError(code, os.strerror(code))
    assert type(raised.value) is kind


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
async def test_a_file_of_a_storage_that_is_not_mounted_is_no_file_that_is_gone(storage: LocalStorage, tmp_path: Path, left: str) -> None:
    """Where nothing is mounted there may still be the empty folder to mount it on."""
    name = storage.store_upload("d", b"content", LIMIT).file_path
    folder = Path(name).parent.name
    storage.base.rename(tmp_path / "elsewhere")
    if left != "nothing":
        storage.base.mkdir()
    uses = (storage.size, storage.fingerprint, storage.detect_type, lambda name: storage.read(name, LIMIT))
    for use in uses:
        with pytest.raises(StorageAway, match=r"STORAGE_BASE_PATH\) is not there: is it mounted\?"):
            use(name)
    sandbox = ProcessSandbox(children=1)
    with pytest.raises(StorageAway, match="is it mounted"):
        await sandbox.run(StoredFile.read_bytes, storage.file(name))
    with pytest.raises(StorageAway, match="is it mounted"):
        discard(storage, name, untouched_for=0)
    with pytest.raises(StorageAway, match="is it mounted"):
        storage.store_upload("d", b"more", LIMIT)
    (tmp_path / "elsewhere").rename(storage.base)  # which would fail if anything had been stored in its place
    assert storage.read(name, LIMIT) == b"content"
    for missing in (f"uploads/{folder}/other", "uploads/other/file", "other", "inbox/file"):
        with pytest.raises(PermanentError, match="does not exist"):
            storage.size(missing)
    with pytest.raises(PermanentError, match="does not exist: was it submitted with another STORAGE_BASE_PATH"):
        await sandbox.run(StoredFile.read_bytes, storage.file("uploads/other/file"))
    assert discard(storage, "inbox/file", untouched_for=0), "a folder of somebody's own has gone"
    await sandbox.aclose()


@pytest.mark.parametrize(
    ("base", "fault"),
    [("file", "is no folder"), ("/proc", "cannot hold a folder 'uploads': No such file or directory")],
)
def test_a_base_that_is_no_folder_or_can_hold_none_is_a_wrong_setting(tmp_path: Path, base: str, fault: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    place = tmp_path / base
    with pytest.raises(ConfigurationError) as caught:
        LocalStorage.prepared(Settings(storage_base_path=place))
    assert f"STORAGE_BASE_PATH={str(place)!r}" in str(caught.value)
    assert fault in str(caught.value)


def test_a_stored_file_waits_while_the_base_is_no_folder(storage: LocalStorage) -> None:
    name = storage.store_upload("d", b"content", LIMIT).file_path
    storage.base.rename(storage.base.with_name("elsewhere"))
    storage.base.write_bytes(b"x")
    with pytest.raises(StorageAway, match=f"STORAGE_BASE_PATH='{storage.base}' is no folder"):
        storage.size(name)


def test_nothing_is_stored_in_the_place_of_a_storage_that_is_not_there(tmp_path: Path) -> None:
    settings = Settings(storage_base_path=tmp_path / "new" / "base")
    (tmp_path / "finished").write_bytes(b"x")
    storage = LocalStorage.from_settings(settings)
    uses = (
        lambda: storage.store_upload("d", b"x", LIMIT),
        lambda: storage.take_upload("d", tmp_path / "finished", 1, hashlib.sha256(b"x").hexdigest()),
        lambda: storage.write("a/b", b"x"),
        lambda: storage.write("a", b"x"),
        lambda: storage.ensure_directory("temp"),
    )
    for parent in (tmp_path, storage.base.parent):
        parent.mkdir(exist_ok=True)
        for use in uses:
            with pytest.raises(StorageAway, match="is it mounted"):
                use()
        assert not storage.base.exists()
    assert LocalStorage.prepared(settings).store_upload("d", b"x", LIMIT).size == 1, "whoever comes first makes it"
    storage.base.rename(tmp_path / "unmounted")
    with pytest.raises(StorageAway, match="is it mounted"):
        LocalStorage.prepared(settings).store_upload("d", b"x", LIMIT)
    assert not storage.base.exists()


@pytest.mark.parametrize(("code", "kind"), [(errno.EACCES, SubmitError), (errno.EIO, RetryableError), (errno.ESTALE, RetryableError)])
def test_an_unreadable_file_is_refused_and_a_failing_disk_is_retried(code: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="'name'"), source_faults("name"):
        raise OSError(code, os.strerror(code))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("report.pdf", "report.pdf"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\ann\\report.pdf", "report.pdf"),
        ("a\x00b\r\n\x1b[31m.txt", "ab[31m.txt"),
        ("invoice\u202efdp.exe", "invoicefdp.exe"),
        ("  Übersicht 报告.docx ", "Übersicht 报告.docx"),
        ("U\u0308.txt", "Ü.txt"),
        ("bad\udcff.txt", "bad\ufffd.txt"),
        ("", "unnamed"),
        ("..", "unnamed"),
        ("folder/", "folder"),
        ("x" * 300 + ".pdf", "x" * 251 + ".pdf"),
        ("x." + "y" * 300, "x." + "y" * 253),
    ],
)
def test_a_display_name_is_safe_to_store_and_show(name: str, shown: str) -> None:
    assert safe_display_name(name) == shown


@given(st.text(alphabet=st.characters(), max_size=400))
def test_any_name_becomes_one_that_postgres_can_hold(name: str) -> None:
    shown = safe_display_name(name)
    assert 1 <= len(shown) <= 255
    assert not set(shown) & set("/\\\0\n\r\u202e") and shown not in {".", ".."}
    shown.encode()
    assert safe_display_name(shown) == shown


def test_a_file_is_discarded_with_its_empty_folder_unless_it_was_stored_lately(storage: LocalStorage) -> None:
    one, two = (storage.store_upload("a", content, 100).file_path for content in (b"one", b"two"))
    assert not discard(storage, one, untouched_for=60)
    assert discard(storage, one, untouched_for=0)
    assert discard(storage, one, untouched_for=60), "what is gone is gone"
    assert storage.read(two, 10) == b"two"
    assert discard(storage, two, untouched_for=0)
    assert list((storage.base / "uploads").iterdir()) == []


def test_storing_the_same_again_touches_the_file_that_is_kept(storage: LocalStorage) -> None:
    path = storage.base / storage.store_upload("a", b"one", 100).file_path
    os.utime(path, (1, 1))
    number = path.stat().st_ino
    storage.store_upload("a", b"one", 100)
    assert path.stat().st_ino == number
    assert not discard(storage, str(path.relative_to(storage.base)), untouched_for=60)


def test_a_file_that_is_stored_between_the_look_and_the_removal_is_there_afterwards(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = storage.store_upload("a", b"one", 100).file_path
    os.utime(storage.base / name, (1, 1))
    rename = Path.rename
    for moment in ("before", "after"):

        def interrupted(path: Path, target: Path, moment: str = moment) -> Path:
            if moment == "before":
                storage.store_upload("a", b"one", 100)
            moved = rename(path, target)
            if moment == "after":
                storage.store_upload("a", b"one", 100)
            return moved

        monkeypatch.setattr(Path, "rename", interrupted)
        discard(storage, name, untouched_for=60)
        monkeypatch.undo()
        assert storage.read(name, 10) == b"one"
        os.utime(storage.base / name, (1, 1))
