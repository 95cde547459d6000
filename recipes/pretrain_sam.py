"""Pre-train the small SAM as SAM is trained: promptable segmentation, by points, boxes and no prompt at all.

    accelerate launch recipes/pretrain_sam.py --output_dir runs/pretrain
    accelerate launch recipes/pretrain_sam.py --output_dir runs/pretrain --resume_from_checkpoint latest
    python recipes/pretrain_sam.py --output_dir runs/rooms --data rooms         # the same on SyntheticScenes
    python recipes/pretrain_sam.py --measure runs/pretrain \
        --compare rooms=runs/rooms --data_root camvid --ignored_class 11        # a finished one, beside others

The checkpoint in `peft_talora/checkpoints/small-sam` was made by it. It writes a stock `SamModel` in half precision
with its image processor, `pretraining.json` (how well it segments, beside baselines) and a card.

Axes: B images, P prompts of each, M masks of each prompt, H W pixels, h w SAM's low-resolution masks.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import extract_model_from_parallel, set_seed, tqdm
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import SamModel

import peft_talora
from peft_talora import checkpoint, data, engine, files, losses, promptable, small_sam
from peft_talora.benchmark.records import describe_hardware
from peft_talora.prompts import jitter_boxes, mask_boxes, mask_iou, random_points
from peft_talora.sharding import refuse_split

PROMPTS = {"click": 0.3, "click, one mask": 0.1, "box": 0.4, "points": 0.1, "none": 0.1}  # share of the steps
OWN = ("pre-trained", "untrained", "box filled")  # names in the table of figures that `compare` cannot have


@dataclass
class PretrainArguments:
    """What the recipe can be told."""

    output_dir: str = field(default="runs/pretrain", metadata={"help": "Folder for the result."})
    data: str = field(default="objects", metadata={"help": "'objects' (ObjectScenes) or 'rooms' (SyntheticScenes)."})
    image_size: int = field(default=128, metadata={"help": "Side of the images in pixels, a multiple of 32."})
    half_size_steps: int = field(
        default=6000, metadata={"help": "Steps before, at half the image size: they cost a quarter. 0: none."}
    )
    max_steps: int = field(default=3000, metadata={"help": "Steps at the full size; no image is seen twice."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Images per step and process."})
    prompts: int = field(default=8, metadata={"help": "Prompts per image and step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of Muon and AdamW."})
    weight_decay: float = field(default=0.05, metadata={"help": "Decoupled weight decay."})
    warmup_steps: int = field(default=200, metadata={"help": "Steps with a rising learning rate; then a cosine."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are scaled down to this norm."})
    mixed_precision: str = field(default="bf16", metadata={"help": "'bf16' or 'no'."})
    seed: int = field(default=0, metadata={"help": "Of weights, images and prompts."})
    num_threads: int | None = field(default=None, metadata={"help": "CPU threads per process. None: all cores."})
    dataloader_num_workers: int = field(default=1, metadata={"help": "Processes that draw images; 0: none."})
    save_steps: int = field(default=200, metadata={"help": "Steps between checkpoints."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "'latest' goes on with output_dir's."})
    measure: str | None = field(
        default=None,
        metadata={"help": "Train nothing: measure what this recipe left in that folder; its figures and card change."},
    )
    test_images: int = field(default=256, metadata={"help": "Held-out generated images of each kind."})
    compare: list[str] = field(
        default_factory=list, metadata={"help": "Other SAM checkpoints to measure, as name=folder."}
    )
    data_root: str | None = field(
        default=None,
        metadata={"help": "Real images to measure on: <root>/<real_split>/image and /segmentation, named by <root>."},
    )
    real_split: str = field(default="val", metadata={"help": "That split."})
    ignored_class: int = field(default=losses.IGNORE_INDEX, metadata={"help": "Its class that is no region."})


class MaskTargets(Dataset):
    """Images as the encoder takes them, (3, H, W), with as many masks, drawn anew from those of the image."""

    def __init__(self, scenes: Dataset, prompts: int):
        self.scenes, self.prompts = scenes, prompts
        processor = data.make_image_processor(scenes.size)
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict:
        sample = self.scenes[index]
        # Large masks are the easier ones to begin with, and small ones are many.
        side_K = sample["masks"].flatten(1).float().sum(1).sqrt()
        generator = torch.Generator().manual_seed(index)
        chosen = torch.multinomial(side_K, self.prompts, replacement=True, generator=generator)
        prominent = promptable.most_prominent(sample["masks"])
        return {
            "pixel_values": (sample["image"] - self.mean) / self.std,
            "masks": sample["masks"][chosen],
            "prominent": sample["masks"][prominent],
        }


def make_scenes(kind: str, split: str, num_images: int, size: int, seed: int = 0) -> Dataset:
    """The images to learn from, or held-out ones, which are those of seed 0 for every run."""
    kinds = {"objects": data.ObjectScenes, "rooms": promptable.RoomMasks}
    if kind not in kinds:
        raise ValueError(f"`data` is {kind!r}; allowed: {', '.join(kinds)}")
    return kinds[kind](split, num_images, size, seed)


def draw_prompts(masks_BPHW: torch.Tensor, kind: str, generator: torch.Generator) -> dict:
    """What `SamModel` takes for one kind of prompt."""
    B, P = masks_BPHW.shape[:2]
    masks_NHW = masks_BPHW.flatten(0, 1)
    if kind == "none":
        return {}
    if kind == "box":
        return {"input_boxes": jitter_boxes(mask_boxes(masks_NHW), generator).view(B, P, 4)}
    points = [random_points(masks_NHW, generator)]
    labels = [1]
    if kind == "points":  # one more inside, and one outside but near
        rows_NHW = F.max_pool2d(masks_NHW.float(), (1, 21), stride=1, padding=(0, 10))
        near = F.max_pool2d(rows_NHW, (21, 1), stride=1, padding=(10, 0)).bool() & ~masks_NHW
        near = torch.where(near.flatten(1).any(1)[:, None, None], near, ~masks_NHW)
        points += [random_points(masks_NHW, generator), random_points(near, generator)]
        labels = [1, 1, 0]
    return {
        "input_points": torch.stack(points, dim=1).view(B, P, len(labels), 2),
        "input_labels": torch.tensor(labels).expand(B, P, -1),
    }


def mask_loss(masks_BPMhw: torch.Tensor, iou_BPM: torch.Tensor, targets_BPHW: torch.Tensor) -> torch.Tensor:
    """5 · focal + 2 · Dice of the best of the M masks, and the squared error of all predicted IoUs.

    These are SAM's losses (appendix A) in other shares: with its own, 20 : 1 and three quarters of the focal loss's
    weight on the background, a network that starts from random weights stays at empty masks for thousands of steps.
    """
    masks_BPMhw, iou_BPM = masks_BPMhw.float(), iou_BPM.float()
    covered_BPhw = F.adaptive_avg_pool2d(targets_BPHW.float(), masks_BPMhw.shape[-2:])
    covered_BPMhw = covered_BPhw[:, :, None].expand_as(masks_BPMhw)
    focal_BPM = losses.focal_loss(masks_BPMhw, covered_BPMhw, alpha=0.5)
    loss_BPM = 5 * focal_BPM + 2 * losses.dice_loss(masks_BPMhw, covered_BPMhw)
    true_iou_BPM = mask_iou(masks_BPMhw > 0, covered_BPMhw >= 0.5)
    return loss_BPM.amin(-1).mean() + (iou_BPM - true_iou_BPM).square().mean()


def step_loss(model: torch.nn.Module, batch: dict, step: int, seed: int) -> torch.Tensor:
    """The loss of one step; kind and places of its prompts are a function of seed and step."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    kinds, shares = list(PROMPTS), torch.tensor(list(PROMPTS.values()))
    kind = kinds[int(torch.multinomial(shares, 1, generator=generator))]
    targets = batch["prominent"][:, None] if kind == "none" else batch["masks"]
    prompts = {name: value.to(targets.device) for name, value in draw_prompts(targets.cpu(), kind, generator).items()}
    output = model(pixel_values=batch["pixel_values"], multimask_output=kind == "click", **prompts)
    return mask_loss(output.pred_masks, output.iou_scores, targets)


def main() -> None:
    """Train, measure, write."""
    args = engine.parse_arguments(PretrainArguments)
    if args.measure is not None:
        measure_again(args)
        return
    check(args)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        # A step's prompts use some of the prompt encoder only.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    refuse_split(accelerator, "this recipe")
    engine.set_threads(args, accelerator)
    set_seed(args.seed)
    model, progress = train(args, accelerator)
    if accelerator.is_main_process:
        # Without the wrapper of mixed precision: it is measured in float32, as it will be used.
        report(args, accelerator, extract_model_from_parallel(model, keep_fp32_wrapper=False), progress)
    accelerator.end_training()


def check(args: PretrainArguments) -> None:
    """Raise ValueError for what would fail later: at a checkpoint, or when the finished run is measured."""
    for name in ("max_steps", "per_device_train_batch_size", "prompts", "save_steps", "test_images"):
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` is {getattr(args, name)}; allowed: 1 or more.")
    make_scenes(args.data, "train", 1, args.image_size)
    compared_folders(args)
    held_out(args)


def compared_folders(args: PretrainArguments) -> dict[str, str]:
    """The folders of `compare` by name."""
    folders = {}
    for entry in args.compare:
        name, _, folder = entry.partition("=")
        if not (name and folder):
            raise ValueError(f"`compare` has {entry!r}; write name=folder.")
        if name in (*OWN, *folders):
            raise ValueError(f"`compare` has the name {name!r}; allowed: each once, and none of {', '.join(OWN)}.")
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"`compare`: {folder} is no checkpoint; it has no config.json.")
        folders[name] = folder
    return folders


def describe_compared(args: PretrainArguments) -> dict[str, dict]:
    """How the compared checkpoints that this recipe has made were trained, by name."""
    reports = {name: Path(folder) / "pretraining.json" for name, folder in compared_folders(args).items()}
    trained = {name: json.loads(file.read_text())["training"] for name, file in reports.items() if file.is_file()}
    return {name: {key: own[key] for key in ("data", "images", "minutes")} for name, own in trained.items()}


def held_out(args: PretrainArguments) -> dict[str, Dataset]:
    """The sets of images to measure on."""
    sets = {kind: make_scenes(kind, "test", args.test_images, args.image_size) for kind in ("objects", "rooms")}
    if args.data_root is not None:
        sets[Path(args.data_root).name] = promptable.RegionMasks(args.data_root, args.real_split, args.ignored_class)
    return sets


def train(args: PretrainArguments, accelerator: Accelerator) -> tuple[torch.nn.Module, checkpoint.Progress]:
    """Take all steps that are left, of both stages. Returns the prepared model and how the training went."""
    model = small_sam.make_small_sam(args.image_size, args.seed)
    if not args.half_size_steps:
        return train_stage(args, accelerator, model, "train")
    folder, size = Path(args.output_dir) / "half-size", args.image_size // 2
    half = replace(args, image_size=size, max_steps=args.half_size_steps, half_size_steps=0, output_dir=str(folder))
    begun = checkpoint.list_checkpoints(Path(args.output_dir))
    if not checkpoint.list_checkpoints(folder):
        half.resume_from_checkpoint = None
    first, earlier = train_stage(half, accelerator, small_sam.make_small_sam(size, args.seed), "train-half")
    small_sam.take_over(model, extract_model_from_parallel(first, keep_fp32_wrapper=False))
    accelerator.free_memory()
    full = args if begun else replace(args, resume_from_checkpoint=None)
    model, progress = train_stage(full, accelerator, model, "train")
    progress.seconds += earlier.seconds
    progress.images += earlier.images
    progress.history = [*earlier.history, *progress.history]
    return model, progress


def train_stage(
    args: PretrainArguments, accelerator: Accelerator, model: SamModel, split: str
) -> tuple[torch.nn.Module, checkpoint.Progress]:
    """Take all steps that are left at one image size, on the scenes of a split."""
    model.set_attn_implementation("eager")  # on a CPU a third faster than fused kernels at so few tokens
    model.shared_image_embedding.positional_embedding.requires_grad_(False)  # a constant in SAM's own code
    optimizers = make_optimizers(model, args)
    processes = accelerator.num_processes
    schedulers = [
        transformers.get_cosine_schedule_with_warmup(o, args.warmup_steps * processes, args.max_steps * processes)
        for o in optimizers
    ]
    model, *updates = accelerator.prepare(model, *optimizers, *schedulers)  # schedulers come last here, too
    folder = Path(args.output_dir)
    arguments = {**deciding_arguments(args), "num_processes": processes}
    progress = checkpoint.Progress(tasks=[], arguments=arguments, origin=origin(args))
    if args.resume_from_checkpoint is not None:
        found = checkpoint.find_checkpoint(folder, args.resume_from_checkpoint)
        if found.name == f"checkpoint-{args.max_steps}":
            del progress.arguments["num_processes"]  # what is finished may be measured by any number of them
        progress = checkpoint.load_checkpoint(accelerator, found, folder, progress)
    bar = tqdm(total=args.max_steps, initial=progress.step, desc="pre-training", dynamic_ncols=True)
    recent, begun = [], time.perf_counter()
    for batch in batches_from(args, accelerator, split, progress.step):
        loss = step_loss(model.train(), batch, progress.step, args.seed)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        for update in updates:
            update.step()
        model.zero_grad()
        progress.step += 1
        progress.images += args.per_device_train_batch_size * processes
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            raise FloatingPointError(f"the loss of step {progress.step} is {recent[-1]}: lower `learning_rate`")
        bar.update()
        if progress.step % args.save_steps == 0 or progress.step == args.max_steps:
            progress.seconds += time.perf_counter() - begun
            progress.history.append({"step": progress.step, "loss": sum(recent) / len(recent)})
            accelerator.print(
                f"step {progress.step}: loss {progress.history[-1]['loss']:.4f}, {progress.seconds:.0f} s"
            )
            checkpoint.save_checkpoint(accelerator, folder, progress, keep=1)
            recent, begun = [], time.perf_counter()
    bar.close()
    return model, progress


def make_optimizers(model: SamModel, args: PretrainArguments) -> list[torch.optim.Optimizer]:
    """Muon (arXiv:2502.16982) for the matrices of linear layers, AdamW for all else, at the same learning rates.

    At 1.14 times the time of a step, the loss after 600 steps at a rate of 1e-3 is 1.46, that of AdamW alone 1.57.
    """
    matrices = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    taken = {id(parameter) for parameter in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    settings = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    return [
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings),
        torch.optim.AdamW(others, betas=(0.9, 0.95), **settings),
    ]


def deciding_arguments(args: PretrainArguments) -> dict:
    """What decides the course of the training."""
    free = {"output_dir", "num_threads", "dataloader_num_workers", "save_steps", "resume_from_checkpoint"}
    free |= {"measure", "test_images", "compare", "data_root", "real_split", "ignored_class"}
    return {name: value for name, value in asdict(args).items() if name not in free}


def origin(args: PretrainArguments) -> dict:
    """What trains the model, which need not be what measures it."""
    versions = {module.__name__: module.__version__ for module in (peft_talora, torch, transformers)}
    return {"hardware": describe_hardware(args.num_threads), "versions": versions}


def batches_from(args: PretrainArguments, accelerator: Accelerator, split: str, step: int) -> Iterator[dict]:
    """The batches of the steps that are left, each image once."""
    batch_size = args.per_device_train_batch_size * accelerator.num_processes
    scenes = make_scenes(args.data, split, args.max_steps * batch_size, args.image_size, args.seed)
    targets = MaskTargets(scenes, args.prompts)
    left = Subset(targets, range(step * batch_size, len(targets)))
    loader = DataLoader(
        left, args.per_device_train_batch_size, num_workers=args.dataloader_num_workers, pin_memory=False
    )
    return iter(accelerator.prepare(loader)) if len(left) else iter(())


def report(args: PretrainArguments, accelerator: Accelerator, model: SamModel, progress: checkpoint.Progress) -> None:
    """Measure the model and its baselines on held-out images; write checkpoint, figures and card."""
    model = model.half().float().eval()  # as it will be read again
    results = {
        "figures": measure(args, model, accelerator.device),
        "compared": describe_compared(args),
        "training": {
            "data": args.data,
            "images": progress.images,
            "minutes": progress.seconds / 60,
            **progress.origin,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "losses": progress.history,
            "arguments": deciding_arguments(args),
        },
    }
    with files.write_aside(args.output_dir) as aside:
        save_in_half_precision(model, aside)
        data.make_image_processor(args.image_size).save_pretrained(aside)
        write_results(aside, results)
    print(f"The checkpoint, pretraining.json and a card are in {args.output_dir}.")


def measure_again(args: PretrainArguments) -> None:
    """Measure a finished checkpoint, whose other arguments are those that it was trained with.

    Raises:
        ValueError: If the folder is none that this recipe has finished.
    """
    file = Path(args.measure) / "pretraining.json"
    if not file.is_file():
        raise ValueError(f"`measure` is {args.measure!r}: it has no {file.name}, which this recipe leaves at its end.")
    training = json.loads(file.read_text())["training"]
    trained = {name: training["arguments"][name] for name in ("data", "image_size", "seed")}
    args = replace(args, **trained)
    check(args)
    accelerator = Accelerator()
    engine.set_threads(args, accelerator)
    model = SamModel.from_pretrained(args.measure, dtype=torch.float32).eval()
    results = {
        "figures": measure(args, model, accelerator.device),
        "compared": describe_compared(args),
        "training": training,
    }
    with files.write_aside(args.measure) as aside:
        write_results(aside, results)
    print(f"pretraining.json and the card in {args.measure} have these figures now.")


def measure(args: PretrainArguments, model: SamModel, device: torch.device) -> dict[str, dict]:
    """Figures by set of images, of the model and of what it is compared with."""
    models = {"pre-trained": model, "untrained": small_sam.make_small_sam(args.image_size, args.seed)}
    for name, folder in compared_folders(args).items():
        models[name] = SamModel.from_pretrained(folder, dtype=torch.float32).eval()
    models = {name: model.to(device) for name, model in models.items()}
    return {name: promptable.measure(models, scenes) for name, scenes in held_out(args).items()}


def write_results(folder: Path, results: dict) -> None:
    """Write figures and card, and show the figures."""
    files.write_json(folder / "pretraining.json", results)
    (folder / "README.md").write_text(card(results))
    print(figures_table(results["figures"]))


def save_in_half_precision(model: SamModel, folder: Path) -> None:
    """Write a checkpoint of half the size, whose configuration says that it is to be used in float32."""
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    files.write_json(folder / "config.json", {**config, "dtype": "float32"})
    model.float()


def figures_table(figures: dict[str, dict]) -> str:
    """Mean IoU as Markdown, by set of images and model."""
    columns = ("box", "click", "best of 3", "no prompt")
    lines = [
        "| images | model | one box | one click | best of its 3 masks | no prompt |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, models in figures.items():
        for model, values in models.items():
            cells = [f"{values[column]:.3f}" if column in values else "" for column in columns]
            lines.append(f"| {name}, {values['masks']} masks | {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


CARD = """---
library_name: transformers
license: apache-2.0
pipeline_tag: mask-generation
tags: [segment-anything, small, synthetic]
---

# A small SAM

A stock `SamModel` of {millions:.1f} million parameters for images of {image_size} pixels: a base to try methods on
without downloads, not a replacement for Meta's SAM. `recipes/pretrain_sam.py` of `peft_talora` made it.

- **Trained on** {images:,} generated images ({data}), each seen once, with {prompts} prompts each: points, boxes, and
  none (which means the most prominent object). 5 · focal + 2 · Dice loss of the best mask, squared error of the
  predicted IoU. Prompts by masks were not trained.
- **Steps** of {batch} images: {half_size_steps} at half the image size, then {max_steps} at the full one; Muon for the
  matrices of linear layers, AdamW for all else, with a peak learning rate of {learning_rate:g} in both stages;
  precision {mixed_precision}, seed {seed}.
- **Cost**: {minutes:.0f} minutes on {hardware}.
- **Stored** in half precision; the configuration has it read as float32.
{compared}
Mean IoU on held-out images, of masks of at least 1/256 of the image; a box is the mask's own, a click its innermost
point:

{table}
"""


def card(results: dict) -> str:
    """The model card."""
    training = results["training"]
    compared = [
        f"- **Compared**: {name!r} is the same network trained on {own['images']:,} images ({own['data']}) in "
        f"{own['minutes']:.0f} minutes.\n"
        for name, own in results["compared"].items()
    ]
    return CARD.format(
        compared="".join(compared),
        **{**training["arguments"], **training},
        millions=training["parameters"] / 1e6,
        batch=training["arguments"]["per_device_train_batch_size"],
        table=figures_table(results["figures"]),
    )


if __name__ == "__main__":
    main()
