"""Turn adapters into others: one task into a stock LoRA, LoRAs into one TA-LoRA, a TA-LoRA into a smaller one.

    python recipes/convert.py to_lora --adapter runs/train --task depth --output runs/depth-lora
    python recipes/convert.py from_loras --loras depth=runs/a normals=runs/b --r 8 --output runs/both
    python recipes/convert.py compress --adapter runs/train --r 4 --output runs/small
    python recipes/convert.py curve --loras depth=runs/a normals=runs/b --output error.png

`from_loras` and `compress` print the relative error of the update, per layer and over all. `curve` prints it against
the ranks, without writing an adapter, and draws it.
"""

import argparse
from contextlib import contextmanager
from pathlib import Path

import peft_talora
from peft_talora.files import write_aside
from peft_talora.hub import PROCESSOR_NAME, fetch
from peft_talora.lora import read_loras, stacked
from peft_talora.plotting import draw_curves
from peft_talora.tuner.tucker import check_ranks, relative_errors


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to_lora = commands.add_parser("to_lora", help="one task as a stock LoRA folder, exactly")
    from_loras = commands.add_parser("from_loras", help="a TA-LoRA of one LoRA per task")
    compress = commands.add_parser("compress", help="a smaller TA-LoRA of a trained one")
    curve = commands.add_parser("curve", help="the error of from_loras against the ranks")
    for command in (to_lora, compress):
        command.add_argument("--adapter", required=True, help="folder or Hub id of a TA-LoRA adapter of mSAM")
    for command in (from_loras, curve):
        command.add_argument("--loras", required=True, nargs="+", metavar="TASK=FOLDER", help="one LoRA per task")
    for command in (from_loras, compress):
        command.add_argument("--r", type=int, required=command is compress, help="rank of the input factor, at most")
        command.add_argument("--r_out", type=int, help="rank of the output factor, at most; default: r")
        command.add_argument("--r_task", type=int, help="rank of the task factor, at most; default: as it is")
    from_loras.add_argument("--modules_from", help="the task whose norms and biases all tasks get, where they differ")
    curve.add_argument("--ranks", type=int, nargs="+", help="ranks to try; default: about fifteen up to the exact one")
    to_lora.add_argument("--task", required=True, help="name of the task")
    for command in (to_lora, from_loras, compress):
        command.add_argument("--output", required=True, help="folder to write")
    curve.add_argument("--output", required=True, help="PNG file to write")
    return parser.parse_args()


def main() -> None:
    """Do the one thing that was asked."""
    args = parse_arguments()
    if args.command == "to_lora":
        with kept_image_processor(args.adapter, args.output):
            peft_talora.to_lora(peft_talora.load(args.adapter), args.task, args.output)
    elif args.command == "from_loras":
        loras = parse_loras(args.loras)
        ranks = (args.r, args.r_out, args.r_task)
        print_errors(peft_talora.from_loras(loras, args.output, *ranks, modules_from=args.modules_from))
    elif args.command == "compress":
        model = peft_talora.load(args.adapter)
        print_errors(peft_talora.compress(model, args.r, args.r_out, args.r_task, new_adapter_name="compressed"))
        model.set_adapter("compressed")
        with kept_image_processor(args.adapter, args.output):
            peft_talora.save_adapter(model, args.output)
    else:
        draw_error(parse_loras(args.loras), args.ranks, Path(args.output))


@contextmanager
def kept_image_processor(adapter: str, output: str):
    """What made the adapter's `pixel_values` goes along, where it was saved; `output` may be the adapter's folder."""
    file = fetch(adapter) / PROCESSOR_NAME
    text = file.read_text() if file.is_file() else None
    yield
    if text is not None:
        with write_aside(output) as aside:
            (aside / PROCESSOR_NAME).write_text(text)


def parse_loras(pairs: list[str]) -> dict[str, str]:
    """From `task=folder` to a dict, in this order."""
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise SystemExit(f"--loras takes TASK=FOLDER; got {wrong}.")
    return dict(pair.split("=", 1) for pair in pairs)


def print_errors(errors) -> None:
    """One line per layer, then the overall error."""
    for name, error in {**errors.layers, "all layers": errors.overall}.items():
        print(f"{name:<48}{error:>12.3e}")


def draw_error(loras: dict[str, str], ranks: list[int] | None, output: Path) -> None:
    """The overall error for every rank of the layers and of the task factor: a table and a picture."""
    exact = stacked(read_loras(loras))
    whole = max(max(tensor.truncated((None, None, None)).core.shape[:2]) for tensor in exact.values())
    ranks = ranks or sorted({1, 2, 3, *range(4, whole, max(whole // 12, 1)), whole})
    for rank in ranks:
        check_ranks(ranks=rank)

    def error(r: int, r_task: int) -> float:
        cut = {name: tensor.truncated((r, r, r_task)) for name, tensor in exact.items()}
        return relative_errors(exact, cut).overall

    curves = {f"r_task = {r_task}": [(r, error(r, r_task)) for r in ranks] for r_task in range(len(loras), 0, -1)}
    print("  r" + "".join(f"{label:>14}" for label in curves))
    for row in zip(*curves.values(), strict=True):
        print(f"{row[0][0]:>3}" + "".join(f"{value:>14.2e}" for _, value in row))
    with write_aside(output.parent) as aside:
        title = f"{len(loras)} LoRAs as one TA-LoRA: relative error of the update"
        draw_curves(curves, title, "rank r of the layers").save(aside / output.name)


if __name__ == "__main__":
    main()
