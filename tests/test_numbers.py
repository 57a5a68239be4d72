"""Numbers at the edges: at every scale, beyond float32's squares, on what is not a number, on anything that chance draws.
A slice by default; all of it with --flags slow, and as much as one likes by `python -m tests.campaign --only losses`."""
from itertools import islice, product

import pytest
import torch
import torch.nn.functional as F

import fuzz
from helpers import CASES, as_given, case, make, randn, value_and_gradients
from relkd import losses
from relkd.losses import RKDDistance
from relkd.losses.cc import CC, correlation
from relkd.losses.pkt import conditional_probabilities
from relkd.losses.sp import similarities
from relkd.relations import pdist


def powers(flags):
    return range(-30, 31, 5) if "slow" in flags else (-30, -9, 18, 30)


@pytest.mark.parametrize("name", fuzz.SCALE_FREE)
def test_what_does_not_depend_on_scale_is_right_at_every_scale(name, flags):
    """The fault: above 1e19 in float32 a square overflows, and the loss was NaN, or silently constant;
    below 1e-5 an absolute eps stood for the data."""
    pairs = product(powers(flags), repeat=2) if "slow" in flags else zip(powers(flags), reversed(powers(flags)))
    of_value, of_gradient = fuzz.tolerance(name)
    for a, b in pairs:
        value, gradient = fuzz.at_scale(name, a, b)
        assert value <= of_value and gradient <= of_gradient, f"1e{a}, teacher 1e{b}: off by {value:.1e}, {gradient:.1e}"


@pytest.mark.parametrize("name", [name for name in CASES if name != "DIST inter"])        # of one-hot rows: told in its lesson
def test_nothing_is_silent_where_it_cannot_be_right(name, flags):
    """The fault: a constant value and no gradient, as if all were well."""
    for power in (19, 20, 22, 25, 30, 36) if "slow" in flags else (20, 30):
        assert not fuzz.silent(name, power)


@pytest.mark.parametrize("name", CASES)
def test_not_a_number_in_not_a_number_out(name):
    """The fault: AB took a teacher's NaN for a response below 0."""
    for side in ("student", "teacher"):
        loss, s, t, more = case(name)
        for f in s if side == "student" else t:
            f.view(-1)[5] = float("nan")
        assert loss(as_given(s), as_given(t), **more).isnan(), side


@pytest.mark.parametrize("seed", range(4))
def test_on_anything(seed, flags):
    for k, drawn in enumerate(islice(fuzz.cases(seed), 3000 if "slow" in flags else 40)):
        try:
            wrong = fuzz.complaint(drawn)
        except ValueError as error:                          # fewer samples than the loss is defined for
            wrong = "" if drawn["n"] < 4 and "\n" not in str(error) else str(error)
        assert not wrong, f"case {k}: {wrong} in {drawn}"


# ---- ordinary numbers, bit for bit

def old_distance(s, t):
    n = len(s)
    ds, dt = (d / (d.sum() / (n * (n - 1))) for d in map(pdist, (s, t)))
    return F.smooth_l1_loss(ds, dt)


@pytest.mark.parametrize("size", [.02, 1., 300.])
def test_scaling_first_changes_no_bit_of_ordinary_numbers(size):
    """By powers of two: what was trained before is what would be trained today."""
    s, t = size * (randn(64, 128) + .3), randn(64, 200, seed=1).relu()
    mine, theirs = (value_and_gradients(lambda s: f(s, t), s) for f in (RKDDistance(), old_distance))
    assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1][0], theirs[1][0])
    gram = s @ s.t()
    shares = gram / gram.diagonal().amax().sqrt()
    assert torch.equal(similarities(s), shares / torch.linalg.vector_norm(shares, dim=1, keepdim=True))
    unit = s / torch.linalg.vector_norm(s, dim=1, keepdim=True)
    k = unit @ unit.t() + 1
    assert torch.equal(conditional_probabilities(s), k / k.sum(1, keepdim=True))
    unit = s * torch.linalg.vector_norm(s, dim=1, keepdim=True).reciprocal()
    assert torch.equal(correlation(s, "bilinear"), unit @ unit.t())


def test_a_share_of_the_largest_is_silent_at_every_scale():
    """What has no direction is told by its share of the batch's largest number, not by its size."""
    s, t = randn(8, 5, dtype=torch.float64), randn(8, 6, seed=1, dtype=torch.float64)
    s[2] *= 1e-7
    for loss in (make("SP"), make("PKT"), CC()):
        found = [value_and_gradients(lambda s: loss(s, t), s * c) for c in (1., 2.**-60)]
        (value, (gradient,)), (other, (again,)) = found
        assert torch.equal(value, other) and torch.equal(gradient, again * 2.**-60)
        assert gradient[2].any() == isinstance(loss, losses.SP)   # whose columns reach it


def test_points_that_only_rounding_tells_apart_are_one_point():
    """Scaling by what is left after the mean is taken off would blow rounding up to the size of the data."""
    for offset, dtype in (*((o, torch.float32) for o in (1., 300., 1e25, 1e-25)), (7., torch.float64)):
        s = torch.full((16, 40), offset, dtype=dtype) * torch.linspace(.3, 1.1, 40, dtype=dtype)
        value, (gradient,) = value_and_gradients(lambda s: RKDDistance()(s, randn(16, 6)), s)
        assert value.isfinite() and not gradient.any()
