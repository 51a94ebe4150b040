"""Protocols whose threads exchange text: APR's calls, LeaP's summaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fork_attn.reason.protocol import Protocol, register
from fork_attn.reason.script import Ended, Script, together
from fork_attn.reason.systems.selection import last_line
from fork_attn.reason.thread import Thread


def lines(text: str) -> list[str]:
    """The lines of a text that are not empty."""
    return [line.strip() for line in text.splitlines() if line.strip()]


@dataclass(frozen=True)
class Calls(Protocol):
    """Adaptive parallel reasoning (arXiv 2504.15466): a thread calls others with messages.

    A child sees its message alone. When all children are done, the call is cut out of the caller's
    context, and their replies take its place.

    Attributes:
        call, call_ends: texts around a call.
        messages: what the children begin with, from the call's text; None takes its lines.
        reply: what a child answers, from all that it wrote; None takes its last line.
        replies, replies_end: texts around the replies.
    """

    name: str = "apr"
    call: str = "<Calling Sub Searches>"
    call_ends: str = "<End Calling Sub Searches>"
    messages: Callable[[str], list[str]] | None = None
    reply: Callable[[str], str] | None = None
    replies: str = "<Sub Searches>\n"
    replies_end: str = "<End Sub Searches>\n"

    def run(self, root: Thread) -> Script:
        yield from self._write(root)

    def _write(self, thread: Thread) -> Script:
        while True:
            ended: Ended = yield from thread.write(texts=(self.call,))
            if ended.reason != "stop" or ended.stop != self.call:
                return thread
            # The call is cut out from where its tag begins.
            before, rest = thread.before(self.call) or (thread.length, "")
            start = len(thread.text())
            ended = yield from thread.write(texts=(self.call_ends,))
            if ended.reason != "stop" or ended.stop != self.call_ends:
                thread.malformed(f"{self.call} without {self.call_ends}")
                return thread
            text = thread.text()[start:].partition(self.call_ends)[0]
            messages = (self.messages or lines)(text)
            if not messages:
                thread.malformed(f"{self.call} without messages")
                continue
            children = yield from thread.spawn(len(messages))
            for child, message in zip(children, messages, strict=False):
                child.inject(message, "message", thread)
            if not children:
                continue
            yield from together([self._write(child) for child in children])
            reply = self.reply or last_line
            replies = [reply(child.said()[0]) for child in children]
            yield from thread.join(children, how="message", keep=before)
            thread.inject(rest + self.replies)
            for child, text in zip(children, replies, strict=True):
                thread.inject(text + "\n", "message", child)
            thread.inject(self.replies_end)


@dataclass(frozen=True)
class LeaP(Protocol):
    """Learning from peers (arXiv 2505.07787): samples of one prompt that tell each other where they
    stand.

    Every `turn_tokens` tokens each sample drops its unfinished paragraph, writes a summary, and is
    given those of its peers.

    Attributes:
        n: samples.
        turns: turns at most; turn_tokens: tokens of a turn.
        summary_tokens: of a summary at most.
        ask, summary_ends: what a summary begins and ends with.
        comment, comment_ends: what stands around the peers' summaries.
        answer: finds the answer in a text, for a vote; None takes the last line.
    """

    name: str = "leap"
    n: int = 4
    turns: int = 4
    turn_tokens: int = 512
    summary_tokens: int = 256
    ask: str = "Let me say briefly where I stand. <summarize> So far,"
    summary_ends: str = "</summarize>"
    comment: str = "\n<comment>\n"
    comment_ends: str = "</comment>\n\n"
    answer: Callable[[str], str] | None = None

    def run(self, root: Thread) -> Script:
        labels = [f"sample {i + 1}" for i in range(self.n)]
        samples = yield from root.fork(self.n, labels=labels)
        if not samples:
            yield from root.write()
            return root.answer()
        live = list(samples)
        for turn in range(self.turns):
            last = turn == self.turns - 1
            most = None if last else self.turn_tokens
            ends = yield from together([thread.write(max_tokens=most) for thread in live])
            live = [
                thread
                for thread, ended in zip(live, ends, strict=True)
                if ended.note == "max_tokens" and not thread.exhausted
            ]
            if not live or last:
                break
            yield from self._exchange(live)
        find = self.answer or last_line
        votes = [find(sample.said()[0]) for sample in samples]
        return samples[votes.index(max(votes, key=votes.count))].answer()

    def _exchange(self, live: list[Thread]) -> Script:
        """Summaries, and each thread's peers' summaries to it."""
        for thread in live:
            found = thread.before("\n\n", last=True)
            if found is not None:
                thread.rollback(found[0])
            thread.inject(f"{found[1] if found else ''}\n\n{self.ask}")
        ends = yield from together(
            [t.write(texts=(self.summary_ends,), max_tokens=self.summary_tokens) for t in live]
        )
        for thread, ended in zip(live, ends, strict=True):
            if ended.reason == "eos":
                thread.drop_pending()
        said = [self._summary(thread) for thread in live]
        for i, thread in enumerate(live):
            if thread.exhausted:
                continue
            if self.summary_ends not in thread.text():
                thread.inject(self.summary_ends)
            thread.inject(self.comment)
            for k, peer in enumerate(live):
                if k != i:
                    thread.inject(said[k] + "\n", "message", peer)
            thread.inject(self.comment_ends)

    def _summary(self, thread: Thread) -> str:
        text = thread.text().rpartition(self.ask)[2]
        return text.partition(self.summary_ends)[0].strip()


for _protocol in (Calls(), LeaP()):
    register(_protocol)
