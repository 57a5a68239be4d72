"""Several processes do what one would do with the whole batch, batch norms included, whatever the task;
every process ends with the same."""
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ddp_worker
from forked import finish
from helpers import Tiny, few_digits, few_shot_toy, figures, same, toy
from relkd.data import Batches
from relkd.distill import PAPER_ROWS
from relkd.records import load_records
from relkd.tables.experiment import Experiment
from relkd.train import Learner, Schedule, Session, WholeBatchNorm2d, fit, share, synchronised
from relkd.train.processes import asked_by_any, average_gradients, gathered

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.xdist_group("processes")          # one worker makes what all of them look at


@pytest.fixture(scope="module")
def forked(request, tmp_path_factory):
    at = tmp_path_factory.mktemp("processes")
    numbers = (2, 3) if "slow" in request.config.getoption("--flags") else (2,)
    code, said = finish(ddp_worker.one_after_another, at, *numbers, said=at / "said.txt", GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS=1)
    assert code == 0, said[-3000:]
    return at


@pytest.fixture(scope="module", params=["2", "3", "torchrun"])
def several(request, tmp_path_factory, relkd_env):
    if request.param != "2" and "slow" not in request.config.getoption("--flags"):
        pytest.skip("three processes, and two that import everything again: --flags slow")
    if request.param == "torchrun":
        n, at = 2, tmp_path_factory.mktemp("torchrun")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
                   "--nproc_per_node", str(n), str(HERE / "ddp_worker.py"), str(at)]
        done = subprocess.run(command, env=relkd_env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        n, at = int(request.param), request.getfixturevalue("forked") / request.param
    return n, at, [torch.load(at / f"{rank}.pt", weights_only=True) for rank in range(n)]


@pytest.fixture(scope="module")
def alone():
    session = Session(device="cpu")
    return {"classify": ddp_worker.kept(ddp_worker.classify(session)), "few-shot": ddp_worker.kept(ddp_worker.few_shot(session))}


@pytest.mark.parametrize("task", ["classify", "few-shot"])
def test_they_train_like_one_with_the_whole_batch(several, alone, task):
    n, _, ranks = several
    for one, of in zip(alone[task], ranks[0][task], strict=True):
        assert of["epochs"][0]["loss"] == pytest.approx(one["epochs"][0]["loss"], rel=1e-3)
        assert [e["loss"] for e in of["epochs"]] == pytest.approx([e["loss"] for e in one["epochs"]], rel=1e-2)
        for name, x in one["model"].items():
            torch.testing.assert_close(of["model"][name], x, rtol=1e-2, atol=1e-3, msg=lambda m: f"{n} processes, {name}: {m}")


@pytest.mark.parametrize("task", ["classify", "few-shot"])
def test_every_process_ends_with_equal_weights_buffers_and_figures(several, task):
    for other in several[2][1:]:
        for a, b in zip(several[2][0][task], other[task], strict=True):
            assert a["model"].keys() == b["model"].keys() and all(v.equal(b["model"][k]) for k, v in a["model"].items())
            assert a["epochs"] == b["epochs"] and all(x.equal(y) for x, y in zip(a["optimiser"], b["optimiser"], strict=True))


def test_a_batch_norm_over_all_processes_is_one_over_the_whole_batch(several):
    n, _, ranks = several
    g = torch.Generator().manual_seed(0)
    x, up = torch.randn(12, 3, 4, 5, generator=g) * 3 + 100, torch.randn(12, 3, 4, 5, generator=g)
    for k, options in enumerate(({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False})):
        bn, whole = torch.nn.BatchNorm2d(3, **options), x.clone().requires_grad_()
        for _ in range(2):
            out = bn(whole)
        (out * up).sum().backward()
        tests = bn.eval()(whole).detach()
        for rank, found in enumerate(r["norms"][k] for r in ranks):
            parts = [out.detach()[rank::n], whole.grad[rank::n]]
            for got, want in zip(found, parts):
                torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-3)
            for got, want in zip(found[2 + 2 * bn.affine:], bn.buffers()):
                torch.testing.assert_close(got, want)
            if bn.track_running_stats:
                torch.testing.assert_close(found[-1], tests[rank::n], rtol=1e-4, atol=1e-4)
        for p, of_ranks in zip((bn.weight, bn.bias) if bn.affine else (), zip(*(r["norms"][k][2:4] for r in ranks))):
            torch.testing.assert_close(sum(of_ranks), p.grad, rtol=1e-3, atol=1e-3)


def test_a_run_of_several_processes_is_one_run(several):
    n, at, ranks = several
    on_disk = load_records(at / "out", "toy")
    assert len(on_disk) == 4 and all(r["processes"] == n for r in on_disk)
    for r in ranks:
        assert (sorted(({k: v for k, v in x.items() if k not in ("seconds", "images_per_second")} for x in r["records"]),
                       key=lambda x: x["row"])
                == sorted(({k: v for k, v in x.items() if k not in ("seconds", "images_per_second")} for x in on_disk),
                          key=lambda x: x["row"]))
    assert not list(at.rglob("group-*"))


def test_stopped_and_continued_is_not_stopped(several):
    """The fault: each process had batch-norm statistics of its own, and a checkpoint held those of one."""
    for r in several[2]:
        assert figures(r["resumed"]) == figures(r["records"]) == figures(several[2][0]["records"])


def test_a_batch_norm_that_cannot_be_synchronised_is_said(several):
    n, _, ranks = several
    assert (ranks[0]["refused"] == f"layer '0' is a BatchNorm1d: on a CPU in {n} processes only BatchNorm2d is "
                                   "synchronised; use one process, or a GPU")


class Few:
    """A Fabric of so many processes, as far as it is asked before training."""
    def __init__(self, n, device="cpu"):
        self.world_size, self.global_rank, self.device = n, 0, torch.device(device)


def test_a_batch_that_cannot_be_shared_is_said():
    session = Session(device="cpu")
    session.fabric()
    session._fabric = Few(3)
    l = Learner(Tiny(10), PAPER_ROWS[0], Schedule(1, 25))
    with pytest.raises(ValueError, match="^3 processes cannot share a batch of 25 evenly: choose a multiple$"):
        fit([l], Batches(few_digits(), 25, 0), 1, session=session)


@pytest.mark.parametrize("of", [toy, few_shot_toy])
def test_every_recipe_trains_with_batch_norms_over_all_processes(of, tmp_path):
    """The fault: those of classification did, those of few-shot learning did not."""
    e = Experiment(of(), Session(tmp_path, "cpu"))
    for n, kind in ((1, torch.nn.BatchNorm2d), (2, WholeBatchNorm2d)):
        e.fabric = Few(n)
        nets = [e.network(network, e.recipe.task, 0) for network in (e.recipe.teacher, e.recipe.student)]
        assert {type(m) for net in nets for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {kind}
    gpus = Few(2, "cuda")
    norms = [type(m) for m in synchronised(Tiny(None), gpus).modules() if "Norm" in type(m).__name__]
    assert norms and set(norms) == {torch.nn.SyncBatchNorm}


def test_one_process_changes_nothing():
    net = Tiny(10)
    x, fabric = torch.randn(6, 1, 8, 8), Session(device="cpu").fabric()
    assert synchronised(net, fabric) is net and type(net.bn) is torch.nn.BatchNorm2d and share(fabric, x).equal(x)
    features = {"a": x}
    assert (gathered(fabric, features) is features and asked_by_any(fabric, True, False) == (True, False)
            and average_gradients(fabric, None) is None)
    whole = Tiny(10)
    whole.load_state_dict(net.state_dict())
    whole.bn.__class__ = WholeBatchNorm2d
    assert whole(x).equal(net(x)) and same(whole.bn, net.bn)


FROZEN = """
import datetime, os, signal, sys
sys.path.insert(0, sys.argv[2])
import relkd.train.session as session
from helpers import toy
from relkd.tables.run import run
from relkd.train import Learner, Schedule, Session
session.PATIENCE = datetime.timedelta(seconds=4)
steps, real = [], Learner.step

def step(self, *a):
    steps.append(1)
    if os.environ["RANK"] == "1" and len(steps) == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    return real(self, *a)

Learner.step = step
run(toy(schedule=Schedule(9, 24, .05), teacher_schedule=Schedule(1, 48, .05)), Session(sys.argv[1], "cpu"))
"""


def test_a_frozen_process_is_waited_for_so_long_and_no_longer(tmp_path, relkd_env, request):
    """The fault: the others waited for half an hour, gloo's own patience."""
    if "slow" not in request.config.getoption("--flags"):
        pytest.skip("two processes that import everything: --flags slow")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    told = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [subprocess.Popen([sys.executable, "-c", FROZEN, tmp_path, HERE], stderr=subprocess.PIPE, text=True,
                              env=relkd_env | told | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    try:
        error = ranks[0].communicate(timeout=200)[1]
    finally:
        for p in ranks:
            p.kill()
            p.wait()
    assert ranks[0].returncode == 1 and "imed out" in error
