"""The stage engine: what a stage reads and writes, how notebooks are run. Imports no torch."""

from alea_lib.files import read_record, sha256
from alea_lib.runs.paths import MissingStage, RunError, results_dir, root, run_dir
from alea_lib.runs.places import Job, load_profile, plan, settings
from alea_lib.runs.record import Run, begin

__all__ = ["Job", "MissingStage", "Run", "RunError", "begin", "load_profile", "plan", "read_record", "results_dir", "root", "run_dir", "settings", "sha256"]
