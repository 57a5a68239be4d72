"""What several test files share: precisions, seeded generators, a case of every loss, values with gradients, a stop after some steps, a loop that learns; recipes that run in a blink."""
from dataclasses import replace
from functools import cache

import torch
from torch import nn

from relkd import losses
from relkd.data import joined, load
from relkd.distill import PAPER_ROWS, Row, Term
from relkd.tables.recipe import Recipe
from relkd.tasks.classify import Classify
from relkd.tasks.fewshot import FewShot
from relkd.train import Schedule

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def _maps(n, size):
    return (n, 4, size, size)


# of every loss: how to make one, and the shapes of the layers that it reads
CASES = {
    "KD": (losses.KD, lambda n, size: [(n, 10)]),
    **{name: (getattr(losses, name), lambda n, size: [(n, 6 * size)]) for name in ("CC", "PKT", "RKD", "RKDAngle", "RKDDistance")},
    "CRD": (lambda: losses.CRD(24, 24, samples=2000, feat_dim=5, negatives=7), lambda n, size: [(n, 24)]),
    **{name: (getattr(losses, name), lambda n, size: [_maps(n, size)]) for name in ("AT", "SP", "NST", "FTShortcut")},
    **{name: (lambda name=name: getattr(losses, name)(4, 4), lambda n, size: [_maps(n, size)]) for name in ("FitNet", "VID", "AB", "OFD", "FT")},
    "FSP": (losses.FSP, lambda n, size: [_maps(n, 2 * size), (n, 6, size, size)]),
}


def case(name, n=8, size=4, dtype=torch.float32):
    """A loss, a batch of n for it of the student and one of the teacher, each a list of layers, and what it is told beside them."""
    make, shapes = CASES[name]
    g = gen()
    s, t = ([torch.randn(shape, generator=g).to(dtype) for shape in shapes(n, size)] for _ in range(2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss = make()
    more = {"index": torch.arange(n), "negatives": torch.arange(7 * n).view(n, 7) % 2000} if name == "CRD" else {}
    return loss, s, t, more


def as_given(layers):
    """One layer as a tensor, several as a list: as a user calls a loss."""
    return layers[0] if len(layers) == 1 else layers


def value_and_gradients(f, *inputs):
    """f at fresh copies of the inputs; the gradients are those of the sum of what it gives."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = f(*inputs)
    return value.detach(), torch.autograd.grad(value.sum(), inputs)


def assert_same(mine, theirs, tolerance):
    """Two results of value_and_gradients: values to `tolerance`, gradients to ten times that, relative to their largest entry."""
    (a, ga), (b, gb) = mine, theirs
    assert abs(a - b) <= tolerance * abs(b)
    for x, y in zip(ga, gb, strict=True):
        assert (x - y).abs().max() <= 10 * tolerance * y.abs().max()


class After:
    """A Stop that is due after so many steps."""
    def __init__(self, steps):
        self.steps, self.why = steps, None

    def due(self, reserve):
        self.steps -= 1
        self.why = "budget" if self.steps == 0 else None
        return bool(self.why)


def learned(loss, student, x, teacher, steps):
    """The loss before and after some steps of Adam."""
    opt = torch.optim.Adam(student.parameters(), lr=.01)
    first = loss(student(x), teacher).item()
    for _ in range(steps):
        opt.zero_grad()
        last = loss(student(x), teacher)
        last.backward()
        opt.step()
    return first, last.item()


class Tiny(nn.Module):
    """A network for 8 x 8 digits with a batch norm and layers that have names; without outputs it gives its embedding."""
    def __init__(self, outputs, dropout=0.):
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Dropout(dropout)
        self.fc = nn.Linear(36, outputs) if outputs else nn.Identity()

    def forward(self, x):
        return self.fc(self.drop(self.bn(self.conv(x)).relu().flatten(1)))


def tiny(outputs, channels):
    return Tiny(outputs)


def noisy(outputs, channels):
    return Tiny(outputs, .5)


@cache
def few_digits():
    """150 images to train on, 60 to test."""
    d = load("digits")
    return joined("few", {"train": (d.train_images[:150], d.train_labels[:150]), "test": (d.test_images[:60], d.test_labels[:60])}, range(10))


@cache
def split_digits():
    """The digits as the classes of a few-shot set, with a split of one's own."""
    return load("digits").with_splits({"train": "012345", "val": "67", "test": "89"})


def toy(**change):
    """A recipe that runs in a blink; its networks and its data are functions."""
    plan = Schedule(3, 25, .05, milestones=(2,))
    return replace(Recipe(
        name="toy", title="a blink", data=few_digits, task=Classify(labelled=5), teacher=tiny, student=noisy,
        rows=(PAPER_ROWS[0], PAPER_ROWS[2], PAPER_ROWS[3]), schedule=plan, teacher_schedule=replace(plan, epochs=2), seeds=(0,)), **change)


def few_shot_toy(**change):
    plan = Schedule(2, None, 1e-3, milestones=(1,), gamma=.5, weight_decay=0., optimiser="Adam")
    task = FewShot(way=4, query=2, length=3, ways=(2,), test_query=3, test_episodes=20)
    rows = (Row("Student"), Row("RKD-D", (Term("RKDDistance", 50.),)))
    mine = dict(name="few-shot-toy", data=split_digits, task=task, vary={"shot": (1, 2)}, rows=rows, schedule=plan, teacher_schedule=None, baseline="Teacher")
    return toy(**(mine | change))


def same(a, b):
    """Two modules with equal numbers."""
    return all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def figures(records):
    """What a run must give again: the tests, the epochs and the weights of each cell."""
    return {(r["row"], str(r["variant"]), r["seed"]): (r["tests"], r["epochs"], r["weights"], r["run"]) for r in records}
