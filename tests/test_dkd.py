"""DKD: KD in two terms, the authors' lines, where the label comes from, and students that are sure."""
import pytest
import torch
import torch.nn.functional as F

from helpers import Tiny, assert_says, few_digits, randn, value_and_gradients
from relkd.data import Batches
from relkd.distill import Look, Objective, Row, Term
from relkd.features import Features
from relkd.losses import DKD, KD

Y = torch.arange(7) % 10


def batch(dtype=torch.float64, size=3.):
    return size * randn(7, 10, dtype=dtype), size * randn(7, 10, seed=1, dtype=dtype)


def authors(z, v, y, alpha=1., beta=8., T=4.):
    """The formula as the authors' code computes it: probabilities, then logarithms; a mask of -1000."""
    own = F.one_hot(y, z.shape[1]).bool()
    q, p = ((x / T).softmax(1) for x in (z, v))
    q, p = (torch.stack([(x * own).sum(1), (x * ~own).sum(1)], 1) for x in (q, p))
    log_q, others = (z / T - 1000. * own).log_softmax(1), (v / T - 1000. * own).softmax(1)
    return T**2 / len(z) * (alpha * F.kl_div(q.log(), p, reduction="sum") + beta * F.kl_div(log_q, others, reduction="sum"))


@pytest.mark.parametrize("options", [{}, {"alpha": 1., "beta": .5, "T": 1.}, {"alpha": 0.}, {"beta": 0., "T": 20.}], ids=str)
def test_dkd_is_the_authors_formula(options):
    z, v = batch()
    mine, theirs = (value_and_gradients(lambda z, f=f: f(z, v, Y), z)
                    for f in (DKD(**options), lambda *x: authors(*x, **options)))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("T", [1., 4., 20.])
def test_kd_is_its_two_terms_the_second_weighed_by_the_teachers_doubt(T):
    z, v = batch()
    doubt = 1 - (v / T).softmax(1).gather(1, Y[:, None])[:, 0]
    terms = [DKD(1, 0, T)(z[[k]], v[[k]], Y[[k]]) + doubt[k] * DKD(0, 1, T)(z[[k]], v[[k]], Y[[k]]) for k in range(7)]
    torch.testing.assert_close(torch.stack(terms).mean(), KD(T)(z, v))


def test_of_two_classes_only_the_first_term_is_left():
    z, v = (x[:, :2] for x in batch())
    torch.testing.assert_close(DKD(3., 8.)(z, v, Y % 2), 3 * KD()(z, v))


def test_a_label_from_the_call_from_a_number_or_from_the_place_of_the_number():
    z, v = batch()
    known = DKD(classes=torch.cat([Y.flip(0), Y]))
    want = DKD()(z, v, Y)
    for value in (DKD()(z, v, labels=Y), DKD()(z, v, index=Y), known(z, v, index=torch.arange(7) + 7), known(z, v, labels=Y),
                  known(z, v, torch.arange(7) + 7)):
        assert torch.equal(value, want)
    assert "classes" not in known.state_dict() and not torch.equal(known(z, v, torch.arange(7)), want)


def test_an_engine_hands_over_numbers_and_the_labels_are_right():
    data, net, guide = few_digits(), Tiny(10), Tiny(10)
    stream = Batches(data, 25, seed=0)
    index, x, y = next(iter(stream.epoch(0)))
    o = Objective(Row("DKD", (Term("DKD", 1., "logits", "logits", {"beta": 2.}),), task=0.))
    s, t = Features(net, o.student_layers)(x), Features(guide, o.teacher_layers)(x)
    value = o.build(s, t, stream.labels)(s, Look(t), y, index)
    torch.testing.assert_close(value, DKD(beta=2.)(s["logits"], t["logits"], y))
    assert value > 0 and not torch.equal(index, y)


def test_a_student_that_is_sure_and_one_near_its_teacher():
    """The fault: the logarithm of a probability that had become 0, and a value that cancelled."""
    v = torch.tensor([[3., 1., 0.]])
    for top in (10., 200., -200., 5000.):
        z = torch.tensor([[top, 0., 1.]])
        mine, exact = (value_and_gradients(lambda z, v=v: DKD(T=1.)(z, v.to(z.dtype), Y[:1]), x) for x in (z, z.double()))
        assert mine[0].isfinite() and mine[1][0].isfinite().all()
        torch.testing.assert_close(mine[0].double(), exact[0], rtol=1e-6, atol=0)
    z, v = batch(torch.float32)
    for h in (.1, .01, .001):
        near = v + h * z
        torch.testing.assert_close(DKD()(near, v, Y).double(), DKD()(near.double(), v.double(), Y), rtol=2e-3, atol=0)
    assert DKD()(v, v, Y) == 0


def test_classes_that_do_not_take_part_are_as_if_left_out():
    z, v = batch()
    gone, left = torch.tensor([8, 9]), slice(0, 8)
    masked = [x.index_fill(1, gone, -torch.inf) for x in (z, v)]
    for loss in (DKD(), DKD(standardise=True), KD(2., True)):
        more = () if isinstance(loss, KD) else (Y,)
        (value, (gradient,)), (want, (other,)) = (value_and_gradients(lambda z, v=v: loss(z, v, *more), z)
                                                  for z, v in (masked, (z[:, left], v[:, left])))
        torch.testing.assert_close(value, want)
        torch.testing.assert_close(gradient[:, left], other)
        assert not gradient[:, gone].any()


ERRORS = [
    (lambda z, v: DKD()(z, v), r"DKD needs labels of shape \(N,\), int64, with N = 7: the class of each sample; got NoneType"),
    (lambda z, v: DKD()(z, v, Y + 5), "DKD needs labels from 0 to 9: the class of each sample; got 5 to 11"),
    (lambda z, v: DKD()(z, v, Y.double()), r"got \(7,\), torch.float64"),
    (lambda z, v: DKD(classes=Y)(z, v), r"DKD needs index of shape \(N,\), int64, with N = 7: which training samples; got NoneType"),
    (lambda z, v: DKD(classes=Y)(z, v, Y - 1), "DKD needs index from 0 to 6: which training samples; got -1 to 5"),
    (lambda z, v: DKD(classes=Y.double()), r"DKD needs classes of shape \(n,\), int64, .*; got \(7,\), torch.float64"),
    (lambda z, v: DKD.from_features(z, v), r"DKD needs labels=, \(n,\) int64, of all training samples"),
    (lambda z, v: DKD(alpha=0)(z[:, :2], v[:, :2], Y % 2), r"DKD\(alpha=0\) needs at least 3 classes; got \(7, 2\)"),
    (lambda z, v: DKD(0, 0), "DKD needs alpha and beta of at least 0, not both 0; got 0 and 0"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_given_and_what_is_needed(call, message):
    assert_says(lambda: call(*batch()), message)
