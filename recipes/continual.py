"""Learn a stream of domains with one promptable SAM, by MoDA or by what it is compared with.

    accelerate launch recipes/continual.py                                    # eight generated domains, any machine
    accelerate launch recipes/continual.py --method sequential --adapter decoder
    accelerate launch --num_processes 4 recipes/continual.py --stream cosam --manifests manifests --data_root data ...
    accelerate launch recipes/continual.py --stream my.yaml                   # folders of images and masks
    accelerate launch recipes/continual.py --resume_from_checkpoint latest    # after a kill, in mid-domain as well

Everything lands in `--output_dir`: `results.json` (the whole matrix and what follows from it), `results.md`,
`matrix.png`, `course.png`, with MoDA also `confusion.png` and the model, in `moda`. `recipes/prepare.py cosam` makes
the manifests of the real stream. Several processes see different images of each batch and average their gradients.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from safetensors.torch import load_file, save_file
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from peft_talora import checkpoint, engine, files, small_sam
from peft_talora.benchmark.records import describe_hardware
from peft_talora.continual import report
from peft_talora.continual.batches import DomainAugmentation, collate_domain
from peft_talora.continual.contestants import Contestant, check_choice, default_rate, load_base, make_contestant
from peft_talora.continual.mask_loss import PointLoss
from peft_talora.continual.measuring import Measured, measure
from peft_talora.continual.moda_folder import save_moda
from peft_talora.continual.prompting import TrainingPrompts
from peft_talora.continual.stream import Domain, Stream, folder_stream, generated_stream, manifest_stream
from peft_talora.data import AugmentedDataset
from peft_talora.sharding import refuse_split

FREE = frozenset(
    {"output_dir", "data_root", "save_steps", "resume_from_checkpoint", "num_threads", "dataloader_num_workers"}
    | {"per_device_eval_batch_size"}
)  # arguments that do not decide a run's course


@dataclass
class ContinualArguments:
    """What the recipe can be told."""

    output_dir: str = field(default="runs/continual", metadata={"help": "Folder for all results."})
    method: str = field(
        default="moda", metadata={"help": "'moda', 'sequential', 'joint', 'lwf', 'ewc', 'er' or 'o-lora'."}
    )
    adapter: str = field(default="lora", metadata={"help": "'lora', 'talora', 'adapter', 'decoder' or 'hq'."})
    r: int = field(default=16, metadata={"help": "Rank of lora and talora, width of the bottleneck of adapter."})
    strength: float | None = field(
        default=None, metadata={"help": "Of the penalty of lwf, ewc, o-lora; images in er's buffer. None: its own."}
    )
    base: str = field(default=small_sam.SMALL_SAM, metadata={"help": "SAM checkpoint, Hub id or folder."})
    stream: str = field(default="generated", metadata={"help": "'generated', 'cosam', or a YAML file of folders."})
    domains: list[str] | None = field(
        default=None, metadata={"help": "Of the stream's, those to learn, in this order. None: all, in its own order."}
    )
    measure_on: str = field(default="test", metadata={"help": "Images: 'test', or 'val' to choose settings by."})
    data_root: str | None = field(default=None, metadata={"help": "cosam: folder of the data sets."})
    manifests: str = field(default="manifests", metadata={"help": "cosam: folder of what prepare.py wrote."})
    num_images: int = field(default=80, metadata={"help": "Generated images per domain; a fifth validates."})
    num_test_images: int = field(default=24, metadata={"help": "Generated test images per domain."})
    resize: str = field(default="stretch", metadata={"help": "'stretch' images to a square, or by 'longest_side'."})

    query: str | None = field(
        default=None,
        metadata={
            "help": "moda: what the router reads: 'gft_readonly', 'gft_global', 'mean_block(i)', 'std_block(i)', "
            "'mean_neck'. None: the standard deviation over the last block's grid."
        },
    )
    selector: str = field(default="lda", metadata={"help": "moda: 'lda', 'ridge', 'ncm' or 'linear_ce'."})
    exemplars: int = field(default=10, metadata={"help": "moda: images per domain whose features are kept."})
    fallback_quantile: float | None = field(
        default=0.02, metadata={"help": "moda: share of a domain's images that may fall back to plain SAM. None: off."}
    )

    seed: int = field(default=0, metadata={"help": "Of adapters, images, their order, prompts and points."})
    num_train_epochs: int = field(default=3, metadata={"help": "Passes over each domain's training images."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Images per step and process."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of AdamW in every domain. None: the method's."}
    )
    weight_decay: float = field(default=1e-6, metadata={"help": "Decoupled weight decay."})
    warmup_ratio: float = field(default=0.05, metadata={"help": "Share of a domain's steps with a rising rate."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are scaled down to this norm."})
    points: int = field(default=2048, metadata={"help": "Points of each mask at which the loss is taken."})
    prompts: list[str] = field(
        default_factory=lambda: ["box", "points"],
        metadata={"help": "To train with: of 'box', 'points', 'mask', 'none'."},
    )
    scales: list[float] = field(
        default_factory=lambda: [0.7, 1.5], metadata={"help": "Scale jitter, least and largest; CoSAM: 0.1 and 2."}
    )

    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Images per evaluation pass."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that prepare batches; 0: none."})
    num_threads: int | None = field(default=None, metadata={"help": "CPU threads per process. None: all cores."})
    save_steps: int = field(default=50, metadata={"help": "Steps between checkpoints inside a domain."})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "'latest' goes on with output_dir's."})


@dataclass
class Run:
    """What one run is made of."""

    args: ContinualArguments
    accelerator: Accelerator
    stream: Stream
    contestant: Contestant
    image_size: int
    prompts: TrainingPrompts
    progress: checkpoint.Progress  # `epoch` counts domains that are learnt, `batch` the steps in the one under way
    resumed_from: Path | None = None

    @property
    def stages(self) -> list[Domain]:
        """What is learnt one after the other: the domains, or all of them at once."""
        domains = list(self.stream.domains)
        if not self.contestant.learner.at_once:
            return domains
        train, val, test = (ConcatDataset([getattr(d, part) for d in domains]) for part in ("train", "val", "test"))
        return [Domain("all", train, val, test)]

    def to_measure(self, domain: Domain) -> Dataset:
        """The images of a domain that scores are of."""
        return getattr(domain, self.args.measure_on)

    def measure(self, answer, images: Dataset, prompt: str = "box") -> Measured:
        """Figures of a set of images."""
        learner, args = self.contestant.learner, self.args
        learner.model.eval()
        return measure(
            answer,
            images,
            self.image_size,
            args.resize,
            prompt,
            args.per_device_eval_batch_size,
            self.accelerator.device,
        )


def main() -> None:
    """One run."""
    args = engine.parse_arguments(ContinualArguments)
    check(args)
    if args.learning_rate is None:
        args.learning_rate = default_rate(args.method, args.adapter)
    accelerator = Accelerator()
    refuse_split(accelerator, "this recipe")
    engine.set_threads(args, accelerator)
    set_seed(args.seed)
    run = build(args, accelerator)
    for index, domain in enumerate(run.stages):
        if index >= run.progress.epoch:
            learn(run, index, domain)
    if accelerator.is_main_process:
        finish(run)
    accelerator.end_training()


def check(args: ContinualArguments) -> None:
    """Refuse what would fail late."""
    check_choice(args.method, args.adapter)
    for name in ("num_train_epochs", "per_device_train_batch_size", "save_steps", "exemplars", "r"):
        if getattr(args, name) < 1:
            raise ValueError(f"`{name}` is {getattr(args, name)}; allowed: 1 or more.")
    if args.resume_from_checkpoint not in (None, "latest"):
        raise ValueError(f"`resume_from_checkpoint` is {args.resume_from_checkpoint!r}; allowed: 'latest'.")
    if args.measure_on not in ("test", "val"):
        raise ValueError(f"`measure_on` is {args.measure_on!r}; allowed: 'test', 'val'.")
    if args.stream == "cosam" and args.data_root is None:
        raise ValueError("`data_root` is None; with the stream 'cosam' it is the folder of the data sets.")
    if len(args.scales) != 2:
        raise ValueError(f"`scales` is {args.scales}; allowed: two numbers.")


def open_stream(args: ContinualArguments, size: int) -> Stream:
    """The images."""
    if args.stream == "generated":
        stream = generated_stream(args.num_images, args.num_test_images, args.num_test_images, size, args.seed)
    elif args.stream == "cosam":
        stream = manifest_stream(args.manifests, args.data_root, args.seed)
    else:
        stream = folder_stream(args.stream, args.seed)
    return stream if args.domains is None else stream.select(args.domains)


def build(args: ContinualArguments, accelerator: Accelerator) -> Run:
    """Images, model and learner; as they were, where a run goes on."""
    base = load_base(args.base, args.adapter).to(accelerator.device)
    size = base.config.vision_config.image_size
    task_loss = PointLoss(args.points, args.seed)
    contestant = make_contestant(
        base,
        args.method,
        args.adapter,
        lambda logits, batch: task_loss(logits, batch["masks"], batch["step"]),
        lambda domain: plain_batches(args, domain, size, accelerator.device),
        args.seed,
        args.r,
        args.strength,
        args.query,
        args.selector,
        args.exemplars,
        args.fallback_quantile,
    )
    arguments = {name: value for name, value in asdict(args).items() if name not in FREE}
    arguments["num_processes"] = accelerator.num_processes
    run = Run(
        args=args,
        accelerator=accelerator,
        stream=open_stream(args, size),
        contestant=contestant,
        image_size=size,
        prompts=TrainingPrompts(args.prompts, args.seed, 4 * base.config.prompt_encoder_config.image_embedding_size),
        progress=checkpoint.Progress(tasks=[], arguments=arguments),
    )
    accelerator.register_save_state_pre_hook(partial(save_learner, run))
    if args.resume_from_checkpoint is None:
        run.progress.history.append(measure_stage(run, "before", contestant.zero_shot))
        return run
    found = checkpoint.find_checkpoint(Path(args.output_dir), args.resume_from_checkpoint)
    begun = checkpoint.read_progress(found)
    checkpoint.check_same_arguments(begun.arguments, run.progress.arguments, found)
    load_learner(run, found)
    run.progress = begun
    return run


def learn(run: Run, index: int, domain: Domain) -> None:
    """One stage: train on a domain, or on what is left of it, and measure on all domains."""
    args, accelerator, progress, learner = run.args, run.accelerator, run.progress, run.contestant.learner
    resumed = run.resumed_from is not None and index == progress.epoch
    if not resumed:
        learner.begin(index, domain)
    processes = accelerator.num_processes
    steps = args.num_train_epochs * steps_of_epoch(args, domain, processes)
    parameters = learner.parameters()
    accelerator.free_memory()  # the optimiser of the domain before
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay)
    schedule = transformers.get_cosine_schedule_with_warmup(
        optimizer, round(args.warmup_ratio * steps) * processes, steps * processes
    )
    optimizer, schedule = accelerator.prepare(optimizer, schedule)
    output_dir = Path(args.output_dir)
    if resumed:
        run.progress = progress = checkpoint.load_checkpoint(accelerator, run.resumed_from, output_dir, progress)
        run.resumed_from = None
        accelerator.print(f"resumed in domain {domain.name}, step {progress.batch} of {steps}")
    else:
        checkpoint.save_checkpoint(accelerator, output_dir, progress, keep=1)
    begun = time.perf_counter()
    bar = tqdm(total=steps, initial=progress.batch, desc=domain.name, dynamic_ncols=True)
    for batch in batches_left(run, index, domain):
        learner.model.train()
        with accelerator.autocast():
            loss = learner.loss(batch)
        accelerator.backward(loss)
        average_gradients(accelerator, parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"step {progress.step}, domain {domain.name}: the gradients are not finite; lower `learning_rate`."
            )
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.step, progress.batch = progress.step + 1, progress.batch + 1
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        bar.update()
        if progress.batch % args.save_steps == 0 and progress.batch < steps:
            progress.seconds += time.perf_counter() - begun
            checkpoint.save_checkpoint(accelerator, output_dir, progress, keep=1)
            begun = time.perf_counter()
    bar.close()
    learner.end(index, domain)
    progress.seconds += time.perf_counter() - begun
    progress.history.append(measure_stage(run, domain.name, run.contestant.answer))
    progress.epoch, progress.batch = index + 1, 0
    scores = [figures["iou"] for figures in progress.history[-1]["domains"].values()]
    accelerator.print(f"after {domain.name}: IoU {' '.join(f'{score:.1f}' for score in scores)}")


def steps_of_epoch(args: ContinualArguments, domain: Domain, processes: int) -> int:
    """Whole batches of a domain's training images. Raises ValueError if there is none."""
    steps = len(domain.train) // (args.per_device_train_batch_size * processes)
    if not steps:
        raise ValueError(
            f"{len(domain.train)} training images of {domain.name} do not fill one batch of "
            f"`per_device_train_batch_size`={args.per_device_train_batch_size} on each of {processes} processes."
        )
    return steps


def batches_left(run: Run, index: int, domain: Domain) -> Iterator[dict]:
    """This process's part of the batches that are left; images, order and prompts are a function of seed and step."""
    args, accelerator, progress = run.args, run.accelerator, run.progress
    images = AugmentedDataset(domain.train, DomainAugmentation(tuple(args.scales)), args.seed)
    own = args.per_device_train_batch_size
    size, begin = own * accelerator.num_processes, own * accelerator.process_index
    per_epoch = steps_of_epoch(args, domain, accelerator.num_processes)
    for epoch in range(progress.batch // per_epoch, args.num_train_epochs):
        images.set_epoch(epoch)
        drawn = torch.Generator().manual_seed((args.seed * 1_009 + index) * 100_003 + epoch)
        order = torch.randperm(len(images), generator=drawn).tolist()
        rows = [order[k * size + begin :][:own] for k in range(progress.batch % per_epoch, per_epoch)]
        collate = partial(collate_domain, image_size=run.image_size, resize=args.resize)
        workers = args.dataloader_num_workers
        # Opening an epoch draws a number: from the global generator, a resumed run would be one draw ahead.
        own_generator = torch.Generator()
        loader = DataLoader(
            images, batch_sampler=rows, collate_fn=collate, num_workers=workers, generator=own_generator
        )
        for batch in loader:
            batch = run.prompts({**batch, "step": progress.step}, progress.step)
            yield {key: v.to(accelerator.device) if torch.is_tensor(v) else v for key, v in batch.items()}


def plain_batches(args: ContinualArguments, domain: Domain, size: int, device: torch.device) -> Iterator[dict]:
    """A domain's training images, each once and as it is, with the prompts of evaluation."""
    collate = partial(collate_domain, image_size=size, resize=args.resize)
    loader = DataLoader(
        domain.train, args.per_device_train_batch_size, collate_fn=collate, generator=torch.Generator()
    )
    for batch in loader:
        batch |= {"prompt": "box", "step": 0}
        yield {key: v.to(device) if torch.is_tensor(v) else v for key, v in batch.items()}


def average_gradients(accelerator: Accelerator, parameters: list[torch.nn.Parameter]) -> None:
    """The mean over the processes; what is trained changes with every domain, so no wrapper could know it."""
    if accelerator.num_processes > 1:
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(gradient, "mean")


def measure_stage(run: Run, name: str, answer) -> dict:
    """Figures of all domains' images, and of the natural ones, all of which test; only the main process measures."""
    stage = {"stage": name, "domains": {}, "natural": None}
    if not run.accelerator.is_main_process:
        return stage
    for domain in run.stream.domains:
        stage["domains"][domain.name] = report.as_figures(run.measure(answer, run.to_measure(domain)))
    if run.stream.natural is not None and run.args.measure_on == "test":
        stage["natural"] = report.as_figures(run.measure(answer, run.stream.natural))
    return stage


def save_learner(run: Run, models: list, weights: list, folder: str) -> None:
    """Write what the learner knows, and what it trains, into a checkpoint."""
    if run.accelerator.is_main_process:
        learner = run.contestant.learner
        state = learner.state_dict() | {f"trained.{key}": p.detach() for key, p in learner.trainable().items()}
        tensors = {key: v.cpu().contiguous() for key, v in state.items() if torch.is_tensor(v)}
        save_file(tensors, Path(folder) / "learner.safetensors")
        files.write_json(Path(folder) / "learner.json", {k: v for k, v in state.items() if not torch.is_tensor(v)})


@torch.no_grad()
def load_learner(run: Run, folder: Path) -> None:
    """Restore it, before its optimiser is made."""
    learner = run.contestant.learner
    files.check_safetensors(folder / "learner.safetensors")
    state = load_file(folder / "learner.safetensors", device=str(run.accelerator.device))
    trained = {key.removeprefix("trained."): state.pop(key) for key in list(state) if key.startswith("trained.")}
    learner.load_state_dict(state | json.loads((folder / "learner.json").read_text()))
    for key, parameter in learner.trainable().items():
        parameter.copy_(trained[key])
    run.resumed_from = folder


def finish(run: Run) -> None:
    """Measure what the stages did not, write all figures and pictures, save MoDA's model."""
    args, stream, contestant = run.args, run.stream, run.contestant
    further = {"no_prompt": {}, "oracle": {}}
    for domain in stream.domains:
        measured = run.measure(contestant.answer, run.to_measure(domain), prompt="none")
        further["no_prompt"][domain.name] = report.as_figures(measured)
        if contestant.moda is not None:
            known = partial(contestant.answer, route="oracle", domain=domain.name)
            further["oracle"][domain.name] = report.as_figures(run.measure(known, run.to_measure(domain)))
    output_dir = Path(args.output_dir)
    own = contestant.own_parameters()
    stored = [4 * own / len(stream.domains)]  # one adapter of float32 for all domains
    if contestant.moda is not None:
        save_moda(contestant.moda, output_dir / "moda")
        folders = [contestant.moda.folder_of(name) for name in stream.names]
        stored = [sum(file.stat().st_size for file in folder.glob("*")) for folder in folders]
    settings = {
        "method": args.method,
        "adapter": args.adapter,
        "stream": args.stream,
        "parameters_per_domain": own if contestant.moda is not None else own / len(stream.domains),
        "bytes_per_domain": sum(stored) / len(stored),
        "seconds": run.progress.seconds,
        "hardware": describe_hardware(args.num_threads),
        "arguments": asdict(args),
    }
    results = report.make_results(run.progress.history, further, settings)
    report.write_report(output_dir, results)
    print(report.table(results))
    print(f"results.json, results.md and pictures are in {output_dir}.")


if __name__ == "__main__":
    main()
