"""Which library files a notebook depends on, read from its source: a change in one of them runs it again.

Only imports count: `from alea_lib import name` leads through the lazy table `_EXPORTS` of the package to the
module that defines the name, and on through that module's own imports, also those inside functions.
The engine (alea_lib.runs) is left out: it keeps the books and computes no result.
"""

import ast
import hashlib
import json
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def code_cells(notebook: Path) -> list[dict]:
    """The code cells of a notebook, each with its source as one text."""
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == "code"]


def parse_cell(source: str) -> ast.Module:
    """The syntax tree of a cell; lines with IPython magics are left out."""
    lines = ["" if line.lstrip().startswith(("%", "!", "?")) else line for line in source.splitlines()]
    return ast.parse("\n".join(lines))


def parameters(notebook: Path) -> dict:
    """Names and values assigned in the cell tagged `parameters`; a value that is no literal shows as ..."""
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


def dependencies(notebook: Path, package: Path | None = None) -> list[Path]:
    """Library files (and the data files beside them that they name) behind a notebook, sorted."""
    library = Library(package or PACKAGE)
    for cell in code_cells(notebook):
        library.follow(parse_cell(cell["source"]), here="")
    return sorted(library.files)


def source_hashes(notebook: Path) -> dict[str, str]:
    """Content hashes of all that a notebook's results and figures are made by: its code cells, its library files.

    Names are relative to the repository; markdown, metadata and outputs of the notebook do not count.
    """
    cells = json.dumps([cell["source"] for cell in code_cells(notebook)])
    found = {f"notebooks/{Path(notebook).name}": hashlib.sha256(cells.encode()).hexdigest()}
    for path in dependencies(notebook):
        name = path.relative_to(PACKAGE.parent).as_posix()
        found[name] = _content(path, path.stat().st_mtime_ns)
    return found


@cache
def _content(path: Path, _written: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sources_id(sources: dict[str, str]) -> str:
    """One hash for what made a run's tables: all sources but those that only draw; '' where none are known."""
    counted = {name: value for name, value in sources.items() if not name.startswith(f"{PACKAGE.name}/figures/")}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest() if sources else ""


class Library:
    """The files of a package reached so far."""

    def __init__(self, package: Path):
        self.package = package
        self.files: set[Path] = set()
        self.exports = self._exports()

    def _exports(self) -> dict[str, str]:
        """The lazy table of the package: a name, and the module that defines it."""
        path = self.package / "__init__.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else ():
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            if isinstance(node, ast.Assign | ast.AnnAssign) and getattr(targets[0], "id", "") == "_EXPORTS":
                return {name: self._relative(module) for name, module in ast.literal_eval(node.value).items()}
        return {}

    def _relative(self, module: str) -> str:
        return module.removeprefix(f"{self.package.name}.").lstrip(".")

    def follow(self, tree: ast.AST, here: str) -> None:
        """Add what a piece of code imports; `here` is the dotted package (below the top) that it lies in."""
        top = self.package.name
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name == top:
                        self._add_names("", ["*"])
                    elif alias.name.startswith(f"{top}."):
                        self._add_module(self._relative(alias.name))
            elif isinstance(node, ast.ImportFrom):
                base = self._base(node, here)
                if base is not None:
                    self._add_names(base, [alias.name for alias in node.names])

    def _base(self, node: ast.ImportFrom, here: str) -> str | None:
        """The module that names come from, dotted and relative to the package; None: not of this package."""
        module = node.module or ""
        if node.level:
            parts = here.split(".") if here else []
            return ".".join([*parts[: len(parts) - node.level + 1], *([module] if module else [])])
        if module == self.package.name or module.startswith(f"{self.package.name}."):
            return self._relative(module) if "." in module else ""
        return None

    def _add_names(self, base: str, names: list[str]) -> None:
        """Names taken from a module: exports of the top, submodules, or things the module itself defines."""
        if base == "" and "*" in names:
            names = sorted(self.exports)
        if base:
            self._add_module(base)
        for name in names:
            if base == "" and name in self.exports:
                self._add_module(self.exports[name])
            else:
                self._add_module(f"{base}.{name}".lstrip("."))

    def _add_module(self, module: str) -> None:
        """A module, the packages above it, and what they import; a name that is no module adds nothing."""
        parts = module.split(".")
        if parts[0] == "runs":
            return
        for depth in range(1, len(parts) + 1):
            stem = self.package.joinpath(*parts[:depth])
            self._add_file(stem / "__init__.py", ".".join(parts[:depth]))
            self._add_file(stem.with_name(stem.name + ".py"), ".".join(parts[: depth - 1]))

    def _add_file(self, path: Path, here: str) -> None:
        if path in self.files or not path.exists():
            return
        self.files.add(path)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        self.follow(tree, here)
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and node.value.endswith((".yaml", ".json"))
            ):
                self._add_data(node.value, path)
            elif (
                isinstance(node, ast.Call)
                and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
            ):
                # picked by name while running: any of its neighbours may be meant
                for other in path.parent.glob("*.py"):
                    self._add_file(other, here)

    def _add_data(self, name: str, path: Path) -> None:
        """A data file that a module names: beside it, in the package, or in data/ of the repository."""
        for folder in (path.parent, self.package, self.package.parent, self.package.parent / "data"):
            if (folder / name).is_file():
                self.files.add(folder / name)
                return
