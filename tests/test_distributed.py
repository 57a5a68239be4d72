"""relkd.distributed: two real processes have the gradients of one with the whole batch; whatever is sent arrives, or is refused."""
import distributed_worker as worker
import pytest
import torch
from torch import nn

from forked import start
from relkd.distributed import Gathered, gather
from relkd.features import Features
from relkd.losses import RKD, RKDAngle

pytestmark = pytest.mark.xdist_group("distributed")         # one worker makes what all of them look at


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    at = tmp_path_factory.mktemp("distributed")
    both = [start(worker.work, rank, str(at), said=at / f"{rank}.txt") for rank in range(2)]
    for p in both:
        p.join(120)
        p.kill()
    assert [p.exitcode for p in both] == [0, 0], [(at / f"{rank}.txt").read_text() for rank in range(2)]
    return [torch.load(at / f"{rank}.pt", weights_only=False) for rank in range(2)]


CASES = [(name, share, how) for name in worker.LOSSES for share in worker.SHARES for how in ("gather", "Gathered", "Features")
         if share == "even" or name in ("RKD-DA", "FitNet")]


@pytest.mark.parametrize("name, share, how", CASES)
def test_gradients_of_two_processes_are_those_of_one(ranks, name, share, how):
    one = worker.step(worker.LOSSES[name], worker.ALONE[0], how, False)
    for rank in ranks:
        found = rank["found"][name, share, how]
        torch.testing.assert_close(found["value"], one["value"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found["student"], one["student"], rtol=1e-4, atol=1e-6)
        assert len(found["own"]) == len(one["own"])
        for a, b in zip(found["own"], one["own"]):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_without_it_they_are_not(ranks):
    """The fault: under DDP every relational loss is silently the local one."""
    one = worker.step(worker.LOSSES["RKD-DA"], worker.ALONE[0], "local", False)["student"]
    local = ranks[0]["found"]["local"]["student"]
    assert torch.cosine_similarity(local, one, 0) < .999
    gathered = ranks[0]["found"]["RKD-DA", "even", "gather"]["student"]
    assert torch.cosine_similarity(gathered, one, 0) > 1 - 1e-6


def test_what_a_loss_remembers_is_the_whole_batch(ranks):
    one = worker.step(worker.remembering, worker.ALONE[0], "Gathered", False)["memory"]
    for rank in ranks:
        torch.testing.assert_close(rank["crd"]["memory"], one)
    assert ranks[0]["crd"]["memory"].equal(ranks[1]["crd"]["memory"])


def test_every_kind_of_row_arrives_and_its_gradient_returns(ranks):
    for r, rank in enumerate(ranks):
        for name, (whole, gradient) in rank["kinds"].items():
            if not name.startswith("torch."):
                break
            dtype = getattr(torch, name.removeprefix("torch."))
            assert whole.equal(torch.tensor([0, 1, 2, 3, 4])[:, None].expand(-1, 2).to(dtype)), name
            assert gradient is None or gradient.equal(torch.full((2 + r, 2), 3., dtype=dtype)), name
        kinds = rank["kinds"]
        whole, rows = kinds["structure"]
        a = torch.tensor([0., 0., 1., 1.])[:, None].expand(-1, 3)
        assert whole["a"].equal(a) and whole["b"][0].equal(a) and whole["b"][1][0].equal(a) and whole["b"][1][1] is None
        assert rows.equal(torch.ones(1, 3)) and kinds["inference"].equal(a)


def test_what_cannot_be_gathered_is_refused_by_all(ranks):
    for rank in ranks:
        said = rank["refused"]
        assert said["rows"] == ("gather needs rows of one length in all processes; got [3, 4] numbers a row in tensor 0: "
                                "the processes read different layers, or images of different sizes")
        assert "a sample a row, (n, ...); got a tensor of 0 dimensions" in said["number"] and "got object" in said["object"]
        assert said["apart"].startswith("FitNet's own parameters differ between the processes")


def test_alone_nothing_happens():
    x, loss = torch.randn(5, 3, requires_grad=True), RKD()
    assert gather(x) is x and gather(x, None) == (x, None) and gather({"a": x})["a"] is x
    s, t = torch.randn(5, 3), torch.randn(5, 7)
    assert Gathered(loss)(s, t).equal(loss(s, t)) and loss.angle.anchors == (0, 1)
    read = Features(nn.Sequential(nn.Linear(3, 2)), ["0"], gather=True)
    assert read(s)["0"].equal(read.model(s))


def test_a_loss_that_was_divided_is_whole_again_alone():
    wrapped = Gathered(RKDAngle())
    wrapped._tell(1, 2)
    s, t = torch.randn(5, 3), torch.randn(5, 7)
    assert wrapped(s, t).equal(RKDAngle()(s, t))


def test_features_takes_a_function_and_says_what_it_does_not_take():
    net = nn.Sequential(nn.Linear(3, 2))
    doubled = Features(net, ["0"], gather=lambda read: {k: 2 * v for k, v in read.items()})
    x = torch.randn(4, 3)
    assert doubled(x)["0"].equal(2 * net(x))
    with pytest.raises(ValueError, match="^gather is True, False or a function of {layer: tensor}; got 'all'$"):
        Features(net, ["0"], gather="all")
