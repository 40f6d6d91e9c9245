"""ACTIVATE: a grounded and a hallucinated answer about the same image, judged by a detector, the truth or the user."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "activation": ["ActivateSettings", "activate"],
        "detect": ["load_detector"],
        "table": ["check_pairs", "import_pairs"],
    },
)
