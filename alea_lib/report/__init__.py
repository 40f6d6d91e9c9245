"""What pages show: claims, sentences, figures, the caption explorer, widgets. No number is computed for a table here."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["figures"],
    submod_attrs={
        "ablations": ["ablation_finding", "beside_published", "published_ablations"],
        "baselines": ["baseline_comparison", "baseline_finding", "baselines_of_study", "published_baselines"],
        "comparison": [
            "attacked",
            "core",
            "frontier_line",
            "frontier_points",
            "headline",
            "rows_of",
            "side_by_side",
            "studied",
        ],
        "explorer": ["ExplorerSettings", "choose_images", "write_explorer"],
        "localisation": ["league", "localisation_finding"],
        "verdicts": ["claims", "finding", "recipe_sentence", "robust_recipes", "robustness_finding", "summary"],
        "widgets": ["LookSettings", "live", "look"],
    },
)
