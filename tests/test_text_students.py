"""Students that read tokens, in a bag or in order; one student of three sizes; recipes of batches."""
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from test_text import RECIPE, made_up

from relkd.data.text import Passages, Tokens, in_tokens
from relkd.losses import PKT, RKDDistance
from relkd.recipes.text import ProjectedCosine
from relkd.recipes.text_students import (CopyPrefixes, Ordered, Prefixes, TokenTable, prefix_rows, some_rows, text_batch_1024,
                                         text_batch_1024_steps, text_batch_4096, text_cut, text_order, text_order_rates, text_prefixes,
                                         text_tokens)
from relkd.tables.run import run
from relkd.tasks.text import NGrams
from relkd.tasks.triplet import on_sphere
from relkd.train import Session

SIZES = (2, 3, 5)
WHEEL = find_spec("wordllama")
reads_tokens = pytest.mark.skipif(WHEEL is None, reason="needs relkd[text]")


def batch():
    "Five texts of no, 1, 2, 4 and 4 tokens; the last two are of the same tokens in another order."
    lists = [[], [7], [3, 9], [5, 6, 7, 8], [8, 5, 7, 6]]
    numbers = torch.tensor([l + [0] * (4 - len(l)) for l in lists]).float()
    return torch.cat([torch.randn(5, 3), numbers], 1)


@pytest.mark.parametrize("l2", (False, True))
def test_prefixes_are_the_sum_of_losses_on_slices(l2):
    torch.manual_seed(0)
    s, t = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randn(6, 4, dtype=torch.float64)
    nested, each = Prefixes("RKDDistance", SIZES, l2), RKDDistance()
    expected = sum(each(on_sphere(s[:, :d]) if l2 else s[:, :d], t) for d in SIZES)
    by_hand, = torch.autograd.grad(expected, s)
    for teacher in (t, nested.teacher_part(t)):
        value = nested(s, teacher)
        g, = torch.autograd.grad(value, s)
        assert torch.allclose(value, expected) and torch.allclose(g, by_hand)
    assert nested.part_name == RKDDistance.part_name and Prefixes(PKT, SIZES).part_name == PKT().part_name
    assert torch.allclose(nested.prepare(s, t), expected)


def test_prefixes_of_a_loss_with_parts_have_one_a_size():
    s, t = torch.randn(6, 5, requires_grad=True), torch.randn(6, 4)
    nested = Prefixes.from_features(s, t, loss=ProjectedCosine, sizes=SIZES, l2=True)
    assert [tuple(l.project.weight.shape) for l in nested.losses] == [(4, d) for d in SIZES]
    expected = sum(l(on_sphere(s[:, :d]), t) for l, d in zip(nested.losses, SIZES))
    nested(s, t).backward()
    assert torch.allclose(nested(s, t), expected) and all(p.grad is not None for p in nested.parameters())
    nested.split(0, 1)


@pytest.mark.parametrize("change, said", [
    (lambda: Prefixes("RKDDistance", (4, 2)), "sizes that grow from 1, as (16, 32, 64) do; got (4, 2)"),
    (lambda: Prefixes("RKDDistance", ()), "sizes that grow from 1"),
    (lambda: Prefixes("RKDDistance", (0, 2)), "sizes that grow from 1"),
    (lambda: Prefixes("RKDDistance", SIZES)(torch.randn(6, 4), torch.randn(6, 4)), "Prefixes of 5 numbers need embeddings (N, D) of as"),
    (lambda: Prefixes("RKDDistanc", SIZES), "unknown loss"),
])
def test_what_cannot_be_is_said_in_one_line(change, said):
    with pytest.raises(ValueError) as error:
        change()
    assert said in str(error.value) and "\n" not in str(error.value)


def test_order_is_read_by_one_student_alone():
    torch.manual_seed(0)
    x = batch()
    ordered, bag = Ordered(rows=16)(6, 3), NGrams(16)(6, 3)
    a, b = ordered(x), bag(x)
    assert a.shape == b.shape == (5, 6) and Ordered(rows=16)(None, 3)(x).shape == (5, 64)
    assert not torch.allclose(a[3], a[4], atol=1e-4) and torch.allclose(b[3], b[4], atol=1e-7)
    assert a[0].abs().sum() == 0 == b[0].abs().sum()                                   # nothing to read
    on_sphere(a).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in ordered.parameters())


def test_the_neighbours_in_a_batch_are_not_read():
    """The fault to be feared: texts stand in one line, and a convolution looks over its end."""
    torch.manual_seed(0)
    x, net = batch(), Ordered(rows=16)(6, 3)
    alone = torch.cat([net(row[None]) for row in x])
    narrow = net(x[1:3, :5])                                                           # fewer zeros behind
    assert torch.allclose(net(x), alone, atol=1e-6) and torch.allclose(narrow, alone[1:3], atol=1e-6)
    assert torch.allclose(net(x.flip(0)), alone.flip(0), atol=1e-6)


def test_convolution_by_hand():
    torch.manual_seed(0)
    x, net = batch(), Ordered(rows=16, bias=True)(6, 3)
    h = net.table[x[3, 3:].long() - 1].T[None]
    expected = net.second(torch.nn.functional.gelu(net.first(h)))[0].mean(1)
    assert torch.allclose(net(x)[3], expected, atol=1e-6)
    plain = sum(p.numel() for p in Ordered()(64, 0).parameters()) - 2**15 * 64
    assert plain == 2 * 3 * 64 * 64


@reads_tokens
def test_tokens_are_packed_in_their_order():
    words = Tokens(Passages(["dog bites man", "man bites dog", "a cat"]))
    x = words.packed(width=2)
    a, b = x[0, 2:].tolist(), x[1, 2:].tolist()
    assert x[:, :2].abs().sum() == 0 and a != b and sorted(a) == sorted(b) and min(a) >= 1 and x[2, -1] == 0
    data = in_tokens(made_up())
    assert data.name == "made up, tokens" and data.counts == made_up().counts and data.channels == 12
    assert data.fingerprint == made_up().fingerprint and data.queries["test"].packed(width=12).shape[0] == 9
    assert data.normalise(data.split("test")[0])[:, :12].equal(made_up().normalise(data.split("test")[0])[:, :12])
    assert len(Tokens(Passages(["so " * 99])).pieces[torch.tensor([0])][0]) == 48


@reads_tokens
def test_a_table_cut_from_the_teacher_keeps_most_of_its_cosines():
    from relkd.data.text import wordllama_wheel

    table = wordllama_wheel()[1][5000:5200]
    def cosines(e): return (on_sphere(e) @ on_sphere(e).T).flatten()
    at = {d: torch.corrcoef(torch.stack([cosines(TokenTable(cut=True)(d, 0).table.data[5000:5200]), cosines(table)]))[0, 1]
          for d in (16, 64, 256)}
    assert at[16] < at[64] < at[256] and at[256] > .9999
    first, second = TokenTable(cut=True)(16, 0).table.data, TokenTable(cut=True)(64, 0).table.data
    assert first[:32_000].equal(second[:32_000, :16]) and TokenTable()(4, 0).table.shape == (2**15, 4)
    with pytest.raises(ValueError, match="a cut table has at most 256 numbers a token; got 300"):
        TokenTable(cut=True)(300, 0)


@reads_tokens
@pytest.mark.parametrize("student", (TokenTable(), TokenTable(cut=True), Ordered()))
def test_every_student_learns(student, tmp_path):
    rows = tuple(r for r in some_rows({}) if r.name in ("RKD-D, l2", "PKT"))
    of = replace(RECIPE, name="own/students", data=lambda: in_tokens(made_up()), student=student, rows=rows)
    records = run(of, Session(out=tmp_path, device="cpu"))
    assert [r["row"] for r in records] == ["Teacher", "PKT", "RKD-D, l2"]
    assert all(r["epochs"][-1]["loss"] < r["epochs"][0]["loss"] for r in records[1:])


def test_one_student_is_tested_at_three_sizes(tmp_path):
    def short(t): return replace(t, options={**t.options, "sizes": SIZES}) if "sizes" in t.options else t
    rows = tuple(replace(r, terms=tuple(map(short, r.terms))) for r in prefix_rows())
    of = replace(RECIPE, name="own/prefixes", rows=rows, task=CopyPrefixes(size=5, k=3, prefixes=(2, 3)))
    records = run(of, Session(out=tmp_path, device="cpu"))
    tests = {r["row"]: set(r["tests"]) for r in records}
    assert tests.pop("Teacher") == {"agree", "by distance", "sister", "lemma"}
    assert all({"agree", "agree, first 2", "agree, first 3", "lemma, first 3"} < t and len(t) == 12 for t in tests.values())
    assert len(tests) == 4 and of.task.headline == "agree"


def test_recipes_in_words():
    assert str(text_tokens.student) == "mean of 32,000 tokens, random" and "cut from the teacher" in str(text_cut.student)
    assert "two convolutions of width 3" in str(text_order) and "tested=val" in str(text_order_rates).replace("'", "")
    assert [r.name for r in text_order.rows] == [r.name for r in text_cut.rows] == [r.name for r in text_tokens.rows]
    assert "Prefixes(loss=RKDDistance, sizes=(16, 32, 64), l2=True)" in str(text_prefixes)
    same = {r.schedule.epochs / r.schedule.batch_size for r in (text_batch_1024_steps,)} | {4 / 256}
    assert len(same) == 1 and {text_batch_1024.schedule.epochs, text_batch_4096.schedule.epochs} == {4}
