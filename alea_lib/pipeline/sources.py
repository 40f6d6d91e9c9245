"""What a stage is made by: the code of its notebook and the library files that it reaches by imports.

Code counts by its syntax: comments, docstrings and layout change nothing. Only imports count, also those inside
functions. A name taken from a room's face (its ``__init__.py``) leads to the module that defines it.
A module with a table ``MODULES`` (name of a method -> module beside it) imports the methods that the stage's strings
name. The engine is left out: it keeps the books and computes no result.
"""

import ast
import json
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from ..core import files
from .modules import ALL, Import, Module, as_import, imports_of, parse_module, sha256, syntax, texts

PACKAGE = Path(__file__).resolve().parents[1]
ENGINE = ("pipeline",)
PAGE = ("report",)  # draws and writes texts; what only it reaches belongs to the page, too


class Sources(NamedTuple):
    """Hashes by file: of what makes the tables (the notebook's code among it), and of what only makes the page."""

    numbers: dict[str, str]
    page: dict[str, str]


# ---- notebooks


def code_cells(text: str) -> list[dict]:
    """The code cells of a notebook, each with its source as one text."""
    cells = json.loads(text)["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == "code"]


def parse_cell(source: str) -> ast.Module:
    """The syntax tree of a cell; lines with IPython magics stand as strings."""
    try:
        return ast.parse(source)
    except SyntaxError:
        lines = source.splitlines()
        magic = [line.lstrip().startswith(("%", "!", "?")) for line in lines]
        indents = [line[: len(line) - len(line.lstrip())] for line in lines]
        kept = [f"{i}{line.strip()!r}" if m else line for i, line, m in zip(indents, lines, magic, strict=True)]
        return ast.parse("\n".join(kept))


def cell_code(cell: dict) -> str:
    """The syntax of a cell that computes; '' for text, papermill's parameters, and the cell that prepares Colab."""
    injected = "injected-parameters" in cell["metadata"].get("tags", [])
    if cell["cell_type"] != "code" or injected or cell.get("id", "").endswith("-colab"):
        return ""
    return "\n".join(syntax(statement) for statement in parse_cell("".join(cell["source"])).body)


def parameters(notebook: Path) -> dict:
    """Names and values assigned in the cell tagged `parameters`; a value that is no literal shows as ..."""
    return dict(_parameters(Path(notebook).read_text(encoding="utf-8")))


@cache
def _parameters(text: str) -> dict:
    found = {}
    for cell in code_cells(text):
        if "parameters" not in cell["metadata"].get("tags", []):
            continue
        for node in parse_cell(cell["source"]).body:
            if not isinstance(node, ast.Assign | ast.AnnAssign):
                continue
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name):
                try:
                    found[target.id] = ast.literal_eval(node.value or ast.Constant(None))
                except ValueError:
                    found[target.id] = ...
    return found


def source_hashes(notebook: Path, params: dict | None = None, variant: str = "") -> Sources:
    """Hashes of all that a stage with these parameters is made by (None: unknown, every method may be meant).

    Names are relative to the repository; text, metadata and outputs of the notebook do not count.
    """
    digest, imports, constants = _read_notebook(Path(notebook).read_text(encoding="utf-8"))
    strings = None if params is None else {variant, *constants, *_strings(params)}
    library = _library()
    numbers = _reached(library, imports, strings, leave_out=PAGE)
    everything = _reached(library, imports, strings)
    page = {name: value for name, value in everything.items() if name not in numbers}
    return Sources({f"notebooks/{Path(notebook).name}": digest} | numbers, page)


@cache
def _read_notebook(text: str) -> tuple[str, tuple[Import, ...], frozenset[str]]:
    """The hash of a notebook's code, what it imports, and the strings in it."""
    code = [(cell["source"], made) for cell in code_cells(text) if (made := cell_code(cell))]
    nodes = [node for source, _ in code for node in ast.walk(parse_cell(source))]
    digest = sha256(json.dumps([made for _, made in code]))
    return digest, imports_of(nodes, "", PACKAGE.name), texts(nodes)


def sources_id(numbers: dict[str, str]) -> str:
    """One hash for what made a run's tables; '' where it is unknown."""
    return files.hash_of(numbers) if numbers else ""


def modules_id(*modules: str) -> str:
    """One hash of modules of the library (dotted, without its name) and of what they reach."""
    return sources_id(_reached(_library(), map(as_import, modules)))


def _strings(value) -> Iterable[str]:
    """All strings in nested lists and mappings, names of mappings included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _strings(part)


# ---- library files


def _library() -> dict[str, Module]:
    """The modules of the package as it stands now, by dotted name ('' is the package itself)."""
    return _parsed(PACKAGE, tuple((path, path.stat().st_mtime_ns) for path in PACKAGE.rglob("*.py")))


@lru_cache(maxsize=1)
def _parsed(package: Path, files: tuple[tuple[Path, int], ...]) -> dict[str, Module]:
    found = {}
    for path, _ in files:
        file = path.relative_to(package.parent).as_posix()
        dotted = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        found[dotted.partition(".")[2]] = parse_module(file, path.read_text(encoding="utf-8"))
    return found


def _reached(
    library: dict[str, Module], imports: Iterable[Import], strings: set[str] | None = None, leave_out=()
) -> dict[str, str]:
    """Hashes, by file, of the modules behind imports (syntax) and of the data files that they name (content).

    ``strings``: those that may name a method (None: all methods count); ``leave_out``: rooms that do not count, as the
    engine never does.
    """
    found, visited, left = {}, set(), list(imports)
    while left:
        for name in _resolve(library, left.pop()):
            if name in visited or name.split(".")[0] in (*ENGINE, *leave_out):
                continue
            visited.add(name)
            module = library[name]
            found |= {module.file: module.digest, **_data_files(module)}
            methods = {file for method, file in module.methods.items() if strings is None or method in strings}
            left += [*module.imports, *(Import(name.rpartition(".")[0], file) for file in methods)]
    return dict(sorted(found.items()))


def _resolve(library: dict[str, Module], taken: Import) -> list[str]:
    """The modules that an import leads to: through a face to the one that defines the name, or to all behind it."""
    face = library[taken.base].face if taken.base in library else None
    if face is not None and taken.name == ALL:
        return [name for module in sorted(set(face.values())) for name in _resolve(library, as_import(module))]
    if face and taken.name in face:
        target = face[taken.name]
    else:
        target = f"{taken.base}.{taken.name}".lstrip(".")
    if target in library and library[target].face is not None:
        return _resolve(library, Import(target, ALL))
    parts = target.split(".")
    above = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    return [name for name in above if name in library and library[name].face is None]


def _data_files(module: Module) -> dict[str, str]:
    """Data files that a module names, beside it or in data/ of the repository."""
    top = PACKAGE.parent
    paths = [folder / name for name in module.data for folder in ((top / module.file).parent, top / "data")]
    return {path.relative_to(top).as_posix(): files.sha256(path) for path in paths if path.is_file()}
