"""The stage engine: parameters, records, dependencies, and that only finished runs look finished."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import toy

from alea_lib.core.files import read_parquet, read_record
from alea_lib.core.paths import MissingStage, RunError, read_yaml, root, run_dir
from alea_lib.core.tables import read_csv
from alea_lib.pipeline import collect as collect_tables
from alea_lib.pipeline import sources
from alea_lib.pipeline.__main__ import assignments, main
from alea_lib.pipeline.collect import collect, publish
from alea_lib.pipeline.execute import brief, execute, tidy
from alea_lib.pipeline.guard import guard
from alea_lib.pipeline.modules import syntax
from alea_lib.pipeline.profiles import load_profile, plan, settings
from alea_lib.pipeline.record import begin
from alea_lib.pipeline.sources import parameters, source_hashes
from alea_lib.pipeline.study import alone, stale_reason


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A small toy repository that the engine takes for its root."""
    monkeypatch.setenv("ALEA_ROOT", str(toy.small_repository(tmp_path)))
    return tmp_path


def finished(stage="01_make", variant="", **params):
    """A finished run that wrote one file."""
    values = {"01_make": {"SIZE": None}, "02_edit": {"LR": None}}.get(stage, {})
    (run_dir("toy", stage, variant) / "run.json").unlink(missing_ok=True)  # as execute does
    run = begin(stage, "toy", variant, **{**values, **params})
    (run.dir / "made.txt").write_text(str(run.params))
    return run


# ---- profiles and plan


def test_root_is_found_from_any_folder_below(repository, monkeypatch):
    monkeypatch.delenv("ALEA_ROOT")
    deep = repository / "data" / "profiles"
    monkeypatch.chdir(deep)
    assert root() == repository.resolve()


def test_unknown_profile_names_the_ones_there_are(repository):
    with pytest.raises(RunError, match="no profile 'nope': the profiles are toy"):
        load_profile("nope")


def test_numbers_with_an_exponent_are_numbers():
    assert read_yaml("{a: 1e-3, b: 1.5E+4, c: .5e2, d: e1, e: 1-3}") == {
        "a": 1e-3, "b": 1.5e4, "c": 50.0, "d": "e1", "e": "1-3"
    }  # fmt: skip


def test_a_variant_changes_only_what_it_names(repository):
    profile = load_profile("toy")
    assert settings(profile, "02_edit", "weak") == {"LR": 1e-3}
    assert settings(profile, "02_edit", "strong") == {"LR": 0.5}
    assert settings(profile, "02_edit", "of-my-own") == {"LR": 1e-3}


def test_plan_joins_variants_of_the_same_name(repository):
    jobs = {job.label: job for job in plan("toy")}
    needs = {label: {need.label for need in job.needs} for label, job in jobs.items()}
    assert needs["03_measure-base"] == {"01_make"}
    assert needs["03_measure-weak"] == {"01_make", "02_edit-weak", "03_measure-base"}
    assert [label for label, job in jobs.items() if job.after_collect] == ["04_holds"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("01_make: [02_edit]\n02_edit: [01_make]", "reads itself"),
        ("01_make: []", "does not say what 02_edit reads"),
        ("01_make: [00_gone]\n02_edit: []\n03_measure: []\n04_holds: []", "add a `00_gone:` section"),
        (
            "01_make: []\n02_edit: []\n03_measure: ['02_edit:gone']\n04_holds: []",
            "add `gone` to the variants",
        ),
    ],
)
def test_a_plan_that_cannot_be_says_why(repository, stages, message):
    (repository / "notebooks" / "stages.yaml").write_text(stages)
    with pytest.raises(RunError, match=message):
        plan("toy")


def test_the_shipped_profiles_make_a_plan(monkeypatch):
    monkeypatch.setenv("ALEA_ROOT", str(toy.HERE))
    for name in ("scenes", "smoke"):
        labels = [job.label for job in plan(name)]
        assert labels.index("06_measure-base") < labels.index("06_measure-alea-mixed")
        assert labels.index("05_edit-alea-mixed") < labels.index("06_measure-alea-mixed")


# ---- begin and Run


def test_none_takes_the_profiles_value_and_others_stand(repository):
    run = begin("02_edit", "toy", "strong", LR=None, STEPS=7, SEED=None, WORLD=None)
    assert vars(run.p) == {"LR": 0.5, "STEPS": 7, "SEED": 3, "WORLD": "toys"}
    assert run.dir == repository / "data" / "runs" / "toy" / "02_edit-strong"
    table = run.table()
    assert table.loc["LR", "set in"] == "profile"
    assert table.loc["STEPS", "set in"] == "notebook"


def test_a_parameter_without_value_is_one_clear_error(repository):
    with pytest.raises(RunError, match="no value for STEPS: set it in data/profiles/toy.yaml"):
        begin("02_edit", "toy", "weak", LR=None, STEPS=None)


def test_a_profile_name_the_notebook_lacks_is_an_error(repository):
    with pytest.raises(RunError, match="sets LR for 02_edit, which has no such parameter"):
        begin("02_edit", "toy", "weak", STEPS=1)


def test_a_parameter_that_cannot_be_recorded_is_refused(repository):
    with pytest.raises(RunError, match="numbers, texts, lists"):
        begin("01_make", "toy", SIZE=object())


def test_run_id_depends_on_parameters_and_inputs_alone(repository):
    first = finished()
    first.finish()
    again = finished()
    again.finish()
    assert first.run_id == again.run_id
    assert finished(SIZE=5).run_id != first.run_id
    finished().finish()
    one, two = begin("02_edit", "toy", "weak", LR=None), begin("02_edit", "toy", "weak", LR=None)
    one.input("01_make")
    assert one.run_id != two.run_id


def test_run_id_follows_the_content_of_inputs_but_not_their_times(repository):
    def reader():
        run = begin("02_edit", "toy", "weak", LR=None)
        run.input("01_make")
        return run.run_id

    def maker(text, timing):
        run = finished()
        (run.dir / "made.txt").write_text(text)
        (run.dir / "timing.csv").write_text(timing)
        run.finish()

    maker("a", "1 s")
    first = reader()
    maker("a", "2 s")
    assert reader() == first
    maker("b", "2 s")
    assert reader() != first


def test_an_input_after_the_id_was_read_is_an_error(repository):
    finished().finish()
    run = begin("02_edit", "toy", "weak", LR=None)
    assert run.run_id
    with pytest.raises(RunError, match="before run.run_id is read"):
        run.input("01_make")


def test_missing_stage_names_the_command(repository):
    run = begin("03_measure", "toy", "weak")
    with pytest.raises(MissingStage, match=r"make run NB=01_make PROFILE=toy$"):
        run.input("01_make")
    with pytest.raises(MissingStage, match=r"make run NB=02_edit VARIANT=weak PROFILE=toy$"):
        run.input("02_edit", "weak")
    with pytest.raises(MissingStage, match=r"make study PROFILE=toy$"):
        run.results()


def test_files_are_recorded_by_content_and_without_machine_paths(repository, tmp_path_factory):
    (repository / "data" / "model").mkdir()
    (repository / "data" / "model" / "w.bin").write_bytes(b"1")
    outside = tmp_path_factory.mktemp("elsewhere") / "x.bin"
    outside.write_bytes(b"2")
    run = finished()
    run.uses("data/model")
    run.uses(outside)
    run.finish()
    record = read_record(run.dir)
    assert set(record["inputs"]) == {"data/model", "x.bin"}
    assert str(repository) not in json.dumps(record)
    assert record["outputs"].keys() == {"made.txt"}
    with pytest.raises(RunError, match="not there"):
        run.uses("data/none.bin")


def test_begin_clears_what_an_earlier_run_left_but_keeps_checkpoints(repository):
    run = finished()
    run.finish()
    checkpoint = run.checkpoint("step.pt")
    checkpoint.write_text("half")
    (run.dir / "notebook.partial.ipynb").write_text("{}")
    (run.dir / "run.json").unlink()
    again = begin("01_make", "toy", SIZE=None)
    assert again.dir == run.dir
    assert not (again.dir / "made.txt").exists()
    assert again.checkpoint("step.pt") == checkpoint and checkpoint.exists()
    assert (again.dir / "notebook.partial.ipynb").exists()
    other = begin("01_make", "toy", SIZE=9)
    assert other.checkpoint("step.pt") != checkpoint
    again.finish()
    assert not checkpoint.exists()


def test_a_notebook_opened_by_hand_leaves_the_finished_run(repository, capsys):
    run = finished()
    run.finish()
    before = {path.name: path.read_bytes() for path in run.dir.iterdir()}
    assert "by-hand" not in capsys.readouterr().out
    hand = begin("01_make", "toy", SIZE=9)
    assert "01_make.by-hand, which no stage reads (to renew it: make run NB=01_make PROFILE=toy)" in (
        capsys.readouterr().out
    )
    (hand.dir / "mine.txt").write_text("of the first try")
    hand.finish()
    assert hand.dir != run.dir and read_record(hand.dir)["params"] == {"SIZE": 9}
    assert {path.name: path.read_bytes() for path in run.dir.iterdir()} == before
    assert begin("02_edit", "toy", "weak", LR=None).input("01_make") == run.dir
    again = begin("01_make", "toy", SIZE=9)
    assert again.dir == hand.dir and not list(again.dir.iterdir())


def test_tables_beside_the_joined_metrics_are_declared(repository):
    from alea_lib.report.comparison import baselines_of_study

    out = repository / "data" / "runs" / "toy" / "results"
    out.mkdir(parents=True)
    for name in ("metrics", "rivals"):
        (out / f"{name}.csv").write_text("run_id\n")
    run = begin("04_holds", "toy")
    baselines_of_study(run, "none")
    assert set(run.inputs) == {"data/runs/toy/results/metrics.csv", "data/runs/toy/results/rivals.csv"}


def test_finish_checks_the_scores(repository):
    run = begin("03_measure", "toy", "base")
    with pytest.raises(ValueError, match="columns are"):
        run.finish(pd.DataFrame({"method": ["base"], "nonsense": [1]}))
    assert not (run.dir / "run.json").exists()


def test_the_engine_does_not_import_torch():
    code = "import sys, alea_lib.pipeline.execute, alea_lib.pipeline.study; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=toy.HERE).returncode == 0


# ---- what a notebook depends on


def write_package(folder, files):
    for name, text in files.items():
        (folder / "alea_lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "alea_lib" / name).write_text(text)


@pytest.fixture
def reached(tmp_path, monkeypatch):
    """Library files behind cells of a notebook, in a package of these files: of numbers, or of the page alone."""

    def find(files, *cells, params=None, variant="", page=False):
        write_package(tmp_path, files)
        monkeypatch.setattr(sources, "PACKAGE", tmp_path / "alea_lib")
        book = toy.write_notebook(tmp_path, "01_x", "A = 1", *cells)
        found = source_hashes(book, params, variant)[page]
        return {name.removeprefix("alea_lib/") for name in found if not name.endswith(".ipynb")}

    return find


def lazy(**exports: list[str]) -> str:
    """A lazy face: names by submodule."""
    return (
        '"""A room."""\nimport lazy_loader\n__getattr__, __dir__, __all__ = lazy_loader.attach(\n'
        f"    __name__, submod_attrs={exports})\n"
    )


ROOMS = {
    "__init__.py": "",
    "core/__init__.py": lazy(stats=["mean"]),
    "core/stats.py": 'TABLE = "families.yaml"',
    "core/families.yaml": "{}",
    "core/colours.py": "",
    "locate/__init__.py": lazy(run=["locate_layers", "locate_heads"], choose=["choose_layers"]),
    "locate/run.py": "from .settings import S\nimport torch",
    "locate/choose.py": "def go():\n    from alea_lib.locate import locate_layers",
    "locate/settings.py": "from ..pipeline.sources import x\nfrom ..core import stats",
    "locate/unused.py": "",
    "report/__init__.py": 'import lazy_loader\na, b, c = lazy_loader.attach(__name__, submodules=["figures"])',
    "report/figures/__init__.py": 'from ..colours import ROWS\nfrom .common import curves\n__all__ = ["curves"]',
    "report/figures/common.py": "from ...core.stats import mean\nfrom ..colours import ROWS",
    "report/colours.py": "from ..core import colours",
    "pipeline/__init__.py": lazy(sources=["begin"]),
    "pipeline/sources.py": "",
}


def test_a_face_leads_to_the_module_of_the_name_alone(reached):
    stats = {"core/stats.py", "core/families.yaml"}
    run = {"locate/run.py", "locate/settings.py"} | stats
    for cell, files in {
        "%matplotlib inline\nfrom alea_lib.locate import locate_layers": run,
        "from alea_lib.locate import choose_layers": run | {"locate/choose.py"},
        "from alea_lib.locate.settings import S": {"locate/settings.py"} | stats,
        "from alea_lib.locate import settings": {"locate/settings.py"} | stats,
        "from alea_lib import locate\nlocate.locate_heads()": run | {"locate/choose.py"},
        "import alea_lib.locate": run | {"locate/choose.py"},
        "from alea_lib.locate import *": run | {"locate/choose.py"},
        "from alea_lib.pipeline import begin": set(),
        "import numpy": set(),
    }.items():
        assert reached(ROOMS, cell) == files, cell


def test_an_init_with_code_of_its_own_counts(reached):
    files = {**ROOMS, "locate/__init__.py": "from .run import locate_layers\nLAYERS = 3"}
    assert "locate/__init__.py" in reached(files, "from alea_lib.locate.settings import S")


def test_what_draws_and_what_only_it_reaches_belongs_to_the_page(reached):
    draws, mean = "from alea_lib.report import figures\nfigures.curves()", "from alea_lib.core.stats import mean"
    page = {"report/figures/common.py", "report/colours.py", "core/colours.py"}
    stats = {"core/stats.py", "core/families.yaml"}
    assert reached(ROOMS, draws) == set()
    assert reached(ROOMS, draws, page=True) == page | stats
    assert reached(ROOMS, draws, mean) == stats
    assert reached(ROOMS, draws, mean, page=True) == page


def test_methods_of_a_registry_count_where_they_are_named(reached):
    files = {
        "__init__.py": "",
        "baselines/__init__.py": lazy(registry=["get"]),
        "baselines/registry.py": 'import importlib\nMODULES: dict[str, str] = {"vcd": "vcd", "beam": "plain"}\n'
        "def get(name):\n    importlib.import_module(MODULES[name])",
        "baselines/vcd.py": "from .shared import x",
        "baselines/plain.py": "",
        "baselines/shared.py": "",
    }
    cell = "from alea_lib.baselines import get"
    least = {"baselines/registry.py"}
    vcd, beam = {"baselines/vcd.py", "baselines/shared.py"}, {"baselines/plain.py"}
    assert reached(files, cell) == least | vcd | beam
    assert reached(files, cell, params={"K": 1}) == least
    assert reached(files, cell, params={"A": [{"x": ["vcd"]}]}) == least | vcd
    assert reached(files, cell, params={"A": {"beam": 1}}) == least | beam
    assert reached(files, cell, params={}, variant="vcd") == least | vcd
    assert reached(files, cell, 'get("beam")', params={}) == least | beam


def test_a_changed_library_file_is_seen_in_the_same_process(reached):
    cell = "from alea_lib.locate import locate_layers"
    assert "core/stats.py" in reached(ROOMS, cell)
    assert "core/stats.py" not in reached({**ROOMS, "locate/settings.py": ""}, cell)


def test_syntax_is_compared_without_docstrings_comments_and_layout():
    first = 'class A:\n    """Text."""\n    x = 1  # one\n\ndef f(a, b):\n    return (a + b)\n'
    assert syntax(ast.parse(first)) == syntax(
        ast.parse('"""Module."""\nclass A:\n    x = 1\ndef f(a,\n      b):\n    "Other."\n    return a + b')
    )
    assert syntax(ast.parse(first)) != syntax(ast.parse(first.replace("x = 1", "x = '1'")))
    assert syntax(ast.parse("f(None)")) != syntax(ast.parse("f()"))


def test_parameters_are_read_from_the_tagged_cell(tmp_path):
    book = toy.write_notebook(tmp_path, "01_x", 'A = None  # a\nB: int = 3  # b\nC = [1, "x"]\nD = dict(a=1)', "E = 1")
    assert parameters(book) == {"PROFILE": "toy", "VARIANT": "", "A": None, "B": 3, "C": [1, "x"], "D": ...}


def test_command_line_values_are_typed():
    assert assignments(["A=1e-3", "B=[1, 2]", "C=text", "D=null", "E=x=y"]) == {
        "A": 1e-3, "B": [1, 2], "C": "text", "D": None, "E": "x=y"
    }  # fmt: skip
    with pytest.raises(RunError, match="write NAME=VALUE"):
        assignments(["A"])


# ---- the guard


def executed(**changes) -> dict:
    """An executed notebook as papermill leaves it."""
    book = toy.notebook("A = 1", "print(A)", "")
    for count, cell in enumerate(cell for cell in book["cells"] if cell["cell_type"] == "code" and cell["source"]):
        cell["execution_count"] = count + 1
        cell["metadata"]["papermill"] = {"status": "completed"}
    book["metadata"]["papermill"] = {"end_time": "2026", "exception": None, **changes}
    return book


def spoil(kind: str) -> dict:
    book = executed()
    cell = book["cells"][2]
    if kind == "error":
        cell["outputs"] = [{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}]
    elif kind == "not executed":
        cell["execution_count"] = None
    elif kind == "pending":
        cell["metadata"]["papermill"]["status"] = "pending"
    elif kind == "error mark":
        book["cells"][0]["metadata"]["tags"] = ["papermill-error-cell-tag"]
    elif kind == "exit":
        book["metadata"]["papermill"]["exception"] = True
    elif kind == "no end":
        book["metadata"]["papermill"]["end_time"] = None
    elif kind == "source":
        del book["metadata"]["papermill"]
    return book


@pytest.mark.parametrize("kind", ["error", "not executed", "pending", "error mark", "exit", "no end", "source"])
def test_guard_refuses(tmp_path, kind):
    path = tmp_path / "page.ipynb"
    path.write_text(json.dumps(spoil(kind)))
    with pytest.raises(RunError, match="page.ipynb"):
        guard(path)


def test_guard_passes_an_executed_notebook(tmp_path):
    path = tmp_path / "page.ipynb"
    path.write_text(json.dumps(executed()))
    guard(path)


def test_injected_parameters_are_hidden(tmp_path):
    book = executed()
    book["cells"][1]["metadata"]["tags"] = ["injected-parameters"]
    path = tmp_path / "page.ipynb"
    path.write_text(json.dumps(book))
    tidy(path)
    tidy(path)
    assert json.loads(path.read_text())["cells"][1]["metadata"]["tags"] == [
        "injected-parameters",
        "remove-cell",
    ]


# ---- collect


def measured(repository, order):
    """All runs of the toy profile, made in some order, with scores that keep the contract."""
    keys = dict(world="toys", model="m", benchmark="chair", split="test", prompt="plain", condition="clean",
                scorer="chair", setting="")  # fmt: skip
    for stage, variant in [("01_make", ""), ("02_edit", "weak"), ("02_edit", "strong"), *order]:
        run = finished(stage, variant)
        method = {"weak": "alea-mixed", "strong": "no-prefix"}.get(variant, "base")
        rows = {
            "metric": ["recall", "chair_s"],
            "value": [0.1 + 0.2, 0.25],
            "lo": [None, 0.2],
            "hi": [None, 0.3],
        }
        scores = pd.DataFrame({**keys, "method": method, **rows, "n": 10, "base_seed": 0, "seed": 0})
        run.finish(scores if stage == "03_measure" else None)
        (run.dir / "notes.csv").write_text(f"method,metric,reason\n{method},words,none\n")


def test_collect_joins_all_scores_and_is_the_same_whatever_the_order(repository):
    jobs = [("03_measure", name) for name in ("base", "weak", "strong")]
    measured(repository, jobs)
    out = collect("toy")
    first = (out / "metrics.csv").read_bytes()
    measured(repository, jobs[::-1])
    collect("toy")
    assert (out / "metrics.csv").read_bytes() == first
    table = pd.read_csv(out / "metrics.csv")
    assert len(table) == 6 and set(table["profile"]) == {"toy"}
    assert set(pd.read_csv(out / "notes.csv")["method"]) == {"base", "alea-mixed", "no-prefix"}
    runs = pd.read_csv(out / "runs.csv")
    assert set(table["run_id"]) < set(runs["run_id"]) and len(runs) == 6
    assert json.loads(runs["params_json"][runs["stage"] == "02_edit-strong"].item()) == {"LR": 0.5}


def test_collect_names_the_run_that_is_missing(repository):
    finished().finish()
    with pytest.raises(MissingStage, match="make run NB=02_edit VARIANT=weak PROFILE=toy"):
        collect("toy")


def test_collect_joins_what_locators_found_with_the_run_it_comes_from(repository):
    jobs = [("03_measure", name) for name in ("base", "weak", "strong")]
    measured(repository, jobs)
    out = collect("toy")
    assert (out / "localisation.csv").read_text() == "run_id\n"  # no stage tried locators
    folder = run_dir("toy", "02_edit", "weak")
    (folder / "localisation.csv").write_text("locator,rank,seconds\nablation,1,0.5\nrandom,3.5,\n")
    collect("toy")
    found = pd.read_csv(out / "localisation.csv")
    assert list(found) == ["run_id", "locator", "rank", "seconds"] and found["rank"].tolist() == [1, 3.5]
    assert set(found["run_id"]) == {read_record(folder)["run_id"]}


def test_published_tables_are_the_joined_ones(repository):
    with pytest.raises(MissingStage, match="make study PROFILE=toy"):
        publish("toy")
    measured(repository, [("03_measure", name) for name in ("base", "weak", "strong")])
    out, target = collect("toy"), publish("toy")
    assert target == repository / "data" / "results" / "toy"
    joined = {p.name: p.read_bytes() for p in out.glob("*")}
    for name in collect_tables.JOINED:  # no stage wrote one
        assert joined.pop(f"{name}.csv") == b"run_id\n"
    assert joined == {p.name: p.read_bytes() for p in target.glob("*")}


def test_single_stages_are_published_beside_what_is_there(repository):
    measured(repository, [("03_measure", name) for name in ("base", "weak", "strong")])
    with pytest.raises(RunError, match="runs no 09_nope; it has 01_make"):
        publish("toy", ("09_nope",))
    collect("toy")
    target = publish("toy")
    before = {name: read_csv(target / f"{name}.csv") for name in ("metrics", "runs")}
    run = finished("02_edit", "weak", LR=0.25)
    pd.DataFrame({"label": ["a"], "value": [1.0]}).to_csv(run.dir / "robustness.csv", index=False)
    run.finish()
    publish("toy", ("02_edit",))
    after = {name: read_csv(target / f"{name}.csv") for name in ("metrics", "runs", "robustness")}
    pd.testing.assert_frame_equal(after["metrics"], before["metrics"])
    assert sorted(after["runs"]["stage"]) == sorted(before["runs"]["stage"])  # renewed, not doubled
    assert after["robustness"]["run_id"].tolist() == [run.run_id] and run.run_id in set(after["runs"]["run_id"])
    shutil.rmtree(repository / "data" / "runs" / "toy" / "02_edit-strong")
    with pytest.raises(MissingStage, match="02_edit-strong"):
        publish("toy", ("02_edit",))
    publish("toy", ("02_edit-weak",))  # one variant alone
    assert len(read_csv(target / "robustness.csv")) == 1
    assert sorted(read_csv(target / "runs.csv")["stage"]) == sorted(before["runs"]["stage"])


def test_large_tables_are_published_small(repository, monkeypatch):
    measured(repository, [("03_measure", name) for name in ("base", "weak", "strong")])
    out = collect("toy")
    monkeypatch.setattr("alea_lib.pipeline.collect.LARGE", (out / "metrics.csv").stat().st_size - 1)
    target = publish("toy")
    assert not (target / "metrics.csv").exists() and (target / "notes.csv").exists()
    pd.testing.assert_frame_equal(
        read_parquet(target / "metrics.parquet"), read_csv(out / "metrics.csv"), check_dtype=False
    )


# ---- what is stale


def test_stale_runs_are_told(repository):
    toy.write_notebook(repository, "01_make", "SIZE = None", "1")
    job = plan("toy")[0]
    assert stale_reason("toy", job) == ""
    data = repository / "data" / "d.txt"
    data.write_text("one")
    run = finished()
    run.uses(data)
    run.finish()
    assert stale_reason("toy", job) == "it has no finished notebook"
    (run.dir / "notebook.ipynb").write_text("{}")
    assert stale_reason("toy", job) == ""
    later = time.time() + 60
    os.utime(data, (later, later))
    assert stale_reason("toy", job) == ""
    data.write_text("two")
    os.utime(data, (later, later))
    assert stale_reason("toy", job) == "data/d.txt has changed"
    run = finished(SIZE=99)
    run.finish()
    (run.dir / "notebook.ipynb").write_text("{}")
    assert stale_reason("toy", job) == "it was run with SIZE=99"


def test_a_run_of_other_code_is_stale(repository):
    toy.write_notebook(repository, "01_make", "SIZE = None", "1")
    run, job = finished(), plan("toy")[0]
    toy.write_notebook(repository, "01_make", "SIZE = None", "2")  # while it runs: what made it is what it began with
    run.finish()
    (run.dir / "notebook.ipynb").write_text("{}")
    assert stale_reason("toy", job) == "notebooks/01_make.ipynb has changed"
    toy.write_notebook(repository, "01_make", "SIZE = None", "1")
    assert stale_reason("toy", job) == ""
    record = read_record(run.dir)
    del record["sources"]
    (run.dir / "run.json").write_text(json.dumps(record))
    assert stale_reason("toy", job) == "its record does not say which code made it"


def test_a_second_study_is_refused_until_the_first_has_gone_however_it_ended(repository):
    code = "import sys, time, pathlib\nfrom alea_lib.pipeline.study import alone\n"
    code += "with alone(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    command = [sys.executable, "-c", code, str(repository)]
    with subprocess.Popen(command, cwd=toy.HERE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another study is at work in this folder"), alone(repository, patience=0.1):
            pass
        other.kill()
    with alone(repository):
        pass


# ---- executing


def test_unknown_parameters_are_refused_before_anything_starts(repository):
    toy.write_notebook(repository, "01_make", "SIZE = None", toy.begin("SIZE"))
    with pytest.raises(RunError, match="no parameter SIZES .set by the command.; it has PROFILE, VARIANT, SIZE"):
        execute("01_make", "toy", given={"SIZES": 3})
    with pytest.raises(RunError, match="no notebook 09_none.ipynb: there are 01_make"):
        execute("09_none", "toy")
    toy.write_notebook(repository, "02_edit", "", toy.begin())
    with pytest.raises(RunError, match="no parameter LR .set by data/profiles/toy.yaml"):
        execute("02_edit", "toy", "weak")
    assert not (repository / "data" / "runs").exists()


@pytest.mark.slow
def test_a_finished_run_looks_finished(repository):
    cells = ["import sys\n(run.dir / 'kernel.txt').write_text(sys.executable)", "run.finish()"]
    toy.write_notebook(repository, "01_make", "SIZE = None", toy.begin("SIZE"), *cells)
    final = execute("01_make", "toy", given={"SIZE": 8})
    guard(final)
    assert sorted(path.name for path in final.parent.iterdir()) == [
        "kernel.txt",
        "notebook.ipynb",
        "run.json",
    ]
    assert (final.parent / "kernel.txt").read_text() == sys.executable
    assert read_record(final.parent)["params"] == {"SIZE": 8}
    injected = [c for c in json.loads(final.read_text())["cells"] if "injected-parameters" in c["metadata"]["tags"]]
    assert "remove-cell" in injected[0]["metadata"]["tags"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("run.finish()\nraise ValueError('too dark to see')", "cell 4: ValueError: too dark to see"),
        ("run.finish()\nimport sys\nsys.exit(0)", "failed"),
        ("run.finish()\nimport os\nos.kill(os.getpid(), 9)", "kernel died"),
        ("print('forgot')", "without calling run.finish"),
    ],
    ids=["exception", "exit", "killed", "unfinished"],
)
def test_a_failed_run_never_looks_finished(repository, capsys, cell, message):
    toy.write_notebook(repository, "01_make", "SIZE = None", toy.begin("SIZE"), cell, "print('after')")
    folder = run_dir("toy", "01_make")
    folder.mkdir(parents=True)
    for old in ("run.json", "notebook.ipynb"):
        (folder / old).write_text("{}")
    assert main(["execute", "01_make", "--profile", "toy"]) == 1
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in folder.glob("*.*")) == ["notebook.failed.ipynb"]


def test_brief_keeps_an_error_short():
    error = RuntimeError("one\ntwo")
    assert brief(error) == "one two"


# ---- the whole chain


def call(folder: Path, *words: str, **more) -> subprocess.CompletedProcess:
    environment = {**os.environ, "ALEA_ROOT": str(folder), "PYTHONPATH": str(folder)}
    environment.pop("ALEA_WATCH", None)
    command = [sys.executable, "-m", "alea_lib.pipeline", *words, "--profile", "toy"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, **more)


def started(output: str) -> list[str]:
    return sorted(line.split()[1] for line in output.splitlines() if line.endswith(" started"))


def snakemake_would_run(folder: Path) -> list[str]:
    """What a plain call of Snakemake, without the study's own look at the records, would run."""
    command = [sys.executable, "-m", "snakemake", "-s", "notebooks/Snakefile", "-d", ".", "--cores", "1", "-n"]
    environment = {**os.environ, "ALEA_ROOT": str(folder), "PYTHONPATH": str(folder)}
    environment.pop("ALEA_WATCH", None)
    done = subprocess.run(
        [*command, "--config", "profile=toy"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [
        line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith(("rule ", "localrule "))
    ]


@pytest.mark.slow
def test_a_study_runs_resumes_and_reruns_only_what_changed(tmp_path):
    folder = toy.whole_repository(tmp_path / "a study")  # a path with a space
    figures, first_page = folder / "alea_lib" / "report" / "figures.py", folder / "notebooks" / "01_make.ipynb"
    notebook = json.loads(first_page.read_text())
    notebook["cells"].insert(
        3, {**notebook["cells"][3], "id": "f", "source": "import alea_lib.report.figures as f\nf.shown()"}
    )
    first_page.write_text(json.dumps(notebook))
    edit = folder / "alea_lib" / "toys" / "editing.py"
    good = edit.read_text()
    edit.write_text(good.replace("v * lr", "v / 0"))
    first = call(folder, "study")
    assert first.returncode and "ZeroDivisionError" in first.stderr
    edit.write_text(good)
    second = call(folder, "study")
    assert second.returncode == 0, second.stderr
    assert "Select jobs" not in first.stderr + second.stderr  # Snakemake's chatter
    assert "01_make" not in started(second.stdout) and "02_edit-weak" in started(second.stdout)
    assert (folder / "_build" / "html" / "index.html").exists()
    page = (folder / "_build" / "html" / "notebooks" / "03_measure.html").read_text()
    assert "blob/main/notebooks/03_measure.ipynb" in page
    assert "cpu" in (folder / "_build" / "html" / "status.html").read_text()
    metrics = (folder / "data" / "runs" / "toy" / "results" / "metrics.csv").read_bytes()

    assert started(call(folder, "study").stdout) == []

    figures.write_text("def shown():\n    return 'drawn again'\n")
    notebook["cells"][0]["source"] = "# Other words"
    first_page.write_text(json.dumps(notebook))
    record = folder / "data" / "runs" / "toy" / "01_make" / "run.json"
    before = record.stat().st_mtime_ns
    drawn = call(folder, "study")
    assert drawn.returncode == 0, drawn.stderr
    assert started(drawn.stdout) == ["01_make"] and record.stat().st_mtime_ns == before
    assert "stage 01_make is drawn again: alea_lib/report/figures.py has changed" in drawn.stdout
    page = (folder / "_build" / "html" / "notebooks" / "01_make.html").read_text()
    assert "drawn again" in page and "Other words" in page
    assert snakemake_would_run(folder) == []

    edit.write_text(good.replace("v * lr", "lr * v"))
    assert {"02_edit-strong", "02_edit-weak", "03_measure-strong"} <= set(snakemake_would_run(folder))
    third = started(call(folder, "study", "--jobs", "1", "--target", "collect").stdout)
    assert third == ["02_edit-strong", "02_edit-weak", "03_measure-strong", "03_measure-weak"]
    assert (folder / "data" / "runs" / "toy" / "results" / "metrics.csv").read_bytes() == metrics

    profile = folder / "data" / "profiles" / "toy.yaml"
    profile.write_text(profile.read_text().replace("LR: 0.5", "LR: 0.25"))
    fourth = started(call(folder, "study", "--target", "collect").stdout)
    assert fourth == ["02_edit-strong", "03_measure-strong"]


@pytest.mark.slow
def test_a_study_killed_without_mercy_leaves_nothing_running_and_goes_on(tmp_path):
    folder = toy.whole_repository(tmp_path)
    slow = toy.begin("SIZE", "WORLD") + "\nimport time, pathlib\nmark = pathlib.Path('../mark')\n"
    slow += "waited = mark.exists() or (mark.touch(), time.sleep(120))"
    make = "from alea_lib.toys import make\n(run.dir / 'made.txt').write_text(str(make(run.p.SIZE)))"
    toy.write_notebook(folder, "01_make", "SIZE = None\nWORLD = None", slow, make, "run.finish()")
    environment = {**os.environ, "ALEA_ROOT": str(folder), "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "alea_lib.pipeline", "study", "--profile", "toy"]
    study = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if (folder / "mark").exists():
            break
        time.sleep(0.1)
    study.send_signal(signal.SIGKILL)
    study.wait()
    again = call(folder, "study", "--target", "collect", timeout=200)
    assert again.returncode == 0, again.stderr
    assert started(again.stdout)[0] == "01_make"
