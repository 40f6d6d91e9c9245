"""The model passes that metrics need: captions, answers, attention, counterfactual images, kept ability."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "answers": ["captions", "yes_no_answers"],
        "grounding": ["attention_heads", "counterfactual_heads"],
        "kept_ability": ["ability", "first_references"],
        "patches": ["patch_maps"],
        "scoring": [
            "evaluate",
            "frontier_rows",
            "read_benchmarks",
            "read_evaluated",
            "score_rows",
            "truncated",
            "write_evaluated",
        ],
    },
)
