"""A few steps of training with weighed tasks, in one process or several: what `test_balancing` compares.

python -m torch.distributed.run --standalone --nproc_per_node 2 tests/balancing_cases.py <sam> <folder>
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from peft import get_peft_model
from safetensors.torch import save_file

from peft_talora import Collator, MSamModel, SyntheticScenes, TALoRAConfig, make_image_processor
from peft_talora.balancing import Balancer
from peft_talora.weighting import make_weighting

TASKS = {"segmentation": 10, "depth": 1, "normals": 3}
GIVEN = {"segmentation": 1.0, "depth": 2.0, "normals": 4.0}
STEPS = 20
KINDS = ("fixed", "uncertainty", "pcgrad")  # that two processes are compared by
DTYPES = (torch.float64, torch.float32)
BATCH = 4  # images of a step, of all processes and accumulated batches
# Images without labels of some tasks, by their number in the step: half of the step lacks depth and normals, and in
# every fourth step nobody has normals.
LACKING = {0: (), 1: ("segmentation",), 2: ("depth", "normals"), 3: ("depth", "normals")}


def make_model(sam: str, dtype=torch.float64):
    """TA-LoRA in the tiny SAM, each head other than its neighbours."""
    torch.manual_seed(0)
    model = MSamModel.from_pretrained(sam, tasks=TASKS)
    with torch.no_grad():
        for head in model.task_heads.values():
            head.no_mask_embed.weight += 0.3 * torch.randn_like(head.no_mask_embed.weight)
    return get_peft_model(model, TALoRAConfig(r=4, init_weights=False)).to(dtype)


def make_collator(model) -> Collator:
    base = model.get_base_model()
    return Collator([base.task(name) for name in base.task_names], make_image_processor(64))


def lacking(scene: dict, number: int, step: int) -> dict:
    """A scene without some of its labels."""
    missing = {*LACKING[number], *(["normals"] if step % 4 == 3 else [])}
    return {**scene, "labels": {name: label for name, label in scene["labels"].items() if name not in missing}}


def batch_of(collator: Collator, step: int, numbers, dtype=torch.float64) -> dict:
    """Some of the images of a step."""
    scenes = SyntheticScenes("train", num_images=STEPS * BATCH, size=64, tasks=list(TASKS))
    samples = [lacking(scenes[step * BATCH + number], number, step) for number in numbers]
    batch = collator(samples)
    return {**batch, "pixel_values": batch["pixel_values"].to(dtype)}


def train(sam: str, kind: str, accumulate: int = 1, steps: int = STEPS, dtype=torch.float64):
    """Parameters after some steps, losses of each, the model, and a step's median seconds.

    A step has `BATCH` images; this process takes its share of them.
    """
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, kwargs_handlers=[ddp])
    model = make_model(sam, dtype)
    collator = make_collator(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    weighting = make_weighting(kind, list(TASKS), GIVEN, seed=3)
    balancer = Balancer(accelerator, model, collator.tasks, weighting)
    share = BATCH // (accumulate * accelerator.num_processes)
    begin = accelerator.process_index * share * accumulate
    losses, seconds = [], []
    for step in range(steps):
        numbers = [range(begin + k * share, begin + (k + 1) * share) for k in range(accumulate)]
        batches = [batch_of(collator, step, part, dtype) for part in numbers]
        begun = time.perf_counter()
        losses.append(balancer.backward(batches, step, epoch=step // 5))
        optimizer.step()
        optimizer.zero_grad()
        balancer.after(batches)
        seconds.append(time.perf_counter() - begun)
    model = accelerator.unwrap_model(model)
    own = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return own, losses, model, statistics.median(seconds)


def outcome(sam: str, kind: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Parameters after training, losses of the last step in which all tasks have labels, predictions, step time."""
    own, losses, model, seconds = train(sam, kind, dtype=dtype)
    base = model.get_base_model().eval()
    collator = make_collator(model)
    with torch.no_grad():
        logits = model(pixel_values=batch_of(collator, 0, [0], dtype)["pixel_values"], tasks=list(TASKS)).logits
    base.train()
    found = {f"loss.{name}": value for name, value in losses[-2].items()}
    found |= {f"logits.{name}": value for name, value in logits.items()}
    return {**own, **found, "seconds": torch.tensor(seconds)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in KINDS:
        for dtype in DTYPES:
            found = outcome(sys.argv[1], kind, dtype)
            if PartialState().is_main_process:
                file = Path(sys.argv[2], f"{kind}-{dtype}.safetensors".replace("torch.", ""))
                save_file({name: value.contiguous() for name, value in found.items()}, file)
    PartialState().destroy_process_group()
