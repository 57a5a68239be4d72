"""What PyTorch's own machinery asks of a function, asked of every loss: derivatives in every mode, tensors without numbers,
tracing, export, samples in four precisions; and what torch.nn's modules offer: device=, dtype=, reset_parameters().
What costs more than a blink runs with --flags slow."""
import copy
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from relkd import losses
from relkd.losses.angle import angle_loss, sides
from relkd.losses.contract import known_gradient
from helpers import CASES, DEFAULTS, DTYPES, as_given, case, make, randn, value_and_gradients

every_case = pytest.mark.parametrize("name", CASES)
BY_HAND = ["RKDAngle", "SP", "PKT", "CRD"]                  # whose gradient is made by hand
ALWAYS = ["RKD", "CRD"]                                     # the others of what costs more: --flags slow


@pytest.fixture
def slow(flags):
    if "slow" not in flags:
        pytest.skip("costs seconds: --flags slow")


class Called(nn.Module):
    """A loss between lists of tensors, as exporters want their arguments."""
    def __init__(self, loss, names=()):
        super().__init__()
        self.loss, self.names = loss, list(names)

    def forward(self, student, teacher, more):
        return self.loss(as_given(student), as_given(teacher), **dict(zip(self.names, more)))


def asked(name, n=8, dtype=torch.float32):
    """A loss between lists, and three lists: student's layers, teacher's layers, what it is told beside them."""
    loss, s, t, more = case(name, n, dtype=dtype)
    return Called(loss.double() if dtype == torch.float64 else loss, more), s, t, list(more.values())


def small(name):
    """The same in float64 with few numbers; CRD with its constant Z, in evaluation."""
    f, s, t, more = asked(name, 3, torch.float64)
    s, t = ([x[:, :, :3, :2].contiguous() if x.dim() == 4 else x for x in layers] for layers in (s, t))
    if name.startswith("CRD"):
        f(s, t, more)
        f.eval()
    return f, s, t, more


# ---- derivatives

@pytest.mark.parametrize("name", [name for name in CASES if name != "NST gaussian"])     # whose width is taken as a constant
def test_gradcheck_in_every_mode(name, flags):
    """Forward mode along a random direction, undefined and batched upstream gradients; test_contract has the slow form."""
    f, s, t, more = small(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                      # of vmap, which takes some operations one by one
        assert torch.autograd.gradcheck(lambda *x: f(list(x), t, more), [x.requires_grad_() for x in s], fast_mode=True,
                                        check_forward_ad=True, check_undefined_grad=True, check_batched_grad="slow" in flags)


@every_case
def test_forward_and_backward_mode_agree_inside_torch_func(name, slow):
    f, s, t, more = small(name)
    f.eval()                                                 # torch.func lets nothing be remembered
    v = [randn(*x.shape, seed=5, dtype=x.dtype) for x in s]
    value, along = torch.func.jvp(lambda *x: f(list(x), t, more), tuple(s), tuple(v))
    plain, gradients = value_and_gradients(lambda *x: f(list(x), t, more), *s)
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(along, sum((a * b).sum() for a, b in zip(v, gradients)))


@pytest.mark.parametrize("name", BY_HAND)
def test_a_second_derivative_is_refused(name):
    f, s, t, more = small(name)
    s, v = s[0].requires_grad_(), torch.ones_like(s[0])
    said = f"{name}'s gradient is made by hand and cannot be differentiated again"
    with pytest.raises(RuntimeError, match=said):
        torch.autograd.grad(f([s], t, more), s, create_graph=True)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=said):
        torch.autograd.grad(f([forward_ad.make_dual(s, v)], t, more), s)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_second_derivative_is_refused_inside_torch_func(name, slow):
    f, s, t, more = small(name)
    s, v = s[0], torch.ones_like(s[0])
    said = f"{name}'s gradient is made by hand and cannot be differentiated again"
    with pytest.raises(RuntimeError, match=said):
        torch.func.jvp(torch.func.grad(lambda x: f([x], t, more)), (s,), (v,))
    torch.testing.assert_close(f([s], t, more), f([s], t, more))              # nothing of it is left behind


def test_a_known_gradient_leaves_nothing_of_a_direction_in_what_is_remembered():
    """In forward mode a training step of CRD writes numbers into its memories, not their derivatives."""
    f, s, t, more = asked("CRD")
    with forward_ad.dual_level():
        f([forward_ad.make_dual(s[0], torch.ones_like(s[0]))], t, more)
        assert all(forward_ad.unpack_dual(b).tangent is None for b in f.buffers())
    x = torch.tensor([3., 4.])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.tensor([1., 0.]))
        value = known_gradient(dual, x.norm(), x / x.norm(), "an example", "norm()")
        torch.testing.assert_close(forward_ad.unpack_dual(value).tangent, torch.tensor(.6))


# ---- without numbers, traced, exported

@every_case
def test_tensors_without_numbers(name):
    """Shapes and types as with numbers, of the value, the gradients and a teacher's part."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        f, s, t, more = asked(name)
        value = f([x.requires_grad_() for x in s], t, more)
        value.backward()
        assert value.shape == () and value.dtype == torch.float32
        assert all(x.grad.shape == x.shape and x.grad.dtype == x.dtype for x in s)
        f.loss.teacher_part(as_given(t))


def traced_the_same(name, mode):
    f, s, t, more = asked(name)

    def step(s, t, more):
        s = [x.detach().requires_grad_() for x in s]
        value = f(s, t, more)
        return [value, *torch.autograd.grad(value, s)]

    before, plain = copy.deepcopy(f.state_dict()), step(s, t, more)
    f.load_state_dict(before)
    program = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(s, t, more)
    f.load_state_dict(before)
    torch.testing.assert_close(program(s, t, more), plain)


@pytest.mark.parametrize("name", ALWAYS)
def test_traced_by_make_fx(name):
    """Value and gradient as one program of plain operations."""
    traced_the_same(name, "real")


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@every_case
def test_traced_by_make_fx_in_every_mode(name, mode, slow):
    traced_the_same(name, mode)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@every_case
def test_aot_autograd(name, dynamic, slow):
    aot = pytest.importorskip("torch.testing._internal.optests", exc_type=ImportError)
    f, *layers = asked(name)
    if name.startswith("CRD"):                               # a step would move what the next one is compared with
        f(*layers)
        f.eval()
    state, (n, k) = {**dict(f.named_parameters()), **dict(f.named_buffers())}, (len(x) for x in layers[:2])

    def call(*x):
        x, own = x[len(state):], dict(zip(state, x))
        return torch.func.functional_call(f, own, (list(x[:n]), list(x[n:n + k]), list(x[n + k:])))

    s, t, more = layers
    aot.aot_autograd_check(call, (*state.values(), *(x.requires_grad_() for x in s), *t, *more), {}, dynamic=dynamic,
                           copy_inputs=True)


def composite(name):
    """A loss is made of operators that dispatch: with any of its tensors wrapped, forwards and backwards, nothing is read behind
    the dispatcher's back, nothing plain is overwritten with something wrapped, no number is asked for."""
    asks = pytest.importorskip("torch.testing._internal.composite_compliance", exc_type=ImportError)
    f, s, t, more = asked(name)
    if name.startswith("CRD"):                               # what it remembers is its own affair: in evaluation it rests
        f(s, t, more)
    f.eval()
    n, k = len(s), len(s) + len(t)

    def call(*x):
        return f(list(x[:n]), list(x[n:k]), list(x[k:]))

    asks.check_with_mode(call, (*s, *t, *more), {}, torch.testing.assert_close)
    asks.check_all_permutations(call, (*s, *t, *more), {}, torch.testing.assert_close)
    wanting = [x.clone().requires_grad_() for x in s]
    asks.check_backward_formula(call, (*wanting, *t, *more), {}, assert_equal_fn=torch.testing.assert_close)


@pytest.mark.parametrize("name", ALWAYS)
def test_composite_compliant(name):
    composite(name)


@every_case
def test_every_loss_is_composite_compliant(name, slow):
    composite(name)


def exported_the_same(name, strict):
    f, *layers = asked(name)
    batch = torch.export.Dim("batch", min=4, max=512)
    shapes = tuple([{0: batch} for _ in some] for some in layers)
    program = torch.export.export(f, tuple(layers), dynamic_shapes=shapes, strict=strict).module()
    f, s, t, more = asked(name, 11)
    mine, theirs = (value_and_gradients(lambda *x: g(list(x), t, more), *s) for g in (program, f))
    torch.testing.assert_close(mine, theirs)
    left = program.state_dict()                              # what a step remembers is remembered
    kept = {k: v for k, v in f.named_buffers() if k in left}
    torch.testing.assert_close({k: left[k] for k in kept}, kept)
    assert not name.startswith("CRD") or len(kept) == 3


@pytest.mark.parametrize("name", ALWAYS)
def test_exported_for_batches_of_any_size(name):
    exported_the_same(name, False)


@pytest.mark.parametrize("strict", [False, True])
@every_case
def test_exported_in_either_way(name, strict, slow):
    exported_the_same(name, strict)


def angle_arguments():
    """What the operator may be given: precisions, a teacher or its sides, distinct triplets, a share, drawn vertices."""
    for dtype in (torch.float32, torch.float64):
        s, t = randn(6, 3, dtype=dtype), randn(6, 4, seed=1, dtype=dtype)
        known = sides(t).q
        for distinct in (False, True):
            yield s, t, False, distinct, 0, 1, False
            yield s, known, True, distinct, 0, 1, False
        yield s, t, False, False, 1, 2, False
        yield s, t, False, False, 0, 1, False, torch.tensor([0, 3, 4])
        yield s, torch.cat([t[:1], t[:1], t[2:]]), False, True, 0, 1, False


@pytest.mark.parametrize("given", list(angle_arguments()), ids=range(14))
def test_the_operator_passes_opcheck(given, flags):
    which = None if "slow" in flags else ("test_schema", "test_autograd_registration", "test_faketensor")
    s, *rest = given
    more = {} if which is None else {"test_utils": which}
    torch.library.opcheck(torch.ops.relkd.angle_loss.default, (s.clone().requires_grad_(), *rest), **more)


def test_the_operator_is_what_is_traced():
    s, t = randn(6, 3), randn(6, 4, seed=1)
    program = make_fx(lambda s: angle_loss(s, t))(s)
    assert "relkd.angle_loss" in program.code
    torch.testing.assert_close(program(s), angle_loss(s, t))


# ---- samples

@pytest.mark.parametrize("dtype", DTYPES)
@every_case
def test_samples_in_four_precisions(name, dtype):
    """Finite, of the right type, the same for tensors with gaps, and nothing that was given is written."""
    f, s, t, more = asked(name)
    s, t = ([x.to(dtype) for x in layers] for layers in (s, t))
    gaps = [[torch.testing.make_tensor(x.shape, dtype=dtype, device="cpu", noncontiguous=True).copy_(x) for x in layers]
            for layers in (s, t)]
    assert not any(x.is_contiguous() for layers in gaps for x in layers)
    before = copy.deepcopy((s, t, more))
    value, gradients = value_and_gradients(lambda *x: copy.deepcopy(f)(list(x), t, more), *s)
    other = value_and_gradients(lambda *x: copy.deepcopy(f)(list(x), gaps[1], more), *gaps[0])
    assert value.isfinite() and value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(g.isfinite().all() and g.dtype == dtype for g in gradients)
    torch.testing.assert_close((value, gradients), other)
    assert all(torch.equal(a, b) for some, others in zip(before, (s, t, more)) for a, b in zip(some, others))


@pytest.mark.parametrize("pair", [(torch.float16, torch.float32), (torch.bfloat16, torch.float64), (torch.float64, torch.float32)])
@every_case
def test_mixed_precisions_give_the_wider_ones_value(name, pair):
    f, s, t, more = asked(name)
    s, t = [x.to(pair[0]) for x in s], [x.to(pair[1]) for x in t]
    wide = [[x.double() for x in layers] for layers in (s, t)]
    with torch.no_grad():
        value, exact = copy.deepcopy(f)(s, t, more), copy.deepcopy(f).double()(*wide, more)
    torch.testing.assert_close(value.double(), exact, rtol=1e-3, atol=1e-5)


# ---- as the modules of torch.nn

SIZES = {"FitNet": (4, 6), "VID": (4, 6), "AB": (4, 6), "OFD": (4, 6), "FT": (4, 6), "CRD": (4, 6, 20, 5)}


@pytest.mark.parametrize("name", SIZES)
def test_device_and_dtype_as_in_torch_nn(name):
    cls = getattr(losses, name)
    state = cls(*SIZES[name], dtype=torch.float64).state_dict().values()
    assert {x.dtype for x in state} <= {torch.float64, torch.int64} and any(x.dtype == torch.float64 for x in state)
    assert all(x.is_meta for x in cls(*SIZES[name], device="meta").state_dict().values())
    with torch.device("meta"):
        assert all(x.is_meta for x in cls(*SIZES[name]).state_dict().values())
    example = (randn(8, 4), randn(8, 6)) if name == "CRD" else (randn(8, 4, 4, 4), randn(8, 6, 4, 4))
    loss = cls.from_features(*example, labels=torch.arange(20), dtype=torch.bfloat16)
    assert {p.dtype for p in loss.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", SIZES)
def test_reset_parameters_makes_it_new(name):
    """From one seed a new loss and a reset one are equal; so a loss made without memory can be filled."""
    def seeded(f):
        torch.manual_seed(3)
        return f()

    cls = getattr(losses, name)
    new = seeded(lambda: cls(*SIZES[name]))
    moved, empty = cls(*SIZES[name]), cls(*SIZES[name], device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for x in moved.state_dict().values():
            x.fill_(7)
    for loss in (moved, empty):
        seeded(loss.reset_parameters)
        assert all(torch.equal(a, b) for a, b in zip(loss.state_dict().values(), new.state_dict().values(), strict=True))
        assert [p.requires_grad for p in loss.parameters()] == [p.requires_grad for p in new.parameters()]


# ---- parameters that nobody trains

def told(loss, s, t, more, steps=13, **how):
    """What a loss of little patience warns of in a loop: how tells what the optimiser has, and what the loop does."""
    loss.patience = 10
    s = [x.clone().requires_grad_() for x in s]
    opt = torch.optim.SGD([*s, *how.get("trained", ())], lr=.01)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(steps):
            opt.zero_grad()
            with torch.set_grad_enabled(how.get("grad", True)):
                value = loss(as_given(s), as_given(t), **more)
            if how.get("backward", True):
                value.backward()
                if how.get("step", True):
                    opt.step()
    return [str(w.message) for w in found if "own parameters" in str(w.message)]


@pytest.mark.parametrize("name", SIZES)
def test_parameters_that_do_not_move_are_said_once(name):
    loss, s, t, more = case(name)
    said, = told(loss, s, t, more)
    assert said.startswith(f"{name}'s own parameters have gradients but have not moved in 10 training calls") and "\n" not in said
    assert "optimizer.add_param_group({'params': loss.parameters()})" in said
    assert not told(loss, s, t, more)                        # once a loss


@pytest.mark.parametrize("name", SIZES)
def test_nothing_is_said_where_they_move_or_rest_or_are_only_looked_at(name):
    _, s, t, more = case(name)
    loss = make(name)
    assert not told(loss, s, t, more, trained=list(loss.parameters()))
    assert not told(make(name).requires_grad_(False), s, t, more, step=False)
    assert not told(make(name).eval(), s, t, more)
    assert not told(make(name), s, t, more, grad=False, backward=False)
    assert not told(make(name), s, t, more, backward=False)
    assert not told(make(name), s, t, more, steps=9, step=False)             # gradients are accumulated


def test_it_is_said_after_a_first_stage_too():
    """FT's paraphrasers move in a stage of their own; then the translators are forgotten."""
    loss, s, t, _ = case("FT")
    opt = torch.optim.SGD(loss.paraphrasers.parameters(), lr=.1)
    for _ in range(2):
        opt.zero_grad()
        loss.prepare(s[0], t[0]).backward()
        opt.step()
    assert len(told(loss, s, t, {}, steps=15)) == 1


def test_numbers_that_move_without_a_step_count_as_moved():
    """Some engines put new numbers under a parameter, without telling it."""
    loss, s, t, more = case("FitNet")
    told(loss, s, t, more, steps=3)
    for p in loss.parameters():
        p.data = p.detach() + .1
    assert not told(loss, s, t, more)


def test_watching_breaks_no_graph_and_travels_with_no_state():
    loss, s, t, more = case("FitNet")
    keys = set(loss.state_dict())
    torch.compile(loss, backend="eager", fullgraph=True)(s[0], t[0])
    told(loss, s, t, more, steps=3)
    assert set(loss.state_dict()) == keys and torch.equal(copy.deepcopy(loss)(s[0], t[0]), loss(s[0], t[0]))
    assert losses.DistillationLoss.patience >= 64            # steps over which gradients are accumulated
