"""The ground: files written whole, names for errors, digests, and seeds."""
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_helpers import one_line
from relkd.ground import FIRST, check_writable, digest, nearest, seeded, slug, stage_stream, step_seed, teacher_seed, write_atomically


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomically(path, b"old")

    def full(*a):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    one_line(lambda: write_atomically(path, b"new"), f"cannot write {path}: No space left on device; name a folder that can be written to")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_folder_that_cannot_be_written_to_is_said_with_the_option_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    one_line(lambda: check_writable(tmp_path / "file" / "figures", "--out"), "cannot write",
             "name a folder that can be written to with --out")


def test_asking_at_the_same_time_whether_a_folder_can_be_written_to(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: check_writable(tmp_path / "new"), range(200)))
    assert os.listdir(tmp_path / "new") == []


def test_what_killed_writes_left_goes_when_it_is_a_day_old(tmp_path):
    """The fault: a temporary file stayed for ever for every write that was killed."""
    names = ["x.json.abcdefgh.tmp", "x.json.12345678.tmp", "y.json.abcdefgh.tmp"]
    for name in names:
        (tmp_path / name).touch()
    os.utime(tmp_path / names[0], (0, 0))
    os.utime(tmp_path / names[2], (0, 0))
    write_atomically(tmp_path / "x.json", b"")
    assert sorted(os.listdir(tmp_path)) == ["x.json", names[1], names[2]], "a younger one may be under way, another's is not ours"


def test_the_nearest_name_or_the_names_there_are():
    assert nearest("row", "RKD-AD", ["RKD-D", "HKD"]) == "unknown row 'RKD-AD': did you mean 'RKD-D'?"
    assert nearest("row", "zzz", ["RKD-D", "HKD"]) == "unknown row 'zzz': known are RKD-D, HKD"
    assert nearest("seed", "zzz", map(str, range(20)), most=2).endswith("known are 0, 1 and 18 more")


@given(st.dictionaries(st.text(max_size=2), st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2), max_size=3))
def test_a_digest_is_of_the_content_alone(d):
    shuffled = dict(reversed(d.items()))
    assert digest(d) == digest(shuffled) == digest({k: tuple(v) if isinstance(v, list) else v for k, v in d.items()})
    assert len(digest(d)) == 12 and digest({**d, "more": 1}) != digest(d) != digest([d])


def test_a_slug_is_a_file_name():
    assert (slug("HKD + RKD-DA"), slug("cifar100/cpu")) == ("hkd+rkd-da", "cifar100-cpu")


@given(st.integers(0, 2**40))
def test_seeded_is_manual_seed(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        want, state = (torch.rand(3), torch.randn(5), torch.randperm(7)), torch.get_rng_state()
        torch.rand(9)
        seeded(seed)
        got = torch.rand(3), torch.randn(5), torch.randperm(7)
        assert all(a.equal(b) for a, b in zip(got, want)) and torch.get_rng_state().equal(state)


@given(st.integers(0, 10**6), st.integers(0, FIRST - 1), st.integers(0, 3), st.integers(0, 3))
def test_streams_of_stages_steps_and_teachers_do_not_meet(seed, epoch, stage, other):
    assert stage_stream(stage, epoch) != epoch and (stage == other or stage_stream(stage, epoch) != stage_stream(other, epoch))
    assert step_seed(seed, epoch) < step_seed(seed, epoch + 1) <= step_seed(seed + 1, 0) and teacher_seed(seed) == seed + 1000


@pytest.mark.parametrize("call, name", [(step_seed, "step_seed"), (stage_stream, "stage_stream")])
def test_seeds_are_those_of_the_committed_records(call, name):
    assert (call(2, 5) == {"step_seed": 2_000_011, "stage_stream": 1_500_005}[name] and teacher_seed(7) == 1007
            and stage_stream(0, 3) == 500_003)
