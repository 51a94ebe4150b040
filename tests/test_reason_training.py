"""Training examples: over the flat sequence a model computes what it computed in branches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hf_models import build, stock_copy
from reason_pair import EOS, Forced, make_model, make_tokenizer, run_forced
from trace_walk import Walk, nested

from fork_attn.errors import Unsupported
from fork_attn.reason.trace import Trace
from fork_attn.reason.trace_records import Watching
from fork_attn.reason.training import Packer, TrainingExample, from_trace, merge_ranges


def flat_logits(model: torch.nn.Module, example: TrainingExample) -> torch.Tensor:
    """(S, vocab): one stock pass with an explicit mask."""
    mask = torch.where(example.dense_mask(), 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([example.token_ids]),
            position_ids=torch.tensor([example.position_ids]),
            attention_mask=mask,
            use_cache=False,
        ).logits[0]


@pytest.fixture(scope="module")
def walked() -> Iterator[tuple[torch.nn.Module, Walk, Trace]]:
    model = build("llama")
    stock = stock_copy(model, "gemma2")  # eager
    walk, trace = nested(model)
    yield stock, walk, trace


def test_every_label_meets_the_logits_that_its_token_was_sampled_from(
    walked: tuple[torch.nn.Module, Walk, Trace],
) -> None:
    stock, walk, trace = walked
    example = from_trace(trace)
    logits = flat_logits(stock, example)
    rows, targets = example.labels()
    in_order = sorted(walk.seen)  # (record, token)
    assert len(rows) == len(in_order) == trace.total_tokens
    for row, target, (record, index) in zip(rows, targets, in_order, strict=True):
        torch.testing.assert_close(logits[row], walk.seen[record, index], atol=2e-4, rtol=1e-4)
        assert target == trace.threads[record].token_ids[index]


def test_each_branch_alone_is_a_plain_causal_run(
    walked: tuple[torch.nn.Module, Walk, Trace],
) -> None:
    stock, _, trace = walked
    example = from_trace(trace)
    logits = flat_logits(stock, example)
    start = 0
    for thread in trace.threads:
        n = len(thread.token_ids)
        if thread.kind != "continuation":
            before = [
                t
                for s in thread.context
                for t in trace.threads[s.thread].token_ids[s.start : s.end]
            ]
            with torch.no_grad():
                alone = stock(torch.tensor([[*before, *thread.token_ids]]), use_cache=False).logits[
                    0
                ]
            torch.testing.assert_close(
                logits[start : start + n], alone[len(before) :], atol=2e-4, rtol=1e-4
            )
        start += n


def test_the_hazards(walked: tuple[torch.nn.Module, Walk, Trace]) -> None:
    """No child predicts its sibling's first token; injected tokens and prompts have no loss; a
    token has a loss once; siblings start at one position and do not see each other."""
    _, _, trace = walked
    example = from_trace(trace)
    starts = [sum(len(t.token_ids) for t in trace.threads[:i]) for i in range(len(trace.threads))]
    a, b, c = (trace.threads[i] for i in (1, 2, 3))
    assert [example.predicted_from[starts[t.id]] for t in (a, b, c)] == [9, 9, 9]
    assert {example.position_ids[starts[t.id]] for t in (a, b, c)} == {10}
    mask = example.dense_mask()
    rows = slice(starts[b.id], starts[b.id] + len(b.token_ids))
    assert not mask[rows, starts[a.id] : starts[a.id] + len(a.token_ids)].any()
    given = [flag for thread in trace.threads for flag in thread.injected]
    assert [not flag for flag in given] == list(example.generated)
    assert sum(example.generated) == len(example.labels()[0]) == trace.total_tokens
    # Three siblings are enough: nothing is read off the second one.
    assert len(trace.events_of("fork")[0].others) == 3


SCRIPTS = {
    "multiverse": (
        "Hm<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline><Outline>3: c</Outline>"
        "</Goal>",
        ("short</Path>", "a much longer one</Path>", "middling</Path>"),
        "so 7.</Parallel>" + EOS,
    ),
    "multiverse, a path that ends by itself": (
        "Hm<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>",
        ("short</Path>", "no tag" + EOS),
        "so 7.</Parallel>" + EOS,
    ),
    "threadweaver": (
        "<Parallel><Outlines><Outline>1: a</Outline><Outline>2: b</Outline><Outline>3: c</Outline>"
        "</Outlines>",
        ("one</Thread>", "second</Thread>", "3rd</Thread>"),
        "</Parallel> so no" + EOS,
    ),
    "self_consistency": ("", ("one" + EOS, "second" + EOS, "3rd" + EOS, "4" + EOS), ""),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_traces_of_protocols(name: str) -> None:
    """Union joins, text joins, whose copies have no loss, and samples without a join."""
    head, paths, tail = SCRIPTS[name]
    name = name.split(",")[0]
    tokenizer = make_tokenizer(name)
    model = make_model(tokenizer)
    ids = tokenizer.encode
    script = {((1, i),): ids(path) for i, path in enumerate(paths)}
    if head:
        script[()] = ids(head) + ids(tail)
    forced = Forced(script)
    stock = stock_copy(model, "gemma2")  # eager
    (trace,) = run_forced(model, tokenizer, "Is 91 prime?", name, forced)
    assert forced.used_up
    example = trace.training_example()
    logits = flat_logits(stock, example)
    rows, targets = example.labels()
    want = sorted(forced.places)  # (record, token)
    assert len(want) == len(rows) == trace.total_tokens == sum(map(len, script.values()))
    for row, target, (record, index) in zip(rows, targets, want, strict=True):
        seen = forced.rows[forced.places[record, index]]
        torch.testing.assert_close(logits[row], seen, atol=1e-4, rtol=1e-4)
        assert target == trace.threads[record].token_ids[index]


def test_loss_is_the_cross_entropy_of_generated_tokens() -> None:
    packer = Packer()
    prompt = packer.add([5, 6], position=0, generated=False)
    left = packer.add([7, 8], position=2, sees=[prompt])
    packer.add([9], position=2, sees=[prompt])
    packer.add([3, 4], position=4, sees=[prompt, left], generated=[False, True])
    example = packer.build()
    assert [list(x) for x in example.labels()] == [[1, 2, 1, 5], [7, 8, 9, 4]]
    logits = torch.randn(7, 11)
    expected = -logits.log_softmax(-1)[[1, 2, 1, 5], [7, 8, 9, 4]].mean()
    torch.testing.assert_close(example.loss(logits), expected)
    with pytest.raises(ValueError, match=r"logits: expected \(7, vocab\), got \(6, 11\)"):
        example.loss(logits[:6])


def test_which_threads_have_a_loss_can_be_chosen(
    walked: tuple[torch.nn.Module, Walk, Trace],
) -> None:
    _, _, trace = walked
    example = from_trace(trace, trained=lambda thread: thread.status != "pruned")
    pruned = sum(t.num_sampled for t in trace.threads if t.status == "pruned")
    assert pruned and len(example.labels()[0]) == trace.total_tokens - pruned


def test_packer_is_the_trace_by_hand(walked: tuple[torch.nn.Module, Walk, Trace]) -> None:
    _, _, trace = walked
    packer, where = Packer(), {}
    for t in trace.threads:
        sees = [
            range(where[s.thread].start + s.start, where[s.thread].start + s.end) for s in t.context
        ]
        position = next(p for p in t.positions if p is not None)
        flags = [not flag for flag in t.injected]
        where[t.id] = packer.add(t.token_ids, position=position, sees=sees, generated=flags)
    built, taken = packer.build(), from_trace(trace)
    assert torch.equal(built.dense_mask(), taken.dense_mask())
    assert built.token_ids == taken.token_ids and built.position_ids == taken.position_ids
    assert built.generated == taken.generated and built.predicted_from == taken.predicted_from


@pytest.mark.parametrize("lag", [0, 1])
def test_watched_threads_are_seen_as_they_were(lag: int) -> None:
    """Two threads that watch each other, fed one token a step: visibility by arrival."""
    walk = Walk(build("llama"), num_pages=64)
    root = walk.root(3)
    children = walk.fork(root, 2)
    walk.write(children, 4)
    trace = walk.trace(children[0])
    root_record, a, b = trace.threads
    a = replace(a, watches=(Watching(2, lag, rebase=False),))
    b = replace(b, watches=(Watching(1, lag, rebase=False),))
    mask = from_trace(replace(trace, threads=(root_record, a, b))).dense_mask()
    for own, other in ((3, 7), (7, 3)):
        for i in range(3):  # the fourth token is not fed
            last = i if lag == 0 else i - 1
            assert mask[own + i, other : other + 4].tolist() == [j <= last for j in range(4)]
            assert mask[own + i, own : own + 4].tolist() == [j <= i for j in range(4)]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"token_ids": [], "position": 0}, "token_ids: expected at least one"),
        ({"token_ids": [1], "position": -1}, "position: expected at least 0"),
        ({"token_ids": [1], "position": 0, "sees": [range(3)]}, "sees: expected ranges within 0"),
        ({"token_ids": [1], "position": 0, "sees": [range(0, 2, 2)]}, "sees: expected ranges"),
        (
            {"token_ids": [1], "position": 0, "generated": [True] * 2},
            "generated: expected 1 values",
        ),
        (
            {"token_ids": [1], "position": 0, "predicted_from": 2},
            "predicted_from: expected -1 to 1",
        ),
    ],
)
def test_packer_refuses(options: dict, complaint: str) -> None:
    packer = Packer()
    packer.add([1, 2], position=0)
    with pytest.raises(ValueError, match=complaint):
        packer.add(**options)
    assert len(packer.build()) == 2


def test_moved_keys_are_refused(walked: tuple[torch.nn.Module, Walk, Trace]) -> None:
    _, _, trace = walked
    events = tuple(replace(e, join="rebase") if e.kind == "join" else e for e in trace.events)
    with pytest.raises(Unsupported, match="'walk' moved keys"):
        replace(trace, events=events).training_example()
    threads = (*trace.threads[:-1], replace(trace.threads[-1], watches=(Watching(1, rebase=True),)))
    with pytest.raises(Unsupported, match="'walk' moved keys"):
        replace(trace, threads=threads).training_example()


def test_merge_ranges() -> None:
    assert merge_ranges([range(4, 6), range(2), range(2, 3), range(5, 9)]) == ((0, 3), (4, 9))
