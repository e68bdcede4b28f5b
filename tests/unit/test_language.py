"""The language of a text is told from little of it, and from more where that is not enough."""

from __future__ import annotations

import pytest

from jobs.adapters.extractor import language
from jobs.adapters.extractor.language import find_language

SENTENCES = {
    "ar": "يجب دفع الفاتورة خلال ثلاثين يوما من تاريخ استلامها. يمكن للعميل أن يطلب نسخة منها في أي وقت.",
    "cs": "Faktura je splatná do třiceti dnů od jejího doručení. Zákazník si může kdykoli vyžádat její kopii.",
    "de": "Die Rechnung ist innerhalb von dreißig Tagen nach Erhalt zu zahlen. Der Kunde kann jederzeit eine Abschrift verlangen.",
    "el": "Το τιμολόγιο πρέπει να εξοφληθεί εντός τριάντα ημερών από την παραλαβή του. Ο πελάτης μπορεί να ζητήσει αντίγραφο.",
    "en": "The invoice is to be paid within thirty days of its receipt. The customer may ask for a copy of it at any time.",
    "es": "La factura debe pagarse dentro de los treinta días siguientes a su recepción. El cliente puede pedir una copia.",
    "fr": "La facture est payable dans les trente jours suivant sa réception. Le client peut en demander une copie à tout moment.",
    "hu": "A számlát a kézhezvételtől számított harminc napon belül kell kifizetni. Az ügyfél bármikor kérhet róla másolatot.",
    "it": "La fattura deve essere pagata entro trenta giorni dal ricevimento. Il cliente può chiederne una copia in ogni momento.",
    "ja": "請求書は受領後三十日以内にお支払いください。お客様はいつでもその写しを求めることができます。",
    "ko": "청구서는 받은 날부터 삼십 일 이내에 지불해야 합니다. 고객은 언제든지 사본을 요청할 수 있습니다.",
    "nl": "De factuur moet binnen dertig dagen na ontvangst worden betaald. De klant kan op elk moment een kopie opvragen.",
    "pl": "Faktura musi zostać opłacona w ciągu trzydziestu dni od jej otrzymania. Klient może w każdej chwili poprosić o kopię.",
    "pt": "A fatura deve ser paga no prazo de trinta dias após a sua receção. O cliente pode pedir uma cópia a qualquer momento.",
    "ru": "Счёт подлежит оплате в течение тридцати дней после получения. Клиент может в любое время попросить его копию.",
    "sv": "Fakturan ska betalas inom trettio dagar efter mottagandet. Kunden kan när som helst be om en kopia av den.",
    "tr": "Fatura, alındığı tarihten itibaren otuz gün içinde ödenmelidir. Müşteri istediği zaman bir kopyasını isteyebilir.",
    "uk": "Рахунок має бути оплачений протягом тридцяти днів після отримання. Клієнт може будь-коли попросити його копію.",
    "zh": "发票应在收到后三十天内付款。客户可以随时要求提供副本。",
}


def long(sentence: str, characters: int = 8_000) -> str:
    """A text of so many characters, with what is no language in between."""
    block = f"{sentence}\n\n| 12 | 3.40 |\n\nhttps://www.example.org/{'a' * 20}\n\n{sentence} {sentence}\n\n"
    return (block * (characters // len(block) + 1))[:characters]


@pytest.mark.parametrize("code", SENTENCES)
def test_short_and_long_texts_are_in_the_language_that_they_are_in(code: str) -> None:
    for text in (SENTENCES[code], long(SENTENCES[code], 700), long(SENTENCES[code]), long(SENTENCES[code], 100_000)):
        found = find_language(text)
        assert found is not None and found[0] == code, len(text)


def test_a_text_in_one_language_is_told_from_glances_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "_samples", lambda _: pytest.fail("the whole of it was looked at"))
    found = find_language(SENTENCES["en"] * 80)
    assert found is not None and found[0] == "en" and found[1] > 0.8


def test_a_mixed_text_is_in_the_language_of_most_of_it_with_less_confidence() -> None:
    parts = [SENTENCES["fr"] * 70, SENTENCES["en"] * 30]
    for text in ("".join(parts), "".join(reversed(parts))):
        found = find_language(text)
        assert found is not None and found[0] == "fr"
        assert found[1] < 0.9


def test_glances_that_disagree_leave_it_to_a_closer_look(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    samples = language._samples

    def noted(text: str) -> list[tuple[str, float]]:
        looked.append(text)
        return samples(text)

    monkeypatch.setattr(language, "_samples", noted)
    mixed = SENTENCES["fr"] * 60 + SENTENCES["en"] * 40
    find_language(mixed)
    assert looked == [mixed]


def test_glances_that_see_no_language_leave_it_to_a_closer_look() -> None:
    assert find_language("12 34 | 5 " * 800) is None
    found = find_language(f"{'12 34 | 5 ' * 20}{SENTENCES['de']}{'12 34 | 5 ' * 300}")
    assert found is not None and found[0] == "de"
