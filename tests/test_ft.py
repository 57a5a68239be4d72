"""FT and its namesake FTShortcut: values and gradients of other code, the stages, what they ignore."""
from dataclasses import replace
from functools import partial
import copy

from hypothesis import given
from hypothesis import strategies as st
import pytest
from torch import nn
import torch
import torch.nn.functional as F

from helpers import assert_same, assert_says, gen, made, many, randn, value_and_gradients
from relkd.losses.at import AT, attention
from relkd.losses.fsp import FSP
from relkd.losses.ft import FT, FTShortcut, Paraphraser, Translator, unit_factor

ft = partial(made, FT)
TOLERANCES = [(torch.float32, 5e-6), (torch.float64, 1e-12)]


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("p, reduction", [(1, "mean"), (2, "norm")])
@pytest.mark.parametrize("batchnorm", [False, True])
def test_ft_is_torchdistills_with_the_same_weights(dtype, tolerance, p, reduction, batchnorm):
    """torchdistill takes the mean for p = 1 and a length for every other p: 'mean' and 'norm' here."""
    FTLoss = pytest.importorskip("torchdistill.losses.mid_level").FTLoss
    module = pytest.importorskip("torchdistill.models.wrapper")
    Paraphraser4FactorTransfer, Translator4FactorTransfer = module.Paraphraser4FactorTransfer, module.Translator4FactorTransfer

    loss = ft(3, 8, p=p, reduction=reduction, batchnorm=batchnorm, dtype=dtype)
    paraphraser, translator = (Paraphraser4FactorTransfer(.5, 8, uses_bn=batchnorm).to(dtype),
                               Translator4FactorTransfer(3, 4, uses_bn=batchnorm).to(dtype))
    paraphraser.load_state_dict(loss.paraphrasers[0].state_dict())
    translator.load_state_dict(loss.translators[0].state_dict())
    paraphraser.eval()
    s, t = randn(4, 3, 5, 4, dtype=dtype), randn(4, 8, 5, 4, seed=1, dtype=dtype)
    theirs = lambda s: FTLoss(p=p)({"translator": {"output": translator(s)}}, {"paraphraser": {"output": paraphraser.encoder(t).detach()}})
    assert_same(value_and_gradients(lambda s: loss(s, t), s), value_and_gradients(theirs, s), tolerance)
    loss(s, t).backward()
    theirs(s).backward()
    for a, b in zip(loss.translators[0].parameters(), translator.parameters()):
        assert (a.grad - b.grad).abs().max() <= 20 * tolerance * max(1., b.grad.abs().max())


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("reconstruction, other", [("l1", F.l1_loss), ("l2", F.mse_loss)])
def test_prepare_is_torchdistills_reconstruction(dtype, tolerance, reconstruction, other):
    Paraphraser4FactorTransfer = pytest.importorskip("torchdistill.models.wrapper").Paraphraser4FactorTransfer

    loss = ft(3, 8, reconstruction=reconstruction, batchnorm=True, dtype=dtype)
    theirs = Paraphraser4FactorTransfer(.5, 8).to(dtype)
    theirs.load_state_dict(loss.paraphrasers[0].state_dict())
    s, t = randn(4, 3, 5, 4, dtype=dtype), randn(4, 8, 5, 4, seed=1, dtype=dtype)
    mine, expected = loss.prepare(s, t), other(theirs(t), t)
    torch.testing.assert_close(mine, expected, rtol=tolerance, atol=0)
    mine.backward()
    expected.backward()
    for a, b in zip(loss.paraphrasers[0].parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    for a, b in zip(loss.paraphrasers[0].buffers(), theirs.buffers()):
        torch.testing.assert_close(a, b)                          # batch normalisation is awake in the first stage


def test_ft_worked_on_paper_and_the_papers_norm():
    loss = ft(2, 2, rate=1)
    with torch.no_grad():
        for conv in (m for net in (loss.translators[0], loss.paraphrasers[0].encoder) for m in net if isinstance(m, nn.Conv2d)):
            conv.bias.zero_()
            conv.weight.copy_(F.pad(torch.eye(2)[..., None, None], (1, 1, 1, 1)))
    s, t = torch.tensor([[[[16.]], [[12.]]]]), torch.tensor([[[[3.]], [[4.]]]])
    assert loss(s, t).item() == pytest.approx(.2)
    loss.reduction = "norm"
    assert loss(s, t).item() == pytest.approx(.4)
    loss.p = 2
    assert loss(s, t).item() == pytest.approx(.08**.5)


@many
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(2, 5), st.integers(0, 10**6))
def test_mean_is_the_norm_over_the_number_of_entries_for_p_1(n, m, h, w, seed):
    s, t = randn(n, 2, h, w, seed=seed, dtype=torch.float64), randn(n, m, h, w, seed=seed + 1, dtype=torch.float64)
    mean, norm = (ft(2, m, rate=1, reduction=r, dtype=torch.float64) for r in ("mean", "norm"))
    torch.testing.assert_close(mean(s, t) * (m * h * w), norm(s, t), rtol=1e-10, atol=1e-14)
    assert 0 <= mean(s, t) <= 2 / (m * h * w)**.5 + 1e-12


@many
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6), st.floats(.01, 100))
def test_unit_factor_has_length_1_and_no_scale(n, m, seed, scale):
    a, b = randn(n, m, 3, 2, seed=seed, dtype=torch.float64), randn(n, m, 3, 2, seed=seed + 1, dtype=torch.float64)
    torch.testing.assert_close(unit_factor(a).norm(dim=1), torch.ones(n, dtype=torch.float64))
    torch.testing.assert_close(unit_factor(scale * a), unit_factor(a))
    cos = F.cosine_similarity(a.flatten(1), b.flatten(1))
    torch.testing.assert_close((unit_factor(a) - unit_factor(b)).pow(2).mean(), (2 * (1 - cos)).mean() / (m * 6))


def test_the_shortcut_is_at_with_an_l1_distance():
    s, t = randn(6, 3, 4, 5, dtype=torch.float64), randn(6, 7, 4, 5, seed=1, dtype=torch.float64)
    factor = lambda f: F.normalize(f.pow(2).mean(1).view(f.size(0), -1))        # the circulating 'factor'
    torch.testing.assert_close(factor(s), attention(s))
    torch.testing.assert_close(FTShortcut()(s, t), (factor(s) - factor(t)).abs().mean())
    assert FTShortcut(p=2)(s, t) == AT()(s, t) and not list(FTShortcut().parameters())
    torch.testing.assert_close(FTShortcut()([s, s], [t, t]), 2 * FTShortcut()(s, t))


def test_compare_attention_is_the_shortcut_on_factors():
    s, t = randn(6, 3, 4, 5), randn(6, 8, 4, 5, seed=1)
    loss = ft(3, 8, compare="attention", batchnorm="translator")
    factors = copy.deepcopy(loss).translators[0](s), loss.paraphrasers[0].encoder(t)
    torch.testing.assert_close(loss(s, t), FTShortcut()(*factors))
    norms = lambda net: sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert norms(loss.translators) == 3 and norms(loss.paraphrasers) == 0 and norms(FT(3, 8, batchnorm=True)) == 9 and norms(FT(3, 8)) == 0


def test_each_stage_gives_gradients_to_its_own_networks_only():
    loss = ft(3, 8, batchnorm=True)
    for method, network in (("prepare", loss.paraphrasers), ("forward", loss.translators)):
        loss.zero_grad()
        s, t = randn(4, 3, 4, 4).requires_grad_(), randn(4, 8, 4, 4, seed=1).requires_grad_()
        getattr(loss, method)(s, t).backward()
        own = {id(p) for p in network.parameters()}
        assert t.grad is None and (s.grad is None) == (method == "prepare")
        assert all((p.grad is not None) == (id(p) in own) for p in loss.parameters())


def test_paraphrasers_stay_in_evaluation_mode_outside_prepare():
    loss, s, t = ft(3, 8, batchnorm=True), randn(4, 3, 4, 4), randn(4, 8, 4, 4, seed=1)
    awake = lambda: {m.training for m in loss.paraphrasers.modules()}
    assert awake() == {False} and loss.translators[0].training
    assert loss.train() is loss and awake() == {False} and loss.eval() is loss and not loss.translators[0].training
    statistics = lambda: {k: v.clone() for k, v in loss.paraphrasers.state_dict().items() if "running" in k}
    before = statistics()
    loss.prepare(s, t)                                            # after eval(): statistics stay
    loss.train()(s, t)
    assert all(v.equal(before[k]) for k, v in statistics().items()) and awake() == {False}
    loss.prepare(s, t)
    assert not any(v.equal(before[k]) for k, v in statistics().items()) and awake() == {False}
    nn.ModuleList([loss]).train()                                 # as the engine does
    assert awake() == {False}


def test_the_engine_trains_the_paraphraser_first_and_then_leaves_it_alone():
    from relkd.data import Batches, load
    from relkd.distill import Row, Stage, Term
    from relkd.models import create
    from relkd.train import Learner, Schedule, fit

    term = Term("FT", 200., "layer3", "layer3", {"batchnorm": True})
    row = Row("FT", (term,), before=(Stage((replace(term, weight=1.),), 1),))
    learner = Learner(create("resnet8x0.5", 10, 1), row, Schedule(1, 50, .05, weight_decay=5e-4))
    parts, step, seen = None, learner.step, []

    def watched(*args):
        nonlocal parts
        loss = next(iter(learner.objective.losses.values()))
        first, parts = learner.stage == 0, (loss.paraphrasers, loss.translators, learner.model)
        before = [{k: v.clone() for k, v in m.state_dict().items() if "running" not in k and "num" not in k
                   or m is loss.paraphrasers} for m in parts]
        step(*args)
        seen.append((first, [all(v.equal(m.state_dict()[k]) for k, v in b.items()) for m, b in zip(parts, before)]))

    learner.step = watched
    fit([learner], Batches(load("digits"), 50, 0, torch.arange(100)), 1, create("resnet8", 10, 1, seed=9))
    assert seen == [(True, [False, True, True])] * 2 + [(False, [True, False, False])] * 2


def test_a_paraphraser_and_then_a_student_learn():
    g = gen(0)
    x = torch.randn(32, 2, 4, 4, generator=g)
    t = F.conv2d(x, torch.randn(8, 2, 1, 1, generator=g)).relu()      # 8 channels that 2 can say
    loss, student = ft(3, 8, rate=.25), nn.Conv2d(2, 3, 1)
    with torch.no_grad():
        student.weight.copy_(torch.randn(student.weight.shape, generator=g))
    for value, parameters in ((lambda: loss.prepare(student(x), t), [*loss.paraphrasers.parameters()]),
                              (lambda: loss(student(x), t), [*loss.translators.parameters(), *student.parameters()])):
        opt, first = torch.optim.Adam(parameters, lr=.01), value().item()
        for _ in range(120):
            opt.zero_grad()
            last = value()
            last.backward()
            opt.step()
        assert last.item() < .5 * first


def test_a_silent_factor_has_no_direction():
    base, goal = torch.rand(2, 3, 2, 2, generator=gen(0)), unit_factor(torch.rand(2, 3, 2, 2, generator=gen(1)))
    for size in (0, 1e-12, 1e-7):
        value, (g,) = value_and_gradients(lambda f: (unit_factor(f) - goal).abs().mean(), size * base)
        assert g.abs().max() == 0 and value == goal.abs().mean()
    assert value_and_gradients(lambda f: (F.normalize(f.flatten(1)) - goal).abs().mean(), 0 * base)[1][0].abs().max() > 1e9


@pytest.mark.parametrize("batchnorm", [False, True])
def test_ft_mixes_precisions_upwards(batchnorm):
    s, t, loss = randn(4, 3, 4, 4), randn(4, 8, 4, 4, seed=1), ft(3, 8, batchnorm=batchnorm)
    for f in (loss, loss.prepare):
        assert f(s.half(), t.half()).dtype == torch.float32 and f(s, t.double()).dtype == torch.float64
    half = copy.deepcopy(loss).half()
    assert half(s.half(), t).dtype == torch.float32 and copy.deepcopy(loss).double()(s, t).dtype == torch.float64
    exact, mixed = loss.eval().double(), loss.float()
    mixed(s.double(), t.double()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in mixed.translators.parameters())


def test_from_features_lists_and_the_state_dict_round_trip():
    s, t = [randn(2, 3, 8, 8), randn(2, 5, 4, 4)], [randn(2, 6, 4, 4), randn(2, 8, 4, 4)]
    loss = FT.from_features(s, t, rate=.5)
    assert [[r[0].in_channels, p.encoder[0].in_channels, r[-2].out_channels, p.encoder[-2].out_channels]
            for r, p in zip(loss.translators, loss.paraphrasers)] == [[3, 6, 3, 3], [5, 8, 4, 4]]
    other = FT([3, 5], [6, 8])
    assert other(s, t) != loss(s, t)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(s, t), loss(s, t))
    one = [FT.from_features(a, b) for a, b in zip(s, t)]
    for a, r, p in zip(one, loss.translators, loss.paraphrasers):
        a.translators[0].load_state_dict(r.state_dict())
        a.paraphrasers[0].load_state_dict(p.state_dict())
    torch.testing.assert_close(loss(s, t), one[0](s[0], t[0]) + one[1](s[1], t[1]))
    torch.testing.assert_close(loss.prepare(s, t), one[0].prepare(s[0], t[0]) + one[1].prepare(s[1], t[1]))
    assert FT(64, 64, rate=.7).translators[0][-2].out_channels == 45 and not FSP().state_dict()
    assert (repr(FSP(pool="avg")) == "FSP(pairs=None, weights=None, pool='avg', reduction='norm')"
            and repr(FTShortcut(p=2)) == "FTShortcut(p=2)")
    assert "rate=0.5, p=1, reduction='mean', reconstruction='l2', batchnorm=False, compare='factor'" in repr(loss)


def test_maps_of_different_size_are_pooled_in_both_stages():
    s, big = randn(4, 3, 4, 2), randn(4, 8, 8, 6, seed=1)
    small, loss = F.adaptive_avg_pool2d(big, (4, 2)), ft(3, 8)
    for both in (loss, loss.prepare):
        torch.testing.assert_close(both(s, big), both(s, small))


def test_networks_of_the_authors_sizes():
    p, r = Paraphraser(64, 32), Translator(16, 32)
    assert ([tuple(m.weight.shape) for m in p.modules() if hasattr(m, "weight")]
            == [(64, 64, 3, 3), (32, 64, 3, 3), (32, 32, 3, 3), (32, 32, 3, 3), (32, 64, 3, 3), (64, 64, 3, 3)])
    assert [tuple(m.weight.shape) for m in r if hasattr(m, "weight")] == [(16, 16, 3, 3), (32, 16, 3, 3), (32, 32, 3, 3)]
    assert {m.negative_slope for net in (p, r) for m in net.modules() if isinstance(m, nn.LeakyReLU)} == {.1}
    x = torch.rand(2, 64, 5, 7)
    assert p(x).shape == x.shape and p.encoder(x).shape == (2, 32, 5, 7)

f4, e2 = torch.rand(4, 3, 2, 2), torch.rand(4, 3)


ERRORS = [
    (lambda: FT([3, 3], 3), r"FT needs as many in_channels as out_channels, each at least 1; got \[3, 3\] and 3"),
    (lambda: FT(0, 3), "each at least 1; got 0 and 3"),
    (lambda: FT([], []), "each at least 1"),
    (lambda: FT(3, 5, rate=.05), "FT needs a rate that leaves a factor at least 1 channel; got rate = 0.05 of 5 channels"),
    (lambda: FT(3, 5, rate=float("nan")), "got rate = nan"),
    (lambda: FT(3, 5, rate=float("inf")), "got rate = inf"),
    (lambda: FT(3, 5, p=.5), "FT needs a finite power of at least 1; got p = 0.5"),
    (lambda: FT(3, 5, reduction="sum"), "FT needs reduction to be one of 'mean', 'norm'; got 'sum'"),
    (lambda: FT(3, 5, reconstruction="mse"), "FT needs reconstruction to be one of 'l1', 'l2'; got 'mse'"),
    (lambda: FT(3, 5, batchnorm="student"), "FT needs batchnorm to be one of False, True, 'translator'; got 'student'"),
    (lambda: FT(3, 5, compare="map"), "FT needs compare to be one of 'factor', 'attention'; got 'map'"),
    (lambda: FT(3, 5)(f4, f4), "FT was made for 3 student and 5 teacher channels; got 3 and 3: "
                               "FT.from_features reads them from an example"),
    (lambda: FT(3, 5).prepare(f4, f4), "FT was made for 3 student and 5 teacher channels"),
    (lambda: FT(3, 3)([f4, f4], [f4, f4]), r"FT was made for 1 layer\(s\); got 2"),
    (lambda: FT(3, 3)(f4, e2), r"FT needs teacher maps of shape \(N, C, H, W\), floating point; "
                               r"got \(4, 3\), torch.float32: take a layer before the pooling"),
    (lambda: FT.from_features(f4, None), "FT needs teacher maps"),
    (lambda: FTShortcut(p=0), "FTShortcut needs a finite power of at least 1; got p = 0"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_given_and_what_is_needed(call, message):
    assert_says(call, message)
