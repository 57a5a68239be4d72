"""The site: every block is in a language, the playground computes what the package does, and a browser reads what was built."""
import functools
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from pathlib import Path

import browser
import pytest
import torch
from helpers import project_notebooks

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / ".ci" / "site"
NOTEBOOKS = [p.relative_to(ROOT / "nbs").with_suffix("").as_posix() for p in project_notebooks()]
NAMES = """relkd · relkd.models · relkd.bench · Lightning · timm · sentence-transformers · pytorch-metric-learning · NVIDIA ModelOpt
    · torchdistill · skorch, fastai, ignite · skorch · fastai · ignite · Hugging Face · Trainer · accelerate · Omniglot
    · CIFAR-10, CIFAR-100, CIFAR-FS, FC100 · ResNet · WRN · VGG · MobileNetV2 · ShuffleNet V1 and V2 · Conv-4 · MAP@R"""
NAMES = set(" ".join(NAMES.split()).split(" · "))                                # headings that are the same in both languages


def room(name):
    spec = importlib.util.spec_from_file_location(f"site_{name}", SITE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_html(text):
    "Markdown as a browser gets it, formulae put aside."
    aside = r"(`+)(?:(?!\1).)+?\1|\$\$.+?\$\$|\$[^$\n]+\$"
    text = re.sub(aside, lambda m: m.group() if m.group()[0] == "`" else '<span class="math">x</span>', text, flags=re.S)
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"xhtmlOut": True}).enable("table")
    return markdown.render(text).replace("&nbsp;", "\u00a0")


@pytest.fixture(scope="module")
def languages():
    return room("languages")


def test_every_recipe_has_its_words_in_both_languages():
    from relkd.catalogue import known_recipes
    from relkd.tables.recipe import recipe

    titles, recipes = room("recipe_titles"), [recipe(name) for name in known_recipes()]
    assert known_recipes().keys() <= titles.CHINESE.keys()
    assert {text for r in recipes for text in (r.source, r.cut) if text} == titles.SAID.keys()


def blocks(html, languages):
    "(the element, what has no neighbour in the other language)"
    page, alone = ET.fromstring(f"<article>{html}</article>"), []
    languages.visit(page, ET.Element, alone)
    return page, [(e.tag, " ".join(languages.said(e).split())) for e, _ in alone]


def test_each_block_has_a_language_and_its_neighbour(languages):
    "Nothing is excused; names that are headings are the same in both."
    left = {}
    for name in NOTEBOOKS:
        cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        html = "".join(as_html("".join(c["source"])) if c["cell_type"] == "markdown" else '<div class="cell"></div>' for c in cells)
        alone = [(tag, text) for tag, text in blocks(html, languages)[1] if not (tag[0] == "h" and text in NAMES)]
        if alone:
            left[name] = alone
    assert not left, "\n".join(f"{name}: <{tag}> {text[:100]}" for name, some in left.items() for tag, text in some)


@pytest.mark.parametrize("text, english, chinese", [
    ("## Read · 阅读", "Read", "阅读"),
    ("A loss is a module.\n\n损失是模块。", "A loss is a module.", "损失是模块。"),
    ("- why it transfers — 为什么能传递；", "why it transfers", "为什么能传递；"),
    ("1. 证明不变。 · Prove it.", "Prove it.", "证明不变。"),
    ("Paper · 论文：[Park](x). Read first · 先读：[KD](y).", "Paper Park. Read first KD.", "论文：Park. 先读：KD."),
    ("**Few labels.** Ten points. · **标签少。** 十个百分点。([claims](x))", "Few labels. Ten points. ([claims](x))", "标签少。 十个百分点。([claims](x))"),
    ("One. · 一。 Two words. · 二。", "One. Two words.", "一。二。"),
    ("[the lesson · 这一课](x)", "the lesson", "这一课"),
    ("$a$ is at most $b$, · `c` · 而且", "x is at most x,", "x而且"),
    ("- `rkd(*gather(s, t))`：一行。 · One line, and no other.", "rkd(*gather(s, t)) One line, and no other.", "rkd(*gather(s, t)) ：一行。"),
    ("| a | b |\n|---|---|\n| `T` | weights · 权重 |", "a b T weights", "a b T 权重"),
    ("- [KD](x), [the zoo · 动物园](y): one line · 一行", "KD, the zoo: one line", "KD, 动物园: 一行"),
    ("## `td`: the difference · 每一对点的差", "td: the difference", "td: 每一对点的差"),
    ("- 约定：`a`、`b`。 · Agreed on: `a`, `b`.", "Agreed on: a, b", "约定：a、b"),
    ("Few words ([lesson · 课](x)).\n\n词不多（见[lesson · 课](x)）。", "Few words (lesson).", "词不多（见课）。"),
])
def test_where_a_block_is_cut(text, english, chinese, languages):
    html = as_html(text)

    def read(lang):
        page, _ = blocks(html, languages)
        other = {"en": "only-zh", "zh": "only-en"}[lang]
        for holder in page.iter():
            for e in [e for e in holder if other in e.get("class", "") or e.get("class") == "cut"]:
                before = holder[list(holder).index(e) - 1] if list(holder).index(e) else None
                if before is not None:
                    before.tail = (before.tail or "") + (e.tail or "")
                else:
                    holder.text = (holder.text or "") + (e.tail or "")
                holder.remove(e)
        return re.sub(r"\W+", " ", "".join(page.itertext())).strip()

    clean = {k: re.sub(r"\W+", " ", re.sub(r"\]\(.\)", "", v)).strip() for k, v in (("en", english), ("zh", chinese))}
    if "`c`" in text:                                        # a piece of code between the halves stays with the half before it
        assert read("en").startswith(clean["en"]) and "而且" not in read("en")
    else:
        assert {lang: read(lang).replace(" ", "") for lang in clean} == {k: v.replace(" ", "") for k, v in clean.items()}


def shown(e, lang, links=True):
    "The words of an element in one language, as a reader gets them; code and formulae are a stroke."
    from_other, kinds = {"en": "only-zh", "zh": "only-en"}[lang], (e.get("class") or "").split()
    if {from_other, "cut", "colon"} & {*kinds} or (e.tag == "a" and not links):
        return " "
    if e.tag in ("code", "pre", "svg", "img") or {"math", "cell"} & {*kinds}:
        return " | "
    return (e.text or "") + "".join(shown(c, lang, links) + (c.tail or "") for c in e)


def blocks_shown(e, languages, seen=("en", "zh")):
    "(language, block) of everything that a reader of one language sees."
    kinds = (e.get("class") or "").split()
    seen = [lang for lang in seen if {"en": "only-zh", "zh": "only-en"}[lang] not in kinds]
    if e.tag in languages.BLOCKS and not any(c.tag in languages.HOLDERS for c in e):
        yield from ((lang, e) for lang in seen)
    else:
        for child in e:
            yield from blocks_shown(child, languages, seen)


def test_no_reader_is_left_with_the_other_language(languages):
    """In one language no block shows its other half, in English nothing is Chinese but a term in brackets, and no Chinese sentence
    goes on in English; links are names, and the glossary sets the two side by side."""
    left = []
    for name in NOTEBOOKS:
        cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
        html = "".join(as_html("".join(c["source"])) if c["cell_type"] == "markdown" else '<div class="cell"></div>' for c in cells)
        for lang, e in blocks_shown(blocks(html, languages)[0], languages):
            text = " ".join(shown(e, lang).split())
            bare, unlinked = (re.sub(r"[(（][^()（）]*[)）]|[\w-]+-[\w-]+", "", t) for t in (text, shown(e, lang, links=False)))
            strange = {"en", "zh"} <= {languages.language(part) for part in languages.CUT.split(text) if part}
            if lang == "en":
                strange |= name != "01_glossary" and bool(languages.HAN.search(bare))
            elif name != "01_glossary":
                runs = re.split(r"[\u3000-\u303f\u3400-\u9fff\uff00-\uffef|]+", unlinked)
                strange |= any(sum(w.islower() for w in languages.WORD.findall(run)) > 2 for run in runs)
            if strange:
                left.append(f"{name}, {lang}: <{e.tag}> {text[:200]}")
    assert not left, "\n".join(left)


@pytest.mark.parametrize("tex, text", [
    (r"\(\sqrt{2-2\cos}\)", "√(2-2cos)"),
    (r"\(\frac{1}{2}r^3\)", "1/2r³"),
    (r"\[\lVert \tilde G(s)-\tilde G(t)\rVert_F^2\]", "‖ G(s)- G(t)‖_F²"),
    (r"\(x\in\mathbb R^{HW}\)", "x∈ R^HW"),
    (r"\(\mathcal L_{\mathrm{SP}}=94\cdot10^{-5}\)", "L_SP=94·10⁻⁵"),
    (r"\(\begin{cases}0&s\le0\\(s-\tau)^2&\text{otherwise}\end{cases}\)", "0 s≤0; (s-τ)² otherwise"),
])
def test_a_formula_reads_as_words(tex, text):
    assert room("formulae").words(tex) == text


def test_the_playground_computes_what_the_package_does():
    "Twenty triangles and twenty pairs of logits: values and gradients in the page's own JavaScript."
    if not shutil.which("node"):
        pytest.skip("no node to run the playground's JavaScript")
    from relkd.losses import KD, RKDAngle, RKDDistance
    from relkd.relations import angles, differences, pdist, unit_differences

    torch.manual_seed(0)
    s, t = (torch.randn(20, 3, 2, dtype=torch.float64) * 2 for _ in range(2))
    z, v = (torch.randn(20, 3, dtype=torch.float64) * 4 for _ in range(2))
    T = torch.linspace(.5, 20, 20, dtype=torch.float64)
    script = (f"const p = require({json.dumps(str(SITE / 'static' / 'playground.js'))})\n"
              "const c = JSON.parse(require('fs').readFileSync(0))\n"
              "console.log(JSON.stringify(c.s.map((s, k) => ({\n"
              "  td: p.td(s), normTd: p.normTd(s), angles: p.angles(s), pdist: p.pdist(s), mean: p.meanDistance(s),\n"
              "  D: p.rkdDistance(s, c.t[k]), A: p.rkdAngle(s, c.t[k]), KD: p.kd(c.z[k], c.v[k], c.T[k]) }))))")
    cases = json.dumps({"s": s.tolist(), "t": t.tolist(), "z": z.tolist(), "v": v.tolist(), "T": T.tolist()})
    done = subprocess.run(["node", "-e", script], input=cases, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    worst = 0.
    for k, got in enumerate(json.loads(done.stdout)):
        e, logits = s[k].clone().requires_grad_(), z[k:k + 1].clone().requires_grad_()
        d = pdist(e)
        want = {"td": differences(e), "normTd": unit_differences(e), "angles": angles(e), "pdist": d, "mean": d.sum() / 6}
        losses = ("D", RKDDistance(), e, t[k]), ("A", RKDAngle(), e, t[k]), ("KD", KD(T=T[k].item()), logits, v[k:k + 1])
        for name, loss, at, teacher in losses:
            value = loss(at, teacher)
            want[f"{name} value"], want[f"{name} gradient"] = value, torch.autograd.grad(value, at)[0].view(-1)
            got[f"{name} value"] = got[name]["value"]
            got[f"{name} gradient"] = torch.tensor(got[name]["gradient"], dtype=torch.float64).view(-1)
        worst = max(worst, *((torch.as_tensor(got[name], dtype=torch.float64) - x.detach()).abs().max().item() for name, x in want.items()))
    assert worst < 1e-6, worst


def test_no_file_of_the_site_asks_another_host():
    for path in [*SITE.glob("static/*"), ROOT / ".github" / "workflows" / "pages.yml"]:
        hosts = set(re.findall(r"https?://([\w.-]+)", path.read_text(encoding="utf-8"))) - {"www.w3.org"}
        assert not hosts, f"{path.name}: {hosts}"
        assert path.stat().st_size < 100_000


# ----------------------------------------------------------------------------------------------- the built site, in a browser
class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *a):
        pass


@pytest.fixture(scope="module")
def site(request):
    "The folder of the site: $RELKD_SITE, or built now."
    if "slow" not in request.config.getoption("--flags"):
        pytest.skip("building the site and reading it in a browser takes minutes: --flags slow")
    if not browser.found():
        pytest.skip("no Chromium to read the site with")
    if given := os.environ.get("RELKD_SITE"):
        return Path(given)
    if not shutil.which("npm"):
        pytest.skip("no npm to take MathJax from")
    env = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(["sh", str(SITE / "build")], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "WARNING" not in done.stderr, done.stderr[-2000:]
    return ROOT / "_docs" / "site"


@pytest.fixture(scope="module")
def at(site):
    "The address of the site on a server of our own."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture
def page(site, tmp_path):
    page = browser.Browser(tmp_path / "profile")
    page.screen(1366, 800)
    yield page
    page.close()


slow_site = pytest.mark.xdist_group("site")


@slow_site
def test_links_within_the_site_resolve(site):
    from html.parser import HTMLParser

    class Read(HTMLParser):
        def __init__(self, text):
            super().__init__()
            self.ids, self.to = set(), []
            self.feed(text)

        def handle_starttag(self, tag, attributes):
            a = dict(attributes)
            self.ids.add(a.get("id"))
            self.to += [v for k in ("href", "src") if (v := a.get(k))]

    from urllib.parse import unquote, urlsplit
    pages = {p.resolve(): Read(p.read_text(encoding="utf-8")) for p in site.glob("**/*.html")}
    wrong = []
    for path, read in pages.items():
        assert path.stat().st_size < 3e6, path
        for link in read.to:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists() or (parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids):
                wrong.append(f"{path.relative_to(site.resolve())} -> {link}")
    assert len(pages) > 100 and not wrong, wrong[:20]


@slow_site
def test_every_page_opens_without_a_complaint_or_a_foreign_request(site, at, page):
    left = {}
    for path in sorted(site.glob("**/*.html")):
        name = path.relative_to(site).as_posix()
        page.said.clear()
        page.asked.clear()
        page.open(at + name)
        foreign = [u for u in page.asked if not u.startswith((at, "data:", "blob:"))]
        without = page.do("[...document.images].filter(i => !i.alt).length")
        if page.said or foreign or without:
            left[name] = page.said + foreign + [f"{without} pictures without words"] * bool(without)
    assert not left, json.dumps(left, indent=1)[:3000]


SEEN = "[...document.querySelectorAll('article .only-%s')].some(e => e.checkVisibility())"
SEARCH = """(() => { const i = document.querySelector('dialog.search input'); 
    if (!i.closest('dialog').open) document.querySelector('.find').click()
    i.value = '%s'; i.dispatchEvent(new Event('input')) })()"""
HITS = "[...document.querySelectorAll('.hits a')].map(a => a.getAttribute('href')).join(' ')"


@slow_site
def test_the_switch_hides_and_shows_and_is_remembered(at, page):
    for lang, other in (("zh", "en"), ("en", "zh")):
        page.open(f"{at}losses/00_rkd.html?lang={lang}")
        assert page.do(SEEN % lang) and not page.do(SEEN % other)
    page.do("document.querySelector('[data-to=both]').click()")
    assert page.do(SEEN % "zh") and page.do(SEEN % "en") and "lang=both" in page.do("location.search")
    page.do("document.querySelector('[data-to=zh]').click()")
    page.open(f"{at}losses/01_kd.html")
    assert page.do("document.documentElement.dataset.lang") == "zh" and not page.do(SEEN % "en")
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    page.open(f"{at}losses/01_kd.html")
    page.call("Emulation.setScriptExecutionDisabled", value=False)
    assert page.do(SEEN % "zh") and page.do(SEEN % "en")                                 # without JavaScript both show


@slow_site
def test_pictures_are_described_in_the_language_that_is_shown(site, at, page):
    alts = "[...document.querySelectorAll('article img')].map(i => i.alt)"
    for name in ("losses/00_rkd", "00_relations", "lab/00_docs", "tasks/03_triplet"):
        page.open(f"{at}{name}.html?lang=zh")
        chinese = page.do(alts)
        page.do("window.chooseLanguage('en')")
        english = page.do(alts)
        page.do("window.chooseLanguage('both')")
        assert page.do(alts) == [f"{en} · {zh}" for en, zh in zip(english, chinese)]
        assert chinese and all(re.search("[一-鿿]", zh) for zh in chinese) and not re.search("[一-鿿]", "".join(english))
        assert not re.search(r"\\|Read after", " ".join(english + chinese)), english + chinese
    assert "√2" in english[0] and "√2" in chinese[0]
    found = re.findall(r'data-alt-(en|zh)="([^"]*)"', "".join(p.read_text(encoding="utf-8") for p in site.glob("**/*.html")))
    assert len(found) > 200 and all(text for _, text in found)
    assert all((lang == "zh") == bool(re.search("[一-鿿]", text)) for lang, text in found)


@slow_site
def test_what_the_search_shows_is_readable(site):
    for lang, word in (("zh", "球面"), ("en", "sphere")):
        words = (site / "_static" / f"words-{lang}.js").read_text(encoding="utf-8")
        pages = json.loads(words.partition("=")[2])
        raw = [name for name, _, text in pages if re.search(r"\\[(\[]|\\(frac|mathrm|sqrt|lVert)\b", text) and not name.startswith("api/")]
        assert not raw, raw
        text = next(text for name, _, text in pages if name == "losses/00_rkd.html")
        assert "w_angle" in text and any(word in text for _, _, text in pages)                  # and it finds names in code


@slow_site
@pytest.mark.parametrize("where", ["server", "folder"])
def test_search_finds_words_of_both_languages(where, site, at, page):
    base = at if where == "server" else site.resolve().as_uri() + "/"
    page.open(f"{base}index.html?lang=zh")
    page.do(SEARCH % "关系知识蒸馏")
    page.until(f"{HITS}.includes('losses/00_rkd.html')")
    assert "lang=zh" in page.do(HITS)
    page.do("window.chooseLanguage('en')")
    page.do(SEARCH % "relational")
    page.until(f"{HITS}.includes('losses/00_rkd.html')")
    page.do(SEARCH % "CRD")
    page.until(f"{HITS}.includes('losses/12_crd.html')")
    if where == "folder":                                                                # pagefind finds words that are like it
        page.do(SEARCH % "zzqqxx")
        page.until("document.querySelector('.hits p')?.textContent === 'Nothing found.'")
    assert not page.said


@slow_site
@pytest.mark.parametrize("width, dark", [(1366, False), (390, True)])
def test_formulae_dragging_and_the_width(width, dark, at, page, tmp_path):
    page.screen(width, 800, dark)
    page.open(f"{at}losses/00_rkd.html?lang=en")
    page.until("document.querySelectorAll('mjx-container svg').length > 20 && !document.querySelector('mjx-merror')")
    assert page.do("document.documentElement.scrollWidth") <= width
    dark_page = page.do("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every(x => x < 80)")
    assert dark_page == dark
    page.do("document.querySelector('.play-points svg[data-who=student]').scrollIntoView({ behavior: 'instant', block: 'center' })")
    box = "document.querySelector('.play-points svg[data-who=student] [data-k=\"1\"] .dot').getBoundingClientRect().toJSON()"
    text = "document.querySelector('.play-points .value-d').textContent"
    was, r = page.do(text), page.do(box)
    start = r["x"] + r["width"] / 2, r["y"] + r["height"] / 2
    page.drag(start, (start[0] + 25, start[1] - 30))
    page.until(f"{text} !== '{was}'")
    was = page.do(text)
    page.do("document.querySelector('.play-points select').value = '1,0'; document.querySelector('.play-points .step').click()")
    assert float(page.do(text)) < float(was)
    page.open(f"{at}losses/01_kd.html?lang=zh")
    text = "document.querySelector('.play-temperature .value-kd').textContent"
    was = page.do(text)
    page.do("{ const i = document.querySelector('.play-temperature input.T'); i.value = 4\n"
            "i.dispatchEvent(new Event('input', { bubbles: true })) }")
    assert page.do(text) != was and not page.said


CONTRAST = """(() => {
    const linear = x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4
    const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => linear(x / 255))
        return .2126 * v[0] + .7152 * v[1] + .0722 * v[2] }
    const least = {}
    document.querySelectorAll('article .highlight pre span').forEach(e => {
        const box = getComputedStyle(e.closest('.highlight')).backgroundColor, [a, b] = [getComputedStyle(e).color, box].map(light)
        const r = (Math.max(a, b) + .05) / (Math.min(a, b) + .05)
        least[e.className] = Math.min(least[e.className] ?? 99, r)
    })
    return least })()"""


@slow_site
@pytest.mark.parametrize("dark", [False, True])
def test_code_reads_on_its_ground_and_the_keyboard_reaches_what_scrolls(dark, at, page):
    page.screen(390, 800, dark)
    page.open(f"{at}losses/00_rkd.html?lang=en")
    found = page.do(CONTRAST)
    assert len(found) > 10 and min(found.values()) >= 4.5, {k: v for k, v in found.items() if v < 4.5}     # WCAG 2, level AA
    page.until("[...document.querySelectorAll('article pre')].filter(e => e.scrollWidth > e.clientWidth + 1).every(e => e.tabIndex === 0)")
    assert page.do("document.querySelectorAll('article pre[tabindex]').length > 3")
    assert page.do("[...document.querySelectorAll('[role=heading]')].every(e => e.ariaLevel)")


@slow_site
def test_a_record_is_one_click_from_its_number(at, page):
    page.open(f"{at}records/digits.html?lang=en")
    link = page.do("document.querySelector('td a[href$=\".json\"]').href")
    number = page.do("document.querySelector('td a[href$=\".json\"]').textContent")
    page.open(link)
    record = json.loads(page.do("document.body.innerText"))
    assert f"{record['tests'][record['headline']]['accuracy'] if 'tests' in record else record['last']:.2f}" == number
