"""Text in a picture: SVG neither measures nor wraps it, so its width is estimated, a bit wide."""

from __future__ import annotations

import unicodedata

_NARROW = frozenset("iljtfr.,:;'|!()[]I ")
_WIDE = frozenset("mwMW@%")


def width(text: str) -> float:
    """About how wide 13 px sans-serif text is, in px."""
    return sum(map(_advance, text))


def _advance(char: str) -> float:
    if unicodedata.east_asian_width(char) in "WF":
        return 13.5
    if char in _NARROW:
        return 4.6
    if char in _WIDE:
        return 12.0
    return 9.2 if char.isupper() else 7.9


def clip(text: str, limit: float) -> str:
    """The text, or as much of it as fits into `limit` px, with an ellipsis."""
    if width(text) <= limit:
        return text
    room = limit - width("…")
    while text and width(text) > room:
        text = text[:-1]
    return text.rstrip() + "…"


def wrap(text: str, limit: float, lines: int) -> list[str]:
    """The text in 1 to `lines` lines of at most `limit` px; the last one is clipped."""
    rows: list[str] = []
    row = ""
    words = [piece for word in printable(text).split() for piece in _pieces(word, limit)]
    for index, word in enumerate(words):
        longer = f"{row} {word}" if row else word
        if row and width(longer) > limit:
            if len(rows) == lines - 1:
                return [*rows, clip(" ".join([row, *words[index:]]), limit)]
            rows.append(clip(row, limit))
            row = word
        else:
            row = longer
    return [*rows, clip(row, limit)]


def _pieces(word: str, limit: float) -> list[str]:
    """The word, or pieces of it where it is wider than a line, as in scripts without spaces."""
    pieces = [""]
    for char in word:
        if pieces[-1] and width(pieces[-1] + char) > limit:
            pieces.append("")
        pieces[-1] += char
    return pieces


def printable(text: str) -> str:
    """Without characters that XML 1.0 cannot hold."""
    return "".join(
        char
        for char in text
        if char in "\t\n\r"
        or ("\u0020" <= char <= "\ud7ff")
        or ("\ue000" <= char <= "\ufffd")
        or char > "\uffff"
    )
