"""OFD: values of circulating lines, margins, what it ignores."""
import copy
import math

from hypothesis import given
from hypothesis import strategies as st
import pytest
from torch import nn
import torch
import torch.nn.functional as F

from helpers import assert_same, assert_says, gen, many, value_and_gradients
from relkd.losses.ofd import OFD, margin_from_batchnorm, margin_from_maps

TOLERANCES = [(torch.float32, 2e-6), (torch.float64, 1e-13)]


@st.composite
def maps(draw, channels=True):
    """Student and teacher pre-activations in float64, of equal channels unless `channels` is False."""
    n, cs = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    ct = cs if channels else draw(st.integers(1, 5))
    h, w = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    g = gen(draw(st.integers(0, 10**6)))
    size, shift = 10 ** draw(st.floats(-2, 2)), draw(st.floats(-2, 2))
    return (torch.randn(n, cs, h, w, generator=g, dtype=torch.float64) * size,
            torch.randn(n, ct, h, w, generator=g, dtype=torch.float64) + shift)


def ofd_loop(s, t, margins):
    total = 0
    for c, m in enumerate(margins.tolist()):
        for a, b in zip(s[:, c].flatten().tolist(), t[:, c].flatten().tolist()):
            tau = max(b, m)
            if not a <= tau <= 0:
                total += (a - tau) ** 2
    return total


def test_ofd_is_not_in_torchdistill():
    """So OFD is compared with loops and with the lines in circulation."""
    module = pytest.importorskip("torchdistill.losses.registry")
    LOSS_DICT, MIDDLE_LEVEL_LOSS_DICT = module.LOSS_DICT, module.MIDDLE_LEVEL_LOSS_DICT

    assert not [k for k in (*LOSS_DICT, *MIDDLE_LEVEL_LOSS_DICT) if "ofd" in k.lower() or "overhaul" in k.lower()]


def masked(s, t, m):
    target = torch.max(t, m)
    return (F.mse_loss(s, target, reduction="none") * ((s > target) | (target > 0)).to(s.dtype)).sum()


def three_regions(s, t, m):
    return ((s - m)**2 * ((s > m) & (t <= m)) + (s - t)**2 * ((s > t) & (t > m) & (t <= 0)) + (s - t)**2 * (t > 0)).sum()


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("lines", [masked, three_regions])
def test_ofd_is_both_forms_of_the_circulating_lines(dtype, tolerance, lines):
    s, t, m = (torch.randn(6, 5, 4, 3, generator=gen(0), dtype=dtype),
               torch.randn(6, 5, 4, 3, generator=gen(1), dtype=dtype), -torch.rand(5, generator=gen(2), dtype=dtype))
    mine = OFD(5, 5, margins=m, connector=False)
    assert_same(value_and_gradients(lambda s: mine(s, t), s),
                value_and_gradients(lambda s: lines(s, t, m[:, None, None]) / 6 / 1000, s), tolerance)


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_ofd_with_the_batchs_margin_and_the_mean_is_the_zoos(dtype, tolerance):
    s, t = torch.randn(6, 5, 4, 3, generator=gen(0), dtype=dtype), torch.randn(6, 5, 4, 3, generator=gen(1), dtype=dtype)
    silent = (t < 0).to(dtype)
    m = (t * silent).sum((0, 2, 3)) / silent.sum((0, 2, 3))
    mine = OFD(5, 5, scale="mean", connector=False)
    assert_same(value_and_gradients(lambda s: mine(s, t), s),
                value_and_gradients(lambda s: masked(s, t, m[:, None, None]) / s.numel(), s), tolerance)


@many
@given(maps(), st.booleans())
def test_ofd_equals_the_loop_and_is_zero_for_the_teacher_itself(pair, fixed):
    s, t = pair
    c = s.shape[1]
    m = -torch.rand(c, generator=gen(c), dtype=torch.float64) if fixed else margin_from_maps(t)
    loss = OFD(c, c, margins=m if fixed else "batch", scale=len(s), layer_weights=[1], connector=False)
    torch.testing.assert_close(loss(s, t).item(), ofd_loop(s, t, m), rtol=1e-10, atol=1e-12)
    assert loss(t, t) == 0


@many
@given(maps(), st.floats(.1, 10))
def test_ofd_ignores_the_teacher_below_the_margin_and_the_student_below_the_target(pair, deeper):
    s, t = pair
    c = s.shape[1]
    m = margin_from_maps(t)
    target = torch.maximum(t, m[:, None, None])
    loss = OFD(c, c, margins=m, connector=False)
    value = loss(s, t)
    assert torch.equal(loss(s, torch.where(t < m[:, None, None], t * (1 + deeper), t)), value)
    skipped = (s <= target) & (target <= 0)
    moved = torch.where(skipped, s - deeper, s)
    assert torch.equal(loss(moved, t), value)
    assert value_and_gradients(lambda s: loss(s, t), s)[1][0][skipped].abs().sum() == 0


@many
@given(maps())
def test_ofd_falls_as_the_margin_rises_from_the_identity_to_the_relu(pair):
    s, t = pair
    c = s.shape[1]
    values = [OFD(c, c, margins=m, scale=1, connector=False)(s, t).item() for m in (float("-inf"), -2, -1, -.5, 0)]
    assert all(a >= b - 1e-12 for a, b in zip(values, values[1:]))
    relu = torch.where(t > 0, s - t, s.relu()).pow(2).sum() / len(s)
    identity = torch.where((t <= 0) & (s <= t), 0, s - t).pow(2).sum() / len(s)
    torch.testing.assert_close(torch.tensor([values[-1], values[0]]).double(), torch.stack([relu, identity]), rtol=1e-6, atol=1e-9)


def batchnorm(beta, gamma, dtype=torch.float32):
    bn = nn.BatchNorm2d(len(beta), dtype=dtype)
    with torch.no_grad():
        bn.bias.copy_(torch.tensor(beta, dtype=dtype))
        bn.weight.copy_(torch.tensor(gamma, dtype=dtype))
    return bn


@many
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(.05, 3), st.booleans()), min_size=1, max_size=6))
def test_margin_is_scipys_truncated_normal_mean(channels):
    from scipy.stats import truncnorm

    beta, gamma, flip = map(list, zip(*channels))
    bn = batchnorm(beta, [-g if f else g for g, f in zip(gamma, flip)], torch.float64)
    expected = [truncnorm.mean(-math.inf, -b / g, loc=b, scale=g) for b, g in zip(beta, gamma)]
    for mine, theirs, b, g in zip(margin_from_batchnorm(bn, rare=0).tolist(), expected, beta, gamma):
        if b / g < 5:
            assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-9)
        assert -g * max(1, abs(b / g)) * 1.3 <= mine <= 0


@many
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(.05, 3)), min_size=1, max_size=6))
def test_margin_is_by_default_the_authors_value(channels):
    from scipy.stats import norm

    beta, gamma = map(list, zip(*channels))
    bn = batchnorm(beta, gamma, torch.float64)
    copied = [-g * math.exp(-(b / g)**2 / 2) / math.sqrt(2 * math.pi) / norm.cdf(-b / g) + b if norm.cdf(-b / g) > .001
              else -3 * g for b, g in zip(beta, gamma)]
    torch.testing.assert_close(margin_from_batchnorm(bn), torch.tensor(copied, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_margin_far_out_and_dead():
    beta, gamma = [20., 1e3, 1e6, -1e3, -1e30, .5, -.5, 0., 3., -3.], [1., 1., 1., 1., 1., 0., 0., 0., 1e-38, 1e-38]
    m = margin_from_batchnorm(batchnorm(beta, gamma), rare=0)
    expected = torch.tensor([-.049753, -1e-3, -1e-6, -1e3, -1e30, 0., -.5, 0., 0., -3.])
    torch.testing.assert_close(m, expected, rtol=1e-3, atol=1e-9)
    default = margin_from_batchnorm(batchnorm(beta, gamma))
    assert default.isfinite().all() and (default <= 0).all() and default[0] == -3 and default[5] == 0


def test_margin_against_measured_normal_responses_of_every_kind_of_batch_norm():
    bn = batchnorm([0., .5, -1.], [1., -2., .5])
    x = bn(torch.randn(4000, 3, 5, 5, generator=gen(0)))
    torch.testing.assert_close(margin_from_maps(x.detach()), margin_from_batchnorm(bn), rtol=.01, atol=.005)
    assert margin_from_batchnorm(copy.deepcopy(bn).half()).dtype == torch.float32
    torch.testing.assert_close(margin_from_batchnorm(nn.BatchNorm1d(2, affine=False)), torch.full((2,), -math.sqrt(2 / math.pi)))
    assert margin_from_maps(torch.rand(3, 2, 2, 2)).tolist() == [0, 0] and margin_from_maps(torch.randn(9, 2).half()).dtype == torch.float32
    assert not margin_from_batchnorm(bn).requires_grad


def test_a_skipped_response_is_skipped_however_large():
    """The circulating lines square before they mask: infinity times 0 is NaN."""
    s, t = torch.full((1, 1, 1, 2), -1e20), torch.full((1, 1, 1, 2), -1.)
    value, (g,) = value_and_gradients(lambda s: OFD(1, 1, margins=-1., connector=False)(s, t), s)
    assert value == 0 and g.abs().max() == 0 and masked(s, t, torch.tensor(-1.)).isnan()


def test_margins_may_be_lists_of_numbers_as_in_a_recipe():
    s, t = torch.randn(4, 2, 3, 3, generator=gen(0)), torch.randn(4, 2, 3, 3, generator=gen(1))
    a, b = OFD(2, 2, margins=[[-1., -.5]], connector=False), OFD(2, 2, margins=torch.tensor([-1., -.5]), connector=False)
    assert torch.equal(a(s, t), b(s, t)) and torch.equal(OFD(2, 2, margins=0, connector=False)(s, t),
                                                         OFD(2, 2, margins=[torch.zeros(2)], connector=False)(s, t))

f4, e2 = torch.rand(4, 3, 2, 2), torch.rand(4, 3)


ERRORS = [
    (lambda: OFD(3, 3, scale="sum"), "OFD needs a positive scale, or 'mean'; got 'sum'"),
    (lambda: OFD(0, 3), "OFD needs as many in_channels as out_channels, each at least 1; got 0 and 3"),
    (lambda: OFD(3, 5)(f4, f4), "OFD was made for 3 student and 5 teacher channels; got 3 and 3: "
                                "OFD.from_features reads them from an example"),
    (lambda: OFD(3, 5)(f4[:1, :, :1, :1], torch.rand(1, 5, 1, 1)),
     r"a connector in training normalises over the batch and needs more than one value a channel; got \(1, 3, 1, 1\): "
     r"use a larger batch, or loss.eval\(\)"),
    (lambda: OFD(3, 5, margins="bn"), "OFD takes margins='batch', one tensor a layer, or a number; got 'bn'"),
    (lambda: OFD(3, 5, margins=torch.zeros(3)), r"OFD needs a margin of at most 0 for each of the 5 teacher channels; "
                                                r"got shape \(3,\), largest 0.0"),
    (lambda: OFD(3, 2, margins=torch.tensor([-1., .5])), r"at most 0 for each of the 2 teacher channels; got shape \(2,\), largest 0.5"),
    (lambda: OFD(3, 2, margins=float("nan")), "at most 0 for each of the 2 teacher channels; got shape .*, largest nan"),
    (lambda: OFD([3, 3], [2, 2], margins=torch.zeros(2)), "OFD needs one tensor of margins a layer; got 1 for 2"),
    (lambda: margin_from_batchnorm(nn.ReLU()), "margin_from_batchnorm needs a batch normalisation; got ReLU: "
                                               "measure with margin_from_maps instead"),
    (lambda: margin_from_maps(torch.zeros(3)), r"margin_from_maps needs responses of shape \(N, C, H, W\) or \(N, D\), "
                                               r"floating point; got \(3,\), torch.float32"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_given_and_what_is_needed(call, message):
    assert_says(call, message)
