"""AB and OFD: values and gradients of other code, margins, what they ignore, precision, errors."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import assert_same, DTYPES, gen, value_and_gradients
from relkd.losses.ab import AB, Connector
from relkd.losses.ofd import OFD, margin_from_batchnorm, margin_from_maps

many = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TOLERANCES = [(torch.float32, 2e-6), (torch.float64, 1e-13)]


def made(cls, *sizes, seed=0, dtype=torch.float32, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(*sizes, **options).to(dtype)


@st.composite
def maps(draw, channels=True):
    """Student and teacher pre-activations in float64, of equal channels unless `channels` is False."""
    n, cs = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    ct = cs if channels else draw(st.integers(1, 5))
    h, w = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    g = gen(draw(st.integers(0, 10**6)))
    size, shift = 10 ** draw(st.floats(-2, 2)), draw(st.floats(-2, 2))
    return torch.randn(n, cs, h, w, generator=g, dtype=torch.float64) * size, torch.randn(n, ct, h, w, generator=g, dtype=torch.float64) + shift


def ab_loop(s, t, margin=1.):
    total = 0
    for a, b in zip(s.flatten().tolist(), t.flatten().tolist()):
        total += max(0, margin - a if b > 0 else margin + a) ** 2
    return total


def ofd_loop(s, t, margins):
    total = 0
    for c, m in enumerate(margins.tolist()):
        for a, b in zip(s[:, c].flatten().tolist(), t[:, c].flatten().tolist()):
            tau = max(b, m)
            if not a <= tau <= 0:
                total += (a - tau) ** 2
    return total


# ---- against torchdistill, and the circulating lines

@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("margin", [.5, 1., 2.])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ab_is_torchdistills_alternative_loss(dtype, tolerance, margin, reduction):
    """torchdistill's 'mean' divides by N alone: a scale of 1 here, with its pairs' weights; the authors' default is 3/1000 of it."""
    from torchdistill.losses.mid_level import AltActTransferLoss

    shapes, weights = [(3, 8, 8), (5, 4, 4)], [.3, 2.]
    s = [torch.randn(6, *c, generator=gen(k), dtype=dtype) for k, c in enumerate(shapes)]
    t = [torch.randn(6, *c, generator=gen(k + 9), dtype=dtype) for k, c in enumerate(shapes)]
    theirs = AltActTransferLoss({k: {**{r: {"io": "o", "path": k} for r in ("student", "teacher")}, "weight": w} for k, w in zip("ab", weights)}, margin, reduction)
    io = lambda fs: {k: {"o": f} for k, f in zip("ab", fs)}
    mine = AB([3, 5], [3, 5], margin=margin, scale=1 if reduction == "mean" else 6, layer_weights=weights)
    assert_same(value_and_gradients(lambda *s: mine(s, t), *s), value_and_gradients(lambda *s: theirs(io(s), io(t)), *s), tolerance)
    if reduction == "mean":
        default = AB([3, 5], [3, 5], margin=margin, layer_weights=weights)
        torch.testing.assert_close(default(s, t), .003 * theirs(io(s), io(t)))


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_ab_behind_a_connector_is_torchdistills_loss_behind_a_convolution_and_a_batch_norm(dtype, tolerance):
    from torchdistill.losses.mid_level import AltActTransferLoss

    s, t = torch.randn(6, 3, 4, 5, generator=gen(0), dtype=dtype), torch.randn(6, 7, 4, 5, generator=gen(1), dtype=dtype)
    mine = made(AB, 3, 7, dtype=dtype)
    theirs = AltActTransferLoss({"a": {r: {"io": "o", "path": "a"} for r in ("student", "teacher")}}, 1., "mean")
    norm = nn.BatchNorm2d(7).to(dtype)
    other = lambda s, w: .003 * theirs({"a": {"o": norm(F.conv2d(s, w[..., None, None]))}}, {"a": {"o": t}})
    inside = lambda s, w: torch.func.functional_call(mine, {"connectors.0.weight": w}, (s, t))
    assert_same(*(value_and_gradients(f, s, mine.connectors[0].weight) for f in (inside, other)), 5 * tolerance)
    for a, b in zip(mine.connectors[0].norm.buffers(), norm.buffers()):
        torch.testing.assert_close(a, b)


def test_ofd_is_not_in_torchdistill():
    """So OFD is compared with loops and with the lines in circulation."""
    from torchdistill.losses.registry import LOSS_DICT, MIDDLE_LEVEL_LOSS_DICT

    assert not [k for k in (*LOSS_DICT, *MIDDLE_LEVEL_LOSS_DICT) if "ofd" in k.lower() or "overhaul" in k.lower()]


def masked(s, t, m):
    target = torch.max(t, m)
    return (F.mse_loss(s, target, reduction="none") * ((s > target) | (target > 0)).to(s.dtype)).sum()


def three_regions(s, t, m):
    return ((s - m)**2 * ((s > m) & (t <= m)) + (s - t)**2 * ((s > t) & (t > m) & (t <= 0)) + (s - t)**2 * (t > 0)).sum()


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("lines", [masked, three_regions])
def test_ofd_is_both_forms_of_the_circulating_lines(dtype, tolerance, lines):
    s, t, m = torch.randn(6, 5, 4, 3, generator=gen(0), dtype=dtype), torch.randn(6, 5, 4, 3, generator=gen(1), dtype=dtype), -torch.rand(5, generator=gen(2), dtype=dtype)
    mine = OFD(5, 5, margins=m, connector=False)
    assert_same(value_and_gradients(lambda s: mine(s, t), s), value_and_gradients(lambda s: lines(s, t, m[:, None, None]) / 6 / 1000, s), tolerance)


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_ofd_with_the_batchs_margin_and_the_mean_is_the_zoos(dtype, tolerance):
    s, t = torch.randn(6, 5, 4, 3, generator=gen(0), dtype=dtype), torch.randn(6, 5, 4, 3, generator=gen(1), dtype=dtype)
    silent = (t < 0).to(dtype)
    m = (t * silent).sum((0, 2, 3)) / silent.sum((0, 2, 3))
    mine = OFD(5, 5, scale="mean", connector=False)
    assert_same(value_and_gradients(lambda s: mine(s, t), s), value_and_gradients(lambda s: masked(s, t, m[:, None, None]) / s.numel(), s), tolerance)


def test_values_worked_on_paper():
    s, t = torch.tensor([[[[.5, 2., .5, -.5]]]]), torch.tensor([[[[2., .1, -.1, -3.]]]])
    assert AB(1, 1)(s, t).item() == pytest.approx(2.75 * .003) and AB(1, 1, scale="mean")(s, t).item() == pytest.approx(2.75 / 4)
    s, t = torch.tensor([[[[1.5, -.2, -1., .5]]]]), torch.tensor([[[[2., .1, -.5, -3.]]]])
    assert OFD(1, 1, margins=-1., connector=False)(s, t).item() == pytest.approx(2.59e-3)
    assert margin_from_maps(t).item() == pytest.approx(-1.75)


def test_the_versions_differ_by_what_the_notebooks_say():
    """3/1000 of a sum with powers of two is 12.288 times the sum of the means on the stages of a CIFAR ResNet."""
    shapes = [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    s, t = [torch.randn(2, *c, generator=gen(k)) for k, c in enumerate(shapes)], [torch.randn(2, *c, generator=gen(k + 9)) for k, c in enumerate(shapes)]
    c = [16, 32, 64]
    means = AB(c, c, scale="mean", layer_weights=[1, 1, 1])(s, t)
    torch.testing.assert_close(AB(c, c)(s, t), 12.288 * means)
    torch.testing.assert_close(AB(c, c, scale=.001)(s, t), 4.096 * means)
    torch.testing.assert_close(OFD(c, c, connector=False)(s, t), 4.096 * OFD(c, c, scale="mean", layer_weights=[1, 1, 1], connector=False)(s, t))


# ---- properties

@many
@given(maps(), st.floats(.01, 10))
def test_ab_equals_the_loop_and_bounds_the_count_of_disagreements(pair, margin):
    s, t = pair
    total = AB(s.shape[1], s.shape[1], margin=margin, scale=len(s), layer_weights=[1])(s, t)
    torch.testing.assert_close(total.item(), ab_loop(s, t, margin), rtol=1e-10, atol=1e-12)
    assert total / margin**2 >= ((s > 0) != (t > 0)).sum() * (1 - 1e-12)


@many
@given(maps())
def test_ab_sees_only_the_signs_of_the_teacher(pair):
    s, t = pair
    c = s.shape[1]
    loss = AB(c, c)
    value = loss(s, t)
    for moved in (t * torch.rand_like(t).exp(), 1e3 * t, t.sign(), t**3, t.relu()):
        assert torch.equal(loss(s, moved), value)


@many
@given(maps(), st.floats(.1, 5))
def test_ab_beyond_the_margin_has_no_loss_and_no_gradient(pair, margin):
    s, t = pair
    side = (t > 0).to(t.dtype) * 2 - 1
    value, (g,) = value_and_gradients(lambda s: AB(t.shape[1], t.shape[1], margin=margin)(s, t), side * (margin + s.abs()))
    assert value == 0 and g.abs().max() == 0


@many
@given(maps())
def test_ab_with_a_large_margin_is_the_squared_distance_to_the_margins(pair):
    s, t = pair
    c, margin = s.shape[1], s.abs().max().item() + 1
    side = (t > 0).to(t.dtype) * 2 - 1
    torch.testing.assert_close(AB(c, c, margin=margin, scale="mean")(s, t), F.mse_loss(s, margin * side))


@many
@given(maps())
def test_ab_after_the_students_relu_has_a_floor(pair):
    s, t = pair
    c = s.shape[1]
    assert AB(c, c, scale="mean")(s.relu(), t) >= (t <= 0).double().mean() - 1e-12


@many
@given(maps(channels=False), st.floats(.5, 10), st.floats(-3, 3))
def test_connectors_in_training_take_out_the_students_scale_and_shift(pair, scale, shift):
    s, t = pair
    s = torch.randn_like(s)
    for loss in (made(AB, s.shape[1], t.shape[1], dtype=torch.float64, connector=True), made(OFD, s.shape[1], t.shape[1], dtype=torch.float64)):
        for c in loss.connectors:
            c.norm.eps = 1e-12
        torch.testing.assert_close(loss(scale * s + shift, t), loss(s, t), rtol=1e-5, atol=1e-8)


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


def test_a_list_is_the_weighted_sum_over_its_layers():
    s = [torch.randn(4, c, k, k, generator=gen(c)) for c, k in ((3, 8), (5, 4), (7, 2))]
    t = [torch.randn(4, c, k, k, generator=gen(c + 9)) for c, k in ((3, 4), (5, 4), (7, 2))]
    c = [3, 5, 7]
    for cls, options in ((AB, {}), (OFD, {"connector": False})):
        one = [cls(k, k, **options)(a, b) for k, a, b in zip(c, s, t)]
        torch.testing.assert_close(cls(c, c, **options)(s, t), one[0] / 4 + one[1] / 2 + one[2])
        torch.testing.assert_close(cls(c, c, layer_weights=[3, 0, 1], **options)(s, t), 3 * one[0] + one[2])
        assert torch.equal(cls(3, 3, **options)(tuple(s[:1]), t[:1]), cls(3, 3, **options)(s[0], t[0]))


def test_embeddings_are_maps_of_one_position():
    s, t = torch.randn(6, 3, generator=gen(0)), torch.randn(6, 5, generator=gen(1))
    for cls in (AB, OFD):
        loss = made(cls, 3, 5)
        torch.testing.assert_close(loss(s, t), loss(s[..., None, None], t[..., None, None]))
    assert margin_from_maps(t).shape == (5,)


# ---- the margin of a batch normalisation

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
    copied = [-g * math.exp(-(b / g)**2 / 2) / math.sqrt(2 * math.pi) / norm.cdf(-b / g) + b if norm.cdf(-b / g) > .001 else -3 * g for b, g in zip(beta, gamma)]
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


# ---- gradients, precision, N = 1, zeros

LOSSES = [made(AB, 4, 4), made(AB, 4, 3), made(OFD, 4, 4, connector=False), made(OFD, 4, 3), made(OFD, 4, 3, margins=-torch.rand(3))]
ids = ["AB", "AB connected", "OFD", "OFD connected", "OFD fixed"]


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_gradcheck_and_no_gradient_for_the_teacher(loss):
    loss = copy.deepcopy(loss).double()
    ct = loss.channels[0][1]
    s, t = torch.randn(3, 4, 3, 3, generator=gen(0), dtype=torch.float64).requires_grad_(), torch.randn(3, ct, 2, 5, generator=gen(1), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, *p: torch.func.functional_call(loss, dict(zip(dict(loss.named_parameters()), p)), (s, t)), (s, *loss.parameters()))
    loss(s, t).backward()
    assert t.grad is None and s.grad is not None and all(p.grad is not None for p in loss.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@pytest.mark.parametrize("n", [1, 8])
def test_finite_on_zeros_duplicates_and_extremes_in_every_precision(loss, dtype, n):
    loss = copy.deepcopy(loss)
    t = torch.randn(n, loss.channels[0][1], 4, 4, generator=gen(0))
    base = torch.randn(n, 4, 4, 4, generator=gen(1))
    for e in (base, 0 * base, base[:1].expand_as(base), base * (torch.arange(4) > 1), 1e-4 * base, 1e4 * base):
        for teacher in (t, 0 * t, t.abs(), -t.abs()):
            e = e.detach().to(dtype).requires_grad_()
            value = loss(e, teacher.to(dtype))
            value.backward()
            assert value.isfinite() and e.grad.isfinite().all() and e.grad.abs().max() < 1e4
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_skipped_response_is_skipped_however_large():
    """The circulating lines square before they mask: infinity times 0 is NaN."""
    s, t = torch.full((1, 1, 1, 2), -1e20), torch.full((1, 1, 1, 2), -1.)
    value, (g,) = value_and_gradients(lambda s: OFD(1, 1, margins=-1., connector=False)(s, t), s)
    assert value == 0 and g.abs().max() == 0 and masked(s, t, torch.tensor(-1.)).isnan()


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(loss, dtype):
    s, t = torch.randn(4, 4, 8, 8, generator=gen(0)), torch.randn(4, loss.channels[0][1], 4, 4, generator=gen(1))
    loss = copy.deepcopy(loss)
    with torch.autocast("cpu", dtype=dtype):
        inside = loss(s, t)
    assert inside.dtype == torch.float32 and torch.equal(inside, loss(s, t))


def test_precisions_mix_upwards_and_the_running_statistics_move_all_the_same():
    s, t = torch.randn(8, 3, 4, 4, generator=gen(0)), torch.randn(8, 5, 4, 4, generator=gen(1))
    for cls in (AB, OFD):
        loss = made(cls, 3, 5)
        wide, half = copy.deepcopy(loss), copy.deepcopy(loss).half()
        assert loss(s.half(), t).dtype == torch.float32 and wide(s.double(), t).dtype == torch.float64 and half(s.half(), t.half()).dtype == torch.float32
        assert made(cls, 3, 5, dtype=torch.float64)(s, t).dtype == torch.float64
        for other in (wide, half):
            assert other.connectors[0].norm.num_batches_tracked == 1 and other.connectors[0].norm.running_mean.abs().sum() > 0
            torch.testing.assert_close(other.connectors[0].norm.running_var.float(), loss.connectors[0].norm.running_var, rtol=2e-2, atol=2e-3)


# ---- as modules

def test_a_connector_is_a_convolution_and_a_batch_norm():
    connector = Connector(3, 64)
    assert connector.weight.shape == (64, 3) and connector.weight.std().item() == pytest.approx((2 / 64)**.5, rel=.2)
    s = torch.randn(4, 3, 5, 5)
    norm = nn.BatchNorm2d(64)
    torch.testing.assert_close(connector(s), norm(F.conv2d(s, connector.weight[..., None, None])))
    assert connector.norm.num_batches_tracked == 1
    connector.eval(), norm.eval()
    torch.testing.assert_close(connector(s), norm(F.conv2d(s, connector.weight[..., None, None])))
    assert connector.norm.num_batches_tracked == 1 and connector(s[:1, :, :1, :1]).shape == (1, 64, 1, 1)


def test_connectors_stand_where_they_are_asked_for():
    kinds = lambda loss: [type(c).__name__ for c in loss.connectors]
    assert kinds(AB([3, 5], [3, 7])) == ["Identity", "Connector"] and kinds(AB([3, 5], [3, 7], connector=True)) == ["Connector"] * 2
    assert kinds(OFD([3, 5], [3, 7])) == ["Connector"] * 2 and kinds(OFD([3, 5], [3, 7], connector=None)) == ["Identity", "Connector"]
    assert kinds(AB(3, 3, connector=False)) == ["Identity"] and not list(AB(3, 3).parameters())


@pytest.mark.parametrize("cls, options, extra", [(AB, {}, []), (OFD, {}, []), (OFD, {"margins": [-torch.rand(6), -torch.rand(7)]}, ["margin0", "margin1"])])
def test_from_features_reads_the_sizes_and_state_dict_makes_the_round_trip(cls, options, extra):
    s, t = [torch.randn(4, 3, 8, 8), torch.randn(4, 5)], [torch.randn(4, 6, 4, 4), torch.randn(4, 7)]
    loss = cls.from_features(s, t, **options)
    assert type(loss) is cls and loss.channels == [(3, 6), (5, 7)] and loss.layer_weights == [.5, 1.]
    assert [tuple(p.shape) for p in loss.parameters()] == [(6, 3), (6,), (6,), (7, 5), (7,), (7,)]
    assert [k for k in loss.state_dict() if "margin" in k] == extra
    loss(s, t)
    other = cls([3, 5], [6, 7], **({"margins": 0.} if extra else {}))
    assert other.eval()(s, t) != loss.eval()(s, t)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(s, t), loss(s, t))


def test_repr_shows_the_options():
    assert "margin=0.5, scale=0.003, layer_weights=[0.5, 1.0]" in repr(AB([3, 4], [3, 4], margin=.5))
    assert "margins='batch', scale='mean', layer_weights=[2.0]" in repr(OFD(3, 4, scale="mean", layer_weights=[2]))
    assert "margins='fixed'" in repr(OFD(3, 4, margins=-1.))


def test_margins_may_be_lists_of_numbers_as_in_a_recipe():
    s, t = torch.randn(4, 2, 3, 3, generator=gen(0)), torch.randn(4, 2, 3, 3, generator=gen(1))
    a, b = OFD(2, 2, margins=[[-1., -.5]], connector=False), OFD(2, 2, margins=torch.tensor([-1., -.5]), connector=False)
    assert torch.equal(a(s, t), b(s, t)) and torch.equal(OFD(2, 2, margins=0, connector=False)(s, t), OFD(2, 2, margins=[torch.zeros(2)], connector=False)(s, t))


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_compiles_without_a_break(loss):
    torch._dynamo.reset()
    s, t = torch.randn(4, 4, 6, 6, generator=gen(0)), torch.randn(4, loss.channels[0][1], 3, 3, generator=gen(1))
    a, b = copy.deepcopy(loss), copy.deepcopy(loss)
    compiled = torch.compile(b, fullgraph=True, backend="aot_eager")
    assert_same(value_and_gradients(lambda s: compiled(s, t), s), value_and_gradients(lambda s: a(s, t), s), 1e-5)
    for x, y in zip(a.buffers(), b.buffers()):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("cls", [AB, OFD])
def test_a_student_learns_with_its_connector(cls):
    x = torch.randn(32, 1, 6, 6, generator=gen(0))
    teacher = F.conv2d(x, torch.randn(5, 1, 3, 3, generator=gen(1)), padding=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student, loss = nn.Conv2d(1, 5, 3, padding=1), cls(5, 5, connector=True)
    agree = lambda: ((loss.connectors[0](student(x)) > 0) == (teacher > 0)).float().mean().item()
    opt = torch.optim.Adam([*student.parameters(), *loss.parameters()], lr=.05)
    first, before = loss(student(x), teacher).item(), agree()
    for _ in range(100):
        opt.zero_grad()
        last = loss(student(x), teacher)
        last.backward()
        opt.step()
    assert last.item() < .3 * first and agree() > max(.9, before)


def test_the_lab_builds_them_and_trains_ab_alone_first():
    from relkd.features import Features
    from relkd.models import create

    layers = [f"layer{k}.relu:input" for k in (1, 2, 3)]
    student, teacher = create("resnet8x0.5", 10, 1), create("resnet8", 10, 1)
    x = torch.randn(4, 1, 8, 8, generator=gen(0))
    s, t = ([*Features(net, layers)(x).values()] for net in (student, teacher))
    margins = [margin_from_batchnorm(teacher.get_submodule(f"layer{k}.0.bn2")) for k in (1, 2, 3)]
    for loss in (AB.from_features(s, t), OFD.from_features(s, t), OFD.from_features(s, t, margins=margins)):
        assert loss.channels == [(8, 16), (16, 32), (32, 64)] and min(f.min() for f in (*s, *t)) < 0
        student.zero_grad()
        loss(s, t).backward(retain_graph=True)
        assert all(p.grad is not None for p in loss.parameters()) and student.conv1.weight.grad.abs().sum() > 0 and student.fc.weight.grad is None


# ---- errors

f4, e2 = torch.rand(4, 3, 2, 2), torch.rand(4, 3)
ERRORS = [
    (lambda: AB(3, 3, margin=0), "AB needs a positive margin; got 0"),
    (lambda: AB(3, 3, margin=float("nan")), "AB needs a positive margin; got nan"),
    (lambda: AB(3, 3, scale=0), "AB needs a positive scale, or 'mean'; got 0"),
    (lambda: OFD(3, 3, scale="sum"), "OFD needs a positive scale, or 'mean'; got 'sum'"),
    (lambda: AB(3, 5, connector=False), "AB without connectors needs equal channels; got 3 and 5"),
    (lambda: AB([3, 3], 3), r"AB needs as many in_channels as out_channels, each at least 1; got \[3, 3\] and 3"),
    (lambda: OFD(0, 3), "OFD needs as many in_channels as out_channels, each at least 1; got 0 and 3"),
    (lambda: AB([], []), "each at least 1"),
    (lambda: AB([3, 3], [3, 3], layer_weights=[1]), "AB needs one layer weight a layer; got 1 for 2"),
    (lambda: AB(3, 3)(e2[0], e2), r"AB needs student maps of shape \(N, C, H, W\) or \(N, D\), floating point; got \(3,\), torch.float32"),
    (lambda: OFD(3, 3)(f4, f4.long()), r"OFD needs teacher maps of shape .* floating point; got \(4, 3, 2, 2\), torch.int64"),
    (lambda: OFD(3, 3)(f4, None), "OFD needs teacher maps of shape .* got NoneType"),
    (lambda: AB(3, 3)(f4, e2), r"AB needs student and teacher maps of the same samples, none empty; got \(4, 3, 2, 2\) and \(4, 3\)"),
    (lambda: AB(3, 3)(f4, f4[:3]), r"same samples, none empty; got \(4, 3, 2, 2\) and \(3, 3, 2, 2\)"),
    (lambda: AB(3, 3)([f4, f4], [f4, f4]), r"AB was made for 1 layer\(s\); got 2"),
    (lambda: AB(3, 3)([f4, f4], f4), "AB needs as many layers of the teacher as of the student, at least one; got 2 of the student and 1 of the teacher"),
    (lambda: OFD(3, 5)(f4, f4), "OFD was made for 3 student and 5 teacher channels; got 3 and 3: OFD.from_features reads them from an example"),
    (lambda: OFD(3, 5)(f4[:1, :, :1, :1], torch.rand(1, 5, 1, 1)), r"a connector in training normalises over the batch and needs more than one value a channel; got \(1, 3, 1, 1\): use a larger batch, or loss.eval\(\)"),
    (lambda: AB(3, 5)(e2[:1], torch.rand(1, 5)), r"needs more than one value a channel; got \(1, 3\)"),
    (lambda: OFD(3, 5, margins="bn"), "OFD takes margins='batch', one tensor a layer, or a number; got 'bn'"),
    (lambda: OFD(3, 5, margins=torch.zeros(3)), r"OFD needs a margin of at most 0 for each of the 5 teacher channels; got shape \(3,\), largest 0.0"),
    (lambda: OFD(3, 2, margins=torch.tensor([-1., .5])), r"at most 0 for each of the 2 teacher channels; got shape \(2,\), largest 0.5"),
    (lambda: OFD(3, 2, margins=float("nan")), "at most 0 for each of the 2 teacher channels; got shape .*, largest nan"),
    (lambda: OFD([3, 3], [2, 2], margins=torch.zeros(2)), "OFD needs one tensor of margins a layer; got 1 for 2"),
    (lambda: margin_from_batchnorm(nn.ReLU()), "margin_from_batchnorm needs a batch normalisation; got ReLU: measure with margin_from_maps instead"),
    (lambda: margin_from_maps(torch.zeros(3)), r"margin_from_maps needs responses of shape \(N, C, H, W\) or \(N, D\), floating point; got \(3,\), torch.float32"),
    (lambda: margin_from_maps(f4.long()), "floating point; got .* torch.int64"),
    (lambda: AB.from_features(f4, None), "AB needs teacher maps"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_given_and_what_is_needed(call, message):
    with pytest.raises(ValueError, match=message) as e:
        call()
    assert "\n" not in str(e.value)
