"""What the makers of pages share: the settings, and words as Markdown."""
import configparser
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = configparser.ConfigParser(delimiters=["="])
CONFIG.read(ROOT / "settings.ini", encoding="utf-8")
SET = CONFIG["DEFAULT"]
REPO = f"https://github.com/{SET['user']}/{SET['repo']}"
TAG = f"v{SET['version']}"


def slug(name):
    return name.replace("/", "-")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def plain(text):
    "Words of a comment as Markdown that says the same; code between backticks stays."
    parts = re.split(r"(`[^`]*`|\$[^$]+\$)", " ".join(text.split()))
    return "".join(p.replace("|", "\\|") if p[:1] in ("`", "$") else re.sub(r"([\\*_<$\[|#~])", r"\\\1", p) for p in parts)


def toctree(pages, caption="", shown=False):
    options = [":hidden:"] * (not shown) + ([f":caption: {caption}"] if caption else []) + [":maxdepth: 1"]
    return "\n".join(["```{toctree}", *options, "", *pages, "```"]) + "\n"
