"""The profile of a recipe's step: every part is there, for every kind of row; limits and calls are sane."""
import pytest
import torch

from relkd.bench import load_benchmarks
from relkd.profile import count_calls, machine_limits, profile_recipe, profile_table, profile_text
from relkd.recipes import recipe


@pytest.mark.parametrize("name", ["digits", "digits/losses"])
def test_every_part_of_every_row_is_timed(tmp_path, name):
    wanted = recipe(name)
    record = profile_recipe(wanted, tmp_path, "cpu", steps=1)
    assert load_benchmarks(tmp_path, f"profile-{name.replace('/', '-')}") == [record]
    assert [r["part"] for r in record["rows"]] == ["batch", "teacher looks", *(r.name for r in wanted.rows)]
    assert all(r["ms"] > r.get("objective_ms", 0) > 0 for r in record["rows"][2:])
    assert profile_table(record)["share_%"].sum() == pytest.approx(100)
    assert 0 < record["floor_ms"]["step"] < record["step_ms"] and record["calls"]["operations"] > record["teacher_calls"]["operations"] > 100
    text = profile_text(record)
    assert name in text and "images/s" in text and wanted.rows[-1].name in text


def test_calls_are_counted_with_those_of_the_backward_pass():
    x = torch.randn(4, 4, requires_grad=True)
    assert count_calls(lambda: (x.detach() * 2 + 1), torch.device("cpu"))["operations"] == 3
    assert count_calls(lambda: (x * 2).sum().backward(), torch.device("cpu"))["operations"] > 4


def test_limits_are_those_of_a_machine():
    limits = machine_limits(torch.device("cpu"))
    assert .1 < limits["copy_GB_s"] < 1e4 and 1e-4 < limits["product_Tmac_s"] < 100


def test_the_command(tmp_path, relkd_cli):
    done = relkd_cli("profile", "digits", "--steps", "1", "--out", tmp_path, "--device", "cpu")
    assert done.returncode == 0 and "HKD + RKD-DA" in done.stdout and (tmp_path / "records/bench/profile-digits-cpu.json").exists()
    assert "is a few-shot recipe" in relkd_cli("profile", "omniglot/cpu", "--out", tmp_path).stderr
