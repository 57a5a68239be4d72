"""KD: Hinton's formula, and another package's values."""
import pytest
import torch
import torch.nn.functional as F

from helpers import assert_says
from relkd.losses import KD


@pytest.mark.parametrize("T", [1., 4., 20.])
def test_kd_is_hintons_formula(T):
    g = torch.Generator().manual_seed(0)
    z, v = torch.randn(7, 10, generator=g, dtype=torch.float64), torch.randn(7, 10, generator=g, dtype=torch.float64)
    p, q = (v / T).softmax(1), (z / T).softmax(1)
    torch.testing.assert_close(KD(T)(z, v), T * T * (p * (p / q).log()).sum() / 7)
    torch.testing.assert_close(KD(T)(z + torch.randn(7, 1), v), KD(T)(z, v))


def test_kd_against_torchdistill():
    KDLoss = pytest.importorskip("torchdistill.losses.mid_level").KDLoss

    z, v, y = torch.randn(7, 10), torch.randn(7, 10), torch.randint(10, (7,))
    theirs = KDLoss("s", "o", "t", "o", temperature=4., alpha=1., beta=1.)({"s": {"o": z}}, {"t": {"o": v}}, y)      # CE + 1 x T^2 KL
    torch.testing.assert_close(F.cross_entropy(z, y) + KD(T=4)(z, v), theirs)


ERRORS = [
    (lambda: KD(T=0), "KD needs a finite temperature above 0; got T = 0"),
    (lambda: KD()(torch.zeros(4, 10), torch.zeros(4, 9)),
     r"KD needs logits of the same samples and classes, at least one; got \(4, 10\) and \(4, 9\)"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_given_and_what_is_needed(call, message):
    assert_says(call, message)


@pytest.mark.parametrize("T", [1., 4., 20.])
@pytest.mark.parametrize("distance", [1., .1, 1e-2, 1e-3])
def test_near_the_teacher_its_value_does_not_cancel(T, distance):
    """The fault: log p - log q, summed with both signs, was 18 % off at a student within .02 of its teacher, and could be negative."""
    g = torch.Generator().manual_seed(0)
    v = 3 * torch.randn(64, 100, generator=g)
    z = v + distance * torch.randn(64, 100, generator=g)
    exact = KD(T)(z.double(), v.double())
    p, q = ((x.double() / T).softmax(1) for x in (v, z))
    torch.testing.assert_close(exact, T * T * (p * (p / q).log()).sum() / 64, rtol=1e-6, atol=0)
    assert abs(KD(T)(z, v) / exact - 1) < 2e-4 / min(1., distance / T * 100) and KD(T)(z, v) >= 0 and KD(T)(v, v) == 0


def test_classes_that_cannot_be_and_odds_beyond_float32():
    z, v = torch.tensor([[0., 2., 5.], [300., 0., -300.]]), torch.tensor([[1., 1., -torch.inf], [0., 300., -300.]])
    p, q = (v.double().softmax(1), z.double().softmax(1))
    exact = torch.where(p > 0, p * (p.log() - z.double().log_softmax(1)), 0.).sum() / 2
    assert abs(KD(1.)(z, v) / exact - 1) < 1e-6 and q[0, 2] > .9
    assert KD(1.)(torch.tensor([[-torch.inf, 0.]]), torch.zeros(1, 2)).isinf()
    z.requires_grad_()
    KD(1.)(z, v).backward()
    torch.testing.assert_close(z.grad, ((q - p) / 2).float())
