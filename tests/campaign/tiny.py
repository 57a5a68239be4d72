"""A recipe of each kind that is made to be killed: seconds long, saved all the time; and what is left of one."""
import os
import signal
from dataclasses import replace

import torch

from helpers import few_shot_toy, figures, toy
from relkd.data import Dataset
from relkd.data.augment import flip
from relkd.distill import Row, Term
from relkd.records import load_records
from relkd.tables.recipe import Recipe
from relkd.tables.run import run
from relkd.tasks.retrieval import Retrieval
from relkd.train import Schedule, Session, Stop, Stopped


def noise():
    """Twelve classes of eight images each, told apart by their mean."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(12).repeat_interleave(8)
    images = (torch.rand(96, 3, 8, 8, generator=g) * 80 + 14 * labels[:, None, None, None]).to(torch.uint8)
    splits = {"train": tuple(range(8)), "test": tuple(range(8, 12))}
    return Dataset("noise", images, labels, splits, tuple(map(str, range(12))))


def classify():
    r = toy(seeds=(0, 1))
    return replace(r, rows=r.rows[:2], schedule=replace(r.schedule, epochs=8), teacher_schedule=replace(r.schedule, epochs=4))


def few_shot():
    r = few_shot_toy()
    return replace(r, schedule=replace(r.schedule, epochs=5))


def retrieval():
    task = Retrieval(size=4, teacher_size=6, images=4, length=3, ks=(1, 2), augment=((flip, {}),))
    schedule = Schedule(epochs=4, batch_size=8, lr=1e-2, weight_decay=0., milestones=(), optimiser="Adam")
    terms = Term("RKDDistance", 1., "logits", "logits"), Term("RKDAngle", 2., "logits", "logits")
    rows = Row("Triplet", changes={"l2": True}), Row("RKD-DA", terms, task=0.)
    return Recipe(name="own/metric", title="noise", data=noise, task=task, teacher="resnet8x0.25",
                  student="resnet8x0.25", rows=rows, schedule=schedule, seeds=(0,))


KINDS = {"classification": classify, "few-shot": few_shot, "retrieval": retrieval}
EXITS = {"SIGTERM": 43, "SIGINT": 44, "KeyboardInterrupt": 45}


def life(recipe, out, every=.05, parts=None):
    """One start of a run, as the command line makes it; the process leaves with what stopped it."""
    try:
        with Stop() as stop:
            return len(run(recipe, Session(str(out), "cpu", every=every, part_size=parts, stop=stop)))
    except Stopped as error:
        os._exit(EXITS[str(error)])
    except KeyboardInterrupt:
        os._exit(EXITS["KeyboardInterrupt"])


def result(recipe, out):
    """What a finished run must give again, in words."""
    return {str(k): str(v) for k, v in figures(load_records(out, recipe.name)).items()}


def left_over(out):
    return sorted(p.name for p in out.rglob("*") if p.name.startswith("group-") or p.name.endswith(".tmp"))


def expected(number, twice):
    """How a start that was told to stop may leave."""
    if number == signal.SIGKILL:
        return {-signal.SIGKILL}
    ways = {EXITS[signal.Signals(number).name], -number}      # the latter before the run has begun to listen
    return ways | ({EXITS["KeyboardInterrupt"]} if twice else set())
