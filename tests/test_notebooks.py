"""Every notebook executes once, by nbdev's own function, in a process forked from one that has imported the libraries already."""
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from helpers import skip_where_triton_cannot_interpret
from nbdev.doclinks import nbglob

ROOT = Path(__file__).resolve().parents[1]
NBDEV_TEST = str(Path(sys.executable).with_name("nbdev_test"))
NOTEBOOKS = sorted(Path(p).relative_to(ROOT).as_posix() for p in nbglob(ROOT / "nbs"))


def test_all_notebooks_are_found():
    on_disk = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert on_disk == set(NOTEBOOKS)


def execute(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def run_notebook(notebook, skipped, printed):
    "In a process of its own: what nbdev_test does for one notebook."
    with open(printed, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    from nbdev.test import test_nb

    passed, _ = test_nb(ROOT / notebook, skip_flags=skipped, basepath=ROOT)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(not passed)


@pytest.fixture(scope="session")
def forks():
    "Processes that start where torch and the others are imported already: half of a short notebook's time is imports."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "pandas", "matplotlib.pyplot", "seaborn", "nbdev.test"])
    return context


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_executes(notebook, flags, forks, tmp_path):
    skipped = sorted({"slow", "cuda"} - set(flags.split()))
    child = forks.Process(target=run_notebook, args=(notebook, skipped, tmp_path / "printed"))
    child.start()
    child.join()
    printed = (tmp_path / "printed").read_text()
    skip_where_triton_cannot_interpret(printed)
    assert child.exitcode == 0, printed


def test_triton_may_have_been_imported_before():
    """One process of `nbdev_test` runs several notebooks, and torch.compile in one of them imports Triton without its interpreter."""
    pytest.importorskip("triton")
    code = """
import sys, triton
from pathlib import Path
from nbdev.test import test_nb
sys.exit(not test_nb(Path('nbs/losses/22_angle_triton.ipynb').absolute(), skip_flags=['slow', 'cuda'])[0])
"""
    done = execute(sys.executable, "-c", code)
    skip_where_triton_cannot_interpret(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("options", [[], ["--n_workers", "1"]], ids=["as typed", "one worker"])
def test_all_notebooks_execute_one_after_another(options, flags):
    if "slow" not in flags:
        pytest.skip("every notebook once more takes minutes: --flags slow")
    done = execute(NBDEV_TEST, *options)
    assert done.returncode == 0 and "Success." in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_is_committed_executed(notebook):
    cells = [c for c in nbformat.read(ROOT / notebook, as_version=4).cells if c.cell_type == "code"]
    outputs = [o for c in cells for o in c.outputs]
    assert outputs, "no cell has an output: run `make notebooks`"
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"], "a reader does not want to see warnings"
