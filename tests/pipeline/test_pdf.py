"""The book as a PDF: what is said without a browser, and a mini book printed with one."""

import shutil
import subprocess

import pytest
import toy

from alea_lib.core.paths import RunError
from alea_lib.pipeline import pdf
from alea_lib.pipeline.__main__ import main
from alea_lib.pipeline.record import begin


def printer() -> bool:
    try:
        return bool(pdf.browser())
    except RunError:
        return False


needs_browser = pytest.mark.skipif(not printer(), reason="no Chromium or Chrome that could print")


@pytest.fixture
def mini(tmp_path, monkeypatch):
    """A toy repository with finished runs and a book of two written pages."""
    folder = toy.whole_repository(tmp_path / "a book")
    monkeypatch.setenv("ALEA_ROOT", str(folder))
    (folder / "book" / "_toc.yml").write_text(
        "format: jb-book\nroot: intro\nchapters:\n- file: second\n- file: status\n"
    )
    shutil.copytree(toy.HERE / "book" / "_static", folder / "book" / "_static")
    (folder / "book" / "second.md").write_text("# Second chapter\n\nHere is $p(y \\mid x) < \\tfrac{1}{2}$ to read.\n")
    for stage, names in (("01_make", ("SIZE", "WORLD")), ("02_edit", ("LR",)), ("03_measure", ()), ("04_holds", ())):
        variants = {"02_edit": ("weak", "strong"), "03_measure": ("base", "weak", "strong")}.get(stage, ("",))
        for variant in variants:
            begin(stage, "toy", variant, **dict.fromkeys(names)).finish()
    return folder


def test_without_a_browser_the_error_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setattr(pdf.shutil, "which", lambda name: None)
    assert main(["pdf", "--profile", "toy"]) == 1
    told = capsys.readouterr().err
    assert "apt install chromium" in told and "CHROMIUM=PATH make pdf" in told


def test_a_named_browser_must_be_one(monkeypatch):
    monkeypatch.setenv("CHROMIUM", "no-such-browser")
    with pytest.raises(RunError, match="no-such-browser, which is no program"):
        pdf.browser()


def test_a_browser_that_prints_nothing_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("CHROMIUM", "true")  # ends well, and writes no file
    page = tmp_path / "page.html"
    page.write_text("<p>x</p>")
    with pytest.raises(RunError, match="did not print page.html"):
        pdf.print_page(page, tmp_path / "page.pdf")


@needs_browser
@pytest.mark.slow
def test_a_mini_book_is_printed(mini):
    target = pdf.build("toy")
    assert target == mini / "_build" / "look-closer.pdf"
    content = target.read_bytes()
    assert content.startswith(b"%PDF") and content.rstrip().endswith(b"%%EOF")
    assert content.count(b"/Type /Page\n") + content.count(b"/Type /Page ") >= 3  # every chapter begins a page
    page = (mini / "_build" / "singlehtml" / "intro.html").read_text()
    assert "<math" in page and "Second chapter" in page and "mathjax" not in page.split("</head>")[0].lower()


@pytest.mark.slow
def test_a_formula_that_cannot_be_shown_fails_the_book(mini):
    from alea_lib.pipeline import book

    (mini / "book" / "second.md").write_text("# Second\n\n$\\nonsense{x}$\n")
    with pytest.raises(RunError, match=r"formula .*nonsense"):
        book.build("toy")


def test_the_makefile_has_the_target():
    help_text = subprocess.run(["make", "help"], cwd=toy.HERE, capture_output=True, text=True).stdout
    assert "make pdf" in help_text
