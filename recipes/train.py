"""Train an mSAM on several dense tasks: one TA-LoRA adapter and the heads, or a baseline that it is compared with.

    accelerate launch recipes/train.py                                   # generated scenes, small SAM, any machine
    accelerate launch --num_processes 8 recipes/train.py --base facebook/sam-vit-base --data_root my_data ...
    accelerate launch --config_file recipes/accelerate/gpu_8.yaml recipes/train.py ...   # beside it: more
    accelerate launch recipes/train.py --config my.yaml                  # arguments from a file; flags win
    accelerate launch recipes/train.py --method lora-hps                 # `peft_talora/methods` has the methods

Everything lands in `--output_dir`: the adapter with its heads, `results.json`, `predictions.png`, a model card. The
methods with an adapter per task, `lora-stl`, `full-stl` and `mtlora`, have a folder for each of them below it.
"""

import json
import math
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs, PartialState
from accelerate.utils import ProjectConfiguration, send_to_device, set_seed, tqdm
from peft import PeftModel
from torch.utils.data import DataLoader, Dataset

import peft_talora
from peft_talora import checkpoint, data, engine, evaluation, hub, report, results, small_sam, sources
from peft_talora.balancing import Balancer
from peft_talora.fitting import find_batch_size
from peft_talora.methods import AdapterArguments, Method, find_method
from peft_talora.observation import ObservationArguments, Observer, check_observation
from peft_talora.plotting import draw_predictions
from peft_talora.sharding import is_split, refuse_split, set_up_deepspeed, set_up_fsdp, split_by
from peft_talora.stopping import STOPPED, StopSignal
from peft_talora.weighting import LOSS_WEIGHTINGS, WEIGHTINGS, Weighting, make_weighting

PLAIN = ("equal", "fixed")  # weightings under which each task can have optimiser steps of its own


@dataclass
class TrainArguments(ObservationArguments, sources.SplitArguments, AdapterArguments):
    """What the recipe can be told, beside what those that it inherits say."""

    output_dir: str = field(default="runs/train", metadata={"help": "Folder for all results."})
    base: str | None = field(
        default=None,
        metadata={"help": "SAM checkpoint, Hub id or folder. None: the small SAM that comes with the package."},
    )
    tasks: list[str] = field(
        default_factory=lambda: ["segmentation", "depth", "normals"],
        metadata={"help": "Tasks as name, name=channels or name=kind:channels, in order."},
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Long side of the encoder's input in pixels. None: the base's."}
    )
    loss_weights: list[str] = field(
        default_factory=list,
        metadata={"help": "Weights of the tasks' losses as name=weight. Others: 4 of normals (the paper's), 1."},
    )
    weighting: str = field(
        default="fixed",
        metadata={
            "help": f"Of the tasks against each other: {', '.join(WEIGHTINGS)}. 'fixed' is by `loss_weights`, "
            "by which the checkpoint is chosen whatever the weighting."
        },
    )
    decoder_mode: str = field(default="channel", metadata={"help": "Heads: 'channel' (the paper's) or 'token'."})
    normalize: bool = field(default=True, metadata={"help": "Subtract SAM's mean colour and divide by its deviation."})

    seed: int = field(default=0, metadata={"help": "Of the adapter's weights, the order of images and dropout."})
    num_train_epochs: int = field(default=2, metadata={"help": "Passes over the training images."})
    updates: str | None = field(
        default=None,
        metadata={
            "help": "'joint': an optimiser step of the weighted sum of all losses; 'alternating': from the same batch "
            "one step per task, in turn. None: the method's, 'alternating' where tasks share what is trained."
        },
    )
    auto_find_batch_size: bool = field(
        default=True,
        metadata={"help": "Where a batch does not fit into memory, take smaller ones, and more of them per step."},
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per optimiser step."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of AdamW. None: the method's, 3e-3 of talora."}
    )
    weight_decay: float = field(default=1e-6, metadata={"help": "Decoupled weight decay."})
    warmup_ratio: float = field(default=0.05, metadata={"help": "Share of the steps with a rising learning rate."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are scaled down to this norm."})
    task_order: str = field(
        default="auto",
        metadata={"help": "'folded': one pass for all tasks of a step; 'sequential'; 'auto' by method and device."},
    )
    activation_checkpointing: bool = field(default=False, metadata={"help": "Recompute blocks in backward."})

    measure_before: bool = field(default=True, metadata={"help": "Measure the untrained model on the test images."})
    eval_steps: int | None = field(default=None, metadata={"help": "Steps between validations. None: every epoch."})
    save_steps: int | None = field(default=None, metadata={"help": "Steps between checkpoints. None: every epoch."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "A checkpoint's path, or 'latest'."})
    allow_reshard: bool = field(
        default=False,
        metadata={
            "help": "Resume with another number of processes, images per batch or batches per step, of which a step "
            "has as many images as before."
        },
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "Repository user/name to upload the result to."})

    @property
    def may_differ(self) -> tuple[str, ...]:
        """What a resumed run may share out otherwise."""
        fitted = ("per_device_train_batch_size", "gradient_accumulation_steps")
        return checkpoint.SHARES if self.allow_reshard else fitted if self.auto_find_batch_size else ()


@dataclass
class Run:
    """What one training run is made of; `accelerator.prepare` has seen what it must see."""

    args: TrainArguments
    method: Method
    output_dir: Path
    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loader: DataLoader
    sampler: data.MixedSampler | None
    train_set: data.AugmentedDataset
    val_set: Dataset
    test_set: Dataset
    collator: data.Collator
    weights: dict[str, float]  # of the losses, by task
    passes: dict  # keywords of training step and evaluation: the order of tasks, and what is switched before each
    balancers: dict[tuple[str, ...], Balancer]  # by the tasks of an optimiser step
    total_steps: int
    progress: checkpoint.Progress
    stop: StopSignal
    observer: Observer

    @property
    def weightings(self) -> list[Weighting]:
        """What learns beside the model."""
        return [balancer.weighting for balancer in self.balancers.values()]

    def measure(self, dataset: Dataset):
        """Metrics and losses over a data set."""
        batch_size = self.args.per_device_eval_batch_size
        return evaluation.evaluate(self.accelerator, self.model, dataset, self.collator, batch_size, **self.passes)


def main() -> None:
    """One run, or one for each task."""
    args = engine.parse_arguments(TrainArguments)
    method = find_method(args.method)
    if args.learning_rate is None:
        args.learning_rate = method.learning_rate
    if args.updates is None:
        args.updates = method.updates[0] if args.weighting in PLAIN else "joint"
    check_arguments(args, method)
    with StopSignal() as stop:
        finished = train_one(args, stop) if method.alone is None else train_apart(args, method.alone, stop)
    PartialState().destroy_process_group()
    if not finished:
        raise SystemExit(STOPPED)


def train_one(args: TrainArguments, stop: StopSignal) -> bool:
    """Build, train, report what came out. Returns whether the run came to its end: it stops where it is asked to."""
    run = build(args, stop)
    try:
        start(run)
        finished = train(run)
        if finished:
            finish(run)
        else:
            run.accelerator.print(f"\nstopped after step {run.progress.step}: --resume_from_checkpoint latest goes on")
    finally:
        run.observer.end()
    accelerator = run.accelerator
    # Data parallelism holds the process group. Freed as its last holder, it would destroy the group while it keeps
    # Python's lock, for which a thread of the group may be waiting: the process would never end.
    del run
    accelerator.free_memory()
    return finished


def train_apart(args: TrainArguments, method: str, stop: StopSignal) -> bool:
    """An ordinary run per task, one after another, each in a folder of its own; then the figures of all as one.

    Resumed, runs that are finished stay as they are, and the one under way goes on. Returns whether all are finished.
    """
    output_dir, resume = Path(args.output_dir), args.resume_from_checkpoint == "latest"
    folders = {task["name"]: output_dir / task["name"] for task in engine.parse_tasks(args, args.tasks)}
    for text, folder in zip(args.tasks, folders.values(), strict=True):
        begun = "latest" if resume and checkpoint.list_checkpoints(folder) else None
        single = replace(args, method=method, tasks=[text], output_dir=str(folder), resume_from_checkpoint=begun)
        single.loss_weights = [w for w in args.loss_weights if w.partition("=")[0] == text.partition("=")[0]]
        single.allow_unlabelled = True  # of an image that another task has a label of
        if resume and is_finished(single):
            continue
        # Asked to stop in its last measuring, a run writes its results; the next one must not begin.
        if not train_one(single, stop) or stop.asked():
            return False
    if PartialState().is_main_process:
        own = {"method": args.method, "arguments": asdict(args)}
        print("\n" + report.table(report.write_combined_report(output_dir, folders, args, args.test_split, own)))
        print(f"\nThe adapters are in {output_dir} by task; results.json and predictions.png there are of all.")
    return True


def is_finished(args: TrainArguments) -> bool:
    """Whether the run has written its results. Raises ValueError if it had other arguments."""
    file = Path(args.output_dir) / "results.json"
    if file.exists():
        trained, wanted = json.loads(file.read_text())["arguments"], deciding_arguments(args)
        if args.may_differ:
            trained = checkpoint.share_alike(trained, wanted, args.may_differ, file)
        checkpoint.check_same_arguments(trained, wanted, file)
    return file.exists()


def start(run: Run) -> None:
    """Measure the untrained model, or go on where a checkpoint stopped."""
    if run.args.resume_from_checkpoint is not None:
        folder = checkpoint.find_checkpoint(run.output_dir, run.args.resume_from_checkpoint)
        run.progress = checkpoint.load_checkpoint(
            run.accelerator, folder, run.output_dir, run.progress, run.args.may_differ, run.weightings
        )
        run.accelerator.print(f"resumed from {folder}: step {run.progress.step} of {run.total_steps}")
    elif run.args.measure_before:
        run.progress.before, _ = run.measure(run.test_set)
        run.accelerator.print(f"before training: {report.headline(run.progress.before)}")
    run.observer.begin(asdict(run.args), run.progress)


def train(run: Run) -> bool:
    """All epochs that are left, with validation and checkpoints on the way. Returns False if asked to stop."""
    args, progress = run.args, run.progress
    bar = tqdm(total=run.total_steps, initial=progress.step, desc="training", dynamic_ncols=True)
    while progress.epoch < args.num_train_epochs:
        if not train_epoch(run, bar):
            return False
        progress.epoch, progress.batch = progress.epoch + 1, 0
        if args.eval_steps is None:
            validate(run)
        if args.save_steps is None:
            save(run)
    bar.close()
    if not progress.history or progress.history[-1]["step"] < progress.step:
        validate(run)
    if args.save_steps and progress.step % args.save_steps:
        save(run)
    return not run.stop.asked()


def save(run: Run) -> None:
    """Write a checkpoint."""
    keep = run.args.save_total_limit
    checkpoint.save_checkpoint(run.accelerator, run.output_dir, run.progress, keep, run.weightings)


def train_epoch(run: Run, bar: tqdm) -> bool:
    """One pass over the training images, or over what is left of it. Returns whether it came to its end."""
    args, progress, accelerator = run.args, run.progress, run.accelerator
    run.train_set.set_epoch(progress.epoch)
    if run.sampler is not None:
        run.sampler.set_epoch(progress.epoch)
    batches = accelerator.skip_first_batches(run.loader, progress.batch)
    batches.set_epoch(progress.epoch)
    run.model.train()
    begun = time.perf_counter()
    for chunk in engine.whole_chunks(batches, args.gradient_accumulation_steps):
        loaded = time.perf_counter()
        losses = {}
        for tasks in engine.update_groups(run.weights, args.updates, progress.step):
            balancer = run.balancers[tuple(tasks)]
            losses |= balancer.backward(chunk, progress.step, progress.epoch)
            accelerator.clip_grad_norm_(run.model.parameters(), args.max_grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
            balancer.after(chunk)
        rate = run.optimizer.param_groups[0]["lr"]
        run.scheduler.step()
        step_seconds = results.seconds_since(loaded, accelerator.device)
        progress.batch += len(chunk)
        progress.images += sum(len(batch["pixel_values"]) for batch in chunk) * accelerator.num_processes
        progress.step += 1
        results.note_step(progress, step_seconds)
        bar.set_postfix({name: f"{loss.item():.3f}" for name, loss in losses.items()}, refresh=False)
        bar.update()
        progress.seconds += time.perf_counter() - begun
        run.observer.step(progress, losses, chunk, rate)
        if args.eval_steps and progress.step % args.eval_steps == 0:
            validate(run)
        asked = run.stop.asked()
        if asked or (args.save_steps and progress.step % args.save_steps == 0):
            save(run)
        if asked:
            return False
        begun = time.perf_counter()
    return True


def validate(run: Run) -> None:
    """Measure on the validation images; if they never did better, keep the adapter."""
    metrics, losses = run.measure(run.val_set)
    step, loss = run.progress.step, sum(run.weights[name] * value for name, value in losses.items())
    run.accelerator.print(f"step {step}: validation loss {loss:.4f}, {report.headline(metrics)}")
    run.observer.validated(step, metrics, losses, loss)
    if not losses:
        raise ValueError(
            f"none of the {len(run.val_set)} validation images has a label, so no checkpoint can be chosen"
        )
    if not math.isfinite(loss):
        raise FloatingPointError(f"the validation loss at step {step} is {loss}: lower `learning_rate`")
    if run.progress.note_validation(metrics, losses, loss):
        checkpoint.save_best(run.accelerator, run.model, run.output_dir)


def build(args: TrainArguments, stop: StopSignal) -> Run:
    """Everything before the first step."""
    method = find_method(args.method)
    accelerator, order = launch(args, method)
    output_dir = Path(args.output_dir)
    model = method.add(build_model(args, accelerator, output_dir), args)
    base = model.get_base_model()
    image_size = base.config.vision_config.image_size
    processor = data.make_image_processor(image_size, args.normalize)
    collator = data.Collator([base.task(name) for name in base.task_names], processor)
    train_set, val_set, test_set = sources.open_splits(args, args.seed, collator.tasks, image_size)
    sampler = sources.mixed_sampler(args, args.seed, train_set.dataset)
    passes = {"order": order, "activate": partial(method.activate, model)}
    weights = engine.parse_weights(args.loss_weights, base.config.tasks)
    if args.auto_find_batch_size:
        args = fit(args, accelerator, model, collator, train_set, weights, passes)
    at_a_time = accelerator.num_processes * args.gradient_accumulation_steps
    loader = sources.make_loader(args, args.seed, train_set, collator, at_a_time, sampler)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    total_steps = len(loader) // at_a_time * args.num_train_epochs
    # An accelerated scheduler takes one step per process.
    scheduler = transformers.get_linear_schedule_with_warmup(
        optimizer,
        num_warmup_steps=round(args.warmup_ratio * total_steps) * accelerator.num_processes,
        num_training_steps=total_steps * accelerator.num_processes,
    )
    # At once: DeepSpeed does not know of a scheduler that comes later.
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    balancers = make_balancers(args, method, accelerator, model, collator.tasks, weights, passes)
    accelerator.register_save_state_pre_hook(checkpoint.save_adapter_only)
    accelerator.register_load_state_pre_hook(checkpoint.load_adapter_only)
    observer = make_observer(args, method, accelerator, model, balancers, collator, val_set, passes)
    launched = {"num_processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}
    launched["split_by"] = split_by(accelerator)
    launched["training_images"] = sampler.sizes if sampler is not None else len(train_set)
    return Run(
        args=args,
        method=method,
        output_dir=output_dir,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loader,
        sampler=sampler,
        train_set=train_set,
        val_set=val_set,
        test_set=test_set,
        collator=collator,
        weights=weights,
        passes=passes,
        balancers=balancers,
        total_steps=total_steps,
        stop=stop,
        observer=observer,
        progress=checkpoint.Progress(tasks=base.config.tasks, arguments={**deciding_arguments(args), **launched}),
    )


def fit(
    args: TrainArguments, accelerator: Accelerator, model, collator, train_set, weights: dict, passes: dict
) -> TrainArguments:
    """The arguments, with smaller batches and more of them per step if those asked for do not fit into memory."""
    wanted = args.per_device_train_batch_size
    model.to(accelerator.device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # What else a step holds of them: the moments of AdamW, and a row of gradients for each task and their sum.
    copies = 2 if args.weighting in LOSS_WEIGHTINGS else 3 + len(collator.tasks)

    def attempt(size: int) -> None:
        batch = send_to_device(collator(list(islice(train_set, size))), accelerator.device)
        held = [parameter.new_empty(copies, *parameter.shape) for parameter in trained]
        try:
            engine.backward(accelerator, model, batch, weights=weights, **passes)
        finally:
            model.zero_grad()
            held.clear()

    size = find_batch_size(accelerator, wanted, attempt)
    if size == wanted:
        return args
    accumulated = args.gradient_accumulation_steps * wanted // size
    accelerator.gradient_accumulation_steps = accumulated
    accelerator.print(f"{wanted} images do not fit into memory: {accumulated} batches of {size} make a step")
    return replace(args, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)


def make_balancers(
    args: TrainArguments, method: Method, accelerator: Accelerator, model, tasks, weights: dict, passes: dict
) -> dict[tuple[str, ...], Balancer]:
    """What gives the gradients of each optimiser step, by its tasks."""
    by_name = {task.name: task for task in tasks}
    regularizer = method.regularizer(model, args)
    balancers = {}
    for names in engine.update_groups(by_name, args.updates, 0):
        weighting = make_weighting(args.weighting, names, weights, args.seed)
        own = [by_name[name] for name in names]
        balancers[tuple(names)] = Balancer(
            accelerator, model, own, weighting, regularizer=regularizer, own_parts=method.own_parts, **passes
        )
    return balancers


def make_observer(
    args: TrainArguments,
    method: Method,
    accelerator: Accelerator,
    model,
    balancers: dict,
    collator,
    val_set,
    passes: dict,
) -> Observer:
    """What tells trackers of the run, and draws what is predicted on the way."""
    every_task = None
    if args.cosine_steps is not None:
        weighting = make_weighting("equal", [task.name for task in collator.tasks])
        every_task = Balancer(
            accelerator, model, collator.tasks, weighting, activate=passes["activate"], own_parts=method.own_parts
        )

    def draw():
        own, samples = accelerator.unwrap_model(model), report.examples(val_set)
        logits = evaluation.predict(own, collator, samples, **passes)
        own.train()
        return draw_predictions(collator.tasks, samples, logits)

    folder = Path(args.output_dir, "samples")
    return Observer(accelerator, args, balancers, every_task, draw, folder)


def launch(args: TrainArguments, method: Method) -> tuple[Accelerator, engine.TaskOrder]:
    """What owns the devices, and the order of tasks there; from here on all random numbers are the seed's."""
    distributed = DistributedDataParallelKwargs()
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # Of a stream, every process reads its own rows: one that reads for all would have to send them.
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=args.seed, dispatch_batches=False
        ),
        kwargs_handlers=[distributed],
        log_with=args.report_to,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, "logs"))),
    )
    set_up_fsdp(accelerator)
    set_up_deepspeed(accelerator, args.max_grad_norm, args.resume_from_checkpoint)
    if args.cosine_steps is not None:
        refuse_split(accelerator, "`cosine_steps`")
    wanted = args.task_order
    if wanted == "auto" and args.weighting not in LOSS_WEIGHTINGS:
        wanted = "sequential"  # of each task apart
    order = method.resolve_order(wanted, accelerator.device)
    # Task by task, each backward pass leaves the other tasks' heads without a gradient.
    distributed.find_unused_parameters = order == "sequential" or args.updates == "alternating"
    engine.set_threads(args, accelerator)
    results.forget_peak(accelerator.device)
    set_seed(args.seed)
    return accelerator, order


def check_arguments(args: TrainArguments, method: Method) -> None:
    """Refuse what would fail late."""
    method.check(args)
    check_observation(args)
    for name in ("num_train_epochs", "save_total_limit", "per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` is {getattr(args, name)}; allowed: 1 or more.")
    if args.updates not in method.updates:
        raise ValueError(f"`updates` is {args.updates!r}; with {method.name!r} allowed: {', '.join(method.updates)}.")
    if args.weighting not in WEIGHTINGS:
        raise ValueError(f"`weighting` is {args.weighting!r}; allowed: {', '.join(WEIGHTINGS)}.")
    if args.weighting not in PLAIN and (args.updates != "joint" or method.alone):
        raise ValueError(
            f"`weighting` is {args.weighting!r}; with {method.name!r} and {args.updates} updates allowed: "
            f"{', '.join(PLAIN)}."
        )
    if args.val_split is None and not 0 < args.val_fraction < 1:
        raise ValueError(f"`val_fraction` is {args.val_fraction}; allowed: between 0 and 1.")
    if args.push_to_hub and (method.alone or method.folder_per_task):
        raise ValueError(
            f"`push_to_hub` uploads one adapter, {method.name!r} writes one per task: use `peft_talora.push_to_hub`."
        )
    if method.alone and args.resume_from_checkpoint not in (None, "latest"):
        raise ValueError(
            f"`resume_from_checkpoint` is {args.resume_from_checkpoint!r}; with a run per task allowed: 'latest'."
        )
    engine.parse_weights(args.loss_weights, engine.parse_tasks(args, args.tasks))


def deciding_arguments(args: TrainArguments) -> dict:
    """What decides the run's course."""
    return {name: value for name, value in asdict(args).items() if name not in checkpoint.FREE_ARGUMENTS}


def build_model(args: TrainArguments, accelerator: Accelerator, output_dir: Path) -> peft_talora.MSamModel:
    """An mSAM on the base checkpoint."""
    base = args.base or str(output_dir / "base")
    with accelerator.main_process_first():
        # A run that goes on keeps its base; what another run left is not this one's.
        kept = args.resume_from_checkpoint is not None and (output_dir / "base" / "model.safetensors").exists()
        if args.base is None and not kept:
            small_sam.copy_small_sam(base)
    tasks = engine.parse_tasks(args, args.tasks)
    model = peft_talora.MSamModel.from_pretrained(
        base, tasks=tasks, decoder_mode=args.decoder_mode, image_size=args.image_size
    )
    if args.activation_checkpointing:
        engine.enable_activation_checkpointing(model)
    return model


def finish(run: Run) -> None:
    """Measure the best adapter on the test images; write adapter, results, picture and card; upload if asked to."""
    accelerator, model = run.accelerator, run.accelerator.unwrap_model(run.model)
    checkpoint.load_best(accelerator, run.model, run.output_dir)
    after, _ = run.measure(run.test_set)
    samples = report.examples(run.test_set)
    logits = evaluation.predict(model, run.collator, samples, **run.passes)
    if is_split(model):  # what is written is of a whole one
        model = run.method.add(build_model(run.args, accelerator, run.output_dir), run.args)
        checkpoint.load_best(accelerator, model, run.output_dir)
    if accelerator.is_main_process:
        write(run, model, after, samples, logits)


def write(run: Run, model: PeftModel, after: dict, samples: list, logits: list) -> None:
    """Everything that a finished run leaves: see [`finish`]."""
    args, method = run.args, run.method
    tasks = run.collator.tasks
    figures = {
        "method": args.method,
        "before": run.progress.before,
        "after": after,
        **results.of_run(run.accelerator, model, run.progress),
        "images": {"train": len(run.train_set), "validation": len(run.val_set), "test": len(run.test_set)},
        "task_order": run.passes["order"],
        "seed": args.seed,
        "arguments": asdict(args),
    }
    parts = [("", tasks, figures)]
    if method.folder_per_task:
        parts = [(task.name, [task], results.restrict(figures, [task.name])) for task in tasks]
    for name, part, own in parts:
        folder, card = run.output_dir / name, hub.model_card(model, own, args.push_to_hub)
        method.save(model, [task.name for task in part], folder, run.collator.image_processor, card)
        report.write_report(folder, own, part, samples, logits)
    if method.folder_per_task:
        report.write_report(run.output_dir, figures, tasks, samples, logits)
    print("\n" + report.table(figures))
    print(f"\nAdapter, results.json and predictions.png are in {run.output_dir}.")
    if args.push_to_hub:
        print(hub.push_to_hub(run.output_dir, args.push_to_hub))


if __name__ == "__main__":
    main()
