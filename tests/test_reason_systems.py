"""Protocols beyond tags, exact at every step against one dense pass with each system's own mask."""

from __future__ import annotations

import pytest
import torch
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

from fork_attn.reason import Protocol, Trace
from fork_attn.reason.kv_bias import SegmentVectors
from fork_attn.reason.systems import (
    BestFirst,
    BestOfN,
    GroupThink,
    Hogwild,
    LeaP,
    ParaThinker,
    SkeletonOfThought,
    TreeOfThoughts,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "Is 91 prime?"


def run(model, tokenizer, protocol, forced, **options) -> Trace:  # type: ignore[no-untyped-def]
    (trace,) = run_forced(model, tokenizer, PROMPT, protocol, forced, **options)
    assert forced.used_up
    check_trace(trace)
    return trace


@pytest.mark.parametrize("name", ["best_of_n", "self_consistency", "first_finish"])
def test_samples_of_one_prompt_are_exact(name: str) -> None:
    """All samples begin from the prompt's last logits; the prompt is computed once."""
    tokenizer = make_tokenizer()
    ids = tokenizer.encode
    model = make_model(tokenizer)
    texts = ["no: 7 * 13" + EOS, "hm, I say yes" + EOS, "no: 7 * 13" + EOS, "what" + EOS]
    if name == "first_finish":
        texts = [text[:5] for text in texts[:3]] + ["what" + EOS]
    dense = Dense(model)
    prompt = dense.give(ids(PROMPT), 0, [])
    for i, text in enumerate(texts):
        dense.sample(((1, i),), ids(text), len(prompt), prompt, fed=False)
    forced = Forced({((1, i),): ids(text) for i, text in enumerate(texts)})
    protocol: str | Protocol = (
        BestOfN(scorer=lambda text: -len(text)) if name == "best_of_n" else name
    )
    trace = run(model, tokenizer, protocol, forced)
    assert dense.max_error(forced) <= TOLERANCE
    best = {"best_of_n": 3, "self_consistency": 0, "first_finish": 3}[name]
    assert trace.text == texts[best]
    statuses = [thread.status for thread in trace.threads[1:]]
    assert statuses.count("done") == 1 and statuses[best] == "done"
    assert sum(step.tokens for step in trace.steps[:1]) == len(prompt)


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_parathinker_is_exact(vectors: bool, first: bool) -> None:
    """Segment mask, shared start, vectors on keys and values, summary behind the longest path."""
    table = SegmentVectors(torch.randn(3, 2, 32), torch.randn(3, 2, 32)) if vectors else None
    protocol = ParaThinker(paths=3, vectors=table, first_ends_all=first)
    tokenizer = make_tokenizer(protocol)
    ids = tokenizer.encode
    model = make_model(tokenizer)
    texts = (
        ["one</think1>", "the second", "thirds"]
        if first
        else ["one</think1>", "the second</think2>", "3rd</think3>"]
    )
    if first:  # the first path ends after 4 tokens
        texts = [texts[0], texts[1][:4], texts[2][:4]]
    tail = ids("no" + EOS)

    dense = Dense(model)
    prompt = dense.give(ids(PROMPT), 0, [])
    segments = [0] * len(prompt)
    union, end = list(prompt), 0
    for i, text in enumerate(texts):
        line = dense.give(ids(f"<think{i + 1}>"), len(prompt), prompt)
        line = dense.sample(((1, i),), ids(text), len(prompt) + 1, line)
        if first and i:
            line = dense.give(ids(f"</think{i + 1}>"), len(line), line)
        segments += [i + 1] * (len(line) - len(prompt))
        union += line[len(prompt) :]
        end = max(end, len(line))
    line = dense.give(ids("<summary>"), end, union)
    dense.sample((), tail, end + 1, line, fed=False)
    segments += [0] * (len(dense.tokens) - len(segments))
    if table is not None:
        for layer in dense.stock.model.layers:
            for module, x in (("k_proj", table.keys), ("v_proj", table.values)):
                one = x[:, layer.self_attn.layer_idx]
                rows = torch.cat([torch.zeros(1, 32), one])[segments]
                projection = getattr(layer.self_attn, module)
                projection.register_forward_hook(lambda m, a, out, rows=rows: out + rows)

    forced = Forced({(): tail, **{((1, i),): ids(text) for i, text in enumerate(texts)}})
    trace = run(model, tokenizer, protocol, forced)
    assert dense.max_error(forced) <= TOLERANCE
    assert trace.text.endswith("<summary>no" + EOS)
    # The hooks are gone again.
    assert not model.model.layers[0].self_attn.k_proj._forward_hooks


def test_aspd_is_exact() -> None:
    tokenizer = make_tokenizer("aspd")
    ids = tokenizer.encode
    model = make_model(tokenizer)
    head = ids("So<parallel><title>1: a</title><title>2: b</title></parallel>")
    paths, tail = [ids("long one</branch>"), ids("x</branch>")], ids("no" + EOS)
    dense = Dense(model)
    prompt = ids(PROMPT)
    seen = dense.sample((), head, len(prompt), dense.give(prompt, 0, []))
    union = list(seen)
    for i, path in enumerate(paths):
        header = ids(f"<branch>T_{i + 1}:")
        line = dense.give(header, len(seen), seen)
        union += dense.sample(((1, i),), path, len(line), line)[len(seen) :]
    line = dense.give(ids("\n"), len(union), union)  # the sum of all tokens
    dense.sample((), tail, len(line), line, fed=False)
    forced = Forced({(): [*head, *tail], ((1, 0),): paths[0], ((1, 1),): paths[1]})
    run(model, tokenizer, "aspd", forced)
    assert dense.max_error(forced) <= TOLERANCE


def test_pasta_is_exact() -> None:
    """The author goes on behind the promised length, blind to the text until it syncs."""
    tokenizer = make_tokenizer("pasta")
    ids = tokenizer.encode
    model = make_model(tokenizer)
    first = ids("A<promise topic=x tokens=20/>")
    second, third = ids("B<promise topic=y tokens=10/>"), ids("C<sync/>")
    texts, tail = [ids("xxxxx</async>"), ids("yy</async>")], ids("end" + EOS)
    dense = Dense(model)
    prompt = ids(PROMPT)
    seen = dense.sample((), first, len(prompt), dense.give(prompt, 0, []))
    at = len(seen)
    x = dense.sample(((1, 0),), texts[0], at + 1, dense.give(ids("<async>"), at, seen))
    own = dense.sample((), second, at + 20, seen)
    after = at + 20 + len(second)
    y = dense.sample(((2, 0),), texts[1], after + 1, dense.give(ids("<async>"), after, own))
    line = dense.sample((), third[:-1], after + 10, own)
    dense.expected[(), len(first) + len(second) + len(third) - 1] = line[-1]
    dense.count[()] += 1
    union = [*line, *x[len(seen) :], *y[len(own) :]]
    line = dense.give(third[-1:], after + 10 + len(third) - 1, union)
    dense.sample((), tail, after + 10 + len(third), line, fed=False)
    script = {(): [*first, *second, *third, *tail], ((1, 0),): texts[0], ((2, 0),): texts[1]}
    forced = Forced(script)
    trace = run(model, tokenizer, "pasta", forced)
    assert dense.max_error(forced) <= TOLERANCE
    assert dense_of_trace(dense.stock, trace, forced).max_error(forced) <= TOLERANCE


def test_apar_is_exact() -> None:
    tokenizer = make_tokenizer("apar")
    ids = tokenizer.encode
    model = make_model(tokenizer)
    parts = {
        (): "1. one[Fork]2. two[Fork]3. three" + EOS,
        ((1, 0),): "detail[Fork] more" + EOS,
        ((1, 0), (1, 0)): "inner" + EOS,
        ((2, 0),): "about two" + EOS,
    }
    dense = Dense(model)
    prompt = dense.give(ids(PROMPT), 0, [])
    root = dense.sample((), ids(parts[()]), len(prompt), prompt, fed=False)
    at = len(prompt) + len(ids("1. one[Fork]"))
    line = dense.give(ids("[Child]"), at, root[:at])
    line = dense.sample(((1, 0),), ids(parts[((1, 0),)]), at + 1, line, fed=False)
    inner = at + 1 + len(ids("detail[Fork]"))
    child = dense.give(ids("[Child]"), inner, line[:inner])
    dense.sample(((1, 0), (1, 0)), ids(parts[((1, 0), (1, 0))]), inner + 1, child, fed=False)
    at = len(prompt) + len(ids("1. one[Fork]2. two[Fork]"))
    line = dense.give(ids("[Child]"), at, root[:at])
    dense.sample(((2, 0),), ids(parts[((2, 0),)]), at + 1, line, fed=False)
    forced = Forced({path: ids(text) for path, text in parts.items()})
    trace = run(model, tokenizer, "apar", forced)
    assert dense.max_error(forced) <= TOLERANCE
    assert trace.text == (
        f"1. one[Fork][Child]detail[Fork][Child]inner{EOS} more{EOS}"
        f"2. two[Fork][Child]about two{EOS}3. three{EOS}"
    )


def test_apr_is_exact() -> None:
    """Children see their message alone; the call leaves the caller's context for the replies."""
    tokenizer = make_tokenizer()
    ids = tokenizer.encode
    model = make_model(tokenizer)
    said, call = "Let me ask. ", "<Calling Sub Searches>\nab\ncd\n<End Calling Sub Searches>"
    replies, tail = ["thinking\nyes" + EOS, "no" + EOS], "So no." + EOS
    dense = Dense(model)
    prompt = ids(PROMPT)
    seen = dense.give(prompt, 0, [])
    line = dense.sample((), ids(said + call), len(seen), seen)
    for i, (message, reply) in enumerate(zip(("ab", "cd"), replies, strict=True)):
        child = dense.give(ids(message), 0, [])
        dense.sample(((1, i),), ids(reply), len(child), child, fed=False)
    kept = line[: len(prompt) + len(ids(said))]
    line = dense.give(ids("<Sub Searches>\nyes\nno\n<End Sub Searches>\n"), len(kept), kept)
    dense.sample((), ids(tail), len(line), line, fed=False)
    forced = Forced(
        {(): ids(said + call + tail), ((1, 0),): ids(replies[0]), ((1, 1),): ids(replies[1])}
    )
    trace = run(model, tokenizer, "apr", forced)
    assert dense.max_error(forced) <= TOLERANCE
    assert dense_of_trace(dense.stock, trace, forced).max_error(forced) <= TOLERANCE
    assert trace.text == f"{said}<Sub Searches>\nyes\nno\n<End Sub Searches>\n{tail}"


def test_leap_is_exact() -> None:
    """Each sample drops its unfinished paragraph, sums up, and reads its peers' summaries."""
    protocol = LeaP(n=2, turns=2, turn_tokens=8, summary_tokens=20, ask="Sum:", summary_ends="#")
    tokenizer = make_tokenizer()
    ids = tokenizer.encode
    model = make_model(tokenizer)
    firsts = ["abc\n\ndef", "defghijk"]  # eight tokens each; the first has a whole paragraph
    summaries, rest = [" left#", "right#"], ["x" + EOS, "yes" + EOS]
    dense = Dense(model)
    prompt = dense.give(ids(PROMPT), 0, [])
    for i in range(2):
        line = dense.sample(((1, i),), ids(firsts[i]), len(prompt), prompt, fed=i == 1)
        kept = line[: len(prompt) + (3 if i == 0 else 8)]
        line = dense.give(ids("\n\nSum:"), len(kept), kept)
        line = dense.sample(((1, i),), ids(summaries[i]), len(line), line)
        peer = ("right", "left")[i]
        line = dense.give(ids(f"\n<comment>\n{peer}\n</comment>\n\n"), len(line), line)
        dense.sample(((1, i),), ids(rest[i]), len(line), line, fed=False)
    forced = Forced({((1, i),): ids(firsts[i] + summaries[i] + rest[i]) for i in range(2)})
    trace = run(model, tokenizer, protocol, forced)
    assert dense.max_error(forced) <= TOLERANCE
    assert trace.text == f"abc\n\nSum: left#\n<comment>\nright\n</comment>\n\nx{EOS}"


def test_skeleton_of_thought_is_exact() -> None:
    protocol = SkeletonOfThought(ask="List: {question}", expand="{question}|{skeleton}|one")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}>"
    ids = tokenizer.encode
    model = make_model(tokenizer)
    skeleton, texts = "1. odd\n2. small", ["It is odd" + EOS, "It is not" + EOS]
    dense = Dense(model)
    line = dense.give(ids(f"[List: {PROMPT}]>"), 0, [])
    dense.sample((), ids(skeleton + EOS), len(line), line, fed=True)
    stem = dense.give(ids(f"[{PROMPT}|{skeleton}|one]>"), 0, [])
    for i, (header, text) in enumerate(zip(("1. odd", "2. small"), texts, strict=True)):
        line = dense.give(ids(header), len(stem), stem)
        dense.sample(((1, 0), (1, i)), ids(text), len(line), line, fed=False)
    script = {((1, 0), (1, i)): ids(text) for i, text in enumerate(texts)}
    forced = Forced({(): ids(skeleton + EOS), **script})
    trace = run(model, tokenizer, protocol, forced)
    assert dense.max_error(forced) <= TOLERANCE
    assert trace.text == f"1. odd{texts[0]}2. small{texts[1]}"


def test_tree_of_thoughts_is_exact() -> None:
    """Two levels of two thoughts, of which the better one goes on."""
    protocol = TreeOfThoughts(
        branching=2, keep=1, levels=2, scorer=lambda text: text.count("good"), thought_ends="\n"
    )
    tokenizer = make_tokenizer()
    ids = tokenizer.encode
    model = make_model(tokenizer)
    level = {((1, 0),): "bad\n", ((1, 1),): "good\n"}
    leaves = {((1, 1), (1, 0)): "so bad" + EOS, ((1, 1), (1, 1)): "good\n"}
    dense = Dense(model)
    prompt = dense.give(ids(PROMPT), 0, [])
    lines = {p: dense.sample(p, ids(text), len(prompt), prompt) for p, text in level.items()}
    line = lines[((1, 1),)]
    for path, text in leaves.items():
        dense.sample(path, ids(text), len(line), line, fed=False)
    forced = Forced({path: ids(text) for path, text in {**level, **leaves}.items()})
    trace = run(model, tokenizer, protocol, forced)
    assert dense.max_error(forced) <= TOLERANCE
    assert trace.text == "good\ngood\n"
    assert [t.status for t in trace.threads] == ["pruned", "pruned", "done", "pruned", "done"]


def test_best_first_search_is_exact() -> None:
    protocol = BestFirst(branching=2, at_once=2, expansions=3, answers=2, scorer=len)
    tokenizer = make_tokenizer()
    ids = tokenizer.encode
    model = make_model(tokenizer)
    texts = {
        ((1, 0),): "a\n",
        ((1, 1),): "bb\n",
        ((1, 0), (1, 0)): "c" + EOS,
        ((1, 0), (1, 1)): "d\n",
        ((1, 1), (1, 0)): "eeee" + EOS,
        ((1, 1), (1, 1)): "f\n",
    }
    dense = Dense(model)
    prompt = dense.give(ids(PROMPT), 0, [])
    lines = {(): prompt}
    for path, text in texts.items():
        above = lines[path[:-1]]
        lines[path] = dense.sample(path, ids(text), len(above), above, fed=len(path) == 1)
    forced = Forced({path: ids(text) for path, text in texts.items()})
    trace = run(model, tokenizer, protocol, forced)
    assert dense.max_error(forced) <= TOLERANCE
    assert trace.text == "bb\neeee" + EOS


def _watchers(
    texts: list[str], ranges: int | None, model_name: str
) -> tuple[Dense, Forced, object, object, object]:
    """Workers that see each other's tokens of earlier steps and of the same one.

    Args:
        texts: what each writes, all equally long.
        ranges: positions of each; None lays every view end to end.
    """
    names = [f"w{i}" for i in range(len(texts))]
    cls = Hogwild if ranges is None else GroupThink
    options = {"own": "<me>", "others": "#"} if ranges is None else {"positions": ranges}
    protocol = cls(workers=tuple(names), task="{question}", prefix="{name}:", finish="", **options)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}>"
    ids = tokenizer.encode
    model = make_model(tokenizer, model_name)
    dense = Dense(model)
    prompt = dense.give(ids(f"[{PROMPT}]>" + ("#" if ranges is None else "")), 0, [])
    header = dense.give(ids("<me>"), len(prompt), prompt)[len(prompt) :] if ranges is None else []
    written: list[list[int]] = [[] for _ in texts]
    rows = [ids(f"{name}:") for name in names]
    sampled = [ids(text) for text in texts]
    for k in range(len(sampled[0])):
        fresh = [len(row) for row in rows]
        first = [len(w) for w in written]
        nodes: list[list[int]] = []
        for w, row in enumerate(rows):
            start = len(prompt) + first[w] + (0 if ranges is None else w * ranges)
            base = len(dense.tokens)
            dense.give(row, start, [])
            nodes.append(list(range(base, base + fresh[w])))
        for w, mine in enumerate(nodes):
            for i, node in enumerate(mine):
                others = [
                    x
                    for o in range(len(texts))
                    if o != w
                    for x in (*written[o], *nodes[o][: i + 1])
                ]
                dense.sees[node] = [*prompt, *others, *header, *written[w], *mine[: i + 1]]
                if ranges is None:
                    dense.view(node)
        for w, mine in enumerate(nodes):
            written[w] += mine
            dense.expected[((1, w),), k] = mine[-1]
            rows[w] = [sampled[w][k]]
    forced = Forced({((1, w),): tokens for w, tokens in enumerate(sampled)})
    return dense, forced, model, tokenizer, protocol


@pytest.mark.parametrize("ranges", [None, 64], ids=["hogwild", "groupthink"])
@pytest.mark.parametrize(("workers", "model_name"), [(2, "llama"), (3, "llama"), (2, "qwen3")])
def test_watching_is_exact(ranges: int | None, workers: int, model_name: str) -> None:
    texts = ["abcdefg" + EOS, "hijklmn" + EOS, "opqrstu" + EOS][:workers]
    dense, forced, model, tokenizer, protocol = _watchers(texts, ranges, model_name)
    trace = run(model, tokenizer, protocol, forced)
    assert dense.max_error(forced) <= TOLERANCE
    watches = trace.threads[1].watches
    assert [w.thread for w in watches] == list(range(2, workers + 1 + (ranges is None)))
    assert trace.text == f"{'#' if ranges is None else ''}w0:{texts[0]}"


def test_hogwild_answers_over_all_texts() -> None:
    protocol = Hogwild(task="{question}", prefix="{name}:", finish="So:", others="#")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}>"
    ids = tokenizer.encode
    forced = Forced({(): ids("91" + EOS), ((1, 0),): ids("ab" + EOS), ((1, 1),): ids("cde")})
    trace = run(make_model(tokenizer), tokenizer, protocol, forced)
    assert trace.text == f"#Alice:abBob:cdeSo:91{EOS}"


def test_threadweaver_by_rebase() -> None:
    """The threads' keys end to end, as they were computed: blind to each other."""
    tokenizer = make_tokenizer("threadweaver_rebase")
    ids = tokenizer.encode
    model = make_model(tokenizer)
    head = ids("<Outlines><Outline>1: a</Outline><Outline>2: b</Outline></Outlines>")
    paths, tail = [ids("first one</Thread>"), ids("2nd</Thread>")], ids("so" + EOS)
    dense = Dense(model)
    prompt = ids(PROMPT)
    seen = dense.sample((), head, len(prompt), dense.give(prompt, 0, []))
    union = list(seen)
    for i, path in enumerate(paths):
        line = dense.give(ids(f"\n<Thread>\n{i + 1}:"), len(seen), seen)
        union += dense.sample(((1, i),), path, len(line), line)[len(seen) :]
    start = len(dense.tokens)
    line = dense.give(ids("\n"), len(union), union)
    dense.sample((), tail, len(line), line, fed=False)
    for node in range(start, len(dense.tokens)):
        dense.view(node)
    forced = Forced({(): [*head, *tail], ((1, 0),): paths[0], ((1, 1),): paths[1]})
    trace = run(model, tokenizer, "threadweaver_rebase", forced)
    assert dense.max_error(forced) <= TOLERANCE
    assert trace.events_of("join")[0].join == "rebase"
