"""Look Closer: the library behind the study of adversarial parametric editing against hallucination.

Names are imported on first use, so that a scorer starts at once and never loads torch.
"""

import importlib

# name -> module (inside alea_lib) that defines it; notebooks import from the top only
_EXPORTS = {
    "begin": "runs.record",
    "root": "runs.places",
    "run_dir": "runs.places",
    "results_dir": "runs.places",
    "make_scenes": "worlds.write",
    "World": "worlds.write",
    "sample": "worlds.scenes",
    "compose": "worlds.scenes",
    "recipe": "worlds.scenes",
    "objects": "worlds.scenes",
    "companions": "worlds.scenes",
    "glyph_path": "worlds.scenes",
    "references": "worlds.describe",
    "read_truth": "measures.truth",
    "mentions": "measures.parse",
    "chair": "measures.chair",
    "companion_share": "measures.chair",
    "distinct": "measures.chair",
    "drop_last_sentence": "measures.frontier",
    "frontier": "measures.frontier",
    "frontier_gap": "measures.frontier",
    "read_pope": "measures.pope",
    "pope": "measures.pope",
    "summarise": "stats",
    "paired_difference": "stats",
    "metric_rows": "tables",
    "read_metrics": "tables",
    "read_parquet": "tables",
    "write_parquet": "tables",
    "read_jsonl": "tables",
    "write_jsonl": "tables",
    "write_csv": "tables",
    "check_pairs": "tables",
    "load": "vlm",
    "load_detector": "zoo.detector",
    "activate": "pairs",
    "ActivateSettings": "pairs",
    "pair_states": "locate.states",
    "locate_layers": "locate.layers",
    "choose_layers": "locate.layers",
    "stability": "locate.layers",
    "PrefixSettings": "prefix",
    "adversary": "prefix",
    "official_index": "prefix",
    "random_like": "evidence",
    "fit_prefix": "prefix",
    "random_prefix": "prefix",
    "save_prefix": "prefix",
    "load_prefix": "prefix",
    "prefix_evidence": "evidence",
    "preset": "edit.settings",
    "fit_edit": "edit.fit",
    "applied": "edit.delta",
    "save_delta": "edit.delta",
    "load_delta": "edit.delta",
    "control_layers": "edit.settings",
    "export_adapter": "edit.export",
    "export_checkpoint": "edit.export",
    "write_edit_card": "edit.export",
    "bench_steps": "edit.bench",
    "kl_reference_bytes": "edit.bench",
    "predicted_speedup": "edit.bench",
    "captions": "probe",
    "pope_answers": "probe",
    "attention_share": "probe",
    "evaluate": "scoring",
    "truncated": "scoring",
    "score_rows": "scoring",
    "read_evaluated": "scoring",
    "write_evaluated": "scoring",
    "claims": "verdicts",
    "finding": "verdicts",
    "headline": "verdicts",
    "figures": "figures",
}


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"alea_lib has no {name!r}; it has {', '.join(sorted(_EXPORTS))}")
    module = importlib.import_module(f"{__name__}.{_EXPORTS[name]}")
    return module if name == "figures" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(_EXPORTS)
