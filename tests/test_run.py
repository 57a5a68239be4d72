"""Runs: found finished, stopped and killed at any moment, refused in one line; what a user's file brings with it."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import relkd.tables.run as engine
from data_helpers import one_line
from forked import start
from helpers import After, Tiny, few_shot_toy, figures, same, split_digits, tiny, toy
from relkd.checkpoints import hold, load_checkpoint, manifest_of, save_checkpoint
from relkd.data import load
from relkd.distill import Row, Stage, Term
from relkd.ground import digest, teacher_seed
from relkd.records import diverged, load_records, write_record
from relkd.tables.recipe import from_file, recipe
from relkd.tables.run import Experiment, run, trained
from relkd.tasks.fewshot import FewShot, run_trials
from relkd.tasks.retrieval import Retrieval
from relkd.train import Learner, Saver, Session, Stop, Stopped

HERE = Path(__file__).resolve().parent
KINDS = {"classify": toy, "few-shot": few_shot_toy}


def session(out, **more):
    return Session(out, "cpu", **more)


@pytest.fixture(scope="module", params=KINDS)
def done(request, tmp_path_factory):
    out, recipe = tmp_path_factory.mktemp("done"), KINDS[request.param](seeds=(0, 1))
    return recipe, out, run(recipe, session(out))


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(engine, "fit", lambda *a, **k: pytest.fail("training started"))


def left_over(out):
    return [p.name for p in Path(out).rglob("*") if p.name.startswith("group-") or p.name.endswith(".tmp")]


# --- whole runs

def test_a_run_makes_every_cell_and_finds_them_finished(done, no_training):
    recipe, out, records = done
    cells = {(r["row"], tuple(r["variant"].values()), r["seed"]) for r in records}
    shots = [(1,), (2,)] if recipe.vary else [()]
    assert len(records) == recipe.runs == len(cells) and cells == {(row, v, s) for row in recipe.row_names for v in shots for s in (0, 1)}
    files = {p: p.stat().st_mtime_ns for p in out.glob(".runs/**/*.ckpt.*")}
    again = run(recipe, session(out))
    key = lambda r: (r["row"], str(r["variant"]), r["seed"])                        # noqa: E731
    assert sorted(again, key=key) == sorted(records, key=key) == sorted(load_records(out, recipe.name), key=key)
    assert {p: p.stat().st_mtime_ns for p in files} == files and not left_over(out)


def test_records_without_their_checkpoints_stand_and_what_is_missing_asks_for_the_teacher(done, tmp_path, no_training):
    recipe, out, _ = done
    shutil.copytree(out / "records", tmp_path / "records")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.json")}
    assert len(run(recipe, session(tmp_path))) == recipe.runs and {p: p.read_bytes() for p in tmp_path.rglob("*.json")} == before
    row = recipe.rows[-1].name
    one_line(lambda: trained(recipe, row, 0, session(tmp_path)), f"no weights of row '{row}', seed 0")
    for p in (tmp_path / "records").rglob(f"{row.lower()}*seed1.json"):
        p.unlink()
    one_line(lambda: run(recipe, session(tmp_path)), f"{row} and what else is missing need the teacher's weights")


def test_what_stands_in_every_record(done):
    recipe, _, records = done
    for r in records:
        p = r["protocol"]
        assert (r["run"] == digest(p) and p["precision"] == "32-true" and r["processes"] == 1 and p["cut"] == recipe.cut
                and p["recipe"] == recipe.name)
        assert r["last"] == r["tests"][r["headline"]]["accuracy"] and r["commit"] != "" and r["version"] == 2
        assert p["network"] == {"name": "tiny" if r["row"] == "Teacher" else "noisy", "source": p["network"]["source"]}
        assert (r["teacher_weights"] is None) == (r["row"] == "Teacher")
        if recipe.vary:
            assert (r["headline"] == f"2-way {r['variant']['shot']}-shot" and r["best"] is None
                    and all("accuracy" not in e for e in r["epochs"]))
            assert len(r["tests"][r["headline"]]["hits"].split()) == 20 and "validation" in r["epochs"][-1]
        else:
            assert r["headline"] == "top-1" and r["best"] >= r["last"]
    taught = {r["teacher_weights"] for r in records if r["row"] != "Teacher"}
    assert taught == {r["weights"] for r in records if r["row"] == "Teacher"}


def test_students_of_a_seed_share_start_stream_and_teacher_and_the_teacher_starts_elsewhere(done):
    recipe, out, _ = done
    e = Experiment(recipe, session(out))
    for g in e.groups():
        protocols = [e.protocol(row, g.task, s, g.stream) for s in g.seeds for row in recipe.rows]
        assert ({p["teacher"] for p in protocols} == {digest(e.teacher_protocol(g.task, g.stream))}
                and len({digest(p) for p in protocols}) == len(protocols))
    a, b = (e.network(tiny, recipe.tasks[0], s) for s in (0, 0))
    assert same(a, b) and not same(a, e.network(tiny, recipe.tasks[0], teacher_seed(0)))


def test_the_network_of_a_finished_run(done):
    recipe, out, records = done
    for r in records[:6]:
        net = trained(recipe, r["row"], r["seed"], session(out), **r["variant"])
        e = Experiment(recipe, session(out))
        task = next((t for t in recipe.tasks if recipe.variant(t) == r["variant"]), recipe.task)
        assert not net.training and task.test(net, e.data) == r["tests"]
    one_line(lambda: trained(recipe, "SP", 0, session(out)), "no finished run of row 'SP', seed 0", "run " + recipe.name + " first")


@pytest.mark.parametrize("done", ["few-shot"], indirect=True)
def test_a_few_shot_test_is_counted_from_the_network(done):
    recipe, out, records = done
    r = next(r for r in records if (r["row"], r["variant"], r["seed"]) == ("RKD-D", {"shot": 2}, 1))
    hits = run_trials(trained(recipe, "RKD-D", 1, session(out), shot=2), split_digits(), "test", recipe.tasks[1].trials)
    assert [" ".join(map(str, h.tolist())) for h in hits] == [t["hits"] for t in r["tests"].values()]


def test_fewer_rows_and_seeds_are_the_same_runs(done, tmp_path):
    recipe, _, records = done
    more = {"shot": (2,)} if recipe.vary else {}
    some = recipe.reduced(rows=[recipe.rows[1].name], seeds=[1], **more)
    got, want = figures(run(some, session(tmp_path))), figures(records)
    assert some.name == recipe.name and all(want[k] == v for k, v in got.items()) and len(got) == some.runs


def test_one_teacher_for_all_seeds_and_none_to_be_trained(tmp_path):
    shared = toy(seeds=(3, 4), together=True, rows=toy().rows[:2])
    records = run(shared, session(tmp_path / "a"))
    assert ([(r["row"], r["seed"]) for r in records]
            == [("Teacher", 0), *((row.name, s) for s in (3, 4) for row in shared.rows)] and len(records) == shared.runs)
    assert {r["trained_beside"] for r in records if r["row"] != "Teacher"} == {4}
    alone = run(replace(shared, rows=(), baseline="Teacher"), session(tmp_path / "b"))
    assert figures(alone).items() <= figures(records).items() and len(alone) == 1


def test_a_damaged_final_checkpoint_is_made_again_alone_with_the_same_result(tmp_path):
    records = run(toy(), session(tmp_path))
    part = next(tmp_path.glob(".runs/toy/rkd-da*.000"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.warns(UserWarning, match="checkpoint refused: rkd-da.* is damaged"):
        again = run(toy(), session(tmp_path))
    assert figures(again) == figures(records) and [r["trained_beside"] for r in again if r["row"] == "RKD-DA"] == [1]


def test_one_session_for_two_precisions(tmp_path):
    s = session(tmp_path)
    r = toy(rows=toy().rows[:1])
    run(r, s)
    run(replace(r, name="toy-bf16", precision="bf16"), s)
    kinds = {x["recipe"]: {x["protocol"]["precision"]} for x in s.records}
    assert kinds == {"toy": {"32-true"}, "toy-bf16": {"bf16-mixed"}}
    a, b = (figures([x for x in s.records if x["recipe"] == n and x["row"] == "Teacher"]) for n in kinds)
    assert [v[1] for v in a.values()] != [v[1] for v in b.values()], "bf16 was used, not only written down"


# --- stopped, killed

@pytest.mark.parametrize("stop_at", [1, 3, 7])
def test_stopped_and_continued_is_not_stopped(done, tmp_path, stop_at):
    recipe, _, records = done
    with pytest.raises(Stopped):
        run(recipe, session(tmp_path, stop=After(stop_at)))
    assert list(tmp_path.glob(".runs/*/group-*.ckpt"))
    assert figures(run(recipe, session(tmp_path))) == figures(records) and not left_over(tmp_path)


def test_a_budget_holds_between_the_final_tests_too(tmp_path, steps):
    """The fault: it was not asked once training had ended, and tests of many rows may take as long."""
    with pytest.MonkeyPatch.context() as m:
        real, tested = engine._finish, []
        stop = Stop(budget=None)

        def slow(e, *a, **k):
            real(e, *a, **k)
            tested.append(1)
            if len(tested) == 2:                                 # the teacher, the first student
                stop.why = "budget"

        m.setattr(engine, "_finish", slow)
        with pytest.raises(Stopped, match="budget"):
            run(toy(), session(tmp_path, stop=stop))
    n = len(steps)
    assert len(tested) == 2 and len(run(toy(), session(tmp_path))) == toy().runs and len(steps) == n


def test_a_run_that_diverges_says_so_once_and_under_its_table(tmp_path):
    r = toy(schedule=replace(toy().schedule, lr=1e12), rows=toy().rows[:1])
    with pytest.warns(UserWarning, match=f"{r.rows[0].name}, seed 0: the loss of epoch . is not finite: it has diverged") as said:
        records = run(r, session(tmp_path))
    assert sum("diverged" in str(w.message) for w in said) == 1
    assert diverged(records) == [f"{r.rows[0].name} diverged with seed 0: its last loss is not finite"]


def test_a_signal_stops_at_a_checkpoint_in_parts(tmp_path):
    with pytest.raises(Stopped, match="SIGTERM"), Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        run(toy(), session(tmp_path, stop=stop, part_size=4000))
    sizes = [p.stat().st_size for p in tmp_path.glob(".runs/toy/group-*.ckpt.????????.*")]
    assert len(sizes) > 1 and max(sizes) <= 4000


def test_successive_budgets_finish_a_run(tmp_path):
    want, calls, finished = figures(run(toy(), session(tmp_path / "whole"))), 0, []
    while calls < 100 and len(finished) < 4:
        calls, finished = calls + 1, []
        with Stop(budget=0.) as stop:
            try:
                finished = run(toy(), session(tmp_path / "parts", stop=stop))
            except Stopped as error:
                assert str(error) == "budget"
    assert 5 <= calls < 100 and figures(finished) == want, "each call makes one step at least"


class Killed(BaseException):
    pass


class Disk:
    """Counts the operations on files; from the one numbered `fatal` on nothing reaches the disk any more."""
    def __init__(self, monkeypatch, fatal=None):
        self.count, self.fatal, self.marks = 0, fatal, {}
        real_replace, real_unlink = os.replace, Path.unlink
        monkeypatch.setattr(os, "replace", lambda a, b: (self.operation(), real_replace(a, b)))
        monkeypatch.setattr(Path, "unlink", lambda p, missing_ok=False: (self.operation(), real_unlink(p, missing_ok))[1])

    def operation(self):
        self.count += 1
        if self.fatal is not None and self.count >= self.fatal:
            raise Killed


@pytest.fixture
def steps(monkeypatch):
    made, real = [], Learner.step

    def step(self, *a):
        made.append((self.row.name, self.task, self.seed))
        return real(self, *a)

    monkeypatch.setattr(Learner, "step", step)
    return made


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_kill_at_any_operation_on_a_file_costs_no_row_more_than_one_interval(tmp_path, make, steps, flags):
    """A checkpoint after each step, and a kill before each renaming or removal of a file,
    those of the final window included: no row makes more than one step again."""
    if make().vary and "slow" not in flags:
        pytest.skip("one of two tasks that go one way: --flags slow")
    recipe = make(rows=make().rows[:2], schedule=replace(make().schedule, epochs=1), teacher_schedule=replace(make().schedule, epochs=1))
    recipe = replace(recipe, vary={"shot": (1,)}) if recipe.vary else recipe
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Saver, "due", lambda self: True)
        disk = Disk(m)
        want = figures(run(recipe, session(tmp_path / "whole")))
    due, operations = {s: steps.count(s) for s in steps}, disk.count
    assert operations > 25
    for fatal in range(2, operations + 1, 1 if "slow" in flags else 3):     # every third; all with --flags slow
        steps.clear()
        out = tmp_path / str(fatal)
        with pytest.MonkeyPatch.context() as m, pytest.raises(Killed):
            m.setattr(Saver, "due", lambda self: True)
            Disk(m, fatal)
            run(recipe, session(out))
        found = figures(run(recipe, session(out)))
        again = {s: steps.count(s) - n for s, n in due.items()}
        assert (found == want and max(again.values()) <= 1
                and min(again.values()) >= 0), f"killed at operation {fatal} of {operations}: {again}"
        assert not left_over(out), fatal


def test_the_final_window_is_not_trained_again(tmp_path, steps):
    """Without checkpoints in between: once the group's last one is written, no row makes a step again,
    whichever of the finals are there."""
    recipe = toy()
    with pytest.MonkeyPatch.context() as m:
        real, calls = engine.save_checkpoint, []

        def second(*a):
            calls.append(a)
            if len(calls) == 3:                                  # the teacher's, the first student's
                raise Killed
            return real(*a)

        m.setattr(engine, "save_checkpoint", second)
        with pytest.raises(Killed):
            run(recipe, session(tmp_path))
    n = len(steps)
    records = run(recipe, session(tmp_path))
    assert len(steps) == n and not left_over(tmp_path) and {r["trained_beside"] for r in records if r["row"] in ("RKD-DA", "HKD")} <= {2, 3}


def test_orphans_are_cleared_and_a_group_under_way_is_not(tmp_path):
    with pytest.raises(Stopped):
        run(toy(rows=toy().rows[:2]), session(tmp_path, stop=After(14)))            # among the students
    assert len(list(tmp_path.glob(".runs/toy/group-*.ckpt"))) == 1
    with pytest.raises(Stopped):
        run(toy(), session(tmp_path, stop=After(1)))                                # another group, of more rows
    assert len(list(tmp_path.glob(".runs/toy/group-*.ckpt"))) == 2
    for name in ("group-dead.ckpt.01234567.000", "x.ckpt.abc.tmp"):
        (tmp_path / ".runs/toy" / name).write_bytes(b"x")
    run(toy(), session(tmp_path))
    assert not left_over(tmp_path)


def long_toy():
    r = toy()
    return replace(r, schedule=replace(r.schedule, epochs=80))


def run_until_killed(out):
    torch.set_num_threads(1)
    run(long_toy(), Session(out, "cpu", every=.01))


def test_kill_minus_nine_and_go_on_bit_for_bit(tmp_path):
    r, p = long_toy(), start(run_until_killed, tmp_path / "killed", said=tmp_path / "said.txt")
    deadline = time.time() + 120
    while not list((tmp_path / "killed").glob("records/toy/teacher*")) and time.time() < deadline and p.is_alive():
        time.sleep(.005)
    while not list((tmp_path / "killed").glob(".runs/toy/group-*.ckpt")) and time.time() < deadline and p.is_alive():
        time.sleep(.005)
    assert p.is_alive(), (tmp_path / "said.txt").read_text()
    p.kill()
    p.join()
    assert len(list((tmp_path / "killed").glob("records/toy/*"))) == 1
    assert (figures(run(r, session(tmp_path / "killed"))) == figures(run(r, session(tmp_path / "whole")))
            and not left_over(tmp_path / "killed"))


# --- refused in one line, before anything is trained

def test_two_runs_in_one_folder(tmp_path, no_training):
    with hold(tmp_path / ".runs" / "toy"):
        one_line(lambda: run(toy(), session(tmp_path)), f"another run (process {os.getpid()}) is at work in "
                                                        f"{tmp_path}/.runs/toy: wait for it, or name another --out")


def old_layout(path):
    save_checkpoint(path, {"k": 1}, "d")
    m = json.loads(path.read_text())
    del m["version"]
    path.write_text(json.dumps(m))


@pytest.mark.parametrize("name", ["group-0123456789ab.ckpt", "student-seed0-0123456789ab.ckpt"])
def test_a_run_of_an_earlier_version_is_not_continued(tmp_path, name):
    (tmp_path / ".runs/toy").mkdir(parents=True)
    old_layout(tmp_path / ".runs/toy" / name)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(engine, "fit", lambda *a, **k: pytest.fail("training started"))
        one_line(lambda: run(toy(), session(tmp_path)), f"{tmp_path}/.runs/toy holds checkpoints of an earlier version "
                                                        f"of relkd, which are not continued ({name})", "--out", "--replace")
    run(toy(), session(tmp_path, replace=True))
    assert not (tmp_path / ".runs/toy" / name).exists()
    run(toy(), session(tmp_path))


def test_records_and_checkpoints_of_another_protocol_are_not_written_over(tmp_path):
    first = run(toy(), session(tmp_path))
    other = replace(toy(), task=replace(toy().task, labelled=4))
    kept = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(engine, "fit", lambda *a, **k: pytest.fail("training started"))
        one_line(lambda: run(other, session(tmp_path)), "records/toy holds records of another protocol or of an "
                                                        "earlier version", "write over them with --replace")
        for p in tmp_path.glob("records/toy/*"):
            p.unlink()
        one_line(lambda: run(other, session(tmp_path)), ".runs/toy holds checkpoints of another protocol", "--replace")
    for p, content in kept.items():
        assert p.read_bytes() == content if p.exists() else p.parent.name == "toy"
    for r in first:
        write_record(tmp_path, r)
    with pytest.warns(UserWarning, match="belongs to another run"):
        new = run(other, session(tmp_path, replace=True))
    assert len({r["run"] for r in first + new}) == len(first) + len(new) and figures(load_records(tmp_path, "toy")) == figures(new)
    run(other, session(tmp_path))


def test_a_checkpoint_does_not_say_where_records_are_written(tmp_path):
    run(toy(), session(tmp_path / "out"))
    path = tmp_path / "out/.runs/toy/hkd-seed0.ckpt"
    m = manifest_of(path)
    saved = load_checkpoint(path, m["digest"])
    saved["record"]["recipe"] = "../../../escaped"
    save_checkpoint(path, saved, m["digest"])
    run(toy(), session(tmp_path / "out"))
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize("change, message", [
    ({"student": "resnet9"}, "unknown network 'resnet9': did you mean 'resnet8'?"),
    ({"teacher": "resnet9"}, "unknown network 'resnet9'"),
    ({"data": "digit"}, "unknown data set 'digit': did you mean 'digits'?"),
    ({"rows": (Row("wrong", (Term("RKD", 1., "layer5"),)),)}, "unknown layer of Tiny 'layer5'"),
    ({"rows": (Row("wrong", (Term("RKD", 1., teacher="layer5"),)),)}, "unknown layer of Tiny 'layer5'"),
    ({"data": split_digits}, "data set 'digits' is split by classes, for few-shot learning or retrieval"),
    ({"task": replace(toy().task, labelled=100)}, "100 of each class were asked for"),
    ({"student": "conv4"}, "network 'conv4' cannot take images of 1 x 8 x 8 ("),
    ({"teacher": "conv4"}, "): choose another network, or larger images"),
    ({"task": FewShot()}, "data set 'few' has train and test images of the same classes; "
                          "few-shot learning needs classes split into train, val and test: Dataset.with_splits"),
    ({"data": "digits", "task": FewShot()}, "data set 'digits' has train and test images of the same classes"),
    ({"data": split_digits, "task": FewShot(way=9)}, "9-way episodes need 9 classes; the train classes of digits have 6"),
    ({"data": split_digits, "task": FewShot(way=2, ways=(2, 3))}, "3-way episodes need 3 classes; the test classes of digits have 2"),
    ({"teacher_weights": "nowhere.pth"}, "no file nowhere.pth of the teacher's weights"),
    ({"starts": {"student": "nowhere.pth"}}, "no file nowhere.pth of the student's first weights: "
                                             "name the file, or let it start at random"),
    ({"starts": {"teacher": ("digitz", "Student")}}, "unknown recipe 'digitz': did you mean 'digits'?"),
    ({"precision": "fp8"}, "precision is '32' or 'bf16'; got 'fp8'"),
    ({"rows": (Row("wrong", (Term("AT", 1.),)),)}, "AT needs student maps of shape (N, C, H, W)"),
    ({"rows": (Row("wrong", (Term("RKDDistance", 1., options={"p": 3}),)),)}, "RKDDistance cannot be made with the options {'p': 3}"),
    ({"rows": (Row("first", before=(Stage((Term("FSP", 1., ("fc", "fc"), ("fc", "fc")),), 1),)),)}, "FSP needs"),
    ({"rows": (Row("wrong", (Term(lambda s, t: None, 1.),)),)}, "a loss is a tensor of 0 dimensions"),
    ({"student": lambda outputs, channels: tiny(5, channels)}, "puts out 5 numbers an image where 10 classes need 10"),
    ({"task": replace(toy().task, labelled=0)}, "at least 1 image of each class is needed; 0 were asked for"),
    ({"data": split_digits, "task": FewShot(length=0)}, "few-shot learning needs length of at least 1; got 0"),
    ({"data": split_digits, "task": FewShot(test_episodes=1)}, "few-shot learning needs test_episodes of at least 2; got 1"),
    ({"data": split_digits, "task": Retrieval(size=4, images=5), "schedule": replace(toy().schedule, batch_size=5)},
     "a batch of 5 cannot hold two whole classes of 5 images, or more: choose a multiple of 5 from 10 on"),
])
def test_what_cannot_be_is_said_before_any_training(tmp_path, no_training, change, message):
    one_line(lambda: run(replace(toy(), **change), session(tmp_path)), message)
    assert not list(tmp_path.glob("records/**/*.json"))


def test_networks_start_from_another_task(tmp_path, monkeypatch):
    import relkd.tables.recipe as recipes
    first = toy()
    run(first, session(tmp_path))
    base = first.rows[0].name
    monkeypatch.setattr(recipes, "recipe", lambda name: first)
    starts = {"teacher": ("toy", "Teacher"), "student": ("toy", base)}
    still = replace(first.schedule, lr=0., weight_decay=0.)
    new = replace(first, name="second", starts=starts, schedule=still, teacher_schedule=still, rows=first.rows[:1], seeds=(5,))
    records = run(new, session(tmp_path))
    assert [r["protocol"]["start"] for r in records] == [{"recipe": "toy", "row": "Teacher"}, {"recipe": "toy", "row": base}]
    kept, old = (trained(r, base, r.seeds[0], session(tmp_path)) for r in (new, first))
    same = {n for (n, a), b in zip(kept.named_parameters(), old.parameters()) if torch.equal(a, b)}
    assert {n for n, _ in old.named_parameters()} - same == {"fc.weight", "fc.bias"}
    with pytest.raises(ValueError, match="network of toy that starts 'students'"):
        replace(first, starts={"students": "x"})


# --- a user's own

MINE = '''
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.datasets import ImageFolder

from relkd.data import joined
from relkd.distill import Row, Stage, Term
from relkd.recipes.digits import digits
from relkd.tables.recipe import Recipe
from relkd.tasks.classify import Classify
from relkd.train import Schedule
from beside import MARGIN

HERE = Path(__file__).parent


def pets():
    def part(name):
        found = ImageFolder(HERE / 'pets' / name)
        x = torch.stack([torch.tensor(np.asarray(image)).permute(2, 0, 1) for image, _ in found])
        return x, torch.tensor(found.targets)
    return joined('pets', {'train': part('train'), 'test': part('test')}, ('cat', 'dog'))


def network(outputs, channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 6), nn.ReLU(), nn.Linear(6, outputs))


def near(student, teacher, p=2):
    return (student - teacher).abs().pow(p).mean() + MARGIN


class Near(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, student, teacher):
        return near(student, teacher, self.p)


mine = Recipe(name='mine', title='all of my own', data=pets, task=Classify(), teacher=network, student=network,
              teacher_weights=str(HERE / 'teacher.safetensors'),
              rows=(Row('Student'), Row('function', (Term(near, 2., '3:input', '3:input'),)),
                    Row('class', (Term(Near, 2., '3:input', '3:input', {'p': 2}),))),
              schedule=Schedule(2, 4, .1, milestones=()), seeds=(0,))
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    from safetensors.torch import save_file

    at = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for part, n in (("train", 6), ("test", 3)):
        for c in ("cat", "dog"):
            (at / "pets" / part / c).mkdir(parents=True)
            for k in range(n):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(at / "pets" / part / c / f"{k}.png")
    (at / "beside.py").write_text("MARGIN = 0.\n")
    (at / "my_recipe.py").write_text(MINE)
    save_file({k: v.contiguous() for k, v in from_file(at / "my_recipe.py").teacher(2, 3).state_dict().items()}, at / "teacher.safetensors")
    return at


def test_a_file_of_the_users_is_run_from_another_folder_with_the_wheel_alone(own, wheel, tmp_path, relkd_cli):
    env = relkd_cli.env | {"PYTHONPATH": str(wheel)}
    where = subprocess.run([sys.executable, "-c", "import relkd; print(relkd.__file__)"], cwd=tmp_path, env=env,
                           capture_output=True, text=True)
    assert where.stdout.startswith(str(wheel))
    done = subprocess.run([sys.executable, "-m", "relkd.cli", "run", own / "my_recipe.py", "--set", "schedule.lr=.05",
                           "--device", "cpu", "--out", "out"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name = "mine-schedule.lr=0.05"
    records = {r["row"]: r for r in load_records(tmp_path / "out", name)}
    assert list(sorted(records)) == ["Student", "Teacher", "class", "function"] and (tmp_path / "out" / f"{name}.csv").exists()
    p = records["function"]["protocol"]
    assert (p["schedule"]["lr"] == .05 and p["cut"] == "schedule.lr = 0.05 instead of 0.1"
            and "schedule.lr = 0.05 instead of 0.1" in done.stdout)
    assert p["network"]["name"] == "network" and len(p["network"]["source"]) == 12
    loss, of_class = p["row"]["terms"][0]["loss"], records["class"]["protocol"]["row"]["terms"][0]["loss"]
    assert loss["name"] == "near" and of_class["name"] == "Near" and loss["source"] != of_class["source"]
    teacher = records["Teacher"]
    assert (teacher["epochs"] == [] and teacher["trained_beside"] == 0 and set(teacher["protocol"]["weights"])
            == {"file", "sha256"} and teacher["protocol"]["weights"]["file"] == "teacher.safetensors")
    assert (records["class"]["teacher_weights"] == teacher["weights"]
            and records["class"]["epochs"] == records["function"]["epochs"] != records["Student"]["epochs"])
    fingerprint = from_file(own / "my_recipe.py").data().fingerprint
    assert {r["protocol"]["data"]["fingerprint"] for r in records.values()} == {fingerprint}


def test_the_teachers_weights_are_those_of_the_file_and_another_file_is_another_protocol(own, tmp_path, monkeypatch):
    r = from_file(own / "my_recipe.py")
    path = tmp_path / "t.pth"
    net = r.teacher(2, 3)
    torch.save({"state_dict": net.state_dict()}, path)
    r = replace(r, teacher_weights=path)
    run(r, session(tmp_path))
    assert same(trained(r, "Teacher", 0, session(tmp_path)), net)
    with torch.no_grad():
        net[1].bias += 1
    torch.save({"state_dict": net.state_dict()}, path)
    one_line(lambda: run(r, session(tmp_path)), "records of another protocol")
    torch.save({"state_dict": Tiny(2).state_dict()}, path)
    one_line(lambda: run(replace(r, name="other"), session(tmp_path)), "does not fit this Sequential")


def test_a_folder_of_images_by_its_path(own, tmp_path):
    r = replace(from_file(own / "my_recipe.py"), data=str(own / "pets"), teacher_weights=None)
    assert {x["protocol"]["data"]["fingerprint"] for x in run(r, session(tmp_path))} == {load(str(own / "pets")).fingerprint}


def test_arrays_with_a_split_of_ones_own_are_a_few_shot_set(tmp_path):
    """The fault: such a split could be made and had no road into a run; plain arrays were always split by samples."""
    d, folder = split_digits(), tmp_path / "own"
    folder.mkdir()
    np.save(folder / "images.npy", d.images.permute(0, 2, 3, 1).numpy())
    np.save(folder / "labels.npy", d.labels.numpy().astype(np.uint8))
    (folder / "splits.json").write_text(json.dumps(d.splits))
    plan = replace(few_shot_toy().schedule, epochs=1, milestones=())
    there, here = (run(few_shot_toy(data=data, vary={}, schedule=plan), session(tmp_path / str(k)))
                   for k, data in enumerate((split_digits, str(folder))))
    assert len(here) == 3 and figures(here) == figures(there)


def test_a_loss_that_changes_is_another_experiment(own, tmp_path):
    r = from_file(own / "my_recipe.py")
    run(r, session(tmp_path))
    changed = tmp_path / "my_recipe.py"
    changed.write_text(MINE.replace("HERE = Path(__file__).parent", f"HERE = Path({str(own)!r})").replace(
        ".abs().pow(p)", ".abs().pow(p + 1)"))
    one_line(lambda: run(from_file(changed), session(tmp_path)), "records of another protocol", "function-seed0.json")


def test_all_rows_of_a_papers_recipe_run_on_a_small_set_in_the_publishers_layout(tmp_path):
    folder, rng = tmp_path / "miniimagenet", np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for k, split in enumerate(("train", "val", "test")):
        names = [f"n{k}{c}_{i}.jpg" for c in range(3) for i in range(5)]
        for n in names:
            Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize((84, 84)).save(folder / "images" / n)
        (folder / f"{split}.csv").write_text("filename,label\n" + "\n".join(f"{n},{n.split('_')[0]}" for n in names))
    paper = recipe("miniimagenet/paper")
    one_line(lambda: run(paper, session(tmp_path / "out", root=tmp_path)),
             "20-way episodes need 20 classes; the train classes of miniimagenet have 3")
    task = replace(paper.task, way=2, query=1, length=2, ways=(2,), test_query=2, test_episodes=8)
    small = replace(paper, seeds=(0,), vary={"shot": (1,)}, schedule=paper.schedule.cut_to(1), task=task)
    records = run(small, session(tmp_path / "out", root=tmp_path))
    assert ([r["row"] for r in records] == ["Teacher", "Student", "RKD-D", "RKD-DA", "FitNet", "Attention", "SP", "PKT"]
            and all(r["epochs"][0]["loss"] is not None for r in records))
    assert len({r["weights"] for r in records}) == 8, "every term has a gradient"
