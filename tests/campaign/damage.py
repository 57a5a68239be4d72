"""Files that are damaged by chance: truncated, flipped, swapped, cut, taken away, put where another was."""
import json
import os
import shutil

import torch

from campaign.kills import whole
from campaign.tally import in_child, judged
from campaign.tiny import life, result
from data_helpers import arrays, jpeg, omniglot_arrays, tiny
from relkd.checkpoints import load_checkpoint, save_checkpoint
from relkd.data import load as load_data
from relkd.models import create, save, weights_hash
from relkd.models import load as load_weights
from relkd.records import load_records
from relkd.tables.paired import csv_of, lacking, table


# ---- what damages

def _bits(content, rng, n):
    content = bytearray(content)
    for _ in range(n if content else 0):
        place = rng.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
    return bytes(content)


def _block(content, rng, new):
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[:a] + new(content[a:b]) + content[b:]


CONTENT = {
    "cut short": lambda c, rng: c[:rng.randrange(len(c) + 1)], "one bit": lambda c, rng: _bits(c, rng, 1),
    "eight bits": lambda c, rng: _bits(c, rng, 8),
    "zeros": lambda c, rng: _block(c, rng, lambda b: bytes(len(b))),
    "longer": lambda c, rng: c + rng.randbytes(rng.choice([1, 100])), "twice": lambda c, rng: c + c,
    "more inside": lambda c, rng: _block(c, rng, lambda b: b + rng.randbytes(5)),
    "less inside": lambda c, rng: _block(c, rng, lambda b: b""),
    "noise": lambda c, rng: rng.randbytes(len(c)), "empty": lambda c, rng: b"",
    "a web page": lambda c, rng: b"<html>404</html>",
    "a digit": lambda c, rng: _digit(c, rng),
    "JSON": lambda c, rng: _surgery(c, rng),
}
PLACE = ("gone", "a folder", "a link to itself", "swapped")


def _digit(content, rng):
    places = [k for k, b in enumerate(content) if chr(b).isdigit()]
    if not places:
        return content
    k = rng.choice(places)
    return content[:k] + str(rng.randrange(10)).encode() + content[k + 1:]


def _surgery(content, rng):
    """Another value, or none, somewhere in the JSON; where there is no JSON, nothing."""
    try:
        whole = json.loads(content)
    except ValueError:
        return content
    at = whole
    for _ in range(rng.randrange(4)):
        keys = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
        inner = [k for k in keys if isinstance(at[k], (dict, list)) and at[k]]
        if not inner:
            break
        at = at[rng.choice(inner)]
    keys = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
    if not keys:
        return content
    k = rng.choice(keys)
    if rng.random() < .3:
        del at[k]
    else:
        others = [None, True, -1, 0, 1e300, 10**40, "", "x", "../x", "\x00", [], {}, [[]]]
        at[k] = rng.choice([*others, str(at[k]), [at[k]]])
    return json.dumps(whole, indent=1).encode()


def harm(files, rng, most=3, place=True):
    """Damage one to `most` of these files; gives what was done, in words."""
    done = []
    for _ in range(rng.randint(1, most)):
        path, how = rng.choice(files), rng.choice([*CONTENT, *(PLACE if place else ())])
        done.append(f"{path.name} {how}")
        if path.is_dir() or path.is_symlink() or not path.exists():
            continue
        if how in CONTENT:
            path.write_bytes(CONTENT[how](path.read_bytes(), rng))
        elif how == "swapped":
            other = rng.choice(files)
            if other.is_file() and not other.is_symlink():
                a, b = path.read_bytes(), other.read_bytes()
                path.write_bytes(b)
                other.write_bytes(a)
        else:
            path.unlink()
            if how == "a folder":
                path.mkdir()
            if how == "a link to itself":
                os.symlink(path.name, path)
    return ", ".join(done)


def copied(template, to):
    if to.exists():
        shutil.rmtree(to)
    shutil.copytree(template, to, symlinks=True)
    return sorted(p for p in to.rglob("*") if p.is_file())


# ---- who is damaged

def _state(k):
    return {"k": k, "w": torch.full((40,), float(k)), "list": [k, {"a": None}], "s": "x" * k}


def _which(state):
    """1 or 2: which checkpoint this is, whole; None: none; anything else is wrong."""
    if state is None:
        return None
    for k in (1, 2, 3):
        if isinstance(state, dict) and state.get("k") == k:
            like = _state(k)
            same = state.keys() == like.keys() and state["w"].equal(like["w"]) and state["list"] == like["list"]
            return k if same else "mixed"
    return "mixed"


def checkpoints(tally, at, rng):
    """Loaded: the newest, the one before it, or none; never a third thing, and never an exception. Then saved over."""
    template = at / "template"
    for k in (1, 2):
        save_checkpoint(template / "c", _state(k), "d", 700)
    found = {1: 0, 2: 0, None: 0}
    while tally.going():
        files = copied(template, at / "work")
        what = harm(files, rng)
        outcome, state = judged(lambda: load_checkpoint(at / "work/c", "d"))
        which = _which(state) if outcome is None else "refused"
        if which not in found:
            tally.add(outcome or "a state that was never saved", what)
            continue
        found[which] += 1
        outcome, _ = judged(lambda: save_checkpoint(at / "work/c", _state(3), "d", 700))
        again, state = judged(lambda: load_checkpoint(at / "work/c", "d")) if outcome is None else (None, None)
        fine = outcome == "said" or outcome is None and again is None and _which(state) == 3
        tally.add("survived" if fine else f"saved over it: {outcome or again or 'another state'}", what)
    tally.notes |= {"newest": found[2], "before": found[1], "none": found[None]}


def manifests(tally, at, rng):
    """Each bit of a manifest flipped by itself, in a random order."""
    for k in (1, 2):
        save_checkpoint(at / "c", _state(k), "d", 700)
    whole = (at / "c").read_bytes()
    places = list(range(8 * len(whole)))
    rng.shuffle(places)
    for place in places:
        if not tally.going():
            break
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        (at / "c").write_bytes(flipped)
        outcome, state = judged(lambda: load_checkpoint(at / "c", "d"))
        good = outcome is None and _which(state) in (1, 2)
        tally.add("survived" if good else outcome or "another state", f"bit {place}")
    tally.notes |= {"bits": len(places)}


def runs(tally, at, rng, kind="classification"):
    """`run` on a damaged folder of checkpoints gives the same again, or says what is wrong."""
    recipe, want, _ = whole(kind, at)
    while tally.going():
        work = at / "work"
        files = [p for p in copied(at / "whole", work) if ".runs" in p.parts and p.name != ".lock"]
        what = harm(files, rng)
        outcome, _ = in_child(lambda: life(recipe, work))
        tally.add(outcome or ("survived" if result(recipe, work) == want else "another result"), what)


def records(tally, at, rng, kind="classification"):
    """The table of damaged records is the same, or is refused in a line; a missing one shows as a missing seed."""
    recipe, _, _ = whole(kind, at)

    def drawn(out):
        found = load_records(out, recipe.name)
        return csv_of(table(found, recipe), recipe), bool(lacking(found)), len(found)

    want, _, n = drawn(at / "whole")
    template, k = at / "whole/records", 0
    while tally.going():
        files, k = [p for p in copied(template, at / "work/records")], k + 1
        what = harm(files, rng, 2)
        outcome, got = judged(lambda: drawn(at / "work"))
        if outcome is None:
            outcome = "survived" if got[0] == want else "noticed" if got[1] or got[2] < n else "another table"
        tally.add(outcome, what)


def weights(tally, at, rng):
    """Published weights: the same network, or a line."""
    net = create("resnet8x0.25", 10, 3, 0)
    save(net, "own/net", "resnet8x0.25", 10, 3, at / "template", part_size=40_000)
    want = weights_hash(load_weights("own/net", at / "template").state_dict())
    while tally.going():
        files = copied(at / "template", at / "work")
        what = harm(files, rng)
        outcome, got = judged(lambda: weights_hash(load_weights("own/net", at / "work").state_dict()))
        tally.add(outcome or ("survived" if got == want else "other weights"), what)


def _photos(root):
    for part, n in (("train", 4), ("test", 2)):
        for c in ("cat", "dog"):
            (root / "pets" / part / c).mkdir(parents=True, exist_ok=True)
            for k in range(n):
                (root / "pets" / part / c / f"{k}.jpg").write_bytes(jpeg(10 * n + k, size=16))


SETS = {"arrays": ("own", lambda root: arrays(root / "own")), "omniglot": ("omniglot", omniglot_arrays),
        "tinyimagenet.zip": ("tinyimagenet", tiny), "photos": ("pets", _photos)}


def data(tally, at, rng, which):
    """A damaged data set: the same, or a line that says so, or another set, whose fingerprint is another
    and with it the digest of every run."""
    name, make = SETS[which]
    (at / "template").mkdir(parents=True)
    make(at / "template")

    def fingerprint(root):
        return load_data(name, root).fingerprint

    outcome, want = in_child(lambda: fingerprint(at / "template"))
    assert outcome is None, outcome
    shutil.rmtree(at / "template")
    (at / "template").mkdir()
    make(at / "template")                                    # reading may have made arrays of an archive
    while tally.going():
        files = copied(at / "template", at / "work")
        what = harm(files, rng, 1)
        outcome, got = in_child(lambda: fingerprint(at / "work"), 60, 4 * 2**30)
        tally.add(outcome or ("survived" if got == want else "noticed"), f"{which}: {what}")
