"""What a run over a stream leaves: figures that follow from its matrix, a table, pictures.

A stage's figures are those of `measuring.Measured`, by domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_aside, write_json
from .measuring import Measured
from .pictures import draw_confusion, draw_course, draw_matrix
from .router import BASE
from .scores import average, forgetting, forward_transfer, last

METRICS = ("iou", "boundary_iou")

PUBLISHED = {
    "joint": (76.3, None, None),
    "SAM without training": (69.0, None, None),
    "LwF": (73.3, 72.0, 2.0),
    "EWC": (72.9, 72.3, 3.5),
    "ER": (73.0, 73.2, 2.9),
    "L2P": (63.1, 56.5, 2.0),
    "DualPrompt": (64.9, 64.5, 2.7),
    "CODA-Prompt": (65.9, 63.8, 2.8),
    "decoder tuning": (27.3, 46.9, 45.0),
    "decoder tuning, MoDA": (55.8, 51.2, 0.33),
    "SAM-Adapter": (67.4, 69.3, 8.2),
    "SAM-Adapter, MoDA": (74.3, 73.4, 0.36),
    "HQ-SAM": (68.7, 70.9, 4.9),
    "HQ-SAM, MoDA": (75.2, 74.9, 0.28),
}
"""Last, Avg and FF of IoU on the real CoSAM, as arXiv:2412.06418 gives them: means over five seeds, ViT-B, 1024 px."""


def as_figures(measured: Measured) -> dict[str, Any]:
    """A stage's figures of one set of images, as JSON has them."""
    return {**measured.scores, "chosen": measured.chosen, "encoder_passes": measured.encoder_passes}


def make_results(
    history: Sequence[Mapping[str, Any]], further: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """All figures of a run; masks' scores are percent, differences of them points.

    Args:
        history: ``{"stage", "domains", "natural"}`` before the first stage and after each.
        further: Figures by domain after the last stage: ``"oracle"``, by each image's own adapter (empty without a
            router), and ``"no_prompt"``.
        settings: What the run was.
    """
    before, *stages = history
    names = list(before["domains"])
    results = {**settings, "domains": names, "stages": [stage["stage"] for stage in stages], "matrix": {}}
    for metric in METRICS:
        R = [[stage["domains"][name][metric] for name in names] for stage in stages]
        zero_shot = [before["domains"][name][metric] for name in names]
        whole = len(R) == len(names)
        own_TK = {
            "R": R,
            "zero_shot": zero_shot,
            "last": last(R),
            "avg": average(R) if whole else None,
            "ff": forgetting(R) if whole else None,
            "ff_ever": forgetting(R, "ever") if whole else None,
            "ff_diagonal": forgetting(R, "when_learnt") if whole else None,
            "forward_transfer": forward_transfer(R, zero_shot) if whole else None,
            "no_prompt": _mean(further["no_prompt"], metric),
        }
        if before["natural"] is not None:
            own_TK["natural"] = stages[-1]["natural"][metric]
            own_TK["natural_zero_shot"] = before["natural"][metric]
        if further["oracle"]:
            own_TK |= _oracle(R, [further["oracle"][name][metric] for name in names], own_TK["last"])
        results["matrix"][metric] = own_TK
    passes = [figures["encoder_passes"] for figures in stages[-1]["domains"].values()]
    results["encoder_passes"] = sum(passes) / len(passes)
    if further["oracle"]:
        results["routing"] = _routing(stages, names)
    return results


def _oracle(R: Sequence[Sequence[float]], oracle: Sequence[float], achieved: float) -> dict[str, float]:
    best = sum(oracle) / len(oracle)
    return {"oracle": list(oracle), "oracle_last": best, "oracle_gap": best - achieved}


def _routing(stages: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Where the test images went after the last stage: counts (domains, choices), the last choice being none."""
    choices = [*names, BASE]
    final = stages[-1]
    counts = [[final["domains"][name]["chosen"].get(choice, 0) for choice in choices] for name in names]
    total = sum(map(sum, counts))
    routing = {
        "choices": choices,
        "counts": counts,
        "accuracy": sum(row[index] for index, row in enumerate(counts)) / total,
        "false_alarms": sum(row[-1] for row in counts) / total,
        "natural_to_base": None,
    }
    if final["natural"] is not None:
        chosen = final["natural"]["chosen"]
        routing["natural_to_base"] = chosen.get(BASE, 0) / sum(chosen.values())
    return routing


def _mean(figures: Mapping[str, Mapping[str, float]], metric: str) -> float:
    return sum(own[metric] for own in figures.values()) / len(figures)


def table(results: Mapping[str, Any]) -> str:
    """The run's figures as Markdown, beside the published ones; what differs between them is said below."""
    heads = ("Last", "Avg", "FF", "FF, diagonal", "forward transfer", "natural", "no prompt", "oracle Last")
    keys = ("last", "avg", "ff", "ff_diagonal", "forward_transfer", "natural", "no_prompt", "oracle_last")
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for metric, title in zip(METRICS, ("IoU", "boundary IoU"), strict=True):
        cells = [_number(results["matrix"][metric].get(key)) for key in keys]
        lines.append(f"| {results['method']}, {results['adapter']}: {title} | {' | '.join(cells)} |")
    own = results["matrix"]["iou"]
    zero = [_number(sum(own["zero_shot"]) / len(own["zero_shot"])), *[""] * 4, _number(own.get("natural_zero_shot"))]
    lines.append(f"| without training: IoU | {' | '.join(zero)} | | |")
    if "routing" in results:
        routing = results["routing"]
        lines += ["", f"Routing: {100 * routing['accuracy']:.1f} % of the test images went to their own domain"]
        lines[-1] += f", {100 * routing['false_alarms']:.1f} % to the plain model"
        if routing["natural_to_base"] is not None:
            lines[-1] += f", as did {100 * routing['natural_to_base']:.1f} % of the natural ones"
        lines[-1] += "."
    lines += ["", f"{results['encoder_passes']:.2f} encoder passes an image, {results['bytes_per_domain']:,.0f} bytes"]
    lines[-1] += (
        f" and {results['parameters_per_domain']:,.0f} parameters a domain, {results['seconds']:.0f} s of learning."
    )
    return "\n".join(lines)


def published_table(stream: str) -> str:
    """The published figures, and why they are no measure of this run's."""
    lines = ["| published, real CoSAM (IoU) | Last | Avg | FF |", "|---|---:|---:|---:|"]
    lines += [f"| {name} | {' | '.join(map(_number, figures))} |" for name, figures in PUBLISHED.items()]
    other = "images are generated and small, the base is a small SAM" if stream == "generated" else "the splits"
    lines += ["", f"Not comparable number by number: here {other}; there 24 epochs, batch 4, Adam at 1e-3, scale"]
    lines += ["jitter 0.1 to 2, and the best epoch was chosen on test images. Here no test image chooses anything."]
    return "\n".join(lines)


def write_report(folder: str | Path, results: Mapping[str, Any]) -> None:
    """Write results.json, results.md and the pictures into a folder."""
    names, own = results["domains"], results["matrix"]["iou"]
    title = f"{results['method']}, {results['adapter']}"
    with write_aside(folder, owned=("confusion.png",)) as aside:
        write_json(aside / "results.json", results)
        parts = (f"# {title} on the stream {results['stream']}", table(results), published_table(results["stream"]))
        (aside / "results.md").write_text("\n\n".join(parts) + "\n")
        draw_matrix(own["R"], names, f"IoU (%), {title}").save(aside / "matrix.png")
        curves = {name: [row[index] for row in own["R"]] for index, name in enumerate(names)}
        draw_course(curves, results["stages"], f"IoU (%) after each domain, {title}").save(aside / "course.png")
        if "routing" in results:
            routing = results["routing"]
            picture = draw_confusion(routing["counts"], names, f"Routing, {title}", routing["choices"])
            picture.save(aside / "confusion.png")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
