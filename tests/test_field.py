"""What people's loops, wrappers and devices do to a loss:
the rules of relkd.losses.rules asked of every loss with every option, and those of the networks' side."""
import copy

import pytest
import torch
from torch import nn
import torch.nn.functional as F

from relkd import losses
from relkd.data import Batches, load
from relkd.distill import PAPER_ROWS, Look, Term, starting_weights
from relkd.features import Features
from relkd.heads import CosineLinear
from relkd.losses.contract import DistillationLoss, as_loss, as_map_pairs, pooled
from relkd.losses.rules import RULES, Asked, check, refuse_float64, same, step, Watched
from relkd.losses.state import BatchNorm2d, looking
from relkd.modes import evaluating, learning
from relkd.tasks.classify import accuracy, evaluate
from relkd.tasks.fewshot import embed, prototypical_loss
from relkd.train import Learner, Schedule, chosen_device, fit
from forked import start
from helpers import CASES, DEFAULTS, After, Sized, Tiny, assert_says, case, few_digits, make, randn


# ---- every loss, every rule

def asked(name):
    loss, s, t, more = case(name)
    return Asked(lambda: copy.deepcopy(loss), s, t, more)


@pytest.mark.parametrize("name", CASES)
def test_the_rules(name):
    assert not {rule: said for rule, said in check(asked(name)).items() if said}


class Broken(DistillationLoss):
    """Breaks what can be broken: the value on request, what it remembers, what it makes lazily, its modes."""
    kept = None

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.idle = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Parameter(torch.zeros(1))

    def forward(self, student, teacher, index=None):
        Broken.kept = torch.zeros(5) if Broken.kept is None else Broken.kept
        Broken.kept.mul_(.5).add_(teacher.detach()[0, :5].float())
        self.linear.eval()
        return (self.norm(self.linear(student.float())) - teacher.float()).double().square().mean() + Broken.kept.sum()

    @classmethod
    def from_features(cls, student, teacher, labels=None):
        return cls()


def test_a_loss_that_breaks_the_rules_is_told_which():
    said = check(Asked(Broken, [randn(8, 6)], [randn(8, 5)]))
    assert {"after inference_mode", "made in inference_mode", "overflow", "looked at", "checkpoint", "no float64",
            "on its device", "at rest", "modes"} <= {rule for rule, what in said.items() if what}
    assert set(said) == set(RULES)


# ---- what a loss remembers

def test_what_two_processes_remember_is_that_of_one(tmp_path):
    """Uneven shares; DDP copies the first process's buffers to the others before each pass."""
    from field_worker import Criterion, state, work

    both = [start(work, r, tmp_path / "meeting", tmp_path, said=tmp_path / f"{r}.txt", GLOO_SOCKET_IFNAME="lo") for r in range(2)]
    for p in both:
        p.join(240)
    assert [p.exitcode for p in both] == [0, 0], [(tmp_path / f"{r}.txt").read_text() for r in range(2)]
    of = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    whole = Criterion()
    before = whole.crd.memory_s.clone()
    want = state(whole)
    assert same(*of)
    for (name, _), a, b in zip(whole.named_buffers(), of[0], want, strict=True):
        if ".4.running" not in name and ".7.running" not in name:       # behind a norm that normalised a share by itself, as PyTorch's does
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
    assert (whole.crd.memory_s != before).any(1).sum() == 16


def test_finite_rows_of_an_overflowed_batch_are_taken():
    crd = losses.CRD(5, 7, samples=20, feat_dim=4, negatives=9)
    index = torch.arange(5)
    before = crd.memory_s.clone(), crd.memory_t.clone()
    crd(randn(5, 5).index_fill(0, torch.tensor([2]), torch.inf).requires_grad_(), randn(5, 7), index=index)
    moved = [(a != b).any(1).nonzero().flatten().tolist() for a, b in zip(before, (crd.memory_s, crd.memory_t))]
    assert moved == [[0, 1, 3, 4], [0, 1, 2, 3, 4]]
    assert not crd.log_Z[0].isnan() and crd.memory_s.isfinite().all()


def test_a_wide_input_moves_statistics_of_narrow_parameters():
    ft, norm = losses.FT(4, 6, batchnorm=True), BatchNorm2d(2)
    ft(randn(8, 4, 4, 4, dtype=torch.float64), randn(8, 6, 4, 4, dtype=torch.float64))
    assert all(m.running_mean.any() for m in ft.translators.modules() if isinstance(m, nn.BatchNorm2d))
    x, plain = randn(8, 2, 3, 3), nn.BatchNorm2d(2)
    assert norm(x).equal(plain(x)) and same(list(norm.buffers()), list(plain.buffers()))
    assert norm.eval()(x).equal(plain.eval()(x))


def test_looking_is_over_when_it_is_over():
    ab = losses.AB(4, 6)
    with pytest.raises(ValueError), looking(ab):
        ab(randn(8, 5, 4, 4), randn(8, 6, 4, 4))
    ab(randn(8, 4, 4, 4), randn(8, 6, 4, 4))
    assert ab.connectors[0].norm.num_batches_tracked == 1


def test_a_memory_in_a_replica_is_refused():
    crd = losses.CRD(6, 5, samples=20, feat_dim=4, negatives=9)
    replica = crd._replicate_for_data_parallel()
    assert_says(lambda: replica(randn(4, 6), randn(4, 5), index=torch.arange(4)),
                "a replica of DataParallel would forget what CRD remembers in it: call CRD outside")


# ---- stages: one optimiser for both, both at once

def test_both_stages_at_once_and_accumulated():
    _, (s,), (t,), _ = case("FT")
    alone, joint = make("FT"), make("FT")
    alone.prepare(s, t).backward()
    (joint.prepare(s, t) + joint(s, t)).backward()
    assert same(*([p.grad for p in ft.paraphrasers.parameters()] for ft in (alone, joint)))
    once = [p.grad.clone() for p in joint.paraphrasers.parameters()]
    (joint.prepare(s, t) + joint(s, t)).backward()
    assert all(p.grad.equal(2 * g) for p, g in zip(joint.paraphrasers.parameters(), once))
    joint(s, t)
    assert all(p.grad is None and not p.requires_grad for p in joint.paraphrasers.parameters())


# ---- networks: modes

def flags(*nets):
    return [m.training for n in nets for m in n.modules()], [p.requires_grad for n in nets for p in n.parameters()]


def mixed(seed=0):
    """A network somebody has partly frozen, by mode and by gradient."""
    torch.manual_seed(seed)
    net = Tiny(10, .5)
    net.bn.eval()
    net.conv.weight.requires_grad_(False)
    return net


class Refuses(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        raise RuntimeError("out of memory")


LOOKS = {
    "evaluate": lambda net, data: evaluate(net, data),
    "embed": lambda net, data: embed(net, data, data.test_images),
    "starting_weights": lambda net, data: starting_weights([Term("RKDDistance")], net, net, batches(data)),
    "a learner is built": lambda net, data: Learner(net, PAPER_ROWS[1], Schedule(1)).build(
        randn(2, 1, 8, 8), Look({"fc:input": randn(2, 36)})),
}


def batches(data):
    return [(torch.arange(16), data.normalise(data.train_images[:16]), data.train_labels[:16])]


@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_leaves_a_network_as_it_was(look):
    data, net = few_digits(), mixed()
    before, state = flags(net), copy.deepcopy(net.state_dict())
    LOOKS[look](net, data)
    assert flags(net) == before and all(v.equal(state[k]) for k, v in net.state_dict().items())
    worse = mixed()
    worse.fc = Refuses(worse.fc)
    with pytest.raises(RuntimeError):
        LOOKS[look](worse, data)
    assert flags(worse)[0][:4] == before[0][:4] and flags(worse)[1] == before[1]


def trained(student, teacher, stop=None):
    from relkd.train import Session

    plan = Schedule(1, 25, .05, milestones=())
    fit([Learner(student, PAPER_ROWS[2], plan)], Batches(few_digits(), 25, 0), 1, teacher, Session(device="cpu", precision="32", stop=stop))


@pytest.mark.parametrize("whole", [True, False])
def test_training_leaves_a_frozen_body_frozen(whole):
    """Frozen by its gradients alone; in a network in training, and in one in evaluation as it comes from a file."""
    torch.manual_seed(0)
    student, teacher = Tiny(10).train(whole), Tiny(10).train()
    teacher.bn.eval()
    for part in (student.conv, student.bn):
        part.requires_grad_(False)
    before, (s, t) = flags(student, teacher), (copy.deepcopy(n.state_dict()) for n in (student, teacher))
    trained(student, teacher)
    assert flags(student, teacher) == before
    moved = {k.split(".")[0] for k, v in student.state_dict().items() if not v.equal(s[k])}
    assert moved == {"fc"} and all(v.equal(t[k]) for k, v in teacher.state_dict().items())


def test_what_is_not_frozen_learns_also_from_a_network_in_evaluation():
    torch.manual_seed(0)
    student = Tiny(10).eval()
    s = copy.deepcopy(student.state_dict())
    trained(student, Tiny(10))
    assert {k.split(".")[0] for k, v in student.state_dict().items() if not v.equal(s[k])} == {"conv", "bn", "fc"} and not student.training


def test_an_interrupted_training_leaves_the_modes_too():
    from relkd.train import Stopped

    student, teacher = mixed(), Tiny(10).train()
    before = flags(student, teacher)
    with pytest.raises(Stopped):
        trained(student, teacher, After(2))
    assert flags(student, teacher) == before
    teacher.fc = Refuses(teacher.fc)
    with pytest.raises(RuntimeError):
        trained(student, teacher)
    assert flags(student)[0] == before[0][:5] and teacher.training


def test_a_student_that_is_frozen_whole_is_refused():
    student = Tiny(10).requires_grad_(False)
    assert_says(lambda: trained(student, Tiny(10)), "row 'RKD-DA' has nothing to train: every parameter of its student is frozen")
    assert_says(lambda: starting_weights([Term("KD")], student, Tiny(10), batches(few_digits())), "every parameter is frozen")


def test_learning_keeps_what_its_owner_set():
    net = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.Dropout()), "head": nn.Linear(2, 2), "norm": nn.BatchNorm1d(2)})
    net["body"].requires_grad_(False)
    net["norm"].eval()
    with learning(net):
        assert [m.training for m in net.modules()] == [True, False, False, False, True, False]
    with evaluating(net):
        assert not any(m.training for m in net.modules())
    assert [m.training for m in net.modules()] == [True, True, True, True, True, False]


# ---- networks: a teacher that stays one

@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_frozen_teacher_inside_a_parent(mode):
    net, x = Tiny(10).train(), randn(8, 1, 8, 8)
    both = nn.ModuleDict({"teacher": Features(net, ["fc:input", "logits"], frozen=True), "student": Tiny(10)})
    first = both["teacher"](x)
    state = copy.deepcopy(net.state_dict())
    with mode():
        during = both.train()["teacher"](x)
    assert both["student"].training and both["teacher"].training and not any(m.training for m in net.modules())
    assert all(first[k].equal(v) and not v.requires_grad and not v.is_inference() for k, v in during.items())
    assert all(v.equal(state[k]) for k, v in net.state_dict().items()) and not any(p.requires_grad for p in net.parameters())
    assert "frozen=True" in repr(both["teacher"]) and not Features(Tiny(10), ["fc"]).frozen


def test_heads_of_an_inference_teacher():
    """CosineLinear and the prototypes, whose input was made under inference_mode; and looked at there before."""
    def gradients(context):
        torch.manual_seed(0)
        head = CosineLinear(6, 3, nb_proxy=2, to_reduce=True)
        with context():
            e = randn(8, 6) * 1
            head(e)
        student = randn(8, 6, seed=1).requires_grad_()
        value = F.mse_loss(head(student), head(e).detach()) + prototypical_loss(student.view(2, 4, 6), 1) + F.mse_loss(
            head(e), head(student).detach())
        value.backward()
        return [value.detach(), student.grad, *(p.grad for p in head.parameters())]

    assert same(gradients(torch.no_grad), gradients(torch.inference_mode))


# ---- devices

def test_the_lab_on_a_device_without_float64():
    data, y = few_digits(), torch.arange(12) % 3
    wide = accuracy(randn(12, 3), y, (1, 2)), starting_weights([Term("RKD"), Term("KD", 1., "logits", "logits")],
                                                               Tiny(10), Tiny(10), batches(data))
    with Watched(refuse_float64):
        narrow = accuracy(randn(12, 3), y, (1, 2)), starting_weights([Term("RKD")], Tiny(10), Tiny(10), batches(data))
        evaluate(Tiny(10), data)
        of = losses.rkd.sides(randn(12, 5))
        losses.RKD()(randn(12, 4).requires_grad_(), of).backward()
    assert narrow[0] == wide[0] and 0 < narrow[1][0].weight < float("inf") and of.q.dtype == torch.float32


def test_rkd_without_float64_on_near_duplicates():
    """Where float64 is what keeps RKD-A's digits: the error of its gradient there, and how much it is elsewhere."""
    g = torch.Generator().manual_seed(0)
    far, near = torch.randn(32, 16, generator=g), torch.randn(8, 16, generator=g).repeat(4, 1) + 1e-2 * torch.randn(32, 16, generator=g)
    t, loss, errors = torch.randn(32, 24, generator=g), losses.RKDAngle(), []
    for s in (far, near):
        exact = step(Asked(losses.RKDAngle, [s.double()], [t.double()]))[1]
        with Watched(refuse_float64):
            short = step(Asked(losses.RKDAngle, [s], [t]))[1]
        errors.append(((short - exact).norm() / exact.norm()).item())
    assert errors[0] < 1e-5 and errors[1] < 1e-3, errors


def test_auto_is_cuda_or_the_cpu_and_apples_gpu_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device("auto") == "cpu"
    assert_says(lambda: chosen_device("mps"), "device is 'auto', 'cpu' or 'cuda'; got 'mps', whose random numbers a "
                                              "step cannot set here; the losses run there in a loop of your own")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_device("auto") == "cuda"


@pytest.mark.parametrize("largest", [False, True])
def test_pooling_by_windows_is_the_adaptive_one(largest):
    x = randn(2, 3, 12, 8, dtype=torch.float64)
    whole = F.adaptive_max_pool2d if largest else F.adaptive_avg_pool2d
    for size in ([12, 8], [4, 8], [3, 2], [1, 1], [5, 3]):
        torch.testing.assert_close(pooled(x, size, largest), whole(x, size))
    assert pooled(x, [12, 8]) is x and all(a is b for a, b in zip(as_map_pairs(x, x[:, :1], "x")[0][:1], [x]))


# ---- input that can teach nothing, or is masked

OPTIONS = [(losses.KD, "T"), (losses.DKD, "T"), (losses.DKD, "alpha"), (losses.DKD, "beta"), (losses.DIST, "beta"), (losses.DIST, "gamma"),
           (losses.DIST, "tau"), (losses.AT, "p"), (losses.FTShortcut, "p"), (losses.CC, "gamma"), (losses.PKT, "eps"),
           (losses.NST, "c"), (losses.NST, "sigma2"), (losses.RKD, "w_distance"), (losses.RKD, "w_angle"),
           *((lambda cls=cls, **o: cls(4, 6, **o), option)
             for cls, options in ((losses.VID, "init_variance eps"), (losses.AB, "margin scale"), (losses.OFD, "scale"),
                                  (losses.FT, "rate p")) for option in options.split()),
           *((lambda **o: losses.CRD(4, 6, samples=20, **o), option) for option in ("T", "momentum", "eps"))]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "x"])
@pytest.mark.parametrize("make, option", OPTIONS)
def test_an_option_that_is_no_finite_number_is_refused(make, option, value):
    assert_says(lambda: make(**{option: value}), f"got|{option}")


@pytest.mark.parametrize("name", ["AT", "NST", "FTShortcut", "FT attention"])
def test_maps_of_one_position_are_refused_where_positions_are_compared(name):
    loss, s, t, _ = case(name)
    for small in ([x[..., :1, :1] for x in s], s):
        assert_says(lambda: loss(small[0], t[0][..., :1, :1]),
                    "compares positions and needs maps with at least 2 of them; got 1 x 1, which teaches nothing: "
                    "take a layer before the pooling")


@pytest.mark.parametrize("call, message", [
    (lambda: losses.KD()(randn(4, 1), randn(4, 1)), r"KD of one logit a sample is 0 whatever it says; got \(4, 1\): "
                                                    r"for a binary network put a 0 beside it"),
    (lambda: losses.RKDDistance()(randn(2, 4), randn(2, 4)), "RKDDistance needs at least 3 samples in a batch; got N = 2"),
    (lambda: losses.RKDAngle()(randn(4, 1), randn(4, 4)),
     "RKDAngle compares directions and needs student embeddings of at least 2 numbers; got D = 1"),
    (lambda: losses.RKD(0, 0), "RKD needs two finite weights, not both 0"),
    (lambda: losses.CRD(4, 4, samples=9, feat_dim=1), "feat_dim and samples of at least 2"),
    (lambda: losses.FT(4, 2)(randn(4, 4, 1, 1), randn(4, 2, 1, 1)), "a factor of one number has none"),
])
def test_what_can_teach_nothing_is_refused(call, message):
    assert_says(call, message)


def kd_by_hand(s, t, T=4.):
    p, log = (t / T).softmax(1), (s / T).log_softmax(1)
    terms = torch.where(p > 0, p * (p.log() - log), 0.)
    return T**2 * terms.sum(1).mean()


@pytest.mark.parametrize("of_student, of_teacher", [([0, 2], [0, 2]), ([], [0]), ([0], []), ([], [])])
def test_kd_of_masked_classes(of_student, of_teacher):
    s, t = (randn(4, 6, seed=k, dtype=torch.float64).index_fill(1, torch.tensor(c, dtype=torch.long), -torch.inf)
            for k, c in ((0, of_student), (1, of_teacher)))
    e = s.clone().requires_grad_()
    value = losses.KD()(e, t)
    torch.testing.assert_close(value, kd_by_hand(s, t))
    if value.isfinite():
        value.backward()
        torch.testing.assert_close(e.grad, 4. * ((s / 4).softmax(1) - (t / 4).softmax(1)) / 4)
    assert losses.KD()(s.float(), t.float()).dtype == torch.float32


# ---- made inside somebody's block

def test_a_loss_of_ones_own_made_under_inference_mode_trains():
    with torch.inference_mode():
        s, t = randn(8, 4) * 1, randn(8, 3) * 1
        loss = as_loss(Sized, None, s, t)
    loss(randn(8, 4).requires_grad_(), t).backward()
    assert all(p.grad is not None for p in loss.parameters())
    assert all(p.is_meta for p in as_loss(Sized, None, s.to("meta"), t.to("meta")).parameters())
    assert all(p.is_meta for name in DEFAULTS
               for p in as_loss(name, {}, *([x.to("meta") for x in layers] if len(layers) > 1 else layers[0].to("meta")
                                            for layers in case(name)[1:3]), labels=torch.arange(50)).parameters())
