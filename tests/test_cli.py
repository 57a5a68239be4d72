"""The command line: a mistake is one line and status 2, said before anything heavy is imported; a run that is stopped says how to go on."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data_helpers
from data_helpers import one_line
from forked import start
from relkd.checkpoints import hold
from relkd.cli import numbers, seconds, setting, size
from relkd.records import load_records
from relkd.tables.recipe import recipe

FIGURES = Path(__file__).resolve().parents[1] / "figures"
SHORT = ["digits", "--rows", "RKD-D", "--seeds", "0", "--epochs", "1", "--device", "cpu"]


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59))
def test_durations(h, m, s):
    assert (seconds(f"{h}h{m}m{s}s") == seconds(f"{h}H{m}m{s}") == 3600 * h + 60 * m + s and seconds(f"{m}m") == 60 * m
            and seconds(str(s)) == s)


def test_sizes_numbers_and_settings():
    assert ((size("600k"), size("15M"), size("2GB"), size("7")) == (600 * 1024, 15 * 2**20, 2**31, 7)
            and numbers("0,2,5-7") == [0, 2, 5, 6, 7])
    assert ([setting(t) for t in ("schedule.lr=.05", "student = resnet8x4", "task.labelled=None", "a=(1, 2)", "a=b=c")]
            == [("schedule.lr", .05), ("student", "resnet8x4"), ("task.labelled", None), ("a", (1, 2)), ("a", "b=c")])


@pytest.mark.parametrize("read, text",
                         [*((seconds, t) for t in ("", "soon", "5x")), *((size, t) for t in ("0", "15T", "-1k")),
                          *((numbers, t) for t in ("", "two", "7-5", "1,")), *((setting, t) for t in ("lr", "=3"))])
def test_what_is_no_duration_size_number_or_setting(read, text):
    one_line(lambda: read(text), repr(text))


@pytest.mark.parametrize("args, message", [
    (["run", "digist"], "unknown recipe 'digist': did you mean 'digits'?"),
    (["run", "digits", "--rows", "RKD-AD"], "unknown row of digits 'RKD-AD': did you mean 'RKD-D'?"),
    (["run", "digits", "--rows", ""], "unknown row of digits '': known are Student, RKD-D, RKD-DA, HKD, HKD + RKD-DA, Teacher"),
    (["run", "digits", "--seeds", "two"], "--seeds takes numbers like 0,1,5-7; got 'two'"),
    (["run", "digits", "--seeds", ""], "--seeds takes numbers like 0,1,5-7; got ''"),
    (["run", "digits", "--epochs", "0"], "a schedule needs at least 1 epoch; got 0"),
    (["run", "digits", "--epochs", "9" * 400], "a schedule has at most 10^9 epochs; got 999999999999..."),
    (["run", "omniglot/cpu", "--epochs", "0"], "a schedule needs at least 1 epoch; got 0"),
    (["run", "digits", "--shots", "1"], "digits has no axis 'shot': it has none beside the seeds"),
    (["run", "digits", "--set", "schedule.rate=1"], "--set schedule.rate: unknown field of Schedule 'rate'"),
    (["run", "digits", "--set", "lr"], "--set takes a path and a value, like schedule.lr=.05; got 'lr'"),
    (["run", "digits", "--budget", "soon"], "--budget takes a time like 90s, 9m or 1h30m; got 'soon'"),
    (["run", "digits", "--seeds", "0-3000000000"], "--seeds takes 10,000 numbers at most, each below 2^43; got '0-3000000000'"),
    (["run", "digits", "--seeds", "99999999999999"], "--seeds takes 10,000 numbers at most, each below 2^43"),
    (["run", "digits", "--part-size", "big"], "--part-size takes a size like 600k or 15M; got 'big'"),
    (["run", "digits", "--on", "sluma"], "--on takes 'slurm' or 'local'; got 'sluma'"),
    (["run", "digits", "--on", "slurm", "--time", "long"], "--time takes a time like 90s, 9m or 1h30m; got 'long'"),
    (["run", "digits", "--on", "slurm", "--memory", "much"], "--memory takes a size like 600k or 15M; got 'much'"),
    (["run", "digits", "--on", "local", "--nodes", "0"], "--nodes takes a whole number from 1; got 0"),
    (["run", "digits", "--on", "slurm", "--sbatch", "qos"], "--sbatch takes a name and a value, like account=vision; got 'qos'"),
    (["status", "digist"], "unknown recipe 'digist': did you mean 'digits'?"),
    (["run", "digits", "--device", "tpu"], "device is 'auto', 'cpu' or 'cuda'; got 'tpu'"),
    (["run", "digits", "--precision", "fp8"], "precision is '32' or 'bf16'; got 'fp8'"),
    (["run", "nowhere.py"], "no file nowhere.py: name a recipe, or a Python file that defines one"),
    (["table", "digits", "--out", "nowhere"], "no records of 'digits' in nowhere/records/digits: run the recipe first"),
    (["tensorboard", "digits", "--out", "nowhere"], "no records of 'digits' in nowhere/records/digits: run the recipe first"),
    (["tensorboard", "digist"], "unknown recipe 'digist': did you mean 'digits'?"),
    (["tensorboard", "nowhere.py"], "no file nowhere.py: name a recipe, or a Python file that defines one"),
    (["bench", "speed"], "bench takes 'losses' or 'precision'; got 'speed'"),
    (["data", "get", "cifar"], "unknown data set 'cifar'"),
])
def test_a_mistake_costs_one_line(typed, args, message):
    code, said, error = typed(*args)
    assert (code, said) == (2, "") and error.startswith(f"relkd: {message}") and error.count("\n") == 1


@pytest.mark.parametrize("args, code", [(["recipes"], 0), (["run", "digist"], 2), (["run", "digits", "--seeds", "two"], 2),
                                        (["run", "digits", "--device", "tpu"], 2), (["--help"], 0)])
def test_what_needs_no_torch_does_not_import_it(args, code):
    script = (f"import sys\nsys.argv = ['relkd', *{args!r}]\nfrom relkd.cli import main\ntry: main()\n"
              "except SystemExit as left: code = left.code or 0\n"
              "print(code, [m for m in ('torch', 'numpy', 'sklearn') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{code} []", done.stdout + done.stderr


def test_what_should_not_happen_is_one_line_and_a_log(typed, monkeypatch, tmp_path):
    import relkd.records

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(relkd.records, "load_records", lambda *a: {}["a fault\nof several lines"])
    code, said, error = typed("tensorboard", "digits", "--out", FIGURES)
    assert (code, said) == (1, "") and error.count("\n") == 1 and error.startswith("relkd: KeyError: 'a fault")
    log, = tmp_path.glob("relkd-*.log")
    assert str(log) in error and "Traceback" in log.read_text()


OWN = """from dataclasses import replace
from relkd.distill import Row, Term
from relkd.recipes.digits import digits
def loss(student, teacher): return {}["mine"]
def net(outputs): return 3
def data(): return None
class Late:
    def __init__(self): self.alpha
mine = replace(digits, name="mine", rows=(Row("Student"),), seeds=(0,))
"""


@pytest.mark.parametrize("line, told, traced", [
    ("mine = replace(mine, seeds=0)", "mine.py, line 10: TypeError: object of type 'int' has no len()", True),
    ("import nothinglike", "mine.py, line 10: ModuleNotFoundError: No module named 'nothinglike'", True),
    ("def f(:", "mine.py, line 10: SyntaxError: invalid syntax", True),
    ("import beside_mine", "beside_mine.py, line 2: ZeroDivisionError: division by zero", True),
    ("raise ValueError('alpha is above 0')", "mine.py, line 10: ValueError: alpha is above 0", True),
    ("open('nowhere.csv')", "mine.py, line 10: FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.csv'", True),
    ("mine = replace(mine, student=net)", "mine.py, line 5: TypeError: net() takes 1 positional argument but 2 were given", True),
    ("mine = replace(mine, rows=(Row('KeyError', (Term(loss, student='logits', teacher='logits'),)),))",
     "mine.py, line 4: KeyError: 'mine'", True),
    ("mine = replace(mine, rows=(Row('Late', (Term(Late),)),))",
     "mine.py, line 8: AttributeError: 'Late' object has no attribute 'alpha'", True),
    ("mine = replace(mine, data=data)", "data of mine-1epochs: data() must give a Dataset; got None: return one, such as ", False),
    ("mine = replace(mine, task='classify')", "mine.py, line 10: task of mine must be a Task; got 'classify': write task=Cl", False),
])
def test_a_mistake_in_ones_own_file_is_told_with_its_line(typed, monkeypatch, tmp_path, line, told, traced):
    """The fault: what went wrong in a user's own loss, network or file was called ours ("this should not happen")."""
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "logs"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside_mine.py").write_text("x = 0\ny = 1 / x\n")
    (tmp_path / "mine.py").write_text(OWN + line + "\n")
    code, _, error = typed("run", "mine.py", "--epochs", 1, "--device", "cpu", "--out", tmp_path / "out")
    logs = list((tmp_path / "logs").glob("relkd-*.log"))
    assert code == 2 and error.startswith(f"relkd: {told}") and error.count("\n") == 1 and len(logs) == traced, error
    assert error.endswith(f" (traceback in {logs[0]})\n") if traced else "should not" not in error


def test_under_torchrun_the_first_process_alone_prints(typed, monkeypatch):
    assert typed("recipes")[1]
    monkeypatch.setattr(sys, "stdout", sys.stdout)           # put back afterwards
    monkeypatch.setenv("RANK", "1")
    assert typed("recipes") == (0, "", "")


def test_help_lists_and_a_recipe_shown(typed):
    assert "Teach students" in typed("--help")[1]
    assert "cifar100/paper" in typed("recipes")[1] and "25 RKDDistance() on fc:input" in typed("recipes", "digits")[1]
    assert "row RKD-D              1 prototypical + 50 RKDDistance() on fc:input" in typed("recipes", "omniglot/cpu")[1]


def test_a_run_and_what_it_leaves(typed, tmp_path):
    code, said, error = typed("run", *SHORT, "--out", tmp_path)
    assert code == 0 and error == "" and "cut down               1 of 120 epochs (teacher 1 of 12)" in said and "3 runs; records in" in said
    records = load_records(tmp_path, "digits-1epochs")
    assert ([r["row"] for r in records] == ["RKD-D", "Student", "Teacher"] and (tmp_path / "digits-1epochs.csv").exists()
            and (tmp_path / "digits-1epochs.png").exists())
    code, said, error = typed("table", "digits", "--epochs", 1, "--out", tmp_path)
    assert code == 0 and "RKD-D" in said and said.rstrip().endswith("cut down: 1 of 120 epochs (teacher 1 of 12)")
    code, said, error = typed("run", *SHORT, "--out", tmp_path, "--precision", "bf16")
    assert code == 2 and error.count("\n") == 1 and "records of another protocol" in error and "--replace" in error
    with hold(tmp_path / ".runs/digits-1epochs"):
        code, said, error = typed("run", *SHORT, "--out", tmp_path)
    assert code == 2 and error.count("\n") == 1 and "is at work in" in error


def test_rows_teacher_means_the_same_for_both_tasks(typed, tmp_path):
    for name, base in (("digits", ["Student"]), ("omniglot/cpu", [])):
        r = recipe(name).reduced(rows=["Teacher"])
        assert [x.name for x in r.rows] == base and "Teacher" in r.row_names
    code, said, _ = typed("run", "digits", "--rows", "Teacher", "--seeds", "0", "--epochs", "1", "--device", "cpu", "--out", tmp_path)
    assert code == 0 and [r["row"] for r in load_records(tmp_path, "digits-1epochs")] == ["Student", "Teacher"]


def test_a_few_shot_recipe_on_a_classification_set_is_one_line(typed, tmp_path):
    code, said, error = typed("run", "omniglot/cpu", "--set", "data=digits", "--out", tmp_path, "--device", "cpu")
    assert (code == 2 and error == "relkd: data set 'digits' has train and test images of the same classes; "
                                   "few-shot learning needs classes split into train, val and test: "
                                   "Dataset.with_splits makes such a set\n")


def test_committed_records_are_not_written_over(typed, tmp_path):
    shutil.copytree(FIGURES / "records/digits", tmp_path / "records/digits", ignore=shutil.ignore_patterns("losses", "balanced"))
    code, said, error = typed("run", "digits", "--out", tmp_path, "--device", "cpu")
    assert code == 2 and error.count("\n") == 1 and "holds records of another protocol or of an earlier version" in error
    code, said, error = typed("table", "digits", "--out", tmp_path)
    assert code == 0 and "HKD + RKD-DA" in said and (tmp_path / "digits.csv").read_bytes() == (FIGURES / "digits.csv").read_bytes()


def test_a_table_is_printed_from_a_folder_that_cannot_be_written_to(typed, monkeypatch):
    """The fault: on a read-only results folder a table ended in an error, although nothing but printing was needed."""
    before, access = (FIGURES / "digits.csv").stat().st_mtime_ns, os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    code, said, error = typed("table", "digits", "--out", FIGURES)
    assert code == 0 and "HKD + RKD-DA" in said and f"relkd: {FIGURES} cannot be written to" in error
    assert (FIGURES / "digits.csv").stat().st_mtime_ns == before


def test_an_unwritable_folder_is_said_before_training(typed, tmp_path):
    (tmp_path / "file").write_text("")
    code, said, error = typed("demo", "--out", tmp_path / "file" / "figures")
    assert (code == 2 and error.count("\n") == 1 and "cannot write" in error
            and "name a folder that can be written to with --out" in error
            and "epoch" not in said.split("row HKD + RKD-DA")[-1].replace("CE", ""))


def test_event_files_for_tensorboard(typed, tmp_path):
    assert "48 event files" in typed("tensorboard", "digits", "--out", FIGURES, "--to", tmp_path)[1]
    assert len(list(tmp_path.glob("digits/*/events.out.*"))) == 48


def test_event_files_of_a_recipe_in_a_file_and_of_one_cut_down(typed, tmp_path):
    """The fault: tensorboard alone took no file, and no --epochs."""
    path, out = tmp_path / "mine.py", tmp_path / "out"
    path.write_text("from dataclasses import replace\nfrom relkd.recipes.digits import digits\nmine = replace(digits, name='mine/x')\n")
    for name in ("mine/x", "mine/x-2epochs"):
        (out / "records" / name).mkdir(parents=True)
    shutil.copy(FIGURES / "records/digits/rkd-d-seed0.json", out / "records/mine/x")
    for seed in (0, 1):
        shutil.copy(FIGURES / f"records/digits/rkd-d-seed{seed}.json", out / "records/mine/x-2epochs")
    for words, n in (([path], 1), ([path, "--epochs", 2], 2), (["mine/x-2epochs"], 2)):
        assert f"{n} event files" in typed("tensorboard", *words, "--out", out, "--to", tmp_path / "runs")[1]


def test_data_that_are_there_and_that_are_missing(typed, tmp_path):
    assert "digits         1,000 train, 797 test images of 1 x 8 x 8, 10 classes, 6b8e28bb3067" in typed("data", "--data", tmp_path)[1]
    for name in ("aaa", "zzz"):                               # one damaged set does not hide the others
        data_helpers.arrays(tmp_path / name)
    (tmp_path / "aaa" / "train_images.npy").write_bytes(b"junk")
    lines = typed("data", "--data", tmp_path)[1].splitlines()
    for said in ("aaa            is damaged: ", "zzz            6 train"):
        assert any(line.startswith(said) for line in lines)
    code, said, error = typed("run", "cifar100/cpu", "--data", tmp_path, "--out", tmp_path, "--device", "cpu")
    assert code == 2 and error.count("\n") == 1 and "relkd data get cifar100" in error


def test_a_spent_budget_says_how_to_go_on_and_is_no_error(typed, tmp_path):
    code, said, error = typed("run", *SHORT, "--budget", "0.01s", "--part-size", "40k", "--out", tmp_path)
    assert (code == 0 and error == f"\nrelkd: stopped (budget); 0 of 3 runs are finished and kept in {tmp_path}, the "
                                   "rest is at a checkpoint: the same command goes on from there\n")
    assert max(p.stat().st_size for p in tmp_path.glob(".runs/digits-1epochs/group-*.ckpt.????????.*")) <= 40 * 1024


def command_line(*words):
    from relkd.cli import main

    sys.argv = ["relkd", *words]
    main()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_at_a_checkpoint_and_the_same_command_goes_on(tmp_path, number, code, flags):
    if number == signal.SIGINT and "slow" not in flags:
        pytest.skip("one of two signals that go one way: --flags slow")
    p = start(command_line, "run", "digits", "--seeds", "0", "--rows", "HKD", "--epochs", "12", "--device", "cpu",
              "--out", str(tmp_path / "out"), said=tmp_path / "said.txt", OMP_NUM_THREADS=1)
    deadline = time.time() + 180
    while not list(tmp_path.glob("out/records/digits-12epochs/teacher*")) and time.time() < deadline and p.is_alive():
        time.sleep(.005)
    os.kill(p.pid, number)
    p.join(120)
    error = (tmp_path / "said.txt").read_text()
    assert (p.exitcode == code and f"stopped ({number.name}); 1 of 3 runs are finished" in error
            and "the same command goes on from there" in error and "Traceback" not in error)
    assert list(tmp_path.glob("out/.runs/digits-12epochs/group-*.ckpt")) and not list(tmp_path.glob("**/*.tmp"))


def test_a_shell_completes_the_names_of_recipes(relkd_cli):
    """Typer's protocol: the shell says what stands there, and gets the words that may."""
    asked = {"_RELKD_COMPLETE": "complete_bash", "COMP_WORDS": "relkd run dig", "COMP_CWORD": "2"}
    code = "import sys; sys.argv = ['relkd']; from relkd.cli import main; main(); "
    done = subprocess.run([sys.executable, "-c", code], env=relkd_cli.env | asked, capture_output=True, text=True)
    assert done.stdout.split()[0] == "digits" and "cifar100/paper" not in done.stdout, done.stdout + done.stderr
