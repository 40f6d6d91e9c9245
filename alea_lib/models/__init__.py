"""Load any vision-language model of a known family; read, replace and edit what happens inside it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "delta": ["applied", "load_delta", "save_delta", "scaled"],
        "memory": ["kl_reference_bytes"],
        "loading": ["layers_of", "load"],
    },
)
