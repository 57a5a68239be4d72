"""What the site is made of, written below _docs/source: the committed notebooks, the reference, the tables and their records.

`python .ci/site/pages.py _docs [NOTEBOOK ...]` needs the package and its lab, and nothing of Sphinx; no cell is executed."""
import configparser
import importlib
import inspect
import json
import math
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
CONFIG = configparser.ConfigParser(delimiters=["="])
CONFIG.read(ROOT / "settings.ini", encoding="utf-8")
SET = CONFIG["DEFAULT"]
REPO = f"https://github.com/{SET['user']}/{SET['repo']}"
TAG = f"v{SET['version']}"

# Chinese for the titles that are English in the notebooks; a name needs none
TITLES = {
    "00_relations": "样本之间的关系", "losses/index": "损失函数", "losses/00_contract": "损失的约定",
    "losses/00_rkd": "RKD：关系知识蒸馏", "losses/01_kd": "KD：Hinton的知识蒸馏", "losses/02_fitnet": "FitNet：来自隐藏层的提示",
    "losses/03_at": "AT：注意力转移", "losses/04_sp": "SP：保持相似性的蒸馏", "losses/05_cc": "CC：相关一致性", "losses/06_vid": "VID：变分信息蒸馏",
    "losses/07_pkt": "PKT：概率知识转移", "losses/08_ab": "AB：激活边界", "losses/09_ft": "FT：因子转移", "losses/10_fsp": "FSP：求解过程的流",
    "losses/11_nst": "NST：神经元选择性转移", "losses/12_crd": "CRD：对比表示蒸馏", "losses/13_ofd": "OFD：特征蒸馏的全面检修",
    "losses/20_zoo": "十四个损失放在一起", "losses/21_fast_angle": "不用立方的角度损失", "losses/22_angle_triton": "GPU上的角度损失",
    "losses/24_tokens": "词元：蒸馏Transformer", "data/index": "数据", "lab/06_heads": "分类头：类别即方向",
    "tables/00_digits": "手写数字上的RKD", "tables/01_cifar100": "CIFAR-100上的RKD", "tables/02_tinyimagenet": "Tiny ImageNet上的RKD",
    "tables/03_omniglot": "Omniglot上的RKD", "tables/04_miniimagenet": "miniImageNet与CIFAR-FS上的RKD",
}
PATH = [                                                                 # the reading path: (floor, its pages in order)
    ("derive · 推导", ["00_relations", "losses/index", "playground"]),
    ("train · 训练", ["data/index", "lab/index", "tasks/index"]),
    ("in your loop · 用在你的循环里", ["clients/index"]),
    ("reproduce · 复现", ["tables/index", "records/index"]),
    ("look up · 查阅", ["api/index"]),
]
ROOMS = {                                                                # rooms without an index of their own
    "lab": ("The lab · 实验室", "What an experiment is made of, one idea a notebook.", "一个实验由什么组成，每个笔记本讲一件事。"),
    "tasks": ("Tasks · 任务", "What is learned and how it is tested.", "学什么，怎样测试。"),
    "tables": ("Tables · 表格", "One table of a paper, one notebook.", "一张表，一个笔记本。"),
}
PLAY = {"losses/00_rkd": "points", "losses/01_kd": "temperature"}
PLAY_TEXT = {
    "points": ("Drag the points · 拖动这些点",
               "Three samples as the teacher and as the student embeds them. Drag a point, or reach it with the Tab key and move it with "
               "the arrow keys: distances, cosines, both losses and their gradients follow. Turn, shift or enlarge the student's triangle: "
               "nothing changes.",
               "同样三个样本，左边是教师的嵌入，右边是学生的。拖动一个点（或用Tab键选中、用方向键移动），距离、余弦、两个损失和它们的梯度都会跟着变。"
               "把学生的三角形旋转、平移或放大：什么也不变。"),
    "temperature": ("Turn the temperature · 调节温度",
                    "Three classes. At a low temperature only the largest logit counts; at a high one the loss sees the order of the others, and "
                    "with $T^2$ the gradient keeps its size.",
                    "三个类别。温度低时只有最大的logit起作用；温度高时，损失看得见其余类别的次序；乘上$T^2$之后，梯度的大小不变。"),
}


def slug(name):
    return name.replace("/", "-")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- notebooks
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


def titled(text, page):
    "The page's title in both languages."
    title = re.match(r"# (.*)", text)
    if title and page in TITLES and not re.search("[一-鿿]", title.group(1)):
        text = f"# {title.group(1)} · {TITLES[page]}" + text[title.end():]
    return text


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
            cells.append({**cell, "source": titled(linked(source, page), page)})
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
    flags = [f for c in nb["cells"] if c["cell_type"] == "code" for f in re.findall(r"^#\|\s*(slow|cuda|clients)\b", "".join(c["source"]), re.M)]
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
    for path in sorted((ROOT / "nbs").glob("**/*.ipynb")):
        page = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
        if ".ipynb_checkpoints" in path.parts or (only and page not in only):
            continue
        nb = json.loads(path.read_text(encoding="utf-8"))
        nb["metadata"].setdefault("language_info", {"name": "python"})
        write(source / f"{page}.ipynb", json.dumps(shown(nb, page), ensure_ascii=False))
        write(extra / "notebooks" / f"{page}.ipynb", json.dumps(to_download(nb), ensure_ascii=False))
        meta[page] = {"download": f"notebooks/{page}.ipynb", "needs": needs(nb), "install": install(nb),
                      "colab": f"https://colab.research.google.com/github/{SET['user']}/{SET['repo']}/blob/{TAG}/nbs/{page}.ipynb"}
    return meta


def toctree(pages, caption="", shown=False):
    options = [":hidden:"] * (not shown) + ([f":caption: {caption}"] if caption else []) + [":maxdepth: 1"]
    return "\n".join(["```{toctree}", *options, "", *pages, "```"]) + "\n"


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
    there = [p for p in (q for _, pages in PATH for q in pages)]
    for floor, pages in PATH:
        pages = [p for p in pages if p in there and any((source / f"{p}{s}").exists() for s in (".md", ".ipynb"))]
        append(source / "index", toctree(pages, floor))


# ------------------------------------------------------------------------------------------------------------- reference
def plain(text):
    "Words of a comment as Markdown that says the same; code between backticks stays."
    parts = re.split(r"(`[^`]*`|\$[^$]+\$)", " ".join(text.split()))
    return "".join(p.replace("|", "\\|") if p[:1] in ("`", "$") else re.sub(r"([\\*_<$\[|#~])", r"\\\1", p) for p in parts)


def said(function):
    "{parameter, or 'returns': the comment beside it}."
    from relkd import docs
    try:
        text = inspect.cleandoc("\n" + inspect.getsource(function))
        heads = dict(docs._heads(text))
    except (OSError, TypeError, SyntaxError):
        return {}
    head = heads.get(getattr(function, "__name__", ""))
    pairs = [line.strip().split(": ", 1) for line in docs._lines(head)] if head else []
    return {name: comment for names, comment in pairs for name in names.split(", ")}


def kind(annotation):
    if annotation is inspect.Parameter.empty:
        return ""
    return getattr(annotation, "__name__", str(annotation)).replace("torch.", "")


def parameters(function):
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return ""
    comments = {k.lstrip("*"): v for k, v in said(function).items()}
    lines = []
    for name, p in signature.parameters.items():
        if name != "self":
            default = "" if p.default is p.empty else f"`{p.default!r}`".replace("|", "\\|")
            lines.append(f"| `{name}` | {plain(kind(p.annotation))} | {default if len(default) < 60 else '…'} | {plain(comments.get(name, ''))} |")
    if back := comments.get("returns"):
        lines.append(f"| *returns* | {plain(kind(signature.return_annotation))} | | {plain(back)} |")
    if not lines:
        return ""
    return "\n".join(["| parameter · 参数 | type · 类型 | default · 默认 | meaning · 含义 |", "|---|---|---|---|", *lines]) + "\n"


def called(name, thing):
    try:
        parts = [str(p.replace(annotation=p.empty)) for n, p in inspect.signature(thing).parameters.items() if n != "self"]
    except (TypeError, ValueError):
        return ""
    text = re.sub(r"<function (\w+) at 0x\w+>|<class '([\w.]+)'>|<factory>", lambda m: m.group(1) or m.group(2) or "...", ", ".join(parts))
    return f"```python\n{name}({text})\n```\n" if len(text) < 400 else ""


def entry(name, thing):
    title = f"### {plain(name)}\n"
    if not callable(thing):
        return f"{title}\n`{type(thing).__name__}`\n"
    text = [title, called(name, thing)]
    doc = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    doc = getattr(doc, "text", doc)                                       # as relkd.docs keeps it
    if isinstance(doc, str) and not doc.startswith(f"{name}("):
        text.append(plain(inspect.cleandoc(doc)) + "\n")
    if not inspect.isclass(thing):
        return "\n".join([*text, parameters(thing)])
    if "__init__" in vars(thing):
        text.append(parameters(vars(thing)["__init__"]))
    for method, code in vars(thing).items():
        code = getattr(code, "__func__", code)
        if inspect.isfunction(code) and not method.startswith("_") and (code.__doc__ or said(code)):
            text += [f"**{plain(name)}.{method}**", called(f".{method}", code), plain(inspect.cleandoc(code.__doc__ or "")) + "\n", parameters(code)]
    return "\n".join(text)


def lesson_of(path):
    found = re.search(r"File to edit: [./]*nbs/([\w/]+)\.ipynb", path.read_text(encoding="utf-8"))
    return found.group(1) if found else None


def reference(source, meta):
    "One page a room of the package; every name that a module exports, with what stands beside its parameters."
    rooms = {}
    for path in sorted((ROOT / "relkd").glob("**/*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        lesson = lesson_of(path)
        if path.name.startswith("_") or lesson not in meta:
            continue
        module = ".".join(parts)
        code = importlib.import_module(module)
        names = [n for n in getattr(code, "__all__", []) if hasattr(code, n)]
        room = parts[1] if len(parts) > 2 else "relkd"
        anchor = module.replace(".", "-").replace("_", "-").lower()
        meta[lesson]["api"] = f"api/{room}.html#{anchor}"
        text = [f"({module})=\n## {plain(module)}\n", f"{plain((code.__doc__ or '').strip())}\n",
                f"The lesson · 讲解：[{lesson}](../{lesson}.ipynb)\n"]
        rooms.setdefault(room, []).append("\n".join([*text, *(entry(n, getattr(code, n)) for n in names)]))
    order = ["relkd", *sorted(set(rooms) - {"relkd"})]
    for room in order:
        title = f"relkd.{room}" if room != "relkd" else "relkd"
        write(source / "api" / f"{room}.md", f"# {title}\n\n" + "\n".join(rooms.get(room, [])))
    write(source / "api" / "index.md", "# Reference · 参考\n\nEvery public name with the shape and meaning of its parameters, its errors and its "
          "source, as they stand in the code; each module leads to the lesson that derives it.\n\n每个公开的名字：参数的形状与含义、会抛出的错误、"
          "出处，都来自代码本身；每个模块都链接到推导它的那一课。\n\n" + toctree(order, shown=True))


# ------------------------------------------------------------------------------------------------- tables and their records
def number(v, form=".2f", half=None):
    if v is None or math.isnan(v):
        return ""
    return f"{v:{form}}" + ("" if half is None or math.isnan(half) else f" ± {half:.2f}")


def seeds_of(records, row, test, out="../"):
    from relkd.records import cell_name
    cells = []
    for r in sorted((r for r in records if r["row"] == row and test in r["tests"]), key=lambda r: r["seed"]):
        name = f"{out}records-json/{r['recipe']}/{cell_name(r['row'], r['variant'], r['seed'])}.json"
        cells.append(f"<a href=\"{name.replace('+', '%2B')}\" title=\"seed {r['seed']}, commit {r.get('commit')}, {r.get('device')}\">"
                     f"{r['tests'][test]['accuracy']:.2f}</a>")
    return " ".join(cells)


def recipe_page(r, title, records, frame):
    n = len(records)
    text = [f"# {r.name}\n", f"{plain(title)}\n", f"A table of {r.runs} runs; {n} of them have a record here. · 全表共{r.runs}次运行，这里有{n}个记录。\n"]
    if r.source:
        text.append(f"The paper's numbers · 论文的数字：{plain(r.source)}\n")
    if r.cut:
        text.append(f"Cut down · 删减：{plain(r.cut)}\n")
    if frame is None:
        text += ["No record yet; it waits for a GPU or for data.\n\n还没有记录，在等GPU或数据。\n", f"```\nrelkd run {r.name}\n```\n"]
        rows = [(row, t) for (row, t), _ in cells_of(r)]
        text += ["| row · 行 | test · 测试 | the paper · 论文 |", "|---|---|---|"] * bool(rows)
        return "\n".join(text + [f"| {plain(row)} | {t} | {papers(r, row, t)} |" for row, t in rows]) + "\n"
    text.append("Each number of a seed leads to its record: recipe, seed, commit, versions, device, every epoch. In brackets the 95 % interval of "
                "the paired difference to the base row.\n\n每个种子的数字都链接到它的记录：配方、种子、提交、版本、设备、每一轮的数值。方括号里是与基准行的成对差的95%区间。\n")
    for test in dict.fromkeys(frame.index.get_level_values(0)):
        quotes = bool(r.quoted)
        text += [f"## {test}\n", "| row · 行 | last epoch · 最后一轮 | sd · 标准差 | in pairs · 成对差 |" + " the paper · 论文 |" * quotes + " seeds · 各种子 |",
                 "|---|---|---|---|---|" + "---|" * quotes]
        for row, v in frame.loc[test].iterrows():
            span = "" if math.isnan(v["low"]) else f" [{v['low']:+.2f}, {v['high']:+.2f}]"
            paper = f" {number(v['paper'], half=v['paper_over_episodes'])} |" * quotes
            text.append(f"| {plain(row)} | {number(v['last'])} | {number(v['sd'])} | {number(v['difference'], '+.2f')}{span} |{paper} {seeds_of(records, row, test)} |")
        text.append("")
    return "\n".join(text)


def papers(r, row, test):
    value = r.quoted.get((row, test), r.quoted.get(row))
    return number(value[0], half=value[1]) if isinstance(value, tuple) else number(value)


def cells_of(r):
    "((row, test), number) of a paper's cells."
    headline = r.task.headline
    return [((k if isinstance(k, tuple) else (k, headline)), v) for k, v in r.quoted.items()]


def tables(source, extra):
    from relkd.catalogue import known_recipes
    from relkd.records import load_records
    from relkd.tables.paired import table
    from relkd.tables.recipe import recipe

    known, kept = known_recipes(), {}
    for name, title in known.items():
        r = recipe(name)
        try:
            records = load_records(ROOT / "figures", name)
            kept[name] = r, records, table(records, r)
        except ValueError as error:
            if "no records" not in str(error):
                raise
            kept[name] = r, [], None
        write(source / "records" / f"{slug(name)}.md", recipe_page(r, title, *kept[name][1:]))
    shutil.copytree(ROOT / "figures" / "records", extra / "records-json", dirs_exist_ok=True)
    write(source / "records" / "index.md", table_of_tables(known, kept) + "\n" + toctree([slug(n) for n in known]))


def table_of_tables(known, kept):
    text = ["# The table of tables · 所有的表\n",
            "Every recipe, and below it every cell of a paper that a recipe quotes, beside what was measured here. A number leads to its records.\n",
            "全部配方；下面是配方引用的论文中的每一格，旁边是这里测得的数。每个数字都通向它的记录。\n", "## Recipes · 配方\n",
            "| recipe · 配方 | what · 内容 | records · 记录 |", "|---|---|---|"]
    text += [f"| [{n}]({slug(n)}.md) | {plain(t)} | {len(kept[n][1])} / {kept[n][0].runs} |" for n, t in known.items()]
    seen = []
    for name, (r, records, frame) in kept.items():
        if not r.quoted or r.quoted in seen:                              # the numbers of a paper stand once
            continue
        seen.append(r.quoted)
        small = next((n for n in (f"{name.split('/')[0]}/cpu",) if n in kept and kept[n][1] and n != name), None)
        text += [f"\n## {known[name]}\n", f"{plain(r.source)}: [{name}]({slug(name)}.md)" + (f", cut down · 删减：[{small}]({slug(small)}.md)" if small else "") + "\n",
                 "| row · 行 | test · 测试 | the paper · 论文 | here · 这里 | cut down · 删减 |", "|---|---|---|---|---|"]
        for (row, test), _ in cells_of(r):
            paper = f"[{papers(r, row, test)}]({slug(name)}.md)"
            text.append(f"| {plain(row)} | {test} | {paper} | {mean(frame, row, test, name)} | {mean(kept[small][2], row, test, small) if small else ''} |")
    return "\n".join(text) + "\n"


def mean(frame, row, test, name):
    if frame is None or (test, row) not in frame.index:
        return ""
    v = frame.loc[(test, row)]
    return f"[{number(v['last'], half=v['sd'])}]({slug(name)}.md), {int(v['seeds'])}"


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
