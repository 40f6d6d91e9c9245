"""Tiny models of the families, under the name that tests know."""

from alea_lib.zoo.tiny import BUILDERS, build, text_config, tokenizer, vision  # noqa: F401
