"""PKT: values and gradients of other code, probabilities, digits."""
import math

from hypothesis import given
from hypothesis import strategies as st
import pytest
import torch
import torch.nn.functional as F

from helpers import assert_same, assert_says, gen, many, randn, value_and_gradients
from relkd.losses.pkt import PKT, conditional_probabilities
from relkd.relations import cosine_similarity_matrix


@st.composite
def pairs(draw, least=3):
    """Student and teacher embeddings in float64, of differing dimensions; sometimes behind a ReLU, then with a floor."""
    n, ds, dt = draw(st.integers(least, 9)), draw(st.integers(2, 6)), draw(st.integers(2, 6))
    seed, size, positive = draw(st.integers(0, 10**6)), 10 ** draw(st.floats(-2, 2)), draw(st.booleans())
    s, t = (torch.randn(n, d, generator=gen(seed + k), dtype=torch.float64) for k, d in enumerate((ds, dt)))
    if positive:
        s, t = s.relu() + .01, t.relu() + .01
    return size * s, t


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-6)])
@pytest.mark.parametrize("relu", [False, True])
def test_pkt_is_torchdistills(dtype, tolerance, relu):
    """Up to the eps beside the length, 1e-7 / |e|: the deviation in float64."""
    PKTLoss = pytest.importorskip("torchdistill.losses.mid_level").PKTLoss

    s, t = randn(32, 16, dtype=dtype), randn(32, 40, seed=1, dtype=dtype)
    s, t = (s.relu(), t.relu()) if relu else (s, t)
    theirs = PKTLoss("a", "output", "a", "output")
    other = lambda s, t: theirs({"a": {"output": s}}, {"a": {"output": t}})
    assert_same(value_and_gradients(lambda s: PKT()(s, t), s), value_and_gradients(lambda s: other(s, t), s), tolerance)
    if dtype == torch.float64:                              # longer embeddings: the eps no longer matters
        torch.testing.assert_close(PKT()(s, t), other(1e6 * s, 1e6 * t), rtol=1e-12, atol=0)


def pkt_loop(s, t, eps=1e-7, distinct=False):
    n, tables = len(s), []
    for e in (s, t):
        k = torch.stack([torch.stack([(1 + F.cosine_similarity(e[i], e[j], dim=0)) / 2 * (not (distinct and i == j))
                                      for j in range(n)]) for i in range(n)])
        tables.append(k / k.sum(1, keepdim=True))
    q, p = tables
    return sum(p[i, j] * math.log((p[i, j] + eps) / (q[i, j] + eps)) for i in range(n) for j in range(n))


@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("eps", [1e-7, 1e-4])
def test_pkt_is_the_loop(distinct, eps):
    s, t = randn(5, 3, dtype=torch.float64), randn(5, 4, seed=1, dtype=torch.float64)
    total = pkt_loop(s, t, eps, distinct)
    torch.testing.assert_close(PKT("batchmean", distinct, eps)(s, t), total / 5)
    torch.testing.assert_close(PKT("mean", distinct, eps)(s, t), total / (20 if distinct else 25))


@many
@given(pairs(), st.booleans())
def test_conditional_probabilities_are_rows_of_probabilities(pair, distinct):
    for e in pair:
        p = conditional_probabilities(e, distinct)
        torch.testing.assert_close(p.sum(1), torch.ones(len(e), dtype=torch.float64))
        assert (p >= 0).all() and (not distinct or (p.diagonal() == 0).all())
        if not distinct:
            assert (p.diagonal() >= p.max(1).values - 1e-12).all()          # nearest to itself


@many
@given(pairs())
def test_pkt_batchmean_is_n_times_the_mean_and_bounded_behind_a_relu(pair):
    s, t = pair
    n = len(s)
    torch.testing.assert_close(PKT("batchmean")(s, t), n * PKT()(s, t))
    torch.testing.assert_close(PKT("batchmean", distinct=True)(s, t), (n - 1) * PKT(distinct=True)(s, t))
    assert PKT("batchmean")(s.abs(), t.abs()) <= .2342                       # kernels within [1/2, 1]


def test_pkt_is_half_a_variance_of_cosine_differences_near_the_teacher():
    t = randn(32, 16, dtype=torch.float64).relu()
    s = t + 1e-3 * randn(32, 16, seed=1, dtype=torch.float64)
    cs, ct, p = cosine_similarity_matrix(s, s), cosine_similarity_matrix(t, t), conditional_probabilities(t)
    change = (cs - ct) / (1 + ct)
    second = (p * (change - (p * change).sum(1, keepdim=True)) ** 2).sum(1).mean() / 2
    torch.testing.assert_close(PKT("batchmean")(s, t), second, rtol=.01, atol=0)


@pytest.mark.parametrize("distance", [.1, 1e-2, 1e-3])
def test_pkt_keeps_its_digits_near_the_teacher_where_the_copied_lines_cancel(distance):
    def copied(s, t, eps=1e-7):
        q, p = ((k := F.normalize(e) @ F.normalize(e).t() + 1) / k.sum(1, keepdim=True) for e in (s, t))
        return (p * ((p + eps) / (q + eps)).log()).mean()

    t = randn(64, 128).relu()
    s = t + distance * randn(64, 128, seed=1)
    exact = PKT()(s.double(), t.double())
    assert abs(PKT()(s, t) / exact - 1) < 1e-4
    if distance == 1e-3:
        assert abs(copied(s, t) / exact - 1) > .5


ERRORS = [
    (lambda: PKT("sum"), r"PKT needs reduction 'mean' \(the authors'\) or 'batchmean' \(the divergence\); got 'sum'"),
    (lambda: PKT(eps=0), "PKT needs an eps of at least 1e-7, float32 resolves no less; got 0"),
    (lambda: PKT(eps=float("nan")), "got nan"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_given_and_what_is_needed(call, message):
    assert_says(call, message)
