"""The angle loss from sides: equal to the naive form, exact where it is hard, small in memory,
shared between processes, and its Triton kernel."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import skip_where_triton_cannot_interpret
from hypothesis import given, settings
from hypothesis import strategies as st

from relkd.bench import Held, naive_angle
from relkd.losses import RKD, RKDAngle, RKDDistance
from relkd.losses.angle import Sides, loss_and_gradient, amplification, angle_loss, sides
from relkd.relations import angles


def naive(s, t, distinct=False):
    a, b, n = angles(s), angles(t), len(s)
    if not distinct:
        return F.smooth_l1_loss(a, b)
    i = torch.arange(n)
    apart = (i[:, None, None] != i[:, None]) & (i[:, None, None] != i) & (i[:, None] != i)
    return F.smooth_l1_loss(a[apart], b[apart])


def both(f, s, *args):
    x = s.clone().requires_grad_()
    value = f(x, *args)
    value.backward()
    return value.detach(), x.grad


def assert_close(mine, theirs, tolerance):
    (a, ga), (b, gb) = mine, theirs
    assert abs(a - b) <= tolerance * abs(b) + 1e-14 and (ga - gb).norm() <= tolerance * gb.norm() + 1e-12


def draw(n, d, seed, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=40)
@given(st.integers(3, 12), st.integers(2, 6), st.integers(1, 6), st.booleans(), st.integers(0, 10**6))
def test_value_and_gradient_of_the_naive_form(n, ds, dt, distinct, seed):
    s, t = draw(n, ds, seed), draw(n, dt, seed + 1)
    assert_close(both(RKDAngle(distinct), s, t), both(naive, s, t, distinct), 1e-9)


@pytest.mark.parametrize("n", [63, 64, 65, 97, 130])
def test_tiles_and_blocks_of_every_shape(n):
    s, t = draw(n, 5, 0), draw(n, 9, 1)
    expected = both(naive, s, t)
    assert_close(both(angle_loss, s, t), expected, 1e-11)
    assert_close(both(angle_loss, s.float(), t.float()), expected, 1e-6)


@pytest.mark.parametrize("distinct", [False, True])
def test_duplicates_in_one_network_or_both(distinct):
    s, t = draw(9, 4, 0), draw(9, 4, 1)
    s[1], t[3], s[5], t[5] = s[0], t[2], s[4], t[4]
    assert_close(both(RKDAngle(distinct), s, t), both(naive, s, t, distinct), 1e-11)


def test_more_than_a_right_angle_apart():
    """Where cosines differ by more than 1 the Huber loss is linear."""
    s, t = draw(8, 2, 3), draw(8, 2, 4)
    assert (angles(s) - angles(t)).abs().max() > 1.5
    assert_close(both(RKDAngle(), s, t), both(naive, s, t), 1e-11)


def hard(name, n=96, d=48):
    s, t, centres, which = draw(n, d, 0), draw(n, d, 1), 3 * draw(10, d, 2), torch.arange(n) % 10
    if name == "relu, far":
        return (10 + .1 * s).relu(), (10 + .1 * t).relu()
    if name == "classes":
        return centres[which] + s, centres[which] + .5 * t
    if name.startswith("near"):
        return centres[which] + float(name.split()[1]) * s, t
    if name == "duplicates":
        s[1::2] = s[::2]
    if name == "outlier":
        s[0] *= 1e4 / s[0].norm()
    return s, t


@pytest.mark.parametrize("name", ["random", "relu, far", "classes", "near 1e-2", "near 1e-3", "near 1e-4", "near 1e-6",
                                  "duplicates", "outlier"])
def test_never_worse_than_four_times_the_naive_float32_code(name):
    s, t = (x.float() for x in hard(name))
    exact_value, exact_gradient = both(naive, s.double(), t.double())

    def errors(f):
        value, gradient = both(f, s, t)
        return abs(value - exact_value) / exact_value, (gradient - exact_gradient).norm() / exact_gradient.norm()

    for ours, theirs in zip(errors(angle_loss), errors(naive_angle)):
        assert ours <= 4 * max(theirs, 6e-8), f"{ours:.1e} against {theirs:.1e}"


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e18])
def test_the_scale_does_not_matter(scale):
    s, t = draw(20, 6, 0, torch.float32), draw(20, 6, 1, torch.float32)
    value, gradient = both(angle_loss, s, t)
    scaled, of_scaled = both(angle_loss, scale * s, t)
    torch.testing.assert_close(scaled, value, rtol=1e-5, atol=0)
    torch.testing.assert_close(of_scaled * scale, gradient, rtol=1e-3, atol=1e-8)


def test_a_pair_that_is_all_but_equal_has_no_direction_and_no_exploding_gradient():
    s, t = draw(12, 4, 0), draw(12, 4, 1)
    s[1] = s[0] + 1e-12
    assert both(angle_loss, s, t)[1].abs().max() < 1
    assert amplification(sides(draw(64, 16, 0)).q).max() < 4 and sides(s).q[0, 1] == 0


def test_sides_stand_for_the_teacher():
    s, t = draw(10, 4, 0, torch.float32), draw(10, 7, 1, torch.float32)
    for loss in (RKDDistance(), RKDAngle(), RKD(), RKD(distinct=True)):
        assert_close(both(loss, s, sides(t)), both(loss, s, t), 2e-6)
    assert sides(t.view(10, 7, 1, 1)).q.equal(sides(t).q) and not sides(t.requires_grad_()).q.requires_grad
    with pytest.raises(ValueError, match="RKDAngle needs student and teacher embeddings of the same samples; "
                                         "got N = 9 and the sides of N = 10"):
        RKDAngle()(s[:9], sides(t))
    with pytest.raises(ValueError, match=r"teacher must have shape \(N, D\)"):
        sides(torch.zeros(3))
    assert isinstance(sides(t), Sides)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_the_mean_over_ranks_is_the_loss(ranks):
    s, t = draw(20, 4, 0), draw(20, 6, 1)
    shares = []
    for rank in range(ranks):
        loss = RKD()
        loss.angle.anchors = rank, ranks
        shares.append(both(loss, s, t))
    assert_close([sum(x[i] for x in shares) / ranks for i in (0, 1)], both(RKD(), s, t), 1e-11)


def test_a_second_derivative_is_refused():
    s, t = draw(8, 3, 0).requires_grad_(), draw(8, 3, 1)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(RKDAngle()(s, t), s, create_graph=True)


def test_custom_operator_is_registered_as_torch_wants_it():
    torch.library.opcheck(torch.ops.relkd.angle_loss.default,
                          (draw(6, 3, 0).requires_grad_(), draw(6, 3, 1), False, False, 0, 1, False),
                          test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_memory_is_of_order_n_squared():
    held = {}
    for n in (128, 256):
        s, t = draw(n, 64, 0, torch.float32), draw(n, 64, 1, torch.float32)
        with Held(s, t) as mine:
            loss_and_gradient(s, t, False, False, 0, 1, False)
        held[n] = mine.peak
    x = draw(128, 64, 0, torch.float32).requires_grad_()
    with Held(x) as theirs:
        naive_angle(x, draw(128, 64, 1, torch.float32)).backward()
    assert held[256] < 16 * 2**20 and held[128] < theirs.peak / 4


def test_compiled_blocks_are_equal(flags):
    if "slow" not in flags:
        pytest.skip("torch.compile takes long: --flags slow")
    s, t = draw(100, 8, 0, torch.float32), draw(100, 8, 1, torch.float32)
    assert_close(both(RKDAngle(compiled=True), s, t), both(RKDAngle(), s, t), 1e-6)


def test_the_triton_kernel_in_its_interpreter(flags):
    if "slow" not in flags:
        pytest.skip("the notebook of the kernel asks the same: --flags slow")
    pytest.importorskip("triton")
    code = """
import torch
from relkd.losses.angle import _cube, _measure
from relkd.losses.angle_triton import cube
g = torch.Generator().manual_seed(0)
for n, anchors in ((19, torch.arange(19)), (33, torch.arange(1, 33, 4))):
    both = _measure(torch.randn(n, 5, generator=g), torch.randn(n, 4, generator=g))[1]
    q, z = both
    for exact in (torch.zeros(len(anchors), dtype=torch.bool), torch.arange(len(anchors)) % 3 == 0,
                  torch.ones(len(anchors), dtype=torch.bool)):
        for a, b in zip(cube(q, z, anchors, exact), _cube(both, anchors, torch.float64, False)):
            assert (a - b).abs().max() <= (1e-12 if exact.all() else 1e-6) * b.abs().max(), (n, (a - b).abs().max())
from relkd.losses import angle
def result(s, t, anchors):
    x = s.clone().requires_grad_()
    l = angle.angle_loss(x, t, False, anchors)
    l.backward()
    return l.detach(), x.grad
s, t = torch.randn(21, 5, generator=g), torch.randn(21, 4, generator=g); near = s.clone(); near[1] = near[0] + 1e-3; near[3] = near[2]
cases = [(e, k) for e in (s, near, s.double(), near.double()) for k in ((0, 1), (1, 2))]
plain = [result(e, t.to(e.dtype), k) for e, k in cases]
# what a batch on a GPU goes through
angle._on_gpu, angle._rough = cube, lambda near: (angle.amplification(near.float()) > angle.LIMIT).any(0)
for (e, k), (l, d) in zip(cases, plain):
    value, gradient = result(e, t.to(e.dtype), k); tolerance = 1e-12 if e.dtype == torch.float64 else 2e-6
    assert abs(value - l) <= tolerance * l and (gradient - d).abs().max() <= tolerance * d.abs().max(), (e.dtype, k, value - l)
print('equal')
"""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=Path(__file__).parents[1])
    skip_where_triton_cannot_interpret(done.stderr)
    assert done.stdout.strip() == "equal", done.stderr


def test_without_a_compiler_it_is_said_once_and_computed_without_it(monkeypatch):
    """The fault: 135 lines of traceback where no C++ compiler is."""
    import relkd.losses.angle as angle

    def broken(*_, **__):
        def run(*_):
            raise RuntimeError("no working C++ compiler")
        return run

    monkeypatch.setattr(angle, "_compiled", [])
    monkeypatch.setattr(torch, "compile", broken)
    s, t = torch.randn(9, 4, requires_grad=True), torch.randn(9, 6)
    with pytest.warns(UserWarning, match="compiled=True: torch.compile does not run here .*C.. compiler") as said:
        values = [RKDAngle(compiled=True)(s, t), RKDAngle(compiled=True)(s, t)]
    assert len(said) == 1 and values[0].equal(values[1]) and values[0].equal(RKDAngle()(s, t))


def test_a_kernel_that_does_not_compile_is_said_once_and_replaced(monkeypatch):
    from types import SimpleNamespace

    from relkd.losses import angle, angle_triton

    monkeypatch.setattr(angle, "_broken", [])
    monkeypatch.setattr(angle_triton, "available", lambda: True)
    monkeypatch.setattr(angle_triton, "cube", lambda *_: 1 / 0)
    on_gpu = SimpleNamespace(is_cuda=True)
    with pytest.warns(UserWarning, match="Triton kernel does not run here .ZeroDivisionError"):
        assert angle._on_gpu(on_gpu, None, None, None) is None
    assert angle._on_gpu(on_gpu, None, None, None) is None and len(angle._broken) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["random", "classes", "near 1e-3", "duplicates"])
def test_on_a_gpu_as_on_a_cpu(name):
    s, t = (x.float() for x in hard(name))
    value, gradient = both(angle_loss, s.cuda(), t.cuda())
    again = both(angle_loss, s.cuda(), t.cuda())
    assert torch.equal(value, again[0]) and torch.equal(gradient, again[1])
    assert_close((value.cpu(), gradient.cpu()), both(naive, s.double(), t.double()), 1e-5)


def test_benchmarks_write_records_that_tables_read(tmp_path):
    from relkd.bench import angle_benchmark, benchmark_ratios, benchmark_table, load_benchmarks

    with pytest.raises(ValueError, match="make them with `relkd bench`"):
        load_benchmarks(tmp_path)
    record = angle_benchmark(tmp_path, [16, 48], D=8, seconds=.01, compiled=False, naive_to=16)
    assert load_benchmarks(tmp_path) == [record]
    assert (list(benchmark_table(record).index) == [16, 48] and benchmark_table(record, "MiB").loc[16, "ours"] > 0
            and benchmark_ratios(record).loc[("RKD-A", "16"), "naive"] > 0)


# ---- some vertices stand for all

@pytest.mark.parametrize("distinct", [False, True])
def test_the_mean_over_all_draws_is_the_loss(distinct):
    """Every vertex alone, and every pair of them: no draw is left out, so the means are the expectations."""
    from itertools import combinations

    s, t = draw(8, 3, 0), draw(8, 5, 1)
    s[1] = s[0]
    for size in (1, 2, 8):
        found = [both(angle_loss, s, t, distinct, (0, 1), False, torch.tensor(which)) for which in combinations(range(8), size)]
        assert_close([sum(f[i] for f in found) / len(found) for i in (0, 1)], both(naive, s, t, distinct), 1e-11)


@pytest.mark.parametrize("name", ["random", "near 1e-3", "near 1e-6", "duplicates"])
def test_drawn_vertices_in_both_precisions_are_the_naive_cosines_at_these_vertices(name):
    s, t = (x.float() for x in hard(name))
    which = torch.randperm(96, generator=torch.Generator().manual_seed(5))[:37]

    def at_these(s, t):
        return F.smooth_l1_loss(angles(s)[which], angles(t)[which])

    assert_close(both(angle_loss, s, t, False, (0, 1), False, which), both(at_these, s.double(), t.double()), 1e-5)


def test_vertices_are_drawn_by_torchs_seed_and_all_is_the_default_bit_for_bit():
    s, t = draw(20, 4, 0, torch.float32), draw(20, 6, 1, torch.float32)

    def seeded(loss, teacher=t):
        torch.manual_seed(3)
        return both(loss, s, teacher)

    whole, some = both(RKD(), s, t), RKD(vertices=6)
    assert all(torch.equal(a, b) for a, b in zip(seeded(some), seeded(some)))
    assert not torch.equal(both(some, s, t)[1], both(some, s, t)[1])
    assert_close(seeded(some, sides(t)), seeded(some), 2e-6)                       # one measurement serves whatever is drawn
    for vertices in (None, 20, 99):
        state = torch.get_rng_state()
        assert all(torch.equal(a, b) for a, b in zip(both(RKD(vertices=vertices), s, t), whole))
        assert torch.equal(torch.get_rng_state(), state)
    assert "vertices=6" in repr(some) and "vertices" not in repr(RKD())


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_with_one_seed_share_one_draw(ranks):
    s, t, shares = draw(20, 4, 0), draw(20, 6, 1), []
    for rank in range(ranks):
        loss = RKD(vertices=7)
        loss.split(rank, ranks)
        torch.manual_seed(3)
        shares.append(both(loss, s, t))
    torch.manual_seed(3)
    assert_close([sum(x[i] for x in shares) / ranks for i in (0, 1)], both(RKD(vertices=7), s, t), 1e-11)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_drawn_vertices_under_the_compiler(backend, flags):
    if backend == "inductor" and "slow" not in flags:
        pytest.skip("compiling takes seconds: --flags slow")
    s, t = draw(20, 4, 0, torch.float32), draw(20, 6, 1, torch.float32)
    torch.compiler.reset()

    def seeded(loss):
        torch.manual_seed(3)
        return both(loss, s, t)

    assert_close(seeded(torch.compile(RKD(vertices=6), fullgraph=True, backend=backend)), seeded(RKD(vertices=6)), 1e-6)


def test_wrong_numbers_of_vertices_are_refused():
    for wrong in (0, -1, 2.5, "many"):
        with pytest.raises(ValueError, match="vertices is how many are drawn a call, a whole number from 1, or None for all; got"):
            RKDAngle(vertices=wrong)
    with pytest.raises(ValueError, match="4 processes share the vertices that RKDAngle draws; got vertices=3: draw at least 4"):
        RKD(vertices=3).split(0, 4)
