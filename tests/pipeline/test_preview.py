"""What a profile would do and need, said before anything starts; and models of the hub by a pinned row."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toy
from conftest import build_tiny

from alea_lib.core.paths import RunError, root
from alea_lib.models import hub
from alea_lib.pipeline import checks, preview, profiles
from alea_lib.pipeline.__main__ import main
from alea_lib.pipeline.checks import Gpu
from alea_lib.pipeline.execute import execute
from alea_lib.pipeline.profiles import load_profile, settings
from alea_lib.pipeline.record import begin
from alea_lib.pipeline.sources import source_hashes
from alea_lib.pipeline.study import stale_reason, study

REVISION = "b234b804b114d9e37bb655e11cbbb5f5e971b7a9"
PROFILES = ("llava-1.5-7b", "llava-1.5-7b-t4")
ROW = {"hub": "some/model", "revision": "a" * 40, "dtype": "float16", "four_bit": True}
ROOT = root()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setenv("ALEA_ROOT", str(toy.whole_repository(tmp_path)))
    return tmp_path


@pytest.fixture
def fit(monkeypatch):
    """A machine that can carry both profiles."""
    monkeypatch.setattr(checks, "gpu", lambda: Gpu("a card", 24.0, 8.6))
    monkeypatch.setattr(checks, "free_gib", lambda: 200.0)
    monkeypatch.setattr(checks, "host_gib", lambda: 32.0)
    monkeypatch.setattr(checks, "version", lambda name: "2.0.0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")


def write_rows(folder, **found):
    (folder / "data" / "hub.yaml").write_text(json.dumps(found))


def failed(profile):
    return {c.what: c.found for c in preview.preview(profile).checks if not c.ok}


# ---- the two profiles


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_of_the_real_model_is_whole(profile, fit):
    found = preview.preview(profile)
    assert not [c for c in found.checks if not c.ok]
    assert set(found.stages["source"]) == {"not measured"} and found.stages["seconds"].isna().all()
    assert REVISION[:12] in found.about
    needs = profiles.read_profile(profile).needs
    disk = preview._left(found.stages, found.downloads) / 2**30
    assert disk + checks.MARGIN < needs.disk_gib < 2.5 * disk
    assert found.stages["gpu_gib"].max() < needs.gpu_gib
    missing = found.downloads.loc[~found.downloads["there"].astype(bool), "bytes"].sum() / 1e9
    assert missing < needs.download_gb + 1 and found.downloads["bytes"].iloc[0] == 14_126_854_144


@pytest.mark.parametrize("profile", PROFILES)
def test_the_row_and_the_profile_agree(profile):
    asked, row = load_profile(profile), hub.model_row(load_profile(profile)["model"])
    assert row.hub == "llava-hf/llava-1.5-7b-hf" and row.revision == REVISION and row.four_bit and row.cache
    assert row.dtype == asked["needs"]["dtype"] and asked["four_bit"] is True


def test_other_profiles_can_be_planned(capsys):
    for profile in ("scenes", "smoke", "thorough"):
        assert main(["plan", "--profile", profile]) == 0
    told = capsys.readouterr().out
    pairs = settings(load_profile("scenes"), "05_edit", "alea-mixed")["N_PAIRS"]
    assert "05_edit-alea-mixed" in told and f"N_PAIRS={pairs}" in told and "the profile states no needs" in told


def test_times_are_measured_or_unknown(repository):
    stages = preview.preview("toy").stages.set_index("stage")
    assert set(stages["source"]) == {"not measured"} and stages["seconds"].isna().all()
    assert "make run NB=01_make PROFILE=toy PARAMS=" in preview.text(preview.preview("toy"))
    (repository / "data" / "results" / "toy").mkdir(parents=True)
    (repository / "data" / "results" / "toy" / "runs.csv").write_text("stage,seconds\n02_edit-weak,12.5\n")
    run = begin("01_make", "toy", SIZE=None, WORLD=None)
    (run.dir / "made.txt").write_text("x" * 1000)
    run.finish()
    stages = preview.preview("toy").stages.set_index("stage")
    assert stages.loc["02_edit-weak", ["seconds", "source"]].tolist() == [12.5, "measured, data/results"]
    assert stages.loc["01_make", ["state", "source"]].tolist() == ["finished", "measured here"]
    assert stages.loc["01_make", "disk_gib"] * 2**30 > 1000
    told = preview.text(preview.preview("toy"))
    assert "and 5 stages of unknown time" in told and "short probe" in told


def test_the_time_of_a_probe_is_not_that_of_the_stage(repository):
    """A run with other parameters will be run again, so it is neither finished nor a measure of what is to come."""
    begin("01_make", "toy", SIZE=1, WORLD=None).finish()
    stages = preview.preview("toy").stages.set_index("stage")
    assert stages.loc["01_make", ["state", "source"]].tolist() == ["to do", "measured here with other parameters"]
    assert stages["seconds"].notna().sum() == 1 and "unknown time" not in preview.text(preview.preview("toy"))


@pytest.mark.parametrize(("seconds", "told"), [(1e5, "27.8 h still to run, 24 h allowed; lower"), (float("nan"), "")])
def test_hours_are_checked_where_all_are_measured(fit, seconds, told):
    needs = profiles.read_profile("llava-1.5-7b").needs
    checked = {c.what: c for c in checks.run_checks(needs, "", None, float("nan"), 0.0, seconds)}["time"]
    assert checked.ok == (not told) and (told or "unknown: not every stage was measured") in checked.found


def test_stages_that_are_finished_take_no_more_time(repository):
    path = repository / "data" / "profiles" / "toy.yaml"
    path.write_text(path.read_text() + "needs: {hours: 0.001}\n")
    labels = [job.label for job in profiles.plan("toy")]
    (repository / "data" / "results" / "toy").mkdir(parents=True)
    table = "".join(f"{label},1000\n" for label in labels)
    (repository / "data" / "results" / "toy" / "runs.csv").write_text("stage,seconds\n" + table)
    assert "1.9 h still to run" in failed("toy")["time"]
    finish_all()
    assert "time" not in failed("toy")


def finish_all():
    """Finish every run of the toy profile without its notebook."""
    names = {"01_make": ("SIZE", "WORLD"), "02_edit": ("LR",)}
    for job in profiles.plan("toy"):
        begin(job.stage, "toy", job.variant, **dict.fromkeys(names.get(job.stage, ()))).finish()


def test_a_finished_study_has_nothing_left_to_write(repository, monkeypatch):
    """No bytes left is a known number: it asks for the margin alone, not for the whole study's disk."""
    monkeypatch.setattr(checks, "free_gib", lambda: 3.0)
    path = repository / "data" / "profiles" / "toy.yaml"
    path.write_text(path.read_text() + "needs: {disk_gib: 75}\n")
    assert "77.0 GiB are still to be written" in failed("toy")["free disk"]
    finish_all()
    assert "free disk" not in failed("toy")


def test_the_rows_of_models_are_no_source_of_a_result():
    """A batch that is lowered may not run every stage again: data/hub.yaml is recorded by what results depend on."""
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        assert "data/hub.yaml" not in source_hashes(notebook)


def test_a_plan_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "from alea_lib.pipeline.__main__ import main\n"
        "code = main(['plan', '--profile', 'llava-1.5-7b'])\n"
        "sys.exit(code not in (0, 1))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "14.13 GB" in done.stdout and "05_edit-alea-mixed" in done.stdout


# ---- checks


def test_a_machine_without_a_card_is_told_everything_at_once(monkeypatch):
    monkeypatch.setattr(checks, "gpu", lambda: None)
    monkeypatch.setattr(checks, "free_gib", lambda: 3.0)
    monkeypatch.setattr(checks, "host_gib", lambda: 4.0)
    monkeypatch.setattr(checks, "version", lambda name: "2.0+cpu" if name == "torch" else "")
    monkeypatch.setattr(checks, "in_cache", lambda row: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = failed("llava-1.5-7b")
    assert set(found) == {"GPU", "free disk", "host memory", "PyTorch", "bitsandbytes", "model"}
    assert "HF_HUB_OFFLINE=0" in found["model"] and "make room" in found["free disk"]
    with pytest.raises(RunError, match="cannot reach its end here, so nothing was started: .*GPU.*PyTorch.*model"):
        preview.require("llava-1.5-7b")


def test_a_t4_has_no_bfloat16(fit, monkeypatch):
    monkeypatch.setattr(checks, "gpu", lambda: Gpu("Tesla T4", 15.0, 7.5))
    assert set(failed("llava-1.5-7b")) == {"GPU", "computation"}
    assert "llava-1.5-7b-t4" in failed("llava-1.5-7b")["computation"]
    assert not failed("llava-1.5-7b-t4")


def test_a_step_that_does_not_fit_is_seen_before(fit, monkeypatch):
    row = hub.model_row("llava-1.5-7b").model_copy(update={"write": 100})
    monkeypatch.setattr(hub, "model_row", lambda key: row)
    assert set(failed("llava-1.5-7b")) == {"largest step"}


def test_what_is_there_need_not_be_downloaded(fit, monkeypatch):
    before = preview.preview("llava-1.5-7b")
    monkeypatch.setattr(checks, "in_cache", lambda row: True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    after = preview.preview("llava-1.5-7b")
    assert not [c for c in after.checks if not c.ok]
    saved = preview._left(before.stages, before.downloads) - preview._left(after.stages, after.downloads)
    assert saved == 14_126_854_144


def test_nothing_starts_that_cannot_finish(repository, monkeypatch):
    path = repository / "data" / "profiles" / "toy.yaml"
    path.write_text(path.read_text() + "needs: {host_gib: 1000000}\n")
    for act in (lambda: execute("01_make", "toy"), lambda: study("toy", 1)):
        with pytest.raises(RunError, match=r"host memory: .* 1e\+06 GiB needed"):
            act()
    assert not (repository / "data" / "runs").exists()


def test_the_driver_is_asked(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA A10, 23028, 8.6'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert checks.gpu() == Gpu("NVIDIA A10", 23028 / 1024, 8.6)
    tool.write_text("#!/bin/sh\necho 'No devices were found'\n")
    assert checks.gpu() is None


# ---- names and values


@pytest.mark.parametrize(
    "line, told",
    [
        ("needs: {speed: 3}", "needs: has no entry speed; there are disk_gib"),
        ("needs: {gpu_gb: 3}", r"no entry gpu_gb; did you mean gpu_gib\?; there are"),
        ("needs: {dtype: float8}", "needs: dtype is 'float8', it must be 'float32', 'float16' or 'bfloat16'"),
        ("needs: {hours: soon}", "needs: hours is 'soon', it must be a valid number"),
        ("needs: {disk_gib: -1}", "disk_gib is -1, it must be greater than or equal to 0"),
        ("bok: false", r"toy.yaml: has no entry bok; did you mean book\?; there are book"),
        ("max_new_tokens: 0", "max_new_tokens is 0, it must be greater than or equal to 1"),
        ("four_bit: 1", "four_bit is 1, it must be a valid boolean"),
        ("size: 3", "no entry size"),
    ],
)
def test_a_profile_that_cannot_be_meant(repository, line, told):
    path = repository / "data" / "profiles" / "toy.yaml"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(RunError, match=told):
        preview.preview("toy")


@pytest.mark.parametrize(
    "old, new, told",
    [
        ("  01_make: {SIZE: 4}", "  01_make: [SIZE]", r"stages: 01_make is \['SIZE'\], it must be a valid dictionary"),
        ("03_measure: base", "03_measure: bass", "page_variant: 03_measure is 'bass', it must be one of base, weak"),
        ("  02_edit: {weak", "  02_edti: {weak", r"names 02_edti, which is not among its stages; did you mean 02_edit"),
    ],
)
def test_sections_that_cannot_be_meant(repository, old, new, told):
    path = repository / "data" / "profiles" / "toy.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(RunError, match=told) as error:
        load_profile("toy")
    assert "\n" not in str(error.value) and "data/profiles/toy.yaml" in str(error.value)


def test_a_file_that_is_no_yaml(repository):
    (repository / "data" / "profiles" / "toy.yaml").write_text("stages: {01_make: [\n")
    with pytest.raises(RunError, match="data/profiles/toy.yaml is no YAML: .*line 2") as error:
        load_profile("toy")
    assert "\n" not in str(error.value)


def test_what_stages_read_is_a_list_of_names(repository):
    (repository / "notebooks" / "stages.yaml").write_text("01_make: 3\n")
    with pytest.raises(RunError, match="notebooks/stages.yaml: 01_make is 3, it must be a valid list"):
        profiles.plan("toy")


def test_unknown_names_are_errors(repository, capsys):
    assert main(["plan", "--profile", "nope"]) == 1
    path = repository / "data" / "profiles" / "toy.yaml"
    whole = path.read_text()
    path.write_text(whole.replace("LR: 1e-3", "LRR: 1e-3"))
    with pytest.raises(RunError, match=r"has no parameter LRR .*; it has PROFILE, .*; did you mean LR\?$"):
        preview.preview("toy")
    path.write_text(whole.replace("01_make: {SIZE: 4}", "01_make: {}"))
    with pytest.raises(RunError, match="01_make: no value for SIZE: set it in data/profiles/toy.yaml"):
        preview.preview("toy")


@pytest.mark.parametrize(
    "change, told",
    [
        ({"revision": "main"}, "revision is 'main', it must be a whole commit"),
        ({"dtype": "half"}, "dtype is 'half'"),
        ({"write": 0}, "write is 0"),
        ({"dtyp": "float16"}, r"has no entry dtyp; did you mean dtype\?; there are cache"),
        ({"colour": 1}, "has no entry colour; there are cache"),
        ({"see": "many"}, "mine: see is 'many', it must be a valid integer"),
    ],
)
def test_rows_that_cannot_be_meant(repository, change, told):
    write_rows(repository, mine={**ROW, **change})
    with pytest.raises(RunError, match=told):
        hub.model_row("mine")


def test_a_row_is_a_mapping(repository):
    write_rows(repository, mine=["some/model"])
    with pytest.raises(RunError, match="data/hub.yaml: mine: .* must be a valid dictionary"):
        hub.model_row("mine")


def test_a_row_needs_a_revision(repository):
    write_rows(repository, mine={"hub": "some/model"})
    with pytest.raises(RunError, match="mine: lacks revision"):
        hub.model_row("mine")
    assert hub.model_row("other") is None


# ---- runs of hub models


def test_a_run_records_a_model_of_the_hub(repository):
    write_rows(repository, mine=ROW)

    def inputs():
        run = begin("01_make", "toy", SIZE=None, WORLD=None)
        run.uses("data/models/mine/model.safetensors")
        (run.dir / "made.txt").write_text("x")
        run.finish()
        (run.dir / "notebook.ipynb").write_text("{}")
        return run.inputs, run.run_id

    found, name = inputs()
    assert found["data/hub.yaml: mine"]["revision"] == "a" * 40
    job = next(j for j in preview.profiles.plan("toy") if j.stage == "01_make")
    write_rows(repository, mine={**ROW, "write": 3})  # how many fit is no part of a result
    assert inputs() == (found, name) and not stale_reason("toy", job)
    write_rows(repository, mine={**ROW, "revision": "c" * 40})
    assert stale_reason("toy", job) == "the row of mine in data/hub.yaml has changed"
    assert inputs()[1] != name


def test_a_run_records_a_model_in_another_folder(repository, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    run = begin("01_make", "toy", SIZE=None, WORLD=None)
    run.uses(f"data/models/{folder}/model.safetensors")
    assert list(run.inputs) == ["model theirs"] and str(folder.parent) not in json.dumps(run.inputs)
    with pytest.raises(RunError, match="reads model.safetensors, which is not there"):
        run.uses("data/models/nobody/model.safetensors")


def test_a_hub_name_is_recorded_by_the_commit_in_the_cache(repository, monkeypatch):
    config = Path("cache", "d" * 40, "config.json")
    monkeypatch.setattr(hub, "cached", lambda name, file: config if name == "some/one" else None)
    run = begin("01_make", "toy", SIZE=None, WORLD=None)
    run.uses("data/models/some/one/model.safetensors")
    assert run.inputs["hub some/one"]["revision"] == "d" * 40


# ---- loading by a row


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model in half precision, as it lies in the hub's cache."""
    folder, tiny = tmp_path_factory.mktemp("hub") / "snapshot", build_tiny()
    tiny.model.half().save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def hub_model(saved, repository, monkeypatch):
    """A row for that model, whose snapshot is there."""
    folder = saved
    monkeypatch.setattr("alea_lib.models.loading.snapshot", lambda row: folder)
    write_rows(repository, mine={**ROW, "see": 2, "write": 3, "read": 4, "train": 1, "keep_gib": 0.5, "cache": True})
    return folder


def test_a_model_is_loaded_as_its_row_says(hub_model, repository):
    import torch

    from alea_lib.models.batch import Limits
    from alea_lib.models.delta import delta_of, load_delta, save_delta
    from alea_lib.models.hooks import full_weight
    from alea_lib.models.loading import load

    pytest.importorskip("bitsandbytes")
    vlm = load("mine", device="cpu")
    assert vlm.model.dtype == torch.float16 and vlm.revision == "a" * 40
    assert vlm.limits == Limits(2, 3, 4, 1, 2**29) and vlm.cache == repository / "data" / "runs" / "features"
    linear = {n: m for n, m in vlm.model.named_modules() if isinstance(m, torch.nn.Linear)}
    packed = {n for n, m in linear.items() if m.weight.dtype == torch.uint8}
    assert packed == {n for n in linear if "language_model.layers" in n and "down_proj" not in n}
    assert vlm.model.config._attn_implementation == "sdpa"
    name = vlm.address("down_proj", 1)
    delta = delta_of(vlm, {name: full_weight(vlm, name) + 0.1}, {})
    save_delta(delta, repository / "delta.safetensors")
    info = load_delta(repository / "delta.safetensors").info
    assert info["model"] == "mine" and info["revision"] == "a" * 40
    more = load("mine", device="cpu", edited_layers=(0,), edited_parts=("o_proj",))
    assert more.module("o_proj", 0).weight.dtype == torch.float16 == more.module("down_proj", 3).weight.dtype


def test_an_adapter_names_the_hubs_model(hub_model, repository):
    pytest.importorskip("peft")
    import torch

    from alea_lib.edit.export import export_adapter
    from alea_lib.models.delta import Delta

    name = "model.language_model.layers.1.mlp.down_proj"
    delta = Delta(
        {name: torch.randn(64, 2) @ torch.randn(2, 128)}, {name: "x"}, {"model": "mine", "revision": "a" * 40}
    )
    told = json.loads((export_adapter(delta, repository / "adapter") / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "some/model" and told["revision"] == "a" * 40


def test_a_pinned_model_that_is_not_there(repository, monkeypatch, tmp_path):
    from alea_lib.models.loading import load

    write_rows(repository, mine=ROW)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="some/model at aaaaaaaaaaaa was not downloaded.*HF_HUB_OFFLINE=0"):
        load("mine")


def test_in_cache_means_every_shard(monkeypatch, tmp_path):
    row = hub.ModelRow(key="mine", hub="some/model", revision="a" * 40)
    folder = tmp_path / "models--some--model" / "snapshots" / row.revision
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder.mkdir(parents=True)
    assert not checks.in_cache(row)
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "one.safetensors").write_text("")
    assert not checks.in_cache(row)
    (folder / "two.safetensors").write_text("")
    assert checks.in_cache(row)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "model.safetensors").write_text("")
    assert checks.in_cache(row)
