"""The table of tables, and a page for each recipe: a paper's numbers, what was measured here, and the record behind each number."""
import math
import shutil

from common import ROOT, plain, slug, toctree, write
from recipe_titles import CHINESE, SAID


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
    text = [f"# {r.name}\n", f"{plain(title)}\n",
            f"A table of {r.runs} runs; {n} of them have a record here. · 全表共{r.runs}次运行，这里有{n}个记录。\n"]
    if r.source:
        text.append(f"The paper's numbers: {plain(r.source)} · 论文的数字：{plain(SAID[r.source])}\n")
    if r.cut:
        text.append(f"Cut down: {plain(r.cut)} · 删减：{plain(SAID[r.cut])}\n")
    if frame is None:
        text += ["No record yet; it waits for a GPU or for data.\n\n还没有记录，在等GPU或数据。\n", f"```\nrelkd run {r.name}\n```\n"]
        rows = [(row, t) for (row, t), _ in cells_of(r)]
        text += ["| row · 行 | test · 测试 | the paper · 论文 |", "|---|---|---|"] * bool(rows)
        return "\n".join(text + [f"| {plain(row)} | {t} | {papers(r, row, t)} |" for row, t in rows]) + "\n"
    text.append("Each number of a seed leads to its record: recipe, seed, commit, versions, device, every epoch. In brackets the 95 % "
                "interval of the paired difference to the base row.\n\n每个种子的数字都链接到它的记录：配方、种子、提交、版本、设备、每一轮的数值。方括号里是与基准行的成对差的95%区间。\n")
    for test in dict.fromkeys(frame.index.get_level_values(0)):
        quotes = bool(r.quoted)
        columns = "| row · 行 | last epoch · 最后一轮 | sd · 标准差 | in pairs · 成对差 |"
        text += [f"## {test}\n", columns + " the paper · 论文 |" * quotes + " seeds · 各种子 |",
                 "|---|---|---|---|---|" + "---|" * quotes]
        for row, v in frame.loc[test].iterrows():
            span = "" if math.isnan(v["low"]) else f" [{v['low']:+.2f}, {v['high']:+.2f}]"
            paper = f" {number(v['paper'], half=v['paper_over_episodes'])} |" * quotes
            text.append(f"| {plain(row)} | {number(v['last'])} | {number(v['sd'])} | {number(v['difference'], '+.2f')}{span} |{paper} "
                        f"{seeds_of(records, row, test)} |")
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

    known, kept = {name: f"{title} · {CHINESE[name]}" for name, title in known_recipes().items()}, {}
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
            "Every recipe, and below it every cell of a paper that a recipe quotes, beside what was measured here (mean ± "
            "deviation, seeds). A number leads to its records.\n",
            "全部配方；下面是配方引用的论文中的每一格，旁边是这里测得的数（平均值±标准差，种子数）。每个数字都通向它的记录。\n", "## Recipes · 配方\n",
            "| recipe · 配方 | what · 内容 | records · 记录 |", "|---|---|---|"]
    text += [f"| [{n}]({slug(n)}.md) | {plain(t)} | {len(kept[n][1])} / {kept[n][0].runs} |" for n, t in known.items()]
    seen = []
    for name, (r, records, frame) in kept.items():
        if not r.quoted or r.quoted in seen:                              # the numbers of a paper stand once
            continue
        seen.append(r.quoted)
        small = next((n for n in (f"{name.split('/')[0]}/cpu",) if n in kept and kept[n][1] and n != name), None)
        text += [f"\n## {known[name]}\n", f"{plain(r.source)}: [{name}]({slug(name)}.md) · {plain(SAID[r.source])}：[{name}]({slug(name)}.md)\n",
                 f"Cut down · 删减：[{small}]({slug(small)}.md)\n" if small else "",
                 "| row · 行 | test · 测试 | the paper · 论文 | here · 这里 | cut down · 删减 |", "|---|---|---|---|---|"]
        for (row, test), _ in cells_of(r):
            paper = f"[{papers(r, row, test)}]({slug(name)}.md)"
            beside = mean(kept[small][2], row, test, small) if small else ""
            text.append(f"| {plain(row)} | {test} | {paper} | {mean(frame, row, test, name)} | {beside} |")
    return "\n".join(text) + "\n"


def mean(frame, row, test, name):
    if frame is None or (test, row) not in frame.index:
        return ""
    v = frame.loc[(test, row)]
    return f"[{number(v['last'], half=v['sd'])}]({slug(name)}.md), {int(v['seeds'])}"
