"""Every notebook executes under nbdev's own runner, one item a notebook; the flags `slow` and `cuda` are honoured."""
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbdev.doclinks import nbglob

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(Path(p).relative_to(ROOT).as_posix() for p in nbglob(ROOT / "nbs"))


def test_all_notebooks_are_found():
    on_disk = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert on_disk == set(NOTEBOOKS)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_executes(notebook, flags):
    command = [str(Path(sys.executable).with_name("nbdev_test")), "--path", notebook, *(["--flags", flags] if flags else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_is_committed_executed(notebook):
    cells = [c for c in nbformat.read(ROOT / notebook, as_version=4).cells if c.cell_type == "code"]
    outputs = [o for c in cells for o in c.outputs]
    assert outputs, "no cell has an output: run `make notebooks`"
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"], "a reader does not want to see warnings"
