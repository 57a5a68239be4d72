"""DIST: Pearson's correlation by rows and by columns, another package's values, what it forgives, and its edges."""
import pytest
import torch

from helpers import assert_says, randn, value_and_gradients
from relkd.losses import DIST, KD
from relkd.losses.dist import pearson_distance
from relkd.losses.logits import standardised


def batch(dtype=torch.float64, size=2.):
    return size * randn(7, 10, dtype=dtype), size * randn(7, 10, seed=1, dtype=dtype)


@pytest.mark.parametrize("tau", [1., 4.])
def test_dist_is_one_less_the_correlations(tau):
    z, v = batch()
    q, p = ((x / tau).softmax(1) for x in (z, v))

    def apart(a, b):
        return sum(1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b)) / len(a)

    torch.testing.assert_close(DIST(2, 3, tau)(z, v), tau**2 * (2 * apart(q, p) + 3 * apart(q.mT, p.mT)))
    torch.testing.assert_close(DIST(2, 3, tau)(z, v), DIST(2, 0, tau)(z, v) + DIST(0, 3, tau)(z, v))


@pytest.mark.parametrize("beta, gamma, tau", [(1., 1., 1.), (2., 3., 4.)])
def test_dist_against_torchdistill(beta, gamma, tau):
    theirs = pytest.importorskip("torchdistill.losses.mid_level").DISTLoss("s", "o", "t", "o", beta=beta, gamma=gamma, tau=tau)
    z, v = batch()
    mine, other = (value_and_gradients(f, z) for f in (lambda z: DIST(beta, gamma, tau)(z, v),
                                                       lambda z: theirs({"s": {"o": z}}, {"t": {"o": v}})))
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_what_a_correlation_forgives():
    z, v = batch()
    q, log_p = z.softmax(1), v.log_softmax(1)
    for dim in (0, 1):
        want = pearson_distance(q.log(), log_p, dim)
        torch.testing.assert_close(pearson_distance((.3 * q + .07).log(), log_p, dim), want)
        factors = randn(1, 10, seed=2).exp().double() if dim == 0 else randn(7, 1, seed=2).exp().double()
        torch.testing.assert_close(pearson_distance((factors * q).log(), log_p, dim), want)
    torch.testing.assert_close(DIST()(z + randn(7, 1, seed=3), v), DIST()(z, v))
    order = torch.randperm(7)
    torch.testing.assert_close(DIST()(z[order], v[order]), DIST()(z, v))
    assert not torch.allclose(DIST(gamma=0)(2 * z, v), DIST(gamma=0)(z, v))
    torch.testing.assert_close(DIST(standardise=True)(2 * z, v), DIST(standardise=True)(z, v))


@pytest.mark.parametrize("size", [1., 4., 30., 1000.])
def test_zero_where_the_student_is_the_teacher_however_sure(size):
    """The fault: an eps beside the product of two lengths, which faded a rare class out."""
    for dtype in (torch.float32, torch.float64):
        z = batch(dtype, size)[0]
        value, (gradient,) = value_and_gradients(lambda s: DIST()(s, z), z)
        assert value == 0 and not gradient.any()


def test_near_the_teacher_its_value_does_not_cancel():
    z, v = batch(torch.float32)
    for h in (.1, .01, .001):
        near = v + h * z
        torch.testing.assert_close(DIST()(near, v).double(), DIST()(near.double(), v.double()), rtol=1e-3, atol=0)


def test_what_has_no_direction():
    """A constant row or column: of the student 1 and no gradient, of the teacher nothing to tell."""
    z, v = batch(torch.float32)
    for s, t, value in ((0 * z, v, 2.), (z, 0 * v, 0.), (0 * z, 0 * v, 0.), (0 * z + 7.3, v, 2.)):
        mine, (gradient,) = value_and_gradients(lambda s, t=t: DIST()(s, t), s)
        assert mine == value and not gradient.any()
    one = torch.cat([0 * z[:1], z[1:]])
    value, (gradient,) = value_and_gradients(lambda s: DIST(gamma=0)(s, v), one)
    assert value.isfinite() and not gradient[0].any() and gradient[1:].any()
    gone = [x.index_fill(1, torch.tensor([4]), -torch.inf) for x in (z, v)]
    value, (gradient,) = value_and_gradients(lambda s: DIST()(s, gone[1]), gone[0])
    assert value.isfinite() and gradient.isfinite().all()


def test_the_loss_of_a_sure_and_wrong_student_has_no_gradient_in_its_rows():
    """As the lesson tells; KD has one."""
    z, v = torch.tensor([[0., 40., 0., 0.]]), torch.tensor([[4., 0., 1., 0.]])
    rows, kd = (value_and_gradients(lambda s, f=f: f(s, v), z)[1][0].norm() for f in (DIST(gamma=0), KD(1.)))
    assert rows < 1e-15 and kd > 1


# ---- standardised logits, of KD and DIST and DKD

def test_standardised_logits():
    z, _ = batch()
    s = standardised(z)
    torch.testing.assert_close((s.mean(1), s.std(1)), (torch.zeros(7).double(), torch.ones(7).double()))
    for other in (3 * z + 2, 1e30 * z, 1e-30 * z):
        torch.testing.assert_close(standardised(other), s)
    assert torch.equal(standardised(torch.full((2, 5), 3.7)), torch.zeros(2, 5)) and standardised(z * torch.nan).isnan().all()
    torch.testing.assert_close(standardised(z.index_fill(1, torch.tensor([9]), -torch.inf))[:, :9], standardised(z[:, :9]))
    z.requires_grad_()
    value, (gradient,) = value_and_gradients(lambda z: KD(2., True)(z, batch()[1]), z)
    assert gradient.sum(1).abs().max() < 1e-15 and (gradient * z.detach()).sum(1).abs().max() < 1e-15
    value, (gradient,) = value_and_gradients(lambda z: KD(2., True)(z, batch()[1].float()), torch.zeros(7, 10))
    assert value.isfinite() and not gradient.any()


def test_standardised_kd_against_torchdistill():
    theirs = pytest.importorskip("torchdistill.losses.mid_level").LogitStdKDLoss("s", "o", "t", "o", temperature=2., alpha=0.)
    z, v = batch()
    torch.testing.assert_close(KD(2., standardise=True)(z, v), 4 * theirs({"s": {"o": z}}, {"t": {"o": v}}), rtol=1e-6, atol=0)


ERRORS = [
    (lambda z, v: DIST()(z[:2], v[:2]), "DIST needs at least 3 samples in a batch; got N = 2: use a larger batch, or drop_last=True"),
    (lambda z, v: DIST()(z[:, :2], v[:, :2]), r"DIST needs at least 3 classes; got \(7, 2\): any two numbers correlate by 1 or -1"),
    (lambda z, v: DIST(tau=0), "DIST needs a finite temperature above 0; got tau = 0"),
    (lambda z, v: DIST(0, 0), "DIST needs beta and gamma of at least 0, not both 0; got 0 and 0"),
    (lambda z, v: DIST()(z, v[:, :9]), r"DIST needs logits of the same samples and classes, at least one; got \(7, 10\) and \(7, 9\)"),
    (lambda z, v: KD(standardise=True)(z[:, :2], v[:, :2]), r"KD\(standardise=True\) needs at least 3 classes; got \(7, 2\)"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_given_and_what_is_needed(call, message):
    assert_says(lambda: call(*batch()), message)


def test_one_term_alone_asks_less():
    z, v = batch()
    assert DIST(gamma=0)(z[:1], v[:1]) > 0 and DIST(beta=0)(z[:, :2], v[:, :2]) > 0
