"""The reference: every public name with what stands beside its parameters, one page a room of the package."""
import importlib
import inspect
import re

from common import ROOT, plain, toctree, write


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
            default = default if len(default) < 60 else "…"
            lines.append(f"| `{name}` | {plain(kind(p.annotation))} | {default} | {plain(comments.get(name, ''))} |")
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
            text += [f"**{plain(name)}.{method}**", called(f".{method}", code), plain(inspect.cleandoc(code.__doc__ or "")) + "\n"]
            text.append(parameters(code))
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
    write(source / "api" / "index.md", "# Reference · 参考\n\nEvery public name with the shape and meaning of its parameters, its errors "
          "and its source, as they stand in the code; each module leads to the lesson that derives it.\n\n每个公开的名字：参数的形状与含义、会抛出的错误、"
          "出处，都来自代码本身；每个模块都链接到推导它的那一课。\n\n" + toctree(order, shown=True))
