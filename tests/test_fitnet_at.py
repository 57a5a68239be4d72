"""FitNet and AT: values and gradients of other code, what they ignore, precision, errors."""
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import assert_same, DTYPES, gen, value_and_gradients
from relkd.losses.at import AT, attention
from relkd.losses.fitnet import FitNet
from relkd.losses.contract import as_map_pairs

many = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def fitnet(i, o, seed=0, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FitNet(i, o).to(dtype)


@st.composite
def maps(draw, same_size=True):
    """Student and teacher maps in float64; the student's size and shift vary."""
    n, cs, ct = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    h, w = draw(st.integers(1, 5)), draw(st.integers(2, 5))
    ht, wt = (h, w) if same_size else (draw(st.integers(1, 8)), draw(st.integers(2, 8)))
    g = gen(draw(st.integers(0, 10**6)))
    size = 10 ** draw(st.floats(-2, 2))
    return torch.randn(n, cs, h, w, generator=g, dtype=torch.float64) * size, torch.randn(n, ct, ht, wt, generator=g, dtype=torch.float64)


# ---- against torchdistill

TOLERANCES = [(torch.float32, 2e-6), (torch.float64, 1e-13)]


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_at_is_torchdistills_code_mode(dtype, tolerance):
    from torchdistill.losses.mid_level import ATLoss

    g = gen(0)
    s = [torch.randn(6, c, k, k, generator=g, dtype=dtype) for c, k in ((3, 8), (5, 4))]
    t = [torch.randn(6, c, k, k, generator=g, dtype=dtype) for c, k in ((4, 8), (9, 4))]
    pairs = {k: {r: {"io": "output", "path": k} for r in ("student", "teacher")} for k in "ab"}
    theirs = ATLoss(pairs)
    io = lambda maps: {k: {"output": f} for k, f in zip("ab", maps)}
    assert_same(value_and_gradients(lambda *s: AT()(s, t), *s), value_and_gradients(lambda *s: theirs(io(s), io(t)), *s), tolerance)


def test_at_and_torchdistills_paper_mode_differ_by_a_square_and_a_mean():
    """Eq. 2 has the length of the difference; the authors' code, and ours, the mean of its squares."""
    from torchdistill.losses.mid_level import ATLoss

    s, t = torch.randn(6, 3, 4, 5, generator=gen(0)), torch.randn(6, 7, 4, 5, generator=gen(1))
    paper = ATLoss({"a": {r: {"io": "o", "path": "a"} for r in ("student", "teacher")}}, mode="paper")
    lengths = torch.stack([paper({"a": {"o": s[i:i + 1]}}, {"a": {"o": t[i:i + 1]}}) for i in range(6)])
    torch.testing.assert_close(AT()(s, t), lengths.pow(2).mean() / 20)


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_fitnet_is_torchdistills_mse_behind_a_convolution(dtype, tolerance):
    from torchdistill.losses.mid_level import SimpleLossWrapper

    s, t = torch.randn(4, 3, 5, 2, generator=gen(0), dtype=dtype), torch.randn(4, 6, 5, 2, generator=gen(1), dtype=dtype)
    loss = fitnet(3, 6, dtype=dtype)
    theirs = SimpleLossWrapper(nn.MSELoss(), input={"is_from_teacher": False, "module_path": "conv", "io": "output"}, target={"is_from_teacher": True, "module_path": "hint", "io": "output"})
    mine = lambda s, w, b: torch.func.functional_call(loss, {"regressors.0.weight": w, "regressors.0.bias": b}, (s, t))
    other = lambda s, w, b: theirs({"conv": {"output": F.conv2d(s, w[..., None, None], b)}}, {"hint": {"output": t}}, None)
    assert_same(*(value_and_gradients(f, s, loss.regressors[0].weight, loss.regressors[0].bias) for f in (mine, other)), tolerance)


def test_values_worked_on_paper():
    t = torch.tensor([[[[1., 2.]], [[-1., 0.]], [[1., 0.]], [[0., 0.]]]])
    assert AT()(torch.tensor([[[[2., 0.]]]]), t).item() == pytest.approx(.4)
    loss = fitnet(1, 2)
    with torch.no_grad():
        loss.regressors[0].weight.copy_(torch.tensor([[2.], [1.]]))
        loss.regressors[0].bias.copy_(torch.tensor([0., -1.]))
    assert loss(torch.tensor([[[[1., 2.]]]]), torch.tensor([[[[2., 4.]], [[1., 1.]]]])).item() == .25


# ---- what the losses ignore, and their limits

@many
@given(maps(), st.sampled_from([1, 1.5, 2, 3, 4]), st.floats(1e-3, 1e3))
def test_at_is_blind_to_scale_order_sign_and_repetition_of_channels(pair, p, scale):
    s, t = pair
    base, c = AT(p)(s, t), s.shape[1]
    signs = torch.randint(0, 2, (c, 1, 1), generator=gen(c)) * 2 - 1
    for moved in (scale * s, s[:, torch.randperm(c)], signs * s, torch.cat([s, s], 1)):
        torch.testing.assert_close(AT(p)(moved, t), base, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(AT(p)(s, scale * t), base, rtol=1e-10, atol=1e-14)


@many
@given(maps())
def test_at_squared_is_blind_to_rotations_of_the_channels(pair):
    s, t = pair
    q, _ = torch.linalg.qr(torch.randn(s.shape[1], s.shape[1], dtype=torch.float64))
    torch.testing.assert_close(AT()(torch.einsum("dc,nchw->ndhw", q, s), t), AT()(s, t), rtol=1e-9, atol=1e-14)


@many
@given(maps(same_size=False), st.sampled_from([1, 2, 3]))
def test_at_is_two_over_hw_times_one_minus_cosine(pair, p):
    (s, t), = as_map_pairs(*pair, "AT")
    hw = s[0, 0].numel()
    cos = F.cosine_similarity(attention(s, p), attention(t, p), dim=1)
    value = AT(p)(*pair)
    torch.testing.assert_close(value, (2 * (1 - cos) / hw).mean(), rtol=1e-9, atol=1e-14)
    assert 0 <= value <= 2 / hw + 1e-12 and AT(p)(7 * t, t) < 1e-30
    assert (attention(s, p) >= 0).all() and attention(s, p).norm(dim=1).sub(1).abs().max() < 1e-12


@many
@given(maps(), st.sampled_from([1, 2, 3]))
def test_at_has_no_gradient_along_the_scale_of_a_sample(pair, p):
    s, t = pair
    _, (g,) = value_and_gradients(lambda s: AT(p)(s, t), s)
    assert (g * s).sum((1, 2, 3)).abs().max() <= 1e-12


def test_at_large_powers_ask_for_the_hottest_position():
    s, t = torch.randn(50, 3, 3, 3, generator=gen(0), dtype=torch.float64), torch.randn(50, 4, 3, 3, generator=gen(1), dtype=torch.float64)
    hottest = [f.abs().amax(1).flatten(1).argmax(1) for f in (s, t)]
    torch.testing.assert_close(AT(1e5)(s, t), 2 / 9 * (hottest[0] != hottest[1]).double().mean())


@pytest.mark.parametrize("p", [1, 2, 3])
def test_at_says_nothing_without_positions(p):
    value, (g,) = value_and_gradients(lambda s: AT(p)(s, torch.randn(4, 9, 1, 1)), torch.randn(4, 5, 1, 1))
    assert value == 0 and g.abs().max() == 0


def test_at_takes_the_absolute_value():
    f = torch.tensor([[[[3., 1.]], [[-3., 0.]]]])
    torch.testing.assert_close(attention(f, 1), F.normalize(torch.tensor([[6., 1.]])))
    torch.testing.assert_close(attention(f, 3), F.normalize(torch.tensor([[54., 1.]])))


def best(s, t):
    rows = lambda f: f.movedim(1, -1).flatten(0, -2)
    a = torch.cat([rows(s), torch.ones(len(rows(s)), 1, dtype=s.dtype)], 1)
    return (rows(t) - a @ torch.linalg.pinv(a) @ rows(t)).pow(2).mean()


@many
@given(maps(), st.floats(-5, 5))
def test_fitnets_best_value_ignores_invertible_maps_of_the_students_channels(pair, shift):
    s, t = pair
    s = s / s.std() if s.numel() > 1 else s
    mix = torch.randn(s.shape[1], s.shape[1], generator=gen(0), dtype=torch.float64) + 3 * torch.eye(s.shape[1])
    assume(torch.linalg.cond(mix) < 100)
    torch.testing.assert_close(best(torch.einsum("dc,nchw->ndhw", mix, s) + shift, t), best(s, t), rtol=1e-6, atol=1e-8)
    assert best(s, t) <= fitnet(s.shape[1], t.shape[1], dtype=torch.float64)(s, t) + 1e-12


@many
@given(maps())
def test_fitnet_with_the_identity_is_the_mean_squared_error(pair):
    _, t = pair
    s, c = torch.randn_like(t), t.shape[1]
    loss = FitNet(c, c).double()
    with torch.no_grad():
        loss.regressors[0].weight.copy_(torch.eye(c))
        loss.regressors[0].bias.zero_()
    torch.testing.assert_close(loss(s, t), F.mse_loss(s, t))


@many
@given(maps(same_size=False))
def test_fitnet_pools_before_the_regressor_as_well_as_after(pair):
    s, t = pair
    loss = fitnet(s.shape[1], t.shape[1], dtype=torch.float64)
    r, size = loss.regressors[0], [min(a, b) for a, b in zip(s.shape[2:], t.shape[2:])]
    later = F.adaptive_avg_pool2d(F.conv2d(s, r.weight[..., None, None], r.bias), size)
    torch.testing.assert_close(loss(s, t), F.mse_loss(later, F.adaptive_avg_pool2d(t, size)))


def test_an_embedding_is_a_map_of_one_position():
    s, t, loss = torch.randn(4, 3, generator=gen(0)), torch.randn(4, 6, generator=gen(1)), fitnet(3, 6)
    assert torch.equal(loss(s, t), loss(s[..., None, None], t[..., None, None]))
    r = loss.regressors[0]
    torch.testing.assert_close(loss(s, t), F.mse_loss(s @ r.weight.T + r.bias, t))


def test_a_list_is_the_sum_over_its_layers():
    s = [torch.randn(4, c, k, k, generator=gen(c)) for c, k in ((3, 8), (5, 4))]
    t = [torch.randn(4, c, k, k, generator=gen(c)) for c, k in ((6, 4), (7, 4))]
    torch.testing.assert_close(AT()(s, t), AT()(s[0], t[0]) + AT()(s[1], t[1]))
    assert torch.equal(AT()(tuple(s[:1]), t[:1]), AT()(s[0], t[0]))
    loss = fitnet([3, 5], [6, 7])
    one = [FitNet(i, o) for i, o in ((3, 6), (5, 7))]
    for a, r in zip(one, loss.regressors):
        a.regressors[0].load_state_dict(r.state_dict())
    torch.testing.assert_close(loss(s, t), one[0](s[0], t[0]) + one[1](s[1], t[1]))


# ---- gradients, precision, N = 1, zeros

LOSSES = [AT(), AT(1), AT(3), fitnet(4, 3)]
ids = ["AT", "AT1", "AT3", "FitNet"]


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@pytest.mark.parametrize("teacher", [(3, 4, 3, 3), (3, 3, 2, 5)])
def test_gradcheck_and_no_gradient_for_the_teacher(loss, teacher):
    loss = copy.deepcopy(loss).double()
    s, t = torch.randn(3, 4, 3, 3, generator=gen(0), dtype=torch.float64).requires_grad_(), torch.randn(teacher, generator=gen(1), dtype=torch.float64)[:, :3].contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, t), (s,))
    loss(s, t).backward()
    assert t.grad is None and s.grad is not None and all(p.grad is not None for p in loss.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES, ids=ids)
@pytest.mark.parametrize("n", [1, 8])
def test_finite_on_zeros_and_extremes_in_every_precision(loss, dtype, n):
    t = torch.randn(n, 3, 4, 4, generator=gen(0))
    base = torch.randn(n, 4, 4, 4, generator=gen(1))
    half_silent = base * (torch.arange(4) > 1)
    for e in (base, 0 * base, half_silent, 1e-4 * base, 1e4 * base):
        for teacher in (t, 0 * t):
            e = e.detach().to(dtype).requires_grad_()
            value = loss(e, teacher.to(dtype))
            value.backward()
            assert value.isfinite() and e.grad.isfinite().all() and e.grad.abs().max() < 1e4
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_at_of_a_silent_or_faint_map():
    """It costs 1 / HW and has no gradient; F.normalize, as in the circulating code, gives 1e9 and more at p = 1."""
    base, t = torch.rand(2, 3, 2, 2, generator=gen(0)), torch.rand(2, 5, 2, 2, generator=gen(1))
    for size in (0, 1e-12, 1e-6):
        for p in (1, 2, 3):
            value, (g,) = value_and_gradients(lambda s: AT(p)(s, t), size * base)
            assert value.item() == pytest.approx(1 / 4) and g.abs().max() == 0
    copied = lambda f: F.normalize(f.mean(1).flatten(1))
    assert value_and_gradients(lambda s: (copied(s) - copied(t)).pow(2).mean(), 0 * base)[1][0].abs().max() > 1e9


@pytest.mark.parametrize("p", [1, 2, 4, 16])
@pytest.mark.parametrize("size", [1e-4, 1e10, 1e30])
def test_at_over_the_whole_range_of_float32(p, size):
    base, t = torch.rand(2, 3, 2, 2, generator=gen(0)), torch.rand(2, 5, 2, 2, generator=gen(1))
    torch.testing.assert_close(AT(p)(size * base, t), AT(p)(base, t), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES, ids=ids)
def test_autocast_changes_nothing(loss):
    s, t = torch.randn(4, 4, 8, 8, generator=gen(0)), torch.randn(4, 3, 4, 4, generator=gen(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(s, t)
    assert inside.dtype == torch.float32 and torch.equal(inside, loss(s, t))


def test_fitnet_mixes_precisions_upwards():
    s, t, loss = torch.randn(4, 3, generator=gen(0)), torch.randn(4, 5, generator=gen(1)), fitnet(3, 5)
    assert loss(s.half(), t).dtype == torch.float32 and loss(s, t.double()).dtype == torch.float64
    assert copy.deepcopy(loss).double()(s, t).dtype == torch.float64 and copy.deepcopy(loss).half()(s.half(), t.half()).dtype == torch.float32


# ---- as modules

def test_from_features_reads_the_sizes_and_state_dict_makes_the_round_trip():
    s, t = [torch.randn(2, 3, 8, 8), torch.randn(2, 5)], [torch.randn(2, 6, 4, 4), torch.randn(2, 7)]
    loss = FitNet.from_features(s, t)
    assert [tuple(p.shape) for p in loss.parameters()] == [(6, 3), (6,), (7, 5), (7,)]
    other = FitNet([3, 5], [6, 7])
    assert other(s, t) != loss(s, t)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(s, t), loss(s, t))
    single = FitNet.from_features(s[0], t[0])
    assert list(single.state_dict()) == ["regressors.0.weight", "regressors.0.bias"] and single(s[0], t[0]).dim() == 0
    assert not list(AT().parameters()) and not AT().state_dict() and repr(AT(p=3)) == "AT(p=3)"


@pytest.mark.parametrize("trained", [True, False])
def test_a_student_learns_and_the_regressor_must_learn_with_it(trained):
    """Teacher features of rank 2 in 12 dimensions: 2 student features suffice, if the regressor may find the plane."""
    g = gen(0)
    x = torch.randn(64, 6, generator=g)
    t = (x[:, :2] @ torch.randn(2, 12, generator=g))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = nn.Linear(6, 2)
    loss = fitnet(2, 12)
    opt = torch.optim.Adam([*student.parameters(), *(loss.parameters() if trained else [])], lr=.05)
    first = loss(student(x), t).item()
    for _ in range(200):
        opt.zero_grad()
        last = loss(student(x), t)
        last.backward()
        opt.step()
    assert last.item() < .02 * first if trained else last.item() > .5 * first


def test_a_student_learns_where_to_look():
    x = torch.randn(32, 1, 6, 6, generator=gen(0))
    teacher = F.conv2d(x, torch.randn(5, 1, 3, 3, generator=gen(1)), padding=1).relu()
    w = (.3 * torch.randn(3, 1, 3, 3, generator=gen(2))).requires_grad_()
    opt = torch.optim.Adam([w], lr=.05)
    student = lambda: F.conv2d(x, w, padding=1).relu()
    first = AT()(student(), teacher).item()
    for _ in range(100):
        opt.zero_grad()
        last = AT()(student(), teacher)
        last.backward()
        opt.step()
    assert last.item() < .3 * first


# ---- errors

f4, e2 = torch.rand(4, 3, 2, 2), torch.rand(4, 3)
ERRORS = [
    (lambda: AT(p=.5), "AT needs a power of at least 1; got p = 0.5"),
    (lambda: AT(p=float("nan")), "AT needs a power of at least 1; got p = nan"),
    (lambda: AT()(e2, f4), r"AT needs student maps of shape \(N, C, H, W\), floating point; got \(4, 3\), torch.float32: take a layer before the pooling"),
    (lambda: AT()(f4, f4.long()), r"AT needs teacher maps of shape \(N, C, H, W\), floating point; got \(4, 3, 2, 2\), torch.int64"),
    (lambda: AT()(f4, None), r"AT needs teacher maps of shape \(N, C, H, W\), floating point; got NoneType"),
    (lambda: AT()([f4, [f4]], [f4, f4]), "got list"),
    (lambda: AT()([f4, f4], f4), "AT needs as many layers of the teacher as of the student, at least one; got 2 of the student and 1 of the teacher"),
    (lambda: AT()([], []), "at least one; got 0 of the student and 0 of the teacher"),
    (lambda: AT()(f4, f4[:3]), r"AT needs student and teacher maps of the same samples, none empty; got \(4, 3, 2, 2\) and \(3, 3, 2, 2\)"),
    (lambda: AT()(f4[:0], f4[:0]), r"none empty; got \(0, 3, 2, 2\)"),
    (lambda: AT()(f4, f4[..., :0]), r"none empty; got \(4, 3, 2, 2\) and \(4, 3, 2, 0\)"),
    (lambda: FitNet(3, 5)(f4, e2), r"FitNet needs student and teacher maps of the same samples, none empty; got \(4, 3, 2, 2\) and \(4, 3\)"),
    (lambda: FitNet(3, 5)(f4[0], f4), r"FitNet needs student maps of shape \(N, C, H, W\) or \(N, D\), floating point; got \(3, 2, 2\), torch.float32"),
    (lambda: FitNet(3, 5)(f4, f4), "FitNet was made for 3 student and 5 teacher channels; got 3 and 3: FitNet.from_features reads them from an example"),
    (lambda: FitNet(3, 3)([f4, f4], [f4, f4]), r"FitNet was made for 1 layer\(s\); got 2"),
    (lambda: FitNet([3, 3], 3), r"FitNet needs as many in_channels as out_channels, each at least 1; got \[3, 3\] and 3"),
    (lambda: FitNet(0, 3), "each at least 1; got 0 and 3"),
    (lambda: FitNet([], []), "each at least 1"),
    (lambda: FitNet.from_features(f4, None), "FitNet needs teacher maps"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_given_and_what_is_needed(call, message):
    with pytest.raises(ValueError, match=message) as e:
        call()
    assert "\n" not in str(e.value)
