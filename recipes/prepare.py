"""Check a published data set before it is trained on; or make and check the manifests of CoSAM's stream.

    python recipes/prepare.py nyuv2-13 --data_root nyuv2 --output manifests    # or cityscapes-7, pascal-context, ...
    python recipes/prepare.py cosam --data_root data --output manifests
    python recipes/prepare.py cosam --data_root data --output manifests --order camo polyp bsdata --seed 1
    python recipes/prepare.py check --data_root data --output manifests

A data set's name reads every image and label of all splits, counts them, and writes the hashes of all files as
`<output>/<data set>.sha256`, which `sha256sum --check` compares from inside the data's folder. `cosam` writes a
manifest per domain (`peft_talora/continual/manifest.py` says what is in it), and `check` reads the files of those
again and compares their hashes. All say what is missing and where it is published, download and copy nothing, and end
with code 1 if anything is missing or wrong.
"""

import argparse
from hashlib import sha256
from pathlib import Path

from peft_talora.continual.cosam import SOURCES, make_manifest
from peft_talora.continual.manifest import SPLITS, check_files, read_manifest
from peft_talora.data import FORMATS, BadSample
from peft_talora.files import digest, write_aside, write_json

NATURAL = "natural"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cosam = commands.add_parser("cosam", help="make the manifests")
    check = commands.add_parser("check", help="compare the manifests with the files")
    for command in (cosam, check, *(commands.add_parser(name, help="check its files") for name in FORMATS)):
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
    problems = {"cosam": make, "check": check}.get(args.command, inspect)(args)
    for problem in problems:
        print(problem)
    raise SystemExit(1 if problems else 0)


def inspect(args: argparse.Namespace) -> list[str]:
    """Read all there is of a data set and write its hashes. Returns what is missing or wrong, a line each."""
    published, problems, hashes = FORMATS[args.command], [], {}
    tasks = published.tasks
    print(f"{'split':<8}{'images':>8}{'published':>11}" + "".join(f"{task.name:>15}" for task in tasks))
    for split, expected in published.images.items():
        try:
            dataset = published.open(args.data_root, split, tasks)
        except ValueError as error:
            problems.append(str(error))
            continue
        labelled = dict.fromkeys([task.name for task in tasks], 0)
        for index in range(len(dataset)):
            try:
                labels = dataset[index]["labels"]
            except BadSample as error:
                problems.append(str(error))
                continue
            for task in tasks:
                labelled[task.name] += task.name in labels and bool(task.has_label(labels[task.name]).any())
        print(f"{split:<8}{len(dataset):>8}{expected:>11}" + "".join(f"{count:>15}" for count in labelled.values()))
        if len(dataset) != expected:
            problems.append(f"{args.data_root}: split {split!r} has {len(dataset)} images, as published {expected}")
        files = {str(file.relative_to(args.data_root)): file for file in published.files(args.data_root, split)}
        hashes |= {name: digest(file) for name, file in files.items() if name not in hashes and file.is_file()}
    if hashes:
        with write_aside(args.output) as aside:
            lines = "".join(f"{known}  {name}\n" for name, known in sorted(hashes.items()))
            (aside / f"{published.name}.sha256").write_text(lines)
        whole = sha256(lines.encode()).hexdigest()[:12]
        print(f"{len(hashes)} files, of hash {whole} together: {args.output}/{published.name}.sha256")
    return problems


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
