"""The project's notebooks, for tests and for what stands in .ci; without torch.

Drafts are yours: nbdev's `_name.ipynb`, Jupyter's `Untitled.ipynb`, and whatever lies in a folder such as `.ipynb_checkpoints`."""
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"


def is_draft(path, nbs=NBS):
    return any(part.startswith(("_", ".", "Untitled")) for part in Path(path).relative_to(nbs).parts)


def project_notebooks(pattern="**/*.ipynb", nbs=NBS):
    "Paths of all notebooks but drafts, sorted."
    return sorted(p for p in nbs.glob(pattern) if not is_draft(p, nbs))
