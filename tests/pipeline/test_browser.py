"""The book as a reader has it: pages, pictures and the caption explorer in a headless Chromium.

Looks at the built book where there is one that is newer than its sources; else at a small one of the prose pages. The
explorer is tested on fixture data.
"""

import functools
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from alea_lib.pipeline.api_pages import write_api_pages
from alea_lib.pipeline.book import toc_files

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e .[dev]")
axe_api = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "_build" / "html"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE = {"width": 390, "height": 844}
GRAVE = ("serious", "critical")
# sphinx-thebe writes its settings, which nothing here uses, twice into each page
OF_THE_THEME = ("Identifier 'THEBE_JS_URL' has already been declared",)

pytestmark = [
    pytest.mark.long,  # make check-book, after make study
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium"),
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def serve():
    """Folder -> address of a server of it on localhost."""
    servers = []

    def start(folder: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    yield context.new_page()
    context.close()


# ---- the pages


def current(book: Path) -> bool:
    """Whether the built book is there and newer than what it is made of."""
    if not (book / "index.html").exists() or not (book / "explorer" / "index.html").exists():
        return False
    sources = [ROOT / "_config.yml", *(p for p in (ROOT / "book").rglob("*") if p.is_file())]
    own = [p for p in sources if "generated" not in p.parts and p.parent.name != "notebooks"]
    return all(p.stat().st_mtime <= (book / "index.html").stat().st_mtime for p in own)


@pytest.fixture(scope="module")
def book(tmp_path_factory, published):
    """The built book, or a small one: its prose pages and those of the library, without notebooks."""
    if current(BUILT):
        return BUILT
    folder = tmp_path_factory.mktemp("book")
    shutil.copytree(ROOT / "book", folder / "book", ignore=shutil.ignore_patterns("generated", "*.ipynb"))
    shutil.copyfile(ROOT / "_config.yml", folder / "_config.yml")
    listed = toc_files(yaml.safe_load((ROOT / "book" / "_toc.yml").read_text()))
    prose = [name for name in listed if not name.startswith("notebooks/")]
    toc = {"format": "jb-book", "root": prose[0], "chapters": [{"file": name} for name in prose[1:]]}
    (folder / "book" / "_toc.yml").write_text(yaml.safe_dump(toc))
    (folder / "book" / "generated").mkdir()
    for included in set(re.findall(r"\{include\} (generated/\S+)", "".join(map(read, (folder / "book").glob("*.md"))))):
        (folder / "book" / included).write_text("Written by the study.\n")
    write_api_pages(folder / "book" / "generated")
    program = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", "book", "-q"]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True)
    assert (folder / "_build" / "html" / "intro.html").exists(), done.stdout + done.stderr
    shutil.copytree(published, folder / "_build" / "html" / "explorer")
    return folder / "_build" / "html"


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def visits(browser, serve, book):
    """Page -> what a visit found: errors, broken pictures, width at 390 pixels, grave faults of accessibility."""
    address = serve(book)
    # search.html answers a question and genindex.html is a list of names: the theme's own, none of ours
    own = [p for p in sorted(book.rglob("*.html")) if p.name not in ("search.html", "genindex.html")]
    pages = [p for p in own if "_static" not in p.parts and 'http-equiv="Refresh"' not in read(p)]
    return {name: visit(browser, address, name) for name in (p.relative_to(book).as_posix() for p in pages)}


def visit(browser, address: str, name: str) -> dict:
    context = browser.new_context(viewport=PHONE)
    page, errors = context.new_page(), []
    host = urlsplit(address).netloc
    page.route(lambda url: urlsplit(url).netloc not in (host, ""), lambda route: route.abort())
    page.on("pageerror", lambda error: errors.append(error.message) if error.message not in OF_THE_THEME else None)
    page.on("console", lambda told: errors.append(told.text) if grave(told, host) else None)
    page.goto(f"{address}/{name}", wait_until="load")
    pictures = page.evaluate(
        """async () => {
            const all = [...document.images].filter((i) => i.getAttribute("src"));
            for (const image of all) image.loading = "eager";
            await Promise.all(all.map((i) => i.decode().catch(() => null)));
            return all.filter((i) => !i.naturalWidth).map((i) => i.src);
        }"""
    )
    width = page.evaluate("document.documentElement.scrollWidth")
    own = list(errors)  # axe looks for style sheets of its own accord, and where there are none
    found = axe_api.Axe().run(page).response["violations"]
    faults = [(v["id"], n["target"], v["help"]) for v in found if v["impact"] in GRAVE for n in v["nodes"]]
    links = page.eval_on_selector_all("a[href]", "all => all.map((a) => a.href)")
    context.close()
    return {"errors": own, "pictures": pictures, "width": width, "faults": faults, "links": links}


def grave(message, host: str) -> bool:
    """An error in the console that is ours: not the loss of something from the network, which we cut off."""
    lost = "net::ERR" in message.text and urlsplit(message.location.get("url", "")).netloc != host
    return message.type == "error" and not lost


@pytest.mark.parametrize("what", ["errors", "pictures", "faults"])
def test_every_page_loads_without(visits, what):
    assert visits
    assert not {name: found[what] for name, found in visits.items() if found[what]}


def test_no_page_scrolls_sideways_on_a_phone(visits):
    assert not {name: found["width"] for name, found in visits.items() if found["width"] > PHONE["width"]}


def test_colab_opens_notebooks_that_exist(visits):
    repository = yaml.safe_load(read(ROOT / "_config.yml"))["repository"]
    start = f"{repository['url'].removeprefix('https://github.com')}/blob/{repository['branch']}/"
    links = {url for found in visits.values() for url in found["links"] if "colab.research.google.com" in url}
    assert all(urlsplit(url).path.startswith(f"/github{start}") for url in links), links
    wanted = {urlsplit(url).path.removeprefix(f"/github{start}") for url in links}
    assert not [name for name in wanted if not (ROOT / name).is_file()]
    shown = [name for name in visits if name.startswith("notebooks/")]
    assert bool(wanted) == bool(shown), "a notebook's page has a button for Colab"


# ---- the explorer


@pytest.fixture(scope="module")
def published(tiny_world, tmp_path_factory):
    from explorer_data import write

    from alea_lib.report.explorer import publish

    folder = tmp_path_factory.mktemp("explorer")
    write(tiny_world, folder / "run")
    publish(folder / "run", ROOT / "book" / "explorer", folder / "html")
    return folder / "html"


@pytest.fixture(scope="module")
def data(published):
    text = read(published / "index.html")
    return json.loads(re.search(r'id="data">(.*)</script>', text)[1])


@pytest.fixture
def explorer(page, published):
    """The page from a file, as a reader without a server or a network has it."""
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda told: errors.append(told.text) if told.type == "error" else None)
    page.context.set_offline(True)

    def open_at(state: str = ""):
        page.goto("about:blank")
        page.goto(f"file://{published}/index.html{state}")
        return page

    yield open_at
    assert not errors


def shown_ids(page) -> list[int]:
    return [int(i) for i in page.eval_on_selector_all("#grid li", "all => all.map((e) => e.dataset.id)")]


def state(page) -> dict:
    return page.evaluate("Object.fromEntries(new URLSearchParams(location.hash.slice(1)))")


@pytest.mark.parametrize("name", ["worse", "better", "still", "companion", "right"])
def test_a_filter_shows_the_pictures_that_pass_it(explorer, data, name):
    page = explorer()
    assert shown_ids(page) == [i["id"] for i in data["images"]]
    page.click(f"#filters [data-filter={name}]")
    want = [i["id"] for i in data["images"] if name in i["groups"]["edit"]]
    assert shown_ids(page) == want and want
    assert page.get_attribute(f"#filters [data-filter={name}]", "aria-pressed") == "true"
    assert page.inner_text("#count").startswith(f"{len(want)} of {len(data['images'])}")
    assert state(page)["filter"] == name


def test_wrong_words_are_marked_by_sign_line_and_text(explorer, data):
    image = next(i for i in data["images"] if "worse" in i["groups"]["edit"])
    page = explorer(f"#image={image['id']}")
    caption = page.locator("#captions [data-method=edit]")
    wrong = caption.locator(".wrong")
    assert wrong.count() == 1 and "toaster" in wrong.text_content()
    assert "✗" in wrong.text_content() and "not in the image" in wrong.text_content()
    assert wrong.evaluate("e => getComputedStyle(e).textDecorationStyle") == "wavy"
    assert caption.locator(".right").count() == len(image["objects"])
    image = next(i for i in data["images"] if "better" in i["groups"]["edit"])
    page = explorer(f"#image={image['id']}")
    assert "planted companion" in page.locator("#captions [data-method=base] .companion").text_content()
    assert page.locator("#captions [data-method=edit] .wrong").count() == 0


def coloured(page) -> list[int]:
    """Patches whose square is not transparent."""
    script = "all => all.map((e) => +(getComputedStyle(e).backgroundColor.match(/[\\d.]+(?=\\)$)/)[0]))"
    return [i for i, alpha in enumerate(page.eval_on_selector_all("#overlay span", script)) if alpha > 0]


def test_pointing_at_a_word_lays_its_map_over_the_picture(explorer, data):
    page = explorer()
    words = page.locator("#captions [data-method=base] button.word")
    words.nth(1).hover()
    assert coloured(page) == [1, 2], "word k hangs on patch k, and patch k + 1 speaks against it"
    assert page.locator("#overlay span").nth(1).inner_text() == "+"
    assert page.locator("#overlay span").nth(2).inner_text() == "−"
    assert "2.0 nats" in page.inner_text("#readout") and "row 1, column 2" in page.inner_text("#readout")
    assert "nats" in page.inner_text("#legend")
    page.mouse.move(5, 5)
    assert coloured(page) == []
    page.check("#maps [value=attention]")
    words.nth(1).focus()
    assert coloured(page) == [0] and "attention" in page.inner_text("#legend")
    assert state(page)["map"] == "attention"


def test_the_keyboard_is_enough(explorer, data):
    page = explorer()
    ids = shown_ids(page)
    page.locator("#grid li").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    focused = page.evaluate("Number(document.activeElement.dataset.id)")
    columns = page.evaluate("getComputedStyle(document.getElementById('grid')).gridTemplateColumns.split(' ').length")
    assert focused == ids[min(1 + columns, len(ids) - 1)]
    assert page.eval_on_selector_all("#grid li[tabindex='0']", "all => all.length") == 1
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus is seen"
    page.keyboard.press("Enter")
    assert int(state(page)["image"]) == focused
    assert page.evaluate("document.activeElement.id") == "detail-title"
    for _ in range(6):  # the map's choice, then the words
        if page.evaluate("document.activeElement.matches('#captions button.word')"):
            break
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_function("location.hash.includes('word=base.1')")
    assert page.get_attribute("button[data-word='base.1']", "aria-pressed") == "true"
    page.keyboard.press("Escape")
    page.wait_for_function("!location.hash.includes('word')")
    page.keyboard.press("Escape")
    assert page.evaluate("Number(document.activeElement.dataset.id)") == focused


def test_the_address_holds_the_state_and_back_goes_back(explorer, data):
    image = next(i for i in data["images"] if "worse" in i["groups"]["edit"])
    asked = f"#method=edit&filter=worse&map=effect&image={image['id']}&word=edit.0"
    page = explorer(asked)
    assert page.get_attribute("#grid [aria-selected=true]", "data-id") == str(image["id"])
    assert coloured(page) == [0, 1]
    page.click("#filters [data-filter=all]")
    page.locator("#grid li").last.click()
    page.select_option("#method", "cut")
    page.wait_for_function("location.hash.includes('method=cut')")
    for _ in range(3):
        page.go_back()
    page.wait_for_function("location.hash.includes('filter=worse')")
    assert page.get_attribute("#grid [aria-selected=true]", "data-id") == str(image["id"])
    assert coloured(page) == [0, 1] and page.input_value("#method") == "edit"
    page.go_forward()
    page.wait_for_function("location.hash.includes('filter=all')")
    assert len(shown_ids(page)) == len(data["images"])


def test_an_address_that_means_nothing_shows_the_first_picture(explorer, data):
    page = explorer("#image=7&method=magic&filter=none&word=base.99&map=x")
    assert page.get_attribute("#grid [aria-selected=true]", "data-id") == str(data["images"][0]["id"])
    assert len(shown_ids(page)) == len(data["images"]) and coloured(page) == []


def test_other_methods_are_shown_without_maps(explorer):
    page = explorer("#method=cut")
    assert page.locator("#captions [data-method=cut] button").count() == 0
    assert "no maps" in page.inner_text("#captions [data-method=cut] h3")
    assert page.locator("#others [data-method=edit] .word").count() > 0


@pytest.mark.parametrize("options", [{"color_scheme": "dark"}, {"color_scheme": "light"}, {"viewport": PHONE}])
def test_the_explorer_is_accessible_in_every_dress(browser, serve, published, options):
    context = browser.new_context(**options)
    page = context.new_page()
    page.goto(f"{serve(published)}/index.html")
    page.locator("#captions button.word").first.focus()
    found = axe_api.Axe().run(page).response["violations"]
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    context.close()
    assert not [(v["id"], v["impact"]) for v in found]
    assert (ground == "rgb(255, 255, 255)") == (options.get("color_scheme") != "dark")
