"""The guard of the book: each rule against a page that breaks it, and one page that breaks none."""

import json

import pandas as pd
import pytest
import toy

from alea_lib.core.paths import RunError
from alea_lib.pipeline import book, guard
from alea_lib.pipeline.sources import Sources, source_hashes, sources_id

FIGURE = {
    "mystnb": {"figure": {"name": "fig-x", "caption": "What it shows."}, "image": {"alt": "A line that rises."}},
}


def source() -> dict:
    """A source notebook with a figure cell."""
    made = toy.notebook("A = 1", "import os\nprint(A)", "draw()")
    made["cells"][3]["metadata"] |= json.loads(json.dumps(FIGURE))
    made["metadata"].pop("papermill", None)
    return made


def executed(made: dict) -> dict:
    """Its executed copy, as papermill leaves it, with parameters from outside."""
    copy = json.loads(json.dumps(made))
    given = {**json.loads(json.dumps(copy["cells"][1])), "id": "given", "source": "A = 2"}
    given["metadata"] = {"tags": ["injected-parameters", "remove-cell"]}
    copy["cells"].insert(2, given)
    for count, cell in enumerate(cell for cell in copy["cells"] if cell["cell_type"] == "code"):
        cell["execution_count"] = count + 1
        cell["metadata"]["papermill"] = {"status": "completed"}
    copy["cells"][4]["outputs"] = [{"output_type": "display_data", "metadata": {}, "data": {"image/svg+xml": "<svg/>"}}]
    copy["metadata"]["papermill"] = {"end_time": "2026", "exception": None}
    return copy


@pytest.fixture
def faults(tmp_path):
    """Faults of a page, after `spoil` has changed it, its source or its record."""

    def find(spoil=lambda page, made, record: None):
        made = source()
        today = Sources({"notebooks/01_x.ipynb": "a", "alea_lib/x.py": "b"}, {"alea_lib/report/figures.py": "c"})
        page, record = executed(made), {"sources": today.numbers, "page_sources": today.page}
        spoil(page, made, record)
        for name, content in (("page", page), ("01_x", made)):
            (tmp_path / f"{name}.ipynb").write_text(json.dumps(content))
        return guard.page_faults(tmp_path / "page.ipynb", tmp_path / "01_x.ipynb", record, today)

    return find


def test_a_good_page_has_no_fault(faults):
    assert faults() == []


def test_a_traceback_is_a_fault(faults):
    def spoil(page, made, record):
        page["cells"][3]["outputs"] = [{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}]

    assert faults(spoil) == ["notebooks/01_x.ipynb failed: cell 3 holds an error"]


def test_a_cell_that_was_not_executed_is_a_fault(faults):
    def spoil(page, made, record):
        page["cells"][3]["execution_count"] = None

    assert faults(spoil) == ["notebooks/01_x.ipynb is incomplete: cell 3 was not executed"]


@pytest.mark.parametrize("what", ["name", "caption", "alt"])
def test_a_mute_figure_is_a_fault(faults, what):
    def spoil(page, made, record):
        made["cells"][3]["metadata"]["mystnb"]["image" if what == "alt" else "figure"][what] = " "

    (fault,) = faults(spoil)
    assert f"figure without {what} in cell 3" in fault


def test_a_page_whose_source_has_changed_is_stale(faults):
    def spoil(page, made, record):
        made["cells"][2]["source"] += "\nprint(2)"

    assert faults(spoil) == ["notebooks/01_x.ipynb is stale: its source has changed since it was executed"]


def reworded(made: dict) -> dict:
    """Other words, captions and comments around the same code, and cells that compute nothing."""
    made = json.loads(json.dumps(made))
    made["cells"][0]["source"] = "# Another claim"
    made["cells"][2]["source"] = "import os  # a comment\n\nprint( A )"
    made["cells"][3]["metadata"]["mystnb"]["figure"]["caption"] = "What it does not show."
    colab = {"cell_type": "code", "id": "x-colab", "metadata": {"tags": ["remove-cell"]}, "source": "1", "outputs": []}
    made["cells"].insert(1, {**colab, "execution_count": None})
    made["cells"].append({"cell_type": "markdown", "id": "m", "metadata": {}, "source": "More."})
    return made


def test_a_page_has_the_words_of_today_and_the_outputs_of_its_run(faults):
    made = source()
    page, now = executed(made), reworded(made)
    shown = guard.as_page(page, now)
    assert [cell["source"] for cell in shown["cells"]] == [cell["source"] for cell in now["cells"]]
    assert shown["cells"][4]["outputs"] == page["cells"][4]["outputs"] and page["cells"][4]["outputs"]
    assert shown["cells"][4]["metadata"] == now["cells"][4]["metadata"]
    assert shown["cells"][3]["execution_count"] == page["cells"][3]["execution_count"]

    def spoil(page, made, record):
        made["cells"] = reworded(made)["cells"]

    assert faults(spoil) == []


@pytest.mark.parametrize(
    ("sources", "reason"),
    [
        ({"notebooks/01_x.ipynb": "a", "alea_lib/x.py": "old"}, "alea_lib/x.py has changed"),
        ({"notebooks/01_x.ipynb": "a"}, "alea_lib/x.py has changed"),
        ({"notebooks/01_x.ipynb": "a", "alea_lib/x.py": "b", "alea_lib/y.py": "c"}, "alea_lib/y.py has changed"),
        (None, "its record does not say which code made it"),
    ],
)
def test_a_page_whose_library_has_changed_is_stale(faults, sources, reason):
    def spoil(page, made, record):
        record.pop("sources")
        record.update({"sources": sources} if sources else {})

    assert faults(spoil) == [f"notebooks/01_x.ipynb is stale: {reason}"]


def test_a_page_that_is_drawn_by_other_code_is_stale(faults):
    def spoil(page, made, record):
        record["page_sources"] = {"alea_lib/report/figures.py": "old"}

    assert faults(spoil) == ["notebooks/01_x.ipynb is stale: alea_lib/report/figures.py has changed"]


# ---- built pages

GOOD = """<html><head><link rel="stylesheet" href="_static/a.css"><link rel="canonical" href="https://x.org/"></head>
<body><script src="_static/a.js"></script><a href="https://x.org">x</a><img src="a/b.png" alt="A line that rises.">
<img src="logo.png" class="logo__image" alt=""></body></html>"""


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ("", None),
        ('<script src="https://cdn.org/m.js"></script>', "loads https://cdn.org/m.js from the network"),
        ('<link rel="stylesheet" href="//cdn.org/f.css">', "loads //cdn.org/f.css from the network"),
        ('<img src="http://x.org/a.png" alt="A">', "loads http://x.org/a.png from the network"),
        ('<img src="a/c.png">', "shows c.png without a text"),
        ('<img src="a/c.png" alt="a/c.png">', "shows c.png without a text"),
        ('<div class="output traceback">Error</div>', "shows a traceback"),
    ],
)
def test_built_pages(tmp_path, more, fault):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "page.html").write_text(GOOD + more)
    found = list(guard.built(tmp_path))
    assert len(found) == bool(fault)
    assert not fault or found[0].startswith("sub/page.html ") and fault in found[0]


# ---- what made a run, and published tables


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setenv("ALEA_ROOT", str(toy.small_repository(tmp_path)))
    return tmp_path


def test_the_hash_of_sources_follows_code_and_not_prose(repository):
    cells = ("from alea_lib.metrics import chair\nfrom alea_lib.report import figures", "A = 1")
    path = toy.write_notebook(repository, "01_make", "SIZE = None", *cells)
    first = source_hashes(path)
    assert "alea_lib/metrics/chair.py" in first.numbers and "notebooks/01_make.ipynb" in first.numbers
    assert "alea_lib/report/figures/common.py" in first.page and not set(first.numbers) & set(first.page)
    notebook = json.loads(path.read_text())
    notebook["cells"][0]["source"] = "# Other words"
    notebook["cells"][-1]["source"] = "A  =  1  # one"
    path.write_text(json.dumps(notebook))
    assert source_hashes(path) == first
    notebook["cells"][-1]["source"] = "A = 2"
    path.write_text(json.dumps(notebook))
    now = source_hashes(path)
    assert {name for name, value in now.numbers.items() if first.numbers[name] != value} == {"notebooks/01_make.ipynb"}
    assert now.page == first.page


def test_published_tables_know_whether_their_code_has_changed(repository):
    path = toy.write_notebook(repository, "01_make", "SIZE = None", "A = 1")
    results = repository / "data" / "results" / "long"
    results.mkdir(parents=True)

    def publish(**column):
        pd.DataFrame({"stage": ["01_make-big"], "run_id": ["x"], **column}).to_csv(results / "runs.csv", index=False)

    assert sources_id({}) == ""
    publish(sources_sha256=sources_id(source_hashes(path).numbers))
    assert guard.published("long") == {"01_make-big": "current"}
    toy.write_notebook(repository, "01_make", "SIZE = None", "A = 2")
    assert guard.published("long") == {"01_make-big": "changed"}
    assert "**older than the code**: what 01_make read" in guard.published_mark("long")
    publish()
    assert guard.published("long") == {"01_make-big": "unknown"}
    assert "not known" in guard.published_mark("long") and "not known" in guard.published_mark("no-runs-table")


def test_pages_carry_marks_and_tables(repository, tmp_path):
    run = tmp_path / "data" / "runs" / "toy" / "01_make"
    run.mkdir(parents=True)
    (run / "made.csv").write_text("a\n1\n")
    results = tmp_path / "data" / "results" / "long"
    results.mkdir(parents=True)
    (results / "runs.csv").write_text("stage,run_id\n01_make,x\n")
    profile = tmp_path / "data" / "profiles" / "toy.yaml"
    profile.write_text("note: No number here means anything.\n" + profile.read_text())
    target = tmp_path / "book" / "notebooks" / "01_make.ipynb"
    (results / "read.csv").write_text("b\n2\n")
    book.dress(executed(source()), run, {"inputs": {"data/results/long/read.csv": {}, "01_make": {}}}, target, "toy")
    texts = ["".join(cell["source"]) for cell in json.loads(target.read_text())["cells"]]
    assert texts[0] == "# A toy" and "No number here means anything." in texts[1] and "not known" in texts[2]
    assert "{download}`made.csv <../generated/tables/01_make/made.csv>`" in texts[-1]
    assert "{download}`read.csv <../generated/tables/long/read.csv>`" in texts[-1]
    tables = tmp_path / "book" / "generated" / "tables"
    assert (tables / "01_make" / "made.csv").read_text() == "a\n1\n"
    assert (tables / "long" / "read.csv").read_text() == "b\n2\n"


def test_all_faults_are_told_at_once():
    with pytest.raises(RunError, match="(?s)one.*two.*make study"):
        book.refuse(["one", "two"])
    with pytest.raises(RunError, match="and 5 more"):
        book.refuse(str(i) for i in range(25))
    book.refuse([])


def test_source_notebooks_keep_the_rules():
    """So that a fault shows here, and not after half an hour of running."""
    for path in sorted((toy.HERE / "notebooks").glob("*.ipynb")):
        notebook = guard.read(path)
        for cell in notebook["cells"]:
            shown = cell["metadata"].get("mystnb")
            if shown and "figure" in shown:
                said = (shown["figure"].get("name"), shown["figure"].get("caption"), shown.get("image", {}).get("alt"))
                assert all(said), f"{path.name} {cell['id']}: a figure needs name, caption and alt"


def test_written_pages_describe_their_pictures():
    for path in sorted((toy.HERE / "book").glob("*.md")):
        blocks = path.read_text(encoding="utf-8").split("```{figure}")[1:]
        for block in blocks:
            head = block.split("```")[0]
            assert ":alt:" in head and ":name:" in head, f"{path.name}: {head.splitlines()[0]}"
