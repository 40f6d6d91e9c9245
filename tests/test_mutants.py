"""Every fault in ``mutants.yaml`` is noticed by the test that it names.

Each runs in a process of its own on a copy of the library, two at a time in the background: a test here
waits for its own mutant alone.
"""

import multiprocessing
from pathlib import Path

import mutant_worker
import pytest
import yaml

from alea_lib.runs import root

HERE = Path(__file__).parent
MUTANTS = yaml.safe_load((HERE / "mutants.yaml").read_text(encoding="utf-8"))
NAMES = [m["name"] for m in MUTANTS]
CONTROL = "control"
PATIENCE = 280  # seconds that one run may take


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Name to a result to come; only what this session is going to look at is started."""
    chosen = [i for i in request.session.items if i.path == request.path and hasattr(i, "callspec")]
    wanted = {i.callspec.params["name"] for i in chosen}
    folder, repository = tmp_path_factory.mktemp("mutants"), str(root())
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(mutant_worker.HEAVY)
    with context.Pool(2, maxtasksperchild=1) as pool:
        everything = sorted({m["test"] for m in MUTANTS})
        found = {CONTROL: pool.apply_async(mutant_worker.run, (str(folder / CONTROL), repository, everything))}
        for number, m in enumerate(MUTANTS):
            if m["name"] in wanted:
                job = (str(folder / str(number)), repository, [m["test"]], m["file"], m["find"], m["replace"])
                found[m["name"]] = pool.apply_async(mutant_worker.run, job)
        yield found


def test_list_of_mutants():
    assert len(MUTANTS) >= 14 and len(set(NAMES)) == len(MUTANTS)
    for mutant in MUTANTS:
        assert set(mutant) == {"name", "why", "file", "find", "replace", "test"}
        source = mutant_worker.source(HERE.parent, mutant["file"]).read_text(encoding="utf-8")
        assert source.count(mutant["find"]) == 1, f"{mutant['name']}: mend `find` in tests/mutants.yaml"
        assert mutant["find"] != mutant["replace"]
        file, test = mutant["test"].split("::")
        assert f"def {test}(" in (HERE / file).read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_library_as_it_is_passes(runs):
    """Otherwise a mutant might be killed by something else."""
    code, printed = runs[CONTROL].get(PATIENCE)
    assert code == 0 and " passed" in printed and " skipped" not in printed, printed[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_mutant_is_noticed(runs, name):
    code, printed = runs[name].get(PATIENCE)
    assert code == 1 and "1 failed" in printed, f"exit code {code}: no test failed\n{printed[-3000:]}"
