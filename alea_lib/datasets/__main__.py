"""The worlds' data: ``python -m alea_lib.datasets fetch coco --only pope,chair500 --to data/coco``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..core.files import DataError
from ..core.paths import RunError, root
from .coco import EDITIONS, PARTS, Catalogue, check_coco, fetch_coco, load_catalogue, needed
from .fetch import gib

MIRROR = "ALEA_COCO_MIRROR"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m alea_lib.datasets", description="Download a world's data.")
    one = parser.add_subparsers(dest="command", required=True).add_parser("fetch", help="download and check a world")
    one.add_argument("world", choices=["coco"])
    one.add_argument("--only", default=",".join(PARTS), help=f"parts, with commas between: {', '.join(PARTS)}")
    one.add_argument("--to", type=Path, help="folder of the world (default: data/coco)")
    one.add_argument("--edition", default="new", choices=EDITIONS, help="of POPE; old is the one LLaVA-1.5 reports")
    one.add_argument("--from", dest="mirror", default=os.environ.get(MIRROR, ""), metavar="URL",
                     help=f"a server with the same files (default: ${MIRROR}, else the original ones)")  # fmt: skip
    one.add_argument("--list", action="store_true", help="say what would be downloaded, and stop")
    one.add_argument("--check", action="store_true", help="verify what is there, and stop")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Fetch, list or check; 2 and one line on stderr when it cannot be done, 130 when stopped."""
    args = _parse(argv)
    try:
        _act(args, args.to or root() / "data" / "coco", load_catalogue(mirror=args.mirror))
    except (DataError, RunError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished files are kept: call again to go on", file=sys.stderr)
        return 130
    return 0


def _act(args: argparse.Namespace, folder: Path, catalogue: Catalogue) -> None:
    if args.list:
        _list(catalogue, folder)
    elif args.check:
        n, faults = check_coco(folder, catalogue)
        print(*faults, f"{folder}: {n} files checked, {len(faults)} faults", sep="\n")
        if faults:
            raise DataError(f"{folder} is not in order: delete the files named above, and fetch again")
    else:
        world = fetch_coco(folder, [part for part in args.only.split(",") if part], args.edition, catalogue)
        sizes = ", ".join(f"{name} {n}" for name, n in world.info["sizes"].items())
        print(f"{folder}: POPE edition {args.edition}; images: {sizes or 'none'}")


def _list(catalogue: Catalogue, folder: Path) -> None:
    """Every part with its files, sizes, sums and purpose; nothing is downloaded."""
    print("part | bytes (about) | sha256 | what\n--- | --- | --- | ---")
    archive = catalogue.archive()
    rows = [("annotations", archive.size, archive.sha256, f"{PARTS['annotations']}: {archive.url}")]
    for edition in EDITIONS:
        questions = catalogue.questions(edition).values()
        rows += [("pope", i.size, i.sha256, f"questions, edition {edition}: {i.url}") for i in questions]
    for part in (p for p in PARTS if p != "annotations"):
        n = catalogue.sizes.get(part, 500)
        rows.append((part, n * catalogue.image(1).size, "-", f"{PARTS[part]}: {n} single files"))
    for part, size, sum_, what in rows:
        print(f"{part} | {size:,} | {sum_} | {what}")
    left = needed(catalogue, list(PARTS), folder)
    print(f"\nall parts need about {gib(left)} more in {folder}, unpacked annotations included")


if __name__ == "__main__":
    sys.exit(main())
