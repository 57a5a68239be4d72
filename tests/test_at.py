"""AT: values and gradients of other code, what it ignores, silent maps."""
from functools import partial

from hypothesis import given
from hypothesis import strategies as st
import pytest
import torch
import torch.nn.functional as F

from helpers import assert_same, assert_says, gen, made, many, value_and_gradients
from relkd.losses.at import AT, attention
from relkd.losses.contract import as_map_pairs
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
def test_at_is_torchdistills_code_mode(dtype, tolerance):
    ATLoss = pytest.importorskip("torchdistill.losses.mid_level").ATLoss

    g = gen(0)
    s = [torch.randn(6, c, k, k, generator=g, dtype=dtype) for c, k in ((3, 8), (5, 4))]
    t = [torch.randn(6, c, k, k, generator=g, dtype=dtype) for c, k in ((4, 8), (9, 4))]
    pairs = {k: {r: {"io": "output", "path": k} for r in ("student", "teacher")} for k in "ab"}
    theirs = ATLoss(pairs)
    io = lambda maps: {k: {"output": f} for k, f in zip("ab", maps)}
    assert_same(value_and_gradients(lambda *s: AT()(s, t), *s), value_and_gradients(lambda *s: theirs(io(s), io(t)), *s), tolerance)


def test_at_and_torchdistills_paper_mode_differ_by_a_square_and_a_mean():
    """Eq. 2 has the length of the difference; the authors' code, and ours, the mean of its squares."""
    ATLoss = pytest.importorskip("torchdistill.losses.mid_level").ATLoss

    s, t = torch.randn(6, 3, 4, 5, generator=gen(0)), torch.randn(6, 7, 4, 5, generator=gen(1))
    paper = ATLoss({"a": {r: {"io": "o", "path": "a"} for r in ("student", "teacher")}}, mode="paper")
    lengths = torch.stack([paper({"a": {"o": s[i:i + 1]}}, {"a": {"o": t[i:i + 1]}}) for i in range(6)])
    torch.testing.assert_close(AT()(s, t), lengths.pow(2).mean() / 20)


def test_values_worked_on_paper():
    t = torch.tensor([[[[1., 2.]], [[-1., 0.]], [[1., 0.]], [[0., 0.]]]])
    assert AT()(torch.tensor([[[[2., 0.]]]]), t).item() == pytest.approx(.4)
    loss = fitnet(1, 2)
    with torch.no_grad():
        loss.regressors[0].weight.copy_(torch.tensor([[2.], [1.]]))
        loss.regressors[0].bias.copy_(torch.tensor([0., -1.]))
    assert loss(torch.tensor([[[[1., 2.]]]]), torch.tensor([[[[2., 4.]], [[1., 1.]]]])).item() == .25


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
def test_attention_says_nothing_without_positions(p):
    """Hence AT refuses such maps."""
    value, (g,) = value_and_gradients(lambda s: (attention(s, p) - attention(torch.randn(4, 9, 1, 1), p)).pow(2).mean(),
                                      torch.randn(4, 5, 1, 1))
    assert value == 0 and g.abs().max() == 0


def test_at_takes_the_absolute_value():
    f = torch.tensor([[[[3., 1.]], [[-3., 0.]]]])
    torch.testing.assert_close(attention(f, 1), F.normalize(torch.tensor([[6., 1.]])))
    torch.testing.assert_close(attention(f, 3), F.normalize(torch.tensor([[54., 1.]])))


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

f4, e2 = torch.rand(4, 3, 2, 2), torch.rand(4, 3)


ERRORS = [
    (lambda: AT(p=.5), "AT needs a finite power of at least 1; got p = 0.5"),
    (lambda: AT(p=float("nan")), "AT needs a finite power of at least 1; got p = nan"),
    (lambda: AT()(e2, f4), r"AT needs student maps of shape \(N, C, H, W\), floating point; "
                           r"got \(4, 3\), torch.float32: take a layer before the pooling"),
    (lambda: AT()([f4, [f4]], [f4, f4]), "got list"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_given_and_what_is_needed(call, message):
    assert_says(call, message)
