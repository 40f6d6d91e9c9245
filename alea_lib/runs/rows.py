"""The rows of data/hub.yaml by their former module name: they live in ``alea_lib.hub``, which imports this package."""

from __future__ import annotations


def __getattr__(name: str):
    from alea_lib import hub

    return getattr(hub, name)
