"""FitNet: values and gradients of other code, what it ignores, its regressor."""
from functools import partial

from hypothesis import assume, given
from hypothesis import strategies as st
import pytest
from torch import nn
import torch
import torch.nn.functional as F

from helpers import assert_same, assert_says, gen, made, many, value_and_gradients
from relkd.losses.at import AT
from relkd.losses.fitnet import FitNet

fitnet = partial(made, FitNet)


@st.composite
def maps(draw, same_size=True):
    """Student and teacher maps in float64; the student's size and shift vary."""
    n, cs, ct = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    h, w = draw(st.integers(1, 5)), draw(st.integers(2, 5))
    ht, wt = (h, w) if same_size else (draw(st.integers(1, 8)), draw(st.integers(2, 8)))
    g = gen(draw(st.integers(0, 10**6)))
    size = 10 ** draw(st.floats(-2, 2))
    return torch.randn(n, cs, h, w, generator=g, dtype=torch.float64) * size, torch.randn(n, ct, ht, wt, generator=g, dtype=torch.float64)

TOLERANCES = [(torch.float32, 2e-6), (torch.float64, 1e-13)]


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_fitnet_is_torchdistills_mse_behind_a_convolution(dtype, tolerance):
    SimpleLossWrapper = pytest.importorskip("torchdistill.losses.mid_level").SimpleLossWrapper

    s, t = torch.randn(4, 3, 5, 2, generator=gen(0), dtype=dtype), torch.randn(4, 6, 5, 2, generator=gen(1), dtype=dtype)
    loss = fitnet(3, 6, dtype=dtype)
    theirs = SimpleLossWrapper(nn.MSELoss(), input={"is_from_teacher": False, "module_path": "conv", "io": "output"},
                               target={"is_from_teacher": True, "module_path": "hint", "io": "output"})
    mine = lambda s, w, b: torch.func.functional_call(loss, {"regressors.0.weight": w, "regressors.0.bias": b}, (s, t))
    other = lambda s, w, b: theirs({"conv": {"output": F.conv2d(s, w[..., None, None], b)}}, {"hint": {"output": t}}, None)
    assert_same(*(value_and_gradients(f, s, loss.regressors[0].weight, loss.regressors[0].bias) for f in (mine, other)), tolerance)


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

f4, e2 = torch.rand(4, 3, 2, 2), torch.rand(4, 3)


ERRORS = [
    (lambda: FitNet(3, 5)(f4, f4), "FitNet was made for 3 student and 5 teacher channels; got 3 and 3: "
                                   "FitNet.from_features reads them from an example"),
    (lambda: FitNet(3, 3)([f4, f4], [f4, f4]), r"FitNet was made for 1 layer\(s\); got 2"),
    (lambda: FitNet([3, 3], 3), r"FitNet needs as many in_channels as out_channels, each at least 1; got \[3, 3\] and 3"),
    (lambda: FitNet(0, 3), "each at least 1; got 0 and 3"),
    (lambda: FitNet([], []), "each at least 1"),
    (lambda: FitNet.from_features(f4, None), "FitNet needs teacher maps"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_given_and_what_is_needed(call, message):
    assert_says(call, message)
