"""Run by test_runs.py under torchrun: train on shares of the batch, and leave what rank 0 ends with."""
import sys

import torch
from torch import nn

from relkd.data import Batches, load
from relkd.distill import PAPER_ROWS, Row, Term
from relkd.models import create
from relkd.train import Learner, Schedule, fit, make_fabric


def net(seed):
    "Without BN, whose statistics are those of a share."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))


def train(epochs=2):
    torch.set_num_threads(1)
    fabric = make_fabric("cpu")
    embedding = {"student": "2", "teacher": "fc:input"}
    rows = [Row("RKD-DA", (Term("RKDDistance", 25., **embedding), Term("RKDAngle", 50., **embedding))), PAPER_ROWS[3], PAPER_ROWS[0]]
    learners = [Learner(net(k), r, Schedule(epochs, 50, .02, milestones=(1,)), seed=k) for k, r in enumerate(rows)]
    fit(learners, Batches(load("digits"), 50, 1, torch.arange(150)), epochs, create("resnet8", 10, 1, seed=9), fabric)
    return fabric, learners


if __name__ == "__main__":
    fabric, learners = train()
    if fabric.is_global_zero:
        torch.save([{"model": l.model.state_dict(), "epochs": l.epochs, "momentum": [v["momentum_buffer"] for v in l.optimiser.state_dict()["state"].values()]} for l in learners], sys.argv[1])
