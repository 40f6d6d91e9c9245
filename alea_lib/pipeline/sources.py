"""What a stage is made by: the code of its notebook and the library files that it reaches by imports.

Code counts by its syntax: comments, docstrings and layout change nothing. Only imports count, also those inside
functions. A name taken from a room with a lazy face (``lazy_loader.attach``) leads to the module that defines it.
A module with a table ``MODULES`` (name of a method -> module beside it) imports the methods that the stage's strings
name. The engine is left out: it keeps the books and computes no result.
"""

import ast
import json
import os
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from .modules import ALL, Import, Module, imports_of, is_text, parse_module, sha256, split_name, syntax

PACKAGE = Path(__file__).resolve().parents[1]
ENGINE = ("runs", "pipeline")
# modules and rooms that draw and write texts; what only they reach belongs to the page, too
PAGE = ("figures", "verdicts", "firstpage", "phrases", "explorer", "widgets", "budget_page", "report")


class Sources(NamedTuple):
    """Hashes by file: of what makes the tables (the notebook's code among it), and of what only makes the page."""

    numbers: dict[str, str]
    page: dict[str, str]


# ---- notebooks


def code_cells(notebook: Path) -> list[dict]:
    """The code cells of a notebook, each with its source as one text."""
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
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
    return dict(_parameters(Path(notebook), *_state(notebook)))


@cache
def _parameters(notebook: Path, _written: int, _size: int) -> dict:
    found = {}
    for cell in code_cells(notebook):
        if "parameters" not in cell["metadata"].get("tags", []):
            continue
        for node in parse_cell(cell["source"]).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name):
                try:
                    found[target.id] = ast.literal_eval(node.value)
                except ValueError:
                    found[target.id] = ...
    return found


def source_hashes(notebook: Path, params: dict | None = None, variant: str = "") -> Sources:
    """Hashes of all that a stage with these parameters is made by (None: unknown, every method may be meant).

    Names are relative to the repository; text, metadata and outputs of the notebook do not count.
    """
    notebook, library = Path(notebook), _library()
    digest, imports, constants = _read_notebook(notebook, *_state(notebook))
    strings = None if params is None else {variant, *constants, *_strings(params)}
    numbers = library.hashes(library.reached(imports, strings, leave_out=PAGE))
    everything = library.hashes(library.reached(imports, strings))
    page = {name: value for name, value in everything.items() if name not in numbers}
    return Sources({f"notebooks/{notebook.name}": digest} | numbers, page)


@cache
def _read_notebook(path: Path, _written: int, _size: int) -> tuple[str, tuple[Import, ...], frozenset[str]]:
    """The hash of a notebook's code, what it imports, and the strings in it."""
    code = [(cell["source"], text) for cell in code_cells(path) if (text := cell_code(cell))]
    tree = ast.Module([node for source, _ in code for node in parse_cell(source).body], [])
    digest = sha256(json.dumps([text for _, text in code]).encode())
    return digest, imports_of(tree, "", PACKAGE.name), frozenset(n.value for n in ast.walk(tree) if is_text(n))


def sources_id(numbers: dict[str, str]) -> str:
    """One hash for what made a run's tables; '' where it is unknown."""
    return sha256(json.dumps(numbers, sort_keys=True).encode()) if numbers else ""


def modules_id(*modules: str) -> str:
    """One hash of modules of the library (dotted, without its name) and of what they reach."""
    library = _library()
    return sources_id(library.hashes(library.reached(Import(*split_name(module)) for module in modules)))


def _strings(value) -> Iterable[str]:
    """All strings in nested lists and mappings, names of mappings included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _strings(part)


# ---- library files


def _state(path: Path) -> tuple[int, int]:
    """What tells whether a file stands as it was read."""
    state = path.stat()
    return state.st_mtime_ns, state.st_size


@cache
def _read_module(path: Path, package: Path, _written: int, _size: int) -> Module:
    return parse_module(path.relative_to(package.parent).as_posix(), path.read_text(encoding="utf-8"))


@cache
def _content(path: Path, _written: int, _size: int) -> str:
    return sha256(path.read_bytes())


def _library() -> "Library":
    """The package as it stands now."""
    paths = [Path(folder, file) for folder, _, files in os.walk(PACKAGE) for file in files if file.endswith(".py")]
    return _library_of(PACKAGE, tuple((path, *_state(path)) for path in sorted(paths)))


@lru_cache(maxsize=2)
def _library_of(package: Path, files: tuple[tuple[Path, int, int], ...]) -> "Library":
    return Library(package, files)


class Library:
    """The modules of a package by dotted name ('' is the package itself). ``files``: path, time and size of each."""

    def __init__(self, package: Path, files: tuple[tuple[Path, int, int], ...]):
        self.package = package
        self.paths, self.modules = {}, {}
        for path, *state in files:
            own = path.parent if path.name == "__init__.py" else path.with_suffix("")
            name = ".".join(own.relative_to(package).parts)
            self.paths[name], self.modules[name] = path, _read_module(path, package, *state)
        self.data = {name: self._data_files(name) for name in self.modules}
        self._behind = cache(self._resolve)

    def hashes(self, files: set[str | Path]) -> dict[str, str]:
        """By name relative to the repository: of modules (by dotted name) the syntax, of data files the content."""
        top, found = self.package.parent, {}
        for file in files:
            if isinstance(file, Path):
                found[file.relative_to(top).as_posix()] = _content(file, *_state(file))
            else:
                found[self.modules[file].name] = self.modules[file].digest
        return dict(sorted(found.items()))

    def reached(
        self, imports: Iterable[Import], strings: set[str] | None = None, leave_out: tuple[str, ...] = ()
    ) -> set[str | Path]:
        """Modules, and data files that they name, behind imports. ``strings``: those that may name a method (None: all
        methods count); ``leave_out``: modules and rooms that do not count, as the engine never does."""
        files, seen, left, out = set(), set(), list(imports), {*ENGINE, *leave_out}
        while left:
            taken = left.pop()
            if taken in seen:
                continue
            seen.add(taken)
            names, more = self._behind(taken)
            left += more
            for name in names:
                if name.split(".")[0] not in out and name not in files:
                    files.add(name)
                    files.update(self.data[name])
                    left += self._imported_by(name, strings)
        return files

    def _face(self, name: str) -> dict[str, str] | None:
        return self.modules[name].face if name in self.modules else None

    def _resolve(self, taken: Import) -> tuple[list[str], list[Import]]:
        """The modules that an import runs (packages above included, faces not), and what it takes from faces."""
        base, name, uses = taken
        face = self._face(base)
        if face is not None and name == ALL:
            return [], [Import(*split_name(f"{base}.{module}".lstrip("."))) for module in sorted(set(face.values()))]
        target = f"{base}.{(face or {}).get(name, name)}".lstrip(".")
        parts = target.split(".")
        above = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        names = [module for module in above if module in self.modules and self._face(module) is None]
        return names, [Import(target, use) for use in uses] if self._face(target) is not None else []

    def _imported_by(self, name: str, strings: set[str] | None) -> list[Import]:
        found, path = self.modules[name], self.paths[name]
        here = name if path.name == "__init__.py" else split_name(name)[0]
        if found.methods is not None:
            wanted = [module for key, module in found.methods.items() if strings is None or key in strings]
        elif found.by_name:  # picked by name while running: any of its neighbours may be meant
            wanted = [split_name(other)[1] for other, at in self.paths.items() if at.parent == path.parent]
        else:
            wanted = []
        return [*found.imports, *(Import(here, module) for module in wanted)]

    def _data_files(self, name: str) -> list[Path]:
        """Data files that a module names: beside it, in the package, or in data/ of the repository."""
        top, found = self.package.parent, []
        for data in self.modules[name].data:
            folders = (self.paths[name].parent, self.package, top, top / "data")
            found += [folder / data for folder in folders if (folder / data).is_file()][:1]
        return found
