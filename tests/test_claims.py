"""The two fidelity kernels, and the task with few labels, of the checked claims."""
import math
from dataclasses import replace

import pytest
import torch
from helpers import DTYPES, assert_says, few_digits, randn, toy, value_and_gradients

from relkd.data import Batches, load
from relkd.losses import DistillationLoss
from relkd.recipes.claims import NO_LABEL, AngleEncoding, FewLabels, LabelsAndOthers, SquaredCosine, claims_labels, claims_unlabelled
from relkd.records import load_records
from relkd.tables.paired import summary
from relkd.tables.run import run
from relkd.tables.recipe import recipe
from relkd.train import Session

KERNELS = pytest.mark.parametrize("make", [SquaredCosine, AngleEncoding, lambda: AngleEncoding(1.)],
                                  ids=["amplitude", "angle", "angle, scale 1"])


def state(e, loss):
    """The state that encodes one embedding, all its amplitudes written out."""
    e = e / e.norm()
    if type(loss) is SquaredCosine:
        return e
    psi = torch.ones(1, dtype=e.dtype)
    for a in loss.scale * e:
        psi = torch.kron(psi, torch.stack([(a / 2).cos(), (a / 2).sin()]))
    return psi


@KERNELS
def test_the_kernel_is_the_fidelity_of_states(make):
    loss, e = make(), randn(5, 4, dtype=torch.float64)
    psi = torch.stack([state(row, loss) for row in e])
    torch.testing.assert_close(psi.norm(dim=1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(loss.kernel(e), (psi @ psi.T).square())


def test_three_points_on_paper():
    e = torch.tensor([[1., 0.], [3., 3.], [0., 2.]])
    torch.testing.assert_close(SquaredCosine().kernel(e), torch.tensor([[1, .5, 0], [.5, 1, .5], [0, .5, 1]]))
    turned = AngleEncoding().kernel(e)
    assert abs(turned[0, 2] - math.cos(math.pi / 2)**4) < 1e-6 and turned.diag().allclose(torch.ones(3))


@KERNELS
def test_value_gradient_and_who_gets_it(make):
    loss, s, t = make(), randn(6, 3, dtype=torch.float64), randn(6, 5, seed=1, dtype=torch.float64)
    assert isinstance(loss, DistillationLoss)
    by_hand = sum((loss.kernel(s)[i, j] - loss.kernel(t)[i, j])**2 for i in range(6) for j in range(6)) / 36
    torch.testing.assert_close(loss(s, t), by_hand)
    assert torch.autograd.gradcheck(lambda x: loss(x, t), s.clone().requires_grad_())
    t.requires_grad_()
    loss(s.requires_grad_(), t).backward()
    assert s.grad.abs().max() > 0 and t.grad is None


@KERNELS
def test_zero_at_the_teacher_and_blind_to_length(make):
    loss, s, t = make(), randn(6, 3, dtype=torch.float64), randn(6, 5, seed=1, dtype=torch.float64)
    value, (gradient,) = value_and_gradients(lambda x: loss(x, t), t)
    assert value == 0 and gradient.abs().max() < 1e-12
    torch.testing.assert_close(loss(s * torch.rand(6, 1).add(.1), 7 * t), loss(s, t))


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_in_every_precision(make, dtype):
    e = torch.cat([torch.zeros(1, 4), randn(1, 4).repeat(2, 1), -randn(1, 4), 1e4 * randn(2, 4, seed=3)]).to(dtype)
    value, (gradient,) = value_and_gradients(lambda x: make()(x, randn(6, 3)), e)
    assert value.isfinite() and value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and gradient.isfinite().all()


def test_what_is_wrong_is_said_in_one_line():
    assert_says(lambda: SquaredCosine()(torch.zeros(4, 2), torch.zeros(5, 2)), "SquaredCosine needs .* N = 4 and N = 5")
    assert_says(lambda: AngleEncoding()(torch.zeros(1, 2), torch.zeros(1, 2)), "AngleEncoding needs at least 2 samples")
    assert_says(lambda: AngleEncoding(0.), "a scale above 0; got 0")


# ---- few labels

def test_equally_many_steps_whatever_the_labels():
    data = load("digits")
    for task in claims_labels.tasks + claims_unlabelled.tasks:
        stream = task.stream(data, claims_labels.schedule, seed=3, draw=3)
        batches = list(stream.epoch(1))
        assert len(stream) == len(batches) == 4
        for index, x, y in batches:
            assert len(index) == len(x) == len(y) == stream.batch_size == 50 * (1 + task.unlabelled)
            assert torch.equal(stream.labels[index], y) and (y == NO_LABEL).sum() == 50 * task.unlabelled
    again = list(stream.epoch(1))
    assert all(torch.equal(a, b) for one, two in zip(batches, again) for a, b in zip(one, two))


def test_only_labelled_images_have_labels_and_the_others_are_other_images():
    data, task = load("digits"), replace(claims_unlabelled.task, labelled=5, augment=())
    stream = task.stream(data, claims_labels.schedule, seed=0, draw=0)
    known, hidden = stream.labelled.index.unique(), stream.others.index
    assert len(known) == 50 and data.train_labels[known].bincount().tolist() == [5] * 10
    assert not set(known.tolist()) & set(hidden.tolist()) and len(known) + len(hidden) == len(data.train_labels)
    (index, x, y), *_ = stream.epoch(0)
    place = torch.cat([stream.labelled.index, stream.others.index])[index]
    assert torch.equal(x, data.normalise(data.train_images[place])) and torch.equal(y[::2], data.train_labels[place[::2]])
    logits = randn(len(y), 10)
    torch.testing.assert_close(task.loss(logits, y), torch.nn.functional.cross_entropy(logits[::2], y[::2]))


def test_an_epoch_that_is_too_long_is_refused():
    few = Batches(few_digits(), 20, 0)
    assert_says(lambda: LabelsAndOthers(few, few, 9), "an epoch of 9 steps needs as many batches; got 7 of labelled images and 7 of others")


def test_a_table_with_a_place_for_each_number_of_labels(tmp_path):
    """One teacher a seed, one test a place in the order of the axis, one panel each."""
    mine = toy(task=FewLabels(labelled=2, steps=2, unlabelled=True), vary={"labelled": (2, 5)}, seeds=(0, 1))
    assert mine.runs == 2 * (2 * 3 + 1)
    records = run(mine, Session(tmp_path))
    assert {r["headline"] for r in records if r["row"] != "Teacher"} == {"2 labels a class", "5 labels a class"}
    assert len([r for r in records if r["row"] == "Teacher"]) == 2
    frame, figure = summary(mine, tmp_path)
    assert list(dict.fromkeys(frame.index.get_level_values(0))) == ["2 labels a class", "5 labels a class", "top-1"]
    assert [ax.get_title().split("\n")[0] for ax in figure.axes] == ["2 labels a class", "5 labels a class"]
    assert len(load_records(tmp_path, "toy")) == mine.runs


@pytest.mark.parametrize("name", ["labels", "unlabelled", "kernels", "nst"])
def test_the_recipes_have_eight_seeds_and_a_plain_student(name):
    r = recipe(f"claims/{name}")
    assert len(r.seeds) == 8 and r.base == "Student" and r.precision == "32" and not r.rows[0].terms
