"""SP, and what it shares with PKT: values of other code, what they ignore, limits."""
import math

from hypothesis import given
from hypothesis import strategies as st
import pytest
import torch
import torch.nn.functional as F

from helpers import assert_same, assert_says, gen, many, randn, value_and_gradients
from relkd.losses.pkt import PKT, conditional_probabilities
from relkd.losses.rkd import RKDDistance
from relkd.losses.sp import SP, similarities

LOSSES = [SP(), SP("global"), PKT(), PKT("batchmean"), PKT(distinct=True), PKT("batchmean", distinct=True)]

ids = ["SP", "SP-global", "PKT", "PKT-batchmean", "PKT-distinct", "PKT-batchmean-distinct"]

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=ids)


@st.composite
def pairs(draw, least=3):
    """Student and teacher embeddings in float64, of differing dimensions; sometimes behind a ReLU, then with a floor."""
    n, ds, dt = draw(st.integers(least, 9)), draw(st.integers(2, 6)), draw(st.integers(2, 6))
    seed, size, positive = draw(st.integers(0, 10**6)), 10 ** draw(st.floats(-2, 2)), draw(st.booleans())
    s, t = (torch.randn(n, d, generator=gen(seed + k), dtype=torch.float64) for k, d in enumerate((ds, dt)))
    if positive:
        s, t = s.relu() + .01, t.relu() + .01
    return size * s, t


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_sp_is_the_circulating_one_and_torchdistills_has_rows_of_absolute_sum_1(dtype, tolerance):
    """torchdistill's `normalize(G, 1)` sets p = 1, not dim = 1: rows of absolute sum 1.
    Our rows over their absolute sums give its value."""
    SPKDLoss = pytest.importorskip("torchdistill.losses.mid_level").SPKDLoss

    s, t = randn(8, 3, 4, 4, dtype=dtype), randn(8, 5, 2, 2, seed=1, dtype=dtype)

    def by_power(p):
        rows = lambda f: F.normalize(f.flatten(1) @ f.flatten(1).t(), p=p, dim=1)
        return lambda s: (rows(s) - rows(t)).pow(2).sum() / 64

    assert_same(value_and_gradients(lambda s: SP()(s, t), s), value_and_gradients(by_power(2), s), tolerance)
    theirs = SPKDLoss("a", "a", "batchmean")
    other = value_and_gradients(lambda s: theirs({"a": {"output": s}}, {"a": {"output": t}}), s)
    assert_same(value_and_gradients(by_power(1), s), other, tolerance)

    def from_ours(s):
        rows = [similarities(f.flatten(1)) for f in (s, t)]
        return sum(sign * r / r.abs().sum(1, keepdim=True) for sign, r in zip((1, -1), rows)).pow(2).mean()

    assert_same(value_and_gradients(from_ours, s), other, tolerance)
    assert SP()(s, t) > 2 * other[0]


def test_sp_global_is_the_frobenius_line():
    s, t = randn(8, 5), randn(8, 11, seed=1)
    tables = [e @ e.t() / (e @ e.t()).norm() for e in (s, t)]
    torch.testing.assert_close(SP("global")(s, t), (tables[0] - tables[1]).pow(2).mean())


def test_values_worked_on_paper():
    assert SP()(torch.tensor([[1., 0.], [0., 2.]]), torch.tensor([[3.], [4.]])).item() == pytest.approx(.3)
    s, t = torch.diag(torch.tensor([1., 2., 5.])), torch.tensor([[2., 0.], [-1., 0.], [0., 3.]])
    total = 2 * math.log(4 / 3)
    assert PKT()(s, t).item() == pytest.approx(total / 9, rel=1e-5)
    assert PKT("batchmean")(s, t).item() == pytest.approx(total / 3, rel=1e-5)
    assert PKT("batchmean", distinct=True)(s, t).item() == pytest.approx(2 * math.log(2) / 3, rel=1e-5)


@many
@given(pairs(), st.sampled_from(range(len(LOSSES))), st.floats(1e-2, 1e2))
def test_all_are_blind_to_rotation_scale_padding_and_the_order_of_the_batch(pair, k, scale):
    (s, t), loss = pair, LOSSES[k]
    q, _ = torch.linalg.qr(torch.randn(s.shape[1], s.shape[1], generator=gen(k), dtype=torch.float64))
    perm = torch.randperm(len(s), generator=gen(k))
    for a, b in ((s @ q, t), (-s, t), (scale * s, t), (s, scale * t), (F.pad(s, (0, 3)), t), (s[perm], t[perm])):
        torch.testing.assert_close(loss(a, b), loss(s, t), rtol=1e-7, atol=1e-13)
    assert loss(s @ q, s) < 1e-12 and loss(s, t) > -1e-7


@many
@given(pairs(), st.integers(0, 10**6))
def test_pkt_is_blind_to_every_length_and_sp_to_the_rows_own(pair, seed):
    s, t = pair
    sizes = 10 ** (4 * torch.rand(len(s), 1, generator=gen(seed), dtype=torch.float64) - 2)
    for loss in LOSSES[2:]:
        torch.testing.assert_close(loss(sizes * s, t), loss(s, t), rtol=1e-8, atol=1e-13)
    gram = s @ s.t()
    torch.testing.assert_close(similarities(s), F.normalize(sizes * gram))
    torch.testing.assert_close(similarities(sizes * s), F.normalize(gram * sizes.t()), rtol=1e-8, atol=1e-12)   # columns stay


@pytest.mark.parametrize("moved", [lambda s: s + 1, lambda s: s * torch.tensor([7., 1, 1, 1]), lambda s: s.flip(0)],
                         ids=["translation", "axis", "order"])
@every_loss
def test_what_is_seen(loss, moved):
    s, t = randn(6, 4), randn(6, 5, seed=1)
    assert abs(loss(moved(s), t) / loss(s, t) - 1) > .01


def test_centred_sp_global_follows_from_rkds_distances():
    e = randn(7, 3, dtype=torch.float64)
    d2 = torch.cdist(e, e).pow(2)
    j = torch.eye(7, dtype=torch.float64) - 1 / 7
    torch.testing.assert_close(-j @ d2 @ j / 2, (e - e.mean(0)) @ (e - e.mean(0)).t())
    shifted, t = e + 3, randn(7, 5, seed=1, dtype=torch.float64)
    torch.testing.assert_close(RKDDistance()(shifted, t), RKDDistance()(e, t))
    assert abs(SP()(shifted, t) / SP()(e, t) - 1) > .01
    torch.testing.assert_close(SP()(shifted - shifted.mean(0), t), SP()(e - e.mean(0), t))


@many
@given(pairs(least=2))
def test_sp_is_a_mean_of_one_minus_cosine(pair):
    s, t = pair
    n = len(s)
    cos = F.cosine_similarity(similarities(s), similarities(t), dim=1)
    torch.testing.assert_close(SP()(s, t), 2 / n * (1 - cos).mean(), rtol=1e-9, atol=1e-15)
    assert 0 <= SP()(s, t) <= 4 / n and 0 <= SP("global")(s, t) <= 2 / n**2 + 1e-12
    positive = SP()(s.abs(), t.abs())
    assert positive <= 2 / n
    torch.testing.assert_close(similarities(s).norm(dim=1), torch.ones(n, dtype=torch.float64))
    torch.testing.assert_close(similarities(s, "global").norm(), torch.ones((), dtype=torch.float64))


def test_sp_one_long_embedding_takes_over_the_table():
    e = randn(8, 5, dtype=torch.float64)
    signs = (e @ e[0]).sign()
    e[0] *= 1e9
    torch.testing.assert_close(similarities(e), F.pad(signs[:, None], (0, 7)), rtol=0, atol=1e-7)


@every_loss
def test_the_gradient_has_no_part_along_the_scale(loss):
    s, t = randn(6, 4, dtype=torch.float64), randn(6, 5, seed=1, dtype=torch.float64)
    _, (g,) = value_and_gradients(lambda s: loss(s, t), s)
    assert abs((g * s).sum()) < 1e-15
    if isinstance(loss, PKT):
        assert (g * s).sum(1).abs().max() < 1e-15


def test_maps_are_flattened_and_a_list_is_the_sum_over_its_layers():
    s, t = [randn(4, 3, 5, 2), randn(4, 7, seed=1)], [randn(4, 6, seed=2), randn(4, 2, 3, 3, seed=3)]
    for norm in ("row", "global"):
        loss = SP(norm)
        torch.testing.assert_close(loss(s, t), loss(s[0].flatten(1), t[0]) + loss(s[1], t[1].flatten(1)))
        assert torch.equal(loss(tuple(s[:1]), t[:1]), loss(s[0], t[0]))
    assert torch.equal(PKT()(s[0], t[1]), PKT()(s[0].flatten(1), t[1].flatten(1)))


@every_loss
def test_the_gradient_by_hand_is_autograds_and_cannot_be_differentiated_again(loss):
    s, t = randn(9, 4, dtype=torch.float64).requires_grad_(), randn(9, 5, seed=1, dtype=torch.float64)
    s.data[2], s.data[4] = 0, -s.data[3]                                     # silent; opposite, where PKT's kernel is at its floor

    def recorded(s):
        if isinstance(loss, SP):
            return F.mse_loss(similarities(s, loss.norm), similarities(t, loss.norm))
        q, p = (conditional_probabilities(e, loss.distinct) for e in (s, t))
        kl = ((q - p) - p * torch.log1p((q - p) / (p + loss.eps))).sum()
        return kl / (9 if loss.reduction == "batchmean" else 72 if loss.distinct else 81)

    assert_same(value_and_gradients(lambda s: loss(s, t), s), value_and_gradients(recorded, s), 1e-12)
    with pytest.raises(RuntimeError, match="cannot be differentiated again .create_graph=True.: use "):
        torch.autograd.grad(loss(s, t), s, create_graph=True)


def test_a_silent_sample_explodes_in_the_copied_lines_only():
    s, t = randn(8, 4).abs(), randn(8, 6, seed=1)
    s[0] = 0
    copied = lambda s: (F.normalize(s @ s.t()) - F.normalize(t @ t.t())).pow(2).mean()
    (a, (ga,)), (b, (gb,)) = (value_and_gradients(f, s) for f in (copied, lambda s: SP()(s, t)))
    torch.testing.assert_close(a, b)
    assert ga.abs().max() > 1e9 and gb.abs().max() < 1 and gb[0].abs().max() > 0      # still reached through its column
    length = lambda e: e / (e.pow(2).sum(1, keepdim=True).sqrt() + 1e-7)
    assert value_and_gradients(lambda s: (length(s) @ length(s).t()).pow(2).sum(), s)[1][0].isnan().any()      # PKT's copied length
    value, (g,) = value_and_gradients(lambda s: PKT()(s, t), s)
    assert value.isfinite() and g.isfinite().all() and g[0].abs().max() == 0


@every_loss
def test_all_silent_says_nothing(loss):
    value, (g,) = value_and_gradients(lambda s: loss(s, randn(5, 6)), torch.zeros(5, 3))
    assert value > 0 and g.abs().max() == 0
    if loss is LOSSES[0]:
        assert value.item() == pytest.approx(1 / 5)


@pytest.mark.parametrize("size", [1e-3, 1e4, 1e10, 1e16])
@every_loss
def test_over_the_range_of_float32(loss, size):
    """The copied SP loses the batch from 1e10 on: the square of the Gram matrix overflows."""
    s, t = randn(16, 8), randn(16, 20, seed=1)
    (a, (ga,)), (b, (gb,)) = (value_and_gradients(lambda s: loss(s, t), e) for e in (size * s, s))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(size * ga, gb, rtol=1e-3, atol=1e-6 * gb.abs().max().item())
    torch.testing.assert_close(loss(s, size * t), b, rtol=1e-4, atol=1e-8)


def test_nan_is_not_covered_up():
    s, t = randn(6, 4), randn(6, 5, seed=1)
    s[2, 1] = float("nan")
    assert all(loss(s, t).isnan() for loss in LOSSES)


@every_loss
def test_state_dict_and_repr(loss):
    assert not list(loss.parameters()) and not loss.state_dict()
    other = type(loss)()
    other.load_state_dict(loss.state_dict())
    again = eval(repr(loss), {"SP": SP, "PKT": PKT})
    assert repr(again) == repr(loss)
    s, t = randn(5, 4), randn(5, 6, seed=1)
    assert torch.equal(again(s, t), loss(s, t))


ERRORS = [
    (lambda: SP("column"), r"SP needs norm 'row' \(the paper's\) or 'global'; got 'column'"),
    (lambda: SP(None), "got None"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_given_and_what_is_needed(call, message):
    assert_says(call, message)
