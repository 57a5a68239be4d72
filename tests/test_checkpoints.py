"""Checkpoints: read whole and unchanged, or refused with the reason, and the one before is used; one run in a folder at a time."""
import json
import os
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_helpers import one_line
from forked import finish
from relkd.checkpoints import BadCheckpoint, drop_checkpoint, hold, load_checkpoint, manifest_of, read_checkpoint, save_checkpoint


@pytest.mark.parametrize("part_size", [None, 1000, 10**9])
def test_round_trip_in_parts(tmp_path, part_size):
    state = {"w": torch.randn(1000), "n": [1, {"a": None}], "s": "x"}
    save_checkpoint(tmp_path / "c", state, "d", part_size, {"members": ["m"]})
    back = load_checkpoint(tmp_path / "c", "d")
    assert back["w"].equal(state["w"]) and back["n"] == state["n"] and manifest_of(tmp_path / "c")["members"] == ["m"]
    sizes = [p.stat().st_size for p in tmp_path.glob("c.????????.*")]
    assert max(sizes) <= (part_size or 10**9) and (len(sizes) > 1) == (part_size == 1000)
    for k in range(3):
        save_checkpoint(tmp_path / "c", {"k": k}, "d")
    assert len(list(tmp_path.iterdir())) == 4, "old parts are removed: two manifests with one part each"
    drop_checkpoint(tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_a_name_with_signs_of_a_pattern_and_a_neighbour_that_begins_alike(tmp_path):
    for name in ("a[0]*.ckpt", "a[0]*.ckpt2", "a0x.ckpt"):
        for k in range(3):
            save_checkpoint(tmp_path / name, {"k": k}, "d")
    assert len(list(tmp_path.iterdir())) == 12
    drop_checkpoint(tmp_path / "a[0]*.ckpt2")
    assert len(list(tmp_path.iterdir())) == 8 and load_checkpoint(tmp_path / "a[0]*.ckpt", "d") == {"k": 2}


@pytest.mark.parametrize("damage, reason", [
    (lambda p: p.write_bytes(p.read_bytes()[:-1]), "damaged .part .* has .* bytes and another hash"),
    (lambda p: p.unlink(), "is incomplete .part .* is missing"),
    (lambda p: (p.unlink(), p.mkdir()), "is incomplete .part .* is missing"),
])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(tmp_path, damage, reason):
    save_checkpoint(tmp_path / "c", {"k": 1}, "d", 200)
    save_checkpoint(tmp_path / "c", {"k": 2}, "d", 200)
    new, old = ({p["name"] for p in manifest_of(tmp_path / name)["parts"]} for name in ("c", "c.before"))
    damage(tmp_path / min(new - old))
    with pytest.raises(BadCheckpoint, match=reason):
        read_checkpoint(tmp_path / "c", "d")
    with pytest.warns(UserWarning, match=reason):
        assert load_checkpoint(tmp_path / "c", "d") == {"k": 1}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    at = tmp_path_factory.mktemp("two")
    for k in (1, 2):
        save_checkpoint(at / "c", {"k": k}, "d", 300)
    return at, (at / "c").read_bytes()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_manifest_with_any_bit_flipped_never_leads_astray(two, data):
    at, manifest = two
    place = data.draw(st.integers(0, 8 * len(manifest) - 1))
    flipped = bytearray(manifest)
    flipped[place // 8] ^= 1 << place % 8
    (at / "c").write_bytes(flipped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_checkpoint(at / "c", "d") in ({"k": 2}, {"k": 1})


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p), lambda p: os.symlink(p, p)],
                         ids=["pipe", "folder", "device", "loop"])
@pytest.mark.parametrize("place", ["manifest", "part"])
def test_what_is_no_file_is_not_waited_for(tmp_path, make, place):
    """The fault: a pipe in the place of a part was read for ever, a device until the memory was full."""
    save_checkpoint(tmp_path / "c", {"k": 1}, "d", 200)
    save_checkpoint(tmp_path / "c", {"k": 2}, "d", 200)
    new, old = ({p["name"] for p in manifest_of(tmp_path / name)["parts"]} for name in ("c", "c.before"))
    path = tmp_path / ("c" if place == "manifest" else min(new - old))
    path.unlink()
    make(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_checkpoint(tmp_path / "c", "d") == {"k": 1}


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_one_before(tmp_path):
    save_checkpoint(tmp_path / "c", {"k": 1}, "d")
    save_checkpoint(tmp_path / "c", {"k": 2}, "d")
    (tmp_path / "c").write_text("{")
    save_checkpoint(tmp_path / "c", {"k": 3}, "d")
    assert read_checkpoint(tmp_path / "c.before", "d") == {"k": 1} and read_checkpoint(tmp_path / "c", "d") == {"k": 3}


@pytest.mark.parametrize("wrong", [
    "{", "[1]", "null", "[" * 3000, '{"digest": "d", "parts": []}', '{"digest": "d", "parts": {"name": "x"}}',
    '{"digest": 3, "parts": [1]}',
    '{"digest": "d", "parts": [{"oame": "x", "bytes": 1, "sha256": "0"}]}',
    '{"digest": "d", "parts": [{"name": "../x", "bytes": 1, "sha256": "0"}]}',
    '{"digest": "d", "parts": [{"name": "/etc/passwd", "bytes": 1, "sha256": "0"}]}',
    '{"digest": "d", "parts": [{"name": "x", "bytes": "1", "sha256": "0"}]}',
])
def test_a_manifest_that_is_not_whole_is_damaged_and_no_more(tmp_path, wrong):
    save_checkpoint(tmp_path / "c", {"k": 1}, "d")
    save_checkpoint(tmp_path / "c", {"k": 2}, "d")
    (tmp_path / "c").write_text(wrong)
    assert manifest_of(tmp_path / "c") is None
    with pytest.warns(UserWarning, match=r"checkpoint refused: c is damaged \(no manifest\)"):
        assert load_checkpoint(tmp_path / "c", "d") == {"k": 1}
    save_checkpoint(tmp_path / "c", {"k": 3}, "d")
    assert read_checkpoint(tmp_path / "c", "d") == {"k": 3}


def test_foreign_and_missing_checkpoints(tmp_path):
    save_checkpoint(tmp_path / "c", {"k": 1}, "other")
    one_line(lambda: read_checkpoint(tmp_path / "c", "mine"), "c belongs to another run (other; this one is mine)")
    with pytest.warns(UserWarning, match="belongs to another run"):
        assert load_checkpoint(tmp_path / "c", "mine") is None
    assert load_checkpoint(tmp_path / "none", "mine") is None and manifest_of(tmp_path / "none") is None


def test_a_checkpoint_is_data_and_not_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    save_checkpoint(tmp_path / "c", {"k": Evil()}, "d")
    with pytest.raises(BadCheckpoint, match="c cannot be loaded"):
        read_checkpoint(tmp_path / "c", "d")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("calls_before", range(5))
def test_a_full_disk_leaves_the_old_checkpoint_good(tmp_path, monkeypatch, calls_before):
    save_checkpoint(tmp_path / "c", {"k": 1}, "d", 400)
    real, calls = os.fsync, []

    def full(fd):
        calls.append(fd)
        if len(calls) > calls_before:
            raise OSError(28, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    one_line(lambda: save_checkpoint(tmp_path / "c", {"k": 2}, "d", 400), "cannot write", "No space left on device")
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(tmp_path / "c", "d") == {"k": 1}
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_keeps_no_pieces_and_many_parts_are_removed(tmp_path, monkeypatch):
    path, left = tmp_path / "x.ckpt", [5]
    monkeypatch.setattr(os, "fsync", lambda f: None)
    save_checkpoint(path, {"x": torch.zeros(300)}, "d", 2)
    assert len(list(tmp_path.glob("*.1[0-9][0-9][0-9]"))) > 100
    save_checkpoint(path, {"x": torch.ones(3)}, "d")
    save_checkpoint(path, {"x": torch.ones(3)}, "d")
    kept = {p.name for p in tmp_path.iterdir()}
    assert len(kept) <= 4

    def full(f):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device"):
        save_checkpoint(path, {"x": torch.ones(300)}, "d", 100)
    assert {p.name for p in tmp_path.iterdir()} == kept and read_checkpoint(path, "d")["x"].equal(torch.ones(3))


def enter(folder, die=False):
    hold(folder).__enter__()
    if die:
        os.kill(os.getpid(), 9)


def test_one_at_a_time_and_the_second_is_told_who_is_there(tmp_path):
    with hold(tmp_path / "runs"):
        message = one_line(lambda: hold(tmp_path / "runs").__enter__(),
                           f"another run (process {os.getpid()}) is at work in {tmp_path / 'runs'}", "--out")
        code, said = finish(enter, tmp_path / "runs", said=tmp_path / "said.txt")
        assert code == 1 and message in said
    with hold(tmp_path / "runs"):
        pass


def test_a_lock_ends_with_its_process_however_it_ends(tmp_path):
    assert finish(enter, tmp_path, True, said=tmp_path / "said.txt")[0] == -9
    assert (tmp_path / ".lock").read_text().isdecimal()
    with hold(tmp_path):
        pass


def test_a_manifest_says_its_version(tmp_path):
    save_checkpoint(tmp_path / "c", {}, "d")
    assert json.loads((tmp_path / "c").read_text())["version"] == 2
