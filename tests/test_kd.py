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
