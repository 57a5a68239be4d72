"""Run by test_runs.py under torchrun: train on shares of the batch, and leave what rank 0 ends with."""
import sys

import torch
from torch import nn

from relkd.data import Batches, Episodes, load
from relkd.distill import PAPER_ROWS, Row, Term
from relkd.fewshot import EpisodeLearner, EpisodeSchedule, Trial
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


def train_episodes(fabric=None):
    "Digits as classes of a few-shot set; the embedding is the output of a network without BN, and without biases: Adam makes steps out of the rounding of gradients that are 0 (translation)."
    d, plan = load("digits"), EpisodeSchedule(8, way=4, query=2, lr=1e-2, halve_every=4, epoch=4)
    data = d.with_splits({"train": "012345", "val": "67", "test": "89"})

    def embedding(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 16, bias=False), nn.Tanh(), nn.Linear(16, 8, bias=False))

    rows = [Row("RKD-DA", (Term("RKDDistance", 25., "3", "3"), Term("RKDAngle", 50., "3", "3"))), Row("PKT", (Term("PKT", 30000., "3", "3"),)), Row("Student")]
    learners = [EpisodeLearner(embedding(k), r, plan, Trial(2, 1, 3, 50), seed=k) for k, r in enumerate(rows)]
    fit(learners, Episodes(data, "train", 4, 1, 2, seed=0, length=plan.epoch), plan.epochs, embedding(9), fabric)
    return learners


def kept(learners):
    return [{"model": l.model.state_dict(), "epochs": l.epochs, "optimiser": [x for v in l.optimiser.state_dict()["state"].values() for k, x in v.items() if k in ("momentum_buffer", "exp_avg")]} for l in learners]


if __name__ == "__main__":
    fabric, learners = train()
    of_episodes = train_episodes(fabric)
    if fabric.is_global_zero:
        torch.save([kept(learners), kept(of_episodes)], sys.argv[1])
