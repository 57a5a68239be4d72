"""A GPU's dress rehearsal without one: 'meta' stands for the card.
A value asked for, a mask as an index, a mixed device, a copy in a step: each raises."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from relkd.catalogue import known_recipes
from relkd.distill import Look
from relkd.features import Features
from relkd.losses import angle
from relkd.models import create
from relkd.models.imagenet import ImageNet
from relkd.tables.recipe import recipe
from relkd.tasks.fewshot import FewShot
from relkd.tasks.retrieval import Retrieval
from relkd.train import Learner


class Card(TorchDispatchMode):
    "Refuses what would wait for the card or mix it with the host."

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        copies, to = f._schema.name in ("aten::_to_copy", "aten::copy_"), (kwargs or {}).get("device")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        seen = [t.device for t in tensors if t.dim() or t.is_meta or copies]
        mixed = {*seen, to or seen[0]} if copies else {*seen}
        assert len(mixed) < 2, f"{f} has tensors on {seen}, to go to {to}"
        if "index_put" in f._schema.name:
            assert not any(t.dtype == torch.bool for t in args[1] if t is not None), f"{f}: a mask as an index waits"
        return f(*args, **(kwargs or {}))


class Half(TorchFunctionMode):
    "What autocast does on a card to what these networks use."

    def __torch_function__(self, f, types, args=(), kwargs=None):
        if f in (F.conv2d, F.linear, torch.conv2d):
            args = tuple(a.bfloat16() if isinstance(a, torch.Tensor) else a for a in args)
        return f(*args, **(kwargs or {}))


class Fabric:
    world_size, autocast, backward = 1, staticmethod(Half), staticmethod(torch.Tensor.backward)


@pytest.fixture
def card(monkeypatch):
    enabled, SGD, Adam = torch.is_autocast_enabled, torch.optim.SGD, torch.optim.Adam

    def cube(q, z, anchors, rough):
        return q.new_zeros(()), torch.zeros_like(q), *q.new_zeros(2, len(anchors), len(q))

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: t.is_meta), raising=False)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": kind != "meta" and enabled(kind))
    monkeypatch.setattr(torch.optim, "SGD", lambda p, fused, **o: SGD(p, **o))                # 'meta' has no fused kernel
    monkeypatch.setattr(torch.optim, "Adam", lambda p, fused, **o: Adam(p, **o))
    monkeypatch.setattr(angle, "_on_gpu", cube)
    return monkeypatch


SIZES = {"digits": (1, 8), "omniglot": (1, 28), "miniimagenet": (3, 84)}
LIKE_OTHERS = ("bf16", "nearest", "fast", "fc100/paper", "metric/cub", "metric/cars", "gen1", "gen2", "omniglot-5", "-start", "-sizes",
               "tinyimagenet/cpu", "tinyimagenet/paper", "digits/balanced", "metric/omniglot", "cifar100/losses", "crd-vgg",
               "metric/sop", "digits/losses", "weights-classification", "weights-retrieval", "cifar_fs/paper")


def untrained(network, outputs, channels):
    "A network on the card, without weights that would have to be fetched or drawn."
    with torch.device("meta"):
        return create(replace(network, pretrained=False) if isinstance(network, ImageNet) else network, outputs, channels)


@pytest.mark.parametrize("name", known_recipes())
def test_every_rows_step_stays_on_the_card(card, name, flags):
    if name.endswith(LIKE_OTHERS) and "slow" not in flags:
        pytest.skip("the terms of another recipe: --flags slow")
    if name.startswith("text/"):
        pytest.skip("texts are no images, and how many pieces a batch has is asked for once a step")
    r = recipe(name)
    task, (c, size) = r.tasks[0], SIZES.get("omniglot" if "omniglot" in name else r.data, (3, 32))
    data = type("Data", (), {"classes": range(10)})
    few_shot, search = isinstance(task, FewShot), isinstance(task, Retrieval)
    images, answers = (12, 6) if few_shot else (16, 16)
    if few_shot:
        task = FewShot(shot=1, way=6, query=1)
    if search:
        task = replace(task, images=2)
    tasks, of_teacher = [row.learns(task) for row in r.rows], task.for_teacher()
    x, y, index = (torch.zeros(images, c, size, size, device="meta"), torch.arange(answers) // (2 if search else 1) % 10,
                   torch.arange(images))
    learners = [Learner(untrained(r.student, t.outputs(data), c).to(memory_format=torch.channels_last), row, r.schedule, 0, t)
                for t, row in zip(tasks, r.rows)]
    layers = [n for l in learners for n in l.objective.teacher_layers]
    read = Features(untrained(r.teacher, of_teacher.outputs(data), c).eval().requires_grad_(False), layers)
    with torch.no_grad(), Half():
        seen = read(x)
    for l in learners:
        l.build(x, Look(seen, of_teacher), torch.arange(images) % 10)
        l.objective._numbers.update(dict.fromkeys(l.objective.measured, 1.))           # as if they had been measured
    y, index = y.to("meta"), index.to("meta")
    made = torch.tensor

    def on_the_host(*args, device=None, **kw):
        assert torch.device(device or "cpu").type != "meta", "torch.tensor(..., device=) is a copy and a wait"
        return made(*args, device=device, **kw)

    card.setattr(torch, "tensor", on_the_host)
    with Card():
        look = Look(seen, of_teacher)
        for l in learners:
            for stage in [*range(len(l.row.before)), None]:
                for number in range(2):
                    l.step(Fabric, 0., number, x, look, y, index)
                if stage is not None:
                    l.end_stage()


def test_the_rehearsal_sees_a_read_back(card):
    with Card(), pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(3, device="meta").sum().item()
    with Card(), pytest.raises(AssertionError):
        torch.ones(3, device="meta") + torch.ones(3)
