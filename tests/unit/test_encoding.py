"""Decoding: text in any encoding comes out readable, nothing fails, and the result can be stored."""

from __future__ import annotations

import codecs
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.adapters.encoding import decode, guess_encoding, storable, storable_value

ENGLISH = "The quick brown fox jumps over the lazy dog.\n" * 4
GERMAN = "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung.\n" * 3
RUSSIAN = "Это русский документ, который должен находиться поиском.\n" * 4
JAPANESE = "これは日本語の文書です。検索できる必要があります。\n" * 4
REPORT = "The quarterly report lists all items that were delivered to the customer in March. "
CHINESE = "这是一份中文合同。双方同意按照以下条款履行各自的义务，并在签字之日起生效。\n"
TAIWANESE = "這是一份中文合約。雙方同意按照以下條款履行各自的義務，並在簽字之日起生效。\n"
KOREAN = "이것은 한국어 문서입니다. 계약서의 내용에 대하여 설명드리겠습니다.\n"
POLISH = "Umowa najmu została zawarta w Łodzi między właścicielem a najemcą. Czynsz wynosi tysiąc złotych miesięcznie, płatny z góry.\n"
GREEK = "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.\n" * 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", [ENGLISH, GERMAN, RUSSIAN, JAPANESE, GREEK], ids=["en", "de", "ru", "ja", "el"])
def test_unicode_encodings_are_told_apart_with_and_without_a_mark(text: str, encoding: str) -> None:
    assert decode(text.encode(encoding)).text == text


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (GERMAN, "cp1252"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8_r"),
        (GREEK, "cp1253"),
        (JAPANESE, "cp932"),
        (JAPANESE, "euc_jp"),
        (JAPANESE, "iso2022_jp"),
        (ENGLISH, "cp500"),
    ],
)
def test_legacy_encodings_are_guessed(text: str, encoding: str) -> None:
    assert decode(text.encode(encoding)).text.replace("\x85", "\n") == text


@pytest.mark.parametrize("encoding", ["cp932", "euc_jp", "gb18030", "big5", "cp949"])
@pytest.mark.parametrize("before", range(4))
def test_where_the_sample_ends_within_a_character_is_no_matter(encoding: str, before: int) -> None:
    sentence = {"gb18030": CHINESE, "big5": TAIWANESE, "cp949": KOREAN}.get(encoding, JAPANESE)
    text = "x" * before + sentence * 400
    assert decode(text.encode(encoding)).text == text


@pytest.mark.parametrize(
    "text",
    [
        "Rent £950 pcm. " * 50,
        f"{REPORT}We paid £100 and £250 for it. {REPORT * 5}",
        "§ 5",
        "100 €",
        "room,value\n" + "".join(f"room {number},0.18 W/m²K at 20°C\n" for number in range(20)),
        f"{REPORT}The wall has a U-value of 0.18 W/m²K, the house needs 85 kWh/m²a. {REPORT}",
    ],
)
def test_signs_of_western_texts_are_no_letters_of_other_languages(text: str) -> None:
    assert decode(text.encode("cp1252")).text == text


@pytest.mark.parametrize(
    ("text", "encoding"),
    [(POLISH, "cp1250"), ("Наш дом: № 5, § 2.\n" * 3, "cp1251"), (RUSSIAN, "cp866")],
)
def test_letters_of_other_languages_are_no_signs_of_western_texts(text: str, encoding: str) -> None:
    assert decode(text.encode(encoding)).text == text


def test_a_declared_encoding_settles_what_bytes_cannot() -> None:
    short = "Größe".encode("cp850")
    assert decode(short, "ibm850").text == "Größe"
    assert decode("日本".encode("iso2022_jp"), "iso-2022-jp").text == "日本"


@pytest.mark.parametrize(
    ("declared", "encoding", "text"),
    [
        ("Shift_JIS", "cp932", "㈱日立① ～"),
        ("x-sjis", "cp932", "㈱日立①"),
        ("gb2312", "gb18030", "朱镕基 裏 €"),
        ("GBK", "gb18030", "𠀀 裏"),
        ("euc-kr", "cp949", "똠방각하"),
        ("ks_c_5601-1987", "cp949", "펲시"),
        ("iso-8859-9", "cp1254", "“Ağrı” – 5 €"),
        ("latin5", "cp1254", "“Ağrı”"),
        ("iso-8859-1", "cp1252", "„Größe“ – 5 €"),
        ("us-ascii", "cp1252", "„Größe“"),
        ("tis-620", "cp874", "“ราคา” 5 €"),
        ("iso-8859-11", "cp874", "“ราคา”"),
        ("windows-874", "cp874", "“ราคา”"),
    ],
)
def test_a_label_means_the_wider_encoding_that_browsers_take_it_for(declared: str, encoding: str, text: str) -> None:
    found = decode(text.encode(encoding), declared)
    assert (found.text, found.encoding, found.damaged) == (text, encoding, 0)


@pytest.mark.parametrize("declared", ["rot13", "zlib", "no such thing", "x" * 500, "\x00", ""])
def test_a_declaration_that_names_no_text_encoding_is_ignored(declared: str) -> None:
    assert decode("Größe".encode(), declared).text == "Größe"


def test_valid_utf8_beats_a_wrong_declaration() -> None:
    assert decode(GERMAN.encode(), "iso-8859-1").text == GERMAN


def test_lines_in_two_encodings_are_both_read() -> None:
    mixed = b"".join(line.encode("utf-8" if n % 2 else "cp1252") + b"\n" for n, line in enumerate(["Straße", "Grüße"] * 10))
    assert set(decode(mixed).text.split()) == {"Straße", "Grüße"}


def test_the_encoding_behind_a_long_ascii_beginning_is_found() -> None:
    assert decode(b"plain\n" * 20_000 + RUSSIAN.encode("koi8_r")).text.endswith(RUSSIAN)


@pytest.mark.parametrize("lines", [10, 100, 20_000])
def test_utf16_that_was_written_behind_ascii_costs_what_stands_before_nothing(lines: int) -> None:
    log = "2024-01-01 12:00:00 something happened here\n" * lines
    added = "Größe überschritten\n"
    assert decode(log.encode() + (added * (lines // 3)).encode("utf-16-le")).text == log + added * (lines // 3)


def test_nul_bytes_in_utf8_vanish_and_do_not_look_like_utf16() -> None:
    assert decode("ab\x00c Größe\x00 and more words here".encode()).text == "abc Größe and more words here"


def test_encoded_surrogates_and_overlong_nuls_vanish() -> None:
    assert decode(b"before \xed\xa0\x80\xc0\x80 after, and a few words more") == decode(b"before  after, and a few words more")


def test_line_ends_become_newlines() -> None:
    assert decode(b"a\r\nb\rc\n").text == "a\nb\nc\n"


@pytest.mark.parametrize("data", [bytes(range(256)) * 8, b"\x00\x01\x02\x03" * 100, codecs.BOM_UTF8[:2] + b"\xfe\xff\x00" * 50])
def test_binary_is_no_text(data: bytes) -> None:
    assert guess_encoding(data) is None


@given(st.binary(max_size=300), st.sampled_from([None, "utf-8", "utf-16", "shift_jis", "iso-2022-jp", "utf-7"]))
def test_any_bytes_decode_to_something_storable(data: bytes, declared: str | None) -> None:
    text = decode(data, declared).text
    assert "\x00" not in text and "\r" not in text
    text.encode("utf-8")


@given(st.text(st.characters(), max_size=50))
def test_storable_text_is_utf8_and_stays_as_it_is(text: str) -> None:
    once = storable(text)
    assert storable(once) == once
    assert "\x00" not in once
    once.encode("utf-8")


def test_surrogate_pairs_are_joined_and_lone_ones_dropped() -> None:
    assert storable("a\ud83d\ude00b\ud800c") == "a😀bc"


def test_metadata_of_any_shape_becomes_json() -> None:
    deep: object = "x"
    for _ in range(50):
        deep = [deep]
    value = storable_value({"a\x00": ("b\ud800", {1, 2}, float("nan"), None, True, b"raw"), "deep": deep})
    assert "\\u0000" not in json.dumps(value, allow_nan=False)
