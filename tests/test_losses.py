"""RKD and KD: properties that hold for all inputs, every error message, half precision, and another package's values."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from relkd.losses import KD, RKD, RKDAngle, RKDDistance
from relkd.losses.contract import as_pair
from relkd.relations import angles, cosine_similarity_matrix, differences, pdist, unit_differences

many = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
RELATIONAL = [RKDDistance(), RKDAngle(), RKD(), RKDDistance(distinct=True), RKDAngle(distinct=True), RKD(distinct=True)]


@st.composite
def batches(draw, least=3):
    n, ds, dt, seed = draw(st.integers(least, 9)), draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(0, 10**6))
    g = torch.Generator().manual_seed(seed)
    size, shift = 10 ** draw(st.floats(-2, 2)), draw(st.floats(-5, 5))
    return torch.randn(n, ds, generator=g, dtype=torch.float64) * size + shift, torch.randn(n, dt, generator=g, dtype=torch.float64)


@many
@given(batches())
@pytest.mark.parametrize("loss", RELATIONAL, ids=str)
def test_zero_for_equal_shapes_and_never_negative(loss, pair):
    s, t = pair
    assert loss(3 * t + 1, t) < 1e-12 and loss(s, t) >= 0


@many
@given(batches(), st.floats(1e-3, 1e3), st.floats(-100, 100))
@pytest.mark.parametrize("loss", RELATIONAL, ids=str)
def test_blind_to_similarity_and_to_the_order_of_the_batch(loss, pair, scale, shift):
    s, t = pair
    q, _ = torch.linalg.qr(torch.randn(s.shape[1], s.shape[1], dtype=torch.float64))
    order = torch.randperm(len(s))
    nearest = min(F.pdist(e).min() for e in (s, scale * s, t, scale * t))
    assume(nearest > 1e-4)                            # eps, the least distance of 1e-6, is an absolute size
    base = loss(s, t)
    for moved in (loss(s @ q, t), loss(scale * s, t), loss(s + shift, t), loss(s[order], t[order]), loss(s, t * scale + shift)):
        torch.testing.assert_close(moved, base, rtol=1e-5, atol=1e-7)


@many
@given(batches())
@pytest.mark.parametrize("loss", [RKDDistance(), RKDAngle(), RKD()], ids=str)
def test_gradient_is_that_of_a_shape(loss, pair):
    """Invariance to shift and scale, differentiated: the gradient sums to 0 and is orthogonal to the centred student."""
    s, t = pair
    s = s.requires_grad_()
    g, = torch.autograd.grad(loss(s, t), s)
    size = g.abs().max() * (s.detach().abs().max() + 1) * len(s)
    assert g.sum(0).abs().max() <= 1e-8 * size + 1e-10
    assert (g * (s - s.mean(0))).sum().abs() <= 1e-6 * size + 1e-10


@many
@given(batches())
def test_distinct_is_a_fixed_factor_for_points_in_general_position(pair):
    s, t = pair
    n = len(s)
    torch.testing.assert_close(RKDDistance(True)(s, t), RKDDistance()(s, t) * n / (n - 1))
    if s.shape[1] > 1 and t.shape[1] > 1:
        torch.testing.assert_close(RKDAngle(True)(s, t), RKDAngle()(s, t) * n**2 / ((n - 1) * (n - 2)))


@pytest.mark.parametrize("n", [3, 8, 33])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_value_and_gradient_of_torchdistill(n, dtype, tolerance):
    """torchdistill's RKD is the authors' code; ours agrees in value and gradient, with feature maps too."""
    from torchdistill.losses.mid_level import RKDLoss

    g = torch.Generator().manual_seed(n)
    s, t = (torch.randn(n, c, 2, 2, generator=g, dtype=dtype).relu() + .1 for c in (5, 7))
    theirs = RKDLoss("s", "t", dist_factor=25, angle_factor=50, reduction="mean")
    grads = []
    for f in (lambda s: RKD(25, 50)(s, t), lambda s: theirs({"s": {"output": s}}, {"t": {"output": t}})):
        x = s.clone().requires_grad_()
        value = f(x)
        grads.append((value.detach(), torch.autograd.grad(value, x)[0]))
    (a, ga), (b, gb) = grads
    assert abs(a - b) <= tolerance * abs(b)
    assert (ga - gb).abs().max() <= 10 * tolerance * gb.abs().max()


def test_values_that_do_not_move():
    """The collinear student of the notebook, worked on paper: 0.5 / 9 and 3.24 / 27."""
    t = torch.tensor([[0., 0.], [3., 0.], [0., 4.]])
    s = torch.tensor([[0., 0., 0.], [0., 1., 0.], [0., 2., 0.]])
    assert math.isclose(RKDDistance()(s, t), .5 / 9, rel_tol=1e-6) and math.isclose(RKDAngle()(s, t), 3.24 / 27, rel_tol=1e-6)
    assert math.isclose(RKD()(s, t), 25 * .5 / 9 + 50 * .12, rel_tol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [RKDDistance(), RKDAngle(), RKD()], ids=str)
def test_finite_on_duplicates_zeros_and_collapse_in_every_precision(loss, dtype):
    g = torch.Generator().manual_seed(0)
    t = torch.randn(8, 5, generator=g)
    duplicate = torch.randn(8, 4, generator=g)
    duplicate[1] = duplicate[0]
    for e in (duplicate, torch.zeros(8, 4), torch.ones(8, 4), torch.full((8, 4), 3e4), duplicate * 1e-4):
        e = e.to(dtype).requires_grad_()
        value = loss(e, t.to(dtype))
        value.backward()
        assert value.isfinite() and e.grad.isfinite().all() and e.grad.abs().max() < 1e5
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss(duplicate, torch.zeros(8, 5)).isfinite()


def test_one_duplicate_does_not_explode_the_angle_gradient():
    """F.normalize, as in the circulating code, gives 1e9 here."""
    g = torch.Generator().manual_seed(0)
    t, s = torch.randn(8, 4, generator=g), torch.randn(8, 4, generator=g)
    s[1] = s[0]

    def largest(unit):
        x = s.clone().requires_grad_()
        u, v = unit(x), unit(t)
        F.smooth_l1_loss(u @ u.transpose(1, 2), v @ v.transpose(1, 2)).backward()
        return x.grad.abs().max()

    assert largest(lambda e: F.normalize(e[None] - e[:, None], dim=2)) > 1e8
    assert largest(unit_differences) < 1


@pytest.mark.parametrize("loss", [RKDDistance(), RKDAngle(), RKD(), KD()], ids=str)
def test_autocast_changes_nothing(loss):
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(16, 10, generator=g) + 20, torch.randn(16, 10, generator=g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(s, t)
    assert inside.dtype == torch.float32 and torch.equal(inside, loss(s, t))


@pytest.mark.parametrize("loss", [RKDDistance(), RKDAngle(), RKD(), KD()], ids=str)
def test_gradcheck_and_no_gradient_for_the_teacher(loss):
    g = torch.Generator().manual_seed(1)
    s, t = (torch.randn(6, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda s: loss(s, t), (s,))
    loss(s, t).backward()
    assert t.grad is None and s.grad is not None


@pytest.mark.parametrize("loss", [RKD(), KD()], ids=str)
def test_a_student_learns(loss):
    g = torch.Generator().manual_seed(2)
    x, t = torch.randn(16, 8, generator=g), torch.randn(16, 5, generator=g)
    w = torch.randn(8, 5, generator=g).requires_grad_()
    opt = torch.optim.Adam([w], lr=.05)
    first = loss(x @ w, t).item()
    for _ in range(60):
        opt.zero_grad()
        last = loss(x @ w, t)
        last.backward()
        opt.step()
    assert last.item() < .5 * first


def test_a_weight_of_zero_needs_no_triplets():
    s, t = torch.randn(2, 3), torch.randn(2, 3)
    assert RKD(w_angle=0)(s, t) < 1e-10
    with pytest.raises(ValueError, match="at least 3"):
        RKD()(s, t)


maps = torch.zeros(4, 2, 3, 3)
ERRORS = [
    (lambda: RKDDistance()(torch.zeros(1, 4), torch.zeros(1, 4)), "RKDDistance needs at least 2 samples in a batch; got N = 1: use a larger batch, or drop_last=True"),
    (lambda: RKDAngle()(torch.zeros(2, 4), torch.zeros(2, 4)), "RKDAngle needs at least 3 samples in a batch; got N = 2: use a larger batch, or drop_last=True"),
    (lambda: RKD()(torch.zeros(4, 4), torch.zeros(5, 4)), "RKDDistance needs student and teacher embeddings of the same samples; got N = 4 and N = 5"),
    (lambda: RKD()(torch.zeros(4), maps), r"student must have shape \(N, D\); got \(4,\): flatten a feature map with .flatten\(1\)"),
    (lambda: RKD()(maps, torch.tensor(1.)), r"teacher must have shape \(N, D\); got \(\)"),
    (lambda: RKD()(torch.zeros(4, 2, dtype=torch.long), maps), r"student must be floating point; got torch.int64: convert it with .float\(\)"),
    (lambda: RKD()([1, 2, 3], maps), r"student must be a tensor of shape \(N, D\); got list"),
    (lambda: pdist(maps), r"embeddings must have shape \(N, D\); got \(4, 2, 3, 3\)"),
    (lambda: differences(torch.zeros(3)), r"embeddings must have shape \(N, D\); got \(3,\)"),
    (lambda: angles(maps), r"embeddings must have shape \(N, D\)"),
    (lambda: cosine_similarity_matrix(torch.zeros(5, 3), torch.zeros(6, 4)), "a and b must have the same number of columns; got 3 and 4"),
    (lambda: cosine_similarity_matrix(torch.zeros(5, 3), torch.zeros(6)), r"b must have shape \(N, D\); got \(6,\)"),
    (lambda: KD(T=0), "KD needs a temperature above 0; got T = 0"),
    (lambda: KD()(torch.zeros(4, 10), torch.zeros(4, 9)), r"KD needs logits of the same samples and classes, at least one; got \(4, 10\) and \(4, 9\)"),
    (lambda: KD()(torch.zeros(0, 10), torch.zeros(0, 10)), r"at least one; got \(0, 10\)"),
    (lambda: KD()(torch.zeros(4), torch.zeros(4)), r"KD needs student logits of shape \(N, C\), floating point; got \(4,\), torch.float32"),
    (lambda: KD()(torch.zeros(4, 2), None), r"KD needs teacher logits of shape \(N, C\), floating point; got NoneType"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_given_and_what_to_do(call, message):
    with pytest.raises(ValueError, match=message) as e:
        call()
    assert "\n" not in str(e.value)


@many
@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 10**6))
def test_relations_equal_their_loops(n, d, seed):
    e = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    dist, td, cos = pdist(e), differences(e), angles(e)
    for j in range(n):
        for i in range(n):
            assert torch.equal(td[j, i], e[i] - e[j])
            assert math.isclose(dist[j, i], (e[i] - e[j]).norm(), abs_tol=1e-6)
            for k in range(n):
                if j not in (i, k):
                    assert math.isclose(cos[j, i, k], F.cosine_similarity(e[i] - e[j], e[k] - e[j], dim=0), abs_tol=1e-9)
    assert dist.diagonal().eq(0).all() and (cos.abs() <= 1 + 1e-12).all()


def test_pdist_far_from_the_origin():
    far = torch.tensor([[1000., 0.], [1000.01, 0.]])
    assert math.isclose(pdist(far)[0, 1], torch.cdist(far, far, compute_mode="donot_use_mm_for_euclid_dist")[0, 1], rel_tol=1e-3)


def test_cosine_similarity_matrix_is_that_of_torch():
    a, b = torch.randn(5, 768), torch.randn(60, 768)
    torch.testing.assert_close(cosine_similarity_matrix(a, b), F.cosine_similarity(a[:, None], b[None], dim=2))
    assert cosine_similarity_matrix(torch.zeros(1, 3), torch.ones(2, 3)).eq(0).all()


def test_as_pair_detaches_only_the_teacher():
    s, t = as_pair(torch.zeros(4, 2).requires_grad_(), torch.zeros(4, 3).requires_grad_(), 2, "x")
    assert s.requires_grad and not t.requires_grad


@pytest.mark.parametrize("T", [1., 4., 20.])
def test_kd_is_hintons_formula(T):
    g = torch.Generator().manual_seed(0)
    z, v = torch.randn(7, 10, generator=g, dtype=torch.float64), torch.randn(7, 10, generator=g, dtype=torch.float64)
    p, q = (v / T).softmax(1), (z / T).softmax(1)
    torch.testing.assert_close(KD(T)(z, v), T * T * (p * (p / q).log()).sum() / 7)
    torch.testing.assert_close(KD(T)(z + torch.randn(7, 1), v), KD(T)(z, v))


def test_kd_against_torchdistill():
    from torchdistill.losses.mid_level import KDLoss

    z, v, y = torch.randn(7, 10), torch.randn(7, 10), torch.randint(10, (7,))
    theirs = KDLoss("s", "o", "t", "o", temperature=4., alpha=1., beta=1.)({"s": {"o": z}}, {"t": {"o": v}}, y)      # CE + 1 x T^2 KL
    torch.testing.assert_close(F.cross_entropy(z, y) + KD(T=4)(z, v), theirs)
