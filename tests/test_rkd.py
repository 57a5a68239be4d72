"""RKD: properties that hold for all inputs, and the values of the authors' code."""
import math

from hypothesis import assume, given
from hypothesis import strategies as st
import pytest
import torch
import torch.nn.functional as F

from helpers import many
from relkd.losses import RKD, RKDAngle, RKDDistance
from relkd.relations import pdist, unit_differences

RELATIONAL = [RKDDistance(), RKDAngle(), RKD(), RKDDistance(distinct=True), RKDAngle(distinct=True), RKD(distinct=True)]


@st.composite
def batches(draw, least=3):
    n, ds, dt, seed = draw(st.integers(least, 9)), draw(st.integers(2, 6)), draw(st.integers(2, 6)), draw(st.integers(0, 10**6))
    g = torch.Generator().manual_seed(seed)
    size, shift = 10 ** draw(st.floats(-2, 2)), draw(st.floats(-5, 5))
    return torch.randn(n, ds, generator=g, dtype=torch.float64) * size + shift, torch.randn(n, dt, generator=g, dtype=torch.float64)


@many
@given(batches())
@pytest.mark.parametrize("loss", RELATIONAL, ids=str)
def test_zero_for_equal_shapes_and_never_negative(loss, pair):
    s, t = pair
    assert loss(3 * t + 1, t) < 1e-12 and loss(s, t) >= 0


@many
@given(batches(), st.floats(1e-3, 1e3), st.floats(-100, 100))
@pytest.mark.parametrize("loss", RELATIONAL, ids=str)
def test_blind_to_similarity_and_to_the_order_of_the_batch(loss, pair, scale, shift):
    s, t = pair
    q, _ = torch.linalg.qr(torch.randn(s.shape[1], s.shape[1], dtype=torch.float64))
    order = torch.randperm(len(s))
    nearest = min(F.pdist(e).min() for e in (s, scale * s, t, scale * t))
    assume(nearest > 1e-4)                            # eps, the least distance of 1e-6, is an absolute size
    base = loss(s, t)
    for moved in (loss(s @ q, t), loss(scale * s, t), loss(s + shift, t), loss(s[order], t[order]), loss(s, t * scale + shift)):
        torch.testing.assert_close(moved, base, rtol=1e-5, atol=1e-7)


@many
@given(batches())
@pytest.mark.parametrize("loss", [RKDDistance(), RKDAngle(), RKD()], ids=str)
def test_gradient_is_that_of_a_shape(loss, pair):
    """Invariance to shift and scale, differentiated: the gradient sums to 0 and is orthogonal to the centred student."""
    s, t = pair
    s = s.requires_grad_()
    g, = torch.autograd.grad(loss(s, t), s)
    size = g.abs().max() * (s.detach().abs().max() + 1) * len(s)
    assert g.sum(0).abs().max() <= 1e-8 * size + 1e-10
    assert (g * (s - s.mean(0))).sum().abs() <= 1e-6 * size + 1e-10


@many
@given(batches())
def test_distinct_is_a_fixed_factor_for_points_in_general_position(pair):
    s, t = pair
    n = len(s)
    torch.testing.assert_close(RKDDistance(True)(s, t), RKDDistance()(s, t) * n / (n - 1))
    torch.testing.assert_close(RKDAngle(True)(s, t), RKDAngle()(s, t) * n**2 / ((n - 1) * (n - 2)))


@pytest.mark.parametrize("n", [3, 8, 33])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_value_and_gradient_of_torchdistill(n, dtype, tolerance):
    """torchdistill's RKD is the authors' code; ours agrees in value and gradient, with feature maps too."""
    RKDLoss = pytest.importorskip("torchdistill.losses.mid_level").RKDLoss

    g = torch.Generator().manual_seed(n)
    s, t = (torch.randn(n, c, 2, 2, generator=g, dtype=dtype).relu() + .1 for c in (5, 7))
    theirs = RKDLoss("s", "t", dist_factor=25, angle_factor=50, reduction="mean")
    grads = []
    for f in (lambda s: RKD(25, 50)(s, t), lambda s: theirs({"s": {"output": s}}, {"t": {"output": t}})):
        x = s.clone().requires_grad_()
        value = f(x)
        grads.append((value.detach(), torch.autograd.grad(value, x)[0]))
    (a, ga), (b, gb) = grads
    assert abs(a - b) <= tolerance * abs(b)
    assert (ga - gb).abs().max() <= 10 * tolerance * gb.abs().max()


def test_values_that_do_not_move():
    """The collinear student of the notebook, worked on paper: 0.5 / 9 and 3.24 / 27."""
    t = torch.tensor([[0., 0.], [3., 0.], [0., 4.]])
    s = torch.tensor([[0., 0., 0.], [0., 1., 0.], [0., 2., 0.]])
    assert math.isclose(RKDDistance()(s, t), .5 / 9, rel_tol=1e-6) and math.isclose(RKDAngle()(s, t), 3.24 / 27, rel_tol=1e-6)
    assert math.isclose(RKD()(s, t), 25 * .5 / 9 + 50 * .12, rel_tol=1e-6)


def test_one_duplicate_does_not_explode_the_angle_gradient():
    """F.normalize, as in the circulating code, gives 1e9 here."""
    g = torch.Generator().manual_seed(0)
    t, s = torch.randn(8, 4, generator=g), torch.randn(8, 4, generator=g)
    s[1] = s[0]

    def largest(unit):
        x = s.clone().requires_grad_()
        u, v = unit(x), unit(t)
        F.smooth_l1_loss(u @ u.transpose(1, 2), v @ v.transpose(1, 2)).backward()
        return x.grad.abs().max()

    assert largest(lambda e: F.normalize(e[None] - e[:, None], dim=2)) > 1e8
    assert largest(unit_differences) < 1


def test_a_weight_of_zero_needs_no_angles():
    """A student of one number has none; two samples teach nothing, with angles or without."""
    s, t = torch.randn(4, 1), torch.randn(4, 3)
    assert RKD(w_angle=0)(s, t) == 25 * RKDDistance()(s, t)
    with pytest.raises(ValueError, match="at least 2 numbers"):
        RKD()(s, t)
    with pytest.raises(ValueError, match="at least 3 samples"):
        RKD(w_angle=0)(s[:2], t[:2])
