"""Text of tokens one at a time, with the end of each token's text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_MOST_BYTES = 8  # tokens that are waited for until a character is whole


class Pieces:
    """The text of single tokens, looked up once each.

    Tokenizers drop the space before the first word of what they decode, so that each token is
    decoded after an anchor, whose text is cut off again.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._anchor = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._skip = len(self._decode([]))
        self._known: dict[int, str] = {}

    def of(self, token: int) -> str:
        piece = self._known.get(token)
        if piece is None:
            piece = self._known[token] = self.join([token])
        return piece

    def join(self, tokens: list[int]) -> str:
        return self._decode(tokens)[self._skip :]

    def _decode(self, tokens: list[int]) -> str:
        ids = [*self._anchor, *tokens]
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


class Detokenizer:
    """Turns a thread's tokens into text as they come; a character may take several tokens."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is not whole."""
        if not self._pending:
            piece = self._pieces.of(token)
            if _INCOMPLETE not in piece:
                return piece
        self._pending.append(token)
        piece = self._pieces.join(self._pending)
        if piece.endswith(_INCOMPLETE) and len(self._pending) < _MOST_BYTES:
            return ""
        self._pending.clear()
        return piece

    def finish(self) -> str:
        """What is left of a character that never became whole."""
        piece = self._pieces.join(self._pending) if self._pending else ""
        self._pending.clear()
        return piece


def text_of(pieces: Pieces, tokens: Iterable[int]) -> tuple[str, tuple[int, ...]]:
    """The text of tokens, and for each token the end of its text."""
    detokenizer = Detokenizer(pieces)
    parts: list[str] = []
    ends: list[int] = []
    length = 0
    for token in tokens:
        parts.append(detokenizer.push(token))
        length += len(parts[-1])
        ends.append(length)
    rest = detokenizer.finish()
    if rest:
        parts.append(rest)
        ends[-1] += len(rest)
    return "".join(parts), tuple(ends)
