"""Train one TA-LoRA adapter and the heads of mSAM on several dense tasks.

    accelerate launch recipes/train.py                                   # generated scenes, small SAM, any machine
    accelerate launch --num_processes 8 recipes/train.py --base facebook/sam-vit-base --data_root my_data ...
    accelerate launch recipes/train.py --config my.yaml                  # arguments from a file; flags win

Everything lands in `--output_dir`: the adapter with its heads, `results.json`, `predictions.png`, a model card.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import accelerate
import peft
import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.utils import set_seed, tqdm
from torch.utils.data import DataLoader, Dataset, Subset

import peft_talora
from peft_talora import checkpoint, data, engine, files, hub
from peft_talora.plotting import draw_predictions


@dataclass
class TrainArguments(engine.DataArguments):
    """What the recipe can be told, beside what `DataArguments` says."""

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

    train_split: str = field(default="train", metadata={"help": "Split that is trained on."})
    val_split: str | None = field(
        default=None, metadata={"help": "Split that chooses the checkpoint. None: a part of the training images."}
    )
    val_fraction: float = field(default=0.1, metadata={"help": "That part, as a share."})
    test_split: str = field(default="test", metadata={"help": "Split of the reported figures; it chooses nothing."})
    augment: bool = field(default=True, metadata={"help": "Random scale-crop (1, 1.2, 1.5) and horizontal flip."})

    talora_r: int = field(default=16, metadata={"help": "Rank of the update's factors."})
    talora_r_task: int | None = field(
        default=None, metadata={"help": "Rank of the task factor. None: tasks, up to four."}
    )
    talora_alpha: float | None = field(
        default=None, metadata={"help": "The update is scaled by alpha / r. None: r / 2."}
    )
    talora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the update."})
    target_modules: str = field(
        default=r".*vision_encoder\.layers\.\d+\.(attn\.(qkv|proj)|mlp\.lin[12])",
        metadata={"help": "Layers to adapt, a regular expression: all linears of the blocks; the paper has qkv."},
    )
    train_norms: bool = field(default=True, metadata={"help": "Train the layer norms of the encoder's blocks too."})

    orthogonality: float = field(
        default=0.0, metadata={"help": "Weight of the regulariser that keeps the factors' columns orthonormal."}
    )

    seed: int = field(default=0, metadata={"help": "Of the adapter's weights, the order of images and dropout."})
    num_train_epochs: int = field(default=3, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(default=2, metadata={"help": "Images per step and process."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that prepare batches; 0: none."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimiser step."})
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=1e-6, metadata={"help": "Decoupled weight decay."})
    warmup_ratio: float = field(default=0.05, metadata={"help": "Share of the steps with a rising learning rate."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are scaled down to this norm."})
    task_order: str = field(
        default="auto", metadata={"help": "'folded': all tasks in one pass; 'sequential'; 'auto' by device."}
    )
    activation_checkpointing: bool = field(default=False, metadata={"help": "Recompute blocks in backward."})

    eval_steps: int | None = field(default=None, metadata={"help": "Steps between validations. None: every epoch."})
    save_steps: int | None = field(default=None, metadata={"help": "Steps between checkpoints. None: every epoch."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "A checkpoint's path, or 'latest'."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Repository user/name to upload the result to."})


@dataclass
class Run:
    """What one training run is made of; `accelerator.prepare` has seen what it must see."""

    args: TrainArguments
    output_dir: Path
    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loader: DataLoader
    train_set: data.AugmentedDataset
    val_set: Dataset
    test_set: Dataset
    collator: data.Collator
    order: engine.TaskOrder
    total_steps: int
    progress: checkpoint.Progress

    @property
    def regularizer(self) -> Callable[[], torch.Tensor] | None:
        """What is added to the losses of the tasks."""
        if not self.args.orthogonality:
            return None
        return lambda: self.args.orthogonality * peft_talora.orthogonality_loss(self.model)

    def measure(self, dataset: Dataset):
        """Metrics and losses over a data set."""
        batch_size = self.args.per_device_eval_batch_size
        return engine.evaluate(self.accelerator, self.model, dataset, self.collator, batch_size, self.order)


def main() -> None:
    """Build, train, report."""
    run = build(engine.parse_arguments(TrainArguments))
    start(run)
    train(run)
    report(run)
    accelerator = run.accelerator
    # Data parallelism holds the process group. Freed as its last holder, it would destroy the group while it keeps
    # Python's lock, for which a thread of the group may be waiting: the process would never end.
    del run
    accelerator.free_memory()
    accelerator.end_training()


def start(run: Run) -> None:
    """Measure the untrained model, or go on where a checkpoint stopped."""
    if run.args.resume_from_checkpoint is None:
        run.progress.before, _ = run.measure(run.test_set)
        run.accelerator.print(f"before training: {headline(run.progress.before)}")
        return
    folder = checkpoint.find_checkpoint(run.output_dir, run.args.resume_from_checkpoint)
    run.progress = checkpoint.load_checkpoint(run.accelerator, folder, run.output_dir, run.progress)
    run.accelerator.print(f"resumed from {folder}: step {run.progress.step} of {run.total_steps}")


def train(run: Run) -> None:
    """All epochs that are left, with validation and checkpoints on the way."""
    args, progress = run.args, run.progress
    bar = tqdm(total=run.total_steps, initial=progress.step, desc="training", dynamic_ncols=True)
    while progress.epoch < args.num_train_epochs:
        train_epoch(run, bar)
        progress.epoch, progress.batch = progress.epoch + 1, 0
        if args.eval_steps is None:
            validate(run)
        if args.save_steps is None:
            checkpoint.save_checkpoint(run.accelerator, run.output_dir, progress, args.save_total_limit)
    bar.close()
    if not progress.history or progress.history[-1]["step"] < progress.step:
        validate(run)
    if args.save_steps and progress.step % args.save_steps:
        checkpoint.save_checkpoint(run.accelerator, run.output_dir, progress, args.save_total_limit)


def train_epoch(run: Run, bar: tqdm) -> None:
    """One pass over the training images, or over what is left of it."""
    args, progress, accelerator = run.args, run.progress, run.accelerator
    run.train_set.set_epoch(progress.epoch)
    batches = accelerator.skip_first_batches(run.loader, progress.batch)
    batches.set_epoch(progress.epoch)
    run.model.train()
    begun = time.perf_counter()
    for batch in batches:
        with accelerator.accumulate(run.model):
            losses = engine.backward(accelerator, run.model, batch, run.order, run.regularizer)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(run.model.parameters(), args.max_grad_norm)
            run.optimizer.step()
            run.scheduler.step()
            run.optimizer.zero_grad()
        progress.batch += 1
        progress.images += len(batch["pixel_values"]) * accelerator.num_processes
        if not accelerator.sync_gradients:
            continue
        progress.step += 1
        bar.set_postfix({name: f"{loss.item():.3f}" for name, loss in losses.items()}, refresh=False)
        bar.update()
        progress.seconds += time.perf_counter() - begun
        if args.eval_steps and progress.step % args.eval_steps == 0:
            validate(run)
        if args.save_steps and progress.step % args.save_steps == 0:
            checkpoint.save_checkpoint(accelerator, run.output_dir, progress, args.save_total_limit)
        begun = time.perf_counter()


def validate(run: Run) -> None:
    """Measure on the validation images; if they never did better, keep the adapter."""
    progress = run.progress
    metrics, losses = run.measure(run.val_set)
    loss = sum(losses.values())
    progress.history.append({"step": progress.step, "loss": loss, "losses": losses, "metrics": metrics})
    run.accelerator.print(f"step {progress.step}: validation loss {loss:.4f}, {headline(metrics)}")
    if not losses:
        raise ValueError(
            f"none of the {len(run.val_set)} validation images has a label, so no checkpoint can be chosen"
        )
    if math.isnan(loss):
        raise FloatingPointError(f"the validation loss at step {progress.step} is not a number: lower `learning_rate`")
    if progress.best_loss is None or loss < progress.best_loss:
        progress.best_loss, progress.best_step = loss, progress.step
        checkpoint.save_best(run.accelerator, run.model, run.output_dir)


def build(args: TrainArguments) -> Run:
    """Everything before the first step."""
    check_arguments(args)
    output_dir = Path(args.output_dir)
    distributed = DistributedDataParallelKwargs()
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
        kwargs_handlers=[distributed],
    )
    order = engine.resolve_task_order(args.task_order, accelerator.device)
    # Task by task, each backward pass leaves the other tasks' heads without a gradient.
    distributed.find_unused_parameters = order == "sequential"
    engine.set_threads(args, accelerator)
    set_seed(args.seed)
    model = build_model(args, accelerator, output_dir)
    base = model.get_base_model()
    processor = data.make_image_processor(base.config.vision_config.image_size, args.normalize)
    collator = data.Collator([base.task(name) for name in base.task_names], processor)
    train_set, val_set, test_set = build_datasets(args, collator.tasks, base.config.vision_config.image_size)
    batch_size = args.per_device_train_batch_size
    loader = DataLoader(
        train_set,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        # Opening an epoch draws a number. From the global generator, a resumed run's dropout would be one draw ahead.
        generator=torch.Generator().manual_seed(args.seed),
    )
    if len(loader) < accelerator.num_processes:
        raise ValueError(
            f"{len(train_set)} training images do not fill one batch of `per_device_train_batch_size`={batch_size} on "
            f"each of {accelerator.num_processes} processes: lower it, or give more images."
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    total_steps = math.ceil(len(loader) / args.gradient_accumulation_steps) * args.num_train_epochs
    # An accelerated scheduler takes one step per process.
    scheduler = transformers.get_linear_schedule_with_warmup(
        optimizer,
        num_warmup_steps=round(args.warmup_ratio * total_steps) * accelerator.num_processes,
        num_training_steps=total_steps * accelerator.num_processes,
    )
    accelerator.register_save_state_pre_hook(checkpoint.save_adapter_only)
    accelerator.register_load_state_pre_hook(checkpoint.load_adapter_only)
    return Run(
        args=args,
        output_dir=output_dir,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        scheduler=accelerator.prepare(scheduler),
        loader=loader,
        train_set=train_set,
        val_set=val_set,
        test_set=test_set,
        collator=collator,
        order=order,
        total_steps=total_steps,
        progress=checkpoint.Progress(tasks=base.config.tasks, arguments=deciding_arguments(args, accelerator)),
    )


def check_arguments(args: TrainArguments) -> None:
    """Refuse what would fail late."""
    for name in ("num_train_epochs", "save_total_limit", "per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` is {getattr(args, name)}; allowed: 1 or more.")
    if args.val_split is None and not 0 < args.val_fraction < 1:
        raise ValueError(f"`val_fraction` is {args.val_fraction}; allowed: between 0 and 1.")


def deciding_arguments(args: TrainArguments, accelerator: Accelerator) -> dict:
    """What decides the run's course: not where it reads and writes, how often it saves, or on how many cores."""
    free = {"output_dir", "data_root", "save_steps", "save_total_limit", "resume_from_checkpoint", "push_to_hub"}
    free |= {"num_threads", "per_device_eval_batch_size", "dataloader_num_workers"}
    deciding = {name: value for name, value in asdict(args).items() if name not in free}
    return {**deciding, "num_processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}


def build_model(args: TrainArguments, accelerator: Accelerator, output_dir: Path) -> peft.PeftModel:
    """An mSAM on the base checkpoint, with a TA-LoRA adapter."""
    tasks = [engine.parse_task(text, {} if args.data_root else data.SYNTHETIC_TASKS) for text in args.tasks]
    base = args.base or str(output_dir / "base")
    with accelerator.main_process_first():
        if args.base is None and not (output_dir / "base" / "model.safetensors").exists():
            peft_talora.save_small_sam(base)
    model = peft_talora.MSamModel.from_pretrained(
        base, tasks=tasks, decoder_mode=args.decoder_mode, image_size=args.image_size
    )
    if args.activation_checkpointing:
        engine.enable_activation_checkpointing(model)
    config = peft_talora.TALoRAConfig(
        r=args.talora_r,
        r_task=args.talora_r_task,
        alpha=args.talora_alpha,
        dropout=args.talora_dropout,
        target_modules=args.target_modules,
        train_norms=args.train_norms,
    )
    return peft.get_peft_model(model, config)


def build_datasets(
    args: TrainArguments, tasks: Sequence[peft_talora.Task], image_size: int
) -> tuple[data.AugmentedDataset, Dataset, Dataset]:
    """Training, validation and test images. Without a validation split, training images are held out for it."""
    read = partial(engine.open_split, args, tasks=tasks, image_size=image_size)
    train_set, test_set = read(args.train_split), read(args.test_split)
    if args.val_split is not None:
        val_set = read(args.val_split)
    else:
        order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(args.seed)).tolist()
        held_out = max(1, round(args.val_fraction * len(train_set)))
        train_set, val_set = Subset(train_set, sorted(order[held_out:])), Subset(train_set, sorted(order[:held_out]))
    scales, flip = ((1.0, 1.2, 1.5), 0.5) if args.augment else ((1.0,), 0.0)
    augmentation = data.JointAugmentation(tasks, scales=scales, flip=flip)
    return data.AugmentedDataset(train_set, augmentation, args.seed), val_set, test_set


def headline(metrics: dict[str, dict[str, float]]) -> str:
    """Each task's first metric."""
    return ", ".join(
        f"{task} {name} {value:.4f}" for task, m in metrics.items() for name, value in list(m.items())[:1]
    )


def report(run: Run) -> None:
    """Measure the best adapter on the test images; write adapter, results, picture and card; upload if asked to."""
    checkpoint.load_best(run.accelerator, run.model, run.output_dir)
    after, _ = run.measure(run.test_set)
    if not run.accelerator.is_main_process:
        return
    model, progress = run.accelerator.unwrap_model(run.model), run.progress
    results = {
        "before": progress.before,
        "after": after,
        "parameters": engine.count_parameters(model),
        "images": {"train": len(run.train_set), "validation": len(run.val_set), "test": len(run.test_set)},
        "images_per_second": progress.images / progress.seconds,
        "best_step": progress.best_step,
        "history": progress.history,
        "seed": run.args.seed,
        "task_order": run.order,
        "device": str(run.accelerator.device),
        "mixed_precision": run.accelerator.mixed_precision,
        "processes": run.accelerator.num_processes,
        "arguments": asdict(run.args),
        "versions": {m.__name__: m.__version__ for m in (peft_talora, torch, transformers, peft, accelerate)},
    }
    last, rows = len(run.test_set) - 1, min(6, len(run.test_set))
    samples = [run.test_set[round(row * last / max(1, rows - 1))] for row in range(rows)]
    logits = engine.predict(model, run.collator, samples)
    with files.write_aside(run.output_dir) as aside:
        draw_predictions(run.collator.tasks, samples, logits).save(aside / "predictions.png")
        files.write_json(aside / "results.json", results)
    card = hub.model_card(model, results, run.args.push_to_hub)
    hub.save_adapter(model, run.output_dir, run.collator.image_processor, card)
    print_table(results)
    print(f"\nAdapter, results.json and predictions.png are in {run.output_dir}.")
    if run.args.push_to_hub:
        print(hub.push_to_hub(run.output_dir, run.args.push_to_hub))


def print_table(results: dict) -> None:
    """The metrics before and after, one per line."""
    print(f"\n{'task':<14}{'metric':<18}{'before':>10}{'after':>10}")
    for task, metrics in results["after"].items():
        for name, value in metrics.items():
            print(f"{task:<14}{name:<18}{results['before'][task][name]:>10.4f}{value:>10.4f}")


if __name__ == "__main__":
    main()
