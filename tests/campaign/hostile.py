"""Files and options made by hand to break in or to break down: refused in a line, or read as if they were harmless.
Nothing in a file is executed, nothing is written outside the folder, nothing takes the whole memory or for ever."""
import io
import json
import os
import pickle
import shutil
import sys
import zipfile
import zlib

import numpy as np
import torch

from campaign.kills import undisturbed, whole
from campaign.tally import in_child
from campaign.tiny import life, result
from data_helpers import arrays, jpeg, tiny
from relkd.checkpoints import load_checkpoint, manifest_of, save_checkpoint
from relkd.data import inventory
from relkd.data import load as load_data
from relkd.models import create, save, weights_hash
from relkd.models import load as load_weights
from relkd.records import load_records, to_tensorboard, write_record
from relkd.tables.paired import as_text, csv_of, draw, table


class Evil:
    """What a pickle may hold: a command."""
    def __init__(self, at):
        self.at = at

    def __reduce__(self):
        return os.system, (f"touch {self.at}/executed",)


# ---- checkpoints

def _checkpoint(at, damage):
    """A good checkpoint, one before it, and the newest damaged by hand."""
    for k in (1, 2):
        save_checkpoint(at / "in/c", {"k": k}, "d", 200)
    damage(at / "in", at / "in/c")
    return load_checkpoint(at / "in/c", "d") in ({"k": 1}, {"k": 2}, None) or "a state that was never saved"


def _manifest(change):
    def damage(folder, path):
        m = json.loads(path.read_text())
        change(m)
        path.write_text(json.dumps(m))
    return damage


def _named(name):
    return _manifest(lambda m: m["parts"].__setitem__(0, m["parts"][0] | {"name": name}))


def _instead(make):
    """Something that is no file in the place of a part."""
    def damage(folder, path):
        part = folder / json.loads(path.read_text())["parts"][0]["name"]
        part.unlink()
        make(part)
    return damage


def _of_the_manifest(make):
    def damage(folder, path):
        path.unlink()
        make(path)
    return damage


def _evil_state(folder, path):
    path.unlink()
    save_checkpoint(path, {"k": Evil(folder.parent)}, "d")


PLACES = {"a pipe": os.mkfifo, "a folder": os.mkdir, "a link to /dev/zero": lambda p: os.symlink("/dev/zero", p),
          "a link to itself": lambda p: os.symlink(p, p),
          "a link to nothing": lambda p: os.symlink("nothing", p)}
CHECKPOINTS = {
    "a command in the state": _evil_state,
    "a part named /etc/passwd": _named("/etc/passwd"),
    "a part above": _named("../c"),
    "a part named ..": _named(".."), "a part of no name": _named(""), "a part with a zero byte": _named("x\0y"),
    "a part of half a letter": _named("\ud800"), "a part of 300 letters": _named("x" * 300),
    "a size of 10^40": _manifest(lambda m: m["parts"][0].update(bytes=10**40)),
    "10,000 parts": _manifest(lambda m: m.update(parts=m["parts"] * 10_000)),
    "100,000 levels": lambda folder, path: path.write_text("[" * 100_000), "a number of 10,000 digits":
        lambda folder, path: path.write_text('{"digest": ' + "9" * 10_000 + "}"),
    "not text": lambda folder, path: path.write_bytes(b"\xff\xfe\x00"),
    "a manifest of zeros": lambda folder, path: path.write_bytes(bytes(10**7)),
    **{f"{what} for a part": _instead(make) for what, make in PLACES.items()},
    **{f"{what} for the manifest": _of_the_manifest(make) for what, make in PLACES.items()},
}


# ---- a finished run's checkpoint, whole by its hashes, with something else in it

def _final(at, change):
    """What `run` makes of it: the same result, or a line."""
    recipe, want, _ = whole("classification", at)
    path = sorted((at / f"whole/.runs/{recipe.name}").glob("rkd-da-seed0*.ckpt"))[0]
    digest = manifest_of(path)["digest"]
    saved = load_checkpoint(path, digest)
    save_checkpoint(path, change(saved), digest)
    outcome, _ = in_child(lambda: life(recipe, at / "whole"), 60)
    if outcome == "said":
        raise ValueError("refused")
    return outcome or result(recipe, at / "whole") == want or "another result"


def _record(key, value):
    return lambda saved: saved | {"record": saved["record"] | {key: value}}


def _model(change):
    return lambda saved: saved | {"model": change(saved["model"])}


FINALS = {
    "nothing in it": lambda saved: {},
    "a list": lambda saved: [1],
    "no model": lambda saved: {"record": saved["record"]},
    "no record": lambda saved: {"model": saved["model"]},
    "a record that is none": lambda saved: saved | {"record": 3},
    "a record of another place": _record("recipe", "../../../escaped"),
    "a row with a path": _record("row", "../../escaped"),
    "no epochs": _record("epochs", 3), "tests that are none": _record("tests", {"top-1": 3}),
    "other layers": _model(lambda m: {f"x{k}": v for k, v in m.items()}),
    "fewer layers": _model(lambda m: dict(list(m.items())[2:])),
    "layers of another shape": _model(lambda m: {k: v.flatten()[:1] for k, v in m.items()}),
    "layers that are no tensors": _model(lambda m: {k: 3 for k in m}),
    "not finite": _model(lambda m: {k: v * float("nan") if v.is_floating_point() else v for k, v in m.items()}),
}


# ---- records

def _table(at, change):
    """The table, its files, and the event files of records that somebody changed."""
    recipe, _, _ = whole("classification", at)
    for r in load_records(at / "whole", recipe.name):
        write_record(at / "in", change(json.loads(json.dumps(r))))
    found = load_records(at / "in", recipe.name)
    frame = draw(recipe, at / "in")
    csv_of(table(found, recipe), recipe)
    to_tensorboard(found, at / "in/events")
    text = as_text(frame)
    return all(line.isprintable() for line in text.splitlines()) or f"signs that a terminal obeys: {text[:60]!r}"


def _row(name):
    def change(r):
        if r["row"] == "RKD-DA":
            r["row"] = name
        return r
    return change


def _field(key, value):
    return lambda r: r | {key: value}


RECORDS = {
    "a row with a dollar": _row("a$_b"),
    "a row with two dollars": _row(r"$\frac$"),
    "a row that clears the screen": _row("\x1b[2J\x07row"),
    "a row of two lines": _row("a\nb"),
    "a row from right to left": _row("\u202eabc"),
    "a row of 100,000 letters": _row("x" * 100_000),
    "a row of nothing": _row(""),
    "a row with a path": _row("../../escaped"),
    "a row with a zero byte": _row("a\0b"),
    "a row with half a letter": _row("a\ud800"),
    "a seed that climbs": _field("seed", "/../../../escaped"),
    "a seed of 10^30": _field("seed", 10**30),
    "a seed below 0": _field("seed", -1),
    "a variant that climbs": _field("variant", {"../../x": "/escaped"}),
    "a recipe that climbs": _field("recipe", "../../escaped"),
    "epochs that are none": _field("epochs", [3]), "an accuracy that is none": _field("last", float("nan")),
    "an accuracy of 10^300": _field("last", 1e300), "tests that are none": _field("tests", {"top-1": None}),
    "a best that is text": _field("best", "x"),
    "a version of 10^9": _field("version", 10**9),
    "no protocol": _field("protocol", {}),
}


# ---- weights

def _weights(at, change):
    net = create("resnet8x0.25", 10, 3, 0)
    save(net, "own/net", "resnet8x0.25", 10, 3, at / "in", part_size=40_000)
    path = at / "in/own/net.json"
    change(at / "in/own", path)
    found = weights_hash(load_weights("own/net", at / "in").state_dict())
    return found == weights_hash(net.half().float().state_dict()) or "other weights"


def _published(change):
    def damage(folder, path):
        m = json.loads(path.read_text())
        m = change(m) or m
        path.write_text(json.dumps(m))
    return damage


def _part(content):
    """A part with this content, and a manifest that says so."""
    def damage(folder, path):
        import hashlib

        m = json.loads(path.read_text())
        data = content(folder / m["parts"][0]["name"])
        (folder / m["parts"][0]["name"]).write_bytes(data)
        m["parts"][0] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        path.write_text(json.dumps(m))
    return damage


def _pickled(thing):
    out = io.BytesIO()
    torch.save(thing, out)
    return out.getvalue()


WEIGHTS = {
    "a part above": _published(lambda m: m["parts"][0].update(name="../../../etc/passwd")),
    "a part that is a number": _published(lambda m: m["parts"][0].update(name=3)),
    "parts that are none": _published(lambda m: m.update(parts=3)),
    "no parts": _published(lambda m: m.update(parts=[])), "a list": _published(lambda m: [1]),
    "a network of 10^5 layers": _published(lambda m: m.update(network="resnet100002")),
    "a network 10^5 wide": _published(lambda m: m.update(network="resnet8x100000")),
    "a network 10^400 wide": _published(lambda m: m.update(network="resnet8x" + "9" * 400)),
    "a network that is a number":
        _published(lambda m: m.update(network=5)), "classes as text": _published(lambda m: m.update(classes="10")),
    "10^12 classes": _published(lambda m: m.update(classes=10**12)),
    "-1 classes": _published(lambda m: m.update(classes=-1)),
    "channels null": _published(lambda m: m.update(channels=None)),
    "options that are none": _published(lambda m: m.update(options=3)),
    "an option that is none": _published(lambda m: m.update(options={"evil": 1})),
    "a part as a pickle": _part(lambda p: _pickled({"x": torch.zeros(1)})),
    "a command in a part": _part(lambda p: pickle.dumps(Evil(p.parents[2]))),
    "a header of 10^18 bytes": _part(lambda p: (10**18).to_bytes(8, "little") + p.read_bytes()[8:]),
    "a header that is no JSON": _part(lambda p: (8).to_bytes(8, "little") + b"{{{{{{{{"),
    "an empty part": _part(lambda p: b""),
    "not finite": _part(lambda p: _nan(p.read_bytes())),
    **{f"{what} for a part": lambda folder, path, make=make: _instead(make)(folder, path) for what, make in PLACES.items()},
    **{f"{what} for the manifest": _of_the_manifest(make) for what, make in PLACES.items()},
}


def _nan(content):
    from safetensors.torch import load, save as as_bytes

    return as_bytes({k: v * float("nan") if v.is_floating_point() else v for k, v in load(content).items()})


# ---- data

def _arrays(at, change):
    arrays(at / "in/own")
    change(at / "in/own")
    return bool(load_data("own", at / "in").fingerprint)


def _npy(content):
    return lambda folder: (folder / "train_images.npy").write_bytes(content(folder))


def _header(text, data=b"\0" * 630):
    text = text.encode() + b" " * (-(len(text) + 11) % 64) + b"\n"
    return lambda folder: b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def _objects(folder):
    out = io.BytesIO()
    np.save(out, np.array([Evil(folder.parents[1])], dtype=object), allow_pickle=True)
    return out.getvalue()


def _png(width, height):
    """A picture that is small as a file and large when it is read."""
    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    rows = zlib.compress(bytes((width // 8 + 1) * height), 9)
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _replaced(path, make):
    path.unlink()
    make(path)


NPY = {
    "objects with a command": _npy(_objects), "a header with a call": _npy(_header(
        "{'descr': __import__('os').system('touch executed'), 'fortran_order': False, 'shape': (6,5,7,3)}")),
    "a shape of 10^18": _npy(_header("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000000000,5,7,3)}")),
    "a shape below 0": _npy(_header("{'descr': '|u1', 'fortran_order': False, 'shape': (-1,5,7,3)}")),
    "a shape that is true": _npy(_header("{'descr': '|u1', 'fortran_order': False, 'shape': (True,5,7,3)}")),
    "an empty shape": _npy(_header("{'descr': '|u1', 'fortran_order': False, 'shape': (0,5,7,3)}", b"")),
    "objects by name": _npy(_header("{'descr': '|O', 'fortran_order': False, 'shape': (6,5,7,3)}")),
    "a header of 10^4 levels": _npy(_header("(" * 10_000)), "no header": _npy(lambda folder: b"\x93NUMPY"),
    "a version of 9": _npy(lambda folder: b"\x93NUMPY\x09\x00" + bytes(100)),
    "a zip": _npy(lambda folder: b"PK\x03\x04" + bytes(100)),
    "an empty file": _npy(lambda folder: b""),
    "classes.txt as a folder": lambda folder: (folder / "classes.txt").mkdir(),
    "classes.txt that is no text": lambda folder: (folder / "classes.txt").write_bytes(b"\xff\xfe\xff\x80"),
    "classes.txt with a command for a terminal": lambda folder: (folder / "classes.txt").write_text("\x1b[2J\nb\n"),
    "splits.json of 10^5 levels": lambda folder: (folder / "splits.json").write_text("[" * 100_000),
    **{f"{what} for the images": lambda folder, make=make: _replaced(folder / "train_images.npy", make)
       for what, make in PLACES.items()},
}


def _archive(at, change):
    (at / "in").mkdir()
    tiny(at / "in", **change())
    return bool(load_data("tinyimagenet", at / "in").fingerprint)


TRAIN = "train/n01443537/images/n01443537_0.JPEG"
ZIPS = {                             # what stands in the place of an entry; made only when it is its turn
    "a list of 256 MiB": lambda: {"words.txt": bytes(2**28)}, "a picture of 256 MiB": lambda: {TRAIN: bytes(2**28)},
    "a picture of 40,000 x 40,000": lambda: {TRAIN: _png(40_000, 40_000)}, "a picture of 1 x 1": lambda: {TRAIN: _png(8, 1)},
    "a picture cut short": lambda: {TRAIN: jpeg(1)[:300]}, "a pickle for a picture": lambda: {TRAIN: pickle.dumps(Evil("."))},
    "a list that is no text": lambda: {"wnids.txt": b"\xff\xfe\x80"}, "an empty list": lambda: {"wnids.txt": ""},
    "a list with a zero byte": lambda: {"wnids.txt": "n01443537\0\nn02124075\n"}, "no lists": lambda: {"wnids.txt": None},
    "an empty line among annotations": lambda: {"val/val_annotations.txt": "\n\n"},
    "a class that climbs": lambda: {"wnids.txt": "../../escaped\nn02124075\n"},
    "a link for a picture": lambda: {TRAIN: "/etc/passwd"},
}


def _not_a_zip(at, content):
    (at / "in").mkdir(parents=True, exist_ok=True)
    (at / "in/tiny-imagenet-200.zip").write_bytes(content(at))
    return bool(load_data("tinyimagenet", at / "in").fingerprint)


def _odd_zip(method=None, version=None, encrypted=False):
    def make(at):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("tiny-imagenet-200/wnids.txt", "n01443537\n")
        data = bytearray(out.getvalue())
        for start, shift in ((0, 0), (data.rindex(b"PK\x01\x02"), 2)):
            if version:
                data[start + 4 + shift] = version
            if method:
                data[start + 8 + shift] = method
            if encrypted:
                data[start + 6 + shift] |= 1
        return bytes(data)
    return make


NO_ZIPS = {"a zip of version 9.9": _odd_zip(version=99), "a zip of an unknown method": _odd_zip(method=97),
           "a zip with a password": _odd_zip(encrypted=True), "a zip that is a web page": lambda at: b"<html>" * 100,
           "half a zip": lambda at: _odd_zip()(at)[:60]}


def _listed(at, change):
    arrays(at / "in/own")
    (at / "in/inventory.json").write_text(change(json.dumps({})))
    found = {d["name"]: d for d in inventory(at / "in")}
    return found["own"]["counts"] == {"train": 6, "test": 4} or f"shown as it was forged: {found['own']}"


def _forged(at, change):
    """An inventory that was made here, then edited."""
    arrays(at / "in/own")
    inventory(at / "in")
    path = at / "in/inventory.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    found = {d["name"]: d for d in inventory(at / "in")}
    return found["own"].get("counts") == {"train": 6, "test": 4} or f"shown as it was forged: {found['own']}"


def _entry(**change):
    def edit(known):
        known["own"]["entry"] |= change
        return known
    return edit


INVENTORY = {"counts of 10^9": _entry(counts={"train": 10**9}), "counts that are text": _entry(counts="x"),
             "a name with a path": _entry(name="../x"), "another fingerprint": _entry(fingerprint="0" * 64),
             "a shape of signs": _entry(shape=["\x1b[2J"]), "a list": lambda known: [1],
             "a state that is none": lambda known: known | {"own": {"state": None, "entry": None}}}


# ---- options

def _typed(*args, **environment):
    """The command line in this process: its exit code, which is 0 or 2, and one line of error at most."""
    def call(at):
        from relkd.cli import main

        os.chdir(at)
        os.environ |= environment
        sys.argv, out, err = ["relkd", *args], io.StringIO(), io.StringIO()
        sys.stdout, sys.stderr = out, err
        code = 0
        try:
            main()
        except SystemExit as left:
            code = left.code or 0
        said = err.getvalue()
        if code == 2 and said.count("\n") == 1:
            raise ValueError("refused")
        usage = code == 2 and said.startswith("Usage")        # typer's own three lines
        return code == 0 or usage or f"left with {code}, said {said[-200:]!r}"
    return call


LONG = "x" * 300
OPTIONS = {
    "a recipe of 300 letters": _typed("run", LONG), "a recipe that climbs": _typed("table", "../../etc/passwd"),
    "a recipe with a command": _typed("run", "\x1b[2J"),
    "a folder of 300 letters": _typed("table", "digits", "--out", LONG),
    "data of 300 letters": _typed("data", "--data", LONG),
    "RELKD_DATA of 300 letters": _typed("data", RELKD_DATA=LONG),
    "RELKD_DATA that is a file": _typed("data", RELKD_DATA="/etc/passwd"),
    "RELKD_DATA with quotes": _typed("data", RELKD_DATA='"here"'),
    "a set of 300 letters": _typed("data", "get", LONG),
    "a set that climbs": _typed("data", "get", "../../etc"),
    "a part of 0 bytes": _typed("run", "digits", "--part-size", "0"),
    "10^400 epochs": _typed("run", "digits", "--epochs", "9" * 400),
    "10^30 seeds": _typed("run", "digits", "--seeds", "0-" + "9" * 30),
    "-1 seeds": _typed("run", "digits", "--seeds", "-1"),
    "a setting with a call": _typed("run", "digits", "--set", "schedule.lr=__import__('os').system('touch executed')"),
    "a setting that reaches inside": _typed("run", "digits", "--set", "__class__.__init__=1"),
    "a setting of 10^5 levels": _typed("run", "digits", "--set", "schedule.lr=" + "(" * 100_000),
    "an out that is a file": _typed("run", "digits", "--out", "/etc/passwd"),
    "an out below a file": _typed("run", "digits", "--out", "/etc/passwd/x"),
    "an out with a zero byte": _typed("table", "digits", "--out", "a\0b"),
    "an out of half a letter": _typed("table", "digits", "--out", "a\udc80"),
    "a budget below 0": _typed("run", "digits", "--budget", "-1"),
    "a budget of 10^400": _typed("run", "digits", "--budget", "9" * 400 + "h", "--rows", "x"),
    "a file that is no recipe": _typed("run", "/etc/passwd.py"),
    "a teacher that is a folder": _typed("teacher", "check", "/etc"),
    "a teacher that is text": _typed("teacher", "check", "/etc/passwd"),
    "a teacher that is a device": _typed("teacher", "check", "/dev/null"),
}


def cases():
    """Pairs (group: name, function of a folder)."""
    groups = (("checkpoint", _checkpoint, CHECKPOINTS), ("final", _final, FINALS), ("records", _table, RECORDS),
              ("weights", _weights, WEIGHTS), ("npy", _arrays, NPY), ("archive", _archive, ZIPS),
              ("archive", _not_a_zip, NO_ZIPS), ("inventory", _forged, INVENTORY))
    for group, try_, those in groups:
        for name, what in those.items():
            yield f"{group}, {name}", lambda at, try_=try_, what=what: try_(at, what)
    for name, text in (("no JSON", "{"), ("10^5 levels", "[" * 100_000), ("a zero byte", "\0{}")):
        yield f"inventory, {name}", lambda at, text=text: _listed(at, lambda _: text)
    for name, call in OPTIONS.items():
        yield f"options, {name}", call


def hostile(tally, at, rng):
    """Each case in a process of its own with 3 GiB more than it has, for 20 seconds of computing."""
    undisturbed("classification")                             # here, and not in every child
    them = list(cases())
    rng.shuffle(them)
    for k, (name, call) in enumerate(them):
        if not tally.going():
            break
        home = at / f"case{k}" / "home"
        home.mkdir(parents=True)
        outcome, value = in_child(lambda: call(home), 30, 3 * 2**30, 20)
        outcome = outcome or ("survived" if value is True else str(value))
        beside = [*(p for p in (at / f"case{k}").iterdir() if p != home), *at.glob("*escaped*")]
        outside = [p.name for p in beside]
        if list(home.rglob("executed")) or (at / f"case{k}/executed").exists():
            outcome = "something in a file was EXECUTED"
        elif outside:
            outcome = f"written outside the folder: {outside}"
        tally.add(outcome, name)
        shutil.rmtree(at / f"case{k}", ignore_errors=True)
    tally.notes |= {"cases": len(them)}


