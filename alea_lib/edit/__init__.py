"""EDIT: fine-tune chosen matrices to answer truthfully while the adversary is active; the result is a delta."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "export": ["export_adapter", "export_checkpoint"],
        "fit": ["fit_edit"],
        "methods": [
            "EditRequest",
            "adversary_settings",
            "fit_method",
            "load_for_edit",
            "located_heads",
            "read_adversary",
        ],
        "settings": ["control_layers", "preset"],
    },
)
