"""What the book's own code and pages promise: the first page's sentences, what pages tell readers to run."""

import importlib
import inspect
import io
import re
import runpy
import sys
import types

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import toy
import yaml

from alea_lib.pipeline.api_pages import face, links, rooms
from alea_lib.pipeline.api_pages import page as room_page
from alea_lib.pipeline.book import toc_files
from alea_lib.report import figures
from alea_lib.report.comparison import attacked, core
from alea_lib.report.figures.places import spread
from alea_lib.report.findings import summary

BOOK = toy.HERE / "book"


def metrics(corrected=(0.02, 0.01, 0.03), hit=(0.1, 0.05, 0.15)) -> pd.DataFrame:
    """Rows that the first page reads; intervals of the control are fixed."""
    lower = tuple(v - 0.45 for v in corrected)
    rows = [
        ("base", "chair_s", "clean", (0.45, 0.42, 0.48)),
        ("no-prefix", "chair_s", "clean", (0.05, 0.04, 0.06)),
        ("no-prefix", "chair_s_diff", "clean", (-0.40, -0.41, -0.39)),
        ("alea-corrected", "chair_s", "clean", corrected),
        ("alea-corrected", "chair_s_diff", "clean", lower),
        ("alea-corrected", "recall_diff", "clean", (0.001, -0.007, 0.009)),
        ("beam", "chair_s", "clean", (0.4, 0.3, 0.5)),
    ]
    rows += [(m, "chair_s", "attacked", v) for m, v in (("base", (0.8, 0.7, 0.9)), ("no-prefix", (0.5, 0.4, 0.6)))]
    rows += [("alea-corrected", "chair_s", "attacked", hit)]
    keys = {"model": "m", "benchmark": "chair", "prompt": "plain", "setting": "max64,keep", "n": 1000}
    return pd.DataFrame(
        [
            {**keys, "method": m, "metric": k, "condition": c, "value": v, "lo": lo, "hi": hi}
            for m, k, c, (v, lo, hi) in rows
        ]
    )


def test_three_sentences_say_what_the_table_says():
    one, two, three = summary(metrics()).strip().split("\n\n")
    assert "Of 1000 test images" in one and "45.0% (42.0% to 48.0%)" in one and "2.0% (1.0% to 3.0%)" in one
    assert "+0.1 points (-0.7 to +0.9)" in one
    assert "5.0% (4.0% to 6.0%)" in two and two.endswith("the adversary is shown to help.")
    assert "50.0% (40.0% to 60.0%)" in three and "10.0% (5.0% to 15.0%)" in three
    assert three.endswith("the adversary is shown to help.")


@pytest.mark.parametrize(
    ("corrected", "said"),
    [((0.05, 0.035, 0.07), "makes no significant difference"), ((0.2, 0.1, 0.3), "makes it worse")],
)
def test_the_sentences_do_not_say_more_than_the_intervals(corrected, said):
    _, two, three = summary(metrics(corrected, hit=corrected)).strip().split("\n\n")
    assert two.endswith(f"the adversary {said}.")
    assert three.endswith("the adversary is shown to help.")  # 0.4 is above all of these


def test_the_figure_of_the_first_page_has_both_sides():
    line = pd.DataFrame(
        {"recall": [0.2, 0.9], "chair_s": [0.1, 0.45], "chair_s_lo": [0.1, 0.4], "chair_s_hi": [0.2, 0.5]}
    )
    points = pd.DataFrame(
        {"method": ["base"], **{f"{m}{s}": [0.5] for m in ("chair_s", "recall") for s in ("", "_lo", "_hi")}}
    )
    assert len(figures.finding(line, points, attacked(metrics())).axes) == 2
    plt.close("all")


def test_the_first_page_shows_its_own_methods_in_order():
    table = pd.DataFrame({"method": ["beam", "alea-corrected", "base", "no-prefix"]})
    assert core(table)["method"].tolist() == ["base", "no-prefix", "alea-corrected"]


# ---- figures


def test_whatever_colour_tells_apart_marks_tell_apart():
    looks = list(figures.METHODS.values())
    assert len({marker for _, marker in looks}) == len(looks) == len({colour for colour, _ in looks})
    table = pd.DataFrame([(g, "x", 0.5, 0.4, 0.6) for g in "abcdefgh"], columns=["g", "label", "value", "lo", "hi"])
    figure = figures.intervals(table, group="g")
    marks = {line.get_marker() for line in figure.axes[0].lines if line.get_marker() in "osD^PvX*<>"}
    assert len(marks) == 8
    curve = pd.DataFrame({"step": [0, 1] * 2, "nll": [1.0, 2, 3, 4], "kind": ["a", "a", "b", "b"]})
    lines = figures.curves(curve, "step", {"nll": "NLL"}, "", hue="kind").axes[0].lines
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == 2
    plt.close("all")


def test_a_figure_says_how_many():
    table = pd.DataFrame({"label": ["a", "b"], "value": 0.5, "lo": 0.4, "hi": 0.6, "n": [300.0, 1000.0]})
    assert figures.intervals(table, xlabel="share").axes[0].get_xlabel() == "share (n = 300 to 1000)"
    assert figures.intervals(table.head(1), xlabel="share").axes[0].get_xlabel() == "share (n = 300)"
    assert figures.intervals(table.drop(columns="n"), xlabel="share").axes[0].get_xlabel() == "share"
    plt.close("all")


def test_a_figure_of_many_rows_stays_on_a_page():
    table = pd.DataFrame([(g, f"row {i}", 0.5, 0.4, 0.6) for g in "abc" for i in range(26)],
                         columns=["g", "label", "value", "lo", "hi"])  # fmt: skip
    assert figures.intervals(table, group="g").get_size_inches()[1] < 13
    plt.close("all")


def test_a_map_without_a_number_says_so():
    none = pd.DataFrame({"layer": [], "head": [], "effect": []}, dtype=object)
    empty = none.pivot(index="layer", columns="head", values="effect").to_numpy()  # no caption names an object
    looks = figures.head_maps({"share": np.eye(2), "effect": empty, "mute": np.full((2, 2), np.nan)}, "").axes[:3]
    assert [axis.texts[0].get_text() for axis in looks] == ["1.00", "not defined here", "not defined here"]
    plt.close("all")


def test_labels_are_spread_and_keep_their_order():
    heights = np.array([0.5, 0.1, 0.5, 0.52])
    placed = spread(heights, 0.05)
    assert np.diff(np.sort(placed)).min() >= 0.05 - 1e-12
    assert (np.argsort(placed, kind="stable") == np.argsort(heights, kind="stable")).all()
    assert abs(placed.mean() - heights.mean()) < 1e-12
    np.testing.assert_allclose(spread(np.array([0.1, 0.9]), 0.05), [0.1, 0.9])


# ---- pages that tell readers what to run


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (BOOK / page).read_text(encoding="utf-8"), re.S)


def test_the_locator_of_the_page_works_as_written():
    from locate import test_known_answers as known

    from alea_lib.locate import layers
    from alea_lib.locate.registry import LAYER_LOCATORS

    function, test = blocks("add_locator.md", "python")
    try:
        exec(f"from __future__ import annotations\n{function}", vars(layers))  # as at the top of the file
        assert LAYER_LOCATORS["mean-abs"].symmetry == "even"
        space = dict(vars(known))
        exec(test, space)
        space["test_mean_abs_by_hand"]()
    finally:
        LAYER_LOCATORS.pop("mean-abs", None)
        vars(layers).pop("mean_abs", None)


@pytest.mark.parametrize("place", [0, 2], ids=["decoding", "edit"])
def test_the_methods_of_the_page_work_as_written(place, monkeypatch, request):
    from alea_lib.baselines import registry

    registry.baseline_names()
    monkeypatch.setattr(registry, "ROWS", dict(registry.ROWS))
    method, test = blocks("add_method.md", "python")[place : place + 2]
    module = types.ModuleType("alea_lib.baselines.of_the_page")
    module.__package__ = "alea_lib.baselines"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(method, vars(module))
    space: dict = {}
    exec(test, space)
    (name,) = (n for n in space if n.startswith("test_"))
    wanted = inspect.signature(space[name]).parameters
    space[name](**{fixture: request.getfixturevalue(fixture) for fixture in wanted})


@pytest.mark.slow
def test_the_script_for_a_model_of_ones_own(tiny_world, capsys):
    script = runpy.run_path(str(BOOK / "own_model.py"))
    table = script["main"](
        ["--model", "scenes-natural", "--world", str(tiny_world.folder), "--images", "6", "--steps", "2"]
    )
    assert set(table["method"]) == {"no-prefix", "alea-mixed"}
    assert set(table["metric"]) == {"chair_s", "recall", "words", "frontier_gap"}
    assert (table["lo"] <= table["value"]).all() and (table["value"] <= table["hi"]).all()
    told = capsys.readouterr().out
    assert all(step in told for step in ("activate", "locate: layers", "adversary", "captions: alea-mixed"))


def test_commands_on_pages_name_targets_and_files_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (toy.HERE / "Makefile").read_text(encoding="utf-8"), re.M))
    for page in sorted(BOOK.glob("*.md")):
        for block in blocks(page.name, "bash"):
            assert set(re.findall(r"^make ([a-z-]+)", block, re.M)) <= targets, page.name
            for notebook in re.findall(r"NB=(\w+)", block):
                assert (toy.HERE / "notebooks" / f"{notebook}.ipynb").exists(), f"{page.name}: {notebook}"
            for script in re.findall(r"(?:python|pytest) ((?:book|tests)/[\w/.]+)", block):
                given = f"`{script}`:\n" in page.read_text(encoding="utf-8")  # the page has one write it
                assert given or (toy.HERE / script).exists(), f"{page.name}: {script}"


PAGES = [*(toy.HERE / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(BOOK.glob("*.md"))]


def prose(page) -> str:
    """The text of a page; of a table of renamed things only what they are called now."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^\| `[^|]*\|", "|", text, flags=re.M) if page.name == "CHANGELOG.md" else text


def there(name: str) -> bool:
    """Whether a dotted name of the library is a module, or something in one."""
    module, *rest = name.split(".")
    found = importlib.import_module(module)
    for part in rest:
        try:
            found = getattr(found, part, None) or importlib.import_module(f"{found.__name__}.{part}")
        except (ImportError, AttributeError):
            return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_of_the_repository_exists(page):
    text = prose(page)
    given = set(re.findall(r"`([\w/.]+)`[^.\n]*:\n", text))  # files that the page has one write
    paths = set(re.findall(r"(?<![\w/.])(?:alea_lib|tests)/[\w/.-]*\w", text)) - given
    assert not {path for path in paths if not (toy.HERE / path).exists()}
    names = set(re.findall(r"`(alea_lib(?:\.\w+)+)", text)) | set(re.findall(r"-m (alea_lib[\w.]*)", text))
    for module, imported in re.findall(r"^from (alea_lib[\w.]*) import ([\w, ]+)$", text, re.M):
        names |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    assert not {name for name in names if not there(name)}
    for name, path in re.findall(r"`([\w.]+)`(?: of `\w+`)?,? in `(alea_lib/[\w/]+\.py)`", text):
        defined = (toy.HERE / path).read_text(encoding="utf-8")
        assert re.search(rf"\b{name.split('.')[-1]}\b", defined), f"{name} in {path}"


# ---- pages of the library


def test_every_room_has_a_page_and_every_name_its_place():
    listed = toc_files(yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8")))
    assert [name for name in listed if name.startswith("generated/")] == [f"generated/api-{room}" for room in rooms()]
    assert {p.parent.name for p in (toy.HERE / "alea_lib").glob("*/__init__.py")} == set(rooms())
    for room in rooms():
        init = toy.HERE / "alea_lib" / room / "__init__.py"
        public = set(importlib.import_module(f"alea_lib.{room}").__all__)
        assert public - {"figures"} <= set(face(init)), room
        for name, module in face(init).items():
            assert hasattr(importlib.import_module(f"alea_lib.{room}.{module}"), name), f"{room}.{module}.{name}"
        assert room_page(room, init).startswith(f"# `alea_lib.{room}`")


def documented(room: str):
    """What the page of a room shows: name and docstring of its modules, public names and their methods."""
    for name, module in face(toy.HERE / "alea_lib" / room / "__init__.py").items():
        home = importlib.import_module(f"alea_lib.{room}.{module}")
        found = getattr(home, name)
        yield module, home.__doc__
        if isinstance(found, type):
            own = {k: inspect.unwrap(getattr(found, k)) for k in vars(found) if not k.startswith("_")}
            yield from ((f"{module}.{name}.{k}", v.__doc__) for k, v in own.items() if inspect.isroutine(v))
        if isinstance(found, type) or inspect.isroutine(found):
            yield f"{module}.{name}", found.__doc__


@pytest.mark.parametrize("room", rooms())
def test_docstrings_of_public_names_are_restructured_text(room):
    """Sphinx would say so only after the whole study."""
    from docutils import nodes
    from docutils.core import publish_doctree
    from docutils.parsers.rst import roles

    for role in ("attr", "class", "data", "func", "meth", "mod"):
        roles.register_generic_role(role, nodes.literal)
    for name, text in dict(documented(room)).items():
        said = io.StringIO()
        publish_doctree(inspect.cleandoc(text or ""), settings_overrides={"warning_stream": said})
        assert not said.getvalue(), f"{room}.{name}: {said.getvalue()}"
        for target in re.findall(r":\w+:`~?(alea_lib[\w.]+)`", text or ""):
            assert there(target), f"{room}.{name} refers to {target}"


def test_faces_of_both_kinds_are_read(tmp_path):
    init = tmp_path / "__init__.py"
    init.write_text('attach(__name__, submodules=["deep"], submod_attrs={"a": ["f", "g"]})\n')
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "__init__.py").write_text("from ..x import y\nfrom .b import h\n")
    assert face(init) == {"f": "a", "g": "a", "h": "deep.b"}


def test_a_page_links_the_rooms_that_its_notebook_uses():
    code = ["from alea_lib.pipeline import begin\nfrom alea_lib.core import root", "    from alea_lib.core import root"]
    assert links(code) == (
        "**The library behind this page**: {doc}`core <../generated/api-core>`, "
        "{doc}`pipeline <../generated/api-pipeline>`."
    )
    assert links(["import pandas"]) == ""


# ---- formulas


def test_formulas_in_printed_tables_are_shown():
    from docutils import nodes
    from docutils.utils import new_document

    extension = runpy.run_path(str(BOOK / "_ext" / "mathml.py"))
    document = new_document("page")
    table = "<td>$|d|$, $k &lt; 2$ of $5</td><td>plain</td><p>$not$ a cell</p>"
    document += nodes.raw("", table, format="html")
    document += nodes.raw("", "<td>$x$</td>", format="latex")
    extension["in_tables"](None, document, "page")
    shown, other = (node.astext() for node in document.findall(nodes.raw))
    assert shown.count("<math") == 2 and "$|d|$" not in shown and "&#x0003C;" in shown
    assert shown.endswith(" of $5</td><td>plain</td><p>$not$ a cell</p>")
    assert other == "<td>$x$</td>"
