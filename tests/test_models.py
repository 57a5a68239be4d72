"""The papers' networks: built by name, read by name, counted by hand."""
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from relkd.features import Features
from relkd.heads import CosineLinear
from relkd.models import EXAMPLES, Conv4, ResNetCifar, create, flops

CLASSES = 100
CIFAR_NAMES = [n for n in EXAMPLES if not n.startswith("conv4_")]
BEFORE_RELU = [n for n in CIFAR_NAMES if n.startswith(("resnet", "vgg", "shufflenetv1", "conv4"))]


@lru_cache(maxsize=None)
def network(name):
    return create(name, CLASSES)


def images(size=32, channels=3, batch=2):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(size))


def size_of(name):
    return int(name.split("_")[1]) if name.startswith("conv4_") else 32


# --- built, run, read

@pytest.mark.parametrize("name", EXAMPLES)
def test_every_network_trains_and_every_parameter_takes_part(name):
    net = network(name).train()
    logits = net(images(size_of(name)))
    assert logits.shape == (2, CLASSES) and logits.isfinite().all()
    F.cross_entropy(logits, torch.tensor([3, 7])).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert any(p.grad.abs().sum() > 0 for n, p in net.named_parameters() if n.startswith("layer1"))


@pytest.mark.parametrize("name", [n for n in CIFAR_NAMES if n != "conv4"] + ["conv4_64"])
def test_every_network_takes_tiny_imagenet(name):
    net = network(name).eval()
    with torch.no_grad():
        read = Features(net, [*net.stages, "fc:input", "logits"])(images(64))
    sizes = [read[n].shape[-1] for n in net.stages]
    assert read["logits"].shape == (2, CLASSES) and sizes == sorted(sizes, reverse=True) and sizes[-1] >= 4


@pytest.mark.parametrize("name", EXAMPLES)
def test_whatever_has_a_name_can_be_read(name):
    """Every module in one pass: none runs twice, none is overwritten in place."""
    net = network(name).eval()
    modules = {n: m for n, m in net.named_modules() if n and not (isinstance(m, nn.Sequential) and not len(m))}
    with torch.no_grad():
        read = Features(net, [*modules, "fc:input", "logits"])(images(size_of(name)))
    embedding = read["fc:input"]
    assert embedding.shape == (2, net.fc.in_features) and torch.equal(net.fc(embedding), read["logits"])
    assert net.stages == tuple(n for n, _ in net.named_children() if n.startswith("layer"))
    assert all(read[n].ndim == 4 for n in net.stages)
    if "avgpool" in read:
        assert torch.equal(read["avgpool"].flatten(1), embedding)
    assert [n for n, m in modules.items() if getattr(m, "inplace", False)] == []


@pytest.mark.parametrize("name", BEFORE_RELU)
def test_the_map_before_the_relu(name):
    net = network(name).eval()
    with torch.no_grad():
        read = Features(net, [f"{s}.relu{end}" for s in net.stages for end in ("", ":input")] + list(net.stages))(images())
    for s in net.stages:
        before, after = read[f"{s}.relu:input"], read[f"{s}.relu"]
        assert before.min() < 0 and torch.equal(before.clamp(min=0), after)
        assert name == "conv4" or torch.equal(after, read[s])


def test_the_map_before_the_relu_where_a_stage_ends_without_one():
    wrn, mobile = network("wrn_16_2").eval(), network("mobilenetv2").eval()
    with torch.no_grad():
        w = Features(wrn, [*wrn.stages, "layer2.0.bn1", "layer3.0.bn1", "bn1", "relu"])(images())
        m = Features(mobile, [*mobile.stages, "layer4.3.bn3"])(images())
    assert all(w[s].min() < 0 for s in wrn.stages) and all(m[s].min() < 0 for s in mobile.stages)
    assert [w[n].shape for n in ("layer2.0.bn1", "layer3.0.bn1", "bn1")] == [w[s].shape for s in wrn.stages]
    assert torch.equal(w["bn1"].clamp(min=0), w["relu"]) and torch.equal(m["layer4"], m["layer4.3.bn3"])


def test_the_names_of_inner_layers_do_not_depend_on_the_depth():
    assert all("layer3.relu" in dict(network(n).named_modules()) for n in ("resnet8", "resnet110", "resnet50", "vgg8", "vgg13"))


# --- the same as others

def test_resnet_is_torchvisions_behind_our_stem():
    import torchvision

    for name, make in (("resnet18", torchvision.models.resnet18), ("resnet50", torchvision.models.resnet50)):
        ours, theirs = create(name, 7, seed=3).double(), make(num_classes=7)
        theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        theirs = theirs.double()
        assert len(theirs.state_dict()) == len(ours.state_dict())
        theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values())))
        x = images(16).double()
        with torch.no_grad():
            assert (ours.train()(x) - theirs.train()(x)).abs().max() < 1e-10


def test_shufflenetv2_is_torchvisions_behind_our_stem():
    import torchvision

    ours, theirs = create("shufflenetv2", 7).eval(), torchvision.models.shufflenet_v2_x1_0(num_classes=7)
    theirs.conv1, theirs.maxpool = nn.Sequential(nn.Conv2d(3, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU()), nn.Identity()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values())))
    with torch.no_grad():
        assert torch.allclose(ours(images()), theirs.eval()(images()), atol=1e-6)


def test_shufflenetv1_shuffles_its_groups():
    unit, x = create("shufflenetv1", 10).layer2[1], images(5, 120)
    assert torch.equal(unit.shuffle(x), x.unflatten(1, (3, -1)).transpose(1, 2).flatten(1, 2))
    assert torch.equal(nn.ChannelShuffle(40)(unit.shuffle(x)), x)


def test_vgg_pools_a_fourth_time_only_from_64_pixels():
    net = network("vgg11").eval()
    with torch.no_grad():
        sizes = {s: [t.shape[-1] for t in Features(net, net.stages)(images(s)).values()] for s in (32, 64)}
    assert sizes == {32: [32, 16, 8, 4, 4], 64: [64, 32, 16, 8, 4]}


@pytest.mark.parametrize("size, length", [(28, 64), (32, 256), (84, 1600)])
def test_conv4_without_a_classifier_is_its_embedding(size, length):
    net = create("conv4", 0, channels=1).eval()
    with torch.no_grad():
        read = Features(net, ["layer4", "fc:input", "logits"])(images(size, 1))
    assert (read["logits"].shape == (2, length) and torch.equal(read["logits"], read["layer4"].flatten(1))
            and torch.equal(read["fc:input"], read["logits"]))
    assert create(f"conv4_{size}", 5).fc.in_features == length


# --- counted by hand, from the layer lists of the papers and of the CRD benchmark's code

def conv(cin, cout, k, groups=1, bias=False):
    return cin * cout * k * k // groups + (cout if bias else 0) + 2 * cout                    # with its BN


def basic(widths, n):
    total = conv(3, widths[0], 3)
    for a, b in zip(widths, widths[1:]):
        total += conv(a, b, 3) + (2 * n - 1) * conv(b, b, 3) + (conv(a, b, 1) if a != b else 0)
    return total + (widths[-1] + 1) * CLASSES


def bottleneck(counts):
    total, cin = conv(3, 64, 3), 64
    for n, w in zip(counts, (64, 128, 256, 512)):
        total += conv(cin, 4 * w, 1)
        for _ in range(n):
            total += conv(cin, w, 1) + conv(w, w, 3) + conv(w, 4 * w, 1)
            cin = 4 * w
    return total + 2049 * CLASSES


def wide(depth, k):
    n, total, cin = (depth - 4) // 6, 3 * 16 * 9, 16
    for c in (16 * k, 32 * k, 64 * k):
        total += 2 * cin + 9 * cin * c + 2 * c + 9 * c * c + (n - 1) * (4 * c + 18 * c * c) + (cin * c if cin != c else 0)
        cin = c
    return total + 2 * cin + (cin + 1) * CLASSES


def vgg(*stages):
    total, cin = 0, 3
    for c in sum(stages, []):
        total, cin = total + conv(cin, c, 3, bias=True), c
    return total + 513 * CLASSES


def mobile():
    total, cin = conv(3, 16, 3), 16
    for t, c, n in ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)):
        for _ in range(n):
            total += conv(cin, t * cin, 1) + conv(t * cin, t * cin, 3, t * cin) + conv(t * cin, c // 2, 1)
            cin = c // 2
    return total + conv(cin, 1280, 1) + 1281 * CLASSES


def shuffle1():
    total, cin = conv(3, 24, 1), 24
    for c, n in ((240, 4), (480, 8), (960, 4)):
        for b in range(n):
            new = c - cin if b == 0 else c
            mid = new // 4
            total += conv(cin if b == 0 else c, mid, 1, 1 if cin == 24 and b == 0 else 3) + conv(mid, mid, 3, mid) + conv(mid, new, 1, 3)
        cin = c
    return total + 961 * CLASSES


def shuffle2():
    total, cin = conv(3, 24, 1), 24
    for c, n in ((116, 3), (232, 7), (464, 3)):
        h = c // 2
        total += (conv(cin, cin, 3, cin) + 2 * conv(cin, h, 1) + conv(h, h, 3, h) + conv(h, h, 1) + n
                  * (2 * conv(h, h, 1) + conv(h, h, 3, h)))
        cin = c
    return total + conv(464, 1024, 1) + 1025 * CLASSES


BY_HAND = {
    "resnet8x4": basic((32, 64, 128, 256), 1), "resnet32x4": basic((32, 64, 128, 256), 5),
    "resnet20": basic((16, 16, 32, 64), 3), "resnet56": basic((16, 16, 32, 64), 9),
    "resnet110": basic((16, 16, 32, 64), 18), "resnet18": basic((64, 64, 128, 256, 512), 2),
    "resnet50": bottleneck((3, 4, 6, 3)), "resnet101": bottleneck((3, 4, 23, 3)),
    "wrn_16_1": wide(16, 1), "wrn_16_2": wide(16, 2), "wrn_40_1": wide(40, 1), "wrn_40_2": wide(40, 2),
    "vgg8": vgg([64], [128], [256], [512], [512]), "vgg11": vgg([64], [128], [256] * 2, [512] * 2, [512] * 2),
    "vgg13": vgg([64] * 2, [128] * 2, [256] * 2, [512] * 2, [512] * 2),
    "mobilenetv2": mobile(), "shufflenetv1": shuffle1(), "shufflenetv2": shuffle2(),
    "conv4": conv(3, 64, 3, bias=True) + 3 * conv(64, 64, 3, bias=True) + 257 * CLASSES,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_parameter_counts_by_hand(name):
    assert sum(p.numel() for p in network(name).parameters()) == BY_HAND[name]


@pytest.mark.parametrize("name, classes, millions", [                       # sources: nbs/lab/01_models.ipynb
    ("resnet18", 100, 11.22), ("resnet50", 100, 23.71), ("resnet101", 100, 42.7), ("wrn_40_1", 100, .57),
    ("wrn_16_2", 100, .70), ("wrn_40_2", 100, 2.26), ("wrn_40_2", 10, 2.2),
    ("vgg13", 100, 9.46), ("vgg8", 100, 3.97), ("mobilenetv2", 100, .81), ("shufflenetv1", 100, .95),
    ("shufflenetv2", 100, 1.36), ("conv4", 0, .113088)])
def test_parameter_counts_published(name, classes, millions):
    digits = len(str(millions).partition(".")[2])
    net = network(name) if classes == CLASSES else create(name, classes)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, digits) == millions


@pytest.mark.parametrize("name", EXAMPLES)
def test_multiply_adds_are_half_of_pytorchs_operations(name):
    net, shape = network(name).eval(), (3, size_of(name), size_of(name))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, *shape))
    assert 2 * flops(net, shape) == counter.get_total_flops()


def test_counting_leaves_the_network_alone():
    net = create("resnet8", 10).train()
    net.layer1.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert flops(net, (3, 32, 32)) == flops(net.double(), (3, 32, 32)) == 12_501_632
    assert net.training and not net.layer1.training and net.layer2.training
    assert all(torch.equal(v.float(), before[k].float()) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())
    with pytest.raises(RuntimeError):
        flops(net, (1, 32, 32))
    assert net.training and not any(m._forward_hooks for m in net.modules())


# --- embeddings, heads, networks of one's own

@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("classes", [None, 0])
def test_without_classes_the_output_is_the_embedding(name, classes):
    if classes == 0 and name in ("resnet50", "resnet101", "resnet110"):
        pytest.skip("as None")
    net = create(name, classes).eval()
    with torch.no_grad():
        read = Features(net, ["fc:input", "logits"])(images(size_of(name)))
        out = net(images(size_of(name)))
    assert isinstance(net.fc, nn.Identity) and out.shape == (2, net.num_features)
    assert read["fc:input"].equal(out) and read["logits"].equal(out)
    assert not [n for n in net.state_dict() if n.startswith("fc")]


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2", "conv4_28"])
def test_an_embedding_layer_and_a_cosine_head(name):
    x = images(size_of(name))
    for net, kind, width in ((create(name, None, seed=2, embedding=5), nn.Linear, 5),
                             (create(name, 7, seed=2, head="cosine"), CosineLinear, 7)):
        with torch.no_grad():
            read = Features(net.eval(), ["fc:input", "logits"])(x)
        assert type(net.fc) is kind and read["fc:input"].shape == (2, net.num_features) and read["logits"].shape == (2, width)
        assert read["logits"].equal(net.fc(read["fc:input"]))
    again = create(name, 7, seed=2, head="cosine")
    assert all(p.equal(q) for p, q in zip(net.state_dict().values(), again.state_dict().values()))
    F.cross_entropy(net.train()(x), torch.tensor([3, 6])).backward()
    assert all(p.grad is not None for p in net.parameters())


class Own(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.fc = nn.Linear(channels, classes)


def test_a_network_of_ones_own_is_built_from_the_seed():
    seen = []

    def build(classes, channels):
        seen.append((classes, channels))
        return nn.Linear(channels, classes)

    before = torch.get_rng_state()
    a, b, other = create(build, 4, 2, seed=5), create(build, 4, 2, 5), create(build, 4, 2, seed=6)
    assert before.equal(torch.get_rng_state()) and seen == [(4, 2)] * 3
    assert a.weight.equal(b.weight) and not a.weight.equal(other.weight)
    assert create(Own, 4, 2, seed=5).fc.weight.equal(a.weight)


# --- seeds and names

@pytest.mark.parametrize("name", ["resnet18", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2", "conv4"])
def test_initialisation_is_of_the_seed_alone(name):
    torch.manual_seed(1)
    a = create(name, 10, 1, seed=5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    b = create(name, 10, 1, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    other = create(name, 10, 1, seed=6)
    assert [n for (n, p), q in zip(a.named_parameters(), other.parameters()) if p.ndim > 1 and torch.equal(p, q)] == []
    with torch.no_grad():
        assert a.eval()(images(channels=1)).shape == (2, 10)


@pytest.mark.parametrize("call, message", [
    (lambda: create("resnet9", 10), "unknown network 'resnet9': did you mean 'resnet8'"),
    (lambda: create("wrn_40_4", 10), "unknown network 'wrn_40_4': did you mean 'wrn_40_2'"),
    (lambda: create("vgg16", 10), "unknown network 'vgg16': did you mean 'vgg1"),
    (lambda: create("MobileNetV2", 10), "did you mean 'mobilenetv2'"),
    (lambda: create("transformer", 10), "known are resnet8, "),
    (lambda: create("resnet8x0", 10), "resnet8x0 would have no channels"),
    (lambda: create("resnet20", -1), "1 class or more, or None for the embedding; got classes = -1"),
    (lambda: create("conv4", -1), "1 class or more, or None for the embedding; got classes = -1"),
    (lambda: create("vgg8", 10, embedding=64), "in place of the classifier .classes=None.; got embedding = 64 and classes = 10"),
    (lambda: create("vgg8", None, embedding=0), "1 number or more .* got embedding = 0"),
    (lambda: create("vgg8", None, head="cosine"), "a cosine head .* needs at least 1 class; got classes = None"),
    (lambda: create("vgg8", 10, head="cosin"), "unknown head 'cosin': did you mean 'cosine'"),
    (lambda: create(lambda classes, channels: nn.Linear(1, 1), None, embedding=3), "build the last layer in your own function"),
    (lambda: create(lambda classes, channels: 3, 10), r"\(classes, channels\) must give an nn.Module; got a int"),
    (lambda: create(nn.Linear(2, 2), 10), "give its class or a function, not a built Linear"),
    (lambda: create("conv4", None, embedding=5)(images(84)), "classifies images of 32 x 32; got 84 x 84"),
    (lambda: create("conv4_8", 5), "they need at least 16 pixels; got 8"),
    (lambda: create("conv4", 5)(images(84)), "classifies images of 32 x 32; got 84 x 84: create 'conv4_84'"),
    (lambda: ResNetCifar(18, 10), r"6 n \+ 2 layers"),
    (lambda: Conv4(0, size=4), "at least 16 pixels"),
])
def test_names_and_arguments_that_are_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
