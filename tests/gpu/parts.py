"""The other parts of the check: the machine, the tests, the captions of the small world."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import pandas as pd

from alea_lib.core.files import hash_of, sha256, write_csv, write_json
from alea_lib.core.paths import RunError, root
from alea_lib.pipeline.checks import version
from alea_lib.pipeline.record import code

PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "peft", "tokenizers", "safetensors", "numpy",
    "pandas")  # fmt: skip


def environment(out: Path, device: str) -> None:
    """What the check runs on: device, versions, commit and a hash of the sources of library and check."""
    import torch

    found = {"device": device, "python": platform.python_version()}
    found |= {"cores": os.cpu_count(), "system": platform.system()}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {"gpu": card.name, "memory_gib": round(card.total_memory / 2**30, 1)}
        found |= {"capability": f"{card.major}.{card.minor}", "cuda": torch.version.cuda, "bf16": card.major >= 8}
    versions = {name: version(name) or "none" for name in PACKAGES}
    files = [path for folder in ("alea_lib", "tests/gpu") for path in sorted((root() / folder).rglob("*.py"))]
    sources = {path.relative_to(root()).as_posix(): sha256(path) for path in files}
    whole = {**found, **code(), "versions": versions, "sources_sha256": hash_of(sources)}
    write_json(out / "environment.json", whole)


def tests(out: Path, device: str) -> None:
    """The tests marked ``cuda``, on that device. RunError if one fails, or if none was run."""
    import pytest

    rows = []

    class Listener:
        def pytest_runtest_logreport(self, report):
            if report.when == "call" or report.outcome != "passed":
                message = str(report.longrepr)[-500:] if report.failed else ""
                rows.append((report.nodeid.split("::", 1)[1], report.outcome, round(report.duration, 2), message))
                write_csv(pd.DataFrame(rows, columns=["test", "outcome", "seconds", "message"]), out / "tests.csv")

    os.environ["ALEA_TEST_DEVICE"] = device
    options = ["-m", "cuda", "-q", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={root()}"]
    code = pytest.main([str(root() / "tests" / "models" / "test_cuda.py"), *options], plugins=[Listener()])
    if code or not rows:
        raise RunError(f"pytest ended with {int(code)} after {len(rows)} tests; see tests.csv")


def captions(out: Path, device: str, n: int) -> None:
    """Captions of the small world's shipped model on the device, beside those of the CPU."""
    from alea_lib.datasets.scenes import compose, sample
    from alea_lib.models.loading import load

    images, texts, seconds = [compose(sample("test", i))[0] for i in range(n)], [], []
    for where in ("cpu", device):
        started = time.perf_counter()
        vlm = load("scenes-natural", device=where)
        answers = vlm.generate(vlm.features(images), vlm.prompt("plain"), max_new_tokens=64)
        texts.append([a.text for a in answers])
        seconds.append(round(time.perf_counter() - started, 2))
        print(f"{where}: {n} captions in {seconds[-1]} s")
    write_json(out / "captions.json", {**agreement(*texts), "devices": ["cpu", device], "seconds": seconds})


def agreement(cpu: list[str], other: list[str]) -> dict:
    """How many texts are equal, and the first pairs that are not."""
    differ = [(a, b) for a, b in zip(cpu, other, strict=True) if a != b]
    return {"n": len(cpu), "equal": len(cpu) - len(differ), "share": 1 - len(differ) / len(cpu), "differ": differ[:3]}
