"""VID: values and gradients of other code, variances, what it ignores."""
from functools import partial
import math

from hypothesis import assume, given
from hypothesis import strategies as st
import pytest
import torch
import torch.nn.functional as F

from helpers import assert_same, assert_says, gen, made, many, randn, value_and_gradients
from relkd.losses.vid import VID

vid = partial(made, VID)
randn64 = partial(randn, dtype=torch.float64)
TOLERANCES = [(torch.float32, 5e-6), (torch.float64, 1e-12)]


def alpha_of(variance, eps=1e-5):
    x = variance - eps
    return x + torch.log(-torch.expm1(-x))


@st.composite
def maps(draw):
    n, cs, ct, h, w = (draw(st.integers(1, k)) for k in (4, 4, 4, 4, 4))
    seed = draw(st.integers(0, 10**6))
    return randn64(n, cs, h, w, seed=seed), randn64(n, ct, h, w, seed=seed + 1)


def theirs_of(loss, dtype):
    VIDLoss = pytest.importorskip("torchdistill.losses.mid_level").VIDLoss
    Regressor4VID = pytest.importorskip("torchdistill.models.wrapper").Regressor4VID

    regressors = []
    for r, a in zip(loss.regressors, loss.alphas):
        module = Regressor4VID(r[0].in_channels, r[0].out_channels, r[4].out_channels, 1e-5, 5.).to(dtype)
        module.regressor.load_state_dict(r.state_dict())
        torch.testing.assert_close(module.soft_plus_param.float(), vid(1, len(a)).alphas[0].detach())     # the same start
        module.soft_plus_param.data.copy_(a)
        regressors.append(module)
    pairs = {str(k): {role: {"io": "output", "path": str(k)} for role in ("student", "teacher")} for k in range(len(regressors))}
    return regressors, VIDLoss(pairs)


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_vid_is_torchdistills(dtype, tolerance):
    s = [randn64(6, c, k, k, seed=c, dtype=dtype) for c, k in ((3, 8), (5, 4), (4, 1))]
    t = [randn64(6, c, k, k, seed=c, dtype=dtype) for c, k in ((6, 8), (7, 4), (9, 1))]
    loss = vid([3, 5, 4], [6, 7, 9], mid_channels=[8, 7, 5], dtype=dtype)
    with torch.no_grad():
        for a in loss.alphas:
            a.add_(2 * randn64(len(a), dtype=dtype) - 2)
    regressors, criterion = theirs_of(loss, dtype)
    run = lambda *s: criterion({str(k): {"output": r(f)} for k, (r, f) in enumerate(zip(regressors, s))},
                               {str(k): {"output": f} for k, f in enumerate(t)})
    assert_same(value_and_gradients(lambda *s: loss(s, t), *s), value_and_gradients(run, *s), tolerance)
    loss(s, t).backward()
    run(*s).backward()
    for mine, a, r in zip(loss.regressors, loss.alphas, regressors):
        for x, y in zip([*mine.parameters(), a], [*r.regressor.parameters(), r.soft_plus_param]):
            assert (x.grad - y.grad).abs().max() <= 20 * tolerance * y.grad.abs().max()


@many
@given(maps())
def test_vid_is_pytorchs_gaussian_nll(pair):
    s, t = pair
    loss = vid(s.shape[1], t.shape[1], dtype=torch.float64)
    variance = loss.variances()[0].detach().view(1, -1, 1, 1).expand_as(t)
    torch.testing.assert_close(loss(s, t), F.gaussian_nll_loss(loss.regressors[0](s), t, variance), rtol=1e-10, atol=1e-12)


def test_vid_worked_on_paper():
    t, mu = torch.tensor([[[[1., 4.]], [[1., 1.]]]]), torch.tensor([[[[3., 4.]], [[1., 0.]]]])
    loss = VID(2, 2)
    with torch.no_grad():
        for conv in loss.regressors[0][::2]:
            conv.weight.copy_(torch.eye(2)[..., None, None])
        loss.alphas[0].copy_(alpha_of(torch.tensor([2., .5])))
    assert loss(mu, t).item() == pytest.approx(.5, abs=1e-6)
    loss.alphas[0].data.copy_(alpha_of(torch.ones(2)))
    assert loss(mu, t).item() == pytest.approx(.625, abs=1e-6)


@many
@given(maps())
def test_the_best_variance_is_the_mean_squared_error(pair):
    s, t = pair
    loss = vid(s.shape[1], t.shape[1], dtype=torch.float64)
    m = (loss.regressors[0](s) - t).pow(2).mean((0, 2, 3)).detach()
    assume(m.min() > 1e-4)
    loss.alphas[0].data.copy_(alpha_of(m))
    value = loss(s, t)
    g, = torch.autograd.grad(value, loss.alphas[0])
    assert g.abs().max() < 1e-8
    torch.testing.assert_close(value, .5 * (1 + m.log()).mean(), rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        for shift in (-.1, .1):
            loss.alphas[0].add_(shift)
            assert loss(s, t) > value
            loss.alphas[0].sub_(shift)


def test_an_optimiser_finds_the_errors_of_the_channels():
    t = torch.tensor([.03, .3, 1., 3.]).view(1, 4, 1, 1) * randn64(32, 4, 3, 3, dtype=torch.float32)
    loss, silent = VID(1, 4), torch.zeros(32, 1, 3, 3)
    opt = torch.optim.Adam(loss.alphas, lr=.1)
    for _ in range(300):
        opt.zero_grad()
        value = loss(silent, t)
        value.backward()
        opt.step()
    m = t.pow(2).mean((0, 2, 3))
    torch.testing.assert_close(loss.variances()[0].detach(), m, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(value.detach(), .5 * (1 + m.log()).mean(), rtol=1e-3, atol=1e-4)


@many
@given(maps())
def test_with_variance_1_vid_is_half_the_mean_squared_error(pair):
    s, t = pair
    loss = vid(s.shape[1], t.shape[1], init_variance=1.).double()
    torch.testing.assert_close(loss(s, t), F.mse_loss(loss.regressors[0](s), t) / 2, rtol=1e-5, atol=1e-6)


@many
@given(maps(), st.floats(.05, 20))
def test_vid_drifts_by_log_k_with_the_teachers_scale_and_pulls_the_same(pair, k):
    s, t = pair
    loss = vid(s.shape[1], t.shape[1], dtype=torch.float64)
    before, (g,) = value_and_gradients(lambda s: loss(s, t), s)
    with torch.no_grad():
        loss.alphas[0].copy_(alpha_of(k**2 * loss.variances()[0]))
        loss.regressors[0][4].weight.mul_(k)
    after, (h,) = value_and_gradients(lambda s: loss(s, k * t), s)
    torch.testing.assert_close(after, before + math.log(k), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(h, g, rtol=1e-6, atol=1e-9)


@many
@given(maps())
def test_vid_does_not_care_where_and_its_regressor_has_no_bias(pair):
    s, t = pair
    loss = vid(s.shape[1], t.shape[1], dtype=torch.float64)
    torch.testing.assert_close(loss(s.flip(3).flip(0), t.flip(3).flip(0)), loss(s, t))
    r = loss.regressors[0]
    torch.testing.assert_close(r(3 * s), 3 * r(s))
    assert r(0 * s).abs().max() == 0
    variance = loss.variances()[0]
    torch.testing.assert_close(loss(0 * s, t), .5 * (t.pow(2).mean((0, 2, 3)) / variance + variance.log()).mean())


def test_vid_pools_before_the_regressor_and_an_embedding_is_one_position():
    s, t, loss = randn64(3, 4, 8, 6), randn64(3, 5, 4, 6, seed=1), vid(4, 5, dtype=torch.float64)
    torch.testing.assert_close(loss(s, t), loss(F.adaptive_avg_pool2d(s, (4, 6)), t))
    e, f = s[..., 0, 0], t[..., 0, 0]
    torch.testing.assert_close(loss(e, f), loss(e[..., None, None], f[..., None, None]))
    wide = loss(e[..., None, None].expand(3, 4, 2, 2), f[..., None, None].expand(3, 5, 2, 2))      # through the convolutions
    torch.testing.assert_close(loss(e, f), wide)


def test_a_list_is_the_sum_over_its_layers():
    s, t = [randn64(4, 3, 4, 4), randn64(4, 5)], [randn64(4, 6, 2, 2, seed=1), randn64(4, 7, seed=1)]
    loss = vid([3, 5], [6, 7], dtype=torch.float64)
    one = [VID(3, 6).double(), VID(5, 7).double()]
    for a, r, alpha in zip(one, loss.regressors, loss.alphas):
        a.regressors[0].load_state_dict(r.state_dict())
        a.alphas[0].data.copy_(alpha)
    torch.testing.assert_close(loss(s, t), one[0](s[0], t[0]) + one[1](s[1], t[1]))


def test_the_variance_neither_overflows_nor_vanishes():
    s, t = torch.rand(4, 2, 3, 3, generator=gen(0)), 20 * randn64(4, 3, 3, 3, dtype=torch.float32)
    loss = vid(2, 3)
    by_hand = lambda a: torch.log(1 + torch.exp(a)) + 1e-5
    for a, variance in ((100., 100.), (1e4, 1e4), (-100., 1e-5), (-1e4, 1e-5)):
        loss.alphas[0].data.fill_(a)
        loss.zero_grad()
        value = loss(s, t)
        value.backward()
        assert value.isfinite() and all(p.grad.isfinite().all() for p in loss.parameters())
        assert loss.variances()[0].detach().tolist() == pytest.approx([variance] * 3)
    a = torch.full((3,), 100.).requires_grad_()
    by_hand(a).log().sum().backward()
    assert a.grad.isnan().all()                                                          # what softplus is for


@pytest.mark.parametrize("init", [1e-3, .5, 5., 100., 1e4])
def test_the_initial_variance_is_what_was_asked_for(init):
    torch.testing.assert_close(VID(2, 3, init_variance=init).variances()[0], torch.full((3,), init), rtol=1e-4, atol=0)


def test_a_perfect_prediction_stops_at_the_floor():
    loss = VID(1, 4)
    loss.alphas[0].data.fill_(-1e3)
    s, t = torch.zeros(8, 1, 2, 2), torch.zeros(8, 4, 2, 2)
    assert loss(s, t).item() == pytest.approx(.5 * math.log(1e-5))
    assert VID(1, 4, eps=1e-2).variances()[0].min() >= 1e-2


def test_noise_channels_get_a_large_variance_and_stop_pulling():
    """Of 8 teacher channels 4 are a linear map of the student's, 4 are noise."""
    s = randn64(256, 6, dtype=torch.float32)
    t = torch.cat([(s @ randn64(6, 4, seed=1, dtype=torch.float32)), 3 * randn64(256, 4, seed=2, dtype=torch.float32)], 1)
    loss = vid(6, 8, mid_channels=32)
    opt = torch.optim.Adam([{"params": loss.regressors.parameters()}, {"params": loss.alphas, "lr": .1}], lr=.01)
    for _ in range(200):
        opt.zero_grad()
        loss(s, t).backward()
        opt.step()
    v = loss.variances()[0].detach()
    assert v[4:].min() > 30 * v[:4].max()
    error = (loss.regressors[0](s[..., None, None])[..., 0, 0] - t).detach()
    share = lambda pull: pull.pow(2).sum(0)[4:].sum() / pull.pow(2).sum()
    assert share(error / v) < .1 and share(error) > .9

f4, e2 = torch.rand(4, 3, 2, 2), torch.rand(4, 3)


ERRORS = [
    (lambda: VID(3, 5)(f4, f4), "VID was made for 3 student and 5 teacher channels; got 3 and 3: "
                                "VID.from_features reads them from an example"),
    (lambda: VID(3, 3)([f4, f4], [f4, f4]), r"VID was made for 1 layer\(s\); got 2"),
    (lambda: VID([3, 3], 3), r"VID needs as many in_channels as out_channels \(and mid_channels\), each at least 1; "
                             r"got \[3, 3\] and 3 \(and None\)"),
    (lambda: VID(3, 3, mid_channels=[4, 4]), r"got 3 and 3 \(and \[4, 4\]\)"),
    (lambda: VID(3, 3, mid_channels=0), r"got 3 and 3 \(and 0\)"),
    (lambda: VID([], []), "each at least 1"),
    (lambda: VID(3, 3, init_variance=0), "VID needs 0 < eps < init_variance; got eps = 1e-05 and init_variance = 0"),
    (lambda: VID(3, 3, eps=0), "got eps = 0 and init_variance = 5.0"),
    (lambda: VID.from_features(f4, None), "VID needs teacher maps"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_given_and_what_is_needed(call, message):
    assert_says(call, message)
