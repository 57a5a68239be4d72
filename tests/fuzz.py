"""Losses on random input, against formulas in float64 that were written for this: no eps, nothing clever.
What a case is, what it must keep, and what is compared with what; test_numbers.py asks a slice,
`tests.campaign` as many as one likes."""
import copy
import math
import random

import torch
import torch.nn.functional as F

from helpers import CASES, DTYPES, as_given, gen, make

EPS_PKT = 1e-7                                              # part of PKT's formula: both probabilities inside the logarithm


# ---- formulas

def unit(e):
    """Rows of length 1, however short or long they were; a row of zeros stays one."""
    length = torch.linalg.vector_norm(e, dim=-1, keepdim=True)
    return e / length.masked_fill(length == 0, math.inf)


def lengths(e):
    return torch.linalg.vector_norm(e[:, None] - e[None], dim=2)


def rkd_distance(s, t, loss):
    n = len(s)
    ds, dt = (d / (d.sum() / (n * (n - 1))) for d in map(lengths, (s, t)))
    return F.smooth_l1_loss(ds, dt) * (n / (n - 1) if loss.distinct else 1)


def cosines(e):
    u = unit(e[None] - e[:, None])
    return u @ u.mT


def rkd_angle(s, t, loss):
    each = F.smooth_l1_loss(cosines(s), cosines(t), reduction="none")
    if not loss.distinct:
        return each.mean()
    same = torch.eye(len(s), dtype=torch.bool)
    return each[~(same[:, :, None] | same[:, None] | same[None])].mean()


def rkd(s, t, loss):
    return loss.w_distance * rkd_distance(s, t, loss.distance) + loss.w_angle * rkd_angle(s, t, loss.angle)


def kd(s, t, loss):
    log_q, log_p = ((z / loss.T).log_softmax(1) for z in (s, t))
    return loss.T**2 * (log_p.exp() * (log_p - log_q)).sum() / len(s)


def sp(s, t, loss):
    tables = []
    for e in (s, t):
        gram = e.flatten(1) @ e.flatten(1).t()
        norm = torch.linalg.vector_norm(gram, dim=1 if loss.norm == "row" else None, keepdim=True)
        tables.append(gram / norm)
    return (tables[0] - tables[1]).square().mean()


def cc(s, t, loss):
    o, tables = loss.options, []
    for e in (s, t):
        u = unit(e) if o["normalise"] else e
        c, q = u @ u.t(), lengths(u).square()
        if o["kernel"] == "mmd":
            tables.append(lengths(u))
        elif o["kernel"] == "bilinear":
            tables.append(c)
        elif o["order"] is None:
            tables.append((-o["gamma"] * q).exp())
        else:
            powers = range(o["order"] + 1)
            g = 2 * o["gamma"]
            tables.append(math.exp(-g) * sum((g * c)**p / math.factorial(p) for p in powers))
    return (tables[0] - tables[1]).square().mean()


def pkt(s, t, loss):
    n, found = len(s), []
    for e in (s, t):
        k = (unit(e) @ unit(e).t() + 1) / 2
        k = k.masked_fill(torch.eye(n, dtype=torch.bool), 0) if loss.distinct else k
        found.append(k / k.sum(1, keepdim=True))
    q, p = found
    total = (p * ((p + EPS_PKT) / (q + EPS_PKT)).log()).sum()
    return total / (n if loss.reduction == "batchmean" else n * (n - 1) if loss.distinct else n * n)


def one_size(s, t):
    size = [min(a, b) for a, b in zip(s.shape[2:], t.shape[2:])]
    return (F.adaptive_avg_pool2d(f, size) for f in (s, t))


def at(s, t, loss):
    s, t = one_size(s, t)
    a, b = (unit(f.abs().pow(loss.p).mean(1).flatten(1)) for f in (s, t))
    return (a - b).square().mean()


def nst(s, t, loss):
    x, y = (unit(f.flatten(2)) for f in one_size(s, t))
    return sum(f * (a @ b.mT).square().mean() for f, a, b in ((1, x, x), (-2, x, y), (1, y, y)))


def fitnet(s, t, loss):
    s, t = one_size(s, t)
    r = loss.regressors[0]
    return F.mse_loss(torch.einsum("nchw,oc->nohw", s, r.weight.double()) + r.bias.double()[:, None, None], t)


def vid(s, t, loss):
    s, t = one_size(s, t)
    a, b, c = (layer.weight.double() for layer in loss.regressors[0][::2])
    mu = F.conv2d(F.conv2d(F.conv2d(s, a).relu(), b).relu(), c)
    variance = F.softplus(loss.alphas[0].double()) + loss.eps
    return (((mu - t).square() / variance[:, None, None] + variance.log()[:, None, None]) / 2).mean()


def connected(s, loss):
    c = loss.connectors[0]
    if not hasattr(c, "weight"):
        return s
    f = torch.einsum("nchw,oc->nohw", s, c.weight.double())
    mean, var = f.mean((0, 2, 3), keepdim=True), f.var((0, 2, 3), keepdim=True, unbiased=False)
    weight, bias = (p.double()[:, None, None] for p in (c.norm.weight, c.norm.bias))
    return (f - mean) / (var + c.norm.eps).sqrt() * weight + bias


def ab(s, t, loss):
    s, t = one_size(s, t)
    s = connected(s, loss)
    side = torch.where(t > 0, 1., -1.)
    return (loss.margin - s * side).relu().square().sum() * loss.scale / len(s)


def ofd(s, t, loss):
    s, t = one_size(s, t)
    s = connected(s, loss)
    below = t.clamp(max=0)
    margin = below.sum((0, 2, 3)) / (t < 0).sum((0, 2, 3)).clamp(min=1) if loss.measured else loss.margin0.double()
    target = torch.maximum(t, margin[:, None, None])
    counts = (s > target) | (target > 0)
    return ((s - target).square() * counts).sum() * loss.scale / len(s)


def ft(s, t, loss):
    s, t = one_size(s, t)
    of_s, of_t = (copy.deepcopy(n).double() for n in (loss.translators[0], loss.paraphrasers[0].encoder))
    return (unit(of_s(s).flatten(1)) - unit(of_t(t).flatten(1))).abs().pow(loss.p).mean()


def ft_shortcut(s, t, loss):
    a, b = (unit(f.square().mean(1).flatten(1)) for f in one_size(s, t))
    return (a - b).abs().pow(loss.p).mean()


def fsp(s, t, loss):
    def flow(f, g):
        size = [min(a, b) for a, b in zip(f.shape[2:], g.shape[2:])]
        f, g = (F.adaptive_max_pool2d(x, size).flatten(2) for x in (f, g))
        return f @ g.mT / f.shape[2]

    pairs = [(k, k + 1) for k in range(len(s) - 1)]
    return sum((flow(s[i], s[j]) - flow(t[i], t[j])).square().sum((1, 2)).mean() for i, j in pairs)


def scored(z):
    return (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)


def as_read(s, t, loss):
    return (s, t) if not loss.standardise else (scored(s), scored(t))


def dkd(s, t, loss, index):
    s, t = (z / loss.T for z in as_read(s, t, loss))
    label, total = loss.classes[index], 0.
    for z, v, y in zip(s, t, label):
        keep = torch.arange(len(z)) != y
        q, p = (torch.stack([x[y], x[keep].logsumexp(0)]).log_softmax(0) for x in (z, v))
        others_q, others_p = z[keep].log_softmax(0), v[keep].log_softmax(0)
        total = total + loss.alpha * (p.exp() * (p - q)).sum() + loss.beta * (others_p.exp() * (others_p - others_q)).sum()
    return loss.T**2 * total / len(s)


def dist(s, t, loss):
    s, t = ((z / loss.tau).log_softmax(1) for z in as_read(s, t, loss))

    def apart(s, t):                                         # of rows; a factor on a row cancels, or float64 has no numbers for it
        x, y = ((e - e.detach().amax(1, keepdim=True)).exp() for e in (s, t))
        x, y = (e - e.mean(1, keepdim=True) for e in (x, y))
        return 1 - ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).mean()

    return loss.tau**2 * (loss.beta * apart(s, t) + loss.gamma * apart(s.mT, t.mT))


def crd(s, t, loss, index, negatives):
    chosen, K = torch.cat([index[:, None], negatives], 1), negatives.shape[1]
    share, total = K / loss.samples, 0.
    for e, layer, memory in ((s, loss.embed_s, loss.memory_t), (t, loss.embed_t, loss.memory_s)):
        v = unit(F.linear(e, layer.weight.double(), layer.bias.double()))
        score = torch.einsum("nd,nkd->nk", v, memory.double()[chosen]) / loss.T
        log_z = (score.detach().flatten().logsumexp(0) - math.log(score.numel())) + math.log(loss.samples)
        p = (score - log_z).exp()
        right, wrong = p[:, 0] / (p[:, 0] + share + loss.eps), share / (p[:, 1:] + share + loss.eps)
        total = total - (right.log() + wrong.log().sum(1)).mean()
    return total


FORMULAS = {"RKD": rkd, "RKD distinct": rkd, "RKDDistance": rkd_distance, "RKDDistance distinct": rkd_distance,
            "RKDAngle": rkd_angle, "RKDAngle distinct": rkd_angle, "KD": kd, "SP": sp, "SP global": sp,
            "PKT": pkt, "PKT distinct": pkt, "PKT batchmean": pkt, "AT": at, "AT 1": at, "AT 3": at, "NST": nst,
            "FitNet": fitnet,
            "VID": vid,
            "AB": ab,
            "AB plain": ab,
            "OFD": ofd,
            "OFD plain": ofd,
            "OFD fixed": ofd,
            "FT": ft, "FTShortcut": ft_shortcut, "FSP": fsp, "CRD": crd,
            "KD standardised": lambda s, t, loss: kd(scored(s), scored(t), loss),
            **{name: dkd for name in CASES if name.startswith("DKD")},
            **{name: dist for name in CASES if name.startswith("DIST")},
            **{name: cc for name in CASES if name.startswith("CC")}}
# what does not depend on the scale of either side, and holds whatever the scale is
SCALE_FREE = ["RKD", "RKDDistance", "RKDDistance distinct", "RKDAngle", "SP", "SP global", "PKT", "PKT distinct",
              "KD standardised", "DKD standardised", "DIST standardised",
              *(name for name in FORMULAS if name.startswith("CC") and name != "CC raw")]


def layers_of(name, n, k, seed, dtype=torch.float64):
    """A batch for a case: the layers of the student and of the teacher, and what the loss is told beside them."""
    g = gen(seed)
    s, t = ([torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes] for shapes in CASES[name][1](n, k))
    more = {}
    if name.startswith(("CRD", "DKD")):
        more = {"index": torch.randperm(2000, generator=g)[:n]}
    if name.startswith("CRD"):
        more["negatives"] = torch.randint(2000, (n, 7), generator=g)
    return [f.to(dtype) for f in s], [f.to(dtype) for f in t], more


def by_formula(name, loss, s, t, more):
    """Value and gradients of the formula, all in float64."""
    s, t = ([f.detach().double() for f in layers] for layers in (s, t))
    for f in s:
        f.requires_grad_()
    value = FORMULAS[name](as_given(s), as_given(t), loss, **more)
    return value.detach(), torch.autograd.grad(value, s)


def by_loss(loss, s, t, more):
    """Value and gradients of the loss, whose memories stay as they are."""
    s = [f.detach() for f in s]
    for f in s:
        f.requires_grad_()
    value = copy.deepcopy(loss)(as_given(s), as_given(t), **more)
    return value, torch.autograd.grad(value, s)


# ---- the same at every scale

def off_by(found, exact):
    """Largest relative deviation of the value, and of a gradient, by its norm."""
    (a, ga), (b, gb) = found, exact
    of_value = ((a.double() - b).abs() / b.abs().clamp(min=1e-300)).item()
    return of_value, max(((x.double() - y).norm() / y.norm()).item() for x, y in zip(ga, gb))


def at_scale(name, of_student, of_teacher, n=16, seed=0):
    """Deviations (value, gradient) in float32 of a loss whose layers are multiplied by powers of ten."""
    s, t, more = layers_of(name, n, 1, seed, torch.float32)
    s, t = ([f * 10.**power for f in layers] for layers, power in ((s, of_student), (t, of_teacher)))
    loss = make(name)
    exact = by_formula(name, loss, s, t, more)
    size = 10.**of_student                                   # 1 / size would leave float32 in a norm, not in float64
    value, gradients = by_loss(loss, s, t, more)
    return off_by((value, [g.double() * size for g in gradients]), (exact[0], [g * size for g in exact[1]]))


def silent(name, power):
    """In words, what is wrong with a loss at a scale that it need not bear: a value as if nothing were the matter,
    and no gradient. '' if nothing is."""
    s, t, more = layers_of(name, 8, 1, 0, torch.float32)
    s, t = ([f * 10.**power for f in layers] for layers in (s, t))
    value, gradients = by_loss(make(name), s, t, more)
    if value.isfinite() and not any(g.any() for g in gradients):
        return f"{name} at 1e{power}: value {value.item():g}, gradient 0"
    return ""


# ---- anything at all

CONTENTS = {                                                 # kind -> what becomes of normal numbers; the first ones are ordinary
    "normal": lambda f: f, "relu": lambda f: f.relu() + .01, "uniform": lambda f: torch.special.ndtr(f),
    "shifted": lambda f: f + 3, "wide": lambda f: f.sign() * f.abs().exp(),
    "sparse": lambda f: f * (f.abs() > 1.5), "zeros": lambda f: 0 * f, "constant": lambda f: 0 * f + 1.7,
    "two alike": lambda f: torch.cat([f[:1], f[:1], f[2:]])[:len(f)],
    "all alike": lambda f: f[:1].expand_as(f).clone(),
    "one zero": lambda f: torch.cat([0 * f[:1], f[1:]]),
    "opposite": lambda f: torch.cat([f[:1], -f[:1], f[2:]])[:len(f)],
    "one large": lambda f: torch.cat([1e3 * f[:1], f[1:]]),
    "whole": lambda f: f.round(),
    "signs": lambda f: f.sign(),
    "last only": lambda f: torch.cat([0 * f[:, :-1], f[:, -1:]], 1),
    "far": lambda f: f + 300,
    "tiny": lambda f: 1e-4 * f,
}
ORDINARY = list(CONTENTS)[:4]


def strided(f):
    return torch.stack([f, -f], -1)[..., 0]


LAYOUTS = {
    "plain": lambda f: f,
    "turned": lambda f: f.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": strided,
    "a part": lambda f: torch.cat([f, f])[:len(f)], "channels last":
        lambda f: f.contiguous(memory_format=torch.channels_last) if f.dim() == 4 else f,
}
TOLERANCE = {"KD": (1e-3, 4e-3), "DKD": (1e-2, 1e-2), "DIST": (5e-3, 1e-2), "PKT": (5e-4, 5e-4), "RKD": (1e-4, 2e-4),
             "RKDAngle": (2e-5, 2e-3),
             "RKDDistance": (1e-4, 5e-4)}


def tolerance(name):
    return TOLERANCE.get(name.split()[0], (2e-5, 1e-4))


def drawn(rng):
    """A case as a dictionary, in words."""
    name = rng.choice(list(CASES))
    kinds = ORDINARY if rng.random() < .5 else list(CONTENTS)
    return {"name": name, "n": rng.choice([3, 4, 5, 8, 16, 33]), "k": rng.choice([1, 1, 2]), "seed": rng.randrange(10**6),
            "student": rng.choice(kinds),
            "teacher": rng.choice(kinds),
            "power": rng.choice([0, 0, 0, -3, -1, 1, 3]),
            "of student": rng.choice(DTYPES), "of teacher": rng.choice(DTYPES),
            "laid out": rng.choice(list(LAYOUTS)), "teacher wants": rng.random() < .2}


def complaint(case):
    """In words, what is wrong with a loss in this case; '' if nothing is."""
    name, grows = case["name"], case["name"] == "CC raw" or case["name"].startswith("FSP")
    s, t, more = layers_of(name, case["n"], case["k"], case["seed"])
    power = min(case["power"], 0) if grows else case["power"]
    s, t = ([CONTENTS[case[of]](f) * 10.**power for f in layers] for of, layers in (("student", s), ("teacher", t)))
    lay = LAYOUTS[case["laid out"]]
    s, t = ([lay(f.to(case[f"of {of}"])) for f in layers] for of, layers in (("student", s), ("teacher", t)))
    if not all(f.isfinite().all() for f in (*s, *t)):
        return ""                                            # left float16 before the loss saw it
    for f in t:
        f.requires_grad_(case["teacher wants"])
    loss = make(name)
    if name.startswith("FT"):
        loss.eval()                                          # batch statistics of silent maps magnify
    value, gradients = by_loss(loss, s, t, more)
    wide = torch.float64 if torch.float64 in (case["of student"], case["of teacher"]) else torch.float32
    if value.shape != () or value.dtype not in (torch.float32, wide):
        return f"value of shape {tuple(value.shape)}, {value.dtype}"
    if any(f.grad is not None for f in t):
        return "the teacher has a gradient"
    if any(g.dtype != f.dtype or g.shape != f.shape for g, f in zip(gradients, s)):
        return "a gradient of another shape or type than its layer"
    rough = grows or torch.float16 in (case["of student"], case["of teacher"]) and power > 0
    finite = value.isfinite() and all(g.isfinite().all() for g in gradients)
    if not finite and not rough and not _beyond_float16(name, s, t, more):
        return f"value {value.item():g}, gradients {[g.abs().max().item() for g in gradients]}"
    return _far_off(case, loss, s, t, more, value, gradients) if finite and _ordinary(case) else ""


def _beyond_float16(name, s, t, more):
    """Is the right gradient, taken in float32, one that float16 cannot say?"""
    if not any(f.dtype == torch.float16 for f in s):
        return False
    gradients = by_loss(make(name), [f.detach().float() for f in s], t, more)[1]
    return any(g.abs().max() > torch.finfo(torch.float16).max for g in gradients)


def _ordinary(case):
    name = case["name"]
    ties = name == "FSP" and case["student"] == "relu"        # which of two equal responses is the largest?
    small = name in ("CC raw", "AB") and case["power"] < 0    # what they compare is far below 1 then
    # probabilities of 0 and 1, or all alike: gradients are rounding
    sure = name.startswith(("DKD", "DIST")) and case["power"] > 1 or name.startswith("DIST") and case["power"] < -1
    return name in FORMULAS and {case["student"], case["teacher"]} <= {*ORDINARY} and not (ties or small or sure)


def _far_off(case, loss, s, t, more, value, gradients):
    exact, fine = by_formula(case["name"], loss, s, t, more), tolerance(case["name"])
    of_value, of_gradient = off_by((value, gradients), exact)
    half = any(f.dtype.itemsize < 4 for f in s)               # a gradient is rounded to its layer's type
    if of_value > fine[0] or of_gradient > fine[1] and not half:
        return f"value off by {of_value:.1e}, gradient by {of_gradient:.1e}"
    return ""


def cases(seed):
    """Cases without end."""
    rng = random.Random(seed)
    while True:
        yield drawn(rng)
