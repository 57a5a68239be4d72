"""Run by test_field.py in two processes: losses that remember,
inside DistributedDataParallel on uneven shares of a batch; each leaves what it remembers."""
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from relkd.losses import AB, CRD, FT
from relkd.losses.rules import remembered

CUT = {0: slice(0, 5), 1: slice(5, 8)}


class Criterion(nn.Module):
    """Three losses that remember, behind one network."""
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Conv2d(3, 4, 1)
        self.crd, self.ab, self.ft = CRD(4, 7, samples=20, feat_dim=4, negatives=9), AB(4, 6), FT(4, 6, batchnorm=True)

    def forward(self, x, t, e, index, negatives):
        s = self.net(x)
        return self.crd(s.mean((2, 3)), e, index=index, negatives=negatives) + self.ab(s, t) + self.ft(s, t)


def batches():
    g = torch.Generator().manual_seed(1)
    for k in range(2):
        index = torch.arange(8) + 8 * k
        (yield torch.randn(8, 3, 4, 4, generator=g), torch.randn(8, 6, 4, 4, generator=g),
         torch.randn(8, 7, generator=g), index, torch.randint(20, (8, 9), generator=g))


def state(criterion, cut=slice(None)):
    for batch in batches():
        criterion(*(b[cut] for b in batch)).backward()
    return remembered(criterion)


def work(rank, meeting, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.save(state(DistributedDataParallel(Criterion()), CUT[rank]), f"{out}/{rank}.pt")
    dist.destroy_process_group()

