"""LOCATE: score decoder layers and attention heads by how much they carry a hallucination, and choose among them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "choose": ["choose_heads", "choose_layers", "stability"],
        "registry": ["locators"],
        "run": ["locate_heads", "locate_layers", "official_layers"],
        "settings": ["LocateSettings", "OFFICIAL"],
    },
)
