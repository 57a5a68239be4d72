"""CRD: values and gradients of other code, memories, negatives."""
from functools import partial
import copy
import math

from hypothesis import given
from hypothesis import strategies as st
import pytest
from torch import nn
import torch
import torch.nn.functional as F

from helpers import assert_same, assert_says, DTYPES, gen, made, many, value_and_gradients
from relkd.losses.crd import CRD, contrast
from relkd.losses.nst import NST

crd = partial(made, CRD)
TOLERANCES = [(torch.float32, 5e-6), (torch.float64, 1e-12)]


@st.composite
def maps(draw, same_size=True):
    n, cs, ct, h, w = (*(draw(st.integers(1, 5)) for _ in range(4)), draw(st.integers(2, 5)))
    ht, wt = (h, w) if same_size else (draw(st.integers(1, 8)), draw(st.integers(2, 8)))
    g, size = gen(draw(st.integers(0, 10**6))), 10 ** draw(st.floats(-2, 2))
    return torch.randn(n, cs, h, w, generator=g, dtype=torch.float64) * size, torch.randn(n, ct, ht, wt, generator=g, dtype=torch.float64)

KERNELS = [NST(), NST("linear"), NST("gaussian"), NST("gaussian", sigma2=.7), NST(degree=3, c=.5)]


@many
@given(maps())
def test_nst_without_the_teacher_term_differs_by_a_constant(pair):
    s, t = pair
    for loss in KERNELS:
        if loss.kernel == "gaussian" and loss.sigma2 is None:
            continue                                                    # there the width depends on the student
        bare = copy.deepcopy(loss)
        bare.teacher_term = False
        (a, (ga,)), (b, (gb,)) = value_and_gradients(lambda s: loss(s, t), s), value_and_gradients(lambda s: bare(s, t), s)
        assert (ga - gb).abs().max() <= 1e-9 * (1 + ga.abs().max())
        torch.testing.assert_close(a - b, loss(t, t) - bare(t, t), rtol=1e-9, atol=1e-12)


def pair(n, seed=0, dtype=torch.float32, ds=5, dt=7):
    return torch.randn(n, ds, generator=gen(seed), dtype=dtype), torch.randn(n, dt, generator=gen(seed + 100), dtype=dtype)


def call(loss, *args, **more):
    return lambda s, *p: torch.func.functional_call(loss, dict(zip([n for n, _ in loss.named_parameters()], p)), (s, *args), more)


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("samples, k", [(50, 20), (400, 9)])            # all scores, and copied rows
def test_crd_is_torchdistills_over_several_steps(dtype, tolerance, samples, k):
    """Value, gradients, both memories and Z, the negatives given: torchdistill's own sampler raises AttributeError."""
    CRDLoss = pytest.importorskip("torchdistill.losses.mid_level").CRDLoss

    mine, theirs = crd(5, 7, samples, 8, k, dtype=dtype), CRDLoss("n", "e", "n", 8, samples, k, samples).to(dtype)
    theirs.memory_v1.copy_(mine.memory_s)
    theirs.memory_v2.copy_(mine.memory_t)
    theirs.params[1] = .07                                              # stored in float32 by its constructor
    with pytest.raises(AttributeError, match="prob"):
        theirs.draw(3)

    for step in range(3):
        s, t = pair(8, step, dtype)
        index, negatives = torch.randperm(samples, generator=gen(step))[:8], torch.randint(samples, (8, k), generator=gen(step + 9))

        def other(s, ws, bs, wt, bt):
            io = {"n": {"output": F.normalize(F.linear(s, ws, bs))},
                  "e": {"input": {"pos_idx": index, "contrast_idx": torch.cat([index[:, None], negatives], 1)}}}
            return theirs(io, {"n": {"output": F.normalize(F.linear(t, wt, bt))}}).squeeze(0)
        assert_same(value_and_gradients(call(mine, t, index, negatives), s, *mine.parameters()),
                    value_and_gradients(other, s, *mine.parameters()), tolerance)
        torch.testing.assert_close(mine.memory_s, theirs.memory_v1)
        torch.testing.assert_close(mine.memory_t, theirs.memory_v2)
        torch.testing.assert_close(mine.log_Z.exp(), theirs.params[2:4], rtol=1e-5, atol=0)


def test_crd_worked_on_paper():
    memory = torch.tensor([[1., 0], [0, 1], [-1, 0], [0, -1], [.6, .8], [.8, -.6]])
    p = torch.tensor([1., 0, -1, .6]).exp()
    p = p / (6 * p.mean())
    expected = -(p[0] / (p[0] + .5)).log() - (.5 / (p[1:] + .5)).log().sum()
    value, gradient, log_Z = contrast(torch.tensor([[1., 0.]]), memory, torch.tensor([[0, 1, 2, 4]]),
                                      torch.tensor(float("inf")), T=1., eps=0.)
    torch.testing.assert_close(value, expected)
    assert (value.item() == pytest.approx(1.5947, abs=1e-4) and log_Z.exp().item() == pytest.approx(8.8624, abs=1e-3)
            and gradient.shape == (1, 2))


@many
@given(st.integers(2, 30), st.integers(1, 40), st.integers(1, 4), st.integers(1, 6), st.floats(.05, 5),
       st.floats(0, 1e-2), st.integers(0, 10**6))
def test_contrast_is_its_formula(n, k, batch, d, T, eps, seed):
    """Both ways of getting the scores are met, since n is below and above (K + 1) D."""
    g = gen(seed)
    v, memory = (F.normalize(torch.randn(a, d, generator=g, dtype=torch.float64)) for a in (batch, n))
    chosen = torch.randint(n, (batch, k + 1), generator=g)

    def formula(v):
        p = (torch.einsum("nkd,nd->nk", memory[chosen], v) / T).exp()
        p = p / (n * p.mean()).detach()
        return -((p[:, 0] / (p[:, 0] + k / n + eps)).log().sum() + (k / n / (p[:, 1:] + k / n + eps)).log().sum()) / batch
    value, gradient, _ = contrast(v, memory, chosen, torch.tensor(float("inf")), T, eps)
    expected, (slope,) = value_and_gradients(formula, v)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("samples", [20, 2000])
def test_crd_gradcheck_and_who_gets_a_gradient(samples):
    loss = crd(5, 7, samples, 4, 6, dtype=torch.float64)
    s, t = pair(4, dtype=torch.float64)
    index, negatives = torch.arange(4), torch.randint(samples, (4, 6), generator=gen(0))
    loss(s, t, index, negatives)                                        # fixes Z
    loss.eval()
    inputs = [x.detach().clone().requires_grad_() for x in (s, *loss.parameters())]
    assert torch.autograd.gradcheck(call(loss, t, index, negatives), inputs)
    t.requires_grad_()
    loss.train()(s.requires_grad_(), t, index, negatives).backward()
    assert t.grad is None and s.grad.abs().max() > 0 and all(p.grad.abs().max() > 0 for p in loss.parameters())
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(loss(s, t, index, negatives), s, create_graph=True)


@many
@given(st.integers(0, 10**6))
def test_crd_is_blind_to_a_common_rotation_to_lengths_and_to_numbering(seed):
    g = gen(seed)
    loss = crd(5, 7, 30, 4, 6, seed=seed, dtype=torch.float64).eval()
    s, t = pair(4, seed, torch.float64)
    index, negatives = torch.randperm(30, generator=g)[:4], torch.randint(30, (4, 6), generator=g)
    q, _ = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64))
    state, number = loss.state_dict(), torch.randperm(30, generator=g)
    kind = lambda name: {k: v for k, v in state.items() if k.startswith(name)}

    def changed(new, index=index, negatives=negatives):
        other = copy.deepcopy(loss)
        other.load_state_dict(state | new)
        return other(s, t, index, negatives)
    for value in (changed({k: 3 * v for k, v in kind("embed").items()}),
                  changed({k: q @ v for k, v in kind("embed").items()} | {k: v @ q.T for k, v in kind("memory").items()}),
                  changed({k: v[number.argsort()] for k, v in kind("memory").items()}, number[index], number[negatives]),
                  changed({}, negatives=negatives.flip(1))):
        torch.testing.assert_close(value, loss(s, t, index, negatives), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("k, n", [(1, 5), (9, 40), (1000, 300)])
def test_a_clueless_critic(k, n):
    loss = crd(5, 7, n, 4, k, T=1e7, eps=0., dtype=torch.float64)
    assert loss(*pair(3, dtype=torch.float64), torch.arange(3)).item() == pytest.approx(
        2 * (math.log(k + 1) + k * math.log1p(1 / k)), rel=1e-6)


def test_the_best_critic_stays_one_below_the_information():
    """log K - loss <= I for every critic; in the limit of many negatives the best reaches I - 1."""
    P = torch.full((8, 8), .3 / 7 / 8, dtype=torch.float64).fill_diagonal_(.7 / 8)
    apart = torch.full((8, 8), 1 / 64, dtype=torch.float64)
    information, k = (P * (P / apart).log()).sum(), 1e6
    loss = lambda h: -(P * h.log()).sum() - k * (apart * (1 - h).log()).sum()
    best = loss(P / (P + k * apart))
    assert (math.log(k) - best).item() == pytest.approx(information.item() - 1, abs=1e-4)
    for seed in range(20):
        h = (torch.randn(8, 8, generator=gen(seed), dtype=torch.float64) - math.log(k)).sigmoid()
        assert loss(h) >= best


def test_memories_move_halfway_and_only_where_the_batch_is():
    loss = crd(5, 7, 30, 4, 6)
    before, (s, t), index = copy.deepcopy(loss.state_dict()), pair(4), torch.tensor([3, 29, 0, 7])
    loss(s.requires_grad_(), t, index)
    v_s, v_t = F.normalize(loss.embed_s(s)), F.normalize(loss.embed_t(t))
    rest = torch.ones(30, dtype=torch.bool)
    rest[index] = False
    for name, v in (("memory_s", v_s), ("memory_t", v_t)):
        new = loss.state_dict()[name]
        assert torch.equal(new[rest], before[name][rest])
        torch.testing.assert_close(new[index], F.normalize((before[name][index] + v.detach()) / 2))
    still = crd(5, 7, 30, 4, 6, momentum=0.)
    still(s, t, index)
    torch.testing.assert_close(still.memory_s[index], F.normalize(still.embed_s(s)).detach())
    assert before["memory_s"].norm(dim=1).mean().item() == pytest.approx(1, abs=.15) and before["log_Z"].isinf().all()


def test_nothing_is_written_in_evaluation_or_without_gradient():
    loss, (s, t) = crd(5, 7, 30, 4, 6), pair(4)
    before = copy.deepcopy(loss.state_dict())
    with torch.no_grad():
        loss(s, t, torch.arange(4))
    loss.eval()(s, t, torch.arange(4))
    assert all(torch.equal(v, loss.state_dict()[k]) for k, v in before.items())
    loss.train()(s, t, torch.arange(4))
    first = loss.log_Z.clone()
    loss(*pair(4, 1), torch.arange(4))
    assert torch.equal(loss.log_Z, first) and first.isfinite().all()       # Z is of the first step


def test_going_on_from_a_state_equals_an_uninterrupted_run():
    classes = torch.arange(40) % 3

    def steps(loss, first, last):
        for k in range(first, last):
            torch.manual_seed(k)
            s, t = pair(8, k)
            value = loss(s.requires_grad_(), t, index=torch.randperm(40)[:8])
            grads = torch.autograd.grad(value, list(loss.parameters()))
            with torch.no_grad():
                for p, g in zip(loss.parameters(), grads):
                    p -= .01 * g
        return value
    with torch.random.fork_rng(devices=[]):
        whole, part = (crd(5, 7, 40, 4, 6, classes=classes) for _ in range(2))
        straight = steps(whole, 0, 6)
        steps(part, 0, 3)
        again = crd(5, 7, 40, 4, 6, seed=5, classes=classes)
        again.load_state_dict(part.state_dict())
        assert torch.equal(steps(again, 3, 6), straight)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    assert set(whole.state_dict()) == {"memory_s", "memory_t", "log_Z", "embed_s.weight", "embed_s.bias", "embed_t.weight", "embed_t.bias"}


def test_negatives_are_drawn_uniformly_from_all_or_from_other_classes():
    torch.manual_seed(0)
    classes = torch.tensor([5, -2, 5, 9, 9, 9, -2, 5, 5, 7])
    loss, index = crd(5, 7, 10, 4, 30_000, classes=classes), torch.tensor([0, 1, 3, 9])
    drawn = loss.other_classes(index, 30_000)
    assert not (classes[drawn] == classes[index, None]).any()
    for i, row in zip(index, drawn):
        share = row.bincount(minlength=10) / len(row)
        expected = (classes != classes[i]).float() / (classes != classes[i]).sum()
        assert (share - expected).abs().max() < .01
    seen = []
    loss.other_classes = None
    original = torch.randint
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch, "randint", lambda *a, **k: seen.append(original(*a, **k)) or seen[-1])
        loss(*pair(4), index)
    assert len(seen) == 1 and (seen[0].flatten().bincount(minlength=10) / seen[0].numel() - .1).abs().max() < .01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("zero_bias", [False, True])
def test_crd_is_finite_on_zeros_duplicates_and_extremes_in_every_precision(dtype, n, zero_bias):
    base, t = pair(n)
    for e in (base, 0 * base, base[:1].expand(n, -1), 1e4 * base, 1e-6 * base):
        for teacher in (t, 0 * t):
            loss = crd(5, 7, 30, 4, 6)
            if zero_bias:
                nn.init.zeros_(loss.embed_s.bias)
                nn.init.zeros_(loss.embed_t.bias)
            e = e.detach().to(dtype).requires_grad_()
            value = loss(e, teacher.to(dtype), index=torch.arange(n))
            value.backward()
            assert value.isfinite() and e.grad.isfinite().all() and loss.memory_s.isfinite().all() and loss.memory_t.isfinite().all()
            assert e.grad.abs().max() < (3e4 if zero_bias else 1e3) and all(p.grad.isfinite().all() for p in loss.parameters())
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_crd_mixes_precisions_and_flattens_maps():
    (s, t), index, negatives = pair(4), torch.arange(4), torch.randint(30, (4, 6), generator=gen(0))
    f = lambda loss, s, t: loss.eval()(s, t, index, negatives)
    assert f(crd(5, 7, 30, 4, 6), s.half(), t).dtype == torch.float32 and f(crd(5, 7, 30, 4, 6), s, t.double()).dtype == torch.float64
    half = crd(5, 7, 30, 4, 6, dtype=torch.float16)
    assert half(s.half(), t.half(), index).dtype == torch.float32 and half.memory_s.dtype == torch.float16
    assert torch.equal(f(crd(5, 7, 30, 4, 6), s[:, :, None, None], t), f(crd(5, 7, 30, 4, 6), s, t))


@pytest.mark.parametrize("classes", [None, torch.arange(30) % 4])
def test_crd_autocast_and_compile_change_nothing(classes, flags):
    if classes is not None and "slow" not in flags:
        pytest.skip("compiling takes seconds: --flags slow")
    (s, t), index, negatives = pair(4), torch.arange(4), torch.randint(30, (4, 6), generator=gen(0))
    plain, autocast, compiled = (crd(5, 7, 30, 4, 6, classes=classes) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = autocast(s, t, index, negatives)
    graph = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for step in range(2):                                               # Z is set in the first, kept in the second
        mine, theirs = (value_and_gradients(lambda s, *p, f=f: f(s, t, index, negatives), s) for f in (plain, graph))
        assert inside.dtype == torch.float32 and (step or torch.equal(inside, mine[0]))
        assert_same(theirs, mine, 1e-5)
        torch.testing.assert_close(compiled.memory_s, plain.memory_s)
        torch.testing.assert_close(compiled.log_Z, plain.log_Z)
    graph(s, t, index).backward()                                       # draws inside the graph
    assert all(p.grad.isfinite().all() for p in compiled.parameters())


def test_no_large_block_is_made_or_kept():
    """The usual code gathers N (K + 1) D numbers twice;
    here nothing larger than N x samples, and between forward and backward only N x D."""
    loss, (s, t), largest, kept = crd(5, 7, 500, 32, 400), pair(16), [0], []

    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest[0] = max([largest[0], *(x.numel() for x in (out if isinstance(out, (tuple, list)) else [out])
                                            if isinstance(x, torch.Tensor))])
            return out
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x), Watch():
        loss(s.requires_grad_(), t, torch.arange(16))
    assert largest[0] <= 500 * 32 < 16 * 401 * 32 and max(kept) <= 16 * 32


def test_from_features_and_options():
    loss = CRD.from_features(torch.rand(2, 3, 2, 2), torch.rand(2, 8), samples=9, feat_dim=4, negatives=5, T=.1)
    assert (loss.embed_s.in_features, loss.embed_t.in_features, loss.memory_s.shape, loss.T) == (12, 8, (9, 4), .1)
    assert "samples=9, negatives=5, T=0.1, momentum=0.5" in repr(loss)
    plain = CRD(3, 5, 20)
    assert (plain.negatives, plain.T, plain.momentum, plain.memory_t.shape, plain.other_classes) == (16384, .07, .5, (20, 128), None)


@pytest.mark.parametrize("right", [True, False])
def test_a_student_learns_by_crd_and_not_with_the_place_in_the_batch(right):
    """Afterwards the student's embedding finds its own image among the teacher's, or it does not."""
    x = torch.randn(64, 6, generator=gen(0))
    t = x @ torch.randn(6, 10, generator=gen(1))
    loss = crd(4, 10, 64, 8, 32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = nn.Linear(6, 4)
        opt, g, values = torch.optim.Adam([*student.parameters(), *loss.parameters()], lr=.02), gen(2), []
        for _ in range(60):
            for i in torch.randperm(64, generator=g).split(16):
                opt.zero_grad()
                value = loss(student(x[i]), t[i], index=i if right else torch.arange(16))
                value.backward()
                opt.step()
            values.append(value.item())
    found = (F.normalize(loss.embed_s(student(x))) @ F.normalize(loss.embed_t(t)).T).argmax(1) == torch.arange(64)
    assert values[-1] < values[0] and (found.float().mean() > .5 if right else found.float().mean() < .2)

f4, e2, small = torch.rand(4, 3, 2, 2), torch.rand(4, 3), CRD(3, 5, 20, 4, 6)

given_pair = torch.rand(4, 3), torch.rand(4, 5)


ERRORS = [
    (lambda: CRD(0, 5, 20), "CRD needs in_features, out_features and negatives of at least 1, feat_dim and samples "
                            "of at least 2; got 0, 5, 16384, 128 and 20"),
    (lambda: CRD(3, 5, 1), "got 3, 5, 16384, 128 and 1"),
    (lambda: CRD(3, 5, 20, T=0), "CRD needs T above 0, momentum from 0 to below 1 and eps of at least 0; got 0, 0.5 and 1e-07"),
    (lambda: CRD(3, 5, 20, momentum=1), "got 0.07, 1 and 1e-07"),
    (lambda: CRD(3, 5, 20, classes=torch.rand(20)), r"got \(20,\), torch.float32"),
    (lambda: CRD.from_features(*given_pair),
     "CRD needs samples=, how many training samples there are, or their labels=: it remembers each of them"),
    (lambda: small(*given_pair, index=[0, 1, 2, 3]), "got list"),
    (lambda: small(*given_pair, index=torch.arange(4.)), r"got \(4,\), torch.float32"),
    (lambda: small(*given_pair, index=torch.arange(17, 21)), r"CRD remembers 20 samples; got index= from 17 to 20: "
                                                             r"samples are counted from 0, within the training set"),
    (lambda: small(*given_pair, index=torch.arange(-1, 3)), "got index= from -1 to 2"),
    (lambda: small(*given_pair, index=torch.arange(4), negatives=torch.full((4, 2), 20)), "got negatives= from 20 to 20"),
    (lambda: small(given_pair[1], given_pair[0], index=torch.arange(4)),
     "CRD was made for 3 student and 5 teacher features; got 5 and 3: CRD.from_features reads them from an example"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_say_what_was_given_and_what_is_needed(call, message):
    assert_says(call, message)
