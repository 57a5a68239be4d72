"""What all losses have in common, asked of each of them."""
import copy
import io

import pytest
import torch
from torch import nn

from relkd import losses
from relkd.losses import AB, AT, CC, CRD, FSP, FT, KD, NST, OFD, PKT, RKD, SP, VID, FitNet, FTShortcut, RKDAngle, RKDDistance

MAPS, EMBEDDINGS, LAYERS = (8, 4, 4, 4), (8, 6), [(8, 4, 8, 8), (8, 6, 4, 4)]
CASES = {
    "KD": (KD, (8, 10)), "FitNet": (lambda: FitNet(4, 4), MAPS), "AT": (AT, MAPS), "SP": (SP, MAPS), "CC": (CC, EMBEDDINGS), "VID": (lambda: VID(4, 4), MAPS), "RKD": (RKD, EMBEDDINGS),
    "RKDDistance": (RKDDistance, EMBEDDINGS), "RKDAngle": (RKDAngle, EMBEDDINGS), "PKT": (PKT, EMBEDDINGS), "AB": (lambda: AB(4, 4), MAPS), "FT": (lambda: FT(4, 4), MAPS),
    "FTShortcut": (FTShortcut, MAPS), "FSP": (FSP, LAYERS), "NST": (NST, MAPS), "CRD": (lambda: CRD(6, 6, samples=20, feat_dim=5, negatives=7), EMBEDDINGS), "OFD": (lambda: OFD(4, 4), MAPS),
}


def case(name, dtype=torch.float32):
    make, shape = CASES[name]
    g = torch.Generator().manual_seed(0)
    draw = lambda: [torch.randn(s, generator=g).to(dtype) for s in shape] if isinstance(shape, list) else torch.randn(shape, generator=g).to(dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss = make()
    more = {"index": torch.arange(8), "negatives": torch.arange(56).view(8, 7) % 20} if name == "CRD" else {}
    return loss, draw(), draw(), more


def leaves(x):
    return x if isinstance(x, list) else [x]


def test_every_exported_loss_is_asked():
    assert set(losses.__all__) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_number_without_dimensions_student_first_teacher_without_gradient(name):
    loss, s, t, more = case(name)
    for f in leaves(s) + leaves(t):
        f.requires_grad_()
    value = loss(s, t, **more)
    value.backward()
    assert value.shape == () and value.dtype == torch.float32
    assert all(f.grad is not None and f.grad.isfinite().all() and f.grad.abs().max() > 0 for f in leaves(s)) and all(f.grad is None for f in leaves(t))


@pytest.mark.parametrize("name", CASES)
def test_saved_and_read_back(name):
    loss, s, t, more = case(name)
    loss(s, t, **more)                                       # moves statistics and memories
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    torch.manual_seed(5)
    other = CASES[name][0]()
    other.load_state_dict(torch.load(file))
    assert torch.equal(loss.eval()(s, t, **more), other.eval()(s, t, **more))


@pytest.mark.parametrize("name", CASES)
def test_value_of_the_batch_does_not_depend_on_the_memory_format(name):
    loss, s, t, more = case(name)
    if not isinstance(s, torch.Tensor) or s.dim() != 4:
        pytest.skip("not one map")
    torch.testing.assert_close(copy.deepcopy(loss)(s.to(memory_format=torch.channels_last), t.to(memory_format=torch.channels_last)), loss(s, t))


@pytest.mark.parametrize("name", CASES)
def test_a_student_learns_from_it_alone(name):
    """A linear or convolutional student, the loss's own parameters beside it, thirty steps."""
    loss, _, t, more = case(name)
    torch.manual_seed(1)
    several, maps = isinstance(t, list), leaves(t)[0].dim() == 4
    x = [torch.randn(8, 3, *f.shape[2:]) for f in leaves(t)] if maps else [torch.randn(8, 12)]
    bodies = nn.ModuleList(nn.Conv2d(3, f.shape[1], 3, padding=1) if maps else nn.Linear(12, f.shape[1]) for f in leaves(t))
    t = [f.relu() for f in t] if several else t
    opt = torch.optim.Adam([*bodies.parameters(), *loss.parameters()], lr=.02)
    values = []
    for _ in range(30):
        opt.zero_grad()
        out = [b(v) for b, v in zip(bodies, x)]
        value = loss(out if several else out[0], t, **more)
        value.backward()
        opt.step()
        values.append(value.item())
    assert values[-1] < .98 * values[0]
