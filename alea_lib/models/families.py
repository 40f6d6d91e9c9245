"""What is known of each model family, one row each: prompts, chat format, where its parts are, how it sees an image.

With ``vlm``, ``hooks`` and ``layout`` this is the only file that knows module names. The page "Add your model" says how
a row is made and tested.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import layout

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
LLAVA_CHAT = "USER: <image>\n{question} ASSISTANT:"
LLAVA_SHORT = "{question}\nAnswer the question using a single word or phrase."
VICUNA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)
QWEN_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)
TILE_SPAN = "<fake_token_around_image><global-img>{image}<fake_token_around_image>"


def chat(question: str) -> str:
    """LLaVA-1.5's conversation format with one image and one question."""
    return LLAVA_CHAT.replace("{question}", question)


@dataclass(frozen=True)
class Family:
    """One row. Addresses are dotted names inside the Hugging Face model; ``{i}`` is the layer."""

    name: str
    model_type: str
    prompts: dict[str, str]
    language_model: str  # the decoder without its head; reads embeddings
    layer: str
    down_proj: str
    o_proj: str  # reads the heads' outputs side by side: query heads, also where keys and values are shared
    norm: str  # the last norm
    head: str
    short_answer: str = "{question}"  # how a yes/no question is asked
    chat: str = LLAVA_CHAT  # what the family's processor reads: the image token once, then {question}
    image_token: str = "<image>"
    span: str = "{image}"  # what the image token stands for; {image} is repeated, once a position
    lead: str = " "  # stands before an answer
    end: str = ""  # the token that ends an answer; "" = the tokenizer's end of sequence
    decoders: tuple[str, ...] = ("llama",)  # model types of the text part that the row holds for
    canvas: int = 0  # images are padded to a square of so many pixels, so that all take equally many positions
    image_options: tuple[tuple[str, object], ...] = ()  # for the image processor
    nested: bool = False  # the image processor reads a list of images a text
    queries: str = ""  # configuration entry with the number of positions, where it is not that of the features
    vision_features: Callable = layout.projected
    project: Callable = layout.as_they_are
    decoder_inputs: Callable = layout.causal  # what the decoder takes beside embeddings
    generate_inputs: Callable | None = None  # the same for generate, where it differs
    writer: str = ""  # the module whose generate writes; "" = the model
    unquantised: tuple[str, ...] = ("model.vision_tower", "model.multi_modal_projector", "lm_head")  # in 4 bits

    @property
    def small(self) -> bool:
        return self.prompts is PROMPTS_SMALL

    def ask(self, question: str) -> str:
        """The whole prompt in the family's chat format."""
        return self.chat.replace("{question}", question)

    def short(self, question: str) -> str:
        """A yes/no question in the family's words for short answers."""
        return self.short_answer.replace("{question}", question)


def decoder(root: str = "model.language_model", head: str = "lm_head") -> dict[str, str]:
    """Addresses of a Llama-like decoder under ``root``; every family here has one."""
    layer = f"{root}.layers.{{i}}"
    parts = {"down_proj": f"{layer}.mlp.down_proj", "o_proj": f"{layer}.self_attn.o_proj", "norm": f"{root}.norm"}
    return {"language_model": root, "layer": layer, "head": head, **parts}


TILES: dict[str, Any] = {
    "chat": "<|im_start|>User:<image>{question}<end_of_utterance>\nAssistant:",
    "span": TILE_SPAN,
    "end": "<end_of_utterance>",
    "short_answer": "{question}\nAnswer yes or no.",
    "nested": True,
    "image_options": (("do_image_splitting", False),),  # the whole image in one tile
    "unquantised": ("model.vision_model", "model.connector", "lm_head"),
    **decoder("model.text_model"),
}
ROWS = (
    Family("llava", "llava", PROMPTS, short_answer=LLAVA_SHORT, decoders=("llama", "mistral"), **decoder()),
    Family("llava-small", "llava", PROMPTS_SMALL, **decoder()),
    Family("llava-grouped-small", "llava", PROMPTS_SMALL, decoders=("mistral",), **decoder()),
    Family(
        "llava-next-mistral", "llava_next", PROMPTS, short_answer=LLAVA_SHORT, canvas=672,
        chat="[INST] <image>\n{question} [/INST]", decoders=("mistral",), **decoder(),
    ),
    Family(
        "llava-next-vicuna", "llava_next", PROMPTS, short_answer=LLAVA_SHORT, canvas=672,
        chat=VICUNA_SYSTEM + LLAVA_CHAT, **decoder(),
    ),
    Family("smolvlm", "smolvlm", PROMPTS, **TILES),
    Family("idefics3", "idefics3", PROMPTS, **{**TILES, "chat": TILES["chat"].removeprefix("<|im_start|>")}),
    Family(
        "qwen2.5-vl", "qwen2_5_vl", PROMPTS, short_answer="{question} Please answer yes or no.", canvas=448,
        chat=QWEN_CHAT, image_token="<|image_pad|>", lead="", decoders=("qwen2_5_vl_text",),
        decoder_inputs=layout.grid_positions, unquantised=("model.visual", "lm_head"), **decoder(),
    ),
    Family(
        "instructblip", "instructblip", PROMPTS, short_answer="Question: {question} Short answer:",
        chat="<image>{question}", queries="num_query_tokens",
        vision_features=layout.before_query, project=layout.queried, writer="language_model",
        unquantised=("vision_model", "qformer", "language_projection", "language_model.lm_head"),
        **decoder("language_model.model", "language_model.lm_head"),
    ),
    Family(
        "paligemma", "paligemma", {**PROMPTS, "plain": "describe en"}, short_answer="answer en {question}",
        chat="<image>{question}\n", lead="", decoders=("gemma",),
        decoder_inputs=layout.prefix_mask, generate_inputs=layout.prompt_types, **decoder(),
    ),
)  # fmt: skip
FAMILIES = {row.name: row for row in ROWS}


def family(model_type: str, small: bool, text: str | None = None) -> Family:
    """The row of a model: of its type, for its text part (a model type, None = any), small where there is such a row.

    KeyError says which rows there are and how one is added.
    """
    rows = [r for r in ROWS if r.model_type == model_type and (text is None or text in r.decoders)]
    if not rows:
        with_text = f" with a text part {text!r}" if any(r.model_type == model_type for r in ROWS) else ""
        known = ", ".join(f"{r.name} ({r.model_type}: {', '.join(r.decoders)})" for r in ROWS)
        raise KeyError(
            f"no family row for model type {model_type!r}{with_text}; there are {known}. To add one, write a row in "
            f"alea_lib/models/families.py and run its contract test: see the page 'Add your model' (book/add_model.md)"
        )
    return next((r for r in rows if r.small == small), rows[0])
