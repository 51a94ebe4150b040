"""PASTA (arXiv 2502.11517): promises of text that is written while its author goes on."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fork_attn.reason.protocol import Protocol, register
from fork_attn.reason.script import Ended, Script, together
from fork_attn.reason.thread import Thread

_TOKENS = re.compile(r"tokens\s*=\s*\"?(\d+)")


@dataclass(frozen=True)
class Promises(Protocol):
    """A promise names how many tokens its text takes; the author goes on that many positions later.

    The text starts right behind its promise, and its author does not see it. At `sync` the author
    waits for all promises, takes their KV over, and goes on at its own position.

    Attributes:
        promise, promise_ends: around the topic and the number of tokens of a promise.
        opens, closes: around the promised text.
        sync: at which the author waits.
        default_tokens: of a promise that names no number.
    """

    name: str = "pasta"
    promise: str = "<promise"
    promise_ends: str = "/>"
    opens: str = "<async>"
    closes: str = "</async>"
    sync: str = "<sync/>"
    default_tokens: int = 50

    def tags(self) -> tuple[str, ...]:
        return (self.promise, self.promise_ends, self.opens, self.closes, self.sync)

    def run(self, root: Thread) -> Script:
        while True:
            promised: list[Thread] = []
            ended: Ended = yield from self._author(root, promised)
            if promised:
                # The sync token is fed behind the join: what follows it has seen the promised text.
                yield from root.join(promised, position=root.position, label="synced", hold=True)
            if ended.stop != self.sync:
                return None

    def _author(self, thread: Thread, promised: list[Thread]) -> Script:
        """Writes until the author syncs or ends; every promise on the way is written beside it."""
        while True:
            ended: Ended = yield from thread.write((self.promise, self.sync))
            if ended.stop != self.promise:
                return ended
            start = len(thread.token_ids)
            ended = yield from thread.write((self.promise_ends, self.sync))
            if ended.stop != self.promise_ends:
                thread.malformed(f"{self.promise} without {self.promise_ends}")
                return ended
            number = _TOKENS.search(thread.text(start))
            if number is None:
                thread.malformed("a promise without its number of tokens")
            tokens = int(number[1]) if number else self.default_tokens
            children = yield from thread.fork(1, labels=[f"promise {tokens}"], detach=True)
            if not children:
                continue
            children[0].inject(self.opens)
            thread.move(thread.position + tokens)
            promised += children
            scripts = [self._text(children[0]), self._author(thread, promised)]
            _, ended = yield from together(scripts)
            return ended

    def _text(self, child: Thread) -> Script:
        ended: Ended = yield from child.write((self.closes,))
        if ended.reason != "stop" and not child.exhausted:
            if ended.reason == "eos":
                child.drop_pending()
            child.malformed(f"ended without {self.closes}")
            child.inject(self.closes)


register(Promises())
