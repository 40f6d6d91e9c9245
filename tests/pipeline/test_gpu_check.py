"""The GPU check, run on a CPU with a tiny architecture: the same code, scaled by parameters."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from conftest import build_tiny
from gpu import __main__ as command_line
from gpu import costs, shape
from gpu.parts import agreement
from gpu.report import bars, write_report
from gpu.settings import FILES, KERNELS, LABEL, PARTS, RATIO, SIZES

from alea_lib.core.files import write_csv
from alea_lib.core.paths import root
from alea_lib.core.tables import read_csv
from alea_lib.locate.tokens import suspects
from alea_lib.models.families import FAMILIES

CPU = torch.device("cpu")


# ---- the architecture


def test_the_large_size_is_llava_1_5_7b():
    """The published numbers of parameters, counted on a model without memory."""
    from accelerate import init_empty_weights
    from transformers import LlavaForConditionalGeneration

    reader = shape._reader(SIZES["7b"])
    with init_empty_weights():
        model = LlavaForConditionalGeneration(shape.config(SIZES["7b"], reader.tokenizer))
    count = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_modules()}
    assert count[""] == 7_063_427_072 and count["model.multi_modal_projector"] == 20_979_712
    assert count["model.vision_tower"] == 303_507_456 and count["lm_head"] == 131_334_144
    assert model.config.image_seq_length == 576 and shape.edited_layers(SIZES["7b"]) == (28, 29, 30, 31)
    assert reader.image_processor.crop_size["height"] == 336


def test_what_is_quantised_is_what_load_quantises(tmp_path):
    pytest.importorskip("bitsandbytes")
    from alea_lib.models.loading import load

    tiny = build_tiny()
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    loaded = load(str(tmp_path), four_bit=True, edited_layers=(1, 3), device="cpu")
    row = FAMILIES["llava-small"]
    shape.materialise(
        tiny.model, (*row.unquantised, *(row.down_proj.format(i=i) for i in (1, 3))), CPU, torch.float32, 0
    )
    kinds = [
        {n: (type(m), m.weight.dtype) for n, m in v.model.named_modules() if hasattr(m, "weight")}
        for v in (loaded, tiny)
    ]
    assert kinds[0] == kinds[1] and sum(d == torch.uint8 for _, d in kinds[0].values()) == 4 * 7 - 2


def test_the_random_model_is_whole_and_comes_again_from_its_seed():
    pytest.importorskip("bitsandbytes")
    size = SIZES["tiny"]
    a, b, c = (shape.random_llava(size, CPU, torch.float32, seed) for seed in (0, 0, 1))
    weights = [v.module("down_proj", 3).weight for v in (a, b, c)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].std().item() == pytest.approx(shape.STD, rel=0.05)
    assert a.module("down_proj", 1).weight.dtype == torch.uint8 and weights[0].dtype == torch.float32
    rotary = a.language_model.rotary_emb.inv_freq
    assert rotary[0] == 1 and (rotary.diff() < 0).all(), "buffers are computed, not random"
    assert (a.language_model.norm.weight == 1).all()


def test_pairs_are_of_the_wanted_length_and_name_what_is_wrong(tiny):
    table = costs.made_pairs(3, 20)
    for row in table.itertuples():
        assert row.positive.count(".") == row.negative.count(".") == 20
        truthful, wrong, kept = suspects(tiny, row.positive, row.negative, row.wrong)
        assert (len(truthful), len(wrong), len(kept)) == (20, 10, 10)


# ---- what each step costs


def test_each_act_is_measured_between_two_waits(monkeypatch):
    """Kernels are queued: a clock read without waiting shows when they were asked for, not when they were done."""
    calls = []
    for name in (
        "synchronize",
        "empty_cache",
        "reset_peak_memory_stats",
        "max_memory_allocated",
        "max_memory_reserved",
    ):
        value = {"max_memory_allocated": 3 * 2**30, "max_memory_reserved": 2**32}.get(name)
        monkeypatch.setattr(torch.cuda, name, lambda *a, name=name, value=value: calls.append(name) or value)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: calls.append("clock") or float(calls.count("clock")))
    cost = costs.Meter(torch.device("cuda"))(lambda: calls.append("act"))
    assert calls == [
        "synchronize", "empty_cache", "reset_peak_memory_stats", "synchronize", "clock", "act", "synchronize", "clock",
        "max_memory_allocated", "max_memory_reserved",
    ]  # fmt: skip
    assert cost == {"seconds": 1.0, "peak_gib": 3.0, "reserved_gib": 4.0}


class FakeBench:
    def __init__(self, size, device):
        self.vlm = type("", (), {"key": "fake"})()


def test_a_step_that_fails_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    def too_large(bench):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(costs, "Bench", FakeBench)
    monkeypatch.setattr(costs, "STEPS", {"a": too_large, "b": lambda bench: [{"seconds": 2.0, "unit": "step"}]})
    table = costs.measure(SIZES["tiny"], CPU, tmp_path / "costs.csv", 1000)
    assert table["note"][0] == "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert table["seconds"][1] == 2 and set(table["label"]) == {LABEL}
    kept = read_csv(tmp_path / "costs.csv")
    assert all(kept[c].tolist() == table[c].fillna("").tolist() for c in ("what", "note", "model", "label"))
    late = costs.measure(SIZES["tiny"], CPU, tmp_path / "costs.csv", -1)
    assert set(late["note"]) == {"left out: the time was used up"} and len(late) == 2


def fake_bench(seconds) -> costs.Bench:
    """A bench of the large size whose acts take the given seconds and are not done."""
    bench, times = costs.Bench.__new__(costs.Bench), iter(seconds)
    bench.size, bench.vlm = SIZES["7b"], build_tiny()
    bench.meter = costs.Meter(CPU)
    bench.meter.seconds = lambda act: next(times)
    return bench


def test_first_turns_alternate(monkeypatch):
    """Base first, then edited first: a card that warms up or slows down favours neither."""
    from contextlib import nullcontext

    order, turns = [], SIZES["7b"].turns
    monkeypatch.setattr(costs, "edited_layers", lambda size: (3,))
    monkeypatch.setattr(costs, "applied", lambda vlm, delta: nullcontext(order.append(delta)))
    rows = fake_bench([9.0, 9.0] + [1.0, 1.1, 2.2, 2.0] * (turns // 2)).generate()
    assert [d is None for d in order] == [True, False] + [True, False, False, True] * (turns // 2)
    assert rows[-1]["ratio"] == pytest.approx(1.1) == rows[-1]["lo"] == rows[-1]["hi"]
    assert rows[-1]["repeats"] == turns and rows[-1]["setting"] == "edited / base"
    assert rows[0]["seconds"] == pytest.approx(1.5 / SIZES["7b"].new_tokens), "the first of all is for the memory"


def test_generation_ends_in_time_on_a_slow_card(monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr(costs, "edited_layers", lambda size: (3,))
    monkeypatch.setattr(costs, "applied", lambda vlm, delta: nullcontext())
    monkeypatch.setattr(costs, "TURNS_END", -1.0)
    assert fake_bench([1.0] * 99).generate()[-1]["repeats"] == costs.FEWEST_TURNS


def test_on_a_gpu_the_kernels_are_timed_alone_too(monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr(costs, "edited_layers", lambda size: (3,))
    monkeypatch.setattr(costs, "applied", lambda vlm, delta: nullcontext())
    bench = fake_bench([])
    taken = iter([(7, 1.0), (7, 1.01), (7, 2.02), (7, 2.0), (7, 1.0), (7, 1.0), (7, 1.0), (7, 1.0), (7, 1.0), (7, 1.0)])

    class Card:
        device = torch.device("cuda")
        seconds = staticmethod(lambda act: 3.0)
        kernels = staticmethod(lambda act: next(taken))

        def __call__(self, act):
            return {"seconds": 3.0, "peak_gib": 6.0}

    bench.meter = Card()
    rows = {row["setting"]: row for row in bench.generate()}
    assert list(rows) == ["base", "edited", RATIO, "base" + KERNELS, "edited" + KERNELS, RATIO + KERNELS]
    assert rows["edited"]["peak_gib"] == 6 and "peak_gib" not in rows["edited" + KERNELS]
    alone = rows[RATIO + KERNELS]
    assert (alone["ratio"], alone["lo"], alone["hi"]) == (1.0, 1.0, pytest.approx(1.01)) and alone["repeats"] == 5


def test_only_what_runs_on_the_gpu_counts_as_a_kernel(monkeypatch):
    from contextlib import nullcontext
    from types import SimpleNamespace

    kinds = torch.autograd.DeviceType
    events = [SimpleNamespace(device_type=k, device_time_total=t) for k, t in ((kinds.CPU, 9e6), (kinds.CUDA, 2e6))]
    run = SimpleNamespace(events=lambda: [*events, events[1]])
    monkeypatch.setattr("torch.profiler.profile", lambda activities: nullcontext(run))
    assert costs.Meter(CPU).kernels(lambda: None) == (2, 4.0)


def test_steps_are_timed_one_by_one_and_the_first_ones_left_out(monkeypatch):
    bench = costs.Bench.__new__(costs.Bench)
    bench.meter = costs.Meter(CPU)
    clock = iter([0.0, 7.0, 14.0, 14.5, 15.0, 16.0, 16.0])  # start, five steps of which two load kernels, end
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(clock))
    weight = torch.nn.Parameter(torch.ones(1))
    optimiser = torch.optim.SGD([weight], lr=0.1)

    def act():
        for _ in range(5):
            optimiser.step()

    row = bench._steps(act, 2, "batch 2")
    assert (row["seconds"], row["lo"], row["hi"], row["repeats"]) == (0.5, 0.5, 1.0, 3)
    assert row["note"] == "whole run, 5 steps: 16.00 s"
    optimiser.step()  # the clock would be empty, were it still read


def test_an_act_is_done_for_its_memory_and_then_for_its_time():
    bench = fake_bench([9.0, 4.0, 2.0, 6.0, 8.0, 2.0])
    row = bench._again(lambda: None, 2, "pair", "all heads")
    assert (row["seconds"], row["repeats"], row["lo"] >= 1.0, row["hi"] <= 4.0) == (2.0, costs.AGAIN, True, True)


# ---- bars and report


def written(out: Path, peak=9.0, ratio=1.01, share=0.996, outcome="passed") -> Path:
    rows = [{"what": w, "peak_gib": peak} for w in ("edit, plain", "edit, fast")]
    rows += [
        {"what": "edit in the middle, fast", "peak_gib": 99.0},
        {"what": "generation", "setting": RATIO, "ratio": ratio, "lo": 0.99, "hi": 1.04},
    ]
    write_csv(pd.DataFrame(rows, columns=costs.COLUMNS), out / "costs.csv")
    write_csv(pd.DataFrame({"test": ["a", "b"], "outcome": ["passed", outcome]}), out / "tests.csv")
    (out / "captions.json").write_text(json.dumps({"share": share}))
    return out


@pytest.mark.parametrize(
    ("changes", "failed"),
    [({}, None), ({"outcome": "failed"}, 0), ({"peak": 12.1}, 1), ({"ratio": 1.03}, 2), ({"share": 0.98}, 3)],
)
def test_bars(tmp_path, changes, failed):
    found = bars(written(tmp_path, **changes), "cuda")["verdict"].tolist()
    assert found == ["fail" if i == failed else "pass" for i in range(4)]


def test_no_figure_is_no_pass(tmp_path):
    assert bars(tmp_path, "cuda")["verdict"].tolist() == ["fail"] * 4
    costs_only = read_csv(written(tmp_path) / "costs.csv").iloc[[0, 3]]
    write_csv(costs_only, tmp_path / "costs.csv")
    assert bars(tmp_path, "cuda")["verdict"].tolist() == ["pass", "fail", "pass", "pass"], (
        "one of the two edits is missing"
    )


def test_the_bar_of_a_ratio_shows_its_interval(tmp_path):
    assert bars(written(tmp_path, ratio=1.1), "cuda")["found"][2] == "1.100 (0.990 to 1.040)"
    table = read_csv(tmp_path / "costs.csv")
    alone = {"what": "generation", "setting": RATIO + KERNELS, "ratio": 1.001, "lo": 0.999, "hi": 1.003}
    write_csv(pd.concat([table, pd.DataFrame([alone])]), tmp_path / "costs.csv")
    row = bars(tmp_path, "cuda").iloc[2]
    assert (row["found"], row["verdict"]) == ("1.001 (0.999 to 1.003)", "pass"), "the host's time is left out"


def test_memory_and_time_of_a_cpu_are_not_judged(tmp_path):
    found = bars(written(tmp_path, peak=99.0, ratio=9.0), "cpu")["verdict"].tolist()
    assert found == ["pass", "not judged", "not judged", "pass"]


def test_agreement():
    found = agreement(["a", "b", "c", "d"], ["a", "x", "c", "d"])
    assert found == {"n": 4, "equal": 3, "share": 0.75, "differ": [("b", "x")]}


def test_the_page_has_bars_parts_and_the_label(tmp_path):
    (tmp_path / "environment.json").write_text(json.dumps({"gpu": "Some Card", "git_commit": "0123456789abcdef"}))
    parts = pd.DataFrame([("costs", "stopped", 12.0)], columns=["part", "state", "seconds"])
    write_report(written(tmp_path), "cuda", "7b", parts)
    text = (tmp_path / "README.md").read_text()
    assert (
        LABEL in text and "Some Card" in text and "Commit 0123456789;" in text and "| costs | stopped | 12.0 |" in text
    )
    assert "| <= 12 | 9.000 | pass |" in text


# ---- the command


def test_a_package_that_is_missing_is_named_before_anything_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "check", lambda device, size: None)
    monkeypatch.setattr(command_line, "NEEDED", ("pytest", "no_such_package"))
    assert command_line.main(["--out", str(tmp_path / "x"), "--device", "cpu", "--size", "tiny"]) == 1
    told = capsys.readouterr().err
    assert "no_such_package" in told and ".[fourbit,dev]" in told and not (tmp_path / "x").exists()


def test_what_cannot_work_is_refused_at_once(tmp_path, capsys, monkeypatch):
    assert command_line.main(["--out", str(tmp_path / "x"), "--device", "cpu"]) == 1
    assert "--device cpu --size tiny" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command_line.main(["--out", str(tmp_path / "x")]) == 1
    assert "torch sees no GPU" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_every_part_has_its_own_time_and_none_takes_another_along(tmp_path, monkeypatch):
    """One part is done, one fails, one would take for ever, with a child; what each wrote stays."""
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    leaves = "open('child', 'w').write(str(p.pid)); open('costs.csv', 'w').write('what\\nbuild\\n')"
    scripts = {
        "environment": "open('environment.json', 'w').write('{\"gpu\": \"Card\"}')",
        "tests": "open('tests.csv', 'w').write('test,outcome\\na,passed\\n'); raise SystemExit(3)",
        "costs": f"{child}; {leaves}; time.sleep(600)",
        "captions": "print('hello')",
    }

    def command(part, args):
        return [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {scripts[part]}"]

    (tmp_path / "bars.csv").write_text("of an earlier run")
    monkeypatch.setattr(command_line, "command", command)
    monkeypatch.setattr(command_line, "PARTS", {**dict.fromkeys(scripts, 60), "costs": 4})
    monkeypatch.setattr("gpu.report.read_csv", lambda path: pd.DataFrame())
    args = command_line.parser().parse_args(["--out", str(tmp_path)])
    found = command_line.run_all(args)
    assert read_csv(tmp_path / "parts.csv")["state"].tolist() == ["done", "failed", "stopped", "done"]
    assert (found["verdict"] == "fail").all() and "hello" in (tmp_path / "log.txt").read_text()
    assert "build" in (tmp_path / "costs.csv").read_text() and "Card" in (tmp_path / "README.md").read_text()
    pid, end = int((tmp_path / "child").read_text()), time.time() + 5
    while (
        alive := psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ) and time.time() < end:
        time.sleep(0.1)
    assert not alive


def test_parts_fit_into_six_minutes_and_eight_files():
    assert sum(PARTS.values()) <= 360 and len(FILES) <= 8
    help_text, makefile = (Path(root() / "Makefile").read_text(),) * 2
    assert "make gpu-check OUT=" in help_text and "PYTHONPATH=tests $(PY) -m gpu --out $(OUT)" in makefile


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_check_on_a_cpu(tmp_path):
    pytest.importorskip("bitsandbytes")
    options = ["--out", str(tmp_path / "out"), "--device", "cpu", "--size", "tiny", "--patience", "10"]
    environment = {**os.environ, "PYTHONPATH": f"{root()}{os.pathsep}{root() / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gpu", *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    out = tmp_path / "out"
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()[-3000:]
    assert {p.name for p in out.iterdir()} == set(FILES)
    assert read_csv(out / "bars.csv")["verdict"].tolist() == ["pass", "not judged", "not judged", "pass"]
    assert set(read_csv(out / "parts.csv")["state"]) == {"done"}
    tests, found = read_csv(out / "tests.csv"), read_csv(out / "costs.csv")
    assert len(tests) >= 10 and set(tests["outcome"]) == {"passed"}
    assert list(dict.fromkeys(found["what"])) == list(costs.STEPS) and set(found["label"]) == {LABEL}
    measured = found[found["setting"] != "edited / base"]
    assert (measured["seconds"] > 0).all() and not pd.to_numeric(found["peak_gib"]).notna().any()
    assert not found["note"].fillna("").str.contains("Error|left out").any(), found["note"].tolist()
    told = json.loads((out / "captions.json").read_text())
    assert told["n"] == SIZES["tiny"].captions == told["equal"]
    about = json.loads((out / "environment.json").read_text())
    assert about["device"] == "cpu" and about["versions"]["torch"] and len(about["sources_sha256"]) == 64
