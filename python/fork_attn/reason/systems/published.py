"""Tag protocols of published systems; `docs/protocols.md` has their open points."""

from __future__ import annotations

from dataclasses import replace

from fork_attn.reason.protocol import register
from fork_attn.reason.systems.tags import TagProtocol

# arXiv 2506.09991. Paths start at one position; the KV of all is taken over as it is, and the
# conclusion goes on behind the longest path.
multiverse = TagProtocol(
    name="multiverse",
    opens="<Goal>",
    item="<Outline>",
    item_ends="</Outline>",
    fork_at="</Goal>",
    child_ends="</Path>",
    shared="\n",
    header="<Path>\n{n}:",
    closing="</Path>",
    after="<Conclusion>\n",
    other_tags=("<Parallel>", "</Parallel>", "<Path>", "<Conclusion>", "</Conclusion>"),
)

# arXiv 2512.07461, of the same lineage; repetition is penalised inside steps.
npr = TagProtocol(
    name="npr",
    opens="<guideline>",
    item="<plan>",
    item_ends="</plan>",
    fork_at="</guideline>",
    child_ends="</step>",
    shared="\n",
    header="<step>\n{n}:",
    closing="</step>",
    after="<takeaway>\n",
    path_sampling=(("repetition_penalty", 1.02),),
    other_tags=("<step>", "<takeaway>", "</takeaway>"),
)

# arXiv 2512.07843. The threads' texts stand one after another in plain causal order: the first
# thread is a true prefix, the others are computed again behind it.
threadweaver = TagProtocol(
    name="threadweaver",
    opens="<Outlines>",
    item="<Outline>",
    item_ends="</Outline>",
    fork_at="</Outlines>",
    child_ends="</Thread>",
    header="\n<Thread>\n{n}:",
    joined_header="<Thread>\n{n}:",
    closing="\n</Thread>",
    after="\n",
    last_words="\n</Parallel>",
    join="text",
    other_tags=("<Parallel>", "</Parallel>", "<Thread>"),
)

# The same without computing anything again: the threads' KV is laid end to end by turning queries.
# Not exact: later threads were written without sight of earlier ones.
threadweaver_rebase = replace(threadweaver, name="threadweaver_rebase", join="rebase")

# arXiv 2509.07980 as released: always two paths, sampled at temperature 1, joined as text.
parallel_r1 = TagProtocol(
    name="parallel_r1",
    fork_at="<Parallel>",
    child_ends="</Path>",
    fanout=2,
    header="<Path>",
    closing="</Path>",
    after="</Parallel>\n<Summary>",
    join="text",
    path_sampling=(("temperature", 1.0),),
    other_tags=("<Path>", "</Parallel>", "<Summary>", "</Summary>"),
)

# The masks and positions of its "unseen" training: siblings hidden, the longest path counts.
parallel_r1_unseen = TagProtocol(
    name="parallel_r1_unseen",
    fork_at="<Parallel>",
    child_ends="</Path>",
    fanout=2,
    header="<Path>",
    closing="</Path>",
    after="</Parallel>\n<Summary>",
    path_sampling=(("temperature", 1.0),),
    other_tags=("<Path>", "</Parallel>", "<Summary>", "</Summary>"),
)

# arXiv 2508.08895. Siblings hidden; time goes on by all tokens that were decoded.
aspd = TagProtocol(
    name="aspd",
    opens="<parallel>",
    item="<title>",
    item_ends="</title>",
    fork_at="</parallel>",
    child_ends="</branch>",
    header="<branch>T_{n}:",
    closing="</branch>",
    after="\n",
    position="sum",
    other_tags=("<branch>",),
)

for _protocol in (
    multiverse,
    npr,
    threadweaver,
    threadweaver_rebase,
    parallel_r1,
    parallel_r1_unseen,
    aspd,
):
    register(_protocol)
