"""What Sphinx does not do: two languages, the bar above each page, alternative texts, the search in both languages.

`python .ci/site/finish.py _docs`, with the site's own environment, after sphinx-build."""
import asyncio
import json
import re
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path

import lxml.html
from formulae import words
from languages import split, visit

HEAD = '<script src="{root}_static/language.js"></script>', '<link rel="icon" href="{root}_static/icon.svg">'
FLAGS = {"slow": ("take over 20 seconds", "要二十秒以上"), "cuda": ("need a GPU", "需要GPU"), "clients": ("need the page's library", "需要本页所讲的库")}

FURO = {"Previous": "上一页", "Next": "下一页", "Home": "首页", "Back to top": "回到顶部"}
DOWNLOADED = ("The downloaded notebook begins with this cell. Data that is not there is named, with the command that gets it.",
              "下载的笔记本以这个单元开头。缺少数据时，会说明缺什么、用哪条命令取得。")
SENTENCE = re.compile(r"(?<=[.!?] )(?=[A-Z“(])|(?<=[。！？])(?![）”]|$)")
POINTS = re.compile(r"\b(?:picture|figure|left|below|panels?|drawn|image)\b|图|画|下面|左边", re.I)
DESCRIBES = re.compile(r"(?:Left|Top|Solid|Dots?|Lines|Bars|Stars)\b|左|上[图面排]|实线|[点线条]是")    # so begins what stands in no italics


def element(tag, attributes):
    e = lxml.html.Element(tag)
    for k, v in attributes.items():
        e.set(k, v)
    return e


def both(en, zh):
    return f'<span class="only-en" lang="en">{en}</span><span class="cut"> · </span><span class="only-zh" lang="zh-CN">{zh}</span>'


def bar(about, root, play):
    "What stands above a page: the languages, the search, and what one can do with a notebook."
    parts = ['<span class="languages" role="group" aria-label="language · 语言"><button data-to="zh" lang="zh-CN">中文</button>'
             '<button data-to="en" lang="en">English</button><button data-to="both">both · 双语</button></span>',
             f'<button class="find">{both("search", "搜索")} <kbd>/</kbd></button>']
    if about:
        parts.append(f'<a href="{root}{about["download"]}" download>{both("download", "下载")}</a>')
        flags = [(n, FLAGS[f]) for f, n in about["needs"].items()]
        needs = "; ".join(f"{n} {en}" for n, (en, _) in flags), "；".join(f"{n}个单元{zh}" for n, (_, zh) in flags)
        needs = both("Every cell runs without a GPU.", "所有单元都不需要GPU。") if not flags else both(
            f"Of its cells {needs[0]}.", f"其中{needs[1]}。")
        parts.append(
            f'<details class="colab"><summary>Colab</summary><div>'
            f'<p><a href="{about["colab"]}" rel="noopener">{both("open in Colab", "在Colab中打开")}</a></p>'
            f'<p>{both("First run this there:", "在那里先运行：")}</p><div class="highlight"><pre>{about["install"]}</pre></div><p>{needs}</p>'
            f'<p>{both(*DOWNLOADED)}</p></div></details>')
        if "api" in about:
            parts.append(f'<a href="{root}{about["api"]}">{both("reference", "参考")}</a>')
        if play:
            parts.append(f'<a href="#{play[0]}">{both("playground", "动手玩")}</a>')
    return lxml.html.fragment_fromstring(f'<nav class="bar" aria-label="page">{"".join(parts)}</nav>')


def spoken(block, lang):
    "What a block tells the readers of one language, its code and formulae as text."
    if f"only-{'en' if lang == 'zh' else 'zh'}" in (block.get("class") or "").split():
        return ""
    return " ".join(one_language(block, lang).text_content().split())


def is_caption(block):
    "A paragraph that is in italics from end to end."
    copy = deepcopy(block)
    for em in copy.xpath(".//em"):
        em.drop_tree()
    return block.tag == "p" and block.find(".//em") is not None and not copy.text_content().strip(" ·\u00a0\n")


def blocks_below(img):
    "The paragraphs that follow a picture: one, or two of one language each."
    outer = [e for e in img.iterancestors() if "cell" in (e.get("class") or "").split() or e.tag in ("p", "figure")]
    e, found = (outer[-1] if outer else img).getnext(), []
    while e is not None and e.tag == "p" and len(found) < 2 and (not found or "only-" in (e.get("class") or "")):
        found.append(e)
        e = e.getnext()
    return found


def beginning(text, room=250):
    "The first whole sentences of a text, as many as there is room for."
    found = ""
    for sentence in SENTENCE.split(text):
        if found and len(found) + len(sentence) > room:
            break
        found += sentence
    return found.strip() if len(found) <= room + 50 else f"{found[:room].rstrip()}…"


def about_picture(text, heading, colon):
    "Of the prose above a picture: from the sentence on that speaks of it, else the heading and the last one."
    sentences = SENTENCE.split(text)
    found = next((k for k, s in enumerate(sentences) if POINTS.search(s)), None)
    return "".join(sentences[found:]) if found is not None else colon.join(dict.fromkeys(filter(None, (heading, sentences[-1]))))


def describe(article):
    "Alternative texts in both languages: the caption below a picture, else what the prose says of it."
    above, heading = {}, {}
    for e in article.iter("h1", "h2", "h3", "p", "img"):
        if e.tag != "img":
            if not any("cell_output" in (a.get("class") or "") for a in e.iterancestors()) and e.find(".//img") is None:
                above |= (now := {lang: said for lang in ("en", "zh") if (said := spoken(e, lang))})
                heading = now if e.tag != "p" else heading
            continue
        e.set("loading", "lazy")
        below = blocks_below(e)
        captions = [b for b in below if is_caption(b)]
        text = {lang: " ".join(filter(None, (spoken(b, lang) for b in captions or below))) for lang in ("en", "zh")}
        if not captions and not any(map(DESCRIBES.match, text.values())):
            text = {lang: about_picture(said, heading.get(lang), {"en": ": ", "zh": "："}[lang]) for lang, said in above.items()}
        if (own := e.get("alt")) and "_images" not in own and not own.startswith(".."):
            text["en"] = own
        text = {lang: beginning(said).rstrip("：: ") for lang, said in text.items() if said}
        for lang in ("en", "zh"):
            e.set(f"data-alt-{lang}", text.get(lang) or next(iter(text.values())))
        e.set("alt", " · ".join(dict.fromkeys(text.values())))


def one_language(article, lang):
    "A copy of the article with the blocks of one language and those of none, without outputs; its formulae are words."
    other = "en" if lang == "zh" else "zh"
    copy = deepcopy(article)
    unread = [f'.//*[contains(concat(" ", @class, " "), " {c} ")]' for c in (f"only-{other}", "cell_output", "headerlink", "cut", "colon")]
    for e in copy.xpath(" | ".join([".//nav", *unread])):
        e.drop_tree()
    for e in copy.xpath('.//*[contains(concat(" ", @class, " "), " math ")]'):
        tail, tex = e.tail, e.text_content()
        e.clear()
        e.text, e.tail = words(tex), tail
    return copy


def page(path, out, meta):
    "Dress one page; returns its name, and its title, words and markup in each language for the search."
    root = "../" * (len(path.relative_to(out).parts) - 1)
    name = path.relative_to(out).with_suffix("").as_posix()
    doc = lxml.html.fromstring(path.read_text(encoding="utf-8"), parser=lxml.html.HTMLParser(encoding="utf-8"))
    for k, line in enumerate(HEAD):
        doc.find("head").insert(k + 1, lxml.html.fragment_fromstring(line.format(root=root)))
    article = next(iter(doc.xpath('//article[@role="main"]')), None)
    if article is None:
        return None
    links = article.xpath('.//a[contains(@class, "headerlink")]')
    homes = [(a, a.getparent()) for a in links]
    for a, _ in homes:
        a.drop_tree()
    visit(article, element, [])
    for a, home in homes:
        a.tail = None
        home.append(a)
    for e in doc.xpath('//div[contains(@class, "sidebar-tree")]//a | //div[contains(@class, "sidebar-tree")]//p[@class="caption"]/span'
                       ' | //div[contains(@class, "toc-tree")]//a | //div[@class="title"]'):
        split(e, element)
    for e in doc.xpath('//*[contains(concat(" ", @class, " "), " toc-title ")]'):
        e.text = "On this page · 本页"
        split(e, element)
    for e in doc.xpath('//div[@class="context"]/* | //a[contains(@class, "back-to-top")]/span'):
        if not len(e) and (chinese := FURO.get((e.text or "").strip())):
            e.text = f"{e.text.strip()} · {chinese}"
            split(e, element)
    for e in doc.xpath('//p[@role="heading"]'):
        e.set("aria-level", "2")
    for e in doc.xpath('//aside[@class]'):
        e.set("aria-label", "all pages · 所有页面" if "sidebar" in e.get("class") else "on this page · 本页")
    describe(article)
    play = article.xpath('.//section[./div[starts-with(@class, "play-")]]/@id')
    article.insert(0, bar(meta.get(name), root, play))
    doc.set("data-root", root)
    path.write_text("<!doctype html>\n" + lxml.html.tostring(doc, encoding="unicode"), encoding="utf-8")
    return name, {lang: read(one_language(article, lang), name) for lang in ("zh", "en")}


def read(copy, name):
    title = next((" ".join(h.text_content().split()) for h in copy.iter("h1")), name)
    return title, " ".join(copy.text_content().split()), lxml.html.tostring(copy, encoding="unicode")


async def search(out, articles):
    "Two indexes, one a language; and the words alone, for a folder without a server."
    from pagefind.service import PagefindService
    words = {"zh": [], "en": []}
    async with PagefindService() as service:
        index = await service.create_index()
        for name, languages in articles:
            for lang, (title, text, body) in languages.items():
                whole = f'<html lang="{lang}"><head><title>{title}</title></head><body>{body}</body></html>'
                await index.add_html_file(url=f"{name}.html?lang={lang}", content=whole)
                words[lang].append([f"{name}.html", title, text])
        await index.write_files(str(out / "pagefind"))     # answers before all is on the disk, and closing it would cut that off
        sizes = None
        while sizes != (sizes := [p.stat().st_size for p in sorted((out / "pagefind").glob("**/*.*"))]) or not all(sizes):
            await asyncio.sleep(.3)
    for lang, pages in words.items():
        (out / "_static" / f"words-{lang}.js").write_text(f"window.WORDS = {json.dumps(pages, ensure_ascii=False)}", encoding="utf-8")


def main(folder):
    folder = Path(folder)
    out, meta = folder / "site", json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    paths = sorted(out.glob("**/*.html"))
    with ProcessPoolExecutor() as workers:
        done = workers.map(partial(page, out=out, meta=meta), paths, chunksize=4)
        articles = [found for found in done if found]
    shutil.copytree(folder / "extra", out, dirs_exist_ok=True)
    asyncio.run(search(out, articles))
    for junk in (out / "objects.inv", out / ".buildinfo", *out.glob("pagefind/pagefind-*ui.*"), out / "pagefind/pagefind-highlight.js"):
        junk.unlink(missing_ok=True)
    shutil.rmtree(out / "_sources", ignore_errors=True)
    (out / ".nojekyll").touch()
    largest = max(out.glob("**/*.html"), key=lambda p: p.stat().st_size)
    print(f"{len(articles)} pages in {out}; the largest is {largest.relative_to(out)}, {largest.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
