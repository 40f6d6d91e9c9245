"""What a study would run or draw again after a change, asked of a finished study that was never executed."""

import ast
import json
import os
import shutil

import pytest
import toy

from alea_lib.core import paths
from alea_lib.pipeline import profiles, sources, study
from alea_lib.pipeline.sources import parameters, source_hashes

NOTEBOOKS = sorted((toy.HERE / "notebooks").glob("*.ipynb"))


def enter(monkeypatch, folder):
    monkeypatch.setenv("ALEA_ROOT", str(folder))
    monkeypatch.setattr(sources, "PACKAGE", folder / "alea_lib")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A copy of library, notebooks and profiles, with the records of a finished study of the profile scenes."""
    folder = tmp_path_factory.mktemp("original") / "study"
    for name in ("alea_lib", "notebooks", "data/profiles"):
        shutil.copytree(toy.HERE / name, folder / name, ignore=toy.NO_CACHE)
    (folder / "book").mkdir()
    for path in [*toy.HERE.glob("data/*.yaml"), toy.HERE / "_config.yml", toy.HERE / "book" / "_toc.yml"]:
        shutil.copyfile(path, folder / path.relative_to(toy.HERE))
    joined = folder / "data" / "runs" / "scenes" / "results"
    joined.mkdir(parents=True)
    (joined / "metrics.csv").write_text("run_id\n")
    with pytest.MonkeyPatch.context() as monkeypatch:
        enter(monkeypatch, folder)
        for job in profiles.plan("scenes"):
            write_record(job)
            (paths.run_dir("scenes", job.stage, job.variant) / "notebook.ipynb").write_text("{}")
    return folder


@pytest.fixture
def finished(original, tmp_path, monkeypatch):
    """The same, to be edited."""
    folder = shutil.copytree(original, tmp_path / "study")
    enter(monkeypatch, folder)
    return folder


def write_record(job):
    notebook = paths.root() / "notebooks" / f"{job.stage}.ipynb"
    params = {**parameters(notebook), **profiles.job_settings("scenes", job)}
    params = {name: value for name, value in params.items() if name not in ("PROFILE", "VARIANT")}
    numbers, page = source_hashes(notebook, params, job.variant)
    record = {"run_id": job.label, "stage": job.stage, "variant": job.variant, "params": params, "inputs": {},
              "sources": numbers, "page_sources": page, "outputs_sha256": "x"}  # fmt: skip
    folder = paths.run_dir("scenes", job.stage, job.variant)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(record))


def labels(found) -> set[str]:
    return {job.label for job in found}


def to_run() -> set[str]:
    return labels(study.to_run("scenes"))


def to_draw() -> set[str]:
    return labels(study.to_draw("scenes"))


def with_readers(labels: set[str]) -> set[str]:
    """These jobs, all that read them, and all that read the joined tables if those change."""
    jobs = profiles.plan("scenes")
    found = {job.label for job in jobs if labels & {job.label, *(earlier.label for earlier in profiles.before(job))}}
    joined = any(job.label in found and not job.after_collect for job in jobs)
    return found | {job.label for job in jobs if job.after_collect and joined}


def stale() -> set[str]:
    """Labels of runs that no longer stand, for reasons of their own."""
    return {job.label for job in profiles.plan("scenes") if study.stale_reason("scenes", job)}


def append(path, line: str = "ADDED = 1"):
    path.write_text(f"{path.read_text()}\n\n{line}\n")


def documented(text: str) -> str:
    """A file with a comment everywhere that one can stand, and docstrings where there are none."""
    lines, inserted = text.splitlines(), {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is None:
            first = node.body[0]
            at = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", []))])
            if at > node.lineno:
                inserted[at] = " " * first.col_offset + '"""Added."""  # and a comment'
    made = ["# A comment.", ""]
    for number, line in enumerate(lines, 1):
        made += [inserted[number], ""] if number in inserted else []
        made.append(line)
    return "\n".join([*made, "", "# The end."]) + "\n"


def test_a_finished_study_has_nothing_to_do(finished):
    assert study.to_run("scenes") == study.to_draw("scenes") == {}


def test_comments_and_docstrings_of_any_library_file_run_and_age_nothing(finished):
    before = {path.stem: source_hashes(finished / "notebooks" / path.name) for path in NOTEBOOKS}
    files = sorted((finished / "alea_lib").rglob("*.py"))
    for path in files:
        path.write_text(documented(path.read_text(encoding="utf-8")))
    assert len(files) > 100 and all("# The end." in path.read_text() for path in files)
    assert {path.stem: source_hashes(finished / "notebooks" / path.name) for path in NOTEBOOKS} == before
    append(finished / "alea_lib" / "core" / "stats.py")
    assert source_hashes(finished / "notebooks" / "06_measure.ipynb") != before["06_measure"]


def test_prose_captions_and_comments_of_notebooks_run_nothing(finished):
    for path in (finished / "notebooks").glob("*.ipynb"):
        notebook = json.loads(path.read_text())
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = "Other words."
            elif "mystnb" in cell["metadata"]:
                cell["metadata"]["mystnb"]["figure"]["caption"] = "Another caption."
                cell["source"] = ["# A comment.\n", *cell["source"]]
        path.write_text(json.dumps(notebook))
    assert to_run() == to_draw() == set()


def test_code_of_a_notebook_runs_it_and_its_readers(finished):
    path = finished / "notebooks" / "03_locate_layers.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"][-1]["source"] = ["1 + 1\n", *notebook["cells"][-1]["source"]]
    path.write_text(json.dumps(notebook))
    reasons = {job.label: reason for job, reason in study.to_run("scenes").items()}
    assert set(reasons) == with_readers({"03_locate_layers"}) and to_draw() == set()
    assert stale() == {"03_locate_layers"} and "06_read_chair" not in reasons
    assert reasons["03_locate_layers"] == "notebooks/03_locate_layers.ipynb has changed"
    assert reasons["06_measure-sft"] == "it reads 05_edit-sft, which runs again"


def test_what_only_draws_runs_nothing(finished):
    append(finished / "alea_lib" / "report" / "figures" / "common.py")
    assert to_run() == set()
    drawn = {job.label: reason for job, reason in study.to_draw("scenes").items()}
    assert set(drawn) <= labels(study.pages("scenes").values())
    assert len(drawn) > 15 and "06_measure-sft" not in drawn
    assert drawn["06_measure-alea-mixed"] == "alea_lib/report/figures/common.py has changed"


def test_an_evaluator_runs_only_what_computes_it(finished):
    append(finished / "alea_lib" / "metrics" / "mme.py")
    computing = stale()
    assert to_run() == with_readers(computing)
    assert {"06_measure-base", "06_measure-sft"} <= computing
    assert not computing & {"01_world", "02_activate", "05_adversary", "05_edit-sft", "11_edit_speed"}


def test_a_baseline_runs_only_what_names_it(finished):
    append(finished / "alea_lib" / "baselines" / "opera.py")
    assert stale() == set()
    profile = finished / "data" / "profiles" / "scenes.yaml"
    text = profile.read_text()
    assert "RIVALS: [truncation, stop-early," in text
    profile.write_text(text.replace("RIVALS: [truncation, stop-early,", "RIVALS: [opera, truncation, stop-early,"))
    job = next(job for job in profiles.plan("scenes") if job.stage == "07_rivals")
    write_record(job)
    assert stale() == set()
    append(finished / "alea_lib" / "baselines" / "opera.py", "MORE = 1")
    assert stale() == {"07_rivals"} and to_run() == with_readers({"07_rivals"})


def test_a_drawing_that_did_not_end_costs_no_numbers(finished, monkeypatch):
    """Its record is kept aside meanwhile, and comes back with its time if the results are the same."""
    append(finished / "alea_lib" / "report" / "figures" / "common.py")
    record = finished / "data" / "runs" / "scenes" / "02_activate" / "run.json"
    before, calls = record.stat().st_mtime, []

    def fails(command, **more):
        calls.append(command[4])
        (finished / "data" / "runs" / "scenes" / command[4] / "run.json").unlink()
        return type("Done", (), {"returncode": 1})

    job = next(job for job in profiles.plan("scenes") if job.stage == "02_activate")
    monkeypatch.setattr(study.subprocess, "run", fails)
    assert not study._draw("scenes", job) and calls == ["02_activate"]
    assert not record.exists() and to_run() == set()
    assert study.to_draw("scenes")[job] == "its last drawing did not end"

    def works(command, **more):
        write_record(job)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(study.subprocess, "run", works)
    assert study._draw("scenes", job) and record.stat().st_mtime == before
    assert "02_activate" not in to_draw() and to_run() == set()

    append(finished / "alea_lib" / "report" / "figures" / "common.py", "MORE = 1")
    monkeypatch.setattr(study.subprocess, "run", lambda *a, **k: (works(a), write_other(record))[0])
    assert study._draw("scenes", job) and record.stat().st_mtime > before  # Snakemake runs what reads it


def write_other(record):
    """Results that came out differently."""
    record.write_text(json.dumps({**json.loads(record.read_text()), "outputs_sha256": "other"}))


def test_only_records_that_do_not_stand_are_dropped(finished):
    """What Snakemake would run for its time alone keeps its record: a copied folder has other times."""
    os.utime(finished / "data" / "runs" / "scenes" / "05_edit-sft" / "run.json", (2_000_000, 2_000_000))
    study.refresh("scenes")
    assert all(study._own("scenes", job).exists() for job in profiles.plan("scenes"))
    (finished / "data" / "runs" / "scenes" / "05_edit-no-prefix" / "run.json").unlink()
    gone = with_readers({"05_edit-no-prefix"})
    study.refresh("scenes")
    assert {job.label for job in profiles.plan("scenes") if not study._own("scenes", job).exists()} == gone
    assert not (finished / "data" / "runs" / "scenes" / "results" / "metrics.csv").exists()


def test_drawing_goes_from_what_is_read_to_what_reads_it(finished, monkeypatch):
    append(finished / "alea_lib" / "report" / "figures" / "common.py")
    drawn, wanted = [], to_draw()
    monkeypatch.setattr(study, "_draw", lambda profile, job: drawn.append(job) or True)
    assert study.draw("scenes", 2)
    assert labels(drawn) == wanted
    for at, job in enumerate(drawn):
        assert not profiles.before(job) & set(drawn[at:])
    monkeypatch.setattr(study, "_draw", lambda profile, job: False)
    assert not study.draw("scenes", 2)
