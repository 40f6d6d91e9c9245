"""What is known of each model family, one row each: prompts, chat format, and where its parts are.

With ``vlm`` and ``taps`` this is the only file that knows module names.
"""

from __future__ import annotations

from dataclasses import dataclass

# Prompt roles. The small world's vocabulary is small, so its prompts are short forms of the same three requests.
PROMPTS_SMALL = {
    "plain": "Please describe this image in detail.",
    "careful": "Please describe only what is clearly visible.",
    "speculative": "Please describe this image and speculate freely.",
}
PROMPTS = {
    "plain": "Please describe this image in detail.",
    "careful": "Please describe this image in detail. Report only specific things that can be seen in it, "
    "and do not imagine anything.",
    "speculative": "Please describe this image in detail. Draw on your broad knowledge of the world, and add "
    "whatever may reasonably be supposed.",
}


def chat(question: str) -> str:
    """LLaVA-1.5's conversation format with one image and one question; the answer follows the colon."""
    return f"USER: <image>\n{question} ASSISTANT:"


@dataclass(frozen=True)
class Family:
    """One row. Addresses are dotted names inside the Hugging Face model; ``{i}`` is the layer."""

    name: str
    model_type: str
    prompts: dict[str, str]
    language_model: str
    layer: str
    down_proj: str
    o_proj: str
    head: str
    short_answer: str = ""  # appended to yes/no questions


FAMILIES = {
    "llava": Family(
        "llava",
        "llava",
        PROMPTS,
        "model.language_model",
        "model.language_model.layers.{i}",
        "model.language_model.layers.{i}.mlp.down_proj",
        "model.language_model.layers.{i}.self_attn.o_proj",
        "lm_head",
        "\nAnswer the question using a single word or phrase.",
    ),
    "llava-small": Family(
        "llava-small",
        "llava",
        PROMPTS_SMALL,
        "model.language_model",
        "model.language_model.layers.{i}",
        "model.language_model.layers.{i}.mlp.down_proj",
        "model.language_model.layers.{i}.self_attn.o_proj",
        "lm_head",
    ),
}


def family(model_type: str, small: bool) -> Family:
    """The row of a model. Raises KeyError with the rows there are."""
    for row in FAMILIES.values():
        if row.model_type == model_type and (row.prompts is PROMPTS_SMALL) == small:
            return row
    raise KeyError(
        f"no family row for model type {model_type!r}; there are "
        f"{sorted({r.model_type for r in FAMILIES.values()})}: add a row to alea_lib/families.py"
    )
