"""Paths, files, hashes, the schema of the tables, statistics, values as text. Imports no torch and no other room."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "files": ["read_jsonl", "read_parquet", "write_csv", "write_jsonl", "write_parquet"],
        "formatting": ["with_interval"],
        "paths": ["results_dir", "root", "run_dir"],
        "stats": ["images_needed", "paired_difference", "summarise"],
        "tables": ["metric_rows", "read_csv", "read_metrics"],
    },
)
