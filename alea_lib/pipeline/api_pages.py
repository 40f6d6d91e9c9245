"""The API reference of the book: one page a room, with the docstrings of its public names."""

import ast
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[1]


def rooms() -> list[str]:
    """The rooms of the library, each after those that it may import from: the layers that import-linter checks."""
    settings = tomllib.loads((LIBRARY.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    return next(c["layers"] for c in settings["contracts"] if c["type"] == "layers")[::-1]


def write_api_pages(folder: Path) -> None:
    """Write ``api-<room>.md`` for every room, which Sphinx fills in when the book is built, and ``api-rooms.md``, their
    list."""
    lines = ["| room | what it holds |", "|---|---|"]
    for room in rooms():
        init = LIBRARY / room / "__init__.py"
        (folder / f"api-{room}.md").write_text(page(room, init), encoding="utf-8")
        lines.append(f"| {{doc}}`{room} <generated/api-{room}>` | {describe(init).splitlines()[0]} |")
    (folder / "api-rooms.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def page(room: str, init: Path) -> str:
    """One room as Markdown: its docstring, then its public names, module by module."""
    modules: dict[str, list[str]] = {}
    for name, module in face(init).items():
        modules.setdefault(module, []).append(name)
    lines = [f"# `alea_lib.{room}`", "", "```{eval-rst}", describe(init), "```", ""]
    for module, names in sorted(modules.items()):
        lines += [f"## `{module}`", "", "```{eval-rst}", f".. automodule:: alea_lib.{room}.{module}"]
        lines += [f"   :members: {', '.join(sorted(names))}", "```", ""]
    return "\n".join(lines)


def describe(init: Path) -> str:
    return ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""


def face(init: Path) -> dict[str, str]:
    """Public name of a package -> the module below it that defines it; a package inside has its own names."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(init.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            found |= {alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.keyword) and node.arg == "submod_attrs":
            found |= {name: module for module, names in ast.literal_eval(node.value).items() for name in names}
        elif isinstance(node, ast.keyword) and node.arg == "submodules":
            for inner in ast.literal_eval(node.value):
                names = face(init.parent / inner / "__init__.py")
                found |= {name: f"{inner}.{module}" for name, module in names.items()}
    return found


def links(sources: Iterable[str]) -> str:
    """A line of links to the pages of the rooms from which these pieces of code import; empty without any."""
    named = {room for text in sources for room in re.findall(r"^\s*from alea_lib\.(\w+)", text, re.M)}
    found = [f"{{doc}}`{room} <../generated/api-{room}>`" for room in rooms() if room in named]
    return f"**The library behind this page**: {', '.join(found)}." if found else ""
