"""Tag protocols, exact at every step against one dense pass with each system's own mask."""

from __future__ import annotations

import pytest
from reason_pair import (
    EOS,
    TOLERANCE,
    Dense,
    Forced,
    check_trace,
    dense_of_trace,
    make_model,
    make_tokenizer,
    run_forced,
)

from fork_attn.reason import Limits, Trace

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "Is 91 prime?"
LISTED = {
    "multiverse": "Hm<Parallel><Goal>{}</Goal>",
    "npr": "Hm<guideline>{}</guideline>",
}
ENTRY = {
    "multiverse": "<Outline>{n}: try {n}</Outline>",
    "npr": "<plan>{n}: try {n}</plan>",
}
HEADER = {"multiverse": "<Path>\n{n}:", "npr": "<step>\n{n}:"}
ENDS = {"multiverse": "</Path>", "npr": "</step>"}
AFTER = {"multiverse": "<Conclusion>\n", "npr": "<takeaway>\n"}
PATHS = ("short", "a much longer path", "middling one")


def listed(name: str, numbers: str = "123") -> str:
    return LISTED[name].format("".join(ENTRY[name].format(n=n) for n in numbers))


@pytest.mark.parametrize("model_name", ["llama", "qwen3"])
@pytest.mark.parametrize("name", ["multiverse", "npr"])
def test_union_joins_are_exact(name: str, model_name: str) -> None:
    """Siblings hidden from each other, shared positions, on behind the longest path."""
    tokenizer = make_tokenizer(name)
    ids = tokenizer.encode
    model = make_model(tokenizer, model_name)
    paths = [ids(text + ENDS[name]) for text in PATHS]
    head, tail = ids(listed(name)), ids("So 91 = 7 * 13." + EOS)
    script = {(): [*head, *tail], **{((1, i),): path for i, path in enumerate(paths)}}

    dense = Dense(model)
    prompt = ids(PROMPT)
    seen = dense.give(prompt, 0, [])
    seen = dense.sample((), head, len(prompt), seen)
    seen = dense.give(ids("\n"), len(seen), seen)
    start, joined, ends = len(seen), list(seen), []
    for i, path in enumerate(paths):
        header = ids(HEADER[name].format(n=i + 1))
        line = dense.give(header, start, seen)
        line = dense.sample(((1, i),), path, start + len(header), line)
        joined += line[len(seen) :]
        ends.append(start + len(header) + len(path))
    after = ids(AFTER[name])
    line = dense.give(after, max(ends), joined)
    dense.sample((), tail, max(ends) + len(after), line, fed=False)

    forced = Forced(script)
    (trace,) = run_forced(model, tokenizer, PROMPT, name, forced)
    assert forced.used_up
    assert dense.max_error(forced) <= TOLERANCE
    check_trace(trace)
    assert dense_of_trace(dense.stock, trace, forced).max_error(forced) <= TOLERANCE
    assert [t.status for t in trace.threads] == ["done", "joined", "joined", "joined", "done"]
    assert trace.threads[4].parents == (0, 1, 2, 3)
    assert trace.text.startswith("Hm") and trace.text.endswith("13." + EOS)
    longest = max(map(len, paths))
    assert trace.critical_path_tokens == len(head) + longest + len(tail)
    assert trace.total_tokens == len(head) + sum(map(len, paths)) + len(tail)


@pytest.mark.parametrize("name", ["threadweaver", "parallel_r1"])
def test_text_joins_are_exact(name: str) -> None:
    """Threads see the parent alone; what follows is plain causal over the joined text."""
    tokenizer = make_tokenizer(name)
    ids = tokenizer.encode
    model = make_model(tokenizer)
    if name == "threadweaver":
        texts = ("first one</Thread>", "second</Thread>", "3rd</Thread>")
        head = ids(
            "<Parallel><Outlines><Outline>1: a</Outline><Outline>2: b</Outline>"
            "<Outline>3: c</Outline></Outlines>"
        )
        header, joined_header, after = "\n<Thread>\n{n}:", "<Thread>\n{n}:", "\n"
    else:
        texts = ("first one</Path>", "second</Path>")
        head = ids("Hm <Parallel>")
        header, joined_header, after = "<Path>", "<Path>", "</Parallel>\n<Summary>"
    paths = [ids(text) for text in texts]
    tail = ids("</Parallel> so no" + EOS)
    script = {(): [*head, *tail], **{((1, i),): path for i, path in enumerate(paths)}}

    dense = Dense(model)
    prompt = ids(PROMPT)
    seen = dense.sample((), head, len(prompt), dense.give(prompt, 0, []))
    joined: list[int] = []
    for i, path in enumerate(paths):
        given = ids(header.format(n=i + 1))
        line = dense.give(given, len(seen), seen)
        line = dense.sample(((1, i),), path, len(line), line)
        if i == 0:
            joined = line
        else:  # again, behind the text of those before
            joined = dense.give(ids(joined_header.format(n=i + 1)) + path, len(joined), joined)
    joined = dense.give(ids(after), len(joined), joined)
    dense.sample((), tail, len(joined), joined, fed=False)

    forced = Forced(script)
    (trace,) = run_forced(model, tokenizer, PROMPT, name, forced)
    assert forced.used_up
    assert dense.max_error(forced) <= TOLERANCE
    check_trace(trace)
    assert dense_of_trace(dense.stock, trace, forced).max_error(forced) <= TOLERANCE
    text = "".join(joined_header.format(n=i + 2) + text for i, text in enumerate(texts[1:]))
    assert trace.text == tokenizer.decode(head) + header.format(n=1) + texts[0] + text + after + (
        tokenizer.decode(tail)
    )
    # The copies were not sampled a second time.
    assert trace.total_tokens == len(head) + sum(map(len, paths)) + len(tail)
    (join,) = trace.events_of("join")
    assert join.join == "text" and join.tokens_reused == len(paths[0]) + len(
        ids(header.format(n=1))
    )


def test_parallel_r1_unseen_is_exact() -> None:
    tokenizer = make_tokenizer("parallel_r1_unseen")
    ids = tokenizer.encode
    model = make_model(tokenizer)
    head, tail = ids("Hm <Parallel>"), ids("no</Summary>" + EOS)
    paths = [ids("long way round</Path>"), ids("x</Path>")]
    dense = Dense(model)
    prompt = ids(PROMPT)
    seen = dense.sample((), head, len(prompt), dense.give(prompt, 0, []))
    base, union = len(seen), list(seen)
    for i, path in enumerate(paths):
        line = dense.give(ids("<Path>"), base, seen)
        union += dense.sample(((1, i),), path, base + 1, line)[base:]
    after = ids("</Parallel>\n<Summary>")
    # </Parallel> stands right behind the longest path.
    line = dense.give(after, base + 1 + len(paths[0]), union)
    dense.sample((), tail, base + 1 + len(paths[0]) + len(after), line, fed=False)
    forced = Forced({(): [*head, *tail], ((1, 0),): paths[0], ((1, 1),): paths[1]})
    (trace,) = run_forced(model, tokenizer, PROMPT, "parallel_r1_unseen", forced)
    assert forced.used_up and dense.max_error(forced) <= TOLERANCE
    check_trace(trace)


def test_nested_forks_and_a_second_block_are_exact() -> None:
    tokenizer = make_tokenizer("multiverse")
    ids = tokenizer.encode
    model = make_model(tokenizer)
    head, inner, again = (
        ids(listed("multiverse", "12")),
        ids(listed("multiverse", "12")),
        ids("and" + listed("multiverse", "4")),
    )
    back, leaf_a, leaf_b, right = (
        ids("</Path>"),
        ids("A</Path>"),
        ids("BBB</Path>"),
        ids("R</Path>"),
    )
    only, tail = ids("4th</Path>"), ids("ok" + EOS)

    def path_of(line: list[int], n: int, at: int) -> tuple[list[int], int]:
        header = ids(f"<Path>\n{n}:")
        return dense.give(header, at, line), at + len(header)

    dense = Dense(model)
    prompt = ids(PROMPT)
    seen = dense.sample((), head, len(prompt), dense.give(prompt, 0, []))
    seen = dense.give(ids("\n"), len(seen), seen)
    start = len(seen)
    line, at = path_of(seen, 1, start)
    line = dense.sample(((1, 0),), inner, at, line)
    line = dense.give(ids("\n"), at + len(inner), line)
    at += len(inner) + 1
    a, at_a = path_of(line, 1, at)
    a = dense.sample(((1, 0), (1, 0)), leaf_a, at_a, a)
    b, at_b = path_of(line, 2, at)
    b = dense.sample(((1, 0), (1, 1)), leaf_b, at_b, b)
    line = [*a, *b[len(line) :]]
    after = ids("<Conclusion>\n")
    line = dense.give(after, at_b + len(leaf_b), line)
    left_end = at_b + len(leaf_b) + len(after) + len(back)
    line = dense.sample(((1, 0),), back, left_end - len(back), line)
    r, at_r = path_of(seen, 2, start)
    r = dense.sample(((1, 1),), right, at_r, r)
    joined = dense.give(after, left_end, [*line, *r[len(seen) :]])
    at = left_end + len(after)
    joined = dense.sample((), again, at, joined)
    joined = dense.give(ids("\n"), at + len(again), joined)
    line, at = path_of(joined, 4, at + len(again) + 1)
    line = dense.sample(((2, 0),), only, at, line)
    line = dense.give(after, at + len(only), line)
    dense.sample((), tail, at + len(only) + len(after), line, fed=False)

    forced = Forced(
        {
            (): [*head, *again, *tail],
            ((1, 0),): [*inner, *back],
            ((1, 1),): right,
            ((1, 0), (1, 0)): leaf_a,
            ((1, 0), (1, 1)): leaf_b,
            ((2, 0),): only,
        }
    )
    (trace,) = run_forced(model, tokenizer, PROMPT, "multiverse", forced)
    assert forced.used_up and dense.max_error(forced) <= TOLERANCE
    check_trace(trace)
    assert dense_of_trace(dense.stock, trace, forced).max_error(forced) <= TOLERANCE
    assert max(t.depth for t in trace.threads) == 2
    assert len(trace.events_of("join")) == 3


def one_run(
    root: str,
    *children: str,
    limits: Limits | None = None,
    name: str = "multiverse",
    **options: int,
) -> Trace:
    """A run of what the root and the children of its first fork write."""
    tokenizer = make_tokenizer(name)
    model = make_model(tokenizer)
    script = {((1, i),): tokenizer.encode(text) for i, text in enumerate(children)}
    forced = Forced({(): tokenizer.encode(root), **script})
    (trace,) = run_forced(model, tokenizer, PROMPT, name, forced, limits=limits, **options)
    check_trace(trace)
    return trace


def notes(trace: Trace, kind: str) -> list[str]:
    return [event.note for event in trace.events if event.kind == kind]


@pytest.mark.parametrize(
    ("root", "note"),
    [
        ("a</Path>b" + EOS, "</Path> outside of its place"),
        ("a<Outline>1:x</Outline>" + EOS, "<Outline> outside of its place"),
        ("a</Goal>b" + EOS, "</Goal> without <Goal>"),
        ("<Goal>x</Goal>b" + EOS, "</Goal> without entries"),
        ("<Goal><Outline>1:x" + EOS, "<Goal> without </Goal>"),
        ("<Goal><Goal></Goal>" + EOS, "<Goal> inside a list"),
    ],
)
def test_malformed_tags_are_contained(root: str, note: str) -> None:
    trace = one_run(root)
    assert note in notes(trace, "malformed")
    assert trace.text == root and trace.finish == "done"
    assert trace.threads[0].status == "malformed" and trace.threads[0].note


def test_entries_without_or_with_equal_numbers() -> None:
    entries = "<Goal><Outline>x</Outline><Outline>y</Outline></Goal>"
    trace = one_run(entries + EOS, "a</Path>", "b</Path>")
    assert notes(trace, "malformed") == ["2 entries without numbers"]
    assert [t.label for t in trace.threads[1:3]] == ["path 1", "path 2"]
    entries = "<Goal><Outline>1:x</Outline><Outline>1:y</Outline></Goal>"
    trace = one_run(entries + EOS, "a</Path>")
    assert notes(trace, "malformed") == ["entries with the same number: 1, 1"]


def test_a_path_without_end_is_closed() -> None:
    head = listed("multiverse", "12")
    most = len(make_tokenizer("multiverse").encode(head))
    trace = one_run(
        head + "c" + EOS, "abc" + EOS, "b" * most, limits=Limits(max_thread_tokens=most)
    )
    assert notes(trace, "malformed") == [
        "ended without </Path>: eos",
        "ended without </Path>: max_thread_tokens",
    ]
    assert trace.text == (
        f"{head}\n<Path>\n1:abc</Path><Path>\n2:{'b' * most}</Path><Conclusion>\nc{EOS}"
    )
    # The end token was sampled, but nobody sees it.
    assert trace.threads[1].text.endswith(EOS + "</Path>")


def test_a_thread_that_ends_the_text_ends_threadweaver() -> None:
    head = "<Outlines><Outline>1: a</Outline><Outline>2: b</Outline></Outlines>"
    trace = one_run(head, "x" + EOS, "y</Thread>", name="threadweaver")
    assert trace.text == f"{head}\n<Thread>\n1:x\n</Thread><Thread>\n2:y</Thread>\n</Parallel>"


@pytest.mark.parametrize(
    ("limits", "note"),
    [
        (Limits(max_fanout=1), "max_fanout: 2 children, at most 1"),
        (Limits(max_width=1), "max_width: 2 threads at once, at most 1"),
    ],
)
def test_a_refused_fork_leaves_the_paths_to_the_thread(limits: Limits, note: str) -> None:
    rest = "<Path>1:a</Path><Path>2:b</Path>c"
    trace = one_run(listed("multiverse", "12") + rest + EOS, limits=limits)
    assert notes(trace, "refuse") == [note]
    assert not notes(trace, "malformed") and len(trace.threads) == 1
    assert trace.text == f"{listed('multiverse', '12')}\n{rest}{EOS}"


def test_depth_is_limited() -> None:
    inner = listed("multiverse", "1") + "<Path>\n1:x</Path>done</Path>"
    trace = one_run(
        listed("multiverse", "1") + EOS, inner, limits=Limits(max_depth=1), name="multiverse"
    )
    assert notes(trace, "refuse") == ["max_depth: already 1 deep, at most 1"]
    # The inner path's end is not taken for the outer one's.
    assert trace.threads[1].text.endswith("done</Path>") and not notes(trace, "malformed")


def test_pages_are_limited() -> None:
    head = listed("multiverse", "12")
    tokenizer = make_tokenizer("multiverse")
    used = -(-len(tokenizer.encode(PROMPT + head + "\n")) // 4)
    trace = one_run(head + "b" * 9, limits=Limits(max_pages=used + 1))
    assert notes(trace, "refuse") == [f"max_pages: {used} and 2 more, at most {used + 1}"]
    assert notes(trace, "limit") == [f"max_pages: {used + 1}"]
    assert trace.threads[0].status == "limit" and trace.text.startswith(head + "\nbbb")


def test_paths_that_find_no_page_are_joined_as_they_are() -> None:
    head = listed("multiverse", "12")
    tokenizer = make_tokenizer("multiverse")
    used = -(-len(tokenizer.encode(PROMPT + head + "\n")) // 4)
    trace = one_run(head + "c" * 9, "a" * 99, "b" * 99, limits=Limits(max_pages=used + 9))
    limited = [event.thread for event in trace.events_of("limit")]
    assert len(set(limited)) == len(limited) and {1, 2} <= set(limited)
    assert len(trace.events_of("join")) == 1 and trace.finish == "limit"
    assert "aaaa" in trace.text and "bbbb" in trace.text
