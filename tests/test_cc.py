"""CC: values and gradients of other code, what it ignores, its kernels and their limits."""
from functools import partial
import math

from hypothesis import given
from hypothesis import strategies as st
import pytest
import torch
import torch.nn.functional as F

from helpers import assert_same, assert_says, gen, many, randn, value_and_gradients
from relkd.losses.cc import CC, correlation
from relkd.losses.vid import VID
from relkd.relations import pdist

randn64 = partial(randn, dtype=torch.float64)
TOLERANCES = [(torch.float32, 5e-6), (torch.float64, 1e-12)]


@st.composite
def embeddings(draw):
    """Student and teacher embeddings in float64, of different dimensions and sizes."""
    n, ds, dt = draw(st.integers(2, 9)), draw(st.integers(2, 6)), draw(st.integers(2, 6))
    seed, size = draw(st.integers(0, 10**6)), 10 ** draw(st.floats(-2, 2))
    return size * randn64(n, ds, seed=seed), randn64(n, dt, seed=seed + 1)


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("kernel", ["gaussian", "bilinear"])
@pytest.mark.parametrize("reduction, factor", [("batchmean", 1 / 7), ("sum", 7)])
def test_torchdistills_cckd_is_the_root_of_cc_without_unit_length(kernel, reduction, factor, dtype, tolerance):
    """Its embeddings are not normalised, and it returns the length of the difference, over N^2: sqrt(CC) / N, exactly."""
    CCKDLoss = pytest.importorskip("torchdistill.losses.mid_level").CCKDLoss

    s, t = randn64(7, 5, dtype=dtype), randn64(7, 6, seed=1, dtype=dtype)
    theirs = CCKDLoss("fc", "fc", {"type": kernel, "gamma": .4, "max_p": 2}, reduction)
    mine = CC(kernel, normalise=False)
    io = lambda e: {"fc": {"output": e}}
    assert_same(value_and_gradients(lambda s: factor * mine(s, t).sqrt(), s),
                value_and_gradients(lambda s: theirs(io(s), io(t)), s), tolerance)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_torchdistills_kernel_on_unit_vectors_is_ours(order):
    CCKDLoss = pytest.importorskip("torchdistill.losses.mid_level").CCKDLoss

    e = randn64(7, 5)
    theirs = CCKDLoss("fc", "fc", {"type": "gaussian", "gamma": .4, "max_p": order}, "sum")
    torch.testing.assert_close(correlation(e, order=order), theirs.compute_cc_mat_by_gaussian_rbf(F.normalize(e)))


def written_out(s, t, gamma, order):
    def matrix(e):
        c = F.cosine_similarity(e[:, None], e[None], dim=2)
        return sum(math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * c**p for p in range(order + 1))
    return F.mse_loss(matrix(s), matrix(t))


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("gamma, order", [(.4, 1), (.4, 2), (2, 3), (.1, 7)])
def test_cc_is_the_series_written_out(gamma, order, dtype, tolerance):
    s, t = randn64(8, 5, dtype=dtype), randn64(8, 11, seed=1, dtype=dtype)
    assert_same(value_and_gradients(lambda s: CC(gamma=gamma, order=order)(s, t), s),
                value_and_gradients(lambda s: written_out(s, t, gamma, order), s), 4 * tolerance)


def test_cc_worked_on_paper():
    s, t = torch.tensor([[3., 4.], [1., 0.], [0., 2.]]), torch.tensor([[2., 0., 0.], [0., 1., 0.], [0., 0., 5.]])
    assert CC("bilinear")(s, t).item() == pytest.approx(2 / 9)
    assert CC(gamma=.5)(s, t).item() == pytest.approx(2 * (.78**2 + 1.12**2) / 9 / math.e**2)
    assert CC("mmd")(s, t).item() == pytest.approx(2 * ((2**.5 - .8**.5) ** 2 + (2**.5 - .4**.5) ** 2) / 9)

KERNELS = [dict(), dict(order=None), dict(gamma=2., order=5), dict(kernel="bilinear"), dict(kernel="mmd")]

kernel_ids = ["gaussian", "exact", "order5", "bilinear", "mmd"]


@many
@given(embeddings(), st.sampled_from(KERNELS))
def test_cc_is_blind_to_rotation_and_to_the_length_of_every_sample(pair, options):
    s, t = pair
    loss, n = CC(**options), len(s)
    q, _ = torch.linalg.qr(randn64(s.shape[1], s.shape[1], seed=n))
    lengths, perm = 10 ** torch.linspace(-1, 1, n, dtype=torch.float64)[:, None], torch.randperm(n, generator=gen(n))
    for a, b in ((s @ q, t), (lengths * s, t), (s, lengths * t), (F.pad(s, (0, 2)), t), (s[perm], t[perm])):
        torch.testing.assert_close(loss(a, b), loss(s, t), rtol=1e-8, atol=1e-12)
    assert loss(lengths * t, t) < 1e-12


@many
@given(embeddings(), st.sampled_from(KERNELS))
def test_cc_has_no_gradient_along_an_embedding(pair, options):
    s, t = pair
    _, (g,) = value_and_gradients(lambda s: CC(**options)(s, t), s)
    assert (g * s).sum(1).abs().max() < 1e-10


def test_cc_sees_a_shift_and_the_students_order():
    s, t = randn64(8, 5), randn64(8, 6, seed=1)
    assert abs(CC()(s + 1, t) / CC()(s, t) - 1) > .1 and abs(CC()(s.roll(1, 0), t) / CC()(s, t) - 1) > .01


@many
@given(embeddings(), st.floats(.01, 3))
def test_cc_of_order_1_is_a_multiple_of_the_bilinear_loss(pair, gamma):
    torch.testing.assert_close(CC(gamma=gamma, order=1)(*pair),
                               (2 * gamma * math.exp(-2 * gamma)) ** 2 * CC("bilinear")(*pair), rtol=1e-9, atol=1e-15)


@many
@given(embeddings(), st.floats(.01, 2))
def test_cc_of_large_order_is_the_gaussian_of_the_distances(pair, gamma):
    exact = [torch.exp(-gamma * torch.cdist(u, u, compute_mode="donot_use_mm_for_euclid_dist") ** 2) for u in map(F.normalize, pair)]
    expected = (exact[0] - exact[1]).pow(2).mean()
    for order in (30, None):
        torch.testing.assert_close(CC(gamma=gamma, order=order)(*pair), expected, rtol=1e-6, atol=1e-12)
    unnormalised = [torch.exp(-gamma * pdist(e, squared=True)) for e in pair]
    torch.testing.assert_close(CC(gamma=gamma, order=None, normalise=False)(*pair), (unnormalised[0] - unnormalised[1]).pow(2).mean())


@many
@given(embeddings())
def test_the_squared_distance_is_the_bilinear_kernel_in_disguise(pair):
    a, b = (correlation(e, "mmd") ** 2 for e in pair)
    torch.testing.assert_close((a - b).pow(2).mean(), 4 * CC("bilinear")(*pair), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("gamma, monotone", [(.1, True), (.4, True), (.5, True), (.51, False), (2, False)])
def test_order_2_turns_round_beyond_one_half(gamma, monotone):
    angle = torch.linspace(0, math.pi, 2001, dtype=torch.float64)
    row = correlation(torch.stack([angle.cos(), angle.sin()], 1), gamma=gamma)[0]        # cosine falling from 1 to -1
    assert bool((row.diff() <= 1e-15).all()) is monotone
    assert (correlation(torch.stack([angle.cos(), angle.sin()], 1), gamma=gamma, order=None)[0].diff() <= 0).all()


@many
@given(embeddings())
def test_cc_is_bounded_and_its_diagonal_says_nothing(pair):
    ends = correlation(torch.tensor([[1., 0.], [-1., 0.]], dtype=torch.float64))[0]
    n = len(pair[0])
    value = CC()(*pair)
    assert 0 <= value <= (ends[0] - ends[1]) ** 2 * (n - 1) / n + 1e-12
    gap2 = (correlation(pair[0]) - correlation(pair[1])) ** 2
    assert gap2.diagonal().max() < 1e-20
    torch.testing.assert_close(value, gap2[~torch.eye(n, dtype=torch.bool)].mean() * (n - 1) / n)


def test_cc_flattens_maps():
    s, t = randn64(4, 3, 2, 2), randn64(4, 5, 3, 3, seed=1)
    assert torch.equal(CC()(s, t), CC()(s.flatten(1), t.flatten(1)))


def test_the_namesake_of_neighbours_depends_on_the_order_and_cc_does_not():
    """The notebook's claim about RepDistiller's lines: order, and a loss of 0 with every other sample right."""
    gap = lambda s, t: (s - t).abs()
    neighbours = lambda s, t: (gap(s, t)[:-1] * gap(s, t)[1:]).sum(1).mean()
    s, t = randn64(8, 5), randn64(8, 5, seed=1)
    perm = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    assert abs(neighbours(s[perm], t[perm]) / neighbours(s, t) - 1) > .01
    torch.testing.assert_close(CC()(s[perm], t[perm]), CC()(s, t))
    half = torch.where((torch.arange(8) % 2 == 0)[:, None], t, 100 * s)
    assert neighbours(half, t) == 0 and CC()(half, t) > 1e-3


@pytest.mark.parametrize("options", KERNELS, ids=kernel_ids)
@pytest.mark.parametrize("size", [1e-4, 1e4, 1e15])
def test_cc_over_the_range_of_float32(options, size):
    s, t = randn64(8, 4, dtype=torch.float32), randn64(8, 3, seed=1, dtype=torch.float32)
    torch.testing.assert_close(CC(**options)(size * s, t), CC(**options)(s, t), rtol=1e-4, atol=1e-7)


def test_a_silent_sample_gets_no_gradient():
    s, t = randn64(8, 4, dtype=torch.float32) * (torch.arange(8) > 0)[:, None], randn64(8, 3, seed=1, dtype=torch.float32)
    for options in KERNELS:
        _, (g,) = value_and_gradients(lambda s: CC(**options)(s, t), s)
        assert g[0].abs().max() == 0 and g[1:].abs().max() > 0
    unguarded = lambda s: F.mse_loss(F.normalize(s) @ F.normalize(s).T, F.normalize(t) @ F.normalize(t).T)
    assert value_and_gradients(unguarded, s)[1][0].abs().max() > 1e8


def test_from_features_reads_the_sizes_and_state_dict_makes_the_round_trip():
    s, t = [torch.randn(2, 3, 8, 8), torch.randn(2, 5)], [torch.randn(2, 6, 4, 4), torch.randn(2, 7)]
    loss = VID.from_features(s, t, mid_channels=4, init_variance=2.)
    assert [tuple(p.shape) for p in loss.parameters()] == [(4, 3, 1, 1), (4, 4, 1, 1), (6, 4, 1, 1), (4, 5, 1, 1),
                                                           (4, 4, 1, 1), (7, 4, 1, 1), (6,), (7,)]
    other = VID([3, 5], [6, 7], mid_channels=4)
    assert other(s, t) != loss(s, t)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(s, t), loss(s, t))
    single = VID.from_features(s[0], t[0])
    assert list(single.state_dict()) == ["regressors.0.0.weight", "regressors.0.2.weight", "regressors.0.4.weight", "alphas.0"]
    assert single.regressors[0][0].out_channels == 6 and single(s[0], t[0]).dim() == 0
    assert not list(CC().parameters()) and not CC().state_dict()
    assert (repr(CC()) == "CC(kernel='gaussian', gamma=0.4, order=2)"
            and repr(CC("mmd", normalise=False)) == "CC(kernel='mmd', normalise=False)")
    assert "eps=1e-05" in repr(single)

f4, e2 = torch.rand(4, 3, 2, 2), torch.rand(4, 3)


ERRORS = [
    (lambda: CC("rbf"), "CC needs the kernel 'gaussian', 'bilinear' or 'mmd'; got 'rbf'"),
    (lambda: CC(gamma=0), "CC needs a positive gamma; got gamma = 0"),
    (lambda: CC(gamma=float("nan")), "CC needs a positive gamma; got gamma = nan"),
    (lambda: CC(order=0), "CC needs a whole order of at least 1, or None for the exact kernel; got order = 0"),
    (lambda: CC(order=2.5), "got order = 2.5"),
    (lambda: correlation(e2, kernel="mmd2"), "got 'mmd2'"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_given_and_what_is_needed(call, message):
    assert_says(call, message)
