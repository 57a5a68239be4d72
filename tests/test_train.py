"""Training: the schedule, one learner, the loop with many, stopping and going on; together is alone, bit for bit."""
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from data_helpers import one_line
from helpers import After, Tiny, few_digits, same, split_digits
from relkd.data import Batches, Episodes, few_per_class, joined, load
from relkd.distill import PAPER_ROWS, RKD_D, Look, Row, Stage, Term
from relkd.losses import DistillationLoss
from relkd.models import create
from relkd.recipes.omniglot import halved_adam
from relkd.tables.recipe import recipe
from relkd.tasks.classify import Classify
from relkd.tasks.fewshot import FewShot
from relkd.train import Learner, Saver, Schedule, Session, Stop, Stopped, chosen_device, chosen_precision, fit, make_fabric, moments

PLAN = Schedule(3, 25, .05, warmup=1, cosine=True)


def seeded(make, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def stream(n=75):
    return Batches(few_digits(), 25, 1, torch.arange(n))


def teacher():
    return seeded(lambda: Tiny(10), 9)


# --- schedule

plans = st.builds(lambda e, w, m, c: Schedule(e, 10, .1, milestones=tuple(sorted(m)), warmup=w * e, cosine=c),
                  st.integers(1, 300), st.floats(0, .4), st.lists(st.integers(0, 300), max_size=4), st.booleans())


@given(plans, st.integers(1, 300), st.floats(0, 1))
def test_a_schedule_cut_down_has_the_same_shape(plan, epochs, share):
    cut = plan.cut_to(epochs)
    assert cut.epochs == epochs and (plan.batch_size, plan.lr, plan.optimiser) == (cut.batch_size, cut.lr, cut.optimiser)
    assert cut.warmup == pytest.approx(plan.warmup * epochs / plan.epochs) and len(cut.milestones) == len(plan.milestones)
    at = share * plan.epochs
    if plan.cosine and at >= plan.warmup * 1.001:
        assert cut.at(at * epochs / plan.epochs) == pytest.approx(plan.at(at), abs=1e-9)
    assert plan.cut_to(plan.epochs).at(at) == pytest.approx(plan.at(at))


def test_a_rate_by_hand():
    plan = Schedule(100, 10, .1, milestones=(60, 80), gamma=.5, warmup=2)
    assert [plan.at(e) for e in (0, 1, 59.9, 60, 85)] == pytest.approx([.1 * .01 / 2.01, .1 * 1.01 / 2.01, .1, .05, .025])
    cosine = replace(plan, cosine=True)
    assert cosine.at(51) == pytest.approx(.05) and cosine.at(100) == pytest.approx(0)
    adam = halved_adam(10, 2.5)
    assert adam.milestones == (2.5, 5., 7.5) and adam.cut_to(4).milestones == (1., 2., 3.) and "Adam 0.001" in str(adam)


@pytest.mark.parametrize("optimiser, kind", [("SGD", torch.optim.SGD), ("Adam", torch.optim.Adam), ("AdamW", torch.optim.AdamW),
                                             (lambda p, lr: torch.optim.RMSprop(p, lr), torch.optim.RMSprop)])
def test_an_optimiser_by_name_or_of_ones_own(optimiser, kind):
    made = replace(PLAN, optimiser=optimiser).make(list(nn.Linear(2, 2).parameters()))
    assert type(made) is kind and made.param_groups[0]["lr"] == .05 and str(replace(PLAN, optimiser=optimiser))


# --- one learner

class Hint(DistillationLoss):
    """A loss with trainable parts that reads its sizes from the features."""
    prepared = 0

    def __init__(self, s, t):
        super().__init__()
        self.map = nn.Linear(s, t)

    @classmethod
    def from_features(cls, student, teacher, labels=None):
        return cls(student.shape[1], teacher.shape[1])

    def prepare(self, student, teacher, index=None):
        type(self).prepared += 1
        return self(student, teacher)

    def forward(self, student, teacher, index=None):
        assert index is None or index.dtype == torch.int64
        return (self.map(student) - teacher.detach()).pow(2).mean()


def test_a_loss_with_parameters_of_its_own_is_trained_with_its_student():
    learner = Learner(Tiny(10), Row("hint", (Term(Hint),)), PLAN)
    learner.build(torch.randn(2, 1, 8, 8), Look({"fc:input": torch.randn(2, 36)}))
    before = learner.objective.losses["0-Hint"].map.weight.clone()
    fit([learner], stream(), 1, teacher())
    assert not learner.objective.losses["0-Hint"].map.weight.equal(before)


def test_crd_remembers_the_samples_that_are_used_by_their_place():
    """100 of the 1,000 images: memories of 100 rows, and negatives of other classes only."""
    data = load("digits")
    few = few_per_class(data.train_labels, 10, seed=0)
    row = Row("CRD", (Term("CRD", .8, options={"negatives": 16, "classes": True}),))
    learner = Learner(Tiny(10), row, Schedule(1, 50))
    fit([learner], Batches(data, 50, 0, few), 1, teacher())
    crd = learner.objective.losses["0-CRD"]
    assert crd.memory_s.shape == (100, 128)
    labels = data.train_labels[few]
    assert (labels[crd.other_classes(torch.arange(100), 16)] != labels[:, None]).all()
    again = Learner(Tiny(10), row, Schedule(1, 50))
    again.build(next(Batches(data, 50, 0, few).epoch(0))[1][:2], Look({"fc:input": torch.randn(2, 36)}), labels)
    again.load(learner.state())
    assert all(torch.equal(a, b) for a, b in zip(again.objective.buffers(), learner.objective.buffers()))


def test_building_changes_neither_modes_nor_the_random_numbers():
    net = Tiny(10, .5)
    net.drop.eval()
    learner, state = Learner(net, Row("hint", (Term(Hint),)), PLAN, seed=3), torch.get_rng_state()
    learner.build(torch.randn(2, 1, 8, 8, generator=torch.Generator()), Look({"fc:input": torch.ones(2, 36)}))
    assert torch.get_rng_state().equal(state) and not net.drop.training and net.bn.training
    other = Learner(Tiny(10), Row("hint", (Term(Hint),)), PLAN, seed=3)
    other.build(torch.randn(2, 1, 8, 8), Look({"fc:input": torch.ones(2, 36)}))
    assert same(learner.objective, other.objective)


# --- many, side by side

def group():
    term = Term(Hint)
    rows = [PAPER_ROWS[2], Row("two stages", (term,), before=(Stage((term,), 2), Stage((Term(Hint, 3.),), 1))),
            Row("one before", (), before=(Stage((Term(Hint, 2.),), 1),)), PAPER_ROWS[3]]
    return [Learner(seeded(lambda: Tiny(10, .5), k), r, PLAN, seed=k, task=Classify()) for k, r in enumerate(rows)]


def few_shot_group():
    task, plan = (FewShot(shot=1, way=4, query=2, ways=(2,), test_query=3, test_episodes=20),
                  Schedule(2, None, 1e-3, milestones=(1,), gamma=.5, weight_decay=0., optimiser="Adam"))
    rows = [Row("Student"), Row("RKD-DA", (RKD_D, Term("RKDAngle", 50.))), Row("KD", (Term("KD", 1., "logits", "logits"),))]
    return [Learner(seeded(lambda: Tiny(None, .2), k), r, plan, seed=k, task=task) for k, r in enumerate(rows)]


def episodes():
    return Episodes(split_digits(), "train", 4, 1, 2, seed=4, length=3)


KINDS = {"classify": (group, stream, 3, lambda: seeded(lambda: Tiny(10), 9)),
         "few-shot": (few_shot_group, episodes, 2, lambda: seeded(lambda: Tiny(None), 9))}


@pytest.fixture(scope="module", params=KINDS)
def whole(request):
    make, of, epochs, of_teacher = KINDS[request.param]
    learners, calls, t = make(), [], of_teacher()
    before = {k: v.clone() for k, v in t.state_dict().items()}
    t.register_forward_hook(lambda *a: calls.append(t.training))
    Hint.prepared = 0
    fit(learners, of(), epochs, t)
    assert all(v.equal(before[k]) for k, v in t.state_dict().items()), "the teacher does not change"
    return request.param, learners, calls, Hint.prepared


def test_the_teacher_runs_once_a_batch_in_evaluation_mode(whole):
    kind, learners, calls, prepared = whole
    steps = 3 * (3 + 2 + 1) if kind == "classify" else 3 * 2
    assert calls == [False] * (steps + 1), "once a batch, stages before included, and once to see the shapes"
    assert prepared == (3 * (2 + 1 + 1) if kind == "classify" else 0)
    assert [len(l.epochs) for l in learners] == [3] * 4 if kind == "classify" else [2] * 3
    assert {"epoch", "loss", learners[0].task.watched} == set(learners[0].epochs[-1])


def test_together_is_alone_bit_for_bit_with_dropout_and_stages(whole):
    kind, learners, *_ = whole
    make, of, epochs, of_teacher = KINDS[kind]
    for l, m in zip(reversed(make()), reversed(learners)):
        fit([l], of(), epochs, of_teacher())
        assert same(l.model, m.model) and same(l.objective, m.objective) and l.epochs == m.epochs


@pytest.mark.parametrize("stop_at", [1, 4, 7, 9, 14, 17])
def test_stopped_and_continued_is_not_stopped_bit_for_bit(tmp_path, whole, stop_at):
    kind, learners, *_ = whole
    make, of, epochs, of_teacher = KINDS[kind]
    stop_at = min(stop_at, 5) if kind == "few-shot" else stop_at
    with pytest.raises(Stopped, match="budget"):
        fit(make(), of(), epochs, of_teacher(), Session(device="cpu", stop=After(stop_at)), saver=Saver(tmp_path / "g", "d"))
    continued = make()
    fit(continued, of(), epochs, of_teacher(), saver=Saver(tmp_path / "g", "d"))
    for a, b in zip(learners, continued):
        assert same(a.model, b.model) and same(a.objective, b.objective) and a.epochs == b.epochs


def test_what_remains_of_a_group_goes_on_from_its_checkpoint(tmp_path, whole):
    """After a kill among the final checkpoints only some of the group's learners are asked for again."""
    kind, learners, *_ = whole
    make, of, epochs, of_teacher = KINDS[kind]
    names = [l.row.name for l in learners]
    fit(make(), of(), epochs, of_teacher(), saver=Saver(tmp_path / "g", "d"), names=names)
    some = make()[1:]
    calls = []
    some[0].model.register_forward_hook(lambda *a: calls.append(1))
    fit(some, of(), epochs, of_teacher(), saver=Saver(tmp_path / "g", "d"), names=names[1:])
    assert len(calls) == 1, "its shapes, and no step"
    assert all(same(a.model, b.model) and a.epochs == b.epochs for a, b in zip(some, learners[1:]))


@given(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4), st.integers(1, 5))
@settings(max_examples=40)
def test_the_course_of_all_stages(stages, epochs):
    rows = [Row(str(k), (), before=tuple(Stage((RKD_D,), n) for n in of)) for k, of in enumerate(stages)]
    learners = [type("L", (), {"row": r})() for r in rows]
    course = moments(learners, epochs)
    assert [(m.epoch, m.stream) for m in course if m.stage is None] == [(e, e) for e in range(epochs)] and course[-1].stage is None
    for k in range(max(map(len, stages))):
        assert sum(m.stage == k for m in course) == max(of[k] for of in stages if k < len(of))
    assert (len({m.stream for m in course}) == len(course) and [m.stage for m in course if m.stage is not None]
            == sorted(m.stage for m in course if m.stage is not None))


def test_looking_on_only_now_and_then_and_after_the_last():
    l = Learner(Tiny(10), PAPER_ROWS[0], replace(PLAN, epochs=5), task=Classify())
    fit([l], stream(), 5, eval_every=2)
    assert ["accuracy" in e for e in l.epochs] == [False, True, False, True, True]


def test_a_loss_that_is_not_finite_is_recorded_as_none():
    l = Learner(Tiny(10), PAPER_ROWS[0], Schedule(2, 25, 1e30, momentum=0., milestones=()), task=Classify())
    fit([l], stream(), 2)
    assert l.epochs[1]["loss"] is None and math.isfinite(l.epochs[1]["accuracy"])


def test_bf16_autocast_trains_and_relations_stay_in_float32():
    seen = []
    learner = Learner(Tiny(10), PAPER_ROWS[4], Schedule(2, 50, .05, milestones=()))
    learner.model.fc.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    session = Session(device="cpu", precision="bf16")
    fit([learner], stream(150), 2, teacher(), session)
    assert torch.bfloat16 in seen and learner.model.fc.weight.dtype == torch.float32
    with session.fabric().autocast():
        assert PAPER_ROWS[2].terms[1].build()(torch.randn(8, 4).bfloat16(), torch.randn(8, 4)).dtype == torch.float32


@pytest.mark.parametrize("name", ["cifar100/paper", "cifar100/crd-vgg"])
def test_every_row_of_a_cifar_recipe_takes_a_step(name, flags):
    if "slow" not in flags:
        pytest.skip("the step of every one of its rows is rehearsed: --flags slow")
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(256, (24, 3, 32, 32), generator=g, dtype=torch.uint8), torch.arange(24) % 10
    r = recipe(name)
    student, of = ("vgg11", "resnet20") if name == "cifar100/paper" else (r.student, r.teacher)
    swap = (lambda l: {"layer4": "layer3", "layer3": "layer2", "layer2": "layer1"}.get(l, l)) if of == "resnet20" else (lambda l: l)

    def moved(t):
        return replace(t, teacher=swap(t.teacher) if isinstance(t.teacher, str) else tuple(map(swap, t.teacher)))

    rows = [replace(row, before=tuple(replace(s, epochs=1) for s in row.before), terms=tuple(map(moved, row.terms))) for row in r.rows]
    learners = [Learner(create(student, 10), row, replace(r.schedule, epochs=1, batch_size=12)) for row in rows]
    fit(learners, Batches(joined("x", {"train": (x, y), "test": (x[:8], y[:8])}, range(10)), 12, 0), 1, create(of, 10))
    assert all(l.epochs[0]["loss"] is not None for l in learners)


# --- a session

def test_stop_by_budget_and_by_signal():
    with Stop(budget=10) as stop:
        assert not stop.due() and stop.due(reserve=11) and stop.why == "budget"
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.due() and stop.why == "SIGTERM"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)        # a job in the background ignores it
    with pytest.raises(KeyboardInterrupt), Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.why == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_a_precision_is_what_was_asked_for_and_what_is_used():
    """One session for two recipes: the second must not train in the precision of the first."""
    assert ((chosen_precision("cpu"), chosen_precision("cpu", "bf16"), chosen_precision("cpu", "32-true"))
            == ("32-true", "bf16-mixed", "32-true"))
    session = Session(device="cpu")
    used = []
    for asked in ("bf16", "32", None, "bf16"):
        fabric = session.fabric(asked)
        with fabric.autocast():
            used.append(torch.is_autocast_enabled("cpu"))
        assert session.fabric() is fabric
    assert used == [True, False, False, True]


def test_checkpoints_are_written_at_intervals(tmp_path):
    saver = Saver(tmp_path / "g", "d", every=0., about={"members": ["a"]})
    assert saver.due()
    saver.save({"k": 1})
    assert saver.took > 0 and saver.load() == {"k": 1} and not Saver(tmp_path / "g", "d", every=60).due()


@pytest.mark.parametrize("call, message", [
    (lambda: Schedule().cut_to(0), "a schedule needs at least 1 epoch; got 0"),
    (lambda: Schedule(optimiser="SDG"), "optimiser is SGD, Adam, AdamW, or a function of (parameters, lr); got 'SDG'"),
    (lambda: make_fabric("tpu"), "device is 'auto', 'cpu' or 'cuda'; got 'tpu'"),
    (lambda: chosen_precision("cpu", "fp8"), "precision is '32' or 'bf16'; got 'fp8'"),
    (lambda: fit([Learner(Tiny(10), PAPER_ROWS[1], PLAN)], stream(), 1), "row 'RKD-D' compares with a teacher; pass teacher="),
    (lambda: fit([Learner(Tiny(10), PAPER_ROWS[2], PLAN)], Batches(few_digits(), 2, 0, torch.arange(4)), 1, teacher()),
     "RKDDistance needs at least 3 samples in a batch; got N = 2"),
    (lambda: Learner(Tiny(10), Row("x", (Term("RKD", 1., "layer5"),)), PLAN), "unknown layer of Tiny 'layer5'"),
])
def test_errors_are_one_line(call, message):
    one_line(call, message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_asked_for_where_there_is_none():
    one_line(lambda: chosen_device("cuda"), "device 'cuda' was asked for, but this PyTorch sees no GPU: use 'cpu' or 'auto'")
