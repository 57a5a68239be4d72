"""What several test files share: precisions, seeded generators, a case of every loss, values with gradients,
a stop after some steps, recipes that run in a blink."""
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from listed import is_draft, project_notebooks  # noqa: F401, for the tests
from torch import nn

from relkd import losses
from relkd.data import joined, load
from relkd.distill import PAPER_ROWS, Row, Term
from relkd.tables.recipe import Recipe
from relkd.tasks.classify import Classify
from relkd.tasks.fewshot import FewShot
from relkd.train import Schedule

many = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=gen(seed), dtype=dtype)


def made(cls, *sizes, seed=0, dtype=torch.float32, **options):
    """A loss with trainable parts, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(*sizes, **options).to(dtype)


def _logits(n, k):
    return [(n, 10)], [(n, 10)]


def _embeddings(n, k):
    return [(n, 6 * k)], [(n, 5 * k)]


def _maps(n, k):
    return [(n, 4, 4 * k, 4 * k)], [(n, 6, 4 * k, 3 * k)]


def _chain(n, k):
    return ([(n, 3, 4 * k, 4 * k), (n, 4, 4 * k, 4 * k), (n, 5, 2 * k, 2 * k)],
            [(n, 3, 5 * k, 4 * k), (n, 4, 3 * k, 4 * k), (n, 5, 3 * k, 2 * k)])


def _table():
    L = losses
    yield "KD", L.KD, _logits
    yield "KD standardised", lambda: L.KD(2., standardise=True), _logits
    for name, options in (("DKD", {}), ("DKD standardised", {"standardise": True}), ("DKD target", {"beta": 0.}),
                          ("DKD others", {"alpha": 0., "T": 1.})):
        yield name, lambda options=options: L.DKD(classes=torch.arange(2000) % 10, **options), _logits
    for name, options in (("DIST", {}), ("DIST standardised", {"tau": 2., "standardise": True}),
                          ("DIST inter", {"gamma": 0.}), ("DIST intra", {"beta": 0., "tau": 4.})):
        yield name, lambda options=options: L.DIST(**options), _logits
    for options in ({}, {"distinct": True}):
        for cls in (L.RKD, L.RKDDistance, L.RKDAngle, L.PKT):
            yield cls.__name__ + " distinct" * bool(options), lambda cls=cls, options=options: cls(**options), _embeddings
    yield "PKT batchmean", lambda: L.PKT("batchmean"), _embeddings
    yield "CC", L.CC, _embeddings
    for name, options in (("exact", {"order": None}), ("order 5", {"gamma": 2., "order": 5}),
                          ("bilinear", {"kernel": "bilinear"}), ("mmd", {"kernel": "mmd"}),
                          ("raw", {"order": None, "normalise": False, "gamma": .1})):
        yield f"CC {name}", lambda options=options: L.CC(**options), _embeddings
    for name, classes in (("CRD", None), ("CRD classes", torch.arange(2000) % 4)):
        (yield name, lambda classes=classes: L.CRD(6, 5, samples=2000, feat_dim=5, negatives=7, classes=classes),
         lambda n, k: [[(n, 6)], [(n, 5)]])
    for name in ("SP", "AT", "NST", "FTShortcut"):
        yield name, getattr(L, name), _maps
    yield "SP global", lambda: L.SP("global"), _maps
    for p in (1, 3):
        yield f"AT {p}", lambda p=p: L.AT(p), _maps
    for name, options in (("linear", {"kernel": "linear"}), ("gaussian", {"kernel": "gaussian"}),
                          ("fixed", {"kernel": "gaussian", "sigma2": .7}), ("cubic", {"degree": 3, "c": .5}),
                          ("bare", {"teacher_term": False})):
        yield f"NST {name}", lambda options=options: L.NST(**options), _maps
    for name in ("FitNet", "VID", "AB", "OFD", "FT"):
        yield name, lambda name=name: getattr(L, name)(4, 6), _maps
    yield "OFD fixed", lambda: L.OFD(4, 6, margins=-torch.rand(6)), _maps
    for name in ("AB", "OFD"):
        (yield f"{name} plain", lambda name=name: getattr(L, name)(4, 4, connector=False),
         lambda n, k: [[(n, 4, 4 * k, 4 * k)], [(n, 4, 4 * k, 3 * k)]])
    yield "FT norm", lambda: L.FT(4, 6, p=2, reduction="norm"), _maps
    yield "FT attention", lambda: L.FT(4, 6, compare="attention", batchnorm="translator"), _maps
    yield "FSP", L.FSP, _chain
    yield "FSP mean", lambda: L.FSP(pool="avg", reduction="mean", weights=[1, 2]), _chain


CASES = {name: (make, shapes) for name, make, shapes in _table()}        # every loss, by its default options and by others
DEFAULTS = [name for name in CASES if name in losses.__all__]


def make(name):
    """The loss of a case, the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CASES[name][0]()


def case(name, n=8, k=1, dtype=torch.float32):
    """A loss, a batch of n for it of the student and one of the teacher, each a list of layers, and what it is told beside them."""
    g = gen()
    s, t = ([torch.randn(shape, generator=g).to(dtype) for shape in shapes] for shapes in CASES[name][1](n, k))
    more = {"index": torch.arange(n)} if name.startswith(("CRD", "DKD")) else {}
    if name.startswith("CRD"):
        more["negatives"] = torch.arange(7 * n).view(n, 7) % 2000
    return make(name), s, t, more


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


def assert_says(call, message):
    """A ValueError of one line that matches."""
    with pytest.raises(ValueError, match=message) as e:
        call()
    assert "\n" not in str(e.value)


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


def skip_where_triton_cannot_interpret(stderr):
    """Triton 3.6's interpreter takes int() of arrays of one element, which NumPy refuses from 2.4 on;
    the compiled kernel is not concerned."""
    if "InterpreterError" in stderr and "only 0-dimensional arrays can be converted to Python scalars" in stderr:
        pytest.skip("this Triton's interpreter does not go with this NumPy (int() of an array of one element)")


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
    return joined("few", {"train": (d.train_images[:150], d.train_labels[:150]),
                          "test": (d.test_images[:60], d.test_labels[:60])}, range(10))


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
    mine = dict(name="few-shot-toy", data=split_digits, task=task, vary={"shot": (1, 2)}, rows=rows, schedule=plan,
                teacher_schedule=None, baseline="Teacher")
    return toy(**(mine | change))


def same(a, b):
    """Two modules with equal numbers."""
    return all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def figures(records):
    """What a run must give again: the tests, the epochs and the weights of each cell."""
    return {(r["row"], str(r["variant"]), r["seed"]): (r["tests"], r["epochs"], r["weights"], r["run"]) for r in records}


class Sized(nn.Module):
    "A loss of one's own, whose regressor reads its sizes from an example."
    def __init__(self, i, o):
        super().__init__()
        self.map = nn.Linear(i, o)

    @classmethod
    def from_features(cls, student, teacher, labels=None):
        return cls(student.shape[1], teacher.shape[1])

    def forward(self, student, teacher):
        return F.mse_loss(self.map(student), teacher)
