"""An exported model in another evaluation program: lmms-eval's adapter writes what the edited model writes here.

Runs where lmms-eval is installed beside this project (an environment of its own, see the page on re-running)."""

import pytest
import torch
from PIL import Image

from alea_lib.core.paths import root
from alea_lib.edit.export import export_checkpoint
from alea_lib.models.delta import applied, delta_of
from alea_lib.models.loading import load

pytest.importorskip("lmms_eval", reason="needs lmms-eval, in an environment of its own")

CHAT = "{% for m in messages %}USER: {{ m['content'] }} ASSISTANT:{% endfor %}"  # the small models know no other


def test_the_adapter_of_lmms_eval_writes_the_same(tmp_path, tiny_world):
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.simple.llava_hf import LlavaHf

    source = root() / "data" / "models" / "scenes-natural"
    vlm, split = load("scenes-natural"), tiny_world.split("test")
    name = vlm.address("down_proj", 0)
    delta = delta_of(vlm, {name: vlm.model.get_submodule(name).weight.detach() * 0.5}, {})
    export_checkpoint(delta, source, tmp_path / "edited")
    question, features = vlm.prompt("plain"), vlm.features(split.files)
    with applied(vlm, delta):
        told = [answer.text for answer in vlm.generate(features, question, 24)]

    theirs = LlavaHf(str(tmp_path / "edited"), device="cpu", device_map="cpu", dtype=torch.float32, chat_template=CHAT)
    theirs.task_dict = {"scenes": {"test": [Image.open(f).convert("RGB") for f in split.files]}}
    asked = [
        Instance(
            request_type="generate_until", idx=0, metadata={"task": "scenes", "doc_id": i, "repeats": 1},
            arguments=(question, {"max_new_tokens": 24}, lambda picture: [picture], i, "scenes", "test"),
        )
        for i in range(len(split.files))
    ]  # fmt: skip
    assert [text.strip() for text in theirs.generate_until(asked)] == [text.strip() for text in told]
