"""ParaThinker (arXiv 2509.04475): several paths from the prompt, then a summary over all."""

from __future__ import annotations

from dataclasses import dataclass

from fork_attn.reason.kv_bias import SegmentVectors
from fork_attn.reason.protocol import Protocol, register
from fork_attn.reason.script import Script, together
from fork_attn.reason.thread import Thread


@dataclass(frozen=True)
class ParaThinker(Protocol):
    """Paths start at one position, right behind the prompt; the summary stands behind the longest.

    Attributes:
        paths: how many; path i has the tags `<think{i}>` and `</think{i}>`.
        vectors: learned vectors of the paths, added to their keys (before rotation) and values;
            None runs without.
        first_ends_all: the first path that ends ends them all, at the length it has.
    """

    name: str = "parathinker"
    paths: int = 4
    vectors: SegmentVectors | None = None
    first_ends_all: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.paths, bool) or not isinstance(self.paths, int) or self.paths < 1:
            raise ValueError(f"paths: expected an int of at least 1, got {self.paths!r}")
        if self.vectors is not None and self.vectors.keys.shape[0] < self.paths:
            raise ValueError(
                f"vectors: expected one for each of {self.paths} paths, got "
                f"{self.vectors.keys.shape[0]}"
            )

    def tags(self) -> tuple[str, ...]:
        pairs = ((f"<think{i + 1}>", f"</think{i + 1}>") for i in range(self.paths))
        return (*(tag for pair in pairs for tag in pair), "<summary>")

    def run(self, root: Thread) -> Script:
        labels = [f"path {i + 1}" for i in range(self.paths)]
        paths = yield from root.fork(self.paths, labels=labels)
        if paths:
            for i, path in enumerate(paths):
                path.segment = i + 1
                path.inject(f"<think{i + 1}>")
            scripts = [path.write([f"</think{i + 1}>"]) for i, path in enumerate(paths)]
            yield from together(scripts, first=self.first_ends_all)
            for i, path in enumerate(paths):
                self._close(path, f"</think{i + 1}>")
            yield from root.join(paths, label="summary")
            root.inject("<summary>")
        yield from root.write()

    def _close(self, path: Thread, end: str) -> None:
        """Ends a path that was cut off, or that ended without its tag."""
        written = path.token_ids
        if written[-1] == path.run.vocabulary.tag(end) or path.exhausted:
            return
        if written[-1] in path.run.end_tokens:
            path.drop_pending()
            path.malformed(f"ended without {end}")
        path.inject(end)


register(ParaThinker())
