"""Evaluate a trained adapter on a split.

    python recipes/evaluation.py --adapter runs/train                       # the figures of its results.json again
    python recipes/evaluation.py --adapter runs/train/depth                 # of a method with an adapter per task
    accelerate launch --num_processes 8 recipes/evaluation.py --adapter user/name --data_root my_data --split test

Data, split, batch size and task order default to what the adapter was trained with, as its `results.json` says.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

from accelerate import Accelerator

import peft_talora
from peft_talora import data, engine, evaluation, files, hub, sources


@dataclass
class EvaluateArguments(sources.DataArguments):
    """What the recipe can be told, beside what `DataArguments` says."""

    adapter: str = field(default="runs/train", metadata={"help": "The adapter's folder, or its Hub id."})
    base: str | None = field(default=None, metadata={"help": "SAM checkpoint. None: the one the adapter names."})
    split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    task_order: str = field(default="auto", metadata={"help": "'folded', 'sequential', or 'auto' by device."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "'no', 'fp16' or 'bf16'. None: the launcher's."}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file to write the figures to."})


def main() -> None:
    """Load, measure, print."""
    args = engine.parse_arguments(EvaluateArguments)
    folder = hub.fetch(args.adapter)
    args = engine.parse_arguments(EvaluateArguments, defaults=defaults_of(folder))
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    engine.set_threads(args, accelerator)
    model = peft_talora.load(folder, base=args.base).to(accelerator.device)
    base = model.get_base_model()
    tasks = [base.task(name) for name in base.task_names]
    collator = data.Collator(tasks, peft_talora.load_image_processor(folder))
    image_size = base.config.vision_config.image_size
    dataset = sources.open_split(args, args.split, tasks, image_size, args.max_eval_samples)
    order = engine.resolve_task_order(args.task_order, accelerator.device, base.task_conditional)
    metrics, _ = evaluation.evaluate(accelerator, model, dataset, collator, args.per_device_eval_batch_size, order)
    for task, figures in metrics.items():
        for name, value in figures.items():
            accelerator.print(f"{task:<14}{name:<18}{value!r:>24}")
    if args.output and accelerator.is_main_process:
        output = Path(args.output)
        with files.write_aside(output.parent) as aside:
            files.write_json(aside / output.name, metrics)
    accelerator.end_training()


def defaults_of(folder: Path) -> dict:
    """What decides the last digits of the training run's figures, where the folder tells it."""
    file = folder / "results.json"
    if not file.is_file():
        return {}
    results = json.loads(file.read_text())
    trained = results["arguments"]
    known = {field.name for field in fields(sources.DataArguments)}
    defaults = {name: value for name, value in trained.items() if name in known}
    defaults |= {name: results[name] for name in ("task_order", "mixed_precision")}
    if len(results["after"]) < len(trained["tasks"]):
        defaults["allow_unlabelled"] = True  # of an image that another task has a label of
    return {"split": trained["test_split"], **defaults}


if __name__ == "__main__":
    main()
