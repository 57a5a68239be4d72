"""Benchmarks: rounds and memory are counted rightly, what cannot run is left out in one line, both texts are made of their records."""
import json
from pathlib import Path

import pytest
import torch

from relkd import bench
from relkd.bench import interleaved, load_benchmarks, peak_memory, save_benchmark
from relkd.bench.losses import _plans
from relkd.bench.precision import TRAININGS, Training, precision_as_text, precision_benchmark, precision_table
from relkd.tasks.fewshot import FewShot
from relkd.tasks.task import Task

ROOT = Path(__file__).resolve().parents[1]


def test_cases_are_run_in_turn():
    order = []
    took = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, seconds=0., warm=2)
    assert order == ["a", "b"] * 5 and [len(v) for v in took.values()] == [3, 3]
    assert len(interleaved({"a": lambda: None}, rounds=3, seconds=1e9)["a"]) == 50


def test_memory_given_and_memory_returned_are_not_counted():
    x = torch.randn(2**18)                                                  # 1 MiB
    assert peak_memory(lambda: x.mul_(2), x) == 0
    assert peak_memory(lambda: [x + k for k in range(5)][0], x) == 5
    assert peak_memory(lambda: sum((x + k).sum() for k in range(5)), x) < 1.01


def test_a_record_is_read_as_it_was_written_and_others_are_not_mixed_in(tmp_path):
    record = save_benchmark(tmp_path, "profile-digits", torch.device("cpu"), [{"ms": [1.]}], size=3)
    save_benchmark(tmp_path, "profile-digits-losses", torch.device("cpu"), [])
    assert load_benchmarks(tmp_path, "profile-digits") == [record] and record["size"] == 3
    with pytest.raises(ValueError, match="make them with `relkd bench precision`"):
        load_benchmarks(tmp_path, "precision")


def test_without_a_compiler_the_compiled_row_is_left_out_in_one_line(tmp_path, monkeypatch):
    class Broken:
        def __init__(self, compiled=False):
            self.compiled = compiled

        def __call__(self, s, t):
            if self.compiled:
                raise RuntimeError("no working C++ compiler\nfound")
            return (s - t).square().mean()

    monkeypatch.setattr("relkd.bench.losses.RKDAngle", Broken)
    with pytest.warns(UserWarning, match="the row 'ours, compiled' is left out") as said:
        record = bench.angle_benchmark(tmp_path, [8], D=4, seconds=0.)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    assert {"naive", "ours"} <= {r["case"] for r in record["rows"]} and "ours, compiled" not in {r["case"] for r in record["rows"]}


def test_the_formula_as_written_is_ours():
    for name, plan in _plans().items():
        shape, g = plan.shapes[0], torch.Generator().manual_seed(0)
        s, t = ([torch.randn(shape, generator=g) for _ in range(1 + plan.pair)] for _ in range(2))
        s, t = (s, t) if plan.pair else (s[0], t[0])
        torch.testing.assert_close(plan.ours(s, t), plan.naive(s, t), rtol=1e-4, atol=1e-6)


def test_text_of_the_losses_is_made_of_both_records(monkeypatch):
    """From the records of the repository, which were written by an earlier version."""
    angle, others = (load_benchmarks(ROOT / "figures", what)[0] for what in ("angle", "others"))
    monkeypatch.setattr("relkd.bench.losses.angle_benchmark", lambda out: angle)
    monkeypatch.setattr("relkd.bench.losses.others_benchmark", lambda out: others)
    text = bench.losses_text("nowhere")
    assert all(t in text for t in ("RKD-A, D = 512", "MiB held", "ours, compiled", "their time / ours", "64x64x8x8"))


def test_precision_is_the_training_step_in_both(tmp_path):
    small = (Training("resnet8", Task(), (4, 3, 8, 8)), Training("conv4", FewShot(way=3, shot=1, query=1), (6, 1, 28, 28)))
    record = precision_benchmark(tmp_path, small, rounds=1, seconds=0., warm=0)
    assert json.loads((tmp_path / f"records/bench/precision-{bench.bench_device().type}.json").read_text()) == record
    assert record["threads"] == torch.get_num_threads() and {"avx512_bf16", "amx"} < set(record["cpu"])
    table = precision_table(record)
    assert list(table.index) == list(map(str, small)) and (table > 0).all(axis=None)
    assert (table["bf16 / float32"] == table["bf16"] / table["float32"]).all()
    assert "3-way 1-shot" in precision_as_text(record)


def test_what_is_trained_is_what_the_papers_train():
    assert [t.shape for t in TRAININGS] == 4 * [(64, 3, 32, 32)] + [(360, 1, 28, 28), (600, 1, 28, 28)]
