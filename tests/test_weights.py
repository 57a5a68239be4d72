"""Weights in files: what is published is what is read, in parts, checked; and a teacher from anybody's file."""
import argparse
import hashlib
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as as_bytes

import relkd
from relkd.models import create, load, load_into, manifest, read_weights, rounded, save, weights_hash
from relkd.models.published import _groups
from relkd.models.weights import start_from

NAME, SMALL = "digits/resnet8x0.5", ("resnet8x0.5", 10, 1)


def network(*named, size=8, seed=0):
    """With statistics and counters of BN that are not the initial ones."""
    net, g = create(*named, seed=seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(8, named[2], size, size, generator=g))
    return net


def images(channels=1, size=8):
    return torch.randn(5, channels, size, size, generator=torch.Generator().manual_seed(1))


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


# --- round trip

@pytest.mark.parametrize("named, size", [(SMALL, 8), (("conv4", 0, 3), 32), (("mobilenetv2", 7, 3), 32), (("wrn_16_1", 7, 3), 32)])
def test_what_is_read_is_the_rounded_network(tmp_path, named, size):
    net = network(*named, size=size)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    made = save(net, "a/b", *named, tmp_path)
    back = load("a/b", tmp_path)
    assert net.training and all(v.equal(before[k]) for k, v in net.state_dict().items()), "the network is as it was"
    assert not any(m.training for m in back.modules())
    with torch.no_grad():
        out = back(images(named[2], size))
        assert out.equal(rounded(net).eval()(images(named[2], size))) and not out.equal(net.eval()(images(named[2], size)))
    for k, v in back.state_dict().items():
        if v.is_floating_point():
            assert v.dtype == torch.float32 and v.equal(before[k].half().float())
        else:
            assert v.dtype == before[k].dtype == torch.int64 and v.equal(before[k]) and v == 3
    assert manifest("a/b", tmp_path) == made == json.loads((tmp_path / "a/b.json").read_text())
    assert set(files(tmp_path)) == {"a/b.json", "a/b-0.safetensors"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_of_any_dtype_are_float16_on_disk_and_float32_in_memory(tmp_path, dtype):
    net = network(*SMALL).to(dtype)
    save(net, NAME, *SMALL, tmp_path)
    on_disk, back = from_bytes((tmp_path / f"{NAME}-0.safetensors").read_bytes()), load(NAME, tmp_path).state_dict()
    for k, v in net.state_dict().items():
        kind = torch.float16 if v.is_floating_point() else torch.int64
        assert on_disk[k].dtype == kind and on_disk[k].equal(v.to(kind)) and back[k].equal(on_disk[k].to(back[k].dtype))
        assert rounded(net).state_dict()[k].dtype == v.dtype
    assert all(p.dtype == torch.float32 for p in load(NAME, tmp_path).parameters())


def test_the_memory_format_does_not_matter(tmp_path):
    net = network(*SMALL)
    save(net, "a", *SMALL, tmp_path)
    save(net.to(memory_format=torch.channels_last), "b", *SMALL, tmp_path)
    assert (tmp_path / "a-0.safetensors").read_bytes() == (tmp_path / "b-0.safetensors").read_bytes()


# --- parts

@pytest.mark.parametrize("part_size", [18_600, 20_000, 30_001, 44_000, 10**6])
def test_no_part_is_larger_than_asked_for_and_no_tensor_is_split(tmp_path, part_size):
    net = network(*SMALL)
    made = save(net, NAME, *SMALL, tmp_path, part_size=part_size)
    sizes = [(tmp_path / "digits" / p["name"]).stat().st_size for p in made["parts"]]
    assert sizes == [p["bytes"] for p in made["parts"]] and max(sizes) <= part_size and sum(sizes) == made["bytes"]
    assert (len(sizes) > 1) == (part_size < 44_972)
    names = [n for p in made["parts"] for n in from_bytes((tmp_path / "digits" / p["name"]).read_bytes())]
    assert sorted(names) == sorted(net.state_dict())
    assert load(NAME, tmp_path)(images()).equal(rounded(net).eval()(images()))


def test_the_room_that_a_part_is_reckoned_with_is_never_too_small():
    g = torch.Generator().manual_seed(0)
    for size in range(200, 3000, 7):
        tensors = {f"层{'x' * int(n % 40)}.{k}": torch.zeros(int(n), dtype=(torch.half, torch.long, torch.bool)[k % 3])
                   for k, n in enumerate(torch.randint(0, 12, (40,), generator=g))}
        tensors["scalar"] = torch.tensor(3)
        groups = _groups(tensors, size + 150)
        assert all(len(as_bytes(part)) <= size + 150 for part in groups) and [n for part in groups for n in part] == list(tensors)


def test_the_same_weights_are_the_same_files(tmp_path):
    for folder in "ab":
        save(network(*SMALL), NAME, *SMALL, tmp_path / folder, 20_000)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    save(network(*SMALL), NAME, *SMALL, tmp_path / "a", 20_000)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_old_parts_are_removed_after_the_new_manifest_and_others_stay(tmp_path):
    save(network(*SMALL), NAME, *SMALL, tmp_path, 18_600)
    save(network(*SMALL), NAME + "-1", *SMALL, tmp_path)
    save(network("resnet8", 10, 1), "digits/resnet8", "resnet8", 10, 1, tmp_path)
    assert len(manifest(NAME, tmp_path)["parts"]) == 4
    for seed in (1, 2):
        net = network(*SMALL, seed=seed)
        save(net, NAME, *SMALL, tmp_path, 30_000)
        assert load(NAME, tmp_path)(images()).equal(rounded(net).eval()(images()))
    wanted = {f"digits/{p['name']}" for n in (NAME, NAME + "-1", "digits/resnet8") for p in manifest(n, tmp_path)["parts"]}
    assert set(files(tmp_path)) == wanted | {f"{n}.json" for n in (NAME, NAME + "-1", "digits/resnet8")}
    for n in (NAME + "-1", "digits/resnet8"):
        load(n, tmp_path)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interruption_leaves_the_old_version_good(tmp_path, monkeypatch, after):
    old, new = network(*SMALL), network(*SMALL, seed=1)
    save(old, NAME, *SMALL, tmp_path, 30_000)
    real, calls = os.replace, []

    def full(a, b):
        calls.append(b)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        real(a, b)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match=r"cannot write .*No space left on device; name a folder"):
        save(new, NAME, *SMALL, tmp_path, 30_000)
    monkeypatch.undo()
    assert load(NAME, tmp_path)(images()).equal(rounded(old).eval()(images()))
    save(new, NAME, *SMALL, tmp_path, 30_000)
    assert load(NAME, tmp_path)(images()).equal(rounded(new).eval()(images()))
    assert len(files(tmp_path)) == 3, "nothing is left over"


# --- refusals, one line each

def one_line(call):
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_value(value, kind=SMALL):
    net = create(*kind)
    with torch.no_grad():
        net.layer2[0].bn1.running_var[2] = value
    return net


@pytest.mark.parametrize("value, said", [(70000., "70000"), (-1e9, "-1e+09"), (float("nan"), "nan"), (float("inf"), "inf")])
def test_a_value_that_float16_cannot_hold(tmp_path, value, said):
    for call in (lambda: save(with_value(value), NAME, *SMALL, tmp_path), lambda: rounded(with_value(value)),
                 lambda: rounded(with_value(value).double())):
        message = one_line(call)
        assert f"tensor 'layer2.0.bn1.running_var' holds {said}; float16 holds finite numbers up to 65504: " in message
    assert not files(tmp_path)
    assert rounded(with_value(65504.)).layer2[0].bn1.running_var[2] == 65504


@pytest.mark.parametrize("call, message", [
    (lambda at: save(create(*SMALL), NAME, *SMALL, at, 9_000),
     "tensor 'layer3.0.conv2.weight' alone takes 18,5.. bytes, and a tensor is not split; part_size is 9,000: "
     "choose a larger one"),
    (lambda at: save(create(*SMALL), NAME, "resnet8", 10, 1, at),
     r"do not fit resnet8 with 10 classes and 1 channels \(conv1.weight is \(8, 1, 3, 3\), not \(16, 1, 3, 3\)\): name"),
    (lambda at: save(create(*SMALL), NAME, "resnet8x0.5", 11, 1, at), r"fc.weight is \(10, 32\), not \(11, 32\)"),
    (lambda at: save(create(*SMALL), NAME, "resnet14x0.5", 10, 1, at), r"\(layer1.1.conv1.weight is missing\)"),
    (lambda at: save(create("resnet14x0.5", 10, 1), NAME, *SMALL, at), r"\(layer1.1.conv1.weight has no place\)"),
    (lambda at: save(create(*SMALL), NAME, "resnet9", 10, 1, at), "unknown network 'resnet9': did you mean 'resnet8'"),
    (lambda at: save(create(*SMALL), "../x", *SMALL, at), "published under a name like 'cifar100/resnet50'; got '../x'"),
    (lambda at: save(create(*SMALL), "", *SMALL, at), "published under a name like 'cifar100/resnet50'; got ''"),
    (lambda at: load("digits/resnet50", at), r"no weights are published in .*, 'digits/resnet50' neither: "
                                             r"name another folder, or put them there with `relkd publish`"),
])
def test_what_cannot_be_saved(tmp_path, call, message):
    assert re.search(message, one_line(lambda: call(tmp_path)))
    assert not files(tmp_path)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    assert "name a folder that can be written to" in one_line(lambda: save(create(*SMALL), NAME, *SMALL, tmp_path / "file"))


def change(**new):
    def f(at):
        path = at / f"{NAME}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | new))

    return f


def not_safetensors(at):
    (at / f"{NAME}-0.safetensors").write_bytes(b"zip")
    m = manifest(NAME, at)
    m["parts"][0] |= {"sha256": hashlib.sha256(b"zip").hexdigest()}
    change(**m)(at)


def not_finite(at):
    from safetensors.torch import load_file, save_file
    m = manifest(NAME, at)
    part = at / "digits" / next(p["name"] for p in m["parts"] if "fc.bias" in load_file(at / "digits" / p["name"]))
    tensors = load_file(part)
    tensors["fc.bias"][3] = float("nan")
    save_file(tensors, part)
    changed = next(p for p in m["parts"] if p["name"] == part.name)
    changed |= {"bytes": part.stat().st_size, "sha256": hashlib.sha256(part.read_bytes()).hexdigest()}
    change(**m)(at)


@pytest.mark.parametrize("name, damage, message", [
    ("digits/resnet8x5", lambda at: None, "unknown published network 'digits/resnet8x5': did you mean 'digits/resnet8x0.5'?"),
    ("zzz", lambda at: None, "unknown published network 'zzz': known are digits/resnet8x0.5"),
    ("../w/" + NAME, lambda at: None, "unknown published network"),
    (NAME, lambda at: (at / f"{NAME}-1.safetensors").unlink(),
     "part resnet8x0.5-1.safetensors of digits/resnet8x0.5 is missing: get it again, or publish the network again"),
    (NAME, lambda at: (at / f"{NAME}-1.safetensors").write_bytes((at / f"{NAME}-1.safetensors").read_bytes()[:-1]),
     "part resnet8x0.5-1.safetensors of digits/resnet8x0.5 is damaged ("),
    (NAME, not_safetensors, "part resnet8x0.5-0.safetensors of digits/resnet8x0.5 is no safetensors file ("),
    (NAME, lambda at: (at / f"{NAME}.json").write_text("{"), "the manifest digits/resnet8x0.5.json is not readable (JSONDecodeError: "),
    (NAME, lambda at: (at / f"{NAME}.json").write_bytes(b"\xff\xfe{"),
     "the manifest digits/resnet8x0.5.json is not readable (UnicodeDecodeError: "),
    (NAME, lambda at: (at / f"{NAME}.json").write_text("[1]"), "the manifest digits/resnet8x0.5.json is not readable (TypeError: "),
    (NAME, change(parts=[{"name": "x"}]), "is not readable (KeyError: 'bytes')"),
    (NAME, change(network="resnet9"), "unknown network 'resnet9'"),
    (NAME, change(network=5), "is not readable (TypeError: network is a name, classes and channels are numbers)"),
    (NAME, change(classes="10"), "is not readable (TypeError: network is a name, classes and channels are numbers)"),
    (NAME, change(channels=None), "is not readable (TypeError: network is a name, classes and channels are numbers)"),
    (NAME, change(network="resnet8x50"), "do not fit resnet8x50 with 10 classes"),
    (NAME, not_finite, "are of a network that diverged (fc.bias is not finite)"),
    (NAME, change(classes=9), "the weights of digits/resnet8x0.5 do not fit resnet8x0.5 with 9 classes and 1 channels "
                              "(fc.weight is (10, 32), not (9, 32)): publish the network again"),
    (NAME, change(parts=[]), "(conv1.weight is missing)"),
])
def test_what_cannot_be_loaded(tmp_path, name, damage, message):
    save(create(*SMALL), NAME, *SMALL, tmp_path / "w", 30_000)
    damage(tmp_path / "w")
    assert message in one_line(lambda: load(name, tmp_path / "w"))


def test_a_counter_is_not_filled_with_a_fraction(tmp_path):
    net = create(*SMALL)
    net.bn1.num_batches_tracked = torch.tensor(1.5)
    assert "bn1.num_batches_tracked is torch.float16, not torch.int64" in one_line(lambda: save(net, NAME, *SMALL, tmp_path))


def test_weights_beside_the_package_or_else_in_the_working_directory(tmp_path, monkeypatch):
    net, checkout, other = network(*SMALL), tmp_path / "checkout", tmp_path / "elsewhere"
    (checkout / "relkd").mkdir(parents=True)
    other.mkdir()
    monkeypatch.setattr(relkd, "__file__", str(checkout / "relkd" / "__init__.py"))
    monkeypatch.chdir(other)
    save(net, "here", *SMALL)
    assert (other / "weights" / "here.json").exists() and load("here")(images()).equal(rounded(net).eval()(images()))
    save(net, "beside", *SMALL, checkout / "weights")
    assert manifest("beside")["network"] == "resnet8x0.5" and "known are beside" in one_line(lambda: load("zzz"))


def test_a_folder_of_hugging_face_and_a_part_that_a_browser_renamed(tmp_path):
    from safetensors.torch import save_file

    hub = tmp_path / "timm" / "resnet18.a1_in1k"
    hub.mkdir(parents=True)
    (hub / "config.json").write_text('{"architecture": "resnet18", "num_classes": 1000}')
    for name in ("timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k/config"):
        assert "no weights are published in" in one_line(lambda: load(name, tmp_path))
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7)}, hub / "model.safetensors")
    for name in ("timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k/config"):
        assert f"is a folder of Hugging Face, not published here: load its file, load('{hub / 'model.safetensors'}', network=...)" in \
            one_line(lambda: load(name, tmp_path))
    net = network(*SMALL)
    save(net, NAME, *SMALL, tmp_path)
    part = tmp_path / f"{NAME}-0.safetensors"
    part.rename(part.with_name("resnet8x0.5-0 (1).safetensors"))
    assert load(NAME, tmp_path)(images()).equal(rounded(net).eval()(images()))
    part.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    assert "part resnet8x0.5-0.safetensors of digits/resnet8x0.5 is a git-lfs pointer: run `git lfs pull`" in \
        one_line(lambda: load(NAME, tmp_path))


def test_what_else_lies_in_the_folder_is_no_network(tmp_path):
    save(network(*SMALL), NAME, *SMALL, tmp_path)
    text = (tmp_path / f"{NAME}.json").read_bytes()
    (tmp_path / "digits" / "._resnet8x0.5.json").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "resnet8x0.json").write_text('{"architecture": "resnet18"}')
    assert "did you mean 'digits/resnet8x0.5'" in one_line(lambda: load("timm/resnet8x0.5", tmp_path))
    (tmp_path / f"{NAME}.json").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    load(NAME, tmp_path)
    (tmp_path / f"{NAME}.json").unlink()
    assert "no weights are published in" in one_line(lambda: load(NAME, tmp_path))


@pytest.mark.parametrize("classes, options", [(None, {}), (None, {"embedding": 5}), (7, {"head": "cosine"})])
def test_embeddings_and_heads_are_published_too(tmp_path, classes, options):
    net = create("resnet8x0.5", classes, 1, seed=3, **options)
    made = save(net, "a/b", "resnet8x0.5", classes, 1, tmp_path, options=options)
    assert made.get("options", {}) == options and load("a/b", tmp_path)(images()).equal(rounded(net).eval()(images()))
    if options:
        assert "do not fit resnet8x0.5 with" in one_line(lambda: save(net, "a/b", "resnet8x0.5", classes, 1, tmp_path))


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile])
def test_a_wrapped_network_is_published_as_itself(tmp_path, wrap):
    net = network(*SMALL)
    save(wrap(net), "a", *SMALL, tmp_path)
    save(net, "b", *SMALL, tmp_path)
    assert (tmp_path / "a-0.safetensors").read_bytes() == (tmp_path / "b-0.safetensors").read_bytes()


# --- a fingerprint

def test_a_fingerprint_is_of_the_numbers_alone():
    net = network(*SMALL)
    mine = weights_hash(net.state_dict())
    assert re.fullmatch("[0-9a-f]{12}", mine) and mine == weights_hash(dict(reversed(net.state_dict().items())))
    assert mine == weights_hash(net.to(memory_format=torch.channels_last).state_dict()) == weights_hash(dict(net.state_dict()))
    assert weights_hash({"a": torch.tensor(3), "b": torch.zeros(0), "c": torch.tensor([True])}) == weights_hash(
        {"b": torch.zeros(0), "c": torch.tensor([True]), "a": torch.tensor(3)})
    x = torch.arange(6.)
    others = [{"w": x}, {"v": x}, {"w": x.double()}, {"w": x.bfloat16()}, {"w": x.view(2, 3)}, {"w": x.view(3, 2)},
              {"w": torch.nextafter(x, x + 1)}, {}]
    assert len({weights_hash(o) for o in others}) == len(others)


# --- a teacher from anybody's file

def put(path, what, **kw):
    torch.save(what, path, **kw)
    return path


def prefixed(before, sd):
    return {before + k: v for k, v in sd.items()}


def cast(dtype, sd):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in sd.items()}


def as_safetensors(path, sd):
    path.write_bytes(as_bytes({k: v.contiguous() for k, v in sd.items()}))
    return path


def on_cuda(path, sd):
    """As a GPU would have saved it: the storages' place is another."""
    put(path, sd)
    with zipfile.ZipFile(path) as z:
        inside = {n: z.read(n) for n in z.namelist()}
    with zipfile.ZipFile(path, "w") as z:
        for n, content in inside.items():
            z.writestr(n, content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0") if n.endswith("data.pkl") else content)
    return path


CIRCULATING = {
    "bare": lambda p, sd: put(p, sd),
    "state_dict, DataParallel": lambda p, sd: put(p, {"epoch": 3, "state_dict": prefixed("module.", sd), "best_acc": torch.tensor([70.])}),
    "model, namespace": lambda p, sd: put(p, {"opt": argparse.Namespace(lr=.05, steps=[1, 2]), "model": sd,
                                              "accuracy": torch.tensor([79.])}),
    "net, numpy numbers": lambda p, sd: put(p, {"net": sd, "acc": np.float64(95.1), "lr": np.float32(.1)}),
    "model_state_dict": lambda p, sd: put(p, {"model_state_dict": sd, "optimizer_state_dict": {"state": {}}}),
    "state_dict_ema": lambda p, sd: put(p, {"state_dict": {k: v * 0 for k, v in sd.items()}, "state_dict_ema": sd}),
    "compiled": lambda p, sd: put(p, prefixed("_orig_mod.", sd)),
    "compiled DDP": lambda p, sd: put(p, {"model": prefixed("_orig_mod.module.", sd)}),
    "Lightning": lambda p, sd: put(p, {"state_dict": prefixed("net.", sd), "hyper_parameters": {"lr": .1}, "loops": {}}),
    "AveragedModel": lambda p, sd: put(p, {"n_averaged": torch.tensor(20), **prefixed("module.", sd)}),
    "float64": lambda p, sd: put(p, cast(torch.float64, sd)),
    "parameters": lambda p, sd: put(p, {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in sd.items()}),
    "legacy": lambda p, sd: put(p, {"model": sd}, _use_new_zipfile_serialization=False),
    "safetensors": as_safetensors,
    "from a GPU": on_cuda,
}


@pytest.mark.parametrize("kind", CIRCULATING)
def test_a_teacher_in_the_forms_that_circulate(tmp_path, kind):
    net = network(*SMALL)
    path = CIRCULATING[kind](tmp_path / "teacher.pth", net.state_dict())
    assert weights_hash(cast(torch.float32, read_weights(str(path)))) == weights_hash(net.state_dict())
    other = create(*SMALL, seed=9).train()
    other.layer1.eval()
    modes = [m.training for m in other.modules()]
    assert load_into(other, path) is other and modes == [m.training for m in other.modules()]
    assert weights_hash(other.state_dict()) == weights_hash(net.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(tmp_path, dtype):
    half = cast(dtype, network(*SMALL).state_dict())
    read = read_weights(put(tmp_path / "x", half))
    assert ({t.dtype for t in read.values()} == {torch.float32, torch.int64}
            and all(read[k].equal(v.to(read[k].dtype)) for k, v in half.items()))


def test_a_network_that_is_wrapped_itself_and_one_whose_own_names_begin_like_a_wrapper(tmp_path):
    net = network(*SMALL)
    path = put(tmp_path / "x", net.state_dict())
    for wrap in (torch.nn.DataParallel, torch.compile):
        other = create(*SMALL, seed=9)
        load_into(wrap(other), path)
        assert weights_hash(other.state_dict()) == weights_hash(net.state_dict())
    inside = torch.nn.Module()
    inside.model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    load_into(inside, put(tmp_path / "y", prefixed("module.", {k: v + 1 for k, v in inside.state_dict().items()})))
    assert inside.model[0].bias.abs().max() > .3


def test_renamed_layers_one_of_several_networks_and_old_batch_norms(tmp_path):
    net = network(*SMALL)
    sd = {k.replace("shortcut", "downsample").replace("fc.", "linear."): v for k, v in net.state_dict().items() if "num_batches" not in k}
    path = put(tmp_path / "x", {"model": prefixed("module.student.", sd) | prefixed("module.teacher.", {k: v + 1 for k, v in sd.items()})})
    back = load_into(create(*SMALL, seed=9), path, "student.", [(r"\bdownsample\.", "shortcut."), (r"^linear\.", "fc.")])
    assert back.eval()(images()).equal(net.eval()(images())) and back.bn1.num_batches_tracked == 0
    path = put(tmp_path / "y", {k.replace("shortcut", "downsample"): v for k, v in net.state_dict().items()})
    assert load_into(create(*SMALL), path, renames="torchvision resnet").eval()(images()).equal(net.eval()(images()))
    assert "unknown renames 'torchvision resnets': did you mean 'torchvision resnet'?" in one_line(
        lambda: load_into(net, path, renames="torchvision resnets"))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def cut(path, what):
    put(path, what)
    path.write_bytes(path.read_bytes()[:-2000])


def scripted(path, what):
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)


def zipped(path, what):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("inner.pth", b"x" * 100)


def without(what, name):
    return {k: v for k, v in what.items() if k != name}


@pytest.mark.parametrize("make, message", [
    (lambda p, sd: None, "cannot read .*t.pth .No such file or directory.: name a file of torch.save or safetensors"),
    (lambda p, sd: p.write_bytes(b""), "t.pth is empty: copy it again"),
    (lambda p, sd: p.write_text("version https://git-lfs.github.com/spec/v1\noid"), "t.pth is a git-lfs pointer: run `git lfs pull`"),
    (lambda p, sd: p.write_text("\n<!DOCTYPE html><html>"), "t.pth is a web page"),
    (lambda p, sd: p.write_text("hello, this is no such file at all"),
     "t.pth is not read: it is no whole file of torch.save or safetensors"),
    (cut, "t.pth is not read: it is no whole file"),
    (lambda p, sd: p.write_bytes(as_safetensors(p, sd).read_bytes()[:-9]), "t.pth is not read: it is no whole file"),
    (zipped, "t.pth is not read: it is no whole file .*: unpack it"),
    (scripted, "t.pth is not read: it is TorchScript, code beside the weights: save"),
    (lambda p, sd: put(p, create(*SMALL)), "t.pth is not read: it holds relkd.models.networks.ResNetCifar beside "
                                           "tensors, and making that could run code"),
    (lambda p, sd: put(p, {"model": sd, "x": Evil(p.with_name("executed"))}), "t.pth is not read: it holds .* beside tensors"),
    (lambda p, sd: put(p, list(sd.items())), "t.pth holds no tensors by name: save net.state_dict"),
    (lambda p, sd: put(p, {"epoch": 3, "args": {}}), "t.pth holds no tensors by name"),
    (lambda p, sd: put(p, {"model": sd, "net": sd}), "t.pth holds weights as 'model' and as 'net': save the ones that are meant alone"),
    (lambda p, sd: put(p, sd | {"fc.bias": torch.full((10,), float("nan"))}), "t.pth is of a network that diverged: fc.bias holds nan"),
    (lambda p, sd: put(p, without(sd, "bn1.bias")), "t.pth does not fit this ResNetCifar .bn1.bias is missing; "
                                                    "the file begins with 'conv1.weight'"),
    (lambda p, sd: put(p, sd | {"more": torch.zeros(1)}), "t.pth does not fit this ResNetCifar .more has no place"),
    (lambda p, sd: put(p, sd | {"fc.bias": torch.zeros(1000)}), r"t.pth does not fit this ResNetCifar .fc.bias is \(1000,\), not \(10,\)"),
    (lambda p, sd: put(p, sd | {"bn1.num_batches_tracked": torch.tensor(1.5)}),
     "bn1.num_batches_tracked is torch.float32, not torch.int64"),
    (lambda p, sd: put(p, prefixed("a.", sd) | prefixed("b.", sd)),
     "t.pth holds several networks that fit, behind 'a.' and 'b.': name prefix="),
])
def test_a_file_that_is_no_teacher_changes_nothing(tmp_path, make, message):
    path, net = tmp_path / "t.pth", create(*SMALL)
    make(path, network(*SMALL).state_dict())
    before = weights_hash(net.state_dict())
    said = one_line(lambda: load_into(net, path))
    assert re.search(message, said) and str(path) in said and len(said) < 400
    assert weights_hash(net.state_dict()) == before and not (tmp_path / "executed").exists()


def test_a_start_is_all_but_the_last_layer_or_nothing():
    ten, hundred = create("resnet8", 10), create("resnet8", 100, seed=1)
    before = {n: t.clone() for n, t in ten.state_dict().items()}
    start_from(ten, hundred.state_dict())
    same = {n for n, t in ten.state_dict().items() if torch.equal(t, before[n])}
    assert {"fc.weight", "fc.bias"} <= same and not any(n.endswith("conv1.weight") for n in same)
    for other in (create("resnet8x0.5", 10), create("resnet14", 10)):
        old = {n: t.clone() for n, t in other.state_dict().items()}
        with pytest.raises(ValueError, match="cannot start from these weights .* take those of the same network"):
            start_from(other, hundred.state_dict())
        assert all(torch.equal(t, old[n]) for n, t in other.state_dict().items())
    bare = create("conv4", None, seed=0)                       # ends without a linear layer: everything is taken
    start_from(bare, create("conv4", None, seed=1).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(bare.state_dict().values(), create("conv4", None, seed=1).state_dict().values()))
