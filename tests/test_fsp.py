"""FSP: values and gradients of other code, what it ignores, its pairs."""
from hypothesis import given
from hypothesis import strategies as st
import pytest
import torch
import torch.nn.functional as F

from helpers import assert_same, assert_says, gen, many, randn, value_and_gradients
from relkd.losses.at import AT
from relkd.losses.fsp import FSP, flow_matrix

TOLERANCES = [(torch.float32, 5e-6), (torch.float64, 1e-12)]


def chain(n=3, sizes=((3, 4), (4, 4), (5, 2)), seed=0, dtype=torch.float32):
    return [randn(n, c, k, k, seed=seed + i, dtype=dtype) for i, (c, k) in enumerate(sizes)]


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_torchdistills_fsp_adds_up_lengths_of_columns(dtype, tolerance):
    """The same max-pooled matrices; but a column's length where the paper has its square."""
    FSPLoss = pytest.importorskip("torchdistill.losses.mid_level").FSPLoss

    s, t = chain(dtype=dtype), chain(seed=9, dtype=dtype)
    pairs = {f"{i}": {f"{who}_{k}": {"io": "output", "path": f"{i + j}"} for who in ("student", "teacher")
                      for j, k in enumerate(("first", "second"))} for i in (0, 1)}
    io = lambda maps: {f"{i}": {"output": f} for i, f in enumerate(maps)}
    theirs = lambda *s: FSPLoss(pairs)(io(s), io(t))
    gaps = lambda s: [flow_matrix(s[i], s[i + 1]) - flow_matrix(t[i], t[i + 1]) for i in (0, 1)]
    assert_same(value_and_gradients(lambda *s: sum(g.norm(dim=1).sum() for g in gaps(s)) / 3, *s),
                value_and_gradients(theirs, *s), tolerance)
    torch.testing.assert_close(FSP()(s, t), sum(g.norm(dim=1).pow(2).sum() for g in gaps(s)) / 3)
    assert not torch.isclose(FSP()(s, t), theirs(*s), rtol=.01)


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_fsp_mean_is_the_circulating_block_of_products(dtype, tolerance):
    def flow(a, b):
        h = min(a.shape[2], b.shape[2])
        a, b = (F.adaptive_avg_pool2d(f, (h, h)).flatten(2) for f in (a, b))
        return (a[:, None] * b[:, :, None]).mean(-1)

    s, t = chain(dtype=dtype), chain(seed=9, dtype=dtype)
    circulating = lambda *s: sum((flow(s[i], s[i + 1]) - flow(t[i], t[i + 1])).pow(2).mean() for i in (0, 1))
    assert_same(value_and_gradients(lambda *s: FSP(pool="avg", reduction="mean")(s, t), *s),
                value_and_gradients(circulating, *s), tolerance)


def test_fsp_worked_on_paper():
    a, b = torch.tensor([[[[1., 2.]], [[0., 1.]]]]), torch.tensor([[[[3., 0.]], [[1., 1.]]]])
    assert flow_matrix(a, b).tolist() == [[[1.5, 1.5], [0., .5]]]
    corner = torch.zeros(1, 2, 1, 1)
    corner[0, 0] = 1
    assert FSP()([1.5 * corner, corner], [a, b]).item() == 2.5 and FSP(reduction="mean")([1.5 * corner, corner], [a, b]).item() == .625


def test_pairs_and_weights_name_terms_of_the_sum():
    s, t = chain(), chain(seed=9)
    one = lambda *pair, **o: FSP(pairs=[pair], **o)(s, t)
    torch.testing.assert_close(FSP()(s, t), one(0, 1) + one(1, 2))
    torch.testing.assert_close(FSP(weights=[2, 3])(s, t), 2 * one(0, 1) + 3 * one(1, 2))
    torch.testing.assert_close(FSP(pairs=[(0, 2), (1, 1)], weights=(.5, 1))(s, t), .5 * one(0, 2) + one(1, 1))
    torch.testing.assert_close(one(0, 2), one(2, 0))
    assert FSP(pairs=[(0, 0)])(s[0], t[0]) == one(0, 0)                # Gatys' Gram matrix: a single layer will do


def test_fsp_pools_the_larger_map_of_a_pair_in_either_order_and_shape():
    big, small = randn(2, 3, 8, 6), randn(2, 4, 4, 9, seed=1)
    for pool, f in (("max", F.adaptive_max_pool2d), ("avg", F.adaptive_avg_pool2d)):
        expected = torch.einsum("nihw,njhw->nij", f(big, (4, 6)), f(small, (4, 6))) / 24
        torch.testing.assert_close(flow_matrix(big, small, pool), expected)
        torch.testing.assert_close(flow_matrix(small, big, pool), expected.mT)


@st.composite
def layers(draw):
    n, k = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    channels = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    seed = draw(st.integers(0, 10**6))
    sizes = [(c, k) for c in channels]
    return chain(n, sizes, seed, torch.float64), chain(n, sizes, seed + 100, torch.float64)


@many
@given(layers(), st.floats(.01, 100))
def test_fsp_is_blind_to_positions_and_to_what_cancels(pair, scale):
    s, t = pair
    base, hw = FSP()(s, t), s[0][0, 0].numel()
    q, _ = torch.linalg.qr(randn(hw, hw, dtype=torch.float64))
    order = torch.randperm(hw, generator=gen(1))
    for moved in ([(f.flatten(2) @ q).view_as(f) for f in s], [f.flatten(2)[..., order].view_as(f) for f in s], [-f for f in s],
                  [f * scale ** (-1)**i for i, f in enumerate(s)], [f.repeat_interleave(3, 3) for f in s]):
        torch.testing.assert_close(FSP()(moved, t), base, rtol=1e-8, atol=1e-10)
    assert FSP()(t, t) == 0 and base >= 0


@many
@given(layers(), st.floats(.1, 10))
def test_fsp_grows_with_the_fourth_power(pair, scale):
    s, t = pair
    torch.testing.assert_close(FSP()([scale * f for f in s], [scale * f for f in t]), scale**4 * FSP()(s, t), rtol=1e-9, atol=1e-12)


@many
@given(layers())
def test_fsp_norm_is_the_mean_times_the_entries(pair):
    s, t = ([f for f in maps[:2]] for maps in pair)
    torch.testing.assert_close(FSP()(s, t), FSP(reduction="mean")(s, t) * s[0].shape[1] * s[1].shape[1])


def test_fsp_sees_the_order_of_channels_and_at_does_not():
    s, t = chain(sizes=((3, 4), (4, 4))), chain(sizes=((3, 4), (4, 4)), seed=9)
    renumbered = [f.roll(1, 1) for f in t]
    assert not torch.isclose(FSP()(s, t), FSP()(s, renumbered), rtol=1e-3)
    torch.testing.assert_close(AT()(s, t), AT()(s, renumbered))


def test_fsp_silent_layers():
    t = chain(sizes=((3, 4), (4, 4)), seed=9)
    _, (g1, g2) = value_and_gradients(lambda *s: FSP()(s, t), torch.zeros(3, 3, 4, 4), randn(3, 4, 4, 4))
    assert g1.abs().max() > 0 and g2.abs().max() == 0             # a layer's gradient is multiplied by the other layer
    value, grads = value_and_gradients(lambda *s: FSP()(s, t), *(0 * f for f in t))
    assert all(g.abs().max() == 0 for g in grads)
    torch.testing.assert_close(value, flow_matrix(*t).pow(2).sum((1, 2)).mean())


def test_fsp_lets_the_networks_differ_in_map_size():
    s, t = chain(sizes=((3, 8), (4, 4))), chain(sizes=((3, 2), (4, 6)), seed=9)
    expected = (flow_matrix(*s) - flow_matrix(*t)).pow(2).sum((1, 2)).mean()
    torch.testing.assert_close(FSP()(s, t), expected)

f4, e2 = torch.rand(4, 3, 2, 2), torch.rand(4, 3)


ERRORS = [
    (lambda: FSP(pool="mean"), "FSP needs pool to be 'max' or 'avg'; got 'mean'"),
    (lambda: FSP(reduction="sum"), "FSP needs reduction to be 'norm' or 'mean'; got 'sum'"),
    (lambda: FSP(pairs=[]), r"FSP needs pairs \(i, j\) of places in the list of layers, from 0 on; got \[\]"),
    (lambda: FSP(pairs=[(0, -1)]), r"from 0 on; got \[\(0, -1\)\]"),
    (lambda: FSP(pairs=[(0, 1, 2)]), r"got \[\(0, 1, 2\)\]"),
    (lambda: FSP(pairs=[(0, 1)], weights=[1, 2]), "FSP needs one weight a pair; got 2 for 1 pairs"),
    (lambda: FSP(weights=[1, 2])([f4, f4], [f4, f4]), "FSP needs one weight a pair; got 2 for 1 pairs"),
    (lambda: FSP(pairs=[(0, 2)])([f4, f4], [f4, f4]), "at least 3; got 2 of the student and 2 of the teacher"),
    (lambda: FSP()([f4, f4], [f4, torch.rand(4, 5, 2, 2)]),
     "FSP needs as many channels in the student as in the teacher, layer by layer; got 3 and 5 in layer 1: "
     "choose other layers, or a loss with a regressor"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_given_and_what_is_needed(call, message):
    assert_says(call, message)
