"""Every notebook executes once, by nbdev's own function, in a process forked from one that has imported the libraries already."""
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import pytest
from forked import finish
from helpers import is_draft, project_notebooks, skip_where_triton_cannot_interpret
from nbdev.doclinks import nbglob

ROOT = Path(__file__).resolve().parents[1]
NBDEV_TEST = str(Path(sys.executable).with_name("nbdev_test"))
NOTEBOOKS = [p.relative_to(ROOT).as_posix() for p in project_notebooks()]


def test_all_notebooks_are_found():
    """Drafts are yours: nbdev's `_name.ipynb`, and Jupyter's Untitled.ipynb."""
    assert {Path(p).relative_to(ROOT).as_posix() for p in nbglob(ROOT / "nbs") if not is_draft(p)} == set(NOTEBOOKS)


def test_drafts_are_left_alone(tmp_path):
    for name in ("a", "_scratch", "losses/Untitled", "losses/Untitled1", "losses/b", ".ipynb_checkpoints/a-checkpoint", "_old/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.ipynb").write_text("{}")
    assert [p.relative_to(tmp_path).as_posix() for p in project_notebooks(nbs=tmp_path)] == ["a.ipynb", "losses/b.ipynb"]


def execute(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def strict():
    "What a library says will break in our lines ends the notebook."
    for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning, RuntimeWarning):
        warnings.filterwarnings("error", category=kind, module=r"__main__$|relkd\b")
    for said in (".*__array__ implementation", ".*__array_wrap__ must accept"):                # of tensors inside matplotlib
        warnings.filterwarnings("error", said, DeprecationWarning)


def run_notebook(notebook, skipped):
    "What nbdev_test does for one notebook, in a process of its own."
    strict()
    from nbdev.test import test_nb

    passed, _ = test_nb(ROOT / notebook, skip_flags=skipped, basepath=ROOT)
    sys.exit(int(not passed))


def shown(outputs):
    "What a reader sees of a cell as text, a figure as the word; without what another machine may print otherwise."
    texts, stream = [], False
    for o in outputs:
        text = o.get("text") or o.get("data", {}).get("text/plain", "")
        goes_on, stream = stream and "text" in o, "text" in o                       # a stream arrives in one piece or in several
        if goes_on:
            text = texts.pop() + " " + "".join(text)
        texts.append(re.sub(r"\s+", " ", text if isinstance(text, str) else "".join(text)).strip())
    return [t for t in texts if t]


def compare_with_stored(notebook, skipped):
    "Run the cells that carry no flag, and compare what they show with what is committed."
    strict()
    from copy import deepcopy

    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell

    import pandas

    pandas.set_option("display.max_columns", 20)          # as in a kernel, which has no terminal to fit into
    os.environ["IN_TEST"] = "1"
    sys.path.insert(0, str(ROOT))
    path = ROOT / notebook
    nb = read_nb(path)
    stored = [deepcopy(c.get("outputs", [])) for c in nb.cells]

    def left_out(cell):
        return cell.cell_type != "code" or bool({*re.findall(r"^#\|\s*(\w+)", cell.source, flags=re.M)} & {*skipped})

    os.chdir(path.parent)
    CaptureShell(path).run_all(nb, exc_stop=True, preproc=left_out)
    stale = 0
    for cell, before in zip(nb.cells, stored):
        if not left_out(cell) and "varies" not in cell.source and shown(cell.get("outputs", [])) != shown(before):
            stale += 1
            print(f"cell {cell['id']} shows {shown(cell['outputs'])}\n  and is committed with {shown(before)}")
    sys.exit(min(stale, 1))


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_executes(notebook, flags, tmp_path):
    skipped = sorted({"slow", "cuda", "clients"} - set(flags.split()))
    from_records = notebook.startswith("nbs/tables/")         # drawn from committed records: what is shown is what was committed
    target = compare_with_stored if from_records else run_notebook
    code, printed = finish(target, notebook, skipped, said=tmp_path / "printed", seconds=None)
    skip_where_triton_cannot_interpret(printed)
    assert code == 0, printed


@pytest.mark.parametrize("line, fails", [
    ("import warnings; warnings.warn('soon', DeprecationWarning)", True), ("import numpy; numpy.float64(0) / numpy.float64(0)", True),
    ("import warnings; warnings.warn('by the way')", False)])
def test_what_will_break_in_a_cell_ends_its_notebook(line, fails, tmp_path):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(line)]), tmp_path / "a.ipynb")
    code, printed = finish(run_notebook, tmp_path / "a.ipynb", [], said=tmp_path / "printed")
    assert code == fails, printed


def run_after_triton(*args):
    import triton  # noqa: F401

    run_notebook(*args)


def test_triton_may_have_been_imported_before(tmp_path, flags):
    """One process of `nbdev_test` runs several notebooks, and torch.compile in one of them imports Triton without its interpreter."""
    if "slow" not in flags:
        pytest.skip("a notebook once more: --flags slow")
    pytest.importorskip("triton")
    code, printed = finish(run_after_triton, "nbs/losses/22_angle_triton.ipynb", ["slow", "cuda"], said=tmp_path / "printed")
    skip_where_triton_cannot_interpret(printed)
    assert code == 0, printed


@pytest.mark.parametrize("options", [[], ["--n_workers", "1"]], ids=["as typed", "one worker"])
def test_all_notebooks_execute_one_after_another(options, flags):
    if "slow" not in flags:
        pytest.skip("every notebook once more takes minutes: --flags slow")
    done = execute(NBDEV_TEST, "--skip_file_re", r"^([_.]|Untitled)", *options)
    assert done.returncode == 0 and "Success." in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_is_committed_executed(notebook):
    cells = [c for c in nbformat.read(ROOT / notebook, as_version=4).cells if c.cell_type == "code"]
    outputs = [o for c in cells for o in c.outputs]
    assert outputs, "no cell has an output: run `make notebooks`"
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"], "a reader does not want to see warnings"


def code_cells(notebook):
    return [c for c in nbformat.read(ROOT / notebook, as_version=4).cells if c.cell_type == "code"]


FLAG = re.compile(r"^#\|[ \t]*(slow|cuda|clients)\b[ \t]*(.*)$", flags=re.M)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_run_all_leaves_flagged_cells_out_and_says_what_they_take(notebook):
    """Jupyter takes `#| slow` for a comment; relkd.flags reads it there."""
    cells = code_cells(notebook)
    flagged = [k for k, c in enumerate(cells) if FLAG.search(c.source)]
    loading = [k for k, c in enumerate(cells) if re.search(r"^%load_ext relkd\.flags$", c.source, flags=re.M)]
    assert not flagged or loading and loading[0] < flagged[0], "write %load_ext relkd.flags below %matplotlib inline"
    silent = [c.id for c in cells if (m := FLAG.search(c.source)) and not m[2].strip()]
    assert not silent, "say behind the flag what the cell takes: `#| slow 40 s`, `#| cuda relkd run NAME`, `#| clients timm`"


def test_no_notebook_writes_over_committed_records():
    """What a cell trains or measures goes to .demo, which git ignores."""
    writes = re.compile(r"(Session|_benchmark|_text|draw|write_record|publish|save_benchmark)\(\s*['\"]\.\./\.\./(figures|weights)")
    found = [f"{notebook} {c.id}" for notebook in NOTEBOOKS for c in code_cells(notebook) if writes.search(c.source)]
    assert not found, found


def environment_of_a_reader():
    "Without what the tests have set, and our package."
    mine = {"IN_TEST", "RELKD_FLAGS", "PYTEST_CURRENT_TEST"}
    return {k: v for k, v in os.environ.items() if k not in mine} | {"PYTHONPATH": str(ROOT)}


def run_all(path):
    "What Jupyter's Run All does; gives the cells as they stand afterwards."
    from nbclient import NotebookClient

    nb = nbformat.read(path, as_version=4)
    client = NotebookClient(nb, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    client.execute(env=environment_of_a_reader())
    return [c for c in nb.cells if c.cell_type == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_run_all_goes_through(notebook, flags):
    if "slow" not in flags:
        pytest.skip("every notebook once more, each in a kernel of its own: --flags slow")
    before = execute("git", "status", "--porcelain").stdout
    cells = run_all(ROOT / notebook)
    left = [c for c in cells if FLAG.search(c.source)]
    said = [c.outputs[0].get("text", "") if c.outputs else "" for c in left if "clients" not in FLAG.search(c.source)[1]]
    assert all(text.startswith("left out (") for text in said)
    assert execute("git", "status", "--porcelain").stdout == before


def make_a_page(notebook):
    "What nbdev's documentation commands do with a notebook before Quarto sees it: exported cells and those that import are executed."
    strict()
    from execnb.nbio import read_nb
    from nbdev.processors import FilterDefaults

    os.environ["IN_TEST"] = "1"
    os.chdir((ROOT / notebook).parent)
    FilterDefaults()(read_nb(ROOT / notebook))


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_page_can_be_made_of_it(notebook, flags, tmp_path):
    if "slow" not in flags:
        pytest.skip("exported cells once more: --flags slow")
    code, printed = finish(make_a_page, notebook, said=tmp_path / "printed")
    assert code == 0, printed
