"""A teacher that is an array: what is refused, what the loop gives;
and the gradient cache, equal to the whole batch whatever the network draws or remembers."""
import warnings

import numpy as np
import pytest
import torch
from helpers import CASES, as_given, assert_says, case, few_digits, learned, randn
from torch import nn

from relkd.bench import Held
from relkd.embeddings import Embeddings, cached_backward
from relkd.losses import RKD
from relkd.losses.angle import sides


# ---- the array

@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_rows_from_disk_from_an_array_and_from_a_tensor(dtype, tmp_path):
    a = randn(50, 6).numpy().astype(dtype)
    np.save(tmp_path / "a.npy", a)
    index = torch.tensor([3, 49, 3])
    native = torch.from_numpy(a.astype(a.dtype.newbyteorder("=")))
    for source in (tmp_path / "a.npy", str(tmp_path / "a.npy"), a, native, native.clone().requires_grad_()):
        teacher = Embeddings(source, 50)
        assert (len(teacher), teacher.width) == (50, 6)
        assert teacher[index].dtype == (torch.float64 if dtype == np.float64 else torch.float32) and not teacher[index].requires_grad
        assert torch.equal(teacher[index], native[index].to(teacher[index].dtype)) and teacher[10:20].shape == (10, 6)
    assert isinstance(Embeddings(tmp_path / "a.npy").rows, np.memmap)
    assert torch.equal(Embeddings(native.to(torch.bfloat16))[index], native.to(torch.bfloat16)[index].float()) or dtype == np.float64


def test_what_is_handed_out_may_be_changed(tmp_path):
    np.save(tmp_path / "a.npy", randn(9, 3).numpy())
    teacher = Embeddings(tmp_path / "a.npy")
    teacher[torch.arange(4)].zero_()
    assert teacher[torch.arange(4)].abs().min() > 0


def broken(rows, value, n=5000):
    a = randn(n, 3)
    a[rows] = value
    return a


@pytest.mark.parametrize("source, message", [
    (broken(4500, float("nan")), "^teacher row 4500 holds NaN or infinity: embed the sample again, or leave it out"),
    (broken([7, 4999], float("-inf")), r"^teacher row 7 holds NaN or infinity \(2 such rows\)"),
    (broken([4100, 4200], 0.), r"^teacher row 4100 is all zeros \(2 such rows\)"),
    (torch.ones(6, 3), "^all 6 teacher rows are equal"),
    (randn(8), r"must be \(N, D\), one row a sample, floating point; got \(8,\), torch.float32"),
    (np.zeros((8, 4), np.int8), r"got \(8, 4\), int8"),
    (randn(0, 4), r"got \(0, 4\)"),
    ([[1., 2.]], "are a .npy, an array or a tensor; got list"),
    ("nothing.npy", "cannot read teacher embeddings from nothing.npy"),
])
def test_what_cannot_teach_is_refused_with_the_number_of_the_row(source, message):
    assert_says(lambda: Embeddings(source), message)


def test_rows_and_data_must_be_as_many(tmp_path):
    assert_says(lambda: Embeddings(randn(9, 3), 10),
                "the teacher has 9 rows and the data 10 samples: row i must be the embedding of sample i")
    np.savez(tmp_path / "two.npz", a=np.zeros(3))
    (tmp_path / "text.npy").write_text("no numbers")
    for name in ("two.npz", "text.npy"):
        assert_says(lambda: Embeddings(tmp_path / name), "^teacher embeddings are a .npy|^cannot read teacher embeddings")


def test_repeated_rows_are_warned_of_in_one_line():
    a = randn(20, 3)
    a[[5, 9]] = a[2].clone()
    with pytest.warns(UserWarning, match=r"^teacher row 5 repeats row 2 \(2 such rows\): ") as said:
        Embeddings(a)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Embeddings(randn(20, 3))


def test_a_student_of_another_width_learns_from_an_array_of_1024(tmp_path):
    x = few_digits().train_images.float() / 16
    np.save(tmp_path / "a.npy", (x.flatten(1) @ torch.linalg.qr(randn(1024, 64)).Q.T).numpy())
    teacher = Embeddings(tmp_path / "a.npy", len(x))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
        first, last = learned(RKD(1, 2, vertices=32), student, x, teacher[torch.arange(len(x))], 25)
    assert last < first / 2


# ---- the cache

def network(*more, d=5, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 12), *more, nn.Tanh(), nn.Linear(12, d)).to(dtype)


def gradients(net, f):
    net.zero_grad()
    torch.manual_seed(4)
    value = f()
    return value.detach(), [p.grad.clone() for p in net.parameters()]


def whole(net, loss, batches, teacher):
    value = loss(torch.cat([net(x) for x in batches]), teacher)
    value.backward()
    return value


def assert_equal_to_whole(net, loss, batches, teacher, rtol=1e-10):
    mine, theirs = (gradients(net, lambda f=f: f(net, loss, batches, teacher)) for f in (cached_backward, whole))
    torch.testing.assert_close(mine, theirs, rtol=rtol, atol=1e-12)
    assert not mine[0].requires_grad


@pytest.mark.parametrize("more", [(), (nn.Dropout(.4),), (nn.BatchNorm1d(12),)], ids=["plain", "dropout", "batch norm"])
@pytest.mark.parametrize("sizes", [[30], [8, 8, 8, 6], [1, 29]])
def test_the_gradient_of_the_whole_batch(more, sizes):
    if 1 in sizes and any(isinstance(m, nn.BatchNorm1d) for m in more):
        pytest.skip("a batch norm refuses one sample")
    x, t = randn(30, 7, dtype=torch.float64).split(sizes), randn(30, 4, seed=1, dtype=torch.float64)
    for teacher in (t, sides(t)):
        assert_equal_to_whole(network(*more), RKD(1, 2), x, teacher)
    assert_equal_to_whole(network(*more), RKD(1, 2, vertices=5), x, t)         # the loss draws, too


@pytest.mark.parametrize("name", [name for name in CASES if name
                                  in ("SP", "AT", "PKT", "NST", "CC", "FitNet", "VID", "RKDDistance", "RKDAngle")])
def test_any_loss_and_its_own_parameters(name):
    loss, (s,), t, _ = case(name, 12, dtype=torch.float64)
    loss = loss.double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = (nn.Linear(s.shape[1], s.shape[1]) if s.dim() == 2 else nn.Conv2d(s.shape[1], s.shape[1], 3, padding=1)).double()
    both = nn.ModuleList([net, loss])
    mine, theirs = (gradients(both, lambda f=f: f(net, loss, s.split(5), as_given(t))) for f in (cached_backward, whole))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_what_a_loss_is_told_beside_is_handed_over():
    seen = []

    def loss(s, t, index):
        seen.append(index)
        return (s - t).square().mean()

    net = network()
    cached_backward(net, loss, randn(6, 7, dtype=torch.float64).split(4), randn(6, 5, dtype=torch.float64), index=torch.arange(6))
    assert seen[0].equal(torch.arange(6)) and len(seen) == 1


def test_random_numbers_and_running_statistics_are_those_of_one_pass():
    x, t = randn(24, 7, dtype=torch.float64).split(8), randn(24, 4, dtype=torch.float64)
    ends = []
    for f in (cached_backward, whole):
        net = network(nn.Dropout(.3), nn.BatchNorm1d(12))
        gradients(net, lambda: f(net, RKD(1, 2, vertices=9), x, t))
        ends.append(({k: b.clone() for k, b in net.named_buffers()}, torch.rand(3)))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=0)


def test_gradients_are_added_to_those_that_are_there():
    net, x, t = network(), randn(10, 7, dtype=torch.float64).split(5), randn(10, 4, dtype=torch.float64)
    once = gradients(net, lambda: cached_backward(net, RKD(1, 2), x, t))[1]
    cached_backward(net, RKD(1, 2), x, t)
    torch.testing.assert_close([p.grad for p in net.parameters()], [2 * g for g in once])


def test_inside_autocast_every_weight_gets_its_gradient():
    net, x, t = network(dtype=torch.float32), randn(24, 7).split(8), randn(24, 4)

    def under(f):
        def run():
            with torch.autocast("cpu", torch.bfloat16):
                return f(net, RKD(1, 2), x, t)
        return gradients(net, run)

    (value, mine), (expected, theirs) = under(cached_backward), under(whole)
    assert torch.equal(value, expected)
    for a, b in zip(mine[:-1], theirs[:-1]):                 # the last bias shifts all points, which RKD does not see:
                                                             # its gradient is rounding
        assert (a - b).norm() <= .02 * b.norm() and b.norm() > 0


def test_one_graph_at_a_time():
    net = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(12)])
    x, t = randn(256, 64), randn(256, 8)
    held = []
    for f in (lambda: cached_backward(net, RKD(1, 2), x.split(32), t), lambda: RKD(1, 2)(net(x), t).backward()):
        net.zero_grad()
        with Held(x, t, *net.parameters()) as memory:
            f()
        held.append(memory.peak)
    assert held[0] < held[1]


def test_bad_calls():
    net, x = network(), randn(10, 7, dtype=torch.float64).split(5)
    assert_says(lambda: cached_backward(net, RKD(), [], randn(10, 4)), "cached_backward needs at least one micro-batch; got none")
    assert_says(lambda: cached_backward(net, RKD(), x, randn(9, 4)),
                "needs student and teacher embeddings of the same samples; got N = 10 and N = 9")
