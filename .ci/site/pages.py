"""What the site is made of, written below _docs/source: the committed notebooks, the reference, the tables and their records.

`python .ci/site/pages.py _docs [NOTEBOOK ...]` needs the package and its lab, and nothing of Sphinx; no cell is executed."""
import json
import re
import shutil
import sys
from pathlib import Path

from common import REPO, ROOT, SET, TAG, toctree, write

sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "tests"))
from listed import project_notebooks  # noqa: E402
from reference import reference  # noqa: E402
from results import tables  # noqa: E402
from titles import PATH, PLAY, PLAY_TEXT, ROOMS  # noqa: E402


def linked(text, page):
    "Links of a notebook's prose as links of its page: to other pages, to pictures, to files of the repository."
    here = (ROOT / "nbs" / page).parent

    def link(m):
        target, _, anchor = m.group(2).partition("#")
        if not target:
            return f"{m.group(1)}(#{re.sub(r'[^a-z0-9_一-鿿 -]', '', anchor.lower())})"
        path = (here / target).resolve()
        if not path.is_relative_to(ROOT) or target.endswith(".ipynb"):
            return m.group()
        inside = path.relative_to(ROOT).as_posix()
        if path.suffix == ".png":
            up = "../" * page.count("/")
            return f"{m.group(1)}({up}{inside})"
        return f"{m.group(1)}({REPO}/blob/{TAG}/{inside})"
    return re.sub(r"(\])\((?!https?:|mailto:)([^)\s]+)\)", link, text)


def titled(text):
    "A title whose English half begins with a method's name begins so in Chinese, too."
    return re.sub(r"^# ([A-Z]\w*[A-Z]\w*): (.*) · (?!\1)", r"# \1: \2 · \1：", text)


def play(kind, heading="##"):
    title, english, chinese = PLAY_TEXT[kind]
    box = f'<div class="play-{kind}">JavaScript</div>'
    return f"{heading} {title}\n\n{english}\n\n{chinese}\n\n{box}\n"


def shown(nb, page):
    "The cells of a notebook that its page shows, with marks for the flagged ones."
    cells, wanted = [], PLAY.get(page)
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            if wanted and re.search(r"^## Lesson 1\b", source, re.M):
                cells.append({"cell_type": "markdown", "metadata": {}, "id": "playground", "source": play(wanted)})
                wanted = None
            cells.append({**cell, "source": titled(linked(source, page))})
            continue
        flags = re.findall(r"^#\|\s*(\w+)", source, re.M)
        source = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")
        if "hide" in flags or not source:
            continue
        tags = [f for f in ("export", "slow", "cuda", "clients") if f in flags]
        cells.append({**cell, "source": source, "metadata": {"tags": tags}})
    return {**nb, "cells": cells}


def needs(nb):
    "How many cells carry which flag."
    code = "\n".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code")
    flags = re.findall(r"^#\|\s*(slow|cuda|clients)\b", code, re.M)
    return {f: flags.count(f) for f in dict.fromkeys(flags)}


def install(nb):
    extra = "clients" if "clients" in needs(nb) else "lab"
    return f'%pip install -q "{SET["lib_name"]}[{extra}] @ git+{REPO}@{TAG}"'


def to_download(nb):
    "The notebook with a first cell that installs the package where it runs in Colab."
    line = install(nb)
    first = f"import sys\nif 'google.colab' in sys.modules:      # elsewhere: {line[1:]}\n    {line}"
    cell = {"cell_type": "code", "execution_count": None, "id": "install", "metadata": {}, "outputs": [], "source": first}
    return {**nb, "cells": [cell, *nb["cells"]]}


def notebooks(source, extra, only):
    meta = {}
    for path in project_notebooks():
        page = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
        if only and page not in only:
            continue
        nb = json.loads(path.read_text(encoding="utf-8"))
        nb["metadata"].setdefault("language_info", {"name": "python"})
        write(source / f"{page}.ipynb", json.dumps(shown(nb, page), ensure_ascii=False))
        write(extra / "notebooks" / f"{page}.ipynb", json.dumps(to_download(nb), ensure_ascii=False))
        meta[page] = {"download": f"notebooks/{page}.ipynb", "needs": needs(nb), "install": install(nb),
                      "colab": f"https://colab.research.google.com/github/{SET['user']}/{SET['repo']}/blob/{TAG}/nbs/{page}.ipynb"}
    return meta


def append(path, text):
    "Put text below a page, of either kind."
    if path.with_suffix(".md").exists():
        write(path.with_suffix(".md"), path.with_suffix(".md").read_text(encoding="utf-8") + "\n" + text)
    else:
        nb = json.loads(path.with_suffix(".ipynb").read_text(encoding="utf-8"))
        nb["cells"].append({"cell_type": "markdown", "metadata": {}, "id": f"toctree{len(nb['cells'])}", "source": text})
        write(path.with_suffix(".ipynb"), json.dumps(nb, ensure_ascii=False))


def paths(source, meta):
    "The toctrees: their order is the reading path."
    for room, (title, english, chinese) in ROOMS.items():
        write(source / room / "index.md", f"# {title}\n\n{english}\n\n{chinese}\n")
    for room in ("losses", "data", "clients", "lab", "tasks", "tables"):
        pages = [p.split("/")[1] for p in meta if p.startswith(room + "/") and not p.endswith("/index")]
        if (source / room / "index.md").exists() or (source / room / "index.ipynb").exists():
            append(source / room / "index", toctree(pages, shown=room in ROOMS))
    placed = {p for _, pages in PATH for p in pages}
    others = [p for p in meta if "/" not in p and p != "index" and p not in placed]
    for floor, pages in PATH:
        pages = [p for p in pages if any((source / f"{p}{s}").exists() for s in (".md", ".ipynb"))]
        pages += others if floor == PATH[-1][0] else []                  # a page that nobody placed is looked up
        append(source / "index", toctree(pages, floor))


def main(out, *only):
    out = Path(out)
    source, extra = out / "source", out / "extra"
    for folder in (source, extra):
        shutil.rmtree(folder, ignore_errors=True)
    meta = notebooks(source, extra, only)
    shutil.copytree(ROOT / "figures", source / "figures", ignore=shutil.ignore_patterns("records", ".runs", "*.csv"))
    write(source / "playground.md", "# Playground · 动手玩\n\n[RKD](losses/00_rkd.ipynb) and [KD](losses/01_kd.ipynb), to be moved by hand. · "
          "用手来动一动[RKD](losses/00_rkd.ipynb)和[KD](losses/01_kd.ipynb)。\n\n" + "\n".join(map(play, PLAY_TEXT)))
    reference(source, meta)
    tables(source, extra)
    paths(source, meta)
    write(out / "meta.json", json.dumps(meta, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
