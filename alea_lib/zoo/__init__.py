"""Train the small models, the detector and the implants. Command line: ``python -m alea_lib.zoo``."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"implant_index": ["implanted", "implants"]})
