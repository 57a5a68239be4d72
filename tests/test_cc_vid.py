"""CC and VID: values and gradients of other code, what they ignore, precision, errors."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import assert_same, DTYPES, gen, learned, value_and_gradients
from relkd.losses.cc import CC, correlation
from relkd.losses.vid import VID
from relkd.losses.contract import as_map_pairs
from relkd.relations import pdist

many = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TOLERANCES = [(torch.float32, 5e-6), (torch.float64, 1e-12)]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=gen(seed), dtype=dtype)


def vid(i, o, seed=0, dtype=torch.float32, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VID(i, o, **options).to(dtype)


def alpha_of(variance, eps=1e-5):
    x = variance - eps
    return x + torch.log(-torch.expm1(-x))


@st.composite
def embeddings(draw):
    """Student and teacher embeddings in float64, of different dimensions and sizes."""
    n, ds, dt = draw(st.integers(2, 9)), draw(st.integers(2, 6)), draw(st.integers(2, 6))
    seed, size = draw(st.integers(0, 10**6)), 10 ** draw(st.floats(-2, 2))
    return size * randn(n, ds, seed=seed), randn(n, dt, seed=seed + 1)


@st.composite
def maps(draw):
    n, cs, ct, h, w = (draw(st.integers(1, k)) for k in (4, 4, 4, 4, 4))
    seed = draw(st.integers(0, 10**6))
    return randn(n, cs, h, w, seed=seed), randn(n, ct, h, w, seed=seed + 1)


# ---- CC against other code

@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("kernel", ["gaussian", "bilinear"])
@pytest.mark.parametrize("reduction, factor", [("batchmean", 1 / 7), ("sum", 7)])
def test_torchdistills_cckd_is_the_root_of_cc_without_unit_length(kernel, reduction, factor, dtype, tolerance):
    """Its embeddings are not normalised, and it returns the length of the difference, over N^2: sqrt(CC) / N, exactly."""
    from torchdistill.losses.mid_level import CCKDLoss

    s, t = randn(7, 5, dtype=dtype), randn(7, 6, seed=1, dtype=dtype)
    theirs = CCKDLoss("fc", "fc", {"type": kernel, "gamma": .4, "max_p": 2}, reduction)
    mine = CC(kernel, normalise=False)
    io = lambda e: {"fc": {"output": e}}
    assert_same(value_and_gradients(lambda s: factor * mine(s, t).sqrt(), s), value_and_gradients(lambda s: theirs(io(s), io(t)), s), tolerance)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_torchdistills_kernel_on_unit_vectors_is_ours(order):
    from torchdistill.losses.mid_level import CCKDLoss

    e = randn(7, 5)
    theirs = CCKDLoss("fc", "fc", {"type": "gaussian", "gamma": .4, "max_p": order}, "sum")
    torch.testing.assert_close(correlation(e, order=order), theirs.compute_cc_mat_by_gaussian_rbf(F.normalize(e)))


def written_out(s, t, gamma, order):
    def matrix(e):
        c = F.cosine_similarity(e[:, None], e[None], dim=2)
        return sum(math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * c**p for p in range(order + 1))
    return F.mse_loss(matrix(s), matrix(t))


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("gamma, order", [(.4, 1), (.4, 2), (2, 3), (.1, 7)])
def test_cc_is_the_series_written_out(gamma, order, dtype, tolerance):
    s, t = randn(8, 5, dtype=dtype), randn(8, 11, seed=1, dtype=dtype)
    assert_same(value_and_gradients(lambda s: CC(gamma=gamma, order=order)(s, t), s), value_and_gradients(lambda s: written_out(s, t, gamma, order), s), 4 * tolerance)


def test_cc_worked_on_paper():
    s, t = torch.tensor([[3., 4.], [1., 0.], [0., 2.]]), torch.tensor([[2., 0., 0.], [0., 1., 0.], [0., 0., 5.]])
    assert CC("bilinear")(s, t).item() == pytest.approx(2 / 9)
    assert CC(gamma=.5)(s, t).item() == pytest.approx(2 * (.78**2 + 1.12**2) / 9 / math.e**2)
    assert CC("mmd")(s, t).item() == pytest.approx(2 * ((2**.5 - .8**.5) ** 2 + (2**.5 - .4**.5) ** 2) / 9)


# ---- what CC ignores, and its limits

KERNELS = [dict(), dict(order=None), dict(gamma=2., order=5), dict(kernel="bilinear"), dict(kernel="mmd")]
kernel_ids = ["gaussian", "exact", "order5", "bilinear", "mmd"]


@many
@given(embeddings(), st.sampled_from(KERNELS))
def test_cc_is_blind_to_rotation_and_to_the_length_of_every_sample(pair, options):
    s, t = pair
    loss, n = CC(**options), len(s)
    q, _ = torch.linalg.qr(randn(s.shape[1], s.shape[1], seed=n))
    lengths, perm = 10 ** torch.linspace(-1, 1, n, dtype=torch.float64)[:, None], torch.randperm(n, generator=gen(n))
    for a, b in ((s @ q, t), (lengths * s, t), (s, lengths * t), (F.pad(s, (0, 2)), t), (s[perm], t[perm])):
        torch.testing.assert_close(loss(a, b), loss(s, t), rtol=1e-8, atol=1e-12)
    assert loss(lengths * t, t) < 1e-12


@many
@given(embeddings(), st.sampled_from(KERNELS))
def test_cc_has_no_gradient_along_an_embedding(pair, options):
    s, t = pair
    _, (g,) = value_and_gradients(lambda s: CC(**options)(s, t), s)
    assert (g * s).sum(1).abs().max() < 1e-10


def test_cc_sees_a_shift_and_the_students_order():
    s, t = randn(8, 5), randn(8, 6, seed=1)
    assert abs(CC()(s + 1, t) / CC()(s, t) - 1) > .1 and abs(CC()(s.roll(1, 0), t) / CC()(s, t) - 1) > .01


@many
@given(embeddings(), st.floats(.01, 3))
def test_cc_of_order_1_is_a_multiple_of_the_bilinear_loss(pair, gamma):
    torch.testing.assert_close(CC(gamma=gamma, order=1)(*pair), (2 * gamma * math.exp(-2 * gamma)) ** 2 * CC("bilinear")(*pair), rtol=1e-9, atol=1e-15)


@many
@given(embeddings(), st.floats(.01, 2))
def test_cc_of_large_order_is_the_gaussian_of_the_distances(pair, gamma):
    exact = [torch.exp(-gamma * torch.cdist(u, u, compute_mode="donot_use_mm_for_euclid_dist") ** 2) for u in map(F.normalize, pair)]
    expected = (exact[0] - exact[1]).pow(2).mean()
    for order in (30, None):
        torch.testing.assert_close(CC(gamma=gamma, order=order)(*pair), expected, rtol=1e-6, atol=1e-12)
    unnormalised = [torch.exp(-gamma * pdist(e, squared=True)) for e in pair]
    torch.testing.assert_close(CC(gamma=gamma, order=None, normalise=False)(*pair), (unnormalised[0] - unnormalised[1]).pow(2).mean())


@many
@given(embeddings())
def test_the_squared_distance_is_the_bilinear_kernel_in_disguise(pair):
    a, b = (correlation(e, "mmd") ** 2 for e in pair)
    torch.testing.assert_close((a - b).pow(2).mean(), 4 * CC("bilinear")(*pair), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("gamma, monotone", [(.1, True), (.4, True), (.5, True), (.51, False), (2, False)])
def test_order_2_turns_round_beyond_one_half(gamma, monotone):
    angle = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    row = correlation(torch.stack([angle.cos(), angle.sin()], 1), gamma=gamma)[0]        # cosine falling from 1 to -1
    assert bool((row.diff() <= 1e-15).all()) is monotone
    assert (correlation(torch.stack([angle.cos(), angle.sin()], 1), gamma=gamma, order=None)[0].diff() <= 0).all()


@many
@given(embeddings())
def test_cc_is_bounded_and_its_diagonal_says_nothing(pair):
    ends = correlation(torch.tensor([[1., 0.], [-1., 0.]], dtype=torch.float64))[0]
    n = len(pair[0])
    value = CC()(*pair)
    assert 0 <= value <= (ends[0] - ends[1]) ** 2 * (n - 1) / n + 1e-12
    gap2 = (correlation(pair[0]) - correlation(pair[1])) ** 2
    assert gap2.diagonal().max() < 1e-20
    torch.testing.assert_close(value, gap2[~torch.eye(n, dtype=torch.bool)].mean() * (n - 1) / n)


def test_cc_flattens_maps():
    s, t = randn(4, 3, 2, 2), randn(4, 5, 3, 3, seed=1)
    assert torch.equal(CC()(s, t), CC()(s.flatten(1), t.flatten(1)))


def test_the_namesake_of_neighbours_depends_on_the_order_and_cc_does_not():
    """The notebook's claim about RepDistiller's lines: order, and a loss of 0 with every other sample right."""
    gap = lambda s, t: (s - t).abs()
    neighbours = lambda s, t: (gap(s, t)[:-1] * gap(s, t)[1:]).sum(1).mean()
    s, t = randn(8, 5), randn(8, 5, seed=1)
    perm = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    assert abs(neighbours(s[perm], t[perm]) / neighbours(s, t) - 1) > .01
    torch.testing.assert_close(CC()(s[perm], t[perm]), CC()(s, t))
    half = torch.where((torch.arange(8) % 2 == 0)[:, None], t, 100 * s)
    assert neighbours(half, t) == 0 and CC()(half, t) > 1e-3


# ---- VID against other code

def theirs_of(loss, dtype):
    from torchdistill.losses.mid_level import VIDLoss
    from torchdistill.models.wrapper import Regressor4VID

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
    s = [randn(6, c, k, k, seed=c, dtype=dtype) for c, k in ((3, 8), (5, 4), (4, 1))]
    t = [randn(6, c, k, k, seed=c, dtype=dtype) for c, k in ((6, 8), (7, 4), (9, 1))]
    loss = vid([3, 5, 4], [6, 7, 9], mid_channels=[8, 7, 5], dtype=dtype)
    with torch.no_grad():
        for a in loss.alphas:
            a.add_(2 * randn(len(a), dtype=dtype) - 2)
    regressors, criterion = theirs_of(loss, dtype)
    run = lambda *s: criterion({str(k): {"output": r(f)} for k, (r, f) in enumerate(zip(regressors, s))}, {str(k): {"output": f} for k, f in enumerate(t)})
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


# ---- what VID ignores, and its limits

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
    t = torch.tensor([.03, .3, 1., 3.]).view(1, 4, 1, 1) * randn(32, 4, 3, 3, dtype=torch.float32)
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
    s, t, loss = randn(3, 4, 8, 6), randn(3, 5, 4, 6, seed=1), vid(4, 5, dtype=torch.float64)
    torch.testing.assert_close(loss(s, t), loss(F.adaptive_avg_pool2d(s, (4, 6)), t))
    e, f = s[..., 0, 0], t[..., 0, 0]
    torch.testing.assert_close(loss(e, f), loss(e[..., None, None], f[..., None, None]))
    wide = loss(e[..., None, None].expand(3, 4, 2, 2), f[..., None, None].expand(3, 5, 2, 2))      # through the convolutions
    torch.testing.assert_close(loss(e, f), wide)


def test_a_list_is_the_sum_over_its_layers():
    s, t = [randn(4, 3, 4, 4), randn(4, 5)], [randn(4, 6, 2, 2, seed=1), randn(4, 7, seed=1)]
    loss = vid([3, 5], [6, 7], dtype=torch.float64)
    one = [VID(3, 6).double(), VID(5, 7).double()]
    for a, r, alpha in zip(one, loss.regressors, loss.alphas):
        a.regressors[0].load_state_dict(r.state_dict())
        a.alphas[0].data.copy_(alpha)
    torch.testing.assert_close(loss(s, t), one[0](s[0], t[0]) + one[1](s[1], t[1]))


def test_the_variance_neither_overflows_nor_vanishes():
    s, t = torch.rand(4, 2, 3, 3, generator=gen(0)), 20 * randn(4, 3, 3, 3, dtype=torch.float32)
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
    s = randn(256, 6, dtype=torch.float32)
    t = torch.cat([(s @ randn(6, 4, seed=1, dtype=torch.float32)), 3 * randn(256, 4, seed=2, dtype=torch.float32)], 1)
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


# ---- gradients, precision, zeros

LOSSES = [CC(**o) for o in KERNELS] + [CC(normalise=False), vid(4, 3)]
ids = kernel_ids + ["raw", "VID"]


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@pytest.mark.parametrize("shapes", [((5, 4), (5, 3)), ((3, 4, 2, 2), (3, 3, 3, 3))], ids=["embeddings", "maps"])
def test_gradcheck_and_no_gradient_for_the_teacher(loss, shapes):
    loss = copy.deepcopy(loss).double()
    s, t = randn(*shapes[0]).requires_grad_(), randn(*shapes[1], seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, t), (s,))
    loss(s, t).backward()
    assert t.grad is None and s.grad is not None and all(p.grad is not None for p in loss.parameters())


def test_gradcheck_of_vids_parameters():
    loss, s, t = vid(2, 3, dtype=torch.float64), randn(3, 2, 2, 2), randn(3, 3, 2, 2, seed=1)
    names = [n for n, _ in loss.named_parameters()]
    call = lambda *p: torch.func.functional_call(loss, dict(zip(names, p)), (s, t))
    assert torch.autograd.gradcheck(call, [p.detach().clone().requires_grad_() for p in loss.parameters()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_finite_on_zeros_duplicates_and_extremes_in_every_precision(loss, dtype):
    t = randn(8, 3, seed=1, dtype=torch.float32)
    base = randn(8, 4, dtype=torch.float32)
    raw = loss is LOSSES[5]
    cases = [base, 0 * base, base * (torch.arange(8) > 1)[:, None], base[:1].expand(8, 4), base[[0, 0, 1, 1, 2, 2, 3, 3]], base + 1e-4, 1e-4 * base]
    for e in cases + ([] if raw else [1e4 * base]):
        for teacher in (t, 0 * t, t[:1].expand(8, 3)):
            e = e.detach().to(dtype).requires_grad_()
            value = loss(e, teacher.to(dtype))
            value.backward()
            assert value.isfinite() and e.grad.isfinite().all() and e.grad.abs().max() < 1e5
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("options", KERNELS, ids=kernel_ids)
@pytest.mark.parametrize("size", [1e-4, 1e4, 1e15])
def test_cc_over_the_range_of_float32(options, size):
    s, t = randn(8, 4, dtype=torch.float32), randn(8, 3, seed=1, dtype=torch.float32)
    torch.testing.assert_close(CC(**options)(size * s, t), CC(**options)(s, t), rtol=1e-4, atol=1e-7)


def test_a_silent_sample_gets_no_gradient():
    s, t = randn(8, 4, dtype=torch.float32) * (torch.arange(8) > 0)[:, None], randn(8, 3, seed=1, dtype=torch.float32)
    for options in KERNELS:
        _, (g,) = value_and_gradients(lambda s: CC(**options)(s, t), s)
        assert g[0].abs().max() == 0 and g[1:].abs().max() > 0
    unguarded = lambda s: F.mse_loss(F.normalize(s) @ F.normalize(s).T, F.normalize(t) @ F.normalize(t).T)
    assert value_and_gradients(unguarded, s)[1][0].abs().max() > 1e8


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_autocast_changes_nothing(loss):
    s, t = randn(4, 4, 8, 8, dtype=torch.float32), randn(4, 3, 4, 4, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(s, t)
    assert inside.dtype == torch.float32 and torch.equal(inside, loss(s, t))


def test_precisions_mix_upwards():
    s, t = randn(4, 3, dtype=torch.float32), randn(4, 5, seed=1, dtype=torch.float32)
    for loss in (CC(), CC("mmd"), vid(3, 5)):
        assert loss(s.half(), t).dtype == torch.float32 and loss(s, t.double()).dtype == loss(s.double(), t).dtype == torch.float64
    assert vid(3, 5, dtype=torch.float64)(s, t).dtype == torch.float64 and vid(3, 5, dtype=torch.float16)(s.half(), t.half()).dtype == torch.float32


# ---- as modules

@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@pytest.mark.parametrize("shapes", [((6, 4), (6, 3)), ((6, 4, 4, 4), (6, 3, 2, 2))], ids=["embeddings", "maps"])
def test_compiles_to_the_same(loss, shapes):
    torch._dynamo.reset()
    loss = copy.deepcopy(loss)
    s, t = randn(*shapes[0], dtype=torch.float32), randn(*shapes[1], seed=1, dtype=torch.float32)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (a, (ga,)), (b, (gb,)) = (value_and_gradients(lambda s: f(s, t), s) for f in (compiled, loss))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(ga, gb)


def test_from_features_reads_the_sizes_and_state_dict_makes_the_round_trip():
    s, t = [torch.randn(2, 3, 8, 8), torch.randn(2, 5)], [torch.randn(2, 6, 4, 4), torch.randn(2, 7)]
    loss = VID.from_features(s, t, mid_channels=4, init_variance=2.)
    assert [tuple(p.shape) for p in loss.parameters()] == [(4, 3, 1, 1), (4, 4, 1, 1), (6, 4, 1, 1), (4, 5, 1, 1), (4, 4, 1, 1), (7, 4, 1, 1), (6,), (7,)]
    other = VID([3, 5], [6, 7], mid_channels=4)
    assert other(s, t) != loss(s, t)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(s, t), loss(s, t))
    single = VID.from_features(s[0], t[0])
    assert list(single.state_dict()) == ["regressors.0.0.weight", "regressors.0.2.weight", "regressors.0.4.weight", "alphas.0"]
    assert single.regressors[0][0].out_channels == 6 and single(s[0], t[0]).dim() == 0
    assert not list(CC().parameters()) and not CC().state_dict()
    assert repr(CC()) == "CC(kernel='gaussian', gamma=0.4, order=2)" and repr(CC("mmd", normalise=False)) == "CC(kernel='mmd', normalise=False)"
    assert "eps=1e-05" in repr(single)


@pytest.mark.parametrize("options", KERNELS, ids=kernel_ids)
def test_a_student_learns_the_teachers_correlations(options):
    x, loss = randn(64, 8, dtype=torch.float32), CC(**options)
    t = torch.tanh(x @ randn(8, 32, seed=1, dtype=torch.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 16))
    first, last = learned(loss, student, x, t, 150)
    assert last < .1 * first


def test_a_student_and_vid_learn_together():
    x = randn(128, 1, 6, 6, dtype=torch.float32)
    t = F.conv2d(x, randn(5, 1, 3, 3, seed=1, dtype=torch.float32), padding=1).relu()
    w, loss = (.3 * randn(4, 1, 3, 3, seed=2, dtype=torch.float32)).requires_grad_(), vid(4, 5, mid_channels=8)
    opt = torch.optim.Adam([w, *loss.parameters()], lr=.05)
    values = []
    for _ in range(150):
        opt.zero_grad()
        value = loss(F.conv2d(x, w, padding=1).relu(), t)
        value.backward()
        opt.step()
        values.append(value.item())
    assert values[-1] < values[0] - .5
    m = (loss.regressors[0](F.conv2d(x, w, padding=1).relu()) - t).pow(2).mean().item()
    assert m < .5 * t.var().item()


# ---- errors

f4, e2 = torch.rand(4, 3, 2, 2), torch.rand(4, 3)
ERRORS = [
    (lambda: CC("rbf"), "CC needs the kernel 'gaussian', 'bilinear' or 'mmd'; got 'rbf'"),
    (lambda: CC(gamma=0), "CC needs a positive gamma; got gamma = 0"),
    (lambda: CC(gamma=float("nan")), "CC needs a positive gamma; got gamma = nan"),
    (lambda: CC(order=0), "CC needs a whole order of at least 1, or None for the exact kernel; got order = 0"),
    (lambda: CC(order=2.5), "got order = 2.5"),
    (lambda: CC()(e2[:1], e2[:1]), "CC needs at least 2 samples in a batch; got N = 1: use a larger batch, or drop_last=True"),
    (lambda: CC()(e2, e2[:3]), "CC needs student and teacher embeddings of the same samples; got N = 4 and N = 3"),
    (lambda: CC()(e2[0], e2), r"student must have shape \(N, D\); got \(3,\)"),
    (lambda: CC()(e2, e2.long()), "teacher must be floating point; got torch.int64"),
    (lambda: CC()(e2, None), r"teacher must be a tensor of shape \(N, D\); got NoneType"),
    (lambda: correlation(f4), r"embeddings must have shape \(N, D\); got \(4, 3, 2, 2\)"),
    (lambda: correlation(e2, kernel="mmd2"), "got 'mmd2'"),
    (lambda: VID(3, 5)(f4, e2), r"VID needs student and teacher maps of the same samples, none empty; got \(4, 3, 2, 2\) and \(4, 3\)"),
    (lambda: VID(3, 5)(f4[0], f4), r"VID needs student maps of shape \(N, C, H, W\) or \(N, D\), floating point; got \(3, 2, 2\), torch.float32"),
    (lambda: VID(3, 5)(f4, f4), "VID was made for 3 student and 5 teacher channels; got 3 and 3: VID.from_features reads them from an example"),
    (lambda: VID(3, 3)([f4, f4], [f4, f4]), r"VID was made for 1 layer\(s\); got 2"),
    (lambda: VID(3, 3)(f4, f4[:2]), "of the same samples"),
    (lambda: VID([3, 3], 3), r"VID needs as many in_channels as out_channels \(and mid_channels\), each at least 1; got \[3, 3\] and 3 \(and None\)"),
    (lambda: VID(3, 3, mid_channels=[4, 4]), r"got 3 and 3 \(and \[4, 4\]\)"),
    (lambda: VID(3, 3, mid_channels=0), r"got 3 and 3 \(and 0\)"),
    (lambda: VID([], []), "each at least 1"),
    (lambda: VID(3, 3, init_variance=0), "VID needs 0 < eps < init_variance; got eps = 1e-05 and init_variance = 0"),
    (lambda: VID(3, 3, eps=0), "got eps = 0 and init_variance = 5.0"),
    (lambda: VID.from_features(f4, None), "VID needs teacher maps"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_given_and_what_is_needed(call, message):
    with pytest.raises(ValueError, match=message) as e:
        call()
    assert "\n" not in str(e.value)
