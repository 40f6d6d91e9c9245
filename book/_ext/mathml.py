"""Formulas as MathML, made while the book is built: no script, no fonts to fetch, read aloud by screen readers.

Formulas between dollars in the cells of tables that notebooks print are shown, too. A formula that cannot be converted
in full is a warning, and so fails the build.
"""

import html
import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

log = logging.getLogger(__name__)
CELL, DOLLARS = re.compile(r"(?<=<td)([^>]*>)([^<]*\$[^<]*)(?=</td>)"), re.compile(r"\$([^$]+)\$")
LEFT_OVER = re.compile(r"<m[a-z]+[^>]*>(\\[a-zA-Z]+|&)</m")  # what the converter did not know


def mathml(node: nodes.Node, display: str) -> str:
    """One formula; where the conversion fails, its TeX text."""
    text = node.astext().strip()
    try:
        found = convert(text, display=display)
    except Exception as error:  # each of its errors has a type of its own
        log.warning("cannot convert the formula %s (%s)", text, type(error).__name__, location=node)
        return f"<code>{nodes.Text(text).astext()}</code>"
    unknown = LEFT_OVER.search(found)
    if unknown:
        log.warning("the formula %s holds %s, which MathML text cannot show", text, unknown.group(1), location=node)
    return found


def in_tables(app, doctree: nodes.document, docname: str) -> None:
    """Show the formulas in cells of printed tables."""
    for node in doctree.findall(nodes.raw):
        if "html" in node["format"] and "<td" in node.astext():

            def shown(cell: re.Match, node: nodes.raw = node) -> str:
                def one(match: re.Match) -> str:
                    formula = nodes.math("", html.unescape(match.group(1)))
                    formula.source, formula.line = node.source, node.line
                    return mathml(formula, "inline")

                return cell.group(1) + DOLLARS.sub(one, cell.group(2))

            node.children = [nodes.Text(CELL.sub(shown, node.astext()))]


def visit_inline(self, node: nodes.math) -> None:
    self.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def visit_block(self, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math"))
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append(mathml(node, "block") + "</div>\n")
    raise nodes.SkipNode


def setup(app) -> dict:
    app.connect("doctree-resolved", in_tables)
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
