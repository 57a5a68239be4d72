"""Run by test_processes.py: train on shares of the batch, and leave what each process ends with.

Under torchrun, or by `forked`: so many processes, copies of one that has imported everything."""
import os
import socket
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from helpers import After, Tiny, few_digits, split_digits, toy  # noqa: E402
from relkd.data import Batches, Episodes  # noqa: E402
from relkd.distill import PAPER_ROWS, RKD_A, RKD_D, Row, Term  # noqa: E402
from relkd.tables.run import run  # noqa: E402
from relkd.tasks.classify import Classify  # noqa: E402
from relkd.tasks.fewshot import FewShot  # noqa: E402
from relkd.train import Learner, Schedule, Session, Stopped, WholeBatchNorm2d, fit, synchronised  # noqa: E402


def seeded(make, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def classify(session):
    "With batch norms; 48 samples a batch are 2 x 24 or 3 x 16."
    nets = [synchronised(seeded(lambda: Tiny(10), k), session.fabric()) for k in range(3)]
    rows = [Row("RKD-DA", (RKD_D, RKD_A)), PAPER_ROWS[3], PAPER_ROWS[0]]
    learners = [Learner(n, r, Schedule(2, 48, .02, milestones=(1,)), seed=k, task=Classify()) for k, (n, r) in enumerate(zip(nets, rows))]
    fit(learners, Batches(few_digits(), 48, 1), 2, seeded(lambda: Tiny(10), 9), session)
    return learners


def few_shot(session):
    "Episodes of 12 images; SGD, since Adam makes steps out of the rounding of gradients that are 0."
    task = FewShot(shot=1, way=4, query=2, length=4, ways=(2,), test_query=3, test_episodes=40)
    nets = [synchronised(seeded(lambda: Tiny(None), k), session.fabric()) for k in range(3)]
    rows = [Row("RKD-DA", (RKD_D, RKD_A)), Row("PKT", (Term("PKT", 30000.),)), Row("Student")]
    learners = [Learner(n, r, Schedule(2, None, .01, milestones=(1,)), seed=k, task=task) for k, (n, r) in enumerate(zip(nets, rows))]
    fit(learners, Episodes(split_digits(), "train", 4, 1, 2, seed=0, length=4), 2, seeded(lambda: Tiny(None), 9), session)
    return learners


def norms(rank, processes):
    "One batch norm on this process's share of a batch: output, gradients, statistics."
    g = torch.Generator().manual_seed(0)
    x, up = torch.randn(12, 3, 4, 5, generator=g) * 3 + 100, torch.randn(12, 3, 4, 5, generator=g)
    found = []
    for options in ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}):
        bn, mine = WholeBatchNorm2d(3, **options), x[rank::processes].clone().requires_grad_()
        for _ in range(2):
            out = bn(mine)
        (out * up[rank::processes]).sum().backward()
        found.append([out.detach(), mine.grad, *(p.grad for p in bn.parameters()), *bn.buffers(), bn.eval()(mine).detach()])
    return found


def kept(learners):
    def state(l):
        return [x for v in l.optimiser.state_dict()["state"].values() for k, x in v.items() if k == "momentum_buffer"]

    return [{"model": l.model.state_dict(), "epochs": l.epochs, "optimiser": state(l)} for l in learners]


def refused(session):
    try:
        return synchronised(nn.Sequential(nn.BatchNorm1d(3)), session.fabric()) and ""
    except ValueError as error:
        return str(error)


def resumed(recipe, out):
    "Stopped after the students' first epoch, and run again by as many processes."
    try:
        run(recipe, Session(out, "cpu", stop=After(1)))
    except Stopped:
        dist.barrier()
        return run(recipe, Session(out, "cpu"))


def work(at):
    torch.set_num_threads(1)
    session = Session(f"{at}/out", "cpu")
    fabric = session.fabric()
    made = {"classify": kept(classify(session)), "few-shot": kept(few_shot(session)), "refused": refused(session),
            "norms": norms(fabric.global_rank, fabric.world_size)}
    recipe = toy(schedule=Schedule(2, 24, .05, milestones=(1,)), teacher_schedule=Schedule(1, 48, .05))
    made["records"] = run(recipe, session)
    made["resumed"] = resumed(recipe, f"{at}/stopped")
    torch.save(made, f"{at}/{fabric.global_rank}.pt")


def forked(at, n):
    "Ranks told what torchrun tells its own; none has to import anything."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    at.mkdir(parents=True, exist_ok=True)
    children = []
    for rank in range(n):
        child = os.fork()
        if child == 0:
            told = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
            os.environ |= {k: str(v) for k, v in told.items()}
            try:
                work(at)
                dist.destroy_process_group()
            except BaseException:
                import traceback

                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children]


def one_after_another(at, *processes):
    warnings.simplefilter("ignore")
    sys.exit(any(any(forked(at / str(n), n)) for n in processes))


if __name__ == "__main__":
    work(sys.argv[1])
