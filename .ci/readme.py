"""README.md from nbs/index.ipynb: `python .ci/readme.py` writes it, `--check` says whether it is in step."""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parents[1]


def readme() -> str:
    "The index notebook as Markdown, its links made relative to the top of the repository."
    nb = nbformat.read(root / "nbs" / "index.ipynb", as_version=4)
    nb.metadata["language_info"] = {"name": "python"}                        # for the code fences
    nb.cells = [c for c in nb.cells if not re.match(r"#\|\s*hide", c.source)]
    body, _ = MarkdownExporter().from_notebook_node(nb)
    body = re.sub(r"\]\(\.\./", "](", body)                                   # ../figures/x.png -> figures/x.png
    body = re.sub(r'src="\.\./', 'src="', body)
    body = re.sub(r"\]\((?!https?:|#|figures/)([\w/]+\.ipynb)", r"](nbs/\1", body)
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


if __name__ == "__main__":
    path, new = root / "README.md", readme()
    if "--check" in sys.argv:
        if not path.exists() or path.read_text(encoding="utf-8") != new:
            sys.exit("README.md is not what nbs/index.ipynb gives: run `make readme`")
    else:
        path.write_text(new, encoding="utf-8")
