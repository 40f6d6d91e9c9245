"""Other methods against hallucination, one file each, behind one interface (``registry.py``)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "registry": ["baseline", "baseline_table"],
    },
)
