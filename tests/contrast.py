"""How well the colours of the style sheet can be told apart, in light and dark, by the formula of WCAG 2."""

from __future__ import annotations

import re
from collections.abc import Iterator

Colour = tuple[float, float, float, float]
DARK = "@media (prefers-color-scheme: dark)"


def _rules(css: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each rule, those in media queries among them, as its selector and declarations."""
    for selector, body in re.findall(r"([^{};]+)\{([^{}]*)\}", re.sub(r"/\*.*?\*/", "", css, flags=re.S)):
        pairs = (part.partition(":") for part in body.split(";") if ":" in part)
        yield selector.strip(), {name.strip(): value.strip() for name, _, value in pairs}


def colours(css: str, *, dark: bool) -> dict[str, Colour]:
    """Return the variables that hold colours."""
    roots = [rules for selector, rules in _rules(css) if selector == ":root"]
    assert len(roots) == 2 and DARK in css, "one root for light, one for dark"
    found = {**roots[0], **(roots[1] if dark else {})}
    return {name: _parsed(value) for name, value in found.items() if value.startswith("#")}


def _parsed(value: str) -> Colour:
    digits = value.removeprefix("#")
    red, green, blue, alpha = (int((digits + "ff")[at : at + 2], 16) / 255 for at in (0, 2, 4, 6))
    return red, green, blue, alpha


def _over(colour: Colour, ground: Colour) -> Colour:
    alpha = colour[3]
    red, green, blue = (colour[at] * alpha + ground[at] * (1 - alpha) for at in range(3))
    return red, green, blue, 1.0


def _luminance(colour: Colour) -> float:
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def ratio(one: Colour, other: Colour) -> float:
    """Return the contrast of two opaque colours, from 1 to 21."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def contrasts(css: str, *, dark: bool) -> dict[str, tuple[float, float]]:
    """Return for each rule that colours text, and each colour of a chart, its least contrast and what that must be.

    Text stands on the ground that its rule names, otherwise on the paper and on panels.
    """
    known = colours(css, dark=dark)
    plain = [known["--paper"], known["--panel"]]
    found = {}
    for selector, rules in _rules(css):
        written = re.fullmatch(r"var\((--[\w-]+)\)", rules.get("color", rules.get("fill", "") if "text" in selector else ""))
        if written is None:
            continue
        ground = re.match(r"var\((--[\w-]+)\)", rules.get("background", ""))
        grounds = plain if ground is None else [_over(known[ground[1]], under) for under in plain]
        found[selector] = (min(ratio(_over(known[written[1]], under), under) for under in grounds), 4.5)
    for name, colour in known.items():
        if name.startswith("--plot-"):
            found[name] = (ratio(colour, known["--panel"]), 3.0)
    return found
