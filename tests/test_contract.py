"""What every loss keeps, asked of every loss with its default options and with others; a test of one loss stands in its own file."""
import copy
import inspect
import io
import warnings
from itertools import product

import pytest
import torch
from torch import nn
import torch.nn.functional as F

from relkd import losses
from relkd.losses import RKD, DistillationLoss, FitNet, as_loss
from relkd.losses.contract import as_map_pairs, as_pair
from helpers import CASES, DEFAULTS, DTYPES, Sized, as_given, assert_says, case, made, make, randn, value_and_gradients

every_case = pytest.mark.parametrize("name", CASES)
every_loss = pytest.mark.parametrize("name", DEFAULTS)


def called(loss, t, more, part=None):
    """The loss as a function of the student's layers."""
    return lambda *s: loss(as_given(list(s)), as_given(t) if part is None else part, **more)


def widened(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def trained(loss):
    """Names and values of the parameters that a student's step trains: not FT's paraphrasers, whose stage is over."""
    return {k: p for k, p in loss.named_parameters() if "paraphrasers" not in k}


def test_every_exported_loss_is_asked_and_has_the_signature_of_the_contract():
    assert set(losses.__all__) == set(DEFAULTS)
    for name in losses.__all__:
        cls = getattr(losses, name)
        assert issubclass(cls, DistillationLoss) and issubclass(cls, torch.nn.modules.loss._Loss)     # some libraries ask for the latter
        for method, first in (("forward", ["self", "student", "teacher", "index"]),
                              ("prepare", ["self", "student", "teacher", "index"]),
                              ("from_features", ["student", "teacher", "labels"])):
            assert list(inspect.signature(getattr(cls, method)).parameters)[:len(first)] == first


# ---- value, gradient, and who gets it

@every_case
def test_a_number_without_dimensions_student_first_teacher_without_gradient(name):
    loss, s, t, more = case(name)
    for f in (*s, *t):
        f.requires_grad_()
    value = called(loss, t, more)(*s)
    value.backward()
    assert value.shape == () and value.dtype == torch.float32
    assert all(f.grad is not None and f.grad.isfinite().all() and f.grad.abs().max() > 0 for f in s) and all(f.grad is None for f in t)
    assert all(p.grad is not None for p in trained(loss).values())


@pytest.mark.parametrize("name", [name for name in CASES if name != "NST gaussian"])      # whose width is taken as a constant
def test_gradcheck(name, flags):
    """In the layers and in the loss's own parameters."""
    if name == "FT attention" and "slow" not in flags:
        pytest.skip("takes three seconds: --flags slow")
    loss, s, t, more = case(name, 3, dtype=torch.float64)
    loss = loss.double()
    s, t = ([f[:, :, :3, :2] if f.dim() == 4 else f for f in layers] for layers in (s, t))
    if name.startswith("CRD"):
        called(loss, t, more)(*s)                            # fixes the constant Z
        loss.eval()
    own = trained(loss)

    def f(*inputs):
        return torch.func.functional_call(loss, dict(zip(own, inputs[len(s):])), (as_given(list(inputs[:len(s)])), as_given(t)), more)

    assert torch.autograd.gradcheck(f, [x.detach().clone().contiguous().requires_grad_() for x in (*s, *own.values())])


@every_case
def test_a_teacher_under_inference_mode_is_as_good_as_under_no_grad(name):
    """Bit for bit; and its part, computed there, serves as well."""
    loss, s, t, more = case(name)
    with torch.inference_mode():
        inferred = [f.clone() for f in t]
        part = loss.teacher_part(as_given(inferred))
    plain, mine, by_part = (value_and_gradients(called(copy.deepcopy(loss), *args), *s)
                            for args in ((t, more), (inferred, more), (t, more, part)))
    assert torch.equal(plain[0], mine[0]) and all(torch.equal(a, b) for a, b in zip(plain[1], mine[1]))
    torch.testing.assert_close(plain, by_part, rtol=1e-4, atol=1e-6)


@every_case
def test_what_an_engine_may_ask_of_any_loss(name):
    loss, s, t, more = case(name)
    loss.eval()
    with torch.no_grad():
        value = called(loss, t, more)(*s)
        if not name.startswith("CRD"):                       # which remembers samples
            assert torch.equal(called(loss, t, {"index": torch.arange(8)})(*s), value)
            if not name.startswith("FT") or name == "FTShortcut":
                assert torch.equal(loss.prepare(as_given(s), as_given(t), more.get("index")), value)
        shares = []
        for rank in range(3):
            loss.split(rank, 3)
            shares.append(called(loss, t, more)(*s))
    torch.testing.assert_close(torch.stack(shares).mean(), value)
    assert loss.part_name is None and loss.teacher_part(t) is t or isinstance(loss.part_name, str)


@every_case
def test_a_student_learns_from_it_alone(name):
    """A linear or convolutional student, the loss's own parameters beside it, thirty steps."""
    loss, s, t, more = case(name)
    torch.manual_seed(1)
    x = [torch.randn(8, 3, *f.shape[2:]) if f.dim() == 4 else torch.randn(8, 12) for f in s]
    bodies = nn.ModuleList(nn.Conv2d(3, f.shape[1], 3, padding=1) if f.dim() == 4 else nn.Linear(12, f.shape[1]) for f in s)
    opt = torch.optim.Adam([*bodies.parameters(), *loss.parameters()], lr=.02)
    values = []
    for _ in range(30):
        opt.zero_grad()
        value = called(loss, t, more)(*(b(v) for b, v in zip(bodies, x)))
        value.backward()
        opt.step()
        values.append(value.item())
    assert values[-1] < (.95 if name.startswith(("AT", "FT", "VID")) else .9) * values[0]


# ---- where the student is the teacher

def handing_on(layer):
    """A linear layer that passes its input on as it is."""
    with torch.no_grad():
        layer.weight.copy_(torch.eye(layer.weight.shape[0]).view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.zero_()


def at_agreement(loss, t, more=None):
    """Value and gradients with the teacher's numbers in the student's place."""
    return value_and_gradients(called(loss, t, more or {}), *t)


ALIKE = [name for name in CASES if not list(make(name).parameters()) and name not in ("AB plain", "NST bare")]


@pytest.mark.parametrize("name", ALIKE)
def test_zero_and_without_a_gradient_where_the_student_is_the_teacher(name):
    """A sign that is wrong, or a side that is scaled twice, does not pass."""
    loss, _, t, more = case(name, dtype=torch.float64)
    value, gradients = at_agreement(loss, t, more)
    assert abs(value) < 1e-12 and all(g.abs().max() < 1e-7 for g in gradients)


def test_the_same_behind_trainable_parts_that_hand_the_student_on():
    t = [randn(8, 4, 4, 4, dtype=torch.float64)]
    fitnet, vid, ft = (made(cls, 4, 4, dtype=torch.float64) for cls in (losses.FitNet, losses.VID, losses.FT))
    handing_on(fitnet.regressors[0])
    ft.translators[0].load_state_dict(ft.paraphrasers[0].encoder.state_dict())
    for conv in vid.regressors[0][::2]:
        handing_on(conv)
    for loss in (fitnet, ft):
        value, (gradient,) = at_agreement(loss, t)
        assert value == 0 and not gradient.any()
    t = [t[0].relu()]                                        # VID's regressor has a ReLU inside
    value, (gradient,) = at_agreement(vid, t)
    assert not gradient.any()
    # of its first variance: a density, not a distance
    torch.testing.assert_close(value, torch.tensor(5., dtype=torch.float64).log() / 2)
    torch.nn.init.constant_(vid.alphas[0], -50.)
    torch.testing.assert_close(at_agreement(vid, t)[0], torch.tensor(1e-5, dtype=torch.float64).log() / 2)


def test_three_that_are_not_zero_there_by_design():
    """NST without its constant, AB within its margin, CRD, which tells apart."""
    _, _, t, _ = case("NST bare", dtype=torch.float64)
    value, (gradient,) = at_agreement(make("NST bare"), t)
    assert value < -.01 and gradient.abs().max() < 1e-12
    plain = losses.AB(4, 4, connector=False)
    t = [randn(8, 4, 4, 4, dtype=torch.float64)]
    assert at_agreement(plain, t)[0] > 0
    value, (gradient,) = at_agreement(plain, [t[0].sign() * (1 + t[0].abs())])              # beyond the margin everywhere
    assert value == 0 and not gradient.any()
    crd, t = (made(losses.CRD, 6, 6, dtype=torch.float64, samples=8, feat_dim=6, negatives=7),
              [F.normalize(randn(8, 6, dtype=torch.float64))])
    for e, memory in ((crd.embed_s, crd.memory_s), (crd.embed_t, crd.memory_t)):
        handing_on(e)
        memory.copy_(t[0])
    others = torch.stack([torch.arange(8)[torch.arange(8) != k] for k in range(8)])
    value, (gradient,) = at_agreement(crd, t, {"index": torch.arange(8), "negatives": others})
    assert value > .1 and gradient.abs().max() > 1e-6


# ---- precision and extremes

@pytest.mark.parametrize("dtype", DTYPES)
@every_case
def test_finite_on_zeros_duplicates_and_extremes_in_every_precision(name, dtype):
    """CC of raw embeddings and FSP grow with a power of their inputs,
    and the batch statistics of silent maps magnify: they are asked less."""
    large = 1 if name == "CC raw" else 5 if name.startswith("FSP") else 1e4
    for n in (1 if len(CASES[name][1](1, 1)[0][0]) == 4 and not name.startswith("SP") else 3, 8):
        loss, s, t, more = case(name, n)
        if name.startswith("FT"):
            loss.eval()
        alike, silent, opposite = ([torch.cat([f[:1], factor * f[:1], f[2:]])[:n] for f in s] for factor in (1, 0, -1))
        kinds = {"random": s, "two alike": alike, "one silent": silent, "two opposite": opposite,
                 "zeros": [0 * f for f in s], "all alike": [f[:1].expand_as(f) for f in s],
                 "small": [1e-4 * f for f in s], "large": [large * f for f in s]}
        for (what, inputs), (of_teacher, teacher) in product(kinds.items(), {"random": t, "zeros": [0 * f for f in t]}.items()):
            e = [f.detach().to(dtype).requires_grad_() for f in inputs]
            value = called(loss, [f.to(dtype) for f in teacher], more)(*e)
            value.backward()
            largest = max(f.grad.abs().max().item() if f.grad.isfinite().all() else float("nan") for f in e)
            said = f"student {what}, teacher {of_teacher}, N = {n}: value {value.item():g}, largest gradient {largest:g}"
            assert value.isfinite() and value.dtype == widened(dtype), said
            assert largest < 2e5, said


@every_case
def test_autocast_changes_nothing(name):
    loss, s, t, more = case(name)
    call, prepare = (lambda: called(copy.deepcopy(loss), t, more)(*s)), (lambda: called(copy.deepcopy(loss).prepare, t, {})(*s))
    for f in (call,) if more else (call, prepare):
        plain = f()
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                inside = f()
            assert inside.dtype == torch.float32 and torch.equal(inside, plain)


@every_case
def test_precisions_mix_upwards(name):
    loss, s, t, more = case(name)
    half, wide = ([[f.to(dtype) for f in layers] for layers in (s, t)] for dtype in (torch.float16, torch.float64))
    f = lambda s, t, loss=loss: called(copy.deepcopy(loss), t, more)(*s).dtype
    assert f(half[0], t) == f(s, half[1]) == f(*half) == torch.float32
    assert f(*wide) == torch.float64
    if name != "KD" and not name.startswith(("RKD", "CC")):
        assert f(wide[0], t) == torch.float64
    if list(loss.parameters()):
        assert f(s, t, copy.deepcopy(loss).double()) == torch.float64 and f(*half, copy.deepcopy(loss).half()) == torch.float32


# ---- as a module

@every_case
def test_saved_and_read_back(name):
    loss, s, t, more = case(name)
    called(loss, t, more)(*s)                                # moves statistics and memories
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    torch.manual_seed(5)
    other = CASES[name][0]()
    other.load_state_dict(torch.load(file))
    assert torch.equal(called(loss.eval(), t, more)(*s), called(other.eval(), t, more)(*s))


@every_case
def test_value_of_the_batch_does_not_depend_on_the_memory_format(name):
    loss, s, t, more = case(name)
    moved = [[f.to(memory_format=torch.channels_last) if f.dim() == 4 else f.t().contiguous().t() for f in layers] for layers in (s, t)]
    torch.testing.assert_close(called(copy.deepcopy(loss), moved[1], more)(*moved[0]), called(loss, t, more)(*s))


@every_loss
def test_made_from_an_example_and_the_labels(name):
    _, s, t, more = case(name)
    options = {"negatives": 7, "classes": True} if name == "CRD" else {}
    loss = as_loss(name, options, as_given(s), as_given(t), labels=torch.arange(2000) % 4)
    assert type(loss) is getattr(losses, name) and called(loss, t, more)(*s).dim() == 0
    if name == "CRD":
        assert loss.samples == 2000 and not (loss.other_classes(torch.arange(8), 50) % 4 == torch.arange(8)[:, None] % 4).any()


# ---- errors

def wrong():
    """What is wrong with a batch: how it is made so, and what the message must say."""
    yield "samples differ", lambda s, t: (s, [f[:5] for f in t]), r"\b8\b.*\b5\b"
    yield "integers", lambda s, t: (s, [f.long() for f in t]), r"teacher.*floating point.*; got .*torch.int64"
    yield "no tensor", lambda s, t: ([None] * len(s), t), "student.*got NoneType"
    yield "one dimension", lambda s, t: ([f.flatten()[:8] for f in s], t), r"student.*got \(8,\)"
    yield "more layers", lambda s, t: ([*s, *s], t), None


@pytest.mark.parametrize("problem, change, message", list(wrong()), ids=lambda x: x if isinstance(x, str) and " " in x else "")
@every_loss
def test_what_is_wrong_with_a_batch_is_said_in_one_line(name, problem, change, message):
    loss, s, t, more = case(name)
    s, t = change(s, t)
    if message is None:
        pairs = len(CASES[name][1](8, 1)[0][0]) == 4
        message = (f"{name} needs as many layers of the teacher as of the student, at least .*; "
                   f"got {len(s)} of the student and {len(t)} of the teacher" if pairs else "student.*got list")
    assert_says(lambda: called(loss, t, more)(*s), message)


@pytest.mark.parametrize("name, least", [("KD", 1), ("DKD", 1), ("DIST", 3), ("DIST inter", 1),
                                         ("RKD", 3), ("RKDDistance", 3), ("RKDAngle", 3), ("CC", 2), ("SP", 2),
                                         ("PKT", 2), ("PKT distinct", 3), ("CRD", 1), ("AT", 1), ("FitNet", 1), ("FSP", 1)])
def test_too_small_a_batch_is_said_in_one_line(name, least):
    loss, s, t, more = case(name, 8)
    n = least - 1
    assert_says(lambda: loss(as_given([f[:n] for f in s]), as_given([f[:n] for f in t]), **{k: v[:n] for k, v in more.items()}),
                rf"at least {least} samples in a batch; got N = {n}: use a larger batch, or drop_last=True|none empty; "
                r"got .*\(0, |at least one; got \(0, |CRD needs")


def test_the_two_doors_detach_only_the_teacher():
    for s, t in (as_pair(torch.zeros(4, 2).requires_grad_(), torch.zeros(4, 3).requires_grad_(), 2, "x"),
                 *as_map_pairs(torch.zeros(4, 2, 1, 1).requires_grad_(), torch.zeros(4, 3, 1, 1).requires_grad_(), "x")):
        assert s.requires_grad and not t.requires_grad


# ---- losses of one's own

class Plain(nn.Module):
    def __init__(self, power=2):
        super().__init__()
        self.power = power

    def forward(self, student, teacher):
        return (student - teacher).abs().pow(self.power).mean()


@pytest.mark.parametrize("thing, options, value", [
    (F.mse_loss, None, lambda s, t: F.mse_loss(s, t)), (F.smooth_l1_loss, {"beta": .5}, lambda s, t: F.smooth_l1_loss(
        s, t, beta=.5)), (nn.MSELoss, None, lambda s, t: F.mse_loss(s, t)),
    (Plain, {"power": 3}, lambda s, t: (s - t).abs().pow(3).mean()),
    (lambda student, teacher: (student - teacher).sum(), None, lambda s, t: (s - t).sum()),
    (FitNet, {"in_channels": 4, "out_channels": 4}, None), ("AT", {"p": 1}, None), (Sized, None, None)], ids=range(8))
def test_a_name_a_class_or_a_function_becomes_a_loss(thing, options, value):
    s, t = torch.randn(8, 4).requires_grad_(), torch.randn(8, 4).requires_grad_()
    loss = as_loss(thing, options, s if thing is Sized else None, t)
    assert isinstance(loss, DistillationLoss)
    if thing == "AT":
        return
    found = loss(s, t, index=torch.arange(8))
    assert value is None or torch.equal(found, value(s, t))
    found.backward()
    assert s.grad is not None and t.grad is None and loss(s.half(), t.half()).dtype == torch.float32


@pytest.mark.parametrize("call, message", [
    (lambda: as_loss("RKDAngel"), "unknown loss 'RKDAngel': did you mean 'RKDAngle'?"),
    (lambda: as_loss("Paraphraser"), "unknown loss 'Paraphraser'"),
    (lambda: as_loss(nn.MSELoss()), "a loss is given as a class, since every student makes its own; got an object: "
                                    "give MSELoss, and its options"),
    (lambda: as_loss(3), r"a loss is a name in relkd.losses, a class, or a function of \(student, teacher\); got 3"),
    (lambda: as_loss("KD", {"t": 4.}), "KD cannot be made with the options {'t': 4.0}: .*unexpected keyword argument 't'"),
    (lambda: as_loss(FitNet), "FitNet cannot be made with the options {}: .*in_channels"),
    (lambda: as_loss(dict), r"a loss is called with \(student, teacher\); an object of dict cannot be called"),
    (lambda: as_loss(F.mse_loss, {"reduction": "none"})(torch.zeros(4, 3), torch.zeros(4, 3)),
     r"a loss is a tensor of 0 dimensions; mse_loss gave shape \(4, 3\): take a mean or a sum"),
    (lambda: as_loss(lambda student, teacher: 1.)(torch.zeros(4, 3), torch.zeros(4, 3)), "gave float"),
], ids=range(9))
def test_what_cannot_be_a_loss_is_said_in_one_line(call, message):
    assert_says(call, message)


def test_a_loss_without_forward_says_so():
    with pytest.raises(NotImplementedError, match="Empty has no forward"):
        type("Empty", (DistillationLoss,), {})()(torch.zeros(2, 2), torch.zeros(2, 2))


def test_losses_of_one_part_share_it():
    """The name of a part says all that it depends on."""
    made = [make(name) for name in CASES]
    for a in made:
        for b in made:
            if a.part_name is not None and a.part_name == b.part_name:
                x = torch.randn(5, 4)
                torch.testing.assert_close(a.teacher_part(x), b.teacher_part(x), rtol=0, atol=0)


def test_exchanged_student_and_teacher_are_warned_of():
    """The fault: beside a cross-entropy a term the wrong way round has a value, no gradient, and nobody notices."""
    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 5)
    with pytest.warns(UserWarning, match="^RKD: what stands in the student's place wants no gradient .* call it loss.student, teacher.$"):
        RKD()(teacher, student)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RKD()(student, teacher)
        RKD()(student, teacher.clone().requires_grad_())
        RKD()(student.detach(), teacher)
        with torch.no_grad():
            RKD()(teacher, student)
