"""A teacher from anywhere: the forms and names that circulate, what it was fed, and whether it is as good here as stated."""
import argparse
import re
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_says, few_digits, toy
from torch import nn

from relkd.models import create, load, load_into, weights_hash
from relkd.models.names import NAMES, candidates, fitted
from relkd.models.weights import Opened, opened
from relkd.tables.run import run, trained
from relkd.tables.teacher import INPUTS, TeacherFile, begun, check, fed
from relkd.tasks.classify import evaluate
from relkd.train import Session


def network(name="resnet8", classes=10, channels=3, seed=3):
    """With statistics of BN that are not the initial ones."""
    net, g = create(name, classes, channels, seed), torch.Generator().manual_seed(seed)
    for k, v in net.state_dict().items():
        if k.endswith("running_mean"):
            v.copy_(.1 * torch.randn(v.shape, generator=g))
        if k.endswith("running_var"):
            v.copy_(.5 + torch.rand(v.shape, generator=g))
    return net.eval()


def images(n=4, size=32, channels=3):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0))


def prefixed(before, sd):
    return OrderedDict((before + k, v) for k, v in sd.items())


def cast(dtype, sd):
    return OrderedDict((k, v.to(dtype) if v.is_floating_point() else v) for k, v in sd.items())


# --- the files that circulate: each is written as its owner's script writes it

class Whole(nn.Module):
    """Stands for a class of somebody's repository, pickled whole."""
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def on_cuda(path):
    with zipfile.ZipFile(path) as z:
        entries = {i.filename: z.read(i) for i in z.infolist()}
    with zipfile.ZipFile(path, "w") as z:
        for name, content in entries.items():
            z.writestr(name, content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0") if name.endswith("data.pkl") else content)


def circulating():
    """Pairs (name, what is saved of a state dict); the names are those of RepDistiller's networks."""
    def zero(sd):
        return {k: v * 0 if v.is_floating_point() else v for k, v in sd.items()}

    def opt(sd):
        return torch.optim.SGD([v for v in map(nn.Parameter, (t for t in sd.values() if t.is_floating_point()))], .1,
                               momentum=.9).state_dict()

    yield "bare.pth", lambda sd: sd
    yield "ckpt_epoch_240.pth", lambda sd: {"epoch": 240, "model": sd, "accuracy": torch.tensor([79.42]), "optimizer": opt(sd)}
    yield "resnet8_best.pth", lambda sd: {"epoch": 200, "model": sd, "best_acc": torch.tensor([79.5])}
    yield "resnet8_last.pth", lambda sd: {"opt": argparse.Namespace(model="resnet8", lr=.05, lr_decay_epochs=[150]),
                                          "model": sd, "optimizer": opt(sd)}
    yield "numpy_acc.pth", lambda sd: {"model": sd, "best_acc": np.float64(79.4), "lr": np.float32(.1), "history": np.arange(3.)}
    yield "student_best", lambda sd: {"model": sd}
    yield "best", lambda sd: {"epoch": 240, "model": {**prefixed("module.student.", sd), **prefixed(
        "module.teacher.", zero(sd))}, "best_acc": torch.tensor([70.])}
    yield "checkpoint.pth.tar", lambda sd: {"epoch": 164, "state_dict": prefixed("module.", sd), "acc": 70.,
                                            "best_acc": 71., "optimizer": opt(sd)}
    yield "ckpt.t7", lambda sd: {"net": prefixed("module.", sd), "acc": 95.1, "epoch": 199}
    yield "compiled.pth", lambda sd: prefixed("_orig_mod.", sd)
    yield "compiled_ddp.pth", lambda sd: {"model": prefixed("_orig_mod.module.", sd)}
    yield "last.ckpt", lambda sd: {"epoch": 99, "pytorch-lightning_version": "2.4.0", "state_dict": {**prefixed(
        "model.", sd), "criterion.weight": torch.ones(10)}, "loops": {}, "hyper_parameters": {"lr": .1}}
    yield "last_hparams.ckpt", lambda sd: {"state_dict": prefixed("net.", sd), "hyper_parameters": argparse.Namespace(lr=.1)}
    yield "model_best.pth.tar", lambda sd: {"arch": "resnet8", "state_dict": zero(sd), "state_dict_ema": sd,
                                            "args": argparse.Namespace(model="resnet8"), "metric": 79.4}
    yield "swa.pth", lambda sd: {"n_averaged": torch.tensor(20), **prefixed("module.", sd)}
    yield "thop.pth", lambda sd: {**sd, "total_ops": torch.zeros(1), "layer1.total_params": torch.zeros(1)}
    yield "half.pth", lambda sd: cast(torch.half, sd)
    yield "bf16.pth", lambda sd: cast(torch.bfloat16, sd)
    yield "double.pth", lambda sd: cast(torch.double, sd)
    yield "old.pth", lambda sd: {k: v for k, v in sd.items() if "num_batches" not in k}
    yield "parameters.pth", lambda sd: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in sd.items()}


CIRCULATING = dict(circulating())


def theirs(net):
    return OrderedDict((k.replace(".shortcut.", ".downsample."), v) for k, v in net.state_dict().items())


@pytest.mark.parametrize("name", CIRCULATING)
def test_a_checkpoint_that_circulates_is_read(tmp_path, name):
    net, x = network(), images()
    for k in ({}, {"_use_new_zipfile_serialization": False}) if name in ("bare.pth", "old.pth") else ({},):
        torch.save(CIRCULATING[name](theirs(net)), tmp_path / name, **k)
        got, wanted = load_into(create("resnet8", 10), tmp_path / name).eval()(x), net(x)
        room = {"half.pth": 1e-3, "bf16.pth": 1e-2}.get(name, 0.)
        assert (got - wanted).abs().max() <= room * wanted.abs().max()


def test_safetensors_under_any_name_and_a_file_from_a_gpu(tmp_path):
    from safetensors.torch import save_file

    net = network()
    for name in ("model.safetensors", "model.pth"):
        save_file({k: v.contiguous() for k, v in theirs(net).items()}, tmp_path / name, {"format": "pt"})
    torch.save({"model": theirs(net)}, tmp_path / "cuda.pth")
    on_cuda(tmp_path / "cuda.pth")
    for name in ("model.safetensors", "model.pth", "cuda.pth"):
        assert weights_hash(load_into(create("resnet8", 10), tmp_path / name).state_dict()) == weights_hash(net.state_dict())


REFUSED = {
    "list.pth": (lambda n, d: list(theirs(n).items()), "holds no tensors by name"),
    "classes1000.pth": (lambda n, d: theirs(network("resnet8", 1000)), "its classifier has 1000 classes, not 10"),
    "resnet20.pth": (lambda n, d: theirs(network("resnet20")),
                     "does not fit this ResNetCifar .layer1.1.conv1.weight has no place; .* and fits resnet20"),
    "whole.pth": (lambda n, d: n, "it holds relkd.models.networks.ResNetCifar beside tensors"),
    "whole_other.pth": (lambda n, d: {"model": Whole()}, "it holds test_teacher.Whole beside tensors"),
    "evil.pth": (lambda n, d: {"model": theirs(n), "x": Evil(d / "EXECUTED")}, "beside tensors, and making that could run code"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_that_is_none_is_refused_in_one_line(tmp_path, name):
    make, message = REFUSED[name]
    torch.save(make(network(), tmp_path), tmp_path / name)
    assert_says(lambda: load_into(create("resnet8", 10), tmp_path / name), re.escape(str(tmp_path / name)) + ".*" + message)
    assert not (tmp_path / "EXECUTED").exists()


# --- names: each repository's own, written down from its code

def as_repdistiller_vgg(k):
    k = re.sub(r"^layer(\d)\.(conv|bn)(\d)", lambda m: f"block{int(m[1]) - 1}.{3 * int(m[3]) - 3 + (m[2] == 'bn')}", k)
    return k.replace("fc.", "classifier.")


def as_repdistiller_mobilenet(k):
    if m := re.match(r"^layer(\d)\.(\d+)\.(conv|bn)(\d)\.(.*)", k):
        first = {1: (0, 1), 2: (2,), 3: (3, 4), 4: (5, 6)}[int(m[1])]
        sizes, b = (1, 2, 3, 4, 3, 3, 1), int(m[2])
        group = first[0] if b < sizes[first[0]] else first[1]
        b -= 0 if group == first[0] else sizes[first[0]]
        return f"blocks.{group}.{b}.conv.{3 * int(m[4]) - 3 + (m[3] == 'bn')}.{m[5]}"
    return re.sub(r"^bn(\d)", r"conv\1.1", re.sub(r"^conv(\d)", r"conv\1.0", k)).replace("fc.", "classifier.0.")


def as_repdistiller_shufflenetv2(k):
    if m := re.match(r"^(layer\d)\.(\d+)\.branch(\d)\.(\d)\.(.*)", k):
        first, order = m[2] == "0", {(1, 0): 1, (1, 2): 2, (2, 0): 1, (2, 3): 2, (2, 5): 3}
        bn = (int(m[3]), int(m[4])) not in order
        n = order[int(m[3]), int(m[4]) - bn] + (2 if first and m[3] == "2" else 0)
        return f"{m[1]}.{m[2]}.{'bn' if bn else 'conv'}{n}.{m[5]}"
    return k.replace("fc.", "linear.")


def as_weiaicunzai(k):
    k = re.sub(r"^layer(\d)", lambda m: f"conv{int(m[1]) + 1}_x", k)
    k = re.sub(r"\.(conv|bn)(\d)\.", lambda m: f".residual_function.{3 * int(m[2]) - 3 + (m[1] == 'bn')}.", k)
    return re.sub(r"^bn1", "conv1.1", re.sub(r"^conv1\.", "conv1.0.", k))


LARGE = ("resnet50", "resnet101", "resnet110", "wrn_40_2", "vgg11")
REPOSITORIES = [
    ("RepDistiller resnet", "resnet8x4", lambda k: k.replace("shortcut", "downsample")),
    ("kuangliu resnet", "resnet18", lambda k: k.replace("fc.", "linear.")),
    ("kuangliu resnet", "resnet50", lambda k: k.replace("fc.", "linear.")),
    ("kuangliu resnet", "shufflenetv1", lambda k: k.replace("fc.", "linear.")),
    ("weiaicunzai resnet", "resnet18", as_weiaicunzai),
    ("weiaicunzai resnet", "resnet50", as_weiaicunzai),
    ("RepDistiller wrn", "wrn_16_2", lambda k: re.sub(r"^layer(\d)\.", r"block\1.layer.", k).replace("shortcut", "convShortcut")),
    ("RepDistiller resnet", "resnet110", lambda k: k.replace("shortcut", "downsample")),
    ("kuangliu resnet", "resnet101", lambda k: k.replace("fc.", "linear.")),
    ("RepDistiller wrn", "wrn_40_2", lambda k: re.sub(r"^layer(\d)\.", r"block\1.layer.", k).replace("shortcut", "convShortcut")),
    ("RepDistiller vgg", "vgg11", as_repdistiller_vgg),
    ("RepDistiller vgg", "vgg8", as_repdistiller_vgg),
    ("RepDistiller vgg", "vgg13", as_repdistiller_vgg),
    ("RepDistiller mobilenetv2", "mobilenetv2", as_repdistiller_mobilenet),
    ("RepDistiller shufflenetv2", "shufflenetv2", as_repdistiller_shufflenetv2),
]


@pytest.mark.parametrize("whose, name, rename", REPOSITORIES, ids=lambda v: v if isinstance(v, str) else "")
def test_the_names_of_a_repository_become_ours(whose, name, rename, flags):
    if name in LARGE and "slow" not in flags:
        pytest.skip("a large network: --flags slow")
    sd = create(name, 7, seed=3).state_dict()
    for k, v in sd.items():
        if v.is_floating_point():
            v += .01 * torch.rand(v.shape, generator=torch.Generator().manual_seed(len(k)))
    renamed = {rename(k): v for k, v in sd.items()}
    assert len(renamed) == len(sd) and set(renamed) != set(sd)
    fit = fitted(Opened("x.pth", prefixed("module.", renamed)), create(name, 7))
    assert (fit.whose, fit.prefix) == (whose, "module.") and all(fit.tensors[k].equal(v) for k, v in sd.items())
    in_any_order = {k: renamed[k] for k in sorted(renamed)}                             # as safetensors keeps them
    again = fitted(Opened("x.pth", in_any_order), create(name, 7)).tensors
    assert all(again[k].equal(v) for k, v in sd.items())


def test_no_name_of_a_repository_is_left_out():
    """Lists written down from their code, so that the functions above are not only our own table read backwards."""
    assert as_repdistiller_vgg("layer3.bn2.weight") == "block2.4.weight" and as_repdistiller_vgg("layer1.conv1.bias") == "block0.0.bias"
    assert (as_repdistiller_mobilenet("layer1.2.conv3.weight") == "blocks.1.1.conv.6.weight"
            and as_repdistiller_mobilenet("layer4.3.bn1.bias") == "blocks.6.0.conv.1.bias")
    assert (as_repdistiller_mobilenet("bn2.weight") == "conv2.1.weight"
            and as_repdistiller_shufflenetv2("layer1.0.branch2.5.weight") == "layer1.0.conv5.weight")
    assert (as_repdistiller_shufflenetv2("layer2.3.branch2.4.bias") == "layer2.3.bn2.bias"
            and as_weiaicunzai("layer1.0.bn2.weight") == "conv2_x.0.residual_function.4.weight")
    assert {w for w, *_ in REPOSITORIES} | {"akamaster resnet", "torchvision resnet"} == set(NAMES)


class OptionA(nn.Module):
    """He et al.'s CIFAR ResNet whose shortcuts pad with zeros, with akamaster's names."""
    class Block(nn.Module):
        def __init__(self, cin, cout):
            super().__init__()
            stride = 1 if cin == cout else 2
            self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
            self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
            self.more = cout - cin

        def forward(self, x):
            out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return F.relu(out + (F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more // 2)) if self.more else x))

    def __init__(self, n, classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for k, (cin, cout) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            self.add_module(f"layer{k}", nn.Sequential(*(self.Block(cin if b == 0 else cout, cout) for b in range(n))))
        self.linear = nn.Linear(64, classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def test_shortcuts_without_weights(tmp_path):
    torch.manual_seed(0)
    net = OptionA(3, 10)
    with torch.no_grad():
        for _ in range(3):
            net(images(16))
    sd = {f"module.{k}": v for k, v in net.eval().state_dict().items() if "num_batches" not in k}
    torch.save({"state_dict": sd, "best_prec1": 91.73}, tmp_path / "model.th")
    got = load(tmp_path / "model.th", network="resnet20")
    with torch.no_grad():
        assert (got(images()) - net(images())).abs().max() < 1e-6 * net(images()).abs().max()
    assert candidates(opened(tmp_path / "model.th")) == ["resnet20"] and opened(tmp_path / "model.th").stated == ("best_prec1", 91.73)


# --- where the names fit and the function differs

def test_names_that_others_use_for_another_function_are_refused_unless_a_test_decides(tmp_path):
    sd = {k.replace("shortcut", "downsample"): v for k, v in network("resnet18").state_dict().items()}
    torch.save(sd, tmp_path / "resnet18.pt")
    assert_says(lambda: load_into(create("resnet18", 10), tmp_path / "resnet18.pt"),
                "fits by its names, but huyvnphan's networks .* max-pool behind the stem")
    load_into(create("resnet18", 10), tmp_path / "resnet18.pt", renames="torchvision resnet")


def test_a_vgg_of_repdistiller_is_ours_up_to_64_pixels_only(tmp_path):
    from relkd.tables.teacher import taken

    net = network("vgg8", 2)
    torch.save({as_repdistiller_vgg(k): v for k, v in net.state_dict().items()}, tmp_path / "vgg8.pth")
    for size, works in ((32, True), (64, True), (84, False)):
        class Data:
            name, images = "pictures", torch.zeros(1, 3, size, size)
        if works:
            taken(create("vgg8", 2), TeacherFile(tmp_path / "vgg8.pth"), Data)
        else:
            assert_says(lambda: taken(create("vgg8", 2), TeacherFile(tmp_path / "vgg8.pth"), Data), "up to 64 pixels, and pictures has 84")


# --- by its path

def test_load_takes_a_path_and_says_what_it_lacks(tmp_path):
    net = network("resnet14", 12)
    torch.save(theirs(net), tmp_path / "t.pth")
    got = load(str(tmp_path / "t.pth"), network="resnet14")
    assert got(images()).equal(net(images())) and not any(m.training for m in got.modules())
    assert_says(lambda: load(tmp_path / "t.pth"), "t.pth is a file of weights: name its network, .* by names and shapes it is resnet14")
    assert_says(lambda: load(tmp_path / "t.pth", network="resnet14", classes=10), "its classifier has 12 classes, not 10")
    assert_says(lambda: load(tmp_path / "none.pth", network="resnet14"), "cannot read .*none.pth")


# --- fed and tested

STRANGE = ((.5,), (.25,))


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """A network that some digits trained, fed by other means than their own, with what it then answers right."""
    torch.manual_seed(0)
    data, net = few_digits(), create("resnet8x0.5", 10, 1)
    opt = torch.optim.SGD(net.parameters(), .1, momentum=.9)
    shown = lambda x: (x.float() / 255 - .5) / .25
    for _ in range(30):
        loss = F.cross_entropy(net(shown(data.train_images)), data.train_labels)
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():
        right = 100 * (net.eval()(shown(data.test_images)).argmax(1) == data.test_labels).double().mean().item()
    path = tmp_path_factory.mktemp("strange") / "t.pth"
    torch.save({"model": theirs(net), "accuracy": right}, path)
    return path, right


def test_a_teacher_is_fed_as_it_was_trained(strange):
    path, right = strange
    data, net = few_digits(), load_into(create("resnet8x0.5", 10, 1), strange[0])
    names = [n for n, _ in net.named_modules()]
    other = evaluate(net, data)
    fed(net, TeacherFile(path, STRANGE), data)
    assert evaluate(net, data) == pytest.approx(right) and abs(other - right) > 5 and names == [n for n, _ in net.named_modules()]
    own = nn.Identity()
    assert fed(own, TeacherFile(path), data)(images()).equal(images()) and not own._forward_pre_hooks


@pytest.mark.parametrize("inputs, message", [
    ("kuangliu", "unknown inputs 'kuangliu': did you mean 'kuangliu cifar10'"),
    ("imagenet", "inputs need 1 means and 1 deviations above 0"),
    (((.5,), (0.,)), "inputs need 1 means and 1 deviations above 0"),
    ((.5, .25), "inputs are a name .* or .means, deviations. of the channels; got .0.5, 0.25."),
])
def test_inputs_that_cannot_be(inputs, message):
    assert_says(lambda: fed(nn.Identity(), TeacherFile("x", inputs), few_digits()), message)


def recipe_with(given, **change):
    return toy(teacher="resnet8x0.5", student="resnet8x0.5", rows=toy().rows[:2], teacher_weights=given, **change)


def session(tmp_path):
    return Session(out=tmp_path, device="cpu")


def test_a_recipe_with_a_teacher_from_elsewhere(strange, tmp_path):
    path, right = strange
    r = recipe_with(TeacherFile(str(path), STRANGE, right))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        records = run(r, session(tmp_path))
    teacher = next(x for x in records if x["row"] == "Teacher")
    assert teacher["last"] == pytest.approx(right) and teacher["protocol"]["weights"]["inputs"] == [[.5], [.25]]
    assert evaluate(trained(r, "Teacher", 0, session(tmp_path)), few_digits()) == pytest.approx(right)
    again = run(r, session(tmp_path))                                                  # from its checkpoint, fed as before
    assert [x["weights"] for x in again] == [x["weights"] for x in records]
    assert f"weights from {path}, fed as" in str(r)


def test_an_accuracy_that_is_not_the_one_stated(strange, tmp_path):
    path, right = strange
    assert_says(lambda: run(recipe_with(TeacherFile(path, STRANGE, right - 9)), session(tmp_path / "a")),
                "stated .as you stated.: name inputs=")
    assert not list((tmp_path / "a").glob("records/**/*.json"))
    with pytest.warns(UserWarning, match=f"{right:.2f} stated .accuracy.: name inputs="):
        run(recipe_with(str(path)), session(tmp_path / "b"))


def test_a_start_goes_through_the_same_reader(strange, tmp_path):
    path, _ = strange
    still = replace(toy().schedule, lr=0., weight_decay=0.)
    r = recipe_with(None, schedule=still, teacher_schedule=still, starts={"student": TeacherFile(path, STRANGE)})
    records = run(r, session(tmp_path))
    student = next(x for x in records if x["row"] == r.rows[0].name)
    assert student["protocol"]["start"]["inputs"] == [[.5], [.25]]
    net, want = trained(r, student["row"], 0, session(tmp_path)), load_into(create("resnet8x0.5", 10, 1), path)
    same = {n for (n, a), b in zip(net.named_parameters(), want.parameters()) if a.equal(b)}
    assert {n for n, _ in want.named_parameters()} - same == {"fc.weight", "fc.bias"} and len(net._forward_pre_hooks) == 1
    for starts, said in (({"student": TeacherFile(path, renames="kuangliu resnet")}, "does not fit this ResNetCifar"),
                         ({"teacher": TeacherFile(path, ((.5,), (0.,)))}, "inputs need 1 means and 1 deviations above 0")):
        assert_says(lambda: run(recipe_with(None, starts=starts), session(tmp_path / "other")), said)
    assert not list((tmp_path / "other").glob("records/**/*.json"))


def test_a_start_whose_names_are_in_doubt_is_refused_unless_they_are_named(tmp_path):
    data = few_digits()
    torch.save({k.replace("shortcut", "downsample"): v for k, v in network("resnet18").state_dict().items()}, tmp_path / "r.pth")
    net = create("resnet18", 7)
    assert_says(lambda: begun([net], tmp_path / "r.pth", "resnet18", data), "max-pool .*: name renames='torchvision resnet' if")
    begun([net], TeacherFile(tmp_path / "r.pth", renames="torchvision resnet"), "resnet18", data)
    assert net.conv1.weight.equal(network("resnet18").conv1.weight) and net.fc.out_features == 7


def test_two_inputs_are_two_experiments(strange, tmp_path):
    path, right = strange
    run(recipe_with(TeacherFile(path, STRANGE)), session(tmp_path))
    assert_says(lambda: run(recipe_with(TeacherFile(path, ((.4,), (.25,)))), session(tmp_path)), "records of another protocol")


# --- the command

def test_the_check_on_the_command_line(strange, typed):
    path, right = strange
    code, out, err = typed("teacher", "check", path, "--network", "resnet8x0.5")
    assert code == 0 and "under model, names of RepDistiller resnet" in out and "resnet8x0.5 with 10 classes" in out
    code, out, err = typed("teacher", "check", path, "--data", "digits")
    assert code == 2 and "not as good here as stated" in err and "stated (accuracy)" in out                 # its network was found
    code, out, err = typed("teacher", "check", path, "--data", "digits", "--inputs", "((.5,), (.25,))", "--accuracy", "12")
    assert code == 2 and "12.00 stated (as you stated)" in out
    code, out, err = typed("teacher", "check", path.with_name("no.pth"))
    assert code == 2 and len(err.splitlines()) == 1 and "cannot read" in err


def test_the_check_names_the_inputs_that_agree(tmp_path):
    """Three channels, so that the table of inputs applies."""
    from relkd.tables.teacher import _others

    class Data:
        name, channels, classes = "pictures", 3, range(2)
        g = torch.Generator().manual_seed(0)
        test_images = torch.randint(0, 256, (400, 3, 8, 8), generator=g, dtype=torch.uint8)
        mean_std = torch.full((3, 1, 1), .5), torch.full((3, 1, 1), .3)
        images = test_images

        def normalise(self, x):
            return (x.float() / 255 - self.mean_std[0]) / self.mean_std[1]

    data, named = Data(), ("resnet8", 2, 3)
    net = network("resnet8", 2)
    torch.save(theirs(net), tmp_path / "t.pth")
    mean, std = (torch.tensor(v)[:, None, None] for v in INPUTS["imagenet"])
    with torch.no_grad():
        logits = net((data.test_images.float() / 255 - mean) / std)
        net.fc.bias -= logits.mean(0)                                                  # so that both classes occur
        torch.save(theirs(net), tmp_path / "t.pth")
        data.test_labels = net((data.test_images.float() / 255 - mean) / std).argmax(1)
    found = replace(opened(tmp_path / "t.pth"), stated=("acc", 100.))
    lines = list(_others(named, TeacherFile(tmp_path / "t.pth"), found, data))
    assert len(lines) == len(INPUTS) and any("'imagenet': 100.00 %, which agrees" in line for line in lines)
    assert not any("kuangliu" in line and "agrees" in line for line in lines)
