"""Features: whatever a layer gives is read rightly, or refused in one line that names the layer."""
import threading
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from relkd.features import Features
from relkd.models import create


class Body(nn.Module):
    """A layer whose output is made by `give`, in front of a linear one that is called as `call` says."""
    def __init__(self, give=lambda h: h, call=lambda fc, h: fc(h), end=lambda y: y):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.out, self.fc = nn.Linear(3, 4), Give(give), nn.Linear(4, 2)
        self.call, self.end = call, end

    def forward(self, x):
        h = self.a(x)
        self.out(h)
        return self.end(self.call(self.fc, h))


class Give(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.give = give

    def forward(self, x):
        return self.give(x)


def x(n=5):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(1))


def refusal(call):
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- which tensor is meant

@pytest.mark.parametrize("give", [
    lambda h: (h, None), lambda h: (None, h), lambda h: {"loss": None, "logits": h}, lambda h: OrderedDict(logits=h),
    lambda h: SimpleNamespace(logits=h, hidden=(1, 2)), lambda h: (h, (h + 1, h + 2)),
])
def test_outputs_with_fields_and_tuples(give):
    net = Body(give, end=give)
    read = Features(net, ["out", "a", "logits"])(x())
    assert read["out"].equal(read["a"]) and read["logits"].equal(net.fc(read["a"]))


@pytest.mark.parametrize("give, what", [
    (lambda h: [h], "a list"), (lambda h: {"states": h, "pooled": h}, "a dict of states, pooled"), (lambda h: None, "a NoneType"),
    (lambda h: (1, "x"), "a tuple"), (lambda h: 3., "a float"), (lambda h: {"logits": None}, "a dict of logits"),
])
def test_what_is_no_tensor_is_named_with_its_layer(give, what):
    assert f"layer 'out' gives {what}, not a tensor: read a layer inside it" in refusal(lambda: Features(Body(give), ["out"])(x()))
    assert f"layer 'logits' gives {what}, not a tensor" in refusal(lambda: Features(Body(end=give), ["logits"])(x()))


def test_real_layers_that_give_tuples():
    net = nn.Sequential(OrderedDict(lstm=nn.LSTM(3, 4), first=Give(lambda out: out[0]), fc=nn.Linear(4, 2)))
    read = Features(net, ["lstm", "first", "fc:input"])(x())
    assert read["lstm"].equal(read["first"]) and read["fc:input"].equal(read["first"])


class Masked(nn.Linear):
    def forward(self, input, mask=None):
        return super().forward(input)


@pytest.mark.parametrize("call", [lambda fc, h: fc(h), lambda fc, h: fc(input=h), lambda fc, h: fc(h, mask=h * 0),
                                  lambda fc, h: fc(mask=h * 0, input=h)])
def test_inputs_by_place_and_by_name(call):
    net = Body(call=call)
    net.fc = Masked(4, 2)
    read = Features(net, ["fc:input", "a"])(x())
    assert read["fc:input"].equal(read["a"])


def test_an_input_that_is_no_tensor():
    net = Body(call=lambda fc, h: fc([h]))
    net.fc = Give(lambda hs: hs[0])
    assert "layer 'fc:input' gives a list, not a tensor" in refusal(lambda: Features(net, ["fc:input"])(x()))
    net.call, net.fc.give = (lambda fc, h: fc(x=None)), lambda x: torch.zeros(1)
    assert "layer 'fc:input' gives a NoneType" in refusal(lambda: Features(net, ["fc:input"])(x()))


# --- names

class Wrapped(nn.Module):
    def __init__(self, net, name="module"):
        super().__init__()
        self.name = name
        self.add_module(name, net)

    def forward(self, *args):
        return getattr(self, self.name)(*args)


def within(name):
    return lambda net: Wrapped(net, name)


def small():
    torch.manual_seed(0)
    inner = nn.Sequential(OrderedDict(a=nn.Linear(4, 4), relu=nn.ReLU()))
    return nn.Sequential(OrderedDict(stem=nn.Linear(3, 4), layer=inner, fc=nn.Linear(4, 2)))


def compiled(net):
    torch._dynamo.reset()
    return torch.compile(net, backend="eager")


@pytest.mark.parametrize("wrap", [Wrapped, compiled, lambda net: Wrapped(compiled(net)), lambda net: compiled(Wrapped(net)),
                                  nn.DataParallel, torch.optim.swa_utils.AveragedModel, within("_forward_module"),
                                  within("_fsdp_wrapped_module"), lambda net: Wrapped(within("_checkpoint_wrapped_module")(net))])
def test_names_without_what_wrappers_put_before_them(wrap):
    layers = ["layer", "layer.a", "fc:input", "logits"]
    want, read = Features(small(), layers)(x()), Features(wrap(small()), layers)(x())
    assert list(read) == layers and all(torch.allclose(read[k], want[k]) for k in layers)
    assert Features(wrap(small()), ["module._orig_mod.layer"])(x())["module._orig_mod.layer"].shape == (5, 4)


def test_a_layer_that_is_compiled_by_itself():
    net = small()
    net.layer = compiled(net.layer)
    assert torch.allclose(Features(net, ["layer"])(x())["layer"], small().layer(small().stem(x())))
    said = refusal(lambda: Features(net, ["layer.a"])(x()))                # what was compiled without hooks never calls them
    assert "layer 'layer.a' ran 0 times" in said and "read a compiled network from its first run on" in said


def test_a_module_that_is_called_module_has_its_own_name():
    net = nn.Sequential(OrderedDict(module=nn.Linear(3, 4), fc=nn.Linear(4, 2)))
    assert Features(net, ["module"])(x())["module"].shape == (5, 4)


def test_wrong_names_are_short_and_near():
    net = torch.compile(create("resnet110", 10), backend="eager")
    assert "unknown layer of OptimizedModule 'layer5': did you mean 'layer" in refusal(lambda: Features(net, ["layer5"]))
    said = refusal(lambda: Features(net, ["%%%"]))
    assert "known are logits, conv1, bn1" in said and "more" in said and len(said) < 400
    assert "unknown layer" in refusal(lambda: Features(net, [""])) and "unknown layer" in refusal(lambda: Features(net, ["module"]))


def test_a_replaced_head_is_read():
    net = create("resnet8", 10, 1)
    features = Features(net, ["fc", "fc:input"])
    net.fc = nn.Linear(64, 3)
    assert features(torch.randn(2, 1, 8, 8))["fc"].shape == (2, 3)


def test_torchscript_shows_its_logits_only():
    net = torch.jit.script(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)))
    assert Features(net, ["logits"])(x())["logits"].shape == (5, 2)
    for layer in ("0", "2:input"):
        assert f"layer '{layer}' is TorchScript, which does not show its inside: read 'logits'" in refusal(lambda: Features(net, [layer]))


# --- modes of autograd

def in_place():
    return nn.Sequential(OrderedDict(a=nn.Linear(3, 4), relu=nn.ReLU(inplace=True), fc=nn.Linear(4, 2)))


def test_a_teacher_under_inference_mode_is_as_good_as_under_no_grad():
    net = in_place()
    with torch.inference_mode():
        read = Features(net, ["a", "relu:input", "relu", "logits"])(x())
    true = net.a(x()).detach()
    assert (read["a"].equal(true) and read["relu:input"].equal(true) and read["relu"].equal(true.clamp(min=0))
            and read["logits"].equal(net(x()).detach()))
    assert not any(t.is_inference() or t.requires_grad for t in read.values())
    student = torch.zeros(5, 4, requires_grad=True)
    (student * read["a"]).sum().backward()
    assert student.grad.equal(true)
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            assert "the output of layer 'a' was overwritten in place" in refusal(lambda: Features(net, ["a"])(x()))


class Part(nn.Module):
    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.fc, self.run = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2), run

    def forward(self, x):
        return self.fc(self.run(self.a, self.stem(x)))


def without_graph(a, h):
    with torch.no_grad():
        return a(h)


def in_inference(a, h):
    with torch.inference_mode():
        out = a(h)
    return out.clone()


BLIND = [without_graph, in_inference, lambda a, h: checkpoint(a, h, use_reentrant=True)]


@pytest.mark.parametrize("run", BLIND)
def test_a_layer_that_could_teach_nothing_is_an_error(run):
    net = Part(run)
    for layer in ("a", "a:input"):
        said = refusal(lambda: Features(net, [layer])(x()))
        assert f"layer '{layer}' ran where gradients are off, so a loss on it would teach nothing" in said and "use_reentrant=False" in said
    assert not net.a._forward_hooks and not net.a._forward_pre_hooks
    Features(net, ["stem", "fc", "logits"])(x())
    with torch.no_grad():
        assert Features(net, ["a"])(x())["a"].shape == (5, 4)
    assert Features(net.requires_grad_(False), ["a"])(x())["a"].shape == (5, 4)


def test_a_checkpoint_that_keeps_the_graph_gives_the_same_gradient():
    gradients = []
    for run in (lambda a, h: a(h), lambda a, h: checkpoint(a, h, use_reentrant=False)):
        net = Part(run)
        Features(net, ["a"])(x())["a"].square().sum().backward()
        gradients.append(net.a.weight.grad)
    assert gradients[0].equal(gradients[1]) and gradients[0].norm() > 0


def test_logits_without_a_graph_are_an_error_and_integers_are_not():
    assert "layer 'logits' ran where gradients are off" in refusal(lambda: Features(Body(end=lambda y: y.detach()), ["logits"])(x()))
    assert Features(Body(end=lambda y: y.argmax(1)), ["logits"])(x())["logits"].shape == (5,)
    with torch.no_grad():
        Features(Body(end=lambda y: y.detach()), ["logits"])(x())


def test_a_frozen_part_is_read_without_a_word():
    net = Part(lambda a, h: a(h))
    net.stem.requires_grad_(False)
    net.a.requires_grad_(False)
    read = Features(net, ["a", "logits"])(x())
    assert not read["a"].requires_grad and read["logits"].requires_grad


# --- the network stays as it was

def test_flags_and_hooks_stay_as_they_were():
    net = create("resnet8", 10, 1).train()
    net.layer1.eval()
    net.layer2.requires_grad_(False)
    seen = []
    own = net.layer1.register_forward_hook(lambda *args: seen.append(1))

    def flags():
        return ([m.training for m in net.modules()], [p.requires_grad for p in net.parameters()],
                [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()])

    before = flags()
    features = Features(net, ["layer1", "layer2:input", "logits"])
    for _ in range(2):
        features(torch.randn(4, 1, 8, 8))
    with pytest.raises(RuntimeError):
        features(torch.randn(4, 3, 8, 8))
    assert flags() == before and seen == [1, 1]
    own.remove()


def test_compiled_values_and_gradients():
    """The three orders of Features and torch.compile; tracing breaks at each layer, and the numbers are the same."""
    def gradient(make):
        net = in_place()
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
        features = make(net)
        read = features(x())
        (read["relu"].square().sum() + read["logits"].sum()).backward()
        again = features(x() + 1)["relu"].detach()
        return [read["relu"].detach(), read["logits"].detach(), net.a.weight.grad, net.fc.weight.grad, again]

    layers = ["a:input", "relu", "logits"]

    def itself(net):
        net.compile(backend="eager")
        return Features(net, layers)

    want = gradient(lambda net: Features(net, layers))
    for make in (itself, lambda net: Features(torch.compile(net, backend="eager"), layers),
                 lambda net: torch.compile(Features(net, layers), backend="eager")):
        torch._dynamo.reset()
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradient(make), want, strict=True))


def test_replicas_of_dataparallel_read_their_own_layers():
    features = Features(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3)), ["0", "2", "2:input"])
    inputs = [torch.randn(64, 16, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    want = [features(i) for i in inputs]

    def replica():                                                       # as torch makes them, on the CPU
        modules = list(features.modules())
        copies = {m: m._replicate_for_data_parallel() for m in modules}
        for m in modules:
            for name, child in m._modules.items():
                setattr(copies[m], name, copies[child])
            for name, p in m._parameters.items():
                setattr(copies[m], name, p.view_as(p))
        return copies[features]

    wrong = []

    def run(k, r):
        try:
            got = r(inputs[k])
            wrong.extend(n for n in got if not torch.allclose(got[n], want[k][n]))
        except Exception as error:
            wrong.append(error)

    for _ in range(20):
        threads = [threading.Thread(target=run, args=(k, replica())) for k in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not wrong and not any(m._forward_hooks for m in features.modules())
