"""The adversary of EDIT: a soft prefix tuned to make the model hallucinate."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "prefix": [
            "PrefixSettings",
            "adversary_preset",
            "fit_prefix",
            "load_prefix",
            "official_index",
            "prefix_evidence",
            "random_like",
            "random_prefix",
            "save_prefix",
        ],
    },
)
