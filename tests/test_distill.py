"""Methods as data: terms, rows and stages; one objective; what the teacher sees, once; weights to start from."""
import pytest
import torch
import torch.nn.functional as F
from functools import partial
from torch import nn

import relkd.losses
from data_helpers import one_line
from helpers import gen
from relkd.data import Batches, load
from relkd.distill import PAPER_ROWS, RKD_A, RKD_D, Look, Objective, Row, Stage, Term, starting_weights
from relkd.features import Features
from relkd.losses import KD, DistillationLoss, RKDAngle, RKDDistance
from relkd.models import create
from relkd.tables.recipe import recipe
from relkd.tasks.fewshot import FewShot, episode_logits, prototypical_loss
from relkd.data import episode_labels

Y = torch.arange(8) % 6


def layers(seed=0, n=8, logits=6, **more):
    g = gen(seed)
    return {"logits": torch.randn(n, logits, generator=g, requires_grad=True),
            "fc:input": torch.randn(n, 5, generator=g, requires_grad=True), **more}


def value(row, s, t, y=Y, task=None, **kw):
    o = Objective(row, task) if task else Objective(row)
    return o.build(s, t, y)(s, Look(t, task) if task else Look(t), y, **kw)


# --- a row by hand

def test_the_objective_is_the_task_plus_the_terms_and_the_teacher_gets_no_gradient():
    s, t = layers(0), layers(1)
    row = Row("both", (Term("RKDDistance", 25.), Term("KD", 2., "logits", "logits", {"T": 3.})), task=.5)
    got = value(row, s, t)
    e, f = s["fc:input"], t["fc:input"]
    torch.testing.assert_close(got, .5 * F.cross_entropy(s["logits"], Y) + 25 * RKDDistance()(e, f) + 2
                               * KD(T=3.)(s["logits"], t["logits"]))
    got.backward()
    assert all(v.grad is None for v in t.values()) and all(v.grad.abs().sum() > 0 for v in s.values())


def test_the_same_on_episodes():
    s, t = layers(0, 12), layers(1, 12)
    s, t = ({"logits": f["fc:input"], "fc:input": f["fc:input"]} for f in (s, t))
    task, y = FewShot(shot=2, way=3, query=2), episode_labels(3, 2)
    row = Row("both", (Term("RKDDistance", 50.), Term("KD", 2., "logits", "logits", {"T": 4.})))
    zs, zt = s["logits"].view(3, 4, 5), t["logits"].view(3, 4, 5)
    want = prototypical_loss(zs, 2) + 50 * RKDDistance()(s["logits"], t["logits"]) + 2 * KD(T=4.)(
        episode_logits(zs, 2), episode_logits(zt, 2))
    torch.testing.assert_close(value(row, s, t, y, task), want)
    torch.testing.assert_close(value(Row("plain"), s, {}, y, task), prototypical_loss(zs, 2))


def test_a_task_of_weight_0_is_not_computed():
    """An embedding of 4 numbers with 6 classes: the cross-entropy is not even defined."""
    s, t = layers(0, logits=4), layers(1, logits=9)
    torch.testing.assert_close(value(Row("alone", (Term("RKDAngle", 2., "logits", "logits"),), task=0), s, t),
                               2 * RKDAngle()(s["logits"], t["logits"]))
    with pytest.raises(IndexError):
        value(Row("with", (Term("RKDAngle", 2., "logits", "logits"),), task=1e-9), s, t)
    one_line(lambda: Row("nothing", (), task=0), "row 'nothing' has neither terms nor the task's own loss")


def test_several_layers_and_an_order():
    o = Objective(Row("r", (Term("RKD", 2., ("layer1", "layer2"), "layer1"),)))
    assert o.student_layers == ("logits", "layer1", "layer2") and o.teacher_layers == ("layer1",)


# --- the teacher, once

def counting(monkeypatch, *kinds):
    calls = []
    for kind in kinds:
        real = kind.teacher_part

        def part(self, teacher, real=real, kind=kind):
            calls.append(kind.__name__)
            return real(self, teacher)

        monkeypatch.setattr(kind, "teacher_part", part)
    return calls


@pytest.mark.parametrize("task, y", [(None, Y[:6]), (FewShot(shot=1, way=2, query=2), episode_labels(2, 2))])
def test_the_teachers_part_is_computed_once_for_all_students_also_beside_one_that_reads_logits(monkeypatch, task, y):
    calls = counting(monkeypatch, RKDDistance, RKDAngle)
    more = (task,) if task else ()
    rows = [Row(f"r{k}", (Term("RKDDistance", k + 1.), Term("RKDAngle", k + 2.), Term("KD", 1., "logits", "logits"))[:2 + k % 2])
            for k in range(4)]
    s, t = layers(0, 6), layers(1, 6)
    if task:
        s, t = ({"logits": f["fc:input"], "fc:input": f["fc:input"]} for f in (s, t))
    objectives = [Objective(r, *more).build(s, t, y) for r in rows]
    look = Look(t, *more)
    for o in objectives:
        o(s, look, y)
    assert calls == ["RKDDistance"], "distances and angles share the sides of the triangles: once for both, not once a student"


def test_parts_of_different_options_or_layers_are_not_mixed():
    s, t = layers(0), layers(1)
    s["a"], t["a"] = torch.randn(8, 5, generator=gen(2)), torch.randn(8, 3, generator=gen(3))
    rows = [Row("x", (Term("RKDDistance", 1.), Term("RKDDistance", 1., options={"distinct": True}),
                      Term("RKDDistance", 1., "a", "a")), task=0)]
    want = (RKDDistance()(s["fc:input"], t["fc:input"]) + RKDDistance(distinct=True)(s["fc:input"], t["fc:input"])
            + RKDDistance()(s["a"], t["a"]))
    torch.testing.assert_close(value(rows[0], s, t), want)


# --- stages

def test_a_term_of_both_stages_is_one_loss_whatever_its_weights():
    term = Term("FitNet", 100., "layer2", "layer2")
    o = Objective(Row("hints", (term, RKD_D), before=(Stage((Term("FitNet", 1., "layer2", "layer2"),), 1),)))
    f = Features(create("resnet8", 10, 1), o.student_layers)(torch.randn(4, 1, 8, 8, generator=gen()))
    o.build(f, f)
    assert len(o.losses) == 2
    y, look = torch.zeros(4, dtype=torch.long), Look(f)
    torch.testing.assert_close(o(f, look, y), 100 * o(f, look, y, stage=0) + F.cross_entropy(f["logits"], y) + 25
                               * o.losses["1-RKDDistance"](f["fc:input"], f["fc:input"]))


def test_each_stage_has_its_own_terms():
    class Sum(DistillationLoss):
        def __init__(self, k):
            super().__init__()
            self.k = k

        def prepare(self, student, teacher, index=None):
            return -self(student, teacher)

        def forward(self, student, teacher, index=None):
            return student.sum() * 0 + self.k

    terms = [Term(Sum, 10., options={"k": k}) for k in (1, 2, 3, 4)]
    row, s, t = Row("r", (terms[0],), 0, (Stage((terms[1], terms[2]), 2), Stage((terms[3],), 1))), layers(0), layers(1)
    assert [value(row, s, t, stage=k).item() for k in (None, 0, 1)] == [10, -50, -40]
    assert (str(row) == "2 epochs of 10 Sum(k=2) on fc:input + 10 Sum(k=3) on fc:input, then 1 epochs of 10 Sum(k=4) "
                        "on fc:input, then 10 Sum(k=1) on fc:input")


# --- losses of one's own, and what is refused

def own(student, teacher, power=2):
    return (student.mean(1) - teacher.mean(1)).abs().pow(power).mean()


class Own(nn.Module):
    def __init__(self, power=2):
        super().__init__()
        self.power = power

    def forward(self, student, teacher):
        return own(student, teacher, self.power)


@pytest.mark.parametrize("loss", [own, Own, partial(own)])
def test_a_loss_of_ones_own_is_a_function_or_a_class(loss):
    s, t = layers(0), layers(1)
    term = Term(loss, 3., options={"power": 4})
    torch.testing.assert_close(value(Row("own", (term,), task=0), s, t), 3 * own(s["fc:input"], t["fc:input"], 4))
    assert str(term) == f"3 {term.name}(power=4) on fc:input" and term.name in ("own", "Own", "partial")


@pytest.mark.parametrize("call, message", [
    (lambda: Term("RKDistance"), "unknown loss 'RKDistance': did you mean 'RKDDistance'?"),
    (lambda: Term("Paraphraser"), "unknown loss 'Paraphraser'"),
    (lambda: Term("Translator"), "unknown loss 'Translator'"),
    (lambda: Term("DistillationLoss"), "unknown loss 'DistillationLoss'"),
    (lambda: Term("as_loss"), "unknown loss 'as_loss'"),
    (lambda: Term(3.), "a term's loss is a name in relkd.losses, a class or a function; got 3.0"),
    (lambda: Term(nn.MSELoss()), "a term's loss is a name in relkd.losses, a class or a function; got MSELoss()"),
    (lambda: Term("KD", options={"U": 4.}).build(), "KD cannot be made with the options {'U': 4.0}"),
    (lambda: value(Row("x", (Term(lambda s, t: s - t),)), layers(0), layers(1)), "a loss is a tensor of 0 dimensions"),
])
def test_errors_are_one_line(call, message):
    one_line(call, message)


def test_every_name_of_a_loss_is_a_loss():
    assert all(issubclass(getattr(relkd.losses, n), DistillationLoss) for n in relkd.losses.__all__)


# --- weights to start from

def silent(student, teacher):
    return (0 * student).sum()


def test_starting_weights_make_every_term_pull_alike():
    data, student, teacher = load("digits"), create("resnet8x0.5", 10, 1), create("resnet8", 10, 1, seed=1)
    teacher.layer1.eval()
    modes = [m.training for m in teacher.modules()]
    batches = [b for _, b in zip(range(2), Batches(data, 32, 0).epoch(0))]
    terms = [RKD_D, RKD_A, Term("AT", 1., "layer1", "layer1"), Term("FitNet", 1., "layer2", "layer2"),
             Term(silent, 1., "avgpool", "avgpool")]
    before = {k: v.clone() for k, v in student.state_dict().items()}
    found = starting_weights(terms, student, teacher, batches)
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in before.items()) and modes == [m.training for m in teacher.modules()]
    assert found[-1].weight == float("inf"), "a loss without a gradient has no weight"
    half = starting_weights(terms, student, teacher, batches, share=.5)
    assert all(.5 * a.weight == pytest.approx(b.weight) for a, b in zip(found[:-1], half))
    again = starting_weights(found[:-1], student, teacher, batches)
    assert ([t.weight for t in again] == pytest.approx([t.weight for t in found[:-1]])
            and [t.loss for t in again] == [t.loss for t in terms[:-1]])


# --- the rows of the tables

def test_every_row_of_digits_can_take_a_step_in_every_stage():
    small, large, x, y = (create("resnet8", 10, 1), create("resnet14", 10, 1, seed=1).eval(),
                          torch.randn(10, 1, 8, 8, generator=gen()), torch.arange(10))
    for row in recipe("digits/losses").rows:
        o = Objective(row)
        s = Features(small, o.student_layers)(x)
        with torch.no_grad():
            t = Features(large, o.teacher_layers)(x) if o.teacher_layers else {}
        o.build(s, t, y.repeat(3))
        total = sum(o(s, Look(t), y, y, stage) for stage in (None, *range(len(row.before))))
        total.backward()
        assert total.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in small.parameters())
        small.zero_grad()
    assert len(PAPER_ROWS) == 5
