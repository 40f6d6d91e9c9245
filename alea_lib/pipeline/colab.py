"""Notebooks in Colab: the cell that fetches the repository there, and what is then made ready. Imports no torch.

`python -m alea_lib.pipeline colab` writes the same cell into every notebook; outside Colab it does nothing. Nothing of
Colab's own is replaced: torch, numpy and the widgets stay as they are.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from ..core import paths
from ..core.paths import RunError
from . import profiles
from .checks import Gpu, gpu, version

CELL = """\
import os
import subprocess
import sys

if "google.colab" in sys.modules:  # fetch the repository and what Colab lacks; elsewhere this cell does nothing
    url = os.environ.get("ALEA_REPO_URL", "{url}")
    ref = os.environ.get("ALEA_REF", "{ref}")
    home = os.environ.setdefault("ALEA_ROOT", os.path.abspath("{name}"))
    if not os.path.isdir(os.path.join(home, "alea_lib")):
        command = ["git", "clone", "-q", "--depth", "1", "-b", ref, url, home]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, f"{{ref}} of {{url}} was not fetched: {{done.stderr}}"
    sys.path.insert(0, home)
    from alea_lib.pipeline import prepare_colab
    prepare_colab()"""

SMALL = "scenes"


def cell() -> str:
    """The cell's source, with the address and branch that _config.yml names."""
    repository = paths.read_yaml((paths.root() / "_config.yml").read_text(encoding="utf-8"))["repository"]
    url = repository["url"].rstrip("/")
    return CELL.format(url=url, ref=repository["branch"], name=url.rsplit("/", 1)[1])


def write_cells(notebooks: list[Path]) -> list[Path]:
    """Put the cell before the first code cell of each notebook, or renew it there; returns what changed."""
    changed = []
    for path in notebooks:
        text = path.read_text(encoding="utf-8")
        book = json.loads(text)
        cells = [c for c in book["cells"] if not c["id"].endswith("-colab")]
        first = next(i for i, c in enumerate(cells) if c["cell_type"] == "code")
        new = {"cell_type": "code", "execution_count": None, "id": f"{path.stem.replace('_', '-')}-colab",
            "metadata": {"tags": ["remove-cell"]}, "outputs": [],
            "source": cell().splitlines(keepends=True)}  # fmt: skip
        book["cells"] = [*cells[:first], new, *cells[first:]]
        now = json.dumps(book, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        if now != text:
            path.write_text(now, encoding="utf-8")
            changed.append(path)
    return changed


def prepare_colab() -> None:
    """Install what Colab lacks, let commands after a ! find the library, and say which profile the machine can run.

    RunError with pip's last lines if something cannot be installed.
    """
    folders = [str(paths.root()), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(folders))
    _install(paths.root())
    print(advice(gpu()))


def pins(text: str) -> list[str]:
    """Constraints that keep what is installed of a requirements file, and torch's companions, as it is."""
    names = [match.group() for line in text.splitlines() if (match := re.match(r"[A-Za-z0-9][\w.-]*", line))]
    names += ["torchvision", "torchaudio", "ipython", "huggingface-hub"]
    return [f"{name}=={installed}" for name in names if (installed := version(name))]


def _install(root: Path) -> None:
    """Let pip add what is missing; what is there it leaves alone, without asking the network."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "constraints.txt"
        kept.write_text("\n".join(pins((root / "requirements.txt").read_text(encoding="utf-8"))) + "\n")
        wanted = ["-r", str(root / "requirements-colab.txt"), "-c", str(kept), "--disable-pip-version-check"]
        done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True)
    if done.returncode:
        lines = "\n  ".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise RunError(f"pip could not install what requirements-colab.txt lists:\n  {lines}")
    importlib.invalidate_caches()


def advice(card: Gpu | None) -> str:
    """The largest profile that fits, in a line."""
    if card is None:
        return f'no GPU: set PROFILE = "{SMALL}" (the small world), or choose a GPU under Runtime > Change runtime type'
    names = [path.stem for path in (paths.root() / "data" / "profiles").glob("*.yaml")]
    asked = {name: needs.gpu_gib for name in names if (needs := profiles.read_profile(name).needs) and needs.gpu_gib}
    fits = [name for name, gib in sorted(asked.items(), key=lambda item: item[1]) if card.gib >= gib]
    also = f'"{fits[-1]}" fits; ' if fits else "no profile of a large model fits; "
    return f'{card.name} with {card.gib:.0f} GiB: {also}"{SMALL}" (the small world) runs everywhere'
