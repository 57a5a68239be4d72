"""CosineLinear and the reduction of proxies: what they equal, what they ignore, precision, errors."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from relkd.heads import CosineLinear, reduce_proxies


def head(*args, seed=0, **kw):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CosineLinear(*args, **kw)


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 10**6))
def test_shapes_bounds_and_blindness_to_lengths(d, classes, proxies, reduce, sigma, seed):
    h = head(d, classes, proxies, to_reduce=reduce, sigma=sigma, seed=seed).double()
    x = torch.randn(7, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z = h(x)
    assert z.shape == (7, classes if reduce else classes * proxies) and z.abs().max() <= 1 + 1e-12
    torch.testing.assert_close(h(x * torch.logspace(-3, 3, 7, dtype=torch.float64)[:, None]), z)
    with torch.no_grad():
        h.weight.mul_(7)
    torch.testing.assert_close(h(x), z)


def test_one_proxy_is_the_scaled_cosine_of_torch():
    h, x = head(8, 5), torch.randn(6, 8)
    with torch.no_grad():
        h.sigma.fill_(3)
    torch.testing.assert_close(h(x), 3 * F.cosine_similarity(x[:, None], h.weight[None], dim=2))
    torch.testing.assert_close(head(8, 5, to_reduce=True)(x), head(8, 5)(x))


def test_equal_proxies_are_one_and_the_nearest_counts_most():
    z = torch.randn(4, 3)
    torch.testing.assert_close(reduce_proxies(z.repeat_interleave(2, 1), 2), z)
    two = torch.tensor([[.9, -.9]])
    assert two.mean() < reduce_proxies(two, 2).item() < .9


def test_gradcheck():
    h = head(4, 3, 2, to_reduce=True).double()
    inputs = [t.detach().clone().requires_grad_() for t in (torch.randn(5, 4, dtype=torch.float64), h.weight, h.sigma)]
    assert torch.autograd.gradcheck(lambda x, w, s: torch.func.functional_call(h, {"weight": w, "sigma": s}, (x,)), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_on_zeros_and_extremes_in_every_precision(dtype):
    h = head(4, 3, 2, to_reduce=True)
    h = h.double() if dtype == torch.float64 else h
    for e in (torch.zeros(2, 4), torch.full((2, 4), 3e4), torch.full((2, 4), 1e-4), torch.eye(4)[:2]):
        e = e.to(dtype).requires_grad_()
        z = h(e)
        z.sum().backward()
        assert z.isfinite().all() and e.grad.isfinite().all() and e.grad.abs().max() < 1e5
        assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(h(e), z)


def test_compiles_and_its_state_makes_the_round_trip():
    h, x = head(4, 3, 2, to_reduce=True), torch.randn(5, 4)
    torch.testing.assert_close(torch.compile(h, fullgraph=True, backend="aot_eager")(x), h(x))
    other = head(4, 3, 2, to_reduce=True, seed=1)
    other.load_state_dict(h.state_dict())
    assert torch.equal(other(x), h(x)) and sorted(h.state_dict()) == ["sigma", "weight"] and head(4, 3, sigma=False).sigma is None


def test_it_learns_and_sigma_grows():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=g)
    y, h = x[:, :3].argmax(1), head(8, 3)
    opt = torch.optim.Adam(h.parameters(), lr=.05)
    for _ in range(150):
        opt.zero_grad()
        loss = F.cross_entropy(h(x), y)
        loss.backward()
        opt.step()
    assert loss < .4 and h.sigma > 3 and (h(x).argmax(1) == y).float().mean() > .9


@pytest.mark.parametrize("call, message", [
    (lambda: CosineLinear(0, 3), "CosineLinear needs at least one feature, class and proxy; "
                                 "got in_features = 0, out_features = 3, nb_proxy = 1"),
    (lambda: CosineLinear(4, 3, nb_proxy=0), "nb_proxy = 0"),
    (lambda: head(4, 3)(torch.zeros(2, 5)), r"CosineLinear needs embeddings \(N, 4\); got \(2, 5\)"),
    (lambda: head(4, 3)(torch.zeros(4)), r"CosineLinear needs embeddings \(N, 4\); got \(4,\)"),
    (lambda: reduce_proxies(torch.zeros(2, 5), 2), r"reduce_proxies needs similarities \(N, classes \* nb_proxy\); "
                                                   r"got \(2, 5\) and nb_proxy = 2"),
], ids=range(5))
def test_errors(call, message):
    with pytest.raises(ValueError, match=message) as e:
        call()
    assert "\n" not in str(e.value)
