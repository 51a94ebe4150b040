"""Protocols whose models open and close threads by tags: Multiverse, NPR, ThreadWeaver and kin."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from fork_attn.reason.protocol import Protocol
from fork_attn.reason.script import Ended, Script, together
from fork_attn.reason.thread import Thread


@dataclass(frozen=True)
class TagProtocol(Protocol):
    """The model lists what its threads shall do; at `fork_at` they start, then they are joined.

    Attributes:
        name: the protocol's.
        fork_at: the tag at which the threads start.
        child_ends: the tag that ends a thread.
        opens: the tag that begins the list; None where there is none.
        item, item_ends: the tags around each entry, which begins with a number and a colon.
        fanout: threads of every fork; None means one for each entry.
        shared: text given to the parent before the fork, so that it is there once.
        header: text that each child begins with; {n} is its entry's number.
        joined_header: what stands for the header in the copies of a text join; None: the header.
        closing: text given to a child that ended without `child_ends`.
        after: text given to the parent after the join.
        last_words: where the whole ends if one thread does not end by `child_ends`, the text given
            to the parent then; None where the parent goes on.
        join: "union" takes the children's KV; "rebase" lays it end to end; "text" keeps the first
            child's and computes the others' text again behind it, as if one had written all.
        position: of a union, see `Branch.join`.
        path_sampling: sampling options of threads, such as {"repetition_penalty": 1.02}.
        other_tags: further tags of the model's training, which must be one token each.
    """

    name: str
    fork_at: str
    child_ends: str
    opens: str | None = None
    item: str | None = None
    item_ends: str | None = None
    fanout: int | None = None
    shared: str = ""
    header: str = ""
    joined_header: str | None = None
    closing: str = ""
    after: str = ""
    last_words: str | None = None
    join: Literal["union", "rebase", "text"] = "union"
    position: Literal["max", "sum"] = "max"
    path_sampling: tuple[tuple[str, Any], ...] = ()
    other_tags: tuple[str, ...] = ()

    @property
    def needs_ropes(self) -> bool:  # type: ignore[override]
        return self.join == "rebase"

    def tags(self) -> tuple[str, ...]:
        return (*self._stops(), *self.other_tags)

    def _stops(self) -> tuple[str, ...]:
        named = (self.opens, self.item, self.item_ends, self.fork_at, self.child_ends)
        return tuple(dict.fromkeys(tag for tag in named if tag))

    def run(self, root: Thread) -> Script:
        yield from self._write(root, ends=None)

    def _write(self, thread: Thread, ends: str | None) -> Script:
        """Writes until the tag `ends`, an end token or a limit, forking on the way.

        Returns:
            `Ended`.
        """
        sampler = thread.run.sampler_with(dict(self.path_sampling) if ends else {})
        listed_from: int | None = None
        alone = 0  # ends of threads still to come that a refused fork leaves to this thread
        while True:
            ended: Ended = yield from thread.write(self._stops(), sampler=sampler)
            tag = ended.stop
            if ended.reason != "stop" or tag not in self._stops():
                break
            if tag == self.child_ends and alone:
                alone -= 1
            elif tag == ends:
                break
            elif tag == self.opens:
                if listed_from is not None:
                    thread.malformed(f"{tag} inside a list")
                listed_from = len(thread.token_ids)
            elif tag != self.fork_at:
                if listed_from is None or tag == self.child_ends:
                    thread.malformed(f"{tag} outside of its place")
            elif self.opens and listed_from is None:
                thread.malformed(f"{tag} without {self.opens}")
            elif numbers := self._numbers(thread, listed_from or 0):
                children = yield from self._fork(thread, numbers)
                listed_from, alone = None, 0 if children else len(numbers)
                if children:
                    last = yield from self._together(thread, children, numbers)
                    if last is not None:
                        return last
        if listed_from is not None:
            thread.malformed(f"{self.opens} without {self.fork_at}")
        return ended

    def _numbers(self, thread: Thread, start: int) -> list[str]:
        """The numbers of the entries listed from token `start` on, each once."""
        if self.fanout is not None:
            return [str(n + 1) for n in range(self.fanout)]
        assert self.item is not None
        text = thread.text(start)
        found = re.findall(re.escape(self.item) + r"\s*([0-9]+(?:\.[0-9]+)*)\s*:", text)
        entries = text.count(self.item)
        if not entries:
            thread.malformed(f"{self.fork_at} without entries")
        elif not found:
            thread.malformed(f"{entries} entries without numbers")
            found = [str(n + 1) for n in range(entries)]
        elif len(found) < entries:
            thread.malformed(f"{entries - len(found)} of {entries} entries without numbers")
        numbers = list(dict.fromkeys(found))
        if len(numbers) < len(found):
            thread.malformed(f"entries with the same number: {', '.join(found)}")
        return numbers

    def _fork(self, thread: Thread, numbers: list[str]) -> Script:
        thread.inject(self.shared)
        return (yield from thread.fork(len(numbers), labels=[f"path {n}" for n in numbers]))

    def _together(self, thread: Thread, children: list[Thread], numbers: list[str]) -> Script:
        """Lets the children write, and joins them.

        Returns:
            None, or `Ended` where the whole ends here.
        """
        for child, number in zip(children, numbers, strict=True):
            child.inject(self.header.format(n=number))
        ends = yield from together([self._path(child) for child in children])
        if self.join != "text":
            yield from thread.join(
                children, position=self.position, how=self.join, label="conclusion"
            )
        else:
            copies = [child.context_ids()[thread.length :] for child in children]
            yield from thread.join(children, how="text", label="conclusion")
            self._copy(thread, children[1:], copies[1:], numbers[1:])
        cut = next((ended for ended in ends if ended.reason != "stop"), None)
        if self.last_words is not None and cut is not None:
            thread.inject(self.last_words)
            yield from thread.flush()
            return cut
        thread.inject(self.after)
        return None

    def _path(self, child: Thread) -> Script:
        ended: Ended = yield from self._write(child, ends=self.child_ends)
        if ended.reason != "stop":
            if ended.reason == "eos":
                child.drop_pending()
            child.malformed(f"ended without {self.child_ends}: {ended.note or ended.reason}")
            if not child.exhausted:
                child.inject(self.closing)
        return ended

    def _copy(
        self,
        thread: Thread,
        children: list[Thread],
        copies: list[list[int]],
        numbers: list[str],
    ) -> None:
        """Gives the parent what the children wrote, behind the headers of joined text."""
        for child, ids, number in zip(children, copies, numbers, strict=True):
            written = len(thread.run.vocabulary.encode(self.header.format(n=number)))
            header = self.header if self.joined_header is None else self.joined_header
            thread.inject(header.format(n=number))
            thread.inject(ids[written:], "copy", child)
