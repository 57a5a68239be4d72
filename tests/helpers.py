"""What several test files share: precisions, seeded generators, a case of every loss, values with gradients, a stop after some steps, a loop that learns."""
import pytest
import torch
from hypothesis import HealthCheck, settings

from relkd import losses

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


def _embeddings(n, k):
    return [(n, 6 * k)], [(n, 5 * k)]


def _maps(n, k):
    return [(n, 4, 4 * k, 4 * k)], [(n, 6, 4 * k, 3 * k)]


def _chain(n, k):
    return [(n, 3, 4 * k, 4 * k), (n, 4, 4 * k, 4 * k), (n, 5, 2 * k, 2 * k)], [(n, 3, 5 * k, 4 * k), (n, 4, 3 * k, 4 * k), (n, 5, 3 * k, 2 * k)]


def _table():
    L = losses
    yield "KD", L.KD, lambda n, k: [[(n, 10)], [(n, 10)]]
    for options in ({}, {"distinct": True}):
        for cls in (L.RKD, L.RKDDistance, L.RKDAngle, L.PKT):
            yield cls.__name__ + " distinct" * bool(options), lambda cls=cls, options=options: cls(**options), _embeddings
    yield "PKT batchmean", lambda: L.PKT("batchmean"), _embeddings
    yield "CC", L.CC, _embeddings
    for name, options in (("exact", {"order": None}), ("order 5", {"gamma": 2., "order": 5}), ("bilinear", {"kernel": "bilinear"}), ("mmd", {"kernel": "mmd"}), ("raw", {"order": None, "normalise": False, "gamma": .1})):
        yield f"CC {name}", lambda options=options: L.CC(**options), _embeddings
    for name, classes in (("CRD", None), ("CRD classes", torch.arange(2000) % 4)):
        yield name, lambda classes=classes: L.CRD(6, 5, samples=2000, feat_dim=5, negatives=7, classes=classes), lambda n, k: [[(n, 6)], [(n, 5)]]
    for name in ("SP", "AT", "NST", "FTShortcut"):
        yield name, getattr(L, name), _maps
    yield "SP global", lambda: L.SP("global"), _maps
    for p in (1, 3):
        yield f"AT {p}", lambda p=p: L.AT(p), _maps
    for name, options in (("linear", {"kernel": "linear"}), ("gaussian", {"kernel": "gaussian"}), ("fixed", {"kernel": "gaussian", "sigma2": .7}), ("cubic", {"degree": 3, "c": .5}), ("bare", {"teacher_term": False})):
        yield f"NST {name}", lambda options=options: L.NST(**options), _maps
    for name in ("FitNet", "VID", "AB", "OFD", "FT"):
        yield name, lambda name=name: getattr(L, name)(4, 6), _maps
    yield "OFD fixed", lambda: L.OFD(4, 6, margins=-torch.rand(6)), _maps
    for name in ("AB", "OFD"):
        yield f"{name} plain", lambda name=name: getattr(L, name)(4, 4, connector=False), lambda n, k: [[(n, 4, 4 * k, 4 * k)], [(n, 4, 4 * k, 3 * k)]]
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
    more = {"index": torch.arange(n), "negatives": torch.arange(7 * n).view(n, 7) % 2000} if name.startswith("CRD") else {}
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
    """Triton 3.6's interpreter takes int() of arrays of one element, which NumPy refuses from 2.4 on; the compiled kernel is not concerned."""
    if "InterpreterError" in stderr and "only 0-dimensional arrays can be converted to Python scalars" in stderr:
        pytest.skip("this Triton's interpreter does not go with this NumPy (int() of an array of one element)")
