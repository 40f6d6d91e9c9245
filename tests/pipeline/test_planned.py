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

LEFT_OUT = shutil.ignore_patterns("__pycache__", "runs", "models")
NOTEBOOKS = sorted((toy.HERE / "notebooks").glob("*.ipynb"))


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A copy of library, notebooks and profiles that can be edited."""
    for name in ("alea_lib", "notebooks"):
        shutil.copytree(toy.HERE / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(toy.HERE / "data", tmp_path / "data", ignore=LEFT_OUT)
    (tmp_path / "book").mkdir()
    for name in ("_config.yml", "book/_toc.yml"):
        shutil.copyfile(toy.HERE / name, tmp_path / name)
    monkeypatch.setenv("ALEA_ROOT", str(tmp_path))
    monkeypatch.setattr(sources, "PACKAGE", tmp_path / "alea_lib")
    return tmp_path


@pytest.fixture
def finished(repository):
    """The same, with the records of a finished study of the profile scenes."""
    joined = repository / "data" / "runs" / "scenes" / "results"
    joined.mkdir(parents=True)
    (joined / "metrics.csv").write_text("run_id\n")
    jobs = sorted(profiles.plan("scenes"), key=lambda job: job.after_collect)
    for time, job in enumerate(jobs, 1_000_000):
        write_record(job)
        folder = paths.run_dir("scenes", job.stage, job.variant)
        (folder / "notebook.ipynb").write_text("{}")
        os.utime(folder / "run.json", (time, time))
    last = max(time for time, job in enumerate(jobs, 1_000_000) if not job.after_collect)
    os.utime(joined / "metrics.csv", (last, last))
    return repository


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


def by_step(what: str) -> set[str]:
    """Labels of what would be run or drawn."""
    return {label for label, step in study.planned("scenes").items() if step.what == what}


def with_readers(labels: set[str]) -> set[str]:
    """These jobs, all that read them, and all that read the joined tables if those change."""
    jobs = profiles.plan("scenes")
    found = {job.label for job in jobs if labels & {job.label, *(earlier.label for earlier in study.before(job))}}
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
    assert {label: step for label, step in study.planned("scenes").items() if step.what} == {}


def test_comments_and_docstrings_change_no_source_of_any_notebook(repository):
    before = {path.stem: source_hashes(repository / "notebooks" / path.name) for path in NOTEBOOKS}
    files = sorted((repository / "alea_lib").rglob("*.py"))
    for path in files:
        path.write_text(documented(path.read_text(encoding="utf-8")))
    assert len(files) > 100 and all("# The end." in path.read_text() for path in files)
    assert {path.stem: source_hashes(repository / "notebooks" / path.name) for path in NOTEBOOKS} == before
    append(repository / "alea_lib" / "stats.py")
    assert source_hashes(repository / "notebooks" / "06_measure.ipynb") != before["06_measure"]


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
    assert by_step("run") == by_step("draw") == set()


def test_code_of_a_notebook_runs_it_and_its_readers(finished):
    path = finished / "notebooks" / "03_locate_layers.ipynb"
    notebook = json.loads(path.read_text())
    notebook["cells"][-1]["source"] = ["1 + 1\n", *notebook["cells"][-1]["source"]]
    path.write_text(json.dumps(notebook))
    assert by_step("run") == with_readers({"03_locate_layers"}) and by_step("draw") == set()
    assert stale() == {"03_locate_layers"} and "06_read_chair" not in by_step("run")
    assert study.planned("scenes")["03_locate_layers"].reason == "notebooks/03_locate_layers.ipynb has changed"


def test_what_only_draws_runs_nothing(finished):
    append(finished / "alea_lib" / "figures" / "common.py")
    steps = study.planned("scenes")
    shown = {job.label for job in study.pages("scenes").values()}
    assert by_step("run") == set()
    assert {label for label, step in steps.items() if step.what == "draw"} <= shown
    assert len(by_step("draw")) > 15 and steps["06_measure-sft"].what == ""
    assert steps["06_measure-alea-mixed"] == study.Step("draw", "alea_lib/report/figures/common.py has changed")


def test_an_evaluator_runs_only_what_computes_it(finished):
    computing = {
        job.label
        for job in profiles.plan("scenes")
        if "alea_lib/metrics/mme.py" in json.loads(study._record("scenes", job).read_text())["sources"]
    }
    append(finished / "alea_lib" / "measures" / "mme.py")
    assert stale() == computing and by_step("run") == with_readers(computing)
    assert "06_measure-base" in computing
    if not registry_of_every_file(finished):
        assert not computing & {"01_world", "02_activate", "05_adversary", "11_edit_speed"}


def registry_of_every_file(folder) -> bool:
    """Until each method is imported by its name alone."""
    return "MODULES" not in (folder / "alea_lib" / "rivals" / "registry.py").read_text()


def test_a_rival_runs_only_what_names_it(finished):
    append(finished / "alea_lib" / "rivals" / "opera.py")
    if registry_of_every_file(finished):
        pytest.skip("the registry imports every file beside it")
    assert stale() == set()
    profile = finished / "data" / "profiles" / "scenes.yaml"
    text = profile.read_text()
    assert "RIVALS: [truncation, stop-early," in text
    profile.write_text(text.replace("RIVALS: [truncation, stop-early,", "RIVALS: [opera, truncation, stop-early,"))
    job = next(job for job in profiles.plan("scenes") if job.stage == "07_rivals")
    write_record(job)
    assert stale() == set()
    append(finished / "alea_lib" / "rivals" / "opera.py", "MORE = 1")
    assert stale() == {"07_rivals"}


def test_a_run_made_later_or_by_hand_wakes_its_readers_alone(finished):
    os.utime(finished / "data" / "runs" / "scenes" / "05_edit-sft" / "run.json", (2_000_000, 2_000_000))
    steps = study.planned("scenes")
    assert steps["05_edit-sft"].what == ""
    assert steps["06_measure-sft"] == study.Step("run", "it reads 05_edit-sft, which was run later")
    assert steps["06_measure-alea-mixed"].what == "" and steps["06_compare"].what == "run"


def test_a_drawing_that_did_not_end_costs_no_numbers(finished, monkeypatch):
    """Its record is kept aside meanwhile, and comes back with its time if the results are the same."""
    append(finished / "alea_lib" / "figures" / "common.py")
    record = finished / "data" / "runs" / "scenes" / "02_activate" / "run.json"
    before, calls = record.stat().st_mtime, []

    def fails(command, **more):
        calls.append(command[4])
        (finished / "data" / "runs" / "scenes" / command[4] / "run.json").unlink()
        return type("Done", (), {"returncode": 1})

    job = next(job for job in profiles.plan("scenes") if job.stage == "02_activate")
    monkeypatch.setattr(study.subprocess, "run", fails)
    assert not study._draw("scenes", job) and calls == ["02_activate"]
    assert not record.exists() and by_step("run") == set()
    assert study.planned("scenes")["02_activate"] == study.Step("draw", "its last drawing did not end")

    def works(command, **more):
        write_record(job)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(study.subprocess, "run", works)
    assert study._draw("scenes", job) and record.stat().st_mtime == before
    assert study.planned("scenes")["02_activate"].what == "" and by_step("run") == set()

    append(finished / "alea_lib" / "figures" / "common.py", "MORE = 1")
    monkeypatch.setattr(study.subprocess, "run", lambda *a, **k: (works(a), write_other(record))[0])
    assert study._draw("scenes", job) and record.stat().st_mtime > before
    assert "05_edit-sft" in by_step("run")


def write_other(record):
    """Results that came out differently."""
    record.write_text(json.dumps({**json.loads(record.read_text()), "outputs_sha256": "other"}))


def test_only_records_that_do_not_stand_are_dropped(finished):
    """What Snakemake would run for its time alone keeps its record: a copied folder has other times."""
    os.utime(finished / "data" / "runs" / "scenes" / "05_edit-sft" / "run.json", (2_000_000, 2_000_000))
    study.refresh("scenes")
    assert all(study._record("scenes", job).exists() for job in profiles.plan("scenes"))
    (finished / "data" / "runs" / "scenes" / "05_edit-no-prefix" / "run.json").unlink()
    gone = with_readers({"05_edit-no-prefix"})
    study.refresh("scenes")
    assert {job.label for job in profiles.plan("scenes") if not study._record("scenes", job).exists()} == gone
    assert not (finished / "data" / "runs" / "scenes" / "results" / "metrics.csv").exists()


def test_drawing_goes_from_what_is_read_to_what_reads_it(finished, monkeypatch):
    append(finished / "alea_lib" / "figures" / "common.py")
    drawn = []
    monkeypatch.setattr(study, "_draw", lambda profile, job: drawn.append(job) or True)
    assert study.draw("scenes", 2)
    assert {job.label for job in drawn} == {k for k, s in study.planned("scenes").items() if s.what == "draw"}
    for at, job in enumerate(drawn):
        assert not study.before(job) & set(drawn[at:])
    monkeypatch.setattr(study, "_draw", lambda profile, job: False)
    assert not study.draw("scenes", 2)
