"""Which language a block of prose is in, told by its script, and where a block in both is to be cut.

Works on the elements of xml.etree and of lxml alike: the site calls it on its pages, tests/test_site.py on the notebooks."""
import re
from copy import copy

HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
MARK = re.compile(r"[。；：，、（）]")                                           # between pieces of code it tells, too
LABEL = re.compile(r"[^：]{0,24}：")
WORD = re.compile(r"[A-Za-z][A-Za-z'’]+")
CUT = re.compile(r"(?<=\S)( (?:·|—) |\u00a0· )(?=\S)|^( (?:·|—) )|( (?:·|—) )$")
SILENT = {"code", "pre", "script", "style", "svg", "img"}                    # says nothing about the language
BREAKS = {"cell", "toctree-wrapper"}
QUIET = {"math", "cut-within", "cell", "highlight", "play-points", "play-temperature"}
BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "td", "th", "li", "summary", "figcaption", "caption", "dt", "dd"}
HOLDERS = {"ul", "ol", "dl", "p", "div", "table", "blockquote", "pre", "details", "section"}


def is_silent(e):
    return not isinstance(e.tag, str) or e.tag in SILENT or not QUIET.isdisjoint((e.get("class") or "").split())


def said(e):
    "The words of an element, without its code and formulae."
    if is_silent(e):
        return " "
    return (e.text or "") + "".join(said(c) + (c.tail or "") for c in e)


def language(text):
    "'zh', 'en' or '' for what has no words: a name, a number, a sign."
    han, words = len(HAN.findall(text)), len(WORD.findall(text))
    if (han and (LABEL.match(text) or han * 2 >= words)) or (not han and MARK.search(text)):
        return "zh"
    return "en" if words else ""


def atoms(e):
    "What stands in an element, in order: strings and elements without their tails."
    found = [e.text] if e.text else []
    for child in e:
        bare = copy(child)
        bare.tail = None
        found += [bare] + ([child.tail] if child.tail else [])
    return found


def words(part):
    return "".join(a if isinstance(a, str) else said(a) for a in part)


def pieces(e):
    "The atoms of an element, cut at ' · ' and ' — ': a list of (cut before it, atoms)."
    found = [("", [])]
    for atom in atoms(e):
        if not isinstance(atom, str):
            found[-1][1].append(atom)
            continue
        at = 0
        for m in CUT.finditer(atom):
            found[-1][1].append(atom[at:m.start()])
            found.append((m.group(), []))
            at = m.end()
        found[-1][1].append(atom[at:])
    return [(cut, [a for a in part if not isinstance(a, str) or a]) for cut, part in found]


def at_text(part, pattern, last=False):
    "Cut atoms behind a match in one of their own strings: (before, after), or None."
    order = range(len(part))
    for k in reversed(order) if last else order:
        if isinstance(part[k], str):
            if found := list(re.finditer(pattern, part[k])):
                end = found[-1 if last else 0].end()
                return part[:k] + [part[k][:end]], [part[k][end:], *part[k + 1:]]
    return None


def shared(part, follows, english):
    """A Chinese piece as [(language, atoms)]: what stands behind its label (论文：) or behind its last stop and is in no
    language belongs to both, if the English pieces have not said it themselves; and if a further Chinese piece follows, what
    stands behind the last stop is its English half."""
    cut = at_text(part, "：")
    own = {*things(cut[1])} if cut else set()
    if cut and not re.search(f"{HAN.pattern}|[。、]", words(cut[1])) and len(words(cut[0])) < 16 and not (own and own <= english):
        label, rest = cut
        if follows and (cut := at_text(rest, r"[.;,] (?=\w|$)|；", last=True)):
            return [("zh", label), ("", cut[0]), ("en", cut[1])]
        return [("zh", label), ("", rest)]
    if (cut := at_text(part, r"[。；！？）](?=[^\u3400-\u9fff]*$)", last=True)) and not HAN.search(words(cut[1])):
        if follows and len(WORD.findall(words(cut[1]))) > 1:              # …。 The next sentence · 下一句
            return [("zh", cut[0]), ("en", cut[1])]
        if any(not isinstance(a, str) and a.tag == "a" for a in cut[1]):
            return [("zh", cut[0]), ("", cut[1])]
    return [("zh", part)]


def halves(e):
    "An element as [(language or '', cut before it, atoms)], neighbours of one language joined; one entry if it is not cut."
    cut = pieces(e)
    spoken = [language(words(part)) for _, part in cut]
    if not {"en", "zh"} <= set(spoken):
        text = said(e)
        return [(language(text) if HAN.search(text) or WORD.search(text) else "", "", atoms(e))]
    found, english = [], {x for (_, part), lang in zip(cut, spoken) if lang == "en" for x in things(part)}
    for k, (before, part) in enumerate(cut):
        follows = k + 1 < len(cut) and spoken[k + 1] == "zh"
        split = shared(part, follows, english) if spoken[k] == "zh" else [(spoken[k], part)]
        for n, (lang, some) in enumerate(split):
            sign = before if n == 0 else ""
            glue = found and (lang == found[-1][0] or (not lang and n == 0)) and n == 0
            if glue:
                found[-1][2].extend(([sign] if sign else []) + some)
            elif some:
                found.append((lang, sign, list(some)))
    return kept(label_first(found))


def things(part):
    "The links, pieces of code and formulae in atoms: (tag, what it says or where it leads)."
    within = [x for a in part if not isinstance(a, str) for x in a.iter() if isinstance(x.tag, str)]
    within = [x for x in within if x.tag in ("a", "code") or "math" in (x.get("class") or "").split()]
    return [(x.tag, x.get("href") or "".join(x.itertext())) for x in within]


def label_first(found):
    """What begins with code, formulae or links has in them a label or an answer, of which both languages speak, if the other half
    has none of them: `td`: the difference · 每一对点的差; [KD](x): one line · 一行; `x = f(y)`：一行。 · One line."""
    lang, sign, first = found[0]
    end = next((k for k, a in enumerate(first) if (WORD.search(a) or HAN.search(a) if isinstance(a, str) else a.tag != "a" and
                (WORD.search(said(a)) or HAN.search(said(a)) or not things([a])))), len(first))
    elsewhere = things([a for _, _, some in found[1:] for a in some])
    for n in range(min(end, len(first) - 1), 0, -1):
        own, behind = things(first[:n]), first[n] if isinstance(first[n], str) else ""
        label = re.match(r"[:,;] ", behind)
        answer = sum(len(text) for tag, text in own if tag == "code") >= 12
        if isinstance(first[n - 1], str) or {*own} & {*elsewhere} or (elsewhere and not answer and not behind.startswith(": ")):
            continue
        rest = [behind[2:], *first[n + 1:]] if label else first[n:]
        return [("", sign, first[:n] + ([label.group()] if label else [])), (lang, "", rest), *found[1:]]
    return found


def carried(part):
    "Where the links in atoms lead, and how many pieces of code and formulae there are."
    within = [x for a in part if not isinstance(a, str) for x in a.iter() if isinstance(x.tag, str)]
    return {x.get("href") for x in within if x.tag == "a"}, sum(x.tag == "code" or "math" in (x.get("class") or "").split() for x in within)


def kept(found):
    "No reader loses a link, nor code beside which the other language says next to nothing (·  The same line.): such a half is for both."
    has = {lang: [a for other, _, some in found if other == lang for a in some] for lang in ("en", "zh")}
    (english, en), (chinese, zh) = carried(has["en"]), carried(has["zh"])
    links, codes = {"en": english - chinese, "zh": chinese - english}, {"en": en, "zh": zh}
    short = {"en": len(WORD.findall(words(has["en"]))) <= 4, "zh": len(HAN.findall(words(has["zh"]))) <= 12}
    for lang, other in (("en", "zh"), ("zh", "en")):
        if links[lang] or (codes[lang] and not codes[other] and short[other]):
            found = [("" if spoken == lang else spoken, cut, some) for spoken, cut, some in found]
    return found


def fill(e, parts):
    "Put atoms back into an element that has none."
    for atom in parts:
        if not isinstance(atom, str):
            e.append(atom)
        elif len(e):
            e[-1].tail = (e[-1].tail or "") + atom
        else:
            e.text = (e.text or "") + atom
    return e


def mark(e, lang):
    e.set("class", f"{e.get('class') or ''} only-{lang}".strip())
    e.set("lang", {"zh": "zh-CN"}.get(lang, lang))


def split(e, make):
    "Cut an element into spans of one language; says which languages it holds now: 'en', 'zh', 'both' or ''."
    within = False
    for child in e:
        if child.tag in ("a", "em", "strong", "span") and not is_silent(child) and split(child, make) == "both":
            child.set("class", f"{child.get('class') or ''} cut-within".strip())
            within = True
    parts = halves(e)
    if len(parts) == 1:
        return parts[0][0] or ("both" if within else "")              # a link in both languages does not make its paragraph so
    tail, attributes = e.tail, dict(e.attrib)
    e.clear()
    e.tail = tail
    for k, v in attributes.items():
        e.set(k, v)
    before = None
    for lang, cut, some in parts:
        if cut and lang and before:
            e.append(fill(make("span", {"class": "cut"}), [cut]))
        elif cut and lang:
            some = [cut, *some]                                                  # what stands before it is for both
        elif cut and before:
            fill(e[-1], [cut])
        elif cut:
            fill(e, [cut])
        before, first = lang, before is not None
        if lang:
            span = fill(make("span", {}), some)
            mark(span, lang)
            if first and lang == "zh" and "".join(a for a in some if isinstance(a, str)).rstrip().endswith("："):
                e.append(fill(make("span", {"class": "colon"}), [": "]))       # 论文：, whose English half has none
            e.append(span)
        else:
            fill(e, some)
    return "both"


def joined(kinds):
    kinds = set(kinds) - {""}
    return "both" if len(kinds) > 1 else kinds.pop() if kinds else ""


def is_break(e):
    "A cell, a heading, a section or a list of pages: paragraphs on its two sides are no neighbours."
    return e.tag in ("h1", "h2", "h3", "h4", "h5", "h6", "section", "hr") or not BREAKS.isdisjoint((e.get("class") or "").split())


def kind_of(e):
    "A list answers to a list and words to words; a table is of names and numbers, and answers to nothing."
    if e.tag == "table" or next(e.iter("table"), None) is not None:
        return "table"
    return "list" if e.tag in ("ul", "ol", "dl") else "words"


def pair(run, lonely):
    "Mark the blocks of one language that have a neighbour in the other; the others are shown in both."
    run = [(e, lang, kind_of(e)) for e, lang in run]
    for e, lang, kind in run:
        if lang not in ("en", "zh"):
            continue
        if kind == "table":
            if any(language(said(c)) == lang and len(WORD.findall(said(c))) > 7 for c in e.iter("td")):
                lonely.append((e, lang))
        elif {"en", "zh"} <= {other for _, other, same in run if same == kind}:
            mark(e, lang)
        else:
            lonely.append((e, lang))


def visit(e, make, lonely):
    """Cut and mark everything below an element. `lonely` collects (block, language) of blocks without a neighbour in
    the other language. Returns the languages of what is in it."""
    if is_silent(e):
        return ""                                                                # what programs say has no language
    has_blocks = any(isinstance(c.tag, str) and c.tag in HOLDERS for c in e)
    if e.tag in BLOCKS and not has_blocks:
        return split(e, make)
    run, kinds = [], []
    if e.tag == "li" or e.tag in ("td", "dd"):                       # its own words, then a list or paragraphs
        inline = make("span", {})
        inline.text, e.text = e.text, None
        for child in list(e):
            if isinstance(child.tag, str) and child.tag in HOLDERS:
                break
            e.remove(child)
            inline.append(child)
        if said(inline).strip():
            e.insert(0, inline)
            run.append((inline, split(inline, make)))
            kinds.append(run[-1][1])
        else:
            fill_back = atoms(inline)
            for k, child in enumerate(a for a in fill_back if not isinstance(a, str)):
                e.insert(k, child)
    table = e.tag in ("table", "thead", "tbody", "tr")
    for child in list(e):
        if not isinstance(child.tag, str) or (run and child is run[0][0] and child.tag == "span"):
            continue
        if is_break(child):
            pair(run, lonely)
            run = []
        lang = visit(child, make, lonely)
        kinds.append(lang)
        if table or child.tag in ("a", "span", "em", "strong"):
            continue
        if re.match(r"h\d$", child.tag):
            if lang == "en":
                lonely.append((child, lang))
        elif not is_break(child):
            run.append((child, lang))
    lang = joined(kinds)
    if e.tag in ("ul", "ol", "blockquote", "details", "div", "table", "li", "dd", "td") and lang in ("en", "zh"):
        return lang                                                      # its parent looks for its neighbour
    pair(run, lonely)
    return lang
