"""The profile of a recipe's step: every part is there, for every kind of row and task; limits and calls are sane."""
from dataclasses import replace

import pytest
import torch

from relkd.bench import load_benchmarks
from relkd.data import load
from relkd.distill import PAPER_ROWS
from relkd.profile import count_calls, machine_limits, profile_recipe, profile_table, profile_text
from relkd.tables.recipe import recipe
from relkd.tasks.fewshot import FewShot
from relkd.train.session import Session


def by_class():
    return load("digits").with_splits({"train": "01234", "val": "567", "test": "89"})


def few_shot():
    task = FewShot(way=4, query=2, ways=(2,), test_query=5, test_episodes=10, length=5)
    return replace(recipe("digits"), name="few", data=by_class, task=task, vary={"shot": (1, 2)}, rows=PAPER_ROWS[:3], precision="bf16")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    "The profile of a recipe, made once: (recipe, folder, record)."
    made = {}

    def of(wanted):
        if wanted.name not in made:
            at = tmp_path_factory.mktemp("profile")
            made[wanted.name] = at, profile_recipe(wanted, Session(at, "cpu"), steps=1)
        return made[wanted.name]
    return of


@pytest.mark.xdist_group("profile")
@pytest.mark.parametrize("wanted", [recipe("digits"), recipe("digits/losses"), few_shot()], ids=lambda r: r.name)
def test_every_part_of_every_row_is_timed(found, wanted):
    at, record = found(wanted)
    assert load_benchmarks(at, f"profile-{wanted.name.replace('/', '-')}") == [record]
    assert [r["part"] for r in record["rows"]] == ["batch", "teacher looks", *(r.name for r in wanted.rows)]
    assert all(r["ms"] > 0 and r.get("objective_ms", 1) > 0 for r in record["rows"])
    assert profile_table(record)["share_%"].sum() == pytest.approx(100)
    assert (0 < record["floor_ms"]["step"] and 0 < record["step_ms"]
            and record["calls"]["operations"] > record["teacher_calls"]["operations"] > 100)
    text = profile_text(record)
    assert wanted.name in text and "images/s" in text and wanted.rows[-1].name in text


@pytest.mark.xdist_group("profile")
def test_an_episode_is_a_batch_and_the_precision_is_the_recipes(found):
    _, record = found(few_shot())
    assert record["batch"] == record["teacher_batch"] == 4 * (1 + 2) and record["variant"] == {"shot": 1}
    assert record["precision"] == "bf16-mixed" and "shot 1 on" in profile_text(record)
    assert record["hours"]["students"] == pytest.approx(few_shot().schedule.epochs * 5 * record["step_ms"] / 3.6e6)


@pytest.mark.xdist_group("profile")
def test_the_profile_trains_the_main_stage_and_leaves_the_recipe_alone(found, tmp_path):
    wanted = recipe("digits/losses")
    assert any(r.before for r in wanted.rows)
    assert [p.name for p in found(wanted)[0].glob("**/*") if p.is_file()] == ["profile-digits-losses-cpu.json"]
    with pytest.raises(ValueError, match="has no rows"):
        profile_recipe(replace(wanted, rows=()), Session(tmp_path, "cpu"), steps=1)


def test_calls_are_counted_with_those_of_the_backward_pass():
    x = torch.randn(4, 4, requires_grad=True)
    assert count_calls(lambda: (x.detach() * 2 + 1), torch.device("cpu"))["operations"] == 3
    assert count_calls(lambda: (x * 2).sum().backward(), torch.device("cpu"))["operations"] > 4


def test_limits_are_those_of_a_machine():
    limits = machine_limits(torch.device("cpu"))
    assert .1 < limits["copy_GB_s"] < 1e4 and 1e-4 < limits["product_Tmac_s"] < 100


def test_the_command(tmp_path, typed):
    code, said, _ = typed("profile", "digits", "--steps", "1", "--out", tmp_path, "--device", "cpu")
    assert code == 0 and "HKD + RKD-DA" in said and (tmp_path / "records/bench/profile-digits-cpu.json").exists()
