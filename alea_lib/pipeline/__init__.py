"""The engine: plan a profile, run notebooks, record what they read and wrote, build the book. Imports no torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "colab": ["prepare_colab"],
        "record": ["begin"],
    },
)
