"""The small world (scenes, captions, questions) and COCO (download, check, read), as folders of the same layout."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "coco": ["fetch_coco"],
        "describe": ["references"],
        "scenes": ["companions", "compose", "glyph_path", "objects", "recipe", "sample"],
        "world": ["World"],
        "write": ["make_scenes", "prepare_world"],
    },
)
