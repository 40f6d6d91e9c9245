"""Runs one mutant in a process of its own. Imports nothing of the library: the copy is what is tested."""

import os
import shutil
import sys
from pathlib import Path

from mutant_source import plant

HERE = Path(__file__).resolve().parent
# imported once, by the server that the workers are forked from
HEAVY = [
    "torch", "pandas", "pytest", "hypothesis", "inflect", "safetensors.torch", "peft",
    "transformers.generation.utils",
    "transformers.models.llava.modeling_llava", "transformers.models.llava.processing_llava",
    "transformers.models.clip.modeling_clip", "transformers.models.llama.modeling_llama",
    "transformers.models.clip.image_processing_pil_clip", "transformers.integrations.sdpa_attention",
]  # fmt: skip


def run(folder: str, repository: str, tests: list[str], change: tuple[str, str, str] | None = None) -> tuple[int, str]:
    """Copy library and tests to ``folder``, plant the change (where, find, replace), run the tests.

    Returns the exit code and what was printed.
    """
    place = Path(folder)
    leave_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(HERE.parent / "alea_lib", place / "alea_lib", ignore=leave_out)
    shutil.copytree(HERE, place / "tests", ignore=leave_out)
    shutil.copyfile(HERE.parent / "pyproject.toml", place / "pyproject.toml")
    if change:
        plant(place / "alea_lib", *change)
    return _pytest(place, repository, tests)


def _pytest(place: Path, repository: str, tests: list[str]) -> tuple[int, str]:
    import pytest

    assert not [m for m in sys.modules if m.split(".")[0] == "alea_lib"], "the library was imported before the copy"
    os.chdir(place)
    os.environ["ALEA_ROOT"] = repository
    sys.path[:] = [str(place), *(p for p in sys.path if p and Path(p).resolve() not in (HERE, HERE.parent))]
    log = place / "log.txt"
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", f"--rootdir={place}"]
        code = pytest.main([*options, *(f"tests/{t}" for t in tests)])
        sys.stdout.flush()
    library = sys.modules.get("alea_lib")
    assert library and Path(library.__file__).is_relative_to(place), "another library than the copy was tested"
    return int(code), log.read_text()
