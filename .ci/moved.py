"""The folder has another name now: what stands in an environment with the old one gets the new. moved.py OLD NEW VENV"""
import sys
from pathlib import Path

old, new, venv = sys.argv[1:]
texts = [p for p in Path(venv, "bin").iterdir() if p.is_file() and not p.is_symlink()]
for pattern in ("*.pth", "*editable*", "*/direct_url.json"):
    texts += Path(venv).glob(f"lib/python*/site-packages/{pattern}")
for path in texts:
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        continue
    if old in text:
        path.write_text(text.replace(old + "/", new + "/").replace(old + "\n", new + "\n"), encoding="utf-8")
