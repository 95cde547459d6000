"""Make the manifests of CoSAM's stream from the data sets' own folders, or check those that there are.

    python recipes/prepare.py cosam --data_root data --output manifests
    python recipes/prepare.py cosam --data_root data --output manifests --order camo polyp bsdata --seed 1
    python recipes/prepare.py check --data_root data --output manifests

`cosam` writes a manifest per domain (`peft_talora/continual/manifest.py` says what is in it) and says what is missing
and where it is published; nothing is downloaded or copied. `check` reads all files again and compares their hashes.
Both end with code 1 if anything is missing or wrong.
"""

import argparse
from pathlib import Path

from peft_talora.continual.cosam import SOURCES, make_manifest
from peft_talora.continual.manifest import SPLITS, check_files, read_manifest
from peft_talora.files import write_aside, write_json

NATURAL = "natural"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cosam = commands.add_parser("cosam", help="make the manifests")
    check = commands.add_parser("check", help="compare the manifests with the files")
    for command in (cosam, check):
        command.add_argument("--data_root", required=True, help="folder that holds the folders of all data sets")
        command.add_argument("--output", default="manifests", help="folder of the manifests")
    domains = [name for name in SOURCES if name != NATURAL]
    cosam.add_argument("--order", nargs="+", choices=domains, default=domains, help="domains, as they are learned")
    cosam.add_argument("--seed", type=int, default=0, help="of the splits, and of what is drawn from COCO")
    args = parser.parse_args()
    if args.command == "cosam" and len(set(args.order)) < len(args.order):
        parser.error(f"--order names a domain twice: {' '.join(args.order)}")
    return args


def main() -> None:
    """Make or check, and say what is wrong."""
    args = parse_arguments()
    problems = make(args) if args.command == "cosam" else check(args)
    for problem in problems:
        print(problem)
    raise SystemExit(1 if problems else 0)


def make(args: argparse.Namespace) -> list[str]:
    """Write the manifests of what there is. Returns what is missing or wrong, a line each."""
    problems = []
    print(f"{'domain':<16}{'train':>7}{'test':>7}   in CoSAM, about")
    for place, domain in enumerate([*args.order, NATURAL]):
        try:
            manifest = make_manifest(domain, args.data_root, None if domain == NATURAL else place, args.seed)
        except (FileNotFoundError, ValueError) as error:
            problems.append(str(error))
            continue
        with write_aside(args.output) as aside:
            write_json(aside / f"{domain}.json", manifest)
        counts = [sum(entry["split"] == split for entry in manifest["images"]) for split in SPLITS]
        published = " + ".join(map(str, SOURCES[domain].published))
        print(f"{domain:<16}{counts[0]:>7}{counts[1]:>7}   {published}")
    return problems


def check(args: argparse.Namespace) -> list[str]:
    """Read every file again. Returns what is wrong, a line each."""
    files = sorted(Path(args.output).glob("*.json"))
    problems = [] if files else [f"{args.output} has no manifests"]
    for file in files:
        try:
            manifest = read_manifest(file)
        except ValueError as error:
            problems.append(str(error))
            continue
        wrong = check_files(manifest, args.data_root)
        print(f"{file.name:<24}{len(manifest['images']):>6} images, {len(wrong)} files missing or changed")
        problems += wrong
    return problems


if __name__ == "__main__":
    main()
