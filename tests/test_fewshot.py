"""Few-shot: episodes, prototypes, distillation on episodes, recipes, records, and what is refused."""
import csv
import io
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from helpers import After, gen
import relkd.fewshot as fs
from relkd.data import Dataset, Episodes, by_class, draw_episodes, load
from relkd.distill import Row, Term
from relkd.fewshot import FEWSHOT_RECIPES, EpisodeLearner, EpisodeObjective, EpisodeSchedule, Trial
from relkd.losses import KD, RKDDistance
from relkd.models import create
from relkd.records import load_records
from relkd.train import Saver, Stop, Stopped, fit

REAL = Path(__file__).resolve().parents[1] / ".data"


# --- episodes

# --- prototypes

def loops(z, shot):
    way, n, _ = z.shape
    total = right = 0
    for w in range(way):
        for q in range(shot, n):
            d = [sum((z[w, q] - z[v, :shot].mean(0)).pow(2)).item() for v in range(way)]
            total += d[w] + math.log(sum(math.exp(-x) for x in d))
            right += d[w] == min(d)
    return total / (way * (n - shot)), right


@pytest.mark.parametrize("way, shot, query, D", [(2, 1, 1, 1), (2, 2, 1, 2), (5, 1, 3, 7), (4, 5, 2, 3)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_prototypical_loss_and_accuracy_equal_loops(way, shot, query, D, dtype, tolerance):
    z = torch.randn(way, shot + query, D, generator=gen(way), dtype=torch.float64).to(dtype)
    value, right = loops(z, shot)
    assert abs(fs.prototypical_loss(z, shot).item() - value) < tolerance and fs.episode_hits(z, shot).item() == right
    logits = fs.episode_logits(z, shot)
    assert torch.allclose(logits, -torch.cdist(z[:, shot:].flatten(0, 1), z[:, :shot].mean(1))**2, atol=1e-4)


def test_many_episodes_at_once_equal_one_at_a_time():
    z = torch.randn(6, 3, 4, 5, generator=gen())
    assert torch.allclose(fs.episode_logits(z, 2), torch.stack([fs.episode_logits(e, 2) for e in z]), atol=1e-5)
    assert fs.episode_hits(z, 2).tolist() == [fs.episode_hits(e, 2).item() for e in z]


def test_gradient_invariance_and_precision():
    z = torch.randn(3, 4, 5, generator=gen(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: fs.prototypical_loss(z, 2), z)
    exact = fs.prototypical_loss(z, 2)
    far = (z.detach() + 1000).float()
    assert abs(fs.prototypical_loss(far, 2) - fs.prototypical_loss(far.double(), 2)) < 1e-3, "the origin is moved before anything cancels"
    for dtype in (torch.float16, torch.bfloat16):
        half = z.detach().to(dtype).requires_grad_()
        value = fs.prototypical_loss(half, 2)
        value.backward()
        assert value.dtype == torch.float32 and half.grad.isfinite().all() and abs(value - exact) < .1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fs.prototypical_loss(z.detach().float(), 2), fs.prototypical_loss(z.detach().float(), 2)) and fs.episode_logits(z.detach().float(), 2).dtype == torch.float32
    zero = torch.zeros(3, 4, 5, requires_grad=True)
    fs.prototypical_loss(zero, 2).backward()
    assert zero.grad.abs().max() == 0


# --- data

@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Omniglot's layout with a few invented characters: 12 classes to train on, 8 to validate, 8 to test, 8 drawings each."""
    folder = tmp_path_factory.mktemp("data") / "omniglot"
    folder.mkdir()
    rng, rows = np.random.default_rng(0), [("Latin", 3), ("Hebrew", 2), ("Tibetan", 2)]
    names = [(a, f"character{c:02}") for a, n in rows for c in range(n)]
    shapes = rng.random((len(names), 1, 21, 21)) < .3
    images = (shapes ^ (rng.random((len(names), 8, 21, 21)) < .1)).repeat(5, 2).repeat(5, 3).astype(np.uint8)
    np.save(folder / "images.npy", images.reshape(-1, 105, 105))
    np.save(folder / "labels.npy", np.arange(len(names)).repeat(8))
    (folder / "characters.csv").write_text("label,subset,alphabet,character\n" + "".join(f"{i},x,{a},{c}\n" for i, (a, c) in enumerate(names)))
    return folder.parent


@pytest.fixture(scope="session")
def data(root):
    return load("omniglot", root)


def test_embedding_once_equals_every_episode_by_itself(data):
    net, trial = create("conv4", 0, 1, seed=3), Trial(3, 2, 4, episodes=25, seed=9)
    net(torch.randn(64, 1, 28, 28))                                                  # running statistics of its own
    once, = fs.run_trials(net, data, "test", [trial])
    assert net.training and once.shape == (25,)
    images, labels = data.split("test")
    net.eval()
    with torch.no_grad():
        alone = [fs.episode_hits(net(data.normalise(images[e.flatten()])).unflatten(0, (3, 6)), 2).item() for e in draw_episodes(by_class(labels), 3, 2, 4, 25, gen(9))]
        assert torch.allclose(fs.embed(net, data, images, 7), fs.embed(net, data, images), atol=1e-5)
    assert once.tolist() == alone


# --- distillation and training

def test_the_objective_is_the_prototypical_loss_plus_the_terms():
    s, t = torch.randn(12, 6, generator=gen(1), requires_grad=True), torch.randn(12, 6, generator=gen(2), requires_grad=True)
    y = fs.episode_labels(3, 2)
    row = Row("both", (Term("RKDDistance", 50.), Term("KD", 2., "logits", "logits", {"T": 4.})))
    o = EpisodeObjective(row, way=3, shot=2)
    found = [{"logits": e, "fc:input": e} for e in (s, t)]
    o.build(*found)
    got = o(*found, y)
    zs, zt = s.view(3, 4, 6), t.view(3, 4, 6)
    want = fs.prototypical_loss(zs, 2) + 50 * RKDDistance()(s, t) + 2 * KD(T=4.)(fs.episode_logits(zs, 2), fs.episode_logits(zt, 2))
    assert torch.allclose(got, want)
    got.backward()
    assert t.grad is None and s.grad.abs().sum() > 0 and torch.allclose(EpisodeObjective(Row("plain"), 3, 2)(found[0], {}, y), fs.prototypical_loss(zs, 2))


PLAN = EpisodeSchedule(6, way=3, query=2, halve_every=2, epoch=3)


def learners(pixels=28):
    return [EpisodeLearner(create("conv4", 0, 1, seed=4), r, PLAN, Trial(3, 1, 3, 10), seed=4) for r in fs.few_shot_rows(pixels)]


def stream(data):
    return Episodes(data, "train", 3, 1, 2, seed=4, length=3)


def same(a, b):
    return all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture(scope="session")
def whole(data):
    calls, teacher = [], create("conv4", 0, 1, seed=8)
    teacher.register_forward_hook(lambda *a: calls.append(teacher.training))
    group = learners()
    fit(group, stream(data), PLAN.epochs, teacher)
    return group, teacher, list(calls)


def test_all_rows_train_beside_one_pass_of_the_teacher(whole):
    group, _, calls = whole
    assert calls == [False] * (PLAN.episodes + 1), "once an episode, and once to see the shapes"
    assert [l.row.name for l in group] == ["Student", "RKD-D", "RKD-DA", "FitNet", "Attention", "SP", "PKT"]
    models = [l.model for l in group]
    assert not any(same(models[0], m) for m in models[1:]), "every term has a gradient"
    assert all(len(l.epochs) == 2 and {"epoch", "loss", "accuracy"} == set(l.epochs[-1]) for l in group)
    assert all(isinstance(l.optimiser, torch.optim.Adam) and l.optimiser.param_groups[0]["lr"] == 1e-3 / 4 for l in group)


def test_alone_is_the_same_as_together(data, whole):
    group, teacher, _ = whole
    for k in (2, 3):
        l = learners()[k]
        fit([l], stream(data), PLAN.epochs, teacher)
        assert same(l.model, group[k].model) and same(l.objective, group[k].objective) and l.epochs == group[k].epochs


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_stopped_and_continued_is_not_stopped_bit_for_bit(tmp_path, data, whole, stop_at):
    group, teacher, _ = whole
    pick = slice(1, 4)
    with pytest.raises(Stopped, match="budget"):
        fit(learners()[pick], stream(data), PLAN.epochs, teacher, saver=Saver(tmp_path / "g", "d"), stop=After(stop_at))
    continued = learners()[pick]
    fit(continued, stream(data), PLAN.epochs, teacher, saver=Saver(tmp_path / "g", "d"))
    assert all(same(a.model, b.model) and a.epochs == b.epochs for a, b in zip(continued, group[pick]))


def test_a_network_learns_the_invented_characters(data):
    plan = EpisodeSchedule(40, way=4, query=3, epoch=20)
    l = EpisodeLearner(create("conv4", 0, 1, seed=1), Row("plain"), plan, Trial(4, 1, 4, 100))
    fit([l], Episodes(data, "train", 4, 1, 3, seed=1, length=20), 2)
    assert l.epochs[1]["loss"] < .5 * l.epochs[0]["loss"] and l.epochs[1]["accuracy"] > 50


def test_where_attention_finds_positions():
    for pixels, channels in ((28, 1), (32, 3), (84, 3)):
        term, = next(r for r in fs.few_shot_rows(pixels) if r.name == "Attention").terms
        with torch.no_grad():
            f = fs.Features(create("conv4", 0, channels), [term.student])(torch.zeros(2, channels, pixels, pixels))[term.student]
        assert f.dim() == 4 and f.shape[2] * f.shape[3] > 1, pixels


# --- recipes

TOY = replace(FEWSHOT_RECIPES["omniglot/cpu"], name="toy", rows=FEWSHOT_RECIPES["omniglot/cpu"].rows[:2], schedule=EpisodeSchedule(4, way=3, query=2, halve_every=2, epoch=2), shots=(1, 2), seeds=(0, 1), ways=(2, 3), test_query=3,
              test_episodes=20, validate_every=1)


@pytest.fixture(scope="session")
def done(tmp_path_factory, root):
    out = tmp_path_factory.mktemp("out")
    return out, fs.run(TOY, out, "cpu", root=root)


def test_a_recipe_runs_and_is_found_finished(done, root):
    out, records = done
    assert len(records) == TOY.runs == 12 and {(r["method"], r["shot"], r["seed"]) for r in records} == {(m, k, s) for m in TOY.row_names for k in (1, 2) for s in (0, 1)}
    again = fs.run(TOY, out, "cpu", root=root)
    key = lambda r: (r["row"], r["seed"])
    assert sorted(again, key=key) == sorted(records, key=key) == sorted(load_records(out, "toy"), key=key)
    assert not list((out / ".runs" / "toy").glob("group-*"))
    net = fs.trained(TOY, "RKD-D", 2, 1, out)
    record = next(r for r in records if (r["method"], r["shot"], r["seed"]) == ("RKD-D", 2, 1))
    right = fs.run_trials(net, load("omniglot", root), "test", TOY.trials(2))
    assert [" ".join(map(str, h.tolist())) for h in right] == [t["hits"] for t in record["tests"].values()]


def test_accuracies_come_from_the_record_alone(done):
    for r in done[1]:
        for name, t in r["tests"].items():
            a = fs.accuracies(r, name)
            mean, half = fs.interval(a)
            assert len(a) == 20 and abs(mean - t["accuracy"]) < 1e-3 and abs(half - t["interval"]) < 1e-3 and name.endswith(f"{r['shot']}-shot")
            assert half == pytest.approx(1.96 * a.std(ddof=1) / 20**.5)


def test_students_share_start_and_episodes_and_their_teacher_does_not(done, root):
    me = fs._Runner(TOY, None, fs.make_fabric("cpu"), load("omniglot", root), None, False, [], None, 60.)
    protocols = {r.name: me.protocol(r, 1, 0) for r in (Row("Teacher"), *TOY.rows)}
    assert protocols["Student"]["teacher"] == protocols["RKD-D"]["teacher"] == fs.digest(protocols["Teacher"]) and "teacher" not in protocols["Teacher"]
    a, b = (me.learner(r, 1, 0, 0).model for r in TOY.rows)
    assert same(a, b) and not same(a, me.learner(Row("Teacher"), 1, 1000, 0).model)


def test_fewer_rows_and_seeds_are_the_same_runs_and_an_interruption_loses_none(done, root, tmp_path):
    some = TOY.reduced(rows=["rkd-d"], seeds=[1], shots=[2])
    assert some.runs == 2 and some.name == "toy"

    kept = []
    with pytest.raises(Stopped):
        fs.run(some, tmp_path, "cpu", root=root, records=kept, stop=After(6))
    assert [r["method"] for r in kept] == ["Teacher"] and list((tmp_path / ".runs" / "toy").glob("group-*"))
    records = fs.run(some, tmp_path, "cpu", root=root)
    for r in records:
        whole = next(w for w in done[1] if (w["row"], w["seed"]) == (r["row"], r["seed"]))
        assert r["tests"] == whole["tests"] and r["epochs"] == whole["epochs"] and r["run"] == whole["run"]


def test_a_signal_or_the_end_of_the_budget_stops_at_a_checkpoint(done, root, tmp_path):
    some = TOY.reduced(rows=["Student"], seeds=[0], shots=[1])
    with pytest.raises(Stopped, match="SIGTERM"), Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        fs.run(some, tmp_path, "cpu", root=root, stop=stop)
    with pytest.raises(Stopped, match="budget"), Stop(0.) as stop:
        fs.run(some, tmp_path, "cpu", root=root, stop=stop, part_size=100_000)
    assert max(p.stat().st_size for p in (tmp_path / ".runs").rglob("group-*.ckpt.????????.*")) > 100_000 >= min(p.stat().st_size for p in (tmp_path / ".runs").rglob("group-*.ckpt.????????.000"))
    for r in fs.run(some, tmp_path, "cpu", root=root):
        whole = next(w for w in done[1] if (w["row"], w["seed"]) == (r["row"], r["seed"]))
        assert r["tests"] == whole["tests"] and r["epochs"] == whole["epochs"]


@pytest.mark.parametrize("name", ["omniglot", "cifar_fs", "fc100"])
def test_the_real_data_allow_the_recipes(name):
    if not (REAL / ("omniglot" if name == "omniglot" else "cifar100")).is_dir():
        pytest.skip(f"{name} is not here")
    data = load(name, REAL)
    for r in FEWSHOT_RECIPES.values():
        if r.data == name:
            r.check(data)
    if name == "omniglot":
        with pytest.raises(ValueError, match="5 shots and 16 queries need 21 images of every class"):
            replace(FEWSHOT_RECIPES["omniglot/paper"], test_query=16).check(data)


def test_the_table_and_its_files(done):
    out, records = done
    frame = fs.draw(TOY, out)
    assert list(frame.index) == [(t, row) for t in ("2-way 1-shot", "3-way 1-shot", "2-way 2-shot", "3-way 2-shot") for row in ("Teacher", "Student", "RKD-D")]
    assert (out / "toy.png").stat().st_size > 5000
    lines = list(csv.DictReader((out / "toy.csv").open()))
    assert {l["cut_down"] for l in lines} == {TOY.cut}
    a = [r["tests"]["3-way 2-shot"]["accuracy"] for r in records if r["method"] == "RKD-D" and r["shot"] == 2]
    assert float(lines[-1]["accuracy"]) == pytest.approx(np.mean(a), abs=1e-3) and float(lines[-1]["over_seeds"]) == pytest.approx(np.std(a, ddof=1), abs=1e-3)
    text = fs.as_text(frame)
    assert text.count("RKD-D") == 4 and "nan" not in text and max(map(len, text.splitlines())) < 140


def test_records_are_small():
    p = FEWSHOT_RECIPES["omniglot/paper"]
    hits = torch.full((p.test_episodes,), 300)
    tests = {t.name: fs._summary(t, hits) for t in p.trials(5)}
    epochs = [{"epoch": k, "loss": 12.345678, "accuracy": 98.7654} for k in range(p.schedule.epochs)]
    assert len(json.dumps(tests)) + len(json.dumps(epochs)) < 30_000


def test_all_rows_run_on_a_small_miniimagenet_in_the_real_layout(tmp_path):
    folder = tmp_path / "miniimagenet"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k, split in enumerate(("train", "val", "test")):
        names = [f"n{k}{c}_{i}.jpg" for c in range(3) for i in range(5)]
        for n in names:
            b = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize((84, 84)).save(b, "JPEG")
            (folder / "images" / n).write_bytes(b.getvalue())
        (folder / f"{split}.csv").write_text("filename,label\n" + "\n".join(f"{n},{n.split('_')[0]}" for n in names))
    recipe = FEWSHOT_RECIPES["miniimagenet/paper"]
    with pytest.raises(ValueError, match="20-way episodes need 20 classes; the train classes of miniimagenet have 3"):
        fs.run(recipe, tmp_path / "out", "cpu", root=tmp_path)
    toy = replace(recipe, seeds=(0,), shots=(1,), schedule=EpisodeSchedule(2, way=2, query=1, epoch=2), ways=(2,), test_query=2, test_episodes=8)
    records = fs.run(toy, tmp_path / "out", "cpu", root=tmp_path)
    assert [r["method"] for r in records] == ["Teacher", "Student", "RKD-D", "RKD-DA", "FitNet", "Attention", "SP", "PKT"] and all(math.isfinite(r["epochs"][0]["loss"]) for r in records)
    frame = fs.table(records, replace(toy, quoted=(("RKD-D", "2-way 1-shot", 49.66, .84),)))
    assert frame.loc[("2-way 1-shot", "RKD-D"), "paper"] == 49.66 and math.isnan(frame.loc[("2-way 1-shot", "SP"), "paper"])


def test_the_recipes_are_those_of_the_papers():
    o, m = FEWSHOT_RECIPES["omniglot/paper"], FEWSHOT_RECIPES["miniimagenet/paper"]
    assert (o.schedule.way, o.schedule.query, o.schedule.episodes, o.schedule.halve_every, o.test_episodes, o.ways, o.shots) == (60, 5, 10_000, 2_000, 1000, (5, 20), (1, 5))
    assert (m.schedule.way, m.schedule.query, m.test_episodes, m.ways) == (20, 15, 600, (5,))
    assert {"omniglot/paper", "omniglot/cpu", "miniimagenet/paper", "cifar_fs/paper", "cifar_fs/cpu"} <= set(FEWSHOT_RECIPES)
    weights = {r.name: [t.weight for t in r.terms] for r in o.rows}
    assert weights["RKD-D"] == [50.] and weights["RKD-DA"] == [25., 50.], "halved together"
    assert dict((row, a) for row, t, a, _ in o.quoted if t == "20-way 1-shot") == {"Teacher": 95.11, "RKD-D": 95.45, "RKD-DA": 95.52}
    assert ("Attention", "5-way 5-shot", 46.21, .70) in m.quoted
    for r in FEWSHOT_RECIPES.values():
        text = str(r)
        assert "\n" in text and all(n in text for n in r.row_names) and ("cut down" in text) == bool(r.cut) == ("cpu" in r.name)
    small = o.reduced(["RKD-DA"], [3], 500)
    assert small.name == "omniglot/paper-500episodes" and small.row_names == ["Teacher", "RKD-DA"] and small.seeds == (3,) and small.schedule.halve_every == 100 and "500 of 10,000" in small.cut


# --- comparing

def record(method, seed, hits, test_seed=0, queries=75):
    return {"method": method, "seed": seed, "shot": 1, "last": 50., "row": f"{method}/1-shot", "tests": {"5-way 1-shot": {"hits": " ".join(map(str, hits)), "queries": queries, "accuracy": 100 * np.mean(hits) / queries, "interval": 1.}},
            "protocol": {"seed": seed, "tests": [{"way": 5, "shot": 1, "query": 15, "episodes": len(hits), "seed": test_seed}]}}


def test_paired_differences_by_hand():
    a = [record("A", 0, [60, 75, 45, 30]), record("A", 1, [75, 75, 60, 30])]
    b = [record("B", 0, [45, 60, 45, 30]), record("B", 1, [60, 75, 45, 15]), record("B", 2, [1, 2, 3, 4])]
    c = fs.compare(a + b, "A", "B", "5-way 1-shot")
    d = np.array([[20, 20, 0, 0], [20, 0, 20, 20]])                                  # points
    assert c["seeds"] == 2 and c["difference"] == pytest.approx(12.5)
    per_episode = d.mean(0)
    assert c["over_episodes"] == pytest.approx(1.96 * per_episode.std(ddof=1) / 2) and c["deviation"] == pytest.approx(per_episode.std(ddof=1))
    assert c["over_seeds"] == pytest.approx(12.7062 * np.std([10, 15], ddof=1) / 2**.5, rel=1e-4)
    assert c["needed"] == math.ceil((2.8 * c["deviation"] / 12.5)**2)
    assert fs.compare(a, "A", "B", "5-way 1-shot") == {} and fs.compare(a + b, "A", "B", "20-way 1-shot") == {}


def test_the_number_of_episodes_that_is_needed_is_enough():
    rng = np.random.default_rng(0)
    n = fs.episodes_needed(1., 8.)
    assert n == 502 and fs.episodes_needed(-1., 8.) == n and fs.episodes_needed(0., 8.) == math.inf
    excluded = 0
    for _ in range(400):
        mean, half = fs.interval(rng.normal(1., 8., n))
        excluded += mean - half > 0
    assert .74 < excluded / 400 < .86, "80 % of all experiments"


# --- pictures

def test_the_plane_is_a_projection_and_is_only_turned():
    z = torch.randn(20, 6, generator=gen(), dtype=torch.float64) * torch.tensor([5., 3, 1, 1, .1, .1])
    xy = fs.plane(z)
    var = torch.linalg.eigvalsh(z.T.cov()).flip(0)[:2]
    assert torch.allclose(xy.var(0), var) and torch.allclose(xy.mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-12)
    R = torch.tensor([[0., 1], [1, 0]], dtype=torch.float64)
    assert torch.allclose(fs.plane(z, like=xy @ R), xy @ R, atol=1e-9)
    clouds = {"a": z.view(4, 5, 6), "b": z.view(4, 5, 6) * 3}
    assert len(fs.episode_figure(clouds, 2).axes) == 2 and "correlation 1.00" in fs.distances_figure(clouds).axes[1].get_title()


# --- what is refused

def small_set(splits, labels=(0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3), classes=("a", "b", "c", "d")):
    labels = torch.tensor(labels)
    return Dataset("own", torch.zeros(len(labels), 1, 28, 28, dtype=torch.uint8), labels, splits, classes)


GOOD = {"train": (0, 1), "val": (2,), "test": (3,)}


@pytest.mark.parametrize("call, message", [
    (lambda d: Episodes(d, "train", 2, 2, 2, 0), "2 shots and 2 queries need 4 images of every class; class 'a' of the train classes of own has 3"),
    (lambda d: Episodes(d, "train", 3, 1, 1, 0), "3-way episodes need 3 classes; the train classes of own have 2"),
    (lambda d: Episodes(d, "dev", 2, 1, 1, 0), "unknown split of own 'dev'"),
    (lambda d: Episodes(d, "train", 1, 1, 1, 0), "at least 2 ways, 1 shot and 1 query; got way = 1"),
    (lambda d: Episodes(d, "train", 2, 1, 0, 0), "got way = 2, shot = 1, query = 0"),
    (lambda d: Episodes(small_set({**GOOD, "test": (7,)}), "train", 2, 1, 1, 0), "split 'test' of own names an unknown class 7: classes are numbered from 0 to 3"),
    (lambda d: Episodes(small_set({**GOOD, "test": ("d",)}), "train", 2, 1, 1, 0), "split 'test' of own names an unknown class 'd'"),
    (lambda d: Episodes(small_set({**GOOD, "test": (4,)}, classes=tuple("abcde")), "train", 2, 1, 1, 0), "class 'e' in split 'test' of own has no image"),
    (lambda d: small_set({**GOOD, "test": (3, 1)}), "the splits of own share class 'b'"),
    (lambda d: d.with_splits({"train": ["a", "b"], "val": ["c"], "test": ["dd"]}), "unknown class of own 'dd': did you mean 'd'"),
    (lambda d: d.with_splits({"train": ["a", "b"], "val": ["c"], "test": ["d", "a"]}), "the splits of own share class 'a'"),
    (lambda d: d.with_splits({"train": ["a", "b"], "val": ["c"]}), "own has no class in split 'test'"),
    (lambda d: fs.run_trials(create("conv4", 0, 1), d, "test", [Trial(2, 1, 1, 5)]), "2-way episodes need 2 classes; the test classes of own have 1"),
    (lambda d: fs.episode_logits(torch.zeros(3, 4), 1), r"an episode is \(..., way, shot \+ query, D\)"),
    (lambda d: fs.episode_logits(torch.zeros(3, 2, 4), 2), "at least 1 shot and 1 query; got .3, 2, 4. and shot = 2"),
    (lambda d: EpisodeSchedule(150), "training takes a multiple of 100 episodes; got 150"),
    (lambda d: EpisodeSchedule(0), "got 0"),
    (lambda d: TOY.reduced(rows=["RKD-AD"]), "unknown row of toy 'RKD-AD': did you mean 'RKD-D'"),
    (lambda d: TOY.reduced(seeds=[]), "seeds are whole numbers from 0"),
    (lambda d: TOY.reduced(shots=[3]), "toy has the shots 1, 2; got .3."),
    (lambda d: fs.compare([record("A", 0, [1, 2]), record("B", 0, [1, 2], 5)], "A", "B", "5-way 1-shot"), "tested on different 5-way 1-shot episodes"),
    (lambda d: fs.trained(TOY, "SP", 1, 0, "/nowhere"), "no records of 'toy'"),
])
def test_errors_are_one_line(call, message):
    with pytest.raises(ValueError, match=message) as e:
        call(small_set(GOOD))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("change, message", [
    ({"shots": (7,)}, "7 shots and 2 queries need 9 images of every class; class 'Latin/character00/rot000' of the train classes of omniglot has 8"),
    ({"ways": (2, 9)}, "9-way episodes need 9 classes; the test classes of omniglot have 8"),
    ({"test_query": 8}, "1 shot and 8 queries need 9 images of every class; class 'Hebrew/character00/rot000' of the val classes of omniglot has 8"),
    ({"network": "resnet9"}, "unknown network .resnet9.: did you mean .resnet8."),
    ({"rows": (Row("typo", (Term("SP", 1., "layer5", "layer4"),)),)}, "unknown layer of Conv4 'layer5'"),
])
def test_nothing_is_trained_if_the_recipe_does_not_fit_the_data(root, tmp_path, change, message, monkeypatch):
    monkeypatch.setattr(fs, "fit", lambda *a, **k: pytest.fail("training started"))
    with pytest.raises(ValueError, match=message):
        fs.run(replace(TOY, **change), tmp_path, "cpu", root=root)


def test_records_of_two_protocols_are_not_mixed(done, tmp_path):
    from relkd.records import write_record

    for r in done[1]:
        write_record(tmp_path, {**r, "protocol": {**r["protocol"], "network": "conv5"}} if (r["row"], r["seed"]) == ("RKD-D/1-shot", 1) else r)
    with pytest.raises(ValueError, match="records of row 'RKD-D/1-shot' come from different protocols"):
        fs.summary(TOY, tmp_path)


def test_a_classification_set_is_not_a_few_shot_set(tmp_path):
    with pytest.raises(ValueError, match="toy needs data that are split by class; digits is split by samples: choose classes with Dataset.with_splits"):
        fs.run(replace(TOY, data="digits"), tmp_path, "cpu")
