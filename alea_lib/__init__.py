"""Look Closer: the library behind the study of adversarial parametric editing against hallucination.

Each folder is a room that imports only from the rooms above it: core, metrics, datasets, models, evaluate, zoo, pairs,
locate, adversary, edit, baselines, experiments, report, pipeline. A room lists its public names in ``__all__`` and
loads them on first use, so a scorer never loads torch: ``from alea_lib.locate import locate_layers``.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("alea_lib")
except PackageNotFoundError:  # used from a folder, not installed
    __version__ = "0+unknown"
