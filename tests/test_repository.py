"""Package, notebooks and README are in step; the layers import downwards only."""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import is_draft, project_notebooks
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    to = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / "settings.ini", to)
    shutil.copytree(ROOT / "relkd", to / "relkd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "nbs", to / "nbs", ignore=lambda folder, names: [n for n in names if is_draft(Path(folder, n))])
    return to


def files(folder, pattern):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.glob(pattern))
            if "__pycache__" not in p.parts}


def test_exported_code_is_in_step_with_the_notebooks(copy):
    for p in (copy / "relkd").glob("**/*.py"):
        p.unlink()
    subprocess.run([BIN / "nbdev_export"], cwd=copy, check=True, capture_output=True)
    assert files(copy / "relkd", "**/*.py") == files(ROOT / "relkd", "**/*.py"), "run `make export`"


def test_notebooks_are_clean(copy):
    subprocess.run([BIN / "nbdev_clean"], cwd=copy, check=True, capture_output=True)
    clean = files(copy / "nbs", "**/*.ipynb")
    assert clean == {p.relative_to(ROOT / "nbs").as_posix(): p.read_bytes() for p in project_notebooks()}, "run `make export`"


def test_readme_is_in_step_with_the_index():
    done = subprocess.run([sys.executable, ROOT / ".ci" / "readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    missing = [l for l in links if not l.startswith("http") and not (ROOT / l).exists()]
    assert len(links) > 10 and not missing


@pytest.mark.parametrize("notebook", [p.relative_to(ROOT).as_posix() for p in project_notebooks()])
def test_links_between_notebooks_lead_somewhere(notebook):
    import nbformat

    text = "\n".join(c.source for c in nbformat.read(ROOT / notebook, as_version=4).cells if c.cell_type == "markdown")
    links = [l for l in re.findall(r"\]\(([^)#\s]+)\)", text) if not l.startswith("http")]
    assert not [l for l in links if not ((ROOT / notebook).parent / l).exists()]


def test_every_loss_notebook_is_exported_by_the_package():
    import importlib

    import relkd.losses
    from relkd.losses import DistillationLoss

    for module in (ROOT / "relkd" / "losses").glob("[a-z]*.py"):
        code = importlib.import_module(f"relkd.losses.{module.stem}")
        names = [n for n in code.__all__ if isinstance(getattr(code, n), type) and issubclass(getattr(code, n), DistillationLoss)]
        assert set(names) - {"DistillationLoss"} <= set(relkd.losses.__all__), f"name {module.stem} in nbs/losses/index.ipynb"


@pytest.mark.parametrize("module, forbidden", [
    ("relkd.losses", "torchvision nbdev fastcore matplotlib lightning sklearn pandas relkd.data relkd.train"),
    ("relkd.recipes", "nbdev fastcore execnb IPython"),
])
def test_what_an_import_does_not_bring_in(module, forbidden):
    code = f"import sys, {module}; print([m for m in {forbidden.split()!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


FLOORS = [            # a room imports from floors below its own, or from its own folder
    "ground docs modes catalogue cli_words colours",
    "relations flags schematic run_plots",
    "losses",
    "distributed",
    "features heads embeddings ngrams",
    "data models checkpoints",
    "records tasks",
    "distill",
    "train",
    "tables bench",
    "recipes plots profile cluster",
    "cli",
]
FLOOR = {room: k for k, rooms in enumerate(FLOORS) for room in rooms.split()}
LATE = {              # imports inside functions that go up: each with its reason
    ("losses", "losses"): "the contract asks for the list of losses by name",
    ("tables", "recipes"): "the catalogue finds recipes by itself",
    ("tables", "plots"): "a table draws its figure",
}


LARGE = {             # modules of more than 200 lines of code: each with its reason
    "models/networks": "the networks",
    "cli": "one command a cell, with the list of its options",
    "cluster": "what writes, sends, watches and reads jobs shares one set of words",
    "data/text": "texts of one's own and WordNet's, cut into pieces and stored the same way",
    "distill": "Term, Row, Objective and the weights to start from are one import",
    "losses/angle": "value and gradient of one loss, tile by tile, for a CPU and for torch.compile",
    "losses/contract": "what every loss must refuse stands beside the rule",
    "losses/rules": "one rule a function",
    "models/published": "a manifest is written and read by the same lines",
    "recipes/metric": "the tables of retrieval, most of which differ in a line or two",
    "recipes/text_students": "three students and the tables that compare them",
    "tables/experiment": "what decides a cell, and what is refused before it is trained",
    "tables/recipe": "the fields of a recipe with their refusals, and its reductions",
    "tables/run": "from what is missing to what is kept: the order of the steps is the point",
}


def code_lines(path):
    "Lines that are neither empty, comments nor docstrings."
    text = path.read_text(encoding="utf-8")
    whole = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = [n.body[0] for n in ast.walk(ast.parse(text)) if isinstance(n, whole) and ast.get_docstring(n) is not None]
    words = {k for d in docs for k in range(d.lineno, d.end_lineno + 1)}
    return sum(bool(line.strip()) and not line.strip().startswith("#") and k not in words for k, line in enumerate(text.splitlines(), 1))


def test_modules_are_small_or_say_why_not():
    """The fault: a rule of 200 lines that nothing held."""
    large = {path.relative_to(ROOT / "relkd").with_suffix("").as_posix(): code_lines(path) for path in modules_files()}
    large = {name: n for name, n in large.items() if n > 200}
    assert set(large) == set(LARGE) and max(large.values()) <= 420, large


def modules_files():
    return [p for p in sorted((ROOT / "relkd").glob("**/*.py")) if p.name != "_modidx.py"]


def modules():
    for path in sorted((ROOT / "relkd").glob("**/*.py")):
        if path.name not in ("_modidx.py", "__init__.py") or path.parent.name != "relkd":
            yield path, path.relative_to(ROOT / "relkd").with_suffix("").parts


def imported(path, parts):
    "Pairs (module within relkd as a tuple, names) that a file imports anywhere, in functions too."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level]) if node.level else []
            target = base + (node.module.split(".") if node.module else [])
            if node.level == 0:
                if target[0] != "relkd":
                    continue
                target = target[1:]
            names = [n.name for n in node.names]
            if not target:                                     # from relkd import losses
                for n in names:
                    yield (n,), []
            else:
                yield tuple(target), names
        elif isinstance(node, ast.Import):
            for n in node.names:
                if n.name.startswith("relkd."):
                    yield tuple(n.name.split(".")[1:]), []


def test_marks_beside_chinese_are_typeset():
    """A code host takes a $ beside a Chinese character for a dollar; and ** between one and a mark does not close."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.findall(r"[\u3000-\u9fff]\$[^$\n]+\$|\$[^$\n]+\$[\u3000-\u9fff]", readme), "write N², or leave a space"
    markdown_it = pytest.importorskip("markdown_it")
    read, left = markdown_it.MarkdownIt("commonmark").enable("table"), {}
    for path in project_notebooks():
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                text = re.sub(r"\$[^$\n]+\$", "x", "".join(cell["source"]))
                inline = [t for token in read.parse(text) for t in token.children or () if t.type == "text"]
                if [t for t in inline if "**" in t.content]:
                    left[f"{path.name} {cell.get('id')}"] = [t.content[:60] for t in inline if "**" in t.content]
    assert not left, left


def test_no_merge_is_left_half_done():
    """nbdev's merge leaves cells of markers; closed with them left in, a name is exported twice."""
    for path in project_notebooks():
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"]).lstrip("`")
            assert not re.match(r"<{7}|>{7}|={7}$", text), f"{path.name}: a marker of a merge is left in cell {cell.get('id')}"
    for path, parts in modules():
        names = [n.name for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
        assert len(names) == len({*names}), f"{'/'.join(parts)} defines a name twice"


def test_every_module_has_a_floor():
    rooms = {parts[0] for _, parts in modules()}
    assert rooms <= set(FLOOR), f"give {rooms - set(FLOOR)} a floor in FLOORS"


def test_imports_go_downwards_only():
    wrong = []
    for path, parts in modules():
        for target, _ in imported(path, parts):
            me, other = parts[0], target[0]
            if other == me or other.startswith("__") or (me, other) in LATE:
                continue
            if FLOOR[other] >= FLOOR[me]:
                wrong.append(f"{'/'.join(parts)} imports {other}")
    assert not wrong, wrong


def test_private_names_stay_in_their_room():
    wrong = [f"{'/'.join(parts)} takes {n} from {'.'.join(target)}" for path, parts in modules()
             for target, names in imported(path, parts) for n in names if n.startswith("_") and not n.startswith("__")]
    assert not wrong, wrong


ENGINE = ("tables", "train", "tasks", "records", "checkpoints", "ground")


def sources():
    "Every piece of code that could call the package: itself, the tests, the notebooks' cells."
    for path in (*ROOT.glob("relkd/**/*.py"), *ROOT.glob("tests/*.py")):
        yield path.read_text(encoding="utf-8")
    for path in project_notebooks():
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                yield "".join(cell["source"])


def read(source):
    "A tree of a cell as IPython reads it: `%magics` and `x = !ls` are calls."
    try: return ast.parse(source)                                                       # noqa: E701
    except SyntaxError: return ast.parse(TransformerManager().transform_cell(source))   # noqa: E701


def test_magics_are_read_as_ipython_reads_them():
    calls = [c.func for c in ast.walk(read("x = !ls\n%matplotlib inline\nf(a=1)")) if isinstance(c, ast.Call)]
    assert {"getoutput", "run_line_magic", "f"} <= {getattr(f, "attr", getattr(f, "id", "")) for f in calls}


def passed():
    "What calls hand over: pairs (function, keyword), and the most arguments by position."
    keywords, most = set(), {}
    for source in sources():
        for call in (n for n in ast.walk(read(source)) if isinstance(n, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", None))
            keywords |= {(name, k.arg) for k in call.keywords}
            many = any(isinstance(a, ast.Starred) for a in call.args)
            most[name] = max(most.get(name, 0), 99 if many else len(call.args))
    return keywords, most


def test_what_can_be_passed_to_the_engine_is_passed_by_somebody():
    """The fault: a runner's method had a parameter that no call ever gave."""
    (keywords, most), idle = passed(), []
    for path, parts in modules():
        if parts[0] not in ENGINE:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        heir = {b.id: c.name for c in tree.body if isinstance(c, ast.ClassDef) for b in c.bases if isinstance(b, ast.Name)}
        for home in (n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef))):
            for f in (n for n in home.body if isinstance(n, ast.FunctionDef)):
                given = [a.arg for a in f.args.args if a.arg != "self"]
                called = home.name if f.name == "__init__" else f.name
                while called.startswith("_") and called in heir:               # what a private base takes is passed to its heir
                    called = heir[called]
                for arg in given[len(given) - len(f.args.defaults):] if f.args.defaults else []:
                    if (called, arg) not in keywords and most.get(called, 0) <= given.index(arg):
                        idle.append(f"{'/'.join(parts)}: {called}({arg}=)")
    assert not idle, idle


def test_exported_lines_are_short():
    long = [f"{'/'.join(parts)}:{k}" for path, parts in modules()
            for k, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if len(line) > 140 and not line.startswith("_all_")]
    assert not long, long[:20]


def test_lines_of_tests_and_tools_are_short():
    long = [f"{path.relative_to(ROOT).as_posix()}:{k}" for folder in ("tests", ".ci") for path in sorted((ROOT / folder).rglob("*.py"))
            for k, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 140]
    assert not long, long[:20]


def test_version_is_one():
    import configparser

    import relkd

    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    assert relkd.__version__ == cfg["DEFAULT"]["version"]


@pytest.mark.parametrize("notebook", [p.relative_to(ROOT).as_posix() for p in project_notebooks()])
def test_cells_show_one_idea(notebook):
    import nbformat

    cells = [c for c in nbformat.read(ROOT / notebook, as_version=4).cells if c.cell_type == "code"]
    long = {c.id: n for c in cells if (n := len(c.source.strip().splitlines())) > 40}
    assert not long, (f"more than 40 lines in cells {long} of {notebook}: "
                      "take out what stands on its own, with prose before it and an output after it")
    wide = {c.id: n for c in cells if (n := max(map(len, c.source.splitlines()), default=0)) > 110}
    assert not wide, f"lines of more than 110 characters, which a laptop does not show whole, in cells {wide} of {notebook}: break them"


LESSON = 45                       # cells; what is beyond stands on a second page, told as "read after"


def test_a_lesson_is_read_in_one_sitting():
    lessons = [path for pattern in ("00_relations*", "losses/*", "tasks/*") for path in project_notebooks(f"{pattern}.ipynb")]
    cells = {path.relative_to(ROOT / "nbs").with_suffix("").as_posix(): len(json.loads(path.read_text(encoding="utf-8"))["cells"])
             for path in lessons}
    long = {name: n for name, n in cells.items() if n > LESSON}
    assert not long, f"more than {LESSON} cells: {long}; join prose, or put what is beyond on a page to be read after"


def test_every_exercise_has_a_folded_solution():
    """As many numbered answers as questions, behind them, in one fold; a single one may go without its number."""
    wrong = {}
    for path in project_notebooks():
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        for part in re.split(r"^#+ .*Exercises.*$", text, flags=re.M)[1:]:
            asked, _, rest = part.partition("<details>")
            numbers = [len(re.findall(r"^\d+\. ", t, flags=re.M)) for t in (asked, rest.partition("</details>")[0])]
            if "</details>" not in rest or numbers[0] != numbers[1] and numbers != [1, 0]:
                wrong[path.relative_to(ROOT).as_posix()] = numbers
    assert not wrong, f"questions and answers: {wrong}"
