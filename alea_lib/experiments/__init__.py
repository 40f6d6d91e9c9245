"""Trials: locators on models with known truth, edits under attack, ablations, tuning and comparison of baselines."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "ablations": ["Places", "ablation_levels", "ablation_rows", "ablation_trial"],
        "baseline_comparison": ["against", "baseline_differences", "best_baseline", "better_than"],
        "baseline_trial": ["EvaluationSetup", "EvaluationSplit", "baseline_case", "rows_of_seed"],
        "edit_speed": ["Bench", "bench_steps", "predicted_speedup"],
        "edits": ["EditBench", "EditCase", "EditTrialSettings", "edit_trial", "robustness_scores", "trial_rows"],
        "families": ["family_table", "verified_families", "verify_family"],
        "localisation": ["agreement", "aggregate", "chance", "named_places", "tau_with", "write_localisation"],
        "locators": ["TrialSettings", "edit_benefit", "knockout_benefit", "locator_trial", "mean_scores"],
        "overhead": ["CostSettings", "baseline_cost", "relative_cost"],
    },
)
