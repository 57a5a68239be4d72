"""One Chinese word for a term and one name for a repository; titles, headings and annotated lines in both languages.

The words stand in nbs/01_glossary.ipynb. `REJECTED` says, for each, which variants a reader stumbled over."""
import json
import re
from functools import cache
from pathlib import Path

import pytest
from helpers import project_notebooks

ROOT = Path(__file__).resolve().parents[1]
CHINESE = re.compile(r"[\u4e00-\u9fff]")
LATER = set()            # notebooks whose wording is still to follow

REJECTED = {             # the word that is used: what is not, as a regular expression
    "格拉姆矩阵": r"Gram矩阵",
    "连接器": r"(?<!全)连接层",
    "复述器": r"经过可训练的paraphraser|FT的paraphraser|，paraphraser",
    "翻译器": r"FT的translator",
    "重建": r"重构",
    "CRD的线性层": r"投影层",
    "图案": r"样式",
    "陷阱": r"常见的坑|容易出错的地方|Pitfalls? · (?!陷阱)",
    "开销": r"[Cc]ost\w*\??( ·|,[^·\n]*·) [^\n]{0,8}代价",
    "损失动物园": r"(?<!损失)动物园",
    "捷径连接": r"捷径(?!连接)",
    "未激活": r"沉默",
    "全零": r"(?<!悄)无声(?!无息)",
    "幅值": r"响度|更响|有多响|过响|最响|音量|出声|大声",
    "拉力": r"拉得.{0,4}重|拉得多",
    "只前向一次": r"教师[^，。；]{0,8}看(一|到一)(次|眼)|只看不学|以评估模式看",
    "跨种子": r"种子上±|种子上的(区间|细条)|在种子上|对种子的均值",
    "跨片段": r"片段上±|片段上的(区间|粗条|置信区间)",
    "不计损失": r"付费|付不完|付\$?\d|要付的|付得",
    "用一句话说明原因": r"一行话|一句话的拒绝|用一行拒绝",
    "不报错": r"(一|不)声不响|静悄悄",
    "词元": r"类别token",
    "批量": r"批次",
    "协议": r"规程",
    "每R个取一个": r"每隔\$?[三R]\$?个",
    "手写数字图片": r"张(有标签的)?数字[，。]|真实的数字",
    "Student t": r"学生\$t\$",
    "小型学生网络": r"小学生",
    "Knowledge-Distillation-Zoo": r"KD-Zoo|AberHu(?!/)",
    "inactive; all zero": r"[Ss]ilent (sample|neuron|channel|map|layer|teacher|student|region|response|everywhere)",
    "indifferent": r"clueless",
    "scaled to length 1": r"brought to length",
    "belong in": r"belongs? into",
    "an error that says why": r"refused in words|refuses a second derivative in words",
    "recalled, quoted": r"[Qq]uoted from memory(?!',)|凭记忆",
}
PROSE = {"inactive; all zero"}  # asked of Markdown alone: a name in code may stay
TERMS = "知识蒸馏 嵌入 特征图 格拉姆矩阵 连接器 复述器 翻译器 重建 图案 记忆库 陷阱 开销 损失动物园 捷径连接 未激活 全零 间隔 拉力 片段 跨种子 跨片段 " \
        "HKD IKD DA WRN 第N课 RepDistiller Knowledge-Distillation-Zoo KD_Lib mmrazor mdistiller torchdistill"


@cache
def cells():
    "Of every notebook but those of LATER: its path within nbs/, and its cells as (kind, id, text)."
    return {name: [(c["cell_type"], c["id"], "".join(c["source"])) for c in json.loads(p.read_text(encoding="utf-8"))["cells"]]
            for p in project_notebooks() if (name := p.relative_to(ROOT / "nbs").as_posix()) not in LATER}


@pytest.mark.parametrize("word", REJECTED)
def test_one_word_for_a_term(word):
    variant = re.compile(REJECTED[word])
    found = [f"{name}, cell {i}: ...{text[max(0, m.start() - 15):m.end() + 15]}...".replace("\n", " ")
             for name, all_of_it in cells().items() for kind, i, text in all_of_it
             if kind == "markdown" or word not in PROSE for m in variant.finditer(text)]
    assert not found, f"write {word!r} (nbs/01_glossary.ipynb), not " + "; ".join(found[:8])


def test_the_glossary_has_the_words():
    text = "\n".join(t for _, _, t in cells()["01_glossary.ipynb"])
    assert not [word for word in TERMS.split() if word not in text]


def test_titles_and_headings_are_in_both_languages():
    """A reader of either language finds the way by headings alone; the subtitle is told twice, line by line."""
    wrong = []
    for name, all_of_it in cells().items():
        kind, _, first = all_of_it[0]
        subtitle = [line for line in first.splitlines() if line.startswith("> ")]  # the first is the module's docstring: English
        if [bool(CHINESE.search(line)) for line in subtitle] != [False, True]:
            wrong.append(f"{name}: the subtitle is a line '> English', a line '>' and a line '> Chinese'")
        for _, i, text in (c for c in all_of_it if c[0] == "markdown"):
            for line in re.findall(r"^#{1,4} .*$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), flags=re.M):
                latin = re.search(r"[A-Za-z]{2}", re.sub(r"`[^`]*`|\$[^$]*\$", "", line))
                if not (CHINESE.search(line) and latin):
                    wrong.append(f"{name}, cell {i}: {line}")
    assert not wrong, wrong[:8]


def test_annotated_lines_are_in_both_languages():
    """The authors' lines had been explained to Chinese readers only."""
    wrong = []
    for name, all_of_it in cells().items():
        for _, i, text in (c for c in all_of_it if c[0] == "code"):
            comments = [line for line in text.splitlines() if line.lstrip().startswith("#") and not line.startswith("#|")]
            both = [bool(CHINESE.search(line)) for line in comments]
            if "_annotated(" in text and "def " in text and any(both) and sum(both) > len(both) - sum(both):
                wrong.append(f"{name}, cell {i}")
    assert not wrong, wrong
