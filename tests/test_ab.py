"""AB: values and gradients of other code, what it ignores; and the connectors that it shares with OFD."""
import copy

from hypothesis import given
from hypothesis import strategies as st
import pytest
from torch import nn
import torch
import torch.nn.functional as F

from helpers import assert_same, assert_says, gen, made, many, value_and_gradients
from relkd.losses.ab import AB, Connector
from relkd.losses.ofd import OFD, margin_from_batchnorm, margin_from_maps

TOLERANCES = [(torch.float32, 2e-6), (torch.float64, 1e-13)]


@st.composite
def maps(draw, channels=True):
    """Student and teacher pre-activations in float64, of equal channels unless `channels` is False."""
    n, cs = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    ct = cs if channels else draw(st.integers(1, 5))
    h, w = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    g = gen(draw(st.integers(0, 10**6)))
    size, shift = 10 ** draw(st.floats(-2, 2)), draw(st.floats(-2, 2))
    return (torch.randn(n, cs, h, w, generator=g, dtype=torch.float64) * size,
            torch.randn(n, ct, h, w, generator=g, dtype=torch.float64) + shift)


def ab_loop(s, t, margin=1.):
    total = 0
    for a, b in zip(s.flatten().tolist(), t.flatten().tolist()):
        total += max(0, margin - a if b > 0 else margin + a) ** 2
    return total


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("margin", [.5, 1., 2.])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ab_is_torchdistills_alternative_loss(dtype, tolerance, margin, reduction):
    """torchdistill's 'mean' divides by N alone: a scale of 1 here, with its pairs' weights; the authors' default is 3/1000 of it."""
    AltActTransferLoss = pytest.importorskip("torchdistill.losses.mid_level").AltActTransferLoss

    shapes, weights = [(3, 8, 8), (5, 4, 4)], [.3, 2.]
    s = [torch.randn(6, *c, generator=gen(k), dtype=dtype) for k, c in enumerate(shapes)]
    t = [torch.randn(6, *c, generator=gen(k + 9), dtype=dtype) for k, c in enumerate(shapes)]
    theirs = AltActTransferLoss({k: {**{r: {"io": "o", "path": k} for r in ("student", "teacher")}, "weight": w}
                                 for k, w in zip("ab", weights)}, margin, reduction)
    io = lambda fs: {k: {"o": f} for k, f in zip("ab", fs)}
    mine = AB([3, 5], [3, 5], margin=margin, scale=1 if reduction == "mean" else 6, layer_weights=weights)
    assert_same(value_and_gradients(lambda *s: mine(s, t), *s), value_and_gradients(lambda *s: theirs(io(s), io(t)), *s), tolerance)
    if reduction == "mean":
        default = AB([3, 5], [3, 5], margin=margin, layer_weights=weights)
        torch.testing.assert_close(default(s, t), .003 * theirs(io(s), io(t)))


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
def test_ab_behind_a_connector_is_torchdistills_loss_behind_a_convolution_and_a_batch_norm(dtype, tolerance):
    AltActTransferLoss = pytest.importorskip("torchdistill.losses.mid_level").AltActTransferLoss

    s, t = torch.randn(6, 3, 4, 5, generator=gen(0), dtype=dtype), torch.randn(6, 7, 4, 5, generator=gen(1), dtype=dtype)
    mine = made(AB, 3, 7, dtype=dtype)
    theirs = AltActTransferLoss({"a": {r: {"io": "o", "path": "a"} for r in ("student", "teacher")}}, 1., "mean")
    norm = nn.BatchNorm2d(7).to(dtype)
    other = lambda s, w: .003 * theirs({"a": {"o": norm(F.conv2d(s, w[..., None, None]))}}, {"a": {"o": t}})
    inside = lambda s, w: torch.func.functional_call(mine, {"connectors.0.weight": w}, (s, t))
    assert_same(*(value_and_gradients(f, s, mine.connectors[0].weight) for f in (inside, other)), 5 * tolerance)
    for a, b in zip(mine.connectors[0].norm.buffers(), norm.buffers()):
        torch.testing.assert_close(a, b)


def test_values_worked_on_paper():
    s, t = torch.tensor([[[[.5, 2., .5, -.5]]]]), torch.tensor([[[[2., .1, -.1, -3.]]]])
    assert AB(1, 1)(s, t).item() == pytest.approx(2.75 * .003) and AB(1, 1, scale="mean")(s, t).item() == pytest.approx(2.75 / 4)
    s, t = torch.tensor([[[[1.5, -.2, -1., .5]]]]), torch.tensor([[[[2., .1, -.5, -3.]]]])
    assert OFD(1, 1, margins=-1., connector=False)(s, t).item() == pytest.approx(2.59e-3)
    assert margin_from_maps(t).item() == pytest.approx(-1.75)


def test_the_versions_differ_by_what_the_notebooks_say():
    """3/1000 of a sum with powers of two is 12.288 times the sum of the means on the stages of a CIFAR ResNet."""
    shapes = [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    s, t = ([torch.randn(2, *c, generator=gen(k)) for k, c in enumerate(shapes)],
            [torch.randn(2, *c, generator=gen(k + 9)) for k, c in enumerate(shapes)])
    c = [16, 32, 64]
    means = AB(c, c, scale="mean", layer_weights=[1, 1, 1])(s, t)
    torch.testing.assert_close(AB(c, c)(s, t), 12.288 * means)
    torch.testing.assert_close(AB(c, c, scale=.001)(s, t), 4.096 * means)
    torch.testing.assert_close(OFD(c, c, connector=False)(s, t),
                               4.096 * OFD(c, c, scale="mean", layer_weights=[1, 1, 1], connector=False)(s, t))


@many
@given(maps(), st.floats(.01, 10))
def test_ab_equals_the_loop_and_bounds_the_count_of_disagreements(pair, margin):
    s, t = pair
    total = AB(s.shape[1], s.shape[1], margin=margin, scale=len(s), layer_weights=[1])(s, t)
    torch.testing.assert_close(total.item(), ab_loop(s, t, margin), rtol=1e-10, atol=1e-12)
    assert total / margin**2 >= ((s > 0) != (t > 0)).sum() * (1 - 1e-12)


@many
@given(maps())
def test_ab_sees_only_the_signs_of_the_teacher(pair):
    s, t = pair
    c = s.shape[1]
    loss = AB(c, c)
    value = loss(s, t)
    for moved in (t * torch.rand_like(t).exp(), 1e3 * t, t.sign(), t**3, t.relu()):
        assert torch.equal(loss(s, moved), value)


@many
@given(maps(), st.floats(.1, 5))
def test_ab_beyond_the_margin_has_no_loss_and_no_gradient(pair, margin):
    s, t = pair
    side = (t > 0).to(t.dtype) * 2 - 1
    value, (g,) = value_and_gradients(lambda s: AB(t.shape[1], t.shape[1], margin=margin)(s, t), side * (margin + s.abs()))
    assert value == 0 and g.abs().max() == 0


@many
@given(maps())
def test_ab_with_a_large_margin_is_the_squared_distance_to_the_margins(pair):
    s, t = pair
    c, margin = s.shape[1], s.abs().max().item() + 1
    side = (t > 0).to(t.dtype) * 2 - 1
    torch.testing.assert_close(AB(c, c, margin=margin, scale="mean")(s, t), F.mse_loss(s, margin * side))


@many
@given(maps())
def test_ab_after_the_students_relu_has_a_floor(pair):
    s, t = pair
    c = s.shape[1]
    assert AB(c, c, scale="mean")(s.relu(), t) >= (t <= 0).double().mean() - 1e-12


@many
@given(maps(channels=False), st.floats(.5, 10), st.floats(-3, 3))
def test_connectors_in_training_take_out_the_students_scale_and_shift(pair, scale, shift):
    s, t = pair
    s = torch.randn_like(s)
    for loss in (made(AB, s.shape[1], t.shape[1], dtype=torch.float64, connector=True),
                 made(OFD, s.shape[1], t.shape[1], dtype=torch.float64)):
        for c in loss.connectors:
            c.norm.eps = 1e-12
        torch.testing.assert_close(loss(scale * s + shift, t), loss(s, t), rtol=1e-5, atol=1e-8)


def test_a_list_is_the_weighted_sum_over_its_layers():
    s = [torch.randn(4, c, k, k, generator=gen(c)) for c, k in ((3, 8), (5, 4), (7, 2))]
    t = [torch.randn(4, c, k, k, generator=gen(c + 9)) for c, k in ((3, 4), (5, 4), (7, 2))]
    c = [3, 5, 7]
    for cls, options in ((AB, {}), (OFD, {"connector": False})):
        one = [cls(k, k, **options)(a, b) for k, a, b in zip(c, s, t)]
        torch.testing.assert_close(cls(c, c, **options)(s, t), one[0] / 4 + one[1] / 2 + one[2])
        torch.testing.assert_close(cls(c, c, layer_weights=[3, 0, 1], **options)(s, t), 3 * one[0] + one[2])
        assert torch.equal(cls(3, 3, **options)(tuple(s[:1]), t[:1]), cls(3, 3, **options)(s[0], t[0]))


def test_embeddings_are_maps_of_one_position():
    s, t = torch.randn(6, 3, generator=gen(0)), torch.randn(6, 5, generator=gen(1))
    for cls in (AB, OFD):
        loss = made(cls, 3, 5)
        torch.testing.assert_close(loss(s, t), loss(s[..., None, None], t[..., None, None]))
    assert margin_from_maps(t).shape == (5,)


def test_precisions_mix_upwards_and_the_running_statistics_move_all_the_same():
    s, t = torch.randn(8, 3, 4, 4, generator=gen(0)), torch.randn(8, 5, 4, 4, generator=gen(1))
    for cls in (AB, OFD):
        loss = made(cls, 3, 5)
        wide, half = copy.deepcopy(loss), copy.deepcopy(loss).half()
        assert (loss(s.half(), t).dtype == torch.float32 and wide(s.double(), t).dtype == torch.float64
                and half(s.half(), t.half()).dtype == torch.float32)
        assert made(cls, 3, 5, dtype=torch.float64)(s, t).dtype == torch.float64
        for other in (wide, half):
            assert other.connectors[0].norm.num_batches_tracked == 1 and other.connectors[0].norm.running_mean.abs().sum() > 0
            torch.testing.assert_close(other.connectors[0].norm.running_var.float(), loss.connectors[0].norm.running_var,
                                       rtol=2e-2, atol=2e-3)


def test_a_connector_is_a_convolution_and_a_batch_norm():
    connector = Connector(3, 64)
    assert connector.weight.shape == (64, 3) and connector.weight.std().item() == pytest.approx((2 / 64)**.5, rel=.2)
    s = torch.randn(4, 3, 5, 5)
    norm = nn.BatchNorm2d(64)
    torch.testing.assert_close(connector(s), norm(F.conv2d(s, connector.weight[..., None, None])))
    assert connector.norm.num_batches_tracked == 1
    connector.eval(), norm.eval()
    torch.testing.assert_close(connector(s), norm(F.conv2d(s, connector.weight[..., None, None])))
    assert connector.norm.num_batches_tracked == 1 and connector(s[:1, :, :1, :1]).shape == (1, 64, 1, 1)


def test_connectors_stand_where_they_are_asked_for():
    kinds = lambda loss: [type(c).__name__ for c in loss.connectors]
    assert kinds(AB([3, 5], [3, 7])) == ["Identity", "Connector"] and kinds(AB([3, 5], [3, 7], connector=True)) == ["Connector"] * 2
    assert kinds(OFD([3, 5], [3, 7])) == ["Connector"] * 2 and kinds(OFD([3, 5], [3, 7], connector=None)) == ["Identity", "Connector"]
    assert kinds(AB(3, 3, connector=False)) == ["Identity"] and not list(AB(3, 3).parameters())


@pytest.mark.parametrize("cls, options, extra", [(AB, {}, []), (OFD, {}, []),
                                                 (OFD, {"margins": [-torch.rand(6), -torch.rand(7)]}, ["margin0", "margin1"])])
def test_from_features_reads_the_sizes_and_state_dict_makes_the_round_trip(cls, options, extra):
    s, t = [torch.randn(4, 3, 8, 8), torch.randn(4, 5)], [torch.randn(4, 6, 4, 4), torch.randn(4, 7)]
    loss = cls.from_features(s, t, **options)
    assert type(loss) is cls and loss.channels == [(3, 6), (5, 7)] and loss.layer_weights == [.5, 1.]
    assert [tuple(p.shape) for p in loss.parameters()] == [(6, 3), (6,), (6,), (7, 5), (7,), (7,)]
    assert [k for k in loss.state_dict() if "margin" in k] == extra
    loss(s, t)
    other = cls([3, 5], [6, 7], **({"margins": 0.} if extra else {}))
    assert other.eval()(s, t) != loss.eval()(s, t)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(s, t), loss(s, t))


def test_repr_shows_the_options():
    assert "margin=0.5, scale=0.003, layer_weights=[0.5, 1.0]" in repr(AB([3, 4], [3, 4], margin=.5))
    assert "margins='batch', scale='mean', layer_weights=[2.0]" in repr(OFD(3, 4, scale="mean", layer_weights=[2]))
    assert "margins='fixed'" in repr(OFD(3, 4, margins=-1.))


@pytest.mark.parametrize("cls", [AB, OFD])
def test_a_student_learns_with_its_connector(cls):
    x = torch.randn(32, 1, 6, 6, generator=gen(0))
    teacher = F.conv2d(x, torch.randn(5, 1, 3, 3, generator=gen(1)), padding=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student, loss = nn.Conv2d(1, 5, 3, padding=1), cls(5, 5, connector=True)
    agree = lambda: ((loss.connectors[0](student(x)) > 0) == (teacher > 0)).float().mean().item()
    opt = torch.optim.Adam([*student.parameters(), *loss.parameters()], lr=.05)
    first, before = loss(student(x), teacher).item(), agree()
    for _ in range(100):
        opt.zero_grad()
        last = loss(student(x), teacher)
        last.backward()
        opt.step()
    assert last.item() < .3 * first and agree() > max(.9, before)


def test_the_lab_builds_them_and_trains_ab_alone_first():
    from relkd.features import Features
    from relkd.models import create

    layers = [f"layer{k}.relu:input" for k in (1, 2, 3)]
    student, teacher = create("resnet8x0.5", 10, 1), create("resnet8", 10, 1)
    x = torch.randn(4, 1, 8, 8, generator=gen(0))
    s, t = ([*Features(net, layers)(x).values()] for net in (student, teacher))
    margins = [margin_from_batchnorm(teacher.get_submodule(f"layer{k}.0.bn2")) for k in (1, 2, 3)]
    for loss in (AB.from_features(s, t), OFD.from_features(s, t), OFD.from_features(s, t, margins=margins)):
        assert loss.channels == [(8, 16), (16, 32), (32, 64)] and min(f.min() for f in (*s, *t)) < 0
        student.zero_grad()
        loss(s, t).backward(retain_graph=True)
        assert (all(p.grad is not None for p in loss.parameters()) and student.conv1.weight.grad.abs().sum() > 0
                and student.fc.weight.grad is None)

f4, e2 = torch.rand(4, 3, 2, 2), torch.rand(4, 3)


ERRORS = [
    (lambda: AB(3, 3, margin=0), "AB needs a positive margin; got 0"),
    (lambda: AB(3, 3, margin=float("nan")), "AB needs a positive margin; got nan"),
    (lambda: AB(3, 3, scale=0), "AB needs a positive scale, or 'mean'; got 0"),
    (lambda: AB(3, 5, connector=False), "AB without connectors needs equal channels; got 3 and 5"),
    (lambda: AB([3, 3], 3), r"AB needs as many in_channels as out_channels, each at least 1; got \[3, 3\] and 3"),
    (lambda: AB([], []), "each at least 1"),
    (lambda: AB([3, 3], [3, 3], layer_weights=[1]), "AB needs one layer weight a layer; got 1 for 2"),
    (lambda: AB(3, 3)([f4, f4], [f4, f4]), r"AB was made for 1 layer\(s\); got 2"),
    (lambda: AB(3, 5)(e2[:1], torch.rand(1, 5)), r"needs more than one value a channel; got \(1, 3\)"),
    (lambda: AB.from_features(f4, None), "AB needs teacher maps"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_given_and_what_is_needed(call, message):
    assert_says(call, message)
