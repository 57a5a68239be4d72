"""Runs that survive: checkpoints, signals, kill -9, budgets, and several processes."""
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers import After
from relkd.data import Batches, load
from relkd.distill import PAPER_ROWS, Row, Term
from relkd.models import create
from relkd.records import BadCheckpoint, digest, drop_checkpoint, load_checkpoint, read_checkpoint, save_checkpoint
from relkd.train import Learner, Saver, Schedule, Stop, Stopped, fit

HERE = Path(__file__).resolve().parent


def same(a, b):
    return all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- checkpoints

@pytest.mark.parametrize("part_size", [None, 1000, 10**9])
def test_round_trip_in_parts(tmp_path, part_size):
    state = {"w": torch.randn(1000), "n": [1, {"a": None}], "s": "x"}
    save_checkpoint(tmp_path / "c", state, "d", part_size)
    back = load_checkpoint(tmp_path / "c", "d")
    assert back["w"].equal(state["w"]) and back["n"] == state["n"]
    sizes = [p.stat().st_size for p in tmp_path.glob("c.????????.*")]
    assert max(sizes) <= (part_size or 10**9) and (len(sizes) > 1) == (part_size == 1000)
    for k in range(3):
        save_checkpoint(tmp_path / "c", {"k": k}, "d")
    assert len(list(tmp_path.iterdir())) == 4, "old parts are removed: two manifests with one part each"
    drop_checkpoint(tmp_path / "c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage, reason", [
    (lambda p: p.write_bytes(p.read_bytes()[:-1]), "damaged .part .* has .* bytes and another hash"),
    (lambda p: p.unlink(), "is incomplete .part .* is missing"),
])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(tmp_path, damage, reason):
    save_checkpoint(tmp_path / "c", {"k": 1}, "d", 200)
    save_checkpoint(tmp_path / "c", {"k": 2}, "d", 200)
    part = max((p for p in tmp_path.glob("c.????????.001")), key=lambda p: p.stat().st_mtime_ns)
    damage(part)
    with pytest.raises(BadCheckpoint, match=reason):
        read_checkpoint(tmp_path / "c", "d")
    with pytest.warns(UserWarning, match=reason):
        assert load_checkpoint(tmp_path / "c", "d") == {"k": 1}


def test_foreign_and_unreadable_checkpoints_are_refused(tmp_path):
    save_checkpoint(tmp_path / "c", {"k": 1}, "other")
    with pytest.raises(BadCheckpoint, match="c belongs to another run .other; this one is mine"):
        read_checkpoint(tmp_path / "c", "mine")
    (tmp_path / "c").write_text("{")
    with pytest.raises(BadCheckpoint, match="no manifest"):
        read_checkpoint(tmp_path / "c", "mine")
    with pytest.warns(UserWarning):
        assert load_checkpoint(tmp_path / "c", "mine") is None


def test_a_checkpoint_is_data_and_not_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    save_checkpoint(tmp_path / "c", {"k": Evil()}, "d")
    with pytest.raises(BadCheckpoint, match="c cannot be loaded"):
        read_checkpoint(tmp_path / "c", "d")


def test_a_full_disk_leaves_the_old_checkpoint_good(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "c", {"k": 1}, "d", 100)
    real, calls = os.fsync, []

    def full(fd):
        calls.append(fd)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="cannot write .*: No space left on device"):
        save_checkpoint(tmp_path / "c", {"k": 2}, "d", 100)
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(tmp_path / "c", "d") == {"k": 1}


# --- fit stops and goes on

class Noisy(nn.Module):
    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body, self.bn, self.drop, self.fc = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(.5), nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(self.drop(self.bn(self.body(x.flatten(1))).relu()))


@pytest.fixture
def hint(monkeypatch):
    """A loss with trainable parts that reads its sizes from the features."""
    import relkd.losses

    class Hint(relkd.losses.DistillationLoss):
        prepared = 0

        def __init__(self, s, t):
            super().__init__()
            self.map = nn.Linear(s, t)

        @classmethod
        def from_features(cls, student, teacher, labels=None):
            return cls(student.shape[1], teacher.shape[1])

        def prepare(self, student, teacher, index=None):
            type(self).prepared += 1
            return self(student, teacher)

        def forward(self, student, teacher, index=None):
            return (self.map(student) - teacher).pow(2).mean()

    monkeypatch.setattr(relkd.losses, "Hint", Hint, raising=False)
    monkeypatch.setattr(relkd.losses, "__all__", [*relkd.losses.__all__, "Hint"])
    return Hint


def group():
    term = Term("Hint")
    rows = [PAPER_ROWS[2], Row("two stages", (term,), first=(term,), first_epochs=2), Row("one first", (), first=(Term("Hint", 2.),), first_epochs=1)]
    return [Learner(Noisy(k), r, Schedule(3, 25, .05, warmup=1, cosine=True), seed=k) for k, r in enumerate(rows)]


def stream():
    return Batches(load("digits"), 25, 1, torch.arange(75))


@pytest.mark.parametrize("stop_at", [1, 4, 7, 9, 14])
def test_stopped_and_continued_is_not_stopped_bit_for_bit(tmp_path, hint, stop_at):
    teacher, whole, parts = create("resnet8", 10, 1, seed=9), group(), group()
    fit(whole, stream(), 3, teacher)
    with pytest.raises(Stopped, match="budget"):
        fit(parts, stream(), 3, teacher, saver=Saver(tmp_path / "g", "d"), stop=After(stop_at))
    continued = group()
    fit(continued, stream(), 3, teacher, saver=Saver(tmp_path / "g", "d"))
    for a, b in zip(whole, continued):
        assert same(a.model, b.model) and same(a.objective, b.objective) and a.epochs == b.epochs
    assert len(whole[0].epochs) == 3


def test_first_stages_come_first_and_do_not_touch_the_others(hint):
    teacher, alone = create("resnet8", 10, 1, seed=9), group()
    together = group()
    fit(together, stream(), 3, teacher)
    assert hint.prepared == 2 * 3 + 1 * 3
    for l in alone:
        fit([l], stream(), 3, teacher)
    assert all(same(a.model, b.model) and a.epochs == b.epochs for a, b in zip(together, alone))
    assert not same(together[1].model, fitted_without_first(teacher).model)


def fitted_without_first(teacher):
    l = Learner(Noisy(1), Row("one stage", (Term("Hint"),)), Schedule(3, 25, .05, warmup=1, cosine=True), seed=1)
    fit([l], stream(), 3, teacher)
    return l


def test_stop_by_budget_and_by_signal():
    with Stop(budget=10) as stop:
        assert not stop.due() and stop.due(reserve=11) and stop.why == "budget"
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.due() and stop.why == "SIGTERM"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)        # a job in the background ignores it
    with pytest.raises(KeyboardInterrupt), Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.why == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


# --- whole processes

SCRIPT = """
import sys, torch
from relkd.recipes import recipe, run
torch.set_num_threads(1)
run(recipe('digits').reduced(rows=['RKD-DA'], seeds=[0], epochs=16), sys.argv[1], 'cpu', every=.05)
"""


def final_weights(out):
    return {p.name: torch.load(p, weights_only=True)["model"] for p in Path(out).glob(".runs/*/*-seed0-*.ckpt.*.000")}


def test_kill_minus_nine_at_any_moment_and_go_on_bit_for_bit(tmp_path, relkd_cli):
    def start(out):
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(out)], env=relkd_cli.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole")
    killed, kills = tmp_path / "killed", 0
    for after in (.1, .7):
        p = start(killed)
        deadline = time.time() + 60
        while not list(killed.glob(".runs/*/group-*.ckpt")) and time.time() < deadline and p.poll() is None:
            time.sleep(.01)
        time.sleep(after)
        kills += p.poll() is None
        p.kill()
        p.wait()
    assert kills, "the run was over before it could be killed"
    p = start(killed)
    assert p.wait() == 0, p.stderr.read()
    assert whole.wait() == 0, whole.stderr.read()
    a, b = final_weights(tmp_path / "whole"), final_weights(killed)
    key = lambda n: n.split(".ckpt")[0]                                     # noqa: E731
    a, b = {key(n): w for n, w in a.items()}, {key(n): w for n, w in b.items()}
    assert len(a) == 3 and a.keys() == b.keys()
    assert all(x.equal(y) for k in a for x, y in zip(a[k].values(), b[k].values()))
    assert not list(killed.glob(".runs/*/group-*"))


def test_sigterm_stops_at_a_checkpoint_and_says_how_to_go_on(tmp_path, relkd_cli):
    command = [sys.executable, "-m", "relkd.cli", "run", "digits", "--seeds", "0", "--rows", "HKD", "--device", "cpu", "--out", str(tmp_path)]
    p = subprocess.Popen(command, env=relkd_cli.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 90
    while not list(tmp_path.glob("records/digits/teacher*")) and time.time() < deadline and p.poll() is None:
        time.sleep(.05)
    time.sleep(.5)
    p.terminate()
    error = p.communicate(timeout=60)[1]
    assert p.returncode == 143 and "stopped (SIGTERM); 1 of 3 runs are finished" in error and "the same command goes on from there" in error
    assert list(tmp_path.glob(".runs/digits/group-*.ckpt"))


def test_successive_budgets_finish_a_run_each_within_its_time(tmp_path):
    from relkd.recipes import recipe, run

    small, calls, finished = recipe("digits").reduced(rows=["HKD"], seeds=[0], epochs=12), 0, []
    while calls < 40 and len(finished) < 3:
        calls, finished, start = calls + 1, [], time.perf_counter()
        try:
            with Stop(budget=.6) as stop:
                run(small, tmp_path, "cpu", records=finished, stop=stop, part_size=40_000)
        except Stopped as error:
            assert str(error) == "budget"
        assert time.perf_counter() - start < 5
    assert 2 <= calls < 40 and len(finished) == 3
    assert max(p.stat().st_size for p in tmp_path.glob(".runs/**/*.ckpt.*")) <= 40_000
    whole = run(small, tmp_path / "whole", "cpu")
    assert {r["row"]: r["epochs"] for r in finished} == {r["row"]: r["epochs"] for r in whole}


def test_a_spent_budget_says_how_to_go_on_and_is_no_error(tmp_path, relkd_cli):
    done = relkd_cli("run", "digits", "--seeds", "0", "--budget", "0.1s", "--device", "cpu", "--out", tmp_path)
    assert done.returncode == 0 and "stopped (budget); 0 of 6 runs are finished" in done.stderr and done.stderr.count("\n") == 2
    assert list(tmp_path.glob(".runs/digits/group-*.ckpt"))


def test_two_processes_train_like_one_with_the_whole_batch(tmp_path, relkd_cli):
    sys.path.insert(0, str(HERE))
    from ddp_worker import kept, train, train_episodes

    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(HERE / "ddp_worker.py"), str(tmp_path / "two.pt")],
                          env=relkd_cli.env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for one, two, tolerance in zip((kept(train()[1]), kept(train_episodes())), torch.load(tmp_path / "two.pt", weights_only=True), (.3, 2.), strict=True):
        for a, b in zip(one, two, strict=True):
            assert [e["loss"] for e in a["epochs"]] == pytest.approx([e["loss"] for e in b["epochs"]], rel=1e-4)
            assert [e["accuracy"] for e in a["epochs"]] == pytest.approx([e["accuracy"] for e in b["epochs"]], abs=tolerance)
            for x, y in zip(a["model"].values(), b["model"].values(), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)
            for x, y in zip(a["optimiser"], b["optimiser"], strict=True):
                torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_digest_sees_every_difference():
    assert digest({"a": 1, "b": (1, 2)}) == digest({"b": [1, 2], "a": 1}) != digest({"a": 2, "b": [1, 2]})


def test_event_files_for_tensorboard(tmp_path, relkd_cli):
    done = relkd_cli("tensorboard", "digits", "--to", tmp_path)
    assert done.returncode == 0 and "48 event files" in done.stdout
    assert len(list(tmp_path.glob("digits/*/events.out.*"))) == 48


def test_data_command_lists_and_says_what_is_missing(tmp_path, relkd_cli):
    assert "digits         1,000 train, 797 test images of 1 x 8 x 8, 10 classes, 6b8e28bb3067" in relkd_cli("data", "--data", tmp_path).stdout
    done = relkd_cli("run", "cifar100/cpu", "--data", tmp_path, "--out", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "relkd data get cifar100" in done.stderr


def test_recipes_build_and_every_layer_that_they_name_exists():
    from relkd.features import Features
    from relkd.recipes import RECIPES

    for r in RECIPES.values():
        for row in r.rows:
            l = Learner(create(r.student, 10, 3 if r.data != "digits" else 1), row, r.schedule)
            Features(create(r.teacher, 10, 3), l.objective.teacher_layers)


@pytest.mark.parametrize("side, near", [("student", "layer of ResNetCifar 'layer5'"), ("teacher", "layer of ResNetCifar 'layer5'")])
def test_a_recipe_with_a_layer_that_does_not_exist_is_refused_before_any_training(tmp_path, side, near):
    from dataclasses import replace

    from relkd.recipes import recipe, run

    r = recipe("digits")
    wrong = replace(r, rows=(*r.rows, Row("wrong", (Term("RKD", 1., **{side: "layer5"}),))))
    with pytest.raises(ValueError, match=near):
        run(wrong, tmp_path, "cpu")
    assert not list(tmp_path.glob("records/**/*.json"))


def test_a_batch_too_small_for_a_relation_is_one_clear_line():
    l = Learner(create("resnet8", 10, 1), PAPER_ROWS[2], Schedule(1, 2))
    with pytest.raises(ValueError, match="RKDAngle needs at least 3 samples in a batch; got N = 2"):
        fit([l], Batches(load("digits"), 2, 0, torch.arange(4)), 1, create("resnet8", 10, 1))


@pytest.mark.parametrize("name", ["cifar100/paper", "cifar100/crd-vgg"])
def test_every_row_of_a_cifar_recipe_takes_a_step(name):
    from relkd.data import joined
    from relkd.recipes import recipe

    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(256, (24, 3, 32, 32), generator=g, dtype=torch.uint8), torch.arange(24) % 10
    r = recipe(name)
    student, teacher = ("vgg11", "resnet20") if name == "cifar100/paper" else (r.student, r.teacher)
    swap = (lambda l: {"layer4": "layer3", "layer3": "layer2", "layer2": "layer1"}.get(l, l)) if teacher == "resnet20" else (lambda l: l)
    from dataclasses import replace

    rows = [replace(row, first_epochs=min(1, row.first_epochs), terms=tuple(replace(t, teacher=swap(t.teacher) if isinstance(t.teacher, str) else tuple(map(swap, t.teacher))) for t in row.terms)) for row in r.rows]
    learners = [Learner(create(student, 10), row, replace(r.schedule, epochs=1, batch_size=12)) for row in rows]
    fit(learners, Batches(joined("x", {"train": (x, y), "test": (x[:8], y[:8])}, range(10)), 12, 0), 1, create(teacher, 10))
    assert all(l.epochs[0]["loss"] is not None for l in learners)


def test_bf16_autocast_trains_and_relations_stay_in_float32():
    from relkd.train import make_fabric

    seen = []
    learner = Learner(create("resnet8x0.5", 10, 1), PAPER_ROWS[4], Schedule(2, 50, .05, milestones=()))
    learner.model.fc.register_forward_pre_hook(lambda m, a: seen.append(a[0].dtype))
    fabric = make_fabric("cpu", "bf16-mixed")
    fit([learner], Batches(load("digits"), 50, 0, torch.arange(200)), 2, create("resnet8", 10, 1), fabric)
    assert torch.bfloat16 in seen and learner.model.fc.weight.dtype == torch.float32
    assert learner.epochs[-1]["loss"] < learner.epochs[0]["loss"]
    with fabric.autocast():
        assert PAPER_ROWS[2].terms[1].build()(torch.randn(8, 4).bfloat16(), torch.randn(8, 4)).dtype == torch.float32
