"""LOCATE: which layers or heads look suspect. Importing the package registers all locators and loads no torch."""

from . import heads, layers  # noqa: F401
