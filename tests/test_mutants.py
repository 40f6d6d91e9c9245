"""Every fault in ``mutants.yaml`` is noticed by the test that it names.

Each runs in a process of its own on a copy of the library, two at a time in the background: a test here
waits for its own mutant alone.
"""

import ast
import multiprocessing
from pathlib import Path

import mutant_worker
import pytest
import yaml
from mutant_source import MutantError, mutated, parse_pair, resolve

from alea_lib.core.paths import root

HERE = Path(__file__).parent
LIBRARY = HERE.parent / "alea_lib"
MUTANTS = yaml.safe_load((HERE / "mutants.yaml").read_text(encoding="utf-8"))
NAMES = [m["name"] for m in MUTANTS]
CONTROL = "control"
PATIENCE = 280  # seconds that one run may take


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Name to a result to come; only what this session is going to look at is started."""
    chosen = [i for i in request.session.items if i.path == request.path]
    wanted = {i.callspec.params.get("name") for i in chosen if hasattr(i, "callspec")}
    folder, repository = tmp_path_factory.mktemp("mutants"), str(root())
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(mutant_worker.HEAVY)
    with context.Pool(2, maxtasksperchild=1) as pool:
        found = {}
        if any(i.name == test_the_library_as_it_is_passes.__name__ for i in chosen):
            everything = sorted({located(m["test"]) for m in MUTANTS})
            found[CONTROL] = pool.apply_async(mutant_worker.run, (str(folder / CONTROL), repository, everything))
        for number, m in enumerate(MUTANTS):
            if m["name"] in wanted:
                change = (m["where"], m["find"], m["replace"])
                job = (str(folder / str(number)), repository, [located(m["test"])], change)
                found[m["name"]] = pool.apply_async(mutant_worker.run, job)
        yield found


def located(test: str) -> str:
    """file::function of an entry as path::function below tests. The file may lie in any folder there; where several
    have its name, the entry gives the folder too: room/file::function."""
    name, function = test.split("::")
    paths = [path for path in HERE.rglob(Path(name).name) if path.match(name)]
    assert len(paths) == 1, f"tests has {len(paths)} files {name}, expected one: name its folder"
    assert f"def {function}(" in paths[0].read_text(encoding="utf-8"), f"{name} has no {function}"
    return f"{paths[0].relative_to(HERE)}::{function}"


def test_list_of_mutants():
    assert len(MUTANTS) >= 14 and len(set(NAMES)) == len(MUTANTS)
    wrong = []
    for mutant in MUTANTS:
        assert set(mutant) == {"name", "why", "where", "find", "replace", "test"}
        try:
            path, source = mutated(LIBRARY, mutant["where"], mutant["find"], mutant["replace"])
        except MutantError as error:
            wrong.append(f"{mutant['name']}: {error}")
            continue
        assert source != ast.unparse(ast.parse(path.read_text(encoding="utf-8"))) + "\n", f"{mutant['name']}: no change"
        try:
            located(mutant["test"])
        except AssertionError as error:
            wrong.append(f"{mutant['name']}: {error}")
    assert not wrong, "correct tests/mutants.yaml\n" + "\n".join(wrong)


SOURCE = '''
def f(x, y):
    """Doc."""
    if x and y:  # a comment
        g(x, sign="+", scale=y)
    total = {"a": x, "b": y}
    scale = y
    return [k for k in total
            if k != 'a']


class C:
    def f(self):
        return f(1, 2)
'''


@pytest.fixture
def package(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "old.py").write_text(SOURCE)
    (tmp_path / "other.py").write_text("def f():\n    return 1\n\n\ndef h():\n    return 1 + 1\n")
    return tmp_path


@pytest.mark.parametrize(
    ("find", "replace", "line"),
    [
        ("x   and y", "x or y", "    if x or y:"),  # an expression
        ("scale=y", "scale=x", "        g(x, sign='+', scale=x)"),  # a keyword argument is no assignment
        ("scale = y", "scale = x", "    scale = x"),
        ('"b": y', "'b': x", "    total = {'a': x, 'b': x}"),  # one item of a dict
        ('g(x,\n  sign="+", scale=y)', "pass", "        pass"),  # a statement
        ('[k for k in total if k != "a"]', "[]", "    return []"),  # quotes and line breaks do not matter
    ],
)
def test_a_fault_is_planted_by_its_tree(package, find, replace, line):
    path, source = mutated(package, "deep.old.f", find, replace)
    assert path == package / "deep" / "old.py"
    changed = set(source.splitlines()) - set(ast.unparse(ast.parse(SOURCE)).splitlines())
    assert changed == {line}


@pytest.mark.parametrize("find, count", [("x", 3), ("x or y", 0), ("f(1, 2)", 0)])
def test_a_fault_has_one_place(package, find, count):
    with pytest.raises(MutantError, match=f"deep.old.f has {count} of"):
        mutated(package, "deep.old.f", find, "0")


def test_a_function_is_found_where_it_has_moved(package):
    assert resolve(package, "gone.old.C.f") == (package / "deep" / "old.py", "C.f")
    assert resolve(package, "C.f") == (package / "deep" / "old.py", "C.f")
    assert resolve(package, "gone.h") == (package / "other.py", "h")
    with pytest.raises(MutantError, match="gone.f is in deep/old.py, other.py: name its module"):
        resolve(package, "gone.f")
    with pytest.raises(MutantError, match="has no gone.k"):
        resolve(package, "gone.k")


def test_a_fault_may_lie_in_the_gpu_check(tmp_path):
    library, check = tmp_path / "alea_lib", tmp_path / "tests" / "gpu"
    library.mkdir()
    check.mkdir(parents=True)
    (check / "costs.py").write_text("class Meter:\n    def clock(self):\n        return 1\n")
    assert resolve(library, "tests.gpu.costs.Meter.clock") == (check / "costs.py", "Meter.clock")
    with pytest.raises(MutantError, match="alea_lib has no gpu.costs.Meter.clock"):
        resolve(library, "gpu.costs.Meter.clock")


def test_an_entry_names_the_folder_of_its_test_where_names_are_not_unique():
    assert located("models/test_families.py::test_padding_changes_no_logits").startswith("models/")
    with pytest.raises(AssertionError, match="name its folder"):
        located("test_families.py::test_padding_changes_no_logits")


def test_the_two_sides_of_a_fault_are_of_a_kind():
    with pytest.raises(MutantError, match="not both"):
        parse_pair("x = 1", "if x:")


@pytest.mark.slow
@pytest.mark.mutants
def test_the_library_as_it_is_passes(runs):
    """Otherwise a mutant might be killed by something else."""
    code, printed = runs[CONTROL].get(PATIENCE)
    assert code == 0 and " passed" in printed and " skipped" not in printed, printed[-3000:]


@pytest.mark.slow
@pytest.mark.mutants
@pytest.mark.parametrize("name", NAMES)
def test_mutant_is_noticed(runs, name):
    code, printed = runs[name].get(PATIENCE)
    assert code == 1 and "1 failed" in printed, f"exit code {code}: no test failed\n{printed[-3000:]}"
