"""What several test files share: precisions, seeded generators, values with gradients, a stop after some steps, a loop that learns."""
import pytest
import torch

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


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
