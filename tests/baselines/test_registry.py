"""The registry of the baselines, and those that need no second pass over the image."""

import importlib
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch

from alea_lib import baselines
from alea_lib.adversary.prefix import PrefixSettings, random_prefix
from alea_lib.baselines import registry
from alea_lib.baselines.registry import Baseline, Views, baseline, baseline_table, register
from alea_lib.core.tables import METHOD_NAMES
from alea_lib.evaluate.answers import captions

QUESTION = "Please describe this image in detail."


@dataclass(frozen=True)
class NoSettings:
    word: str = "cup"


@contextmanager
def only_word(s, vlm, batch, embeds, mask):
    wanted = vlm.tokenizer(f" {s.word}", add_special_tokens=False)["input_ids"][0]

    def forced(ids, scores):
        return scores.index_fill(1, torch.tensor([wanted]), 1e4)

    yield {"logits_processor": [forced]}


def texts(vlm, features, decoding=None, **options):
    return [a.text for a in vlm.generate(features, QUESTION, 12, decoding=decoding, **options)]


def test_a_decoding_method_is_entered_once_a_batch_and_left(tiny, seen):
    told = []

    @contextmanager
    def spy(vlm, batch, embeds, mask):
        told.append((tuple(batch.ids.shape), tuple(embeds.shape[:2]), tuple(mask.shape)))
        yield {}
        told.append("left")

    prefix = random_prefix(tiny, PrefixSettings(length=3))
    tiny.generate(seen, QUESTION, 2, batch_size=4, prefix=prefix, decoding=spy)
    wide = told[0][0][1]
    first, second = (((n, wide), (n, wide + 3), (n, wide + 3)) for n in (4, 2))
    assert told == [first, "left", second, "left"]


def test_options_of_a_decoding_method_reach_generate(tiny, seen):
    said = texts(tiny, seen[:2], lambda *given: only_word(NoSettings(), *given))
    assert said == [" ".join(["cup"] * 12)] * 2


def test_captions_pass_the_decoding_method_on(tiny, tiny_world, seen):
    split = tiny_world.split("activate")
    table = captions(tiny, split, seen, max_new_tokens=3, decoding=lambda *given: only_word(NoSettings(), *given))
    assert set(table["caption"]) == {"cup cup cup"}


def test_names_and_settings_are_checked():
    with pytest.raises(KeyError, match="unknown baseline 'vdc'; there are .*beam.*truncation"):
        baseline("vdc")
    with pytest.raises(ValueError, match=r"beam has no settings \['width'\]; it has \['beams'\]"):
        baseline("beam", width=3)
    with pytest.raises(ValueError, match="baseline 'beam' already"):
        register(Baseline("beam", "decoding", only_word, NoSettings()))
    with pytest.raises(ValueError, match="must be one of"):
        register(Baseline("mine", "magic", only_word, NoSettings()))


def test_a_registered_baseline_is_found_with_its_changes(monkeypatch):
    monkeypatch.setattr(registry, "ROWS", dict(registry.ROWS))
    register(Baseline("mine", "decoding", only_word, NoSettings(), grid=({"word": "dog"},)))
    assert baseline("mine", word="bus").settings == NoSettings("bus")
    assert "mine" in set(baseline_table()["method"])


def test_a_file_makes_a_baseline(tmp_path, monkeypatch):
    """A file and its line in MODULES; only the file that is asked for is imported."""
    source = """
from dataclasses import dataclass
from alea_lib.baselines.registry import Baseline, register

@dataclass(frozen=True)
class NoSettings:
    word: str = "cup"

register(Baseline("of-a-file", "prompt", lambda settings: settings.word, NoSettings()))
"""
    (tmp_path / "of_a_file.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(registry, "ROWS", dict(registry.ROWS))
    with pytest.raises(KeyError, match="unknown baseline 'of-a-file'"):
        baseline("of-a-file")
    monkeypatch.setitem(registry.MODULES, "of-a-file", "of_a_file")
    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(tmp_path)])
    try:
        assert baseline("of-a-file", word="bus").prompt == "bus"
        assert "of-a-file" in set(baseline_table()["method"])
    finally:
        sys.modules.pop("alea_lib.baselines.of_a_file", None)
        vars(baselines).pop("of_a_file", None)


def test_the_table_of_modules_is_what_the_files_register():
    """Else a stage would not depend on the file of a baseline that it names."""
    folder = Path(registry.__file__).parent
    for path in folder.glob("*.py"):
        importlib.import_module(f"alea_lib.baselines.{path.stem}")
    own = {name: row.apply.__module__ for name, row in registry.ROWS.items()}
    assert own == {name: f"alea_lib.baselines.{module}" for name, module in registry.MODULES.items()}


def test_all_files_of_the_folder_are_found():
    code = """
from alea_lib.baselines import baseline
print(baseline("vcd").name)
try:
    baseline("vdc")
except KeyError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("vcd\n") and all(f"'{n}'" in done.stdout for n in METHOD_NAMES if n != "base")


@pytest.mark.parametrize("method", baseline_table()["method"])
def test_rows_say_what_they_are(method):
    row = baseline(method)
    assert row.description and row.source and row.grid and row.kind in registry.KINDS
    assert (row.decoding is not None) == (row.kind == "decoding")


def test_views_are_found_by_features(seen):
    other = torch.randn_like(seen)
    views = Views(seen, other)
    assert torch.equal(views.of(seen[[4, 1, 1]]), other[[4, 1, 1]])
    with pytest.raises(KeyError, match=r"call baseline\.with_views"):
        views.of(seen + 1)


def test_one_beam_and_no_lift_are_greedy_decoding(tiny, seen):
    plain = texts(tiny, seen)
    assert texts(tiny, seen, baseline("beam", beams=1).decoding) == plain
    assert texts(tiny, seen, baseline("stop-early", strength=0.0).decoding) == plain


def test_beams_find_a_likelier_answer(tiny, seen):
    found = tiny.generate(seen, QUESTION, 4, decoding=baseline("beam", beams=5).decoding, length_penalty=0.0)
    greedy = tiny.generate(seen, QUESTION, 4)

    def likelihood(answers):
        batch = tiny.encode(seen, QUESTION, [a.text for a in answers], eos=False)
        scores = tiny.answer_logits(batch).log_softmax(-1)
        return scores.gather(1, batch.labels[batch.labels != -100][:, None]).sum()

    assert [a.text for a in found] != [a.text for a in greedy]
    assert likelihood(found) > likelihood(greedy)


def test_the_end_is_raised_by_the_strength(tiny, seen):
    """The gap between the first token and the end is what it takes."""
    batch = tiny.encode(seen, QUESTION, side="left")
    first = tiny.head(tiny.hidden(tiny.embed(batch), batch.mask, batch)[:, -1])
    first[:, tiny.image_id] = -torch.inf
    gap = first.max(1).values - first[:, tiny.end_id]
    middle = gap.median().item()
    told = tiny.generate(seen, QUESTION, 1, decoding=baseline("stop-early", strength=middle + 1e-3).decoding)
    assert [a.eos for a in told] == [bool(g <= middle) for g in gap]


def test_truncation_and_careful_prompt():
    table = pd.DataFrame({"image_id": [1], "caption": ["A cup. A dog."], "n_tokens": [6], "eos": [True]})
    cut = baseline("truncation")
    assert cut.apply(cut.settings, table)["caption"].tolist() == ["A cup."]
    assert baseline("careful-prompt").prompt == "careful" and baseline("beam").prompt == "plain"
