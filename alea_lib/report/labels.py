"""The methods and metrics of the study: their order, their labels, and how figures draw them."""

METHODS = {  # every method of the study in the order of tables; colour and marker, the same on every page
    "base": ("#000000", "o"), "truncation": ("#7f7f7f", "s"), "sft": ("#56B4E9", "v"), "no-prefix": ("#0072B2", "^"),
    "random-prefix": ("#CC79A7", "X"), "alea-official": ("#E69F00", "p"), "alea-corrected": ("#D55E00", "D"),
    "alea-mixed": ("#009E73", "P"),
}  # fmt: skip
METHOD_ORDER = (*METHODS, "lora", "heads", "random-layers", "last-layer", "all-layers")
CORE = ("base", "truncation", "no-prefix", "alea-corrected", "alea-mixed")  # the methods of the first page
ADVERSARY = ("alea-corrected", "alea-mixed")  # each against no-prefix: the same modules, pairs and steps
HEADLINE = ("chair_s", "chair_i", "recall", "words", "objects_per_caption", "frontier_gap", "pope_accuracy",
            "mme_total", "amber_score", "attn_last_max", "ppl_grounded")  # fmt: skip
METRIC_LABELS = {
    "chair_s": "CHAIRs (wrong captions)", "chair_i": "CHAIRi (wrong mentions)", "recall": "recall of objects",
    "words": "words", "objects_per_caption": "objects a caption", "pope_accuracy": "POPE accuracy",
    "pope_f1": "POPE F1",
    "attn_all_mean": "image attention, all layers", "attn_last_mean": "image attention, last layer",
    "attn_last_max": "image attention, last layer, max", "frontier_gap": "gap to the truncation frontier",
}  # fmt: skip
