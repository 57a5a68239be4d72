"""The lab: data, layers by name, students side by side, records, and runs that are interrupted."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from relkd.data import Batches, few_per_class, flip, load, pad_crop
from relkd.distill import PAPER_ROWS, RKD_A, RKD_D, Objective, Row, Term, starting_weights
from relkd.features import Features
from relkd.models import create
from relkd.recipes import draw, recipe, run, summary
from relkd.records import as_text, load_records, make_record, table, write_atomically, write_record
from relkd.train import Learner, Schedule, accuracy, evaluate, fit, make_fabric

tiny = recipe("digits").reduced(rows=["RKD-DA", "HKD"], seeds=[0], epochs=2)


# --- data

def test_digits_are_split_once_and_without_overlap():
    a, b = load("digits"), load("digits")
    assert a.fingerprint == b.fingerprint and (len(a.train_labels), len(a.test_labels)) == (1000, 797)
    assert a.train_images.dtype == torch.uint8 and a.train_images.shape[1:] == (1, 8, 8)
    both = torch.cat([a.train_images, a.test_images]).flatten(1)
    assert len(both.unique(dim=0)) == len(both), "a test image is also a training image"
    shares = a.test_labels.bincount() / a.train_labels.bincount()
    assert shares.min() > .75 and shares.max() < .85


def test_pad_crop_equals_a_loop_over_images():
    x = torch.arange(5 * 2 * 6 * 4).view(5, 2, 6, 4).float() + 1
    got = pad_crop(x, 2, torch.Generator().manual_seed(3))
    g = torch.Generator().manual_seed(3)
    top, left = (torch.randint(0, 5, (5, 1), generator=g) for _ in range(2))
    padded = torch.nn.functional.pad(x, (2,) * 4)
    want = torch.stack([p[:, t:t + 6, l:l + 4] for p, t, l in zip(padded, top[:, 0], left[:, 0])])
    assert torch.equal(got, want)
    mirrored = flip(x, torch.Generator().manual_seed(0))
    assert all(torch.equal(m, a) or torch.equal(m, a.flip(2)) for m, a in zip(mirrored, x))


def test_batches_depend_on_seed_and_epoch_alone_and_cover_the_set():
    data = load("digits")
    few = few_per_class(data.train_labels, 10, seed=1)
    b = Batches(data, 50, 7, few, ((pad_crop, {"pad": 1}),))
    seen = torch.cat([i for i, _, _ in b.epoch(4)])
    assert torch.equal(seen.sort().values, torch.arange(len(few)))
    assert all(torch.equal(p[1], q[1]) for p, q in zip(b.epoch(4), b.epoch(4)))
    assert len(Batches(data, 5000, 0)) == 1
    with pytest.raises(ValueError, match="500 of each class were asked for"):
        few_per_class(data.train_labels, 500, 0)


# --- features and models

def test_features_of_torchvision_networks_equal_the_layers_themselves():
    import torchvision

    net = torchvision.models.resnet18(num_classes=7).eval()
    x = torch.randn(2, 3, 64, 64)
    f = Features(net, ["layer4", "fc:input", "logits"])(x)
    assert torch.equal(f["logits"], net(x)) and torch.equal(f["fc:input"], f["layer4"].mean((2, 3))) and not net.layer4._forward_hooks


@pytest.mark.parametrize("layer, near", [("layre3", "did you mean 'layer3'"), ("avg_pool", "did you mean 'avgpool'"), ("logit", "did you mean 'logits'"), ("zzz", "known are")])
def test_a_layer_that_does_not_exist(layer, near):
    with pytest.raises(ValueError, match=near):
        Features(create("resnet8", 10), [layer])


def test_a_layer_that_is_overwritten_or_run_twice():
    relu = nn.ReLU(inplace=True)
    net = nn.Sequential(nn.Linear(3, 3), relu, nn.Linear(3, 3), relu)
    with pytest.raises(ValueError, match="layer '1' ran 2 times"):
        Features(net, ["1"])(torch.randn(2, 3))
    with pytest.raises(ValueError, match="layer '0' was overwritten in place"):
        Features(net, ["0"])(torch.randn(2, 3))
    with torch.inference_mode():
        Features(create("resnet8", 10), ["layer1"])(torch.randn(2, 3, 8, 8))


def test_initialisation_is_of_the_seed_alone():
    torch.manual_seed(1)
    a = create("resnet8x0.5", 10, 1, seed=5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    b = create("resnet8x0.5", 10, 1, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.equal(q) for p, q in zip(a.parameters(), b.parameters()))
    assert not a.fc.weight.equal(create("resnet8x0.5", 10, 1, seed=6).fc.weight)


@pytest.mark.parametrize("call, message", [
    (lambda: load("cifar"), "unknown data set 'cifar'"),
    (lambda: create("resnet9", 10), "unknown network 'resnet9': did you mean 'resnet8'"),
    (lambda: Term("RKDistance").build(), "unknown loss 'RKDistance': did you mean 'RKDDistance'"),
    (lambda: recipe("digit"), "unknown recipe 'digit': did you mean 'digits'"),
    (lambda: recipe("digits").reduced(rows=["HDK"]), "unknown row of digits 'HDK': did you mean 'HKD'"),
    (lambda: recipe("digits").reduced(seeds=[-1]), "seeds are whole numbers from 0"),
    (lambda: Schedule().cut_to(0), "at least 1 epoch"),
    (lambda: make_fabric("tpu"), "device is 'auto', 'cpu' or 'cuda'; got 'tpu'"),
    (lambda: accuracy(torch.zeros(3), torch.zeros(3)), r"accuracy needs logits \(N, C\)"),
    (lambda: fit([Learner(create("resnet8", 10, 1), PAPER_ROWS[1], Schedule())], Batches(load("digits"), 64, 0), 1), "row 'RKD-D' compares with a teacher"),
])
def test_names_and_arguments_that_are_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_asked_for_where_there_is_none():
    with pytest.raises(ValueError, match="this PyTorch sees no GPU"):
        make_fabric("cuda")


# --- training

def test_accuracy_topk():
    logits = torch.tensor([[.1, .7, .2], [.5, .3, .2], [.2, .3, .5]])
    assert accuracy(logits, torch.tensor([1, 1, 0]), (1, 2, 3)) == pytest.approx([100 / 3, 200 / 3, 100])


class Noisy(nn.Module):
    """A student that draws random numbers while it trains."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.drop, self.fc = nn.Linear(64, 16), nn.Dropout(.5), nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(self.drop(self.body(x.flatten(1)).relu()))


def test_side_by_side_equals_alone_bit_for_bit_even_with_dropout():
    data = load("digits")
    few = few_per_class(data.train_labels, 5, 0)
    teacher = create("resnet8", 10, 1, seed=9)
    rows = [PAPER_ROWS[2], PAPER_ROWS[0], PAPER_ROWS[4]]

    def learners():
        return [Learner(Noisy(), r, Schedule(3, 25, .05, milestones=(2,)), seed=k) for k, r in enumerate(rows)]

    together, alone = learners(), learners()
    fit(together, Batches(data, 25, 1, few), 3, teacher)
    for l in reversed(alone):
        fit([l], Batches(data, 25, 1, few), 3, teacher)
    for l, m in zip(together, alone):
        assert l.epochs == m.epochs
        assert all(p.equal(q) for p, q in zip(l.model.state_dict().values(), m.model.state_dict().values()))


def test_the_teacher_runs_once_a_batch_and_does_not_change():
    data = load("digits")
    teacher = create("resnet8", 10, 1)
    calls, before = [], {k: v.clone() for k, v in teacher.state_dict().items()}
    teacher.register_forward_hook(lambda *a: calls.append(teacher.training))
    batches = Batches(data, 50, 0, torch.arange(150))
    fit([Learner(create("resnet8x0.5", 10, 1), r, Schedule(2, 50)) for r in PAPER_ROWS], batches, 2, teacher, eval_every=2)
    assert calls == [False] * (2 * len(batches) + 1), "once a batch, and once to see the shapes"
    assert all(v.equal(before[k]) for k, v in teacher.state_dict().items())


def test_a_loss_with_parameters_of_its_own_is_trained_with_its_student(monkeypatch):
    import relkd.losses

    class Projected(relkd.losses.DistillationLoss):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(32, 64)

        def forward(self, student, teacher, index=None):
            assert index.dtype == torch.int64
            return (self.map(student) - teacher).pow(2).mean()

    monkeypatch.setattr(relkd.losses, "Projected", Projected, raising=False)
    monkeypatch.setattr(relkd.losses, "__all__", [*relkd.losses.__all__, "Projected"])
    learner = Learner(create("resnet8x0.5", 10, 1), Row("Projected", (Term("Projected"),)), Schedule(1, 50))
    learner.build(torch.randn(2, 1, 8, 8), {"fc:input": torch.randn(2, 64)})
    before = learner.objective.losses["0-Projected"].map.weight.clone()
    fit([learner], Batches(load("digits"), 50, 0, torch.arange(100)), 1, create("resnet8", 10, 1))
    assert not learner.objective.losses["0-Projected"].map.weight.equal(before)


def test_a_term_of_both_stages_is_one_loss_whatever_its_weights():
    term = Term("FitNet", 100., "layer2", "layer2")
    o = Objective(Row("hints", (term, RKD_D), first=(Term("FitNet", 1., "layer2", "layer2"),), first_epochs=1))
    net = Features(create("resnet8", 10, 1), o.student_layers)
    f = net(torch.randn(4, 1, 8, 8))
    o.build(f, f)
    assert len(o.losses) == 2
    y = torch.zeros(4, dtype=torch.long)
    torch.testing.assert_close(100 * o(f, f, y, first=True) + torch.nn.functional.cross_entropy(f["logits"], y) + 25 * o.losses["1-RKDDistance"](f["fc:input"], f["fc:input"]), o(f, f, y))


def test_crd_remembers_the_samples_that_are_used_by_their_place():
    """100 of the 1,000 images: memories of 100 rows, and negatives of other classes only."""
    data = load("digits")
    few = few_per_class(data.train_labels, 10, seed=0)
    row = Row("CRD", (Term("CRD", .8, options={"negatives": 16, "classes": True}),))
    learner = Learner(create("resnet8x0.5", 10, 1), row, Schedule(1, 50))
    fit([learner], Batches(data, 50, 0, few), 1, create("resnet8", 10, 1))
    crd = learner.objective.losses["0-CRD"]
    assert crd.memory_s.shape == (100, 128)
    drawn = crd.other_classes(torch.arange(100), 16)
    labels = data.train_labels[few]
    assert (labels[drawn] != labels[:, None]).all()
    again = Learner(create("resnet8x0.5", 10, 1), row, Schedule(1, 50))
    again.build(next(Batches(data, 50, 0, few).epoch(0))[1][:2], {"fc:input": torch.randn(2, 64)}, labels)
    again.load(learner.state())
    assert all(torch.equal(a, b) for a, b in zip(again.objective.buffers(), learner.objective.buffers()))


def test_starting_weights_make_every_term_pull_alike():
    data, student, teacher = load("digits"), create("resnet8x0.5", 10, 1), create("resnet8", 10, 1, seed=1)
    batches = [b for _, b in zip(range(2), Batches(data, 32, 0).epoch(0))]
    terms = [RKD_D, RKD_A, Term("AT", 1., "layer1", "layer1"), Term("FitNet", 1., "layer2", "layer2"), Term("AT", 1., ("avgpool",), ("avgpool",))]
    before = {k: v.clone() for k, v in student.state_dict().items()}
    found = starting_weights(terms, student, teacher, batches)
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in before.items()) and teacher.training
    assert found[-1].weight == float("inf"), "a loss without a gradient has no weight"
    half = starting_weights(terms, student, teacher, batches, share=.5)
    assert all(.5 * a.weight == pytest.approx(b.weight) for a, b in zip(found[:-1], half))
    again = starting_weights(found[:-1], student, teacher, batches)
    assert [t.weight for t in again] == pytest.approx([t.weight for t in found[:-1]]) and [t.loss for t in again] == [t.loss for t in terms[:-1]]


def test_every_row_of_every_table_can_be_built():
    """One step of each row on small images, first stages included; the layers of the real networks are asked by name."""
    for name in ("cifar100/paper", "cifar100/crd", "cifar100/crd-vgg", "digits/losses", "digits/balanced"):
        r = recipe(name)
        for row in r.rows:
            o = Objective(row)
            Features(create(r.student, 10, 3), o.student_layers)
            Features(create(r.teacher, 10, 3), o.teacher_layers)
    small, large, x, y = create("resnet8", 10, 1), create("resnet14", 10, 1, seed=1).eval(), torch.randn(10, 1, 8, 8), torch.arange(10)
    for row in recipe("digits/losses").rows:
        o = Objective(row)
        s = Features(small, o.student_layers)(x)
        with torch.no_grad():
            t = Features(large, o.teacher_layers)(x) if o.teacher_layers else {}
        o.build(s, t, y.repeat(3))
        total = o(s, t, y, y)
        if row.first:
            total = total + o(s, t, y, y, first=True)
        total.backward()
        assert total.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in small.parameters())
        small.zero_grad()


def test_evaluation_does_not_depend_on_the_batch_size():
    data, net = load("digits"), create("resnet8", 10, 1)
    assert evaluate(net, data, 100) == evaluate(net, data, 797) and net.training


# --- records and tables

def records_of(values):
    return [make_record("t", row, s, "x", {}, [{"epoch": 1, "accuracy": a + 1}, {"epoch": 2, "accuracy": a}], 1., 1, 100, torch.device("cpu")) for row, v in values.items() for s, a in enumerate(v)]


def test_table_against_scipy():
    from scipy.stats import ttest_rel

    a, b = [90., 92, 91, 94, 89], [92., 93, 93, 95, 92]
    frame = table(records_of({"A": a, "B": b}), ["A", "B"], "A", {"B": 93.})
    interval = ttest_rel(b, a).confidence_interval(.95)
    assert frame.loc["B", ["low", "high"]].tolist() == pytest.approx([interval.low, interval.high])
    assert frame.loc["B", "last"] == pytest.approx(93) and frame.loc["B", "best"] == pytest.approx(94) and frame.loc["B", "paper"] == 93
    assert "+1.80  [+0.76, +2.84]" in as_text(frame)
    one = table(records_of({"A": [90.], "B": [91.]}), ["A", "B"], "A")
    assert "+1.00" in as_text(one) and "nan" not in as_text(one)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomically(path, b"old")

    def full(*a):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ValueError, match="cannot write .*x.json: No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_damaged_and_missing_records_are_named(tmp_path):
    with pytest.raises(ValueError, match="no records of 't'"):
        load_records(tmp_path, "t")
    path = write_record(tmp_path, records_of({"A": [1.]})[0])
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match="a-seed0.json is damaged"):
        load_records(tmp_path, "t")


# --- recipes

def test_a_second_run_finds_everything_finished_and_goes_on_after_a_loss(tmp_path):
    first = run(tiny, tmp_path, "cpu")
    files = {p: p.stat().st_mtime_ns for p in tmp_path.glob(".runs/**/*.000")}
    assert len(files) == 4
    assert run(tiny, tmp_path, "cpu") == first and {p: p.stat().st_mtime_ns for p in files} == files
    hkd = next(p for p in files if "hkd" in p.name)
    hkd.write_bytes(hkd.read_bytes()[:100])                                   # damaged: made again, alone, with the same result
    with pytest.warns(UserWarning, match="checkpoint refused: hkd.* is damaged"):
        again = run(tiny, tmp_path, "cpu")
    pick = lambda rs: {r["row"]: (r["last"], r["epochs"]) for r in rs}       # noqa: E731
    assert pick(again) == pick(first)
    frame = draw(tiny, tmp_path)
    assert list(frame.index) == ["Student", "RKD-DA", "HKD", "Teacher"] and (tmp_path / "digits-2epochs.png").stat().st_size > 5000


def test_records_of_different_protocols_do_not_make_one_table(tmp_path):
    a, b = records_of({"Student": [90., 91.]})
    b["protocol"] = {"student": "another"}
    for r in (a, b):
        write_record(tmp_path, {**r, "recipe": "digits"})
    with pytest.raises(ValueError, match="row 'Student' come from different protocols"):
        summary(recipe("digits"), tmp_path)


def test_committed_records_are_of_the_recipe_and_complete():
    root = Path(__file__).resolve().parents[1] / "figures"
    r, records = recipe("digits"), load_records(root, "digits")
    assert {(x["row"], x["seed"]) for x in records} == {(n, s) for n in r.row_names for s in r.seeds}
    assert all(x["protocol"]["data"] == load("digits").fingerprint and not x["protocol"]["cut"] for x in records)
    assert all(x["protocol"]["student"]["epochs"] == r.schedule.epochs for x in records if x["row"] != "Teacher")
    frame, _ = summary(r, root)
    assert frame.round(3).to_csv(lineterminator="\n") == (root / "digits.csv").read_text(), "run `relkd table digits`"


# --- command line

def test_help_and_lists(relkd_cli):
    assert "Teach students" in relkd_cli("--help").stdout
    assert "cifar100/paper" in relkd_cli("recipes").stdout and "25 RKDDistance() on fc:input" in relkd_cli("recipes", "digits").stdout


def test_table_is_drawn_without_training(relkd_cli, tmp_path):
    import shutil

    shutil.copytree(Path(__file__).resolve().parents[1] / "figures" / "records" / "digits", tmp_path / "records" / "digits")
    done = relkd_cli("table", "digits", "--out", tmp_path)
    assert done.returncode == 0 and "HKD + RKD-DA" in done.stdout and (tmp_path / "digits.csv").exists()


@pytest.mark.parametrize("args, message", [
    (["run", "digist"], "unknown recipe 'digist': did you mean 'digits'?"),
    (["run", "digits", "--rows", "RKD-AD"], "unknown row of digits 'RKD-AD': did you mean 'RKD-D'?"),
    (["run", "digits", "--seeds", "two"], "--seeds takes numbers like 0,1,5-7; got 'two'"),
    (["table", "digits", "--out", "nowhere"], "no records of 'digits' in nowhere/records/digits: run the recipe first"),
])
def test_a_mistake_costs_one_line(relkd_cli, args, message):
    done = relkd_cli(*args)
    assert (done.returncode, done.stderr) == (2, f"relkd: {message}\n")


def test_an_unwritable_folder_is_said_before_training(relkd_cli, tmp_path):
    (tmp_path / "file").write_text("")
    start = time.time()
    done = relkd_cli("demo", "--out", tmp_path / "file" / "figures")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot write" in done.stderr and "name a folder that can be written to with --out" in done.stderr
    assert "student" not in done.stdout.split("seeds")[-1] and time.time() - start < 60


def test_an_interrupted_run_goes_on_from_the_finished_ones(relkd_cli, tmp_path):
    command = ["run", "digits", "--seeds", "0-2", "--rows", "RKD-DA", "--epochs", "12", "--device", "cpu", "--out", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-m", "relkd.cli", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=relkd_cli.env)
    records = tmp_path / "records" / "digits-12epochs"
    deadline = time.time() + 120
    while not (records / "rkd-da-seed0.json").exists() and time.time() < deadline and process.poll() is None:
        time.sleep(.02)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "runs are finished and kept in" in error and "Traceback" not in error
    kept = {p.name: p.read_bytes() for p in records.glob("*.json")}
    assert 3 <= len(kept) < 9 and all(json.loads(v) for v in kept.values()) and not list(tmp_path.glob("**/*.tmp"))
    done = relkd_cli(*command)
    assert done.returncode == 0, done.stderr
    assert len(list(records.glob("*.json"))) == 9
    assert all((records / name).read_bytes() == v for name, v in kept.items())


def test_objective_reads_several_layers():
    row = Row("r", (Term("RKD", 2., ("layer1", "layer2"), "layer1"),))
    o = Objective(row)
    assert o.student_layers == ("logits", "layer1", "layer2") and o.teacher_layers == ("layer1",)
