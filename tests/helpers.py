"""What several test files share: precisions, seeded generators, a case of every loss, values with gradients, a stop after some steps, a loop that learns."""
import pytest
import torch

from relkd import losses

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


def skip_where_triton_cannot_interpret(stderr):
    """Triton 3.6's interpreter takes int() of arrays of one element, which NumPy refuses from 2.4 on; the compiled kernel is not concerned."""
    if "InterpreterError" in stderr and "only 0-dimensional arrays can be converted to Python scalars" in stderr:
        pytest.skip("this Triton's interpreter does not go with this NumPy (int() of an array of one element)")
