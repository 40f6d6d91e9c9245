"""The stage engine: where things are, what a stage read and wrote, how notebooks are run. Imports no torch.

A notebook needs three calls: `run = begin("05_edit", PROFILE, VARIANT, LR=LR, ...)`, `run.input(...)`
and `run.finish(scores)`. Everything else here serves `make`: python -m alea_lib.runs --help.
"""

from alea_lib.runs.places import (
    Job,
    MissingStage,
    RunError,
    load_profile,
    plan,
    results_dir,
    root,
    run_dir,
    settings,
)
from alea_lib.runs.record import Run, begin, read_record, sha256

__all__ = [
    "Job",
    "MissingStage",
    "Run",
    "RunError",
    "begin",
    "load_profile",
    "plan",
    "read_record",
    "results_dir",
    "root",
    "run_dir",
    "settings",
    "sha256",
]
