"""Plants one fault in a copy of the library: finds a node of a function's syntax tree and puts another in its place.

What is looked for is compared as a tree, not as text: white space, quotes, line breaks and other lines do not matter.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path


class MutantError(ValueError):
    """An entry of ``mutants.yaml`` names no place in the library, or more than one."""


@dataclass(frozen=True)
class Pattern:
    """``kind``: expr, stmt, keyword (of a call) or item (of a dict); ``text``: its normalised source."""

    kind: str
    text: str


def plant(package: Path, where: str, find: str, replace: str) -> None:
    """Put ``replace`` for ``find`` in the function ``where`` of the package in this folder, and write its file."""
    path, source = mutated(package, where, find, replace)
    path.write_text(source, encoding="utf-8")


def mutated(package: Path, where: str, find: str, replace: str) -> tuple[Path, str]:
    """The file that holds ``where``, and its source with the fault. MutantError unless ``find`` occurs exactly once.

    ``where``: module.function or module.Class.method, the module relative to the package, or tests.gpu.module.
    """
    path, name = resolve(package, where)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wanted, new = parse_pair(find, replace)
    change = _Replace(wanted, new)
    change.visit(_functions(tree)[name])
    if change.count != 1:
        raise MutantError(f"{where} has {change.count} of `{find}`, expected one")
    return path, ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def resolve(package: Path, where: str) -> tuple[Path, str]:
    """The file, and function or Class.method in it. A module that is not there is looked for by the name alone."""
    parts = where.split(".")
    if parts[0] == "tests":  # the GPU check, beside the package
        package, parts = package.parent / "tests", parts[1:]
    for n in range(len(parts) - 1, 0, -1):
        stem, name = package.joinpath(*parts[:n]), ".".join(parts[n:])
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file() and name in _functions(ast.parse(path.read_text(encoding="utf-8"))):
                return path, name
    for name in (".".join(parts[-2:]), parts[-1]):
        found = [
            path
            for path in sorted(package.rglob("*.py"))
            if name in _functions(ast.parse(path.read_text(encoding="utf-8")))
        ]
        if len(found) > 1:
            raise MutantError(f"{where} is in {', '.join(str(p.relative_to(package)) for p in found)}: name its module")
        if found:
            return found[0], name
    raise MutantError(f"{package.name} has no {where}")


def _functions(tree: ast.Module) -> dict[str, ast.AST]:
    """Functions of a module and methods of its classes by name."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found: dict[str, ast.AST] = {node.name: node for node in tree.body if isinstance(node, kinds)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{method.name}": method for method in node.body if isinstance(method, kinds)}
    return found


def parse_pair(find: str, replace: str) -> tuple[Pattern, ast.AST]:
    """What to look for and what to put there: two nodes of the same kind, the most particular kind that both are."""
    for kind, parse in (("expr", _expression), ("item", _item), ("keyword", _keyword), ("stmt", _statement)):
        try:
            old, new = parse(find), parse(replace)
        except (SyntaxError, MutantError):
            continue
        return Pattern(kind, ast.unparse(old)), new
    raise MutantError(f"`{find}` and `{replace}` are not both one expression, statement, dict item or keyword")


def _expression(text: str) -> ast.AST:
    return ast.parse(text, mode="eval").body


def _item(text: str) -> ast.AST:
    node = ast.parse(f"{{{text}}}", mode="eval").body
    if not isinstance(node, ast.Dict) or len(node.keys) != 1:
        raise MutantError(f"`{text}` is not one item of a dict")
    return node


def _keyword(text: str) -> ast.AST:
    """`name=value` without spaces; an assignment has spaces around its sign."""
    node = ast.parse(f"f({text})", mode="eval").body
    if not isinstance(node, ast.Call) or node.args or len(node.keywords) != 1 or " = " in text:
        raise MutantError(f"`{text}` is not one keyword argument")
    return node.keywords[0]


def _statement(text: str) -> ast.AST:
    body = ast.parse(text).body
    if len(body) != 1:
        raise MutantError(f"`{text}` is not one statement")
    return body[0]


class _Replace(ast.NodeTransformer):
    """Replaces every node that equals the pattern and counts them."""

    def __init__(self, wanted: Pattern, new: ast.AST):
        self.wanted, self.new, self.count = wanted, new, 0

    def visit(self, node: ast.AST) -> ast.AST:
        kind = next((k for k in ("expr", "stmt", "keyword") if isinstance(node, getattr(ast, k))), "")
        if kind == self.wanted.kind and ast.unparse(node) == self.wanted.text:
            self.count += 1
            return self.new
        if self.wanted.kind == "item" and isinstance(node, ast.Dict):
            self._items(node)
        return self.generic_visit(node)

    def _items(self, node: ast.Dict) -> None:
        for i, (key, value) in enumerate(zip(node.keys, node.values)):
            if ast.unparse(ast.Dict([key], [value])) == self.wanted.text:
                self.count += 1
                node.keys[i], node.values[i] = self.new.keys[0], self.new.values[0]
