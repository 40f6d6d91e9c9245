"""What pages show: claims, sentences, figures, the caption explorer, widgets. No table of scores is computed here."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["figures"],
    submod_attrs={
        "comparison": [
            "attacked", "baseline_comparison", "baselines_of_study", "beside_published", "core", "frontier_line",
            "frontier_points", "headline", "league", "published_ablations", "published_baselines", "rows_of",
            "side_by_side", "studied",
        ],
        "explorer": ["ExplorerSettings", "choose_images", "write_explorer"],
        "findings": [
            "ablation_finding", "baseline_finding", "finding", "localisation_finding", "recipe_sentence",
            "robustness_finding", "summary",
        ],
        "verdicts": ["claims", "robust_recipes"],
        "widgets": ["live", "look"],
    },
)  # fmt: skip
