"""What a segmentation must beat: figures of predictions that never look at the image.

python recipes/baselines.py my_data --classes 11 --ignored_class 11
"""

import argparse
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from peft_talora import IGNORE_INDEX, FolderDataset, make_task


def majority_per_position(labels: Iterable[torch.Tensor], num_classes: int) -> torch.Tensor:
    """The class (H, W) that is most frequent at each position of the labels (H, W), all of one size."""
    counts = 0
    for label in labels:
        known = label != IGNORE_INDEX
        counts = counts + F.one_hot(label.where(known, 0), num_classes) * known[..., None]
    return counts.argmax(-1)


def figures_of(prediction: torch.Tensor, labels: Iterable[torch.Tensor], num_classes: int) -> dict[str, float]:
    """The metrics of one prediction (H, W) for every image."""
    metric = make_task("segmentation", num_classes).metric()
    logits = F.one_hot(prediction, num_classes).permute(2, 0, 1)[None].float()
    for label in labels:
        metric.update(logits, label[None])
    return metric.compute()


def main() -> None:
    """Print both baselines of a folder's splits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_root")
    parser.add_argument("--classes", type=int, required=True)
    parser.add_argument("--ignored_class", type=int, default=IGNORE_INDEX)
    parser.add_argument("--splits", nargs=2, default=["train", "val"])
    args = parser.parse_args()
    task, ignored = make_task("segmentation", args.classes), {"segmentation": args.ignored_class}
    train, test = (FolderDataset(args.data_root, split, [task], ignored_classes=ignored) for split in args.splits)
    seen = [train[index]["labels"]["segmentation"] for index in range(len(train))]
    wanted = [test[index]["labels"]["segmentation"] for index in range(len(test))]
    print(
        "majority class of each position", figures_of(majority_per_position(seen, args.classes), wanted, args.classes)
    )
    most = torch.bincount(torch.cat([label[label != IGNORE_INDEX] for label in seen]), minlength=args.classes).argmax()
    everywhere = torch.full_like(wanted[0], int(most))
    print(f"class {int(most)} everywhere", figures_of(everywhere, wanted, args.classes))


if __name__ == "__main__":
    main()
