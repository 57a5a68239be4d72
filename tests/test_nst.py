"""NST: values and gradients of the usual code, its kernels, what it ignores."""
import math

from hypothesis import given
from hypothesis import strategies as st
import pytest
import torch
import torch.nn.functional as F

from helpers import assert_same, assert_says, gen, many, value_and_gradients
from relkd.losses.at import AT
from relkd.losses.crd import CRD
from relkd.losses.nst import NST, selectivity

TOLERANCES = [(torch.float32, 5e-6), (torch.float64, 1e-12)]


def usual_nst(s, t, kernel=lambda d: d.pow(2)):
    """As circulating code has it: every product of every pair of channels."""
    x, y = (F.normalize(f.flatten(2), dim=2) for f in (s, t))
    k = lambda a, b: kernel((a[:, None] * b[:, :, None]).sum(-1)).mean()
    return k(x, x) + k(y, y) - 2 * k(x, y)


@st.composite
def maps(draw, same_size=True):
    n, cs, ct, h, w = (*(draw(st.integers(1, 5)) for _ in range(4)), draw(st.integers(2, 5)))
    ht, wt = (h, w) if same_size else (draw(st.integers(1, 8)), draw(st.integers(2, 8)))
    g, size = gen(draw(st.integers(0, 10**6))), 10 ** draw(st.floats(-2, 2))
    return torch.randn(n, cs, h, w, generator=g, dtype=torch.float64) * size, torch.randn(n, ct, ht, wt, generator=g, dtype=torch.float64)

KERNELS = [NST(), NST("linear"), NST("gaussian"), NST("gaussian", sigma2=.7), NST(degree=3, c=.5)]

kernels = pytest.mark.parametrize("loss", KERNELS, ids=["polynomial", "linear", "gaussian", "gaussian, fixed width", "cubic"])


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("cs, ct, side", [(3, 5, 2), (16, 24, 3), (3, 5, 7)])
def test_nst_is_the_usual_code(dtype, tolerance, cs, ct, side):
    s, t = torch.randn(4, cs, side, side, generator=gen(0), dtype=dtype), torch.randn(4, ct, side, side, generator=gen(1), dtype=dtype)
    for loss, kernel in ((NST(), lambda d: d**2), (NST("linear"), lambda d: d), (NST(degree=3, c=.5), lambda d: (d + .5)**3),
                         (NST("gaussian", sigma2=.7), lambda d: ((d - 1) / .7).exp())):
        assert_same(value_and_gradients(lambda s: loss(s, t), s), value_and_gradients(lambda s: usual_nst(s, t, kernel), s), 10 * tolerance)


def test_torchdistill_has_no_nst():
    """Hence the comparison with the usual lines above."""
    theirs = pytest.importorskip("torchdistill.losses.mid_level")

    assert not [n for n in dir(theirs) if "nst" in n.lower().split("loss") or "selectivity" in n.lower()]


def test_nst_worked_on_paper():
    t, s = torch.tensor([[[[3., 4.]], [[0., 2.]]]]), torch.tensor([[[[5., 0.]]]])
    width = 1.4                                                         # the mean of .8 and 2
    gaussian = 1 + (1 + math.exp(-.4 / 2 / width)) / 2 - math.exp(-.8 / 2 / width) - math.exp(-2 / 2 / width)
    for loss, value in ((NST(), 1.46), (NST("linear"), 1.3), (NST("gaussian"), gaussian), (NST(teacher_term=False), .64)):
        assert loss(s, t).item() == pytest.approx(value, rel=1e-6)


@kernels
@many
@given(pair=maps(), scale=st.floats(1e-2, 1e2))
def test_nst_is_blind_to_order_number_and_scale_of_channels_and_to_common_moves(loss, pair, scale):
    s, t = pair
    base, g, c = loss(s, t), gen(s.shape[1]), s.shape[1]
    order, sizes = torch.randperm(s[0, 0].numel(), generator=g), scale * torch.rand(c, 1, 1, generator=g, dtype=s.dtype) + scale
    move = lambda f: f.flatten(2)[:, :, order].view_as(f)
    for a, b in ((s[:, torch.randperm(c, generator=g)], t), (torch.cat([s, s], 1), t), (sizes * s, t), (s, scale * t), (move(s), move(t))):
        torch.testing.assert_close(loss(a, b), base, rtol=1e-8, atol=1e-12)
    assert base >= -1e-12 and loss(t, t).abs() < 1e-12 and loss(torch.cat([t, t.flip(1)], 1), t).abs() < 1e-12


@many
@given(maps(), st.integers(0, 10**6))
def test_nst_of_an_even_kernel_is_blind_to_signs_and_at_most_two(pair, seed):
    s, t = pair
    signs = torch.randint(0, 2, (s.shape[1], 1, 1), generator=gen(seed)) * 2. - 1
    torch.testing.assert_close(NST()(signs * s, t), NST()(s, t), rtol=1e-9, atol=1e-13)
    assert NST()(s, t) <= 2 + 1e-12 and NST("linear")(s, t) <= 4 + 1e-12
    sign = torch.tensor([[[[1., 2.]]]])
    assert NST("linear")(-sign, sign).item() == pytest.approx(4) and NST()(-sign, sign).item() == pytest.approx(0)


@many
@given(maps(same_size=False))
def test_nst_by_positions_and_by_channels_agree(pair):
    """The class takes whichever is cheaper for c = 0; any other c goes through the channels' inner products."""
    s, t = pair
    other = NST(c=1e-300)
    torch.testing.assert_close(NST()(s, t), other(s, t), rtol=1e-9, atol=1e-12)


@many
@given(maps())
def test_nst_kernels_meet(pair):
    s, t = pair
    linear = NST("linear")(s, t)
    torch.testing.assert_close(1e4 * NST("gaussian", sigma2=1e4)(s, t), linear, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(NST(c=.5)(s, t), NST()(s, t) + linear, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(NST(degree=1)(s, t), linear, rtol=1e-8, atol=1e-12)


def test_linear_nst_and_at_share_a_cosine():
    a, b = (selectivity(torch.rand(4, c, 3, 2, generator=gen(c), dtype=torch.float64)).view(4, c, 3, 2) for c in (3, 5))
    p, q = a.flatten(2).mean(1), b.flatten(2).mean(1)
    cos = 1 - 3 * torch.stack([AT(p=1)(a[i:i + 1], b[i:i + 1]) for i in range(4)])
    torch.testing.assert_close(NST("linear")(a, b), (p.norm(dim=1)**2 + q.norm(dim=1)**2 - 2 * p.norm(dim=1) * q.norm(dim=1) * cos).mean())


def test_the_polynomial_kernel_is_not_characteristic():
    def angle(*degrees):
        a = torch.tensor(degrees).double().deg2rad()
        return torch.stack([a.cos(), a.sin()], 1)[None, :, None]
    s, t = angle(0, 90, 45, 45), angle(15, 75)
    value, (g,) = value_and_gradients(lambda s: NST()(s, t), s)
    assert value < 1e-30 and g.abs().max() < 1e-15 and NST("gaussian")(s, t) > 1e-3 and NST("linear")(s, t) > 1e-4


def test_selectivity_is_a_sign_without_positions():
    """Hence NST refuses such maps: a sign has no gradient."""
    value, (g,) = value_and_gradients(lambda f: selectivity(f).sum(), torch.randn(4, 5, 1, 1, generator=gen(0)))
    assert value == selectivity(torch.randn(4, 5, 1, 1, generator=gen(0))).sign().sum() and g.abs().max() < 1e-6


def test_no_gradient_through_the_gaussian_width():
    s, t = torch.randn(1, 3, 2, 2, generator=gen(0), dtype=torch.float64), torch.randn(1, 4, 2, 2, generator=gen(1), dtype=torch.float64)
    x, y = selectivity(s), selectivity(t)
    width = (2 - 2 * x @ y.mT).mean().item()
    assert_same(value_and_gradients(lambda s: NST("gaussian")(s, t), s),
                value_and_gradients(lambda s: NST("gaussian", sigma2=width)(s, t), s), 1e-12)
    assert NST("gaussian")(s[:, :1], s[:, :1]).item() == 0                 # a width of 0


@pytest.mark.parametrize("loss", [NST("linear"), NST("gaussian", sigma2=1.)])
def test_a_silent_channel_gets_no_gradient_where_usual_code_gets_an_enormous_one(loss):
    base, t = torch.rand(2, 3, 4, 4, generator=gen(0)), torch.rand(2, 5, 4, 4, generator=gen(1))
    base[:, 0] = 0
    _, (g,) = value_and_gradients(lambda s: loss(s, t), base)
    assert g[:, 0].abs().max() == 0 and g.abs().max() < 1
    assert value_and_gradients(lambda s: usual_nst(s, t, lambda d: d), base)[1][0].abs().max() > 1e9
    both = selectivity(torch.tensor([[[[0., 0.]], [[3., 4.]], [[1e-9, 0.]]]]))
    torch.testing.assert_close(both, torch.tensor([[[0., 0.], [.6, .8], [0., 0.]]]))


def test_nst_sums_layers_and_pools_to_the_smaller_side():
    s = [torch.randn(2, 3, k, k, generator=gen(k)) for k in (8, 4)]
    t = [torch.randn(2, 5, k, k, generator=gen(k)) for k in (8, 4)]
    torch.testing.assert_close(NST()(s, t), NST()(s[0], t[0]) + NST()(s[1], t[1]))
    torch.testing.assert_close(NST()(s[0][..., :4], t[0]), NST()(s[0][..., :4], F.adaptive_avg_pool2d(t[0], (8, 4))))
    assert not list(NST().parameters()) and not NST().state_dict()
    assert repr(NST()) == "NST('polynomial', degree=2, c=0, teacher_term=True)"


def pair(n, seed=0, dtype=torch.float32, ds=5, dt=7):
    return torch.randn(n, ds, generator=gen(seed), dtype=dtype), torch.randn(n, dt, generator=gen(seed + 100), dtype=dtype)


def call(loss, *args, **more):
    return lambda s, *p: torch.func.functional_call(loss, dict(zip([n for n, _ in loss.named_parameters()], p)), (s, *args), more)

f4, e2, small = torch.rand(4, 3, 2, 2), torch.rand(4, 3), CRD(3, 5, 20, 4, 6)


ERRORS = [
    (lambda: NST("rbf"), "NST knows the kernels 'linear', 'polynomial' and 'gaussian'; got 'rbf'"),
    (lambda: NST(degree=0), "NST needs a whole degree of at least 1 and c of at least 0; got degree = 0 and c = 0.0"),
    (lambda: NST(degree=2.5), "got degree = 2.5"),
    (lambda: NST(c=-1), "got degree = 2 and c = -1"),
    (lambda: NST("gaussian", sigma2=0), "NST needs sigma2 above 0, or None; got 0"),
    (lambda: NST()(e2, f4), r"NST needs student maps of shape \(N, C, H, W\), floating point; "
                            r"got \(4, 3\), torch.float32: take a layer before the pooling"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_given_and_what_is_needed(call, message):
    assert_says(call, message)
