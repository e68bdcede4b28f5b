"""Amounts of money in a text: currency and exact decimal value.

A number counts only with a currency beside it: a symbol, an ISO 4217 code or a name, before or after. The last separator is the decimal
point if one or two digits follow it (1,234.56 and 1.234,56 and 1'234.50); separators before groups of three digits are thousands
(1.234 € is one thousand two hundred and thirty-four). A factor behind the number (million, Mio., Mrd., billion, k) is multiplied in.
`$` alone is taken as USD and `¥` as JPY. A sign counts only where it touches the number or the currency, and no amount before it:
`- 100 €` is an item of a list, `5 - 10 EUR` and `5 €-10 €` are ranges.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

_SYMBOLS = {
    "€": "EUR", "$": "USD", "£": "GBP", "¥": "JPY", "₹": "INR", "₩": "KRW", "₽": "RUB", "₺": "TRY", "₴": "UAH", "₪": "ILS", "₫": "VND",
    "zł": "PLN", "Kč": "CZK", "US$": "USD", "A$": "AUD", "AU$": "AUD", "C$": "CAD", "CA$": "CAD", "NZ$": "NZD", "HK$": "HKD", "S$": "SGD",
    "R$": "BRL", "Euro": "EUR", "euro": "EUR", "Euros": "EUR", "euros": "EUR", "dollars": "USD", "Dollar": "USD",
    "Franken": "CHF", "Fr.": "CHF", "Sfr.": "CHF",
}  # fmt: skip
_CODES = [
    "AED",
    "ARS",
    "AUD",
    "BGN",
    "BRL",
    "CAD",
    "CHF",
    "CLP",
    "CNY",
    "COP",
    "CZK",
    "DKK",
    "EGP",
    "EUR",
    "GBP",
    "HKD",
    "HUF",
    "IDR",
    "ILS",
    "INR",
    "ISK",
    "JPY",
    "KRW",
    "MXN",
    "MYR",
    "NOK",
    "NZD",
    "PHP",
    "PLN",
    "RON",
    "RUB",
    "SAR",
    "SEK",
    "SGD",
    "THB",
    "TRY",
    "TWD",
    "UAH",
    "USD",
    "VND",
    "ZAR",
]
CURRENCIES = {**_SYMBOLS, **{code: code for code in _CODES}}
_FACTORS = {
    "k": 10**3, "Tsd.": 10**3, "thousand": 10**3, "Tausend": 10**3,
    "m": 10**6, "M": 10**6, "mn": 10**6, "million": 10**6, "Million": 10**6, "Millionen": 10**6, "millions": 10**6,
    "Mio.": 10**6, "Mio": 10**6,
    "bn": 10**9, "billion": 10**9, "Milliarde": 10**9, "Milliarden": 10**9, "Mrd.": 10**9, "Mrd": 10**9,
    "Billionen": 10**12, "trillion": 10**12,
}  # fmt: skip


def _either(words: dict[str, str] | dict[str, int]) -> str:
    return "|".join(re.escape(word) + (r"(?!\w)" if word[-1].isalpha() else "") for word in sorted(words, key=len, reverse=True))


_SPACE = r"[ \u00a0\u2009\u202f]"
_DASHES = "--|-|–"  # 12,-- and 12,– have no cents
_NUMBER = (
    rf"(?:[0-9]{{1,3}}(?:[.,'’ \u00a0\u2009\u202f][0-9]{{3}}){{1,5}}+(?:[.,](?:[0-9]{{1,2}}|{_DASHES}))?+"
    rf"|[0-9]{{1,15}}+(?:[.,](?:[0-9]{{1,4}}|{_DASHES}))?+)(?![0-9]|[.,][0-9])"
)
_FACTOR = rf"(?:{_SPACE}?(?P<%s>{_either(_FACTORS)}))?"
_STARTS = "".join(sorted({re.escape(currency[0]) for currency in CURRENCIES}))
_SYMBOL_ENDS = "".join(sorted({re.escape(symbol[-1]) for symbol in _SYMBOLS if not symbol[-1].isalpha()}))
_AMOUNT = re.compile(
    rf"(?=[-−+0-9{_STARTS}])(?<![\w.,$])(?:(?<![{_SYMBOL_ENDS}])(?P<sign1>[-−+]))?(?:"
    rf"(?P<before>{_either(CURRENCIES)}){_SPACE}?(?P<sign2>[-−+])?(?P<number1>{_NUMBER}){_FACTOR % 'factor1'}(?!\w|\$)"
    rf"|(?P<number2>{_NUMBER}){_FACTOR % 'factor2'}{_SPACE}?(?P<after>{_either(CURRENCIES)})(?![$0-9])"
    rf")"
)
_AROUND = 48
"""More than an amount has before its first and after its last digit."""
_DIGITS = re.compile(rf"[0-9](?:[^0-9]{{0,{2 * _AROUND}}}+[0-9])*+")
"""Far quicker to look for than all that an amount can begin with."""


@dataclass(frozen=True, slots=True)
class FoundAmount:
    """An amount as found: ISO 4217 code, and the value as a plain decimal string such as `-1234.50`."""

    currency: str
    value: str
    text: str


def find_amounts(text: str) -> Iterator[FoundAmount]:
    """Yield the amounts of a text in order; an amount stands on one line."""
    around = ((max(0, digits.start() - _AROUND), digits.end() + _AROUND) for digits in _DIGITS.finditer(text))
    for match in (match for start, end in around for match in _AMOUNT.finditer(text, start, end)):
        number, factor = match["number1"] or match["number2"], match["factor1"] or match["factor2"]
        value = read_number(number) * _FACTORS.get(factor or "", 1)
        if "-" in (sign := (match["sign1"] or "") + (match["sign2"] or "")) or "−" in sign:
            value = -value
        currency = CURRENCIES[match["before"] or match["after"]]
        yield FoundAmount(currency, format(value.normalize() if factor else value, "f"), " ".join(match[0].split()))


def read_number(number: str) -> Decimal:
    """Return the value of a number in English, German or Swiss writing, for example `1.234,50`, `1,234.50`, `1'234.50` or `12,--`."""
    number = number.rstrip("-–").rstrip(".,")
    last = max(number.rfind("."), number.rfind(","))
    whole, fraction = (number[:last], number[last + 1 :]) if last >= 0 else (number, "")
    if len(fraction) == 3 and (number.count(number[last]) > 1 or not any(mark in whole for mark in ".,'’")) and whole != "0":
        whole, fraction = number, ""
    digits = "".join(character for character in whole if character.isdigit())
    return Decimal(f"{digits}.{fraction}" if fraction else digits)
