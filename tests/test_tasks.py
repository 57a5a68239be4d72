"""Tasks: what is read, learned and tested; prototypes and episodes of few-shot learning against loops; top-1."""
import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_helpers import REAL, one_line
from helpers import Tiny, few_digits, gen, split_digits
from relkd.data import by_class, draw_episodes, episode_labels, load
from relkd.distill import Row
from relkd.models import create
from relkd.recipes.omniglot import omniglot_paper
from relkd.tables.recipe import recipe
from relkd.tasks.classify import Classify, accuracy, evaluate
from relkd.tasks.fewshot import FewShot, Trial, embed, episode_hits, episode_logits, interval, prototypical_loss, run_trials
from relkd.tasks.retrieval import Retrieval
from relkd.tasks.task import Task
from relkd.train import Learner, Schedule, fit

SMALL = FewShot(shot=1, way=3, query=2, length=4, ways=(2,), test_query=3, test_episodes=20)
SEARCH = Retrieval(size=4, images=5, length=2, look=True)


# --- the contract

@pytest.mark.parametrize("task, data", [(Classify(labelled=5), few_digits), (SMALL, split_digits), (SEARCH, split_digits)])
def test_every_task_gives_the_same_five_answers(task, data):
    data, plan = data(), Schedule(1, 25)
    task.check(data)
    task.for_teacher().check(data)
    stream = task.stream(data, plan, 3, teacher=False)
    index, x, y = next(stream.epoch(0))
    assert len(index) == len(x) == stream.batch_size and all(a.equal(b) for a, b in zip(next(stream.epoch(0)), (index, x, y)))
    net = create(lambda outputs, channels: Tiny(outputs), task.outputs(data), data.channels)
    loss = task.loss(task.read(net(x)), y)
    loss.backward()
    assert loss.dim() == 0 and net.conv.weight.grad.abs().sum() > 0
    modes = [m.training for m in net.modules()]
    seen, tests = task.watch(net, data), task.test(net, data)
    assert set(seen) == {task.watched} and task.headline in tests and all(0 <= t["accuracy"] <= 100 for t in tests.values())
    assert modes == [m.training for m in net.modules()] and task.watch(net, data) == seen and task.test(net, data) == tests
    json.dumps(tests)
    assert hash(task) == hash(replace(task)) and all(f.type is not None for f in fields(task))


def test_what_is_watched_is_called_accuracy_only_if_it_is_of_the_test_set():
    net = create("resnet8x0.5", None, 1)
    assert Classify().watched == "accuracy" and Classify().headline == "top-1"
    assert SMALL.watched == "validation" and set(SMALL.watch(net, split_digits())) == {"validation"} and SMALL.headline == "2-way 1-shot"
    assert SMALL.watch(net, split_digits())["validation"] == round(
        100 * run_trials(net, split_digits(), "val", [Trial(2, 1, 3, 5, seed=1)])[0].double().mean().item() / 6, 4)


def test_a_task_without_a_stream_says_so():
    with pytest.raises(NotImplementedError, match="this task has no stream of its own: pass one to fit"):
        Task().stream(few_digits(), Schedule(), 0, False)
    assert Task().loss(torch.zeros(2, 4).half(), torch.tensor([0, 1])).item() == pytest.approx(math.log(4))


# --- classification

@settings(max_examples=30)
@given(st.integers(1, 8), st.integers(2, 6), st.integers(0, 10**6))
def test_accuracy_equals_a_loop(n, classes, seed):
    g = gen(seed)
    logits, y = torch.randn(n, classes, generator=g), torch.randint(classes, (n,), generator=g)
    for k, got in zip(range(1, classes + 1), accuracy(logits, y, tuple(range(1, classes + 1)))):
        assert got == pytest.approx(100 * sum(t in row.argsort(descending=True)[:k] for row, t in zip(logits, y)) / n)


def test_evaluation_does_not_depend_on_the_batch_size_nor_on_precision_around_it():
    data, net = few_digits(), create("resnet8", 10, 1)
    net.layer1.eval()
    assert evaluate(net, data, 7) == evaluate(net, data, 60) and net.training and not net.layer1.training


def test_the_teacher_sees_all_images_and_students_the_labelled_ones():
    data, task = few_digits(), Classify(labelled=3)
    few, other = (task.stream(data, Schedule(1, 25), 0, teacher=False, draw=d) for d in (0, 1))
    assert (len(few.labels) == 30 and len(task.stream(data, Schedule(1, 25), 0, teacher=True).labels) == 150
            and not few.index.equal(other.index))
    assert few.labels.bincount().tolist() == [3] * 10


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
    assert abs(prototypical_loss(z, shot).item() - value) < tolerance and episode_hits(z, shot).item() == right
    assert torch.allclose(episode_logits(z, shot), -torch.cdist(z[:, shot:].flatten(0, 1), z[:, :shot].mean(1))**2, atol=1e-4)
    task = FewShot(shot=shot, way=way, query=query)
    assert task.loss(task.read(z.flatten(0, 1)), episode_labels(way, query)).item() == pytest.approx(value, abs=1e-5)


def test_many_episodes_at_once_equal_one_at_a_time():
    z = torch.randn(6, 3, 4, 5, generator=gen())
    assert torch.allclose(episode_logits(z, 2), torch.stack([episode_logits(e, 2) for e in z]), atol=1e-5)
    assert episode_hits(z, 2).tolist() == [episode_hits(e, 2).item() for e in z]


def test_gradient_invariance_and_precision():
    z = torch.randn(3, 4, 5, generator=gen(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: prototypical_loss(z, 2), z)
    exact, far = prototypical_loss(z, 2), (z.detach() + 1000).float()
    assert abs(prototypical_loss(far, 2) - prototypical_loss(far.double(), 2)) < 1e-3, "the origin is moved before anything cancels"
    for dtype in (torch.float16, torch.bfloat16):
        half = z.detach().to(dtype).requires_grad_()
        value = prototypical_loss(half, 2)
        value.backward()
        assert value.dtype == torch.float32 and half.grad.isfinite().all() and abs(value - exact) < .1
    with torch.autocast("cpu", torch.bfloat16):
        inside = episode_logits(z.detach().float(), 2)
    assert inside.dtype == torch.float32 and inside.equal(episode_logits(z.detach().float(), 2))
    zero = torch.zeros(3, 4, 5, requires_grad=True)
    prototypical_loss(zero, 2).backward()
    assert zero.grad.abs().max() == 0


# --- trials

def test_embedding_once_equals_every_episode_by_itself():
    data, trial = split_digits(), Trial(2, 2, 4, episodes=25, seed=9)
    net = create("resnet8x0.5", None, 1, seed=3)
    with torch.no_grad():
        net(torch.randn(64, 1, 8, 8, generator=gen()))                               # running statistics of its own
    once, = run_trials(net, data, "test", [trial])
    assert net.training and once.shape == (25,)
    images, labels = data.split("test")
    net.eval()
    with torch.no_grad():
        drawn = draw_episodes(by_class(labels), 2, 2, 4, 25, gen(9))
        alone = [episode_hits(net(data.normalise(images[e.flatten()])).unflatten(0, (2, 6)), 2).item() for e in drawn]
        assert torch.allclose(embed(net, data, images, 7), embed(net, data, images), atol=1e-5)
    assert once.tolist() == alone


def test_the_tests_of_a_task_are_counted_in_episodes():
    net = create("resnet8x0.5", None, 1, seed=3)
    found = SMALL.test(net, split_digits())["2-way 1-shot"]
    hits = torch.tensor([int(h) for h in found["hits"].split()]).double()
    assert (found["queries"], found["episodes"], len(hits)) == (6, 20, 20) and found["accuracy"] == pytest.approx(
        100 * hits.mean().item() / 6, abs=1e-3)
    assert (interval(100 * hits / 6)
            == (pytest.approx(found["accuracy"], abs=1e-3), pytest.approx(1.96 * (100 * hits / 6).std().item() / 20**.5))
            and found["interval"] == pytest.approx(interval(100 * hits / 6)[1], abs=1e-3))


def test_a_network_learns_from_episodes():
    task = replace(SMALL, way=4, query=3, length=20, test_episodes=200)
    l = Learner(create("resnet8x0.5", None, 1, seed=1), Row("plain"),
                Schedule(3, None, 1e-2, milestones=(), optimiser="Adam", weight_decay=0.), task=task)
    fit([l], task.stream(split_digits(), l.schedule, 1), 3, data=split_digits())
    assert l.epochs[-1]["loss"] < .8 * l.epochs[0]["loss"] and l.epochs[-1]["validation"] > 60


def test_records_are_small():
    hits = {t.name: {"hits": " ".join(["300"] * t.episodes)} for t in replace(omniglot_paper.task, shot=5).trials}
    epochs = [{"epoch": k, "loss": 12.345678, "validation": 98.7654} for k in range(omniglot_paper.schedule.epochs)]
    assert len(json.dumps(hits)) + len(json.dumps(epochs)) < 30_000


# --- what is refused

@pytest.mark.parametrize("call, message", [
    (lambda: Classify().check(split_digits()), "data set 'digits' is split by classes"),
    (lambda: Classify(labelled=10**4).check(few_digits()), "10000 of each class were asked for"),
    (lambda: SMALL.check(few_digits()), "data set 'few' has train and test images of the same classes"),
    (lambda: replace(SMALL, way=7).check(split_digits()), "7-way episodes need 7 classes; the train classes of digits have 6"),
    (lambda: replace(SMALL, ways=(2, 9)).check(split_digits()), "9-way episodes need 9 classes; the test classes of digits have 2"),
    (lambda: replace(SMALL, shot=500).check(split_digits()), "500 shots and 2 queries need 502 images of every class"),
    (lambda: replace(SMALL, test_query=500).check(split_digits()),
     "1 shot and 500 queries need 501 images of every class; class '7' of the val classes of digits"),
    (lambda: run_trials(Tiny(None), split_digits(), "test", [Trial(3, 1, 1, 5)]),
     "3-way episodes need 3 classes; the test classes of digits have 2"),
    (lambda: episode_logits(torch.zeros(3, 4), 1), "an episode is (..., way, shot + query, D)"),
    (lambda: episode_logits(torch.zeros(3, 2, 4), 2), "at least 1 shot and 1 query; got (3, 2, 4) and shot = 2"),
    (lambda: accuracy(torch.zeros(3), torch.zeros(3)), "accuracy needs logits (N, C)"),
    (lambda: accuracy(torch.zeros(3, 2), torch.zeros(3), (3,)), "accuracy needs k from 1 to the 2 classes"),
])
def test_errors_are_one_line(call, message):
    one_line(call, message)


@pytest.mark.parametrize("name", ["omniglot", "cifar_fs", "fc100"])
def test_the_real_data_allow_the_recipes(name):
    if not (Path(REAL) / ("omniglot" if name == "omniglot" else "cifar100")).is_dir():
        pytest.skip(f"{name} is not here")
    data = load(name, REAL)
    for r in (recipe(n) for n in ("omniglot/paper", "omniglot/cpu", "cifar_fs/paper", "cifar_fs/cpu", "fc100/paper")):
        if r.data == name:
            for task in r.tasks:
                task.check(data)
    if name == "omniglot":
        one_line(lambda: replace(omniglot_paper.task, shot=5, test_query=16).check(data),
                 "5 shots and 16 queries need 21 images of every class")
