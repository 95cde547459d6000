"""Train one TA-LoRA adapter and the heads of mSAM on several dense tasks.

    accelerate launch recipes/train.py                                   # generated scenes, small SAM, any machine
    accelerate launch --num_processes 8 recipes/train.py --base facebook/sam-vit-base --data_root my_data ...
    accelerate launch recipes/train.py --config recipes/train.yaml       # arguments from a file; flags win

Everything lands in `--output_dir`: the adapter with its heads, `results.json`, `predictions.png`, a model card.
"""

import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import accelerate
import peft
import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration, set_seed, tqdm
from torch.utils.data import DataLoader, Subset

import peft_talora
from peft_talora import data, engine, hub
from peft_talora.plotting import draw_predictions


@dataclass
class TrainArguments:
    """What the recipe can be told. Lists are given as `--tasks segmentation=13 depth=1`."""

    output_dir: str = field(default="runs/train", metadata={"help": "Folder for all results."})
    base: str | None = field(
        default=None,
        metadata={"help": "SAM checkpoint, Hub id or folder. None: a small random SAM, made on the spot."},
    )
    tasks: list[str] = field(
        default_factory=lambda: ["segmentation", "depth", "normals"],
        metadata={"help": "Tasks as name, name=channels or name=kind:channels, in order."},
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Long side of the encoder's input in pixels. None: the base's."}
    )
    decoder_mode: str = field(default="channel", metadata={"help": "Heads: 'channel' (the paper's) or 'token'."})
    normalize: bool = field(default=True, metadata={"help": "Subtract SAM's mean colour and divide by its deviation."})

    data_root: str | None = field(
        default=None, metadata={"help": "Folder with <split>/image and <split>/<task>. None: generated scenes."}
    )
    train_split: str = field(default="train", metadata={"help": "Split that is trained on."})
    val_split: str | None = field(
        default=None, metadata={"help": "Split that chooses the checkpoint. None: a part of the training images."}
    )
    val_fraction: float = field(default=0.1, metadata={"help": "Share of the training images, without a val_split."})
    test_split: str = field(default="test", metadata={"help": "Split of the reported figures; chooses nothing."})
    ignored_class: int = field(default=255, metadata={"help": "Class of segmentation that means 'no label'."})
    derive_edges: bool = field(default=False, metadata={"help": "Take edges from segmentation's borders."})
    num_images: int = field(default=512, metadata={"help": "Generated scenes to train on."})
    augment: bool = field(default=True, metadata={"help": "Random scale-crop (1, 1.2, 1.5) and horizontal flip."})

    r: int = field(default=16, metadata={"help": "Rank of the update's factors."})
    r_task: int | None = field(default=None, metadata={"help": "Rank of the task factor. None: tasks, up to four."})
    alpha: float | None = field(default=None, metadata={"help": "The update is scaled by alpha / r. None: r / 2."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the update."})
    target_modules: str | None = field(default=None, metadata={"help": "Layers to adapt, a regular expression."})
    train_norms: bool = field(default=True, metadata={"help": "Train the layer norms of the encoder's blocks too."})

    num_train_epochs: int = field(default=3, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Images per step and process."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Images per pass and process."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimiser step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=1e-6, metadata={"help": "Decoupled weight decay."})
    warmup_ratio: float = field(default=0.05, metadata={"help": "Share of the steps with a rising learning rate."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are scaled down to this norm."})
    task_order: str = field(
        default="auto", metadata={"help": "'folded': all tasks in one pass; 'sequential'; 'auto' by device."}
    )
    activation_checkpointing: bool = field(default=False, metadata={"help": "Recompute blocks in backward."})
    seed: int = field(default=0, metadata={"help": "Of data, weights and order."})

    eval_steps: int | None = field(default=None, metadata={"help": "Steps between validations. None: every epoch."})
    save_steps: int | None = field(default=None, metadata={"help": "Steps between checkpoints. None: every epoch."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "A checkpoint's path, or 'latest'."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Repository user/name to upload the result to."})


def main() -> None:
    """Build, train, report."""
    args = parse_arguments()
    output_dir = Path(args.output_dir)
    tasks = [parse_task(text, args) for text in args.tasks]
    accelerator = make_accelerator(args)
    set_seed(args.seed)

    model = build_model(args, tasks, accelerator, output_dir)
    base = model.get_base_model()
    processor = data.make_image_processor(base.config.vision_config.image_size, args.normalize)
    collator = data.Collator([base.task(name) for name in base.task_names], processor)
    train_set, val_set, test_set = build_datasets(args, collator.tasks)
    loader = DataLoader(
        train_set, batch_size=args.per_device_train_batch_size, shuffle=True, drop_last=True, collate_fn=collator
    )
    if len(loader) == 0:
        raise ValueError(f"{len(train_set)} training images do not fill one batch; lower per_device_train_batch_size.")
    order = engine.resolve_task_order(args.task_order, accelerator.device)

    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=args.learning_rate, weight_decay=args.weight_decay
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps_per_epoch = -(-len(loader) // args.gradient_accumulation_steps)
    total_steps = steps_per_epoch * args.num_train_epochs
    scheduler = transformers.get_linear_schedule_with_warmup(
        optimizer,
        num_warmup_steps=round(args.warmup_ratio * total_steps) * accelerator.num_processes,
        num_training_steps=total_steps * accelerator.num_processes,
    )
    scheduler = accelerator.prepare(scheduler)
    accelerator.register_save_state_pre_hook(engine.save_adapter_only)
    accelerator.register_load_state_pre_hook(engine.load_adapter_only)

    def measure(dataset):
        return engine.evaluate(accelerator, model, dataset, collator, args.per_device_eval_batch_size, order)

    def validate():
        """Measure on the validation images; if this is the best so far, keep the adapter."""
        metrics, losses = measure(val_set)
        loss = sum(losses.values())
        progress.history.append({"step": progress.step, "loss": loss, "losses": losses, "metrics": metrics})
        accelerator.print(f"step {progress.step}: validation loss {loss:.4f} {headline(metrics)}")
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step = loss, progress.step
            if accelerator.is_main_process:
                hub.save_adapter(accelerator.unwrap_model(model), output_dir / "best", processor)

    if args.resume_from_checkpoint:
        checkpoint = engine.find_checkpoint(output_dir, args.resume_from_checkpoint)
        progress = engine.load_checkpoint(accelerator, checkpoint, base.config.tasks)
        accelerator.print(f"resumed from {checkpoint} at step {progress.step} of {total_steps}")
    else:
        progress = engine.Progress(tasks=base.config.tasks, before=measure(test_set)[0])
        accelerator.print(f"before training: {headline(progress.before)}")

    bar = tqdm(total=total_steps, initial=progress.step, desc="training", dynamic_ncols=True)
    while progress.epoch < args.num_train_epochs:
        train_set.set_epoch(progress.epoch)
        rest = accelerator.skip_first_batches(loader, progress.batch)
        rest.set_epoch(progress.epoch)
        model.train()
        begun = time.perf_counter()
        for batch in rest:
            with accelerator.accumulate(model):
                losses = engine.backward(accelerator, model, batch, order)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            progress.batch += 1
            progress.images += len(batch["pixel_values"]) * accelerator.num_processes
            if not accelerator.sync_gradients:
                continue
            progress.step += 1
            bar.update()
            bar.set_postfix({name: f"{loss.item():.3f}" for name, loss in losses.items()})
            progress.seconds += time.perf_counter() - begun
            if args.eval_steps and progress.step % args.eval_steps == 0:
                validate()
            if args.save_steps and progress.step % args.save_steps == 0:
                engine.save_checkpoint(accelerator, output_dir, progress, args.save_total_limit)
            begun = time.perf_counter()
        progress.epoch, progress.batch = progress.epoch + 1, 0
        if not args.eval_steps:
            validate()
        if not args.save_steps:
            engine.save_checkpoint(accelerator, output_dir, progress, args.save_total_limit)
    bar.close()
    if args.eval_steps:
        validate()

    accelerator.wait_for_everyone()
    engine.load_adapter_only([accelerator.unwrap_model(model)], output_dir / "best")
    after = measure(test_set)[0]
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(model)
        results = {
            "before": progress.before,
            "after": after,
            "parameters": engine.count_parameters(model),
            "images": {"train": len(train_set), "validation": len(val_set), "test": len(test_set)},
            "images_per_second": progress.images / progress.seconds,
            "best_step": progress.best_step,
            "history": progress.history,
            "seed": args.seed,
            "task_order": order,
            "device": str(accelerator.device),
            "processes": accelerator.num_processes,
            "arguments": asdict(args),
            "versions": {
                module.__name__: module.__version__ for module in (peft_talora, torch, transformers, peft, accelerate)
            },
        }
        report(model, results, processor, collator, test_set, output_dir, args)
    accelerator.end_training()


def parse_arguments() -> TrainArguments:
    """Arguments from flags, and from the YAML file that `--config` names; flags win."""
    argv = sys.argv[1:]
    parser = transformers.HfArgumentParser(TrainArguments)
    if "--config" in argv:
        at = argv.index("--config")
        file, argv = argv[at + 1], argv[:at] + argv[at + 2 :]
        (from_file,) = parser.parse_yaml_file(file)
        parser.set_defaults(**asdict(from_file))
    (args,) = parser.parse_args_into_dataclasses(argv)
    return args


def parse_task(text: str, args: TrainArguments) -> dict:
    """Parse `name`, `name=channels` or `name=kind:channels`; without channels the generated scenes' are meant."""
    name, _, rest = text.partition("=")
    kind, _, channels = rest.rpartition(":")
    if not rest and not args.data_root and name in data.SYNTHETIC_TASKS:
        channels = data.SYNTHETIC_TASKS[name]
    if not str(channels).isdigit():
        raise ValueError(f"task {text!r}: write name=channels or name=kind:channels, for example segmentation=13.")
    return {"name": name, "kind": kind or name, "channels": int(channels)}


def make_accelerator(args: TrainArguments) -> Accelerator:
    """An accelerator whose data order depends on the seed alone."""
    return Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        project_config=ProjectConfiguration(project_dir=args.output_dir),
        # Task by task, each backward pass leaves the other tasks' heads without a gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=args.task_order != "folded")],
    )


def build_model(args: TrainArguments, tasks: list[dict], accelerator: Accelerator, output_dir: Path):
    """MSAM on the base checkpoint, with a TA-LoRA adapter."""
    base = args.base
    if base is None:
        base = str(output_dir / "base")
        with accelerator.main_process_first():
            if not (output_dir / "base" / "config.json").exists():
                peft_talora.save_small_sam(base, seed=0)
    model = peft_talora.MSamModel.from_pretrained(
        base, tasks=tasks, decoder_mode=args.decoder_mode, image_size=args.image_size
    )
    config = peft_talora.TALoRAConfig(
        r=args.r,
        r_task=args.r_task,
        alpha=args.alpha,
        dropout=args.dropout,
        target_modules=args.target_modules,
        train_norms=args.train_norms,
    )
    model = peft.get_peft_model(model, config)
    if args.activation_checkpointing:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    return model


def build_datasets(args: TrainArguments, tasks) -> tuple:
    """Training, validation and test images. Without a validation split, training images are held out for it."""
    names = [task.name for task in tasks]

    def read(split):
        if args.data_root is None:
            share = 1 if split == args.train_split else 8
            return data.SyntheticScenes(split, args.num_images // share or 1, seed=args.seed, tasks=names)
        ignored = {"segmentation": args.ignored_class} if "segmentation" in names else None
        return data.FolderDataset(
            args.data_root, split, tasks, derive_edges=args.derive_edges, ignored_classes=ignored
        )

    train_set = read(args.train_split)
    if args.val_split is None:
        order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(args.seed)).tolist()
        held_out = max(1, round(args.val_fraction * len(train_set)))
        train_set, val_set = Subset(train_set, sorted(order[held_out:])), Subset(train_set, sorted(order[:held_out]))
    else:
        val_set = read(args.val_split)
    augmentation = (
        data.JointAugmentation(tasks) if args.augment else data.JointAugmentation(tasks, scales=(1.0,), flip=0.0)
    )
    return data.AugmentedDataset(train_set, augmentation, args.seed), val_set, read(args.test_split)


def headline(metrics: dict[str, dict[str, float]]) -> str:
    """Each task's first metric."""
    return ", ".join(
        f"{task} {name} {value:.4f}" for task, m in metrics.items() for name, value in list(m.items())[:1]
    )


@torch.no_grad()
def report(model, results, processor, collator, test_set, output_dir: Path, args: TrainArguments) -> None:
    """Write the adapter, results, picture and card; print the figures; upload if asked to."""
    samples = [test_set[index] for index in range(min(6, len(test_set)))]
    batch = collator(samples)
    model.eval()
    logits = []
    for number, sample in enumerate(samples):
        output = model(pixel_values=batch["pixel_values"][number : number + 1].to(model.device))
        sizes = batch["original_sizes"][number : number + 1]
        logits.append({k: v[0].cpu() for k, v in model.post_process(output.logits, sizes).items()})
    with hub.write_aside(output_dir) as aside:
        draw_predictions(collator.tasks, samples, logits).save(aside / "predictions.png")
        hub.write_json(aside / "results.json", results)
    hub.save_adapter(model, output_dir, processor, hub.model_card(model, results, args.push_to_hub))
    print_table(results)
    print(f"\nAdapter, results.json and predictions.png are in {output_dir}.")
    if args.push_to_hub:
        print(hub.push_to_hub(output_dir, args.push_to_hub))


def print_table(results: dict) -> None:
    """The metrics before and after, one per line."""
    print(f"\n{'task':<14}{'metric':<18}{'before':>10}{'after':>10}")
    for task, metrics in results["after"].items():
        for name, value in metrics.items():
            print(f"{task:<14}{name:<18}{results['before'][task][name]:>10.4f}{value:>10.4f}")


if __name__ == "__main__":
    main()
