"""One of several processes on gloo, started by test_distributed.py: gradients of gathered losses, and what is refused."""
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from relkd.distributed import Gathered, gather
from relkd.features import Features
from relkd.losses import CC, CRD, DIST, DKD, KD, PKT, RKD, SP, FitNet, RKDAngle, RKDDistance

LOSSES = {"RKD-D": RKDDistance, "RKD-A": RKDAngle, "RKD-DA": RKD, "SP": SP, "PKT": PKT, "CC": CC, "KD": KD,
          "DKD": lambda: DKD(classes=torch.arange(N) % 5), "DIST": DIST, "FitNet": lambda: FitNet(16, 24)}
SHARES = {"even": [(0, 6), (6, 12)], "uneven": [(0, 9), (9, 12)], "one alone": [(0, 11), (11, 12)]}
N = 12
ALONE = [(0, N)]


def remembering():
    return CRD(16, 24, N, negatives=8)


def data():
    g = torch.Generator().manual_seed(0)
    return torch.randn(N, 12, generator=g), torch.arange(N) % 5


def net(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, width), nn.Tanh(), nn.Linear(width, 5))


def step(loss, mine, how, several):
    """The gradient of cross-entropy and a loss on `mine` of the samples, and the value, averaged over the processes."""
    x, y = (v[slice(*mine)] for v in data())
    torch.manual_seed(7)
    distil, student, index = loss(), net(16, 1), torch.arange(N)[slice(*mine)]
    own = {"index": index} if isinstance(distil, (CRD, DKD)) else {}
    model = nn.ModuleList([DDP(student) if several else student, distil])
    layers = ["2:input", "logits"]
    read, teacher = Features(model[0], layers, gather=how == "Features"), Features(net(24, 2), layers, frozen=True)
    s, t = read(x), teacher(x)
    layer = "logits" if isinstance(distil, (KD, DKD, DIST)) else "2:input"
    if how == "Features":
        t, y, own = gather(t, y, own)
    elif how == "gather":
        s, t, y, own = gather(s, t, y, own)
    pair = s[layer], t[layer]
    value = Gathered(distil)(*pair, **own) if how == "Gathered" else distil(*pair, **own)
    logits, labels = gather(s["logits"], y) if how == "Gathered" else (s["logits"], y)
    (F.cross_entropy(logits, labels) + value).backward()
    gradients = [p.grad.clone() for p in model[0].parameters()], [p.grad.clone() for p in distil.parameters()]
    value = value.detach().clone()
    if several:
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return {"value": value, "student": torch.cat([g.flatten() for g in gradients[0]]), "own": gradients[1],
            "memory": getattr(distil, "memory_s", None)}


def kinds(rank):
    """Every dtype there and back, structures, an empty share."""
    found = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8):
        mine = (torch.arange(2 + rank)[:, None] + rank * 2).expand(-1, 2).to(dtype)      # not contiguous
        if mine.is_floating_point():
            mine = mine.clone().requires_grad_()
        whole = gather(mine)
        found[str(dtype)] = [whole.detach(), None]
        if mine.is_floating_point():
            (whole * (rank + 1)).sum().backward()
            found[str(dtype)][1] = mine.grad
    a = torch.full((2, 3), float(rank))
    found["structure"] = gather({"a": a, "b": [a, (a, None)]}, a[:rank])
    with torch.inference_mode():
        found["inference"] = gather(a)
    return found


def refused(call):
    try:
        call()
    except ValueError as error:
        return str(error)


def refusals(rank):
    return {"rows": refused(lambda: gather(torch.ones(2, 3 + rank))),
            "number": refused(lambda: gather(torch.tensor(1.))),
            "object": refused(lambda: gather({"a": object()})),
            "apart": refused(lambda: Gathered(seeded(rank))(torch.ones(2, 4), torch.ones(2, 4)))}


def seeded(rank):
    torch.manual_seed(rank)
    return FitNet(4, 4)


def work(rank, at):
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{at}/meet", rank=rank, world_size=2)
    found = {(name, share, how): step(loss, parts[rank], how, True) for name, loss in LOSSES.items()
             for share, parts in SHARES.items() for how in ("gather", "Gathered", "Features")
             if share == "even" or name in ("RKD-DA", "FitNet")}
    found["local"] = step(LOSSES["RKD-DA"], SHARES["even"][rank], "local", True)
    crd = step(remembering, SHARES["even"][rank], "Gathered", True)
    torch.save({"found": found, "kinds": kinds(rank), "refused": refusals(rank), "crd": crd}, f"{at}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
