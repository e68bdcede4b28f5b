"""What is made of an archive: its names, its limits, and that whatever is bad stays inside."""

from __future__ import annotations

import bz2
import lzma
import stat
import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.adapters.archives import (
    ArchiveLimits,
    Listing,
    Member,
    Unpacked,
    list_archive,
    refuse_strange,
    remove_leftovers,
    unpack_members,
    workspace,
)
from jobs.adapters.storage import LocalStorage
from jobs.adapters.stored_file import StoredFile
from models.errors import ParseError, PermanentError
from models.settings import Settings
from tests.archives import Raw, raw_zip, zip_bytes

LIMITS = ArchiveLimits(entries=50, archive_bytes=10_000_000, unpacked_bytes=5_000_000, file_bytes=2_000_000, ratio=250)


def listed(tmp_path: Path, content: bytes, limits: ArchiveLimits = LIMITS) -> Listing:
    (tmp_path / "a.zip").write_bytes(content)
    return list_archive(StoredFile(tmp_path / "a.zip"), limits)


def unpacked(tmp_path: Path, content: bytes, limits: ArchiveLimits = LIMITS) -> dict[str, Unpacked]:
    """Every member by its path, unpacked or refused, either way by its reason."""
    listing = listed(tmp_path, content, limits)
    folder = tmp_path / "out"
    folder.mkdir(exist_ok=True)
    made = unpack_members(StoredFile(tmp_path / "a.zip"), [m for m in listing.members if m.reason is None], str(folder), limits)
    assert {path.name for path in folder.iterdir()} == {result.file for result in made if result.file is not None}
    return {u.path: u for u in [*made, *(Unpacked(m.path, reason=m.reason) for m in listing.members if m.reason is not None)]}


def reasons(tmp_path: Path, *entries: Raw) -> dict[str, str | None]:
    return {path: result.reason for path, result in unpacked(tmp_path, raw_zip(entries)).items()}


def names(tmp_path: Path, *entries: Raw) -> list[str]:
    return [member.path for member in listed(tmp_path, raw_zip(entries)).members]


def refusal(tmp_path: Path, content: bytes, limits: ArchiveLimits = LIMITS) -> str:
    with pytest.raises(PermanentError) as caught:
        listed(tmp_path, content, limits)
    assert "a.zip" not in str(caught.value)
    return str(caught.value)


GOOD = zip_bytes({"a.txt": "one", "b/c.txt": "two"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no archive at all", "no zip archive"),
        (b"", "no zip archive"),
        (GOOD[:-30], "end is missing"),
        (GOOD[: len(GOOD) // 2], "end is missing"),
        (GOOD.replace(b"PK\x01\x02", b"PK\x01\x03", 1), "central directory is damaged"),
        (raw_zip([]), "is empty"),
        (zip_bytes({"folder/": "", "__MACOSX/._a": "x", ".DS_Store": "x"}), "holds no files (3 "),
        (raw_zip(Raw(b"%d.txt" % i) for i in range(51)), "MAX_ARCHIVE_ENTRIES"),
        (raw_zip([*(Raw(b"d%d/" % i) for i in range(2000))]), "MAX_ARCHIVE_ENTRIES"),
        (raw_zip(Raw(b"%d.txt" % i, bytes(range(256)) * 6000, 0) for i in range(4)), "MAX_ARCHIVE_UNPACKED_MB"),
        (raw_zip([Raw(b"a"), Raw(b"b", lies_at=0), Raw(b"c", lies_at=0)]), "upon one another"),
        (GOOD[:-18] + b"\x02\x00\x02\x00" + GOOD[-14:], "split over several files"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_archive_that_is_bad_as_a_whole_is_refused_with_the_rule_and_the_limit(content: bytes, words: str, tmp_path: Path) -> None:
    assert words in refusal(tmp_path, content)


def test_an_archive_that_is_too_large_is_refused(tmp_path: Path) -> None:
    assert "MAX_ARCHIVE_MB" in refusal(tmp_path, GOOD, replace(LIMITS, archive_bytes=100))


BAD = {
    "encrypted": (Raw(b"bad.txt", flags=1), "encrypted"),
    "aes": (Raw(b"bad.txt", method=99), "encrypted"),
    "crc": (Raw(b"bad.txt", crc=1), "CRC-32"),
    "method": (Raw(b"bad.txt", method=93), "zstd"),
    "unknown method": (Raw(b"bad.txt", method=77), "method 77"),
    "symbolic link": (Raw(b"bad.txt", b"/etc/passwd", 0, mode=stat.S_IFLNK | 0o777), "symbolic link"),
    "pipe": (Raw(b"bad.txt", mode=stat.S_IFIFO | 0o600), "special file"),
    "too large": (Raw(b"bad.txt", b"x" * 2_000_001), "MAX_FILE_SIZE_MB"),
    "ratio": (Raw(b"bad.txt", b"\0" * 1_500_000), "MAX_ARCHIVE_RATIO"),
    "longer than declared": (Raw(b"bad.txt", b"x" * 5000, size=10), "larger than the 10 bytes"),
    "shorter than declared": (Raw(b"bad.txt", b"x" * 10, size=5000), "ends after 10"),
    "beyond the end": (Raw(b"bad.txt", compressed=10_000), "outside of the archive"),
    "4 GiB that are not there": (Raw(b"bad.txt", size=2**32 - 2, compressed=2**32 - 2), "outside of the archive"),
    "no sizes": (Raw(b"bad.txt", size=2**32 - 1, extra=struct.pack("<2H", 1, 0)), "directory does not say"),
    "path too long": (Raw(b"b" * 1300 + b".txt"), "1,200 bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_entry_fails_alone_with_its_reason(case: str, tmp_path: Path) -> None:
    entry, words = BAD[case]
    found = reasons(tmp_path, Raw(b"before.txt", b"good"), entry, Raw(b"behind.txt", b"good"))
    bad = {path: reason for path, reason in found.items() if reason is not None}
    assert len(found) == 3
    assert len(bad) == 1
    assert words in next(iter(bad.values()))


def test_compressed_data_that_is_damaged_fails_its_entry_alone(tmp_path: Path) -> None:
    content = bytearray(raw_zip([Raw(b"a.txt", bytes(range(256)) * 20), Raw(b"b.txt")]))
    content[40:60] = b"\xff" * 20
    found = {path: result.reason for path, result in unpacked(tmp_path, bytes(content)).items()}
    assert "damaged" in str(found["a.txt"])
    assert found["b.txt"] is None


@pytest.mark.parametrize(
    "name", [b"../up.txt", b"a/../../up.txt", b"..\\up.txt", b"/etc/up.txt", b"\\\\host\\share\\up.txt", b"C:\\up.txt", b"c:/up.txt", b".."]
)
def test_a_name_that_leads_outside_is_refused_and_writes_nothing_there(name: bytes, tmp_path: Path) -> None:
    found = reasons(tmp_path, Raw(name), Raw(b"good.txt"))
    assert sum(reason is not None and "outside" in reason for reason in found.values()) == 1
    assert [path.name for path in tmp_path.rglob("up.txt")] == []


def test_a_colon_in_a_name_is_no_drive(tmp_path: Path) -> None:
    assert reasons(tmp_path, Raw(b"Q: what.txt"), Raw(b"a:b/c.txt")) == {"Q: what.txt": None, "a:b/c.txt": None}


def test_paths_that_are_cut_stay_apart(tmp_path: Path) -> None:
    given = [f"{'p/' * 60}{middle * 300}{'q/' * 60}same.txt".encode() for middle in ("aaaa/", "bbbb/")]
    found = reasons(tmp_path, Raw(given[0], b"same"), Raw(given[1], b"same"), Raw(given[1], b"same"), Raw(b"ok.txt"))
    assert len(found) == 4
    assert found.pop("ok.txt") is None
    assert all(path.endswith("same.txt") or path.endswith("same (2).txt") for path in found)


def test_folders_hidden_and_system_files_are_skipped_and_counted(tmp_path: Path) -> None:
    skipped = [b"d/", b"__MACOSX/._x.txt", b"d/.DS_Store", b"d/Thumbs.db", b"desktop.ini", b".git/config", b"d/~$x.docx"]
    listing = listed(tmp_path, raw_zip([Raw(b"d/x.txt"), *(Raw(name) for name in skipped), Raw(b"e", mode=stat.S_IFDIR | 0o755)]))
    assert ([member.path for member in listing.members], listing.skipped) == (["d/x.txt"], 8)


def test_an_empty_entry_that_is_a_folder_by_its_attributes_alone_is_one(tmp_path: Path) -> None:
    entries = [Raw(b"folder", b"", 0), Raw(b"folder/a.txt"), Raw(b"full", b"text", 0)]
    content = bytearray(raw_zip(entries))
    at = 0
    for name in (b"folder", b"folder/a.txt", b"full"):
        at = content.index(b"PK\x01\x02", at + 1)
        content[at + 5] = 0  # made by DOS or Windows
        content[at + 38 : at + 42] = struct.pack("<L", 0x20 if name == b"folder/a.txt" else 0x10)
    listing = listed(tmp_path, bytes(content))
    assert ([member.path for member in listing.members], listing.skipped) == (["folder/a.txt", "full"], 1)


def test_entries_of_one_name_are_all_kept_and_told_apart(tmp_path: Path) -> None:
    given = [b"d/a.txt", b"d/a.txt", b"d\\a.txt", b"d/a (2).txt", b"none", b"none", b"A.txt", b"a.TXT"]
    assert names(tmp_path, *map(Raw, given)) == [
        "d/a.txt", "d/a (3).txt", "d/a (4).txt", "d/a (2).txt", "none", "none (2)", "A.txt", "a.TXT",
    ]  # fmt: skip
    folders = [b"x.zip", b"x.zip/a.txt", b"x (2).zip/a.txt", b"x.zip", b"x.zi"]
    assert names(tmp_path, *map(Raw, folders)) == ["x (3).zip", "x.zip/a.txt", "x (2).zip/a.txt", "x (4).zip", "x.zi"]


@pytest.mark.parametrize(
    ("encoding", "given"),
    [
        ("utf-8", ["Größe.txt", "名前.txt"]),
        ("cp437", ["résumé.doc", "Bücher/naïve.txt"]),
        ("cp850", ["Größe und Maß.txt", "Übersicht.pdf"]),
        ("cp1252", ["Größe und Maß.txt", "Übersicht.pdf"]),
        ("cp866", ["Отчёт за год.docx", "Документ.pdf"]),
        ("cp1251", ["Отчёт за год.docx", "Документ.pdf"]),
        ("cp932", ["議事録.docx", "文章1.txt", "カタカナ表.xlsx"]),
        ("gbk", ["北京报告.txt", "文件夹/新建文本文档.txt"]),
        ("gbk", ["七个房间.txt"]),
        ("cp949", ["보고서.hwp", "새 문서.txt"]),
    ],
)
def test_names_in_old_encodings_are_read(encoding: str, given: list[str], tmp_path: Path) -> None:
    assert names(tmp_path, *(Raw(name.encode(encoding)) for name in given)) == given


@pytest.mark.parametrize("before", ["", "x"])
def test_many_names_in_an_old_encoding_are_read(before: str, tmp_path: Path) -> None:
    given = [f"{before}議事録.docx", *(f"{number}号_東京都千代田区の契約書.pdf" for number in range(700))]
    content = raw_zip([Raw(name.encode("cp932")) for name in given])
    assert [member.path for member in listed(tmp_path, content, replace(LIMITS, entries=1000)).members] == given


def test_a_name_is_what_the_unicode_field_says_only_while_it_belongs_to_it(tmp_path: Path) -> None:
    def field(of: bytes, name: str) -> bytes:
        body = b"\x01" + struct.pack("<L", zlib.crc32(of)) + name.encode()
        return struct.pack("<2H", 0x7075, len(body)) + body

    assert names(
        tmp_path,
        Raw(b"M\x81ller.txt", extra=field(b"M\x81ller.txt", "Müller-x.txt")),
        Raw(b"other.txt", extra=field(b"old.txt", "wrong.txt")),
    ) == ["Müller-x.txt", "other.txt"]


def test_a_name_that_is_no_utf8_although_it_says_so_costs_neither_itself_nor_its_neighbours(tmp_path: Path) -> None:
    found = names(tmp_path, Raw(b"bad\xff\xfe.txt", flags=0x800), Raw("gut-ä.txt".encode(), flags=0x800))
    assert found[1] == "gut-ä.txt"
    assert found[0].endswith(".txt")


def test_control_characters_in_names_become_visible(tmp_path: Path) -> None:
    assert names(tmp_path, Raw(b"a\x1b[31m\n.txt"), Raw(b"nul\0.txt"), Raw("a\u202e.txt".encode()), Raw(b"")) == [
        r"a\x1b[31m\n.txt", r"nul\x00.txt", r"a\u202e.txt", "unnamed",
    ]  # fmt: skip


def test_every_supported_compression_gives_the_content_back(tmp_path: Path) -> None:
    content = b"many words " * 5000
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as made:
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
            made.writestr(f"{method}.txt", content, method)
    found = unpacked(tmp_path, (tmp_path / "made.zip").read_bytes())
    assert [result.reason for result in found.values()] == [None] * 4
    assert {(tmp_path / "out" / str(result.file)).read_bytes() for result in found.values()} == {content}


@pytest.mark.parametrize("method", [8, 12, 14])
def test_output_that_would_not_end_is_stopped_at_what_the_archive_declares(method: int, tmp_path: Path) -> None:
    bomb = bytes(50_000_000)
    if method == 8:
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = packer.compress(bomb) + packer.flush()
    elif method == 12:
        packed = bz2.compress(bomb)
    else:
        filters = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 20, "lc": 3, "lp": 0, "pb": 2}]
        packed = struct.pack("<2sHBL", b"\x09\x14", 5, 93, 1 << 20) + lzma.compress(bomb, lzma.FORMAT_RAW, filters=filters)
    stored = raw_zip([Raw(b"bomb.txt", packed, 0, size=900_000)])
    content = stored.replace(struct.pack("<3H", 20, 0, 0), struct.pack("<3H", 20, 0, method))
    found = unpacked(tmp_path, content)
    assert "larger than the 900,000 bytes" in str(found["bomb.txt"].reason)


def test_an_lzma_entry_cannot_ask_for_all_memory(tmp_path: Path) -> None:
    content = raw_zip([Raw(b"a.txt", struct.pack("<2sHBL", b"\x09\x14", 5, 93, 2**32 - 1) + b"\0" * 20, 0)])
    found = unpacked(tmp_path, content.replace(struct.pack("<3H", 20, 0, 0), struct.pack("<3H", 20, 0, 14)))
    assert "more than the 67,108,864" in str(found["a.txt"].reason)


def test_archives_are_told_from_documents_that_are_archives_inside(tmp_path: Path) -> None:
    from tests.running import REPOSITORY

    office = (REPOSITORY / "samples" / "preisliste-2026.xlsx").read_bytes()
    found = unpacked(tmp_path, zip_bytes({"inner.zip": GOOD, "inner.txt": GOOD, "list.xlsx": office, "word.zip": "no archive"}))
    assert {path: result.is_archive for path, result in found.items()} == {
        "inner.zip": True, "inner.txt": True, "list.xlsx": False, "word.zip": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "content", [raw_zip([Raw(b"a.txt")], before=b"MZ junk"), raw_zip([Raw(b"a.txt")], behind=b"\0" * 100)], ids=["before", "behind"]
)
def test_something_before_or_behind_the_archive_does_no_harm(content: bytes, tmp_path: Path) -> None:
    assert unpacked(tmp_path, content)["a.txt"].reason is None


def test_what_is_damaged_is_an_archive_only_where_it_is_called_one(tmp_path: Path) -> None:
    found = unpacked(tmp_path, zip_bytes({"cut.zip": GOOD[:60], "cut.docx": GOOD[:60], "renamed.bin": GOOD}))
    assert {path: result.is_archive for path, result in found.items()} == {"cut.zip": True, "cut.docx": False, "renamed.bin": True}


def test_a_zip64_archive_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as made, made.open("a.txt", "w", force_zip64=True) as entry:
        entry.write(b"text")
    content = (tmp_path / "made.zip").read_bytes()
    at = content.rfind(b"PK\x05\x06")
    size, offset = struct.unpack_from("<2L", content, at + 12)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, size, offset)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, at, 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    assert unpacked(tmp_path, content[:at] + end64 + locator + end)["a.txt"].reason is None


def test_a_signature_behind_the_directory_ends_it(tmp_path: Path) -> None:
    at = GOOD.rfind(b"PK\x05\x06")
    (size,) = struct.unpack_from("<L", GOOD, at + 12)
    signature = b"PK\x05\x05" + struct.pack("<H", 4) + b"sign"
    end = GOOD[at : at + 12] + struct.pack("<L", size + len(signature)) + GOOD[at + 16 :]
    assert list(unpacked(tmp_path, GOOD[:at] + signature + end)) == ["a.txt", "b/c.txt"]


def test_whatever_the_corpus_holds_ends_in_files_or_words(corpus: Path, tmp_path: Path) -> None:
    seen = 0
    for number, path in enumerate([*(corpus / "hostile" / "zip").iterdir(), *(corpus / "hostile" / "gen" / "zip").iterdir()]):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            unpacked(folder, path.read_bytes(), replace(LIMITS, entries=5000))
        except PermanentError as error:
            assert "a.zip" not in str(error)
        seen += 1
    assert seen > 50


def test_a_workspace_is_removed_by_its_owner_or_after_his_death_but_not_while_he_lives(tmp_path: Path) -> None:
    storage = LocalStorage.prepared(Settings(storage_base_path=tmp_path))
    with workspace(storage) as mine:
        (mine / "file").write_text("x")
        abandoned = storage.base / "temp" / "unpack-dead"
        abandoned.mkdir()
        (abandoned / "file").write_text("x")
        assert remove_leftovers(storage) == 1
        assert (mine.exists(), abandoned.exists()) == (True, False)
    assert list((storage.base / "temp").iterdir()) == []


def test_a_workspace_is_made_also_where_somebody_cleans_up_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage.prepared(Settings(storage_base_path=tmp_path))
    storage.ensure_directory(storage.temp_dir)
    make, removed = Path.mkdir, list[int]()

    def make_and_lose_the_first(self: Path, mode: int = 0o777) -> None:
        make(self, mode)
        if not removed:
            removed.append(remove_leftovers(storage))

    monkeypatch.setattr(Path, "mkdir", make_and_lose_the_first)
    with workspace(storage) as mine:
        assert (removed, mine.is_dir()) == ([1], True)


@pytest.mark.parametrize(
    "made",
    [
        [],
        [Unpacked("b.txt", "7", 1, "0" * 64)],
        [Unpacked("a.txt", "../../uploads/x", 1, "0" * 64)],
        [Unpacked("a.txt", "/etc/passwd", 1, "0" * 64)],
        [Unpacked("a.txt", "7", 1, "0" * 64)] * 2,
    ],
    ids=["none", "another", "outside", "absolute", "twice"],
)
def test_what_a_child_returns_is_believed_only_if_it_was_asked_for(made: list[Unpacked]) -> None:
    asked = [Member("a.txt", 7, 1, 1, 0, 0)]
    refuse_strange([Unpacked("a.txt", "7", 1, "0" * 64)], asked)
    refuse_strange([Unpacked("a.txt", reason="it is damaged")], asked)
    with pytest.raises(ParseError, match="other files"):
        refuse_strange(made, asked)
