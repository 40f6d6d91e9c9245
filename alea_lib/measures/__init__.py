"""Measures: tables in, tables out. Every measure is a ratio of per-image sums (see ``alea_lib.stats``)."""
