"""The layout holds: imports point one way, the public face is documented."""

import ast
from dataclasses import make_dataclass
from pathlib import Path

import peft_talora

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "peft_talora"
# What each part may import of the package; nothing is imported from a recipe.
ALLOWED = {
    "losses": set(),
    "metrics": {"losses"},
    "tasks": {"losses", "metrics"},
    "resize": set(),
    "task_head": set(),
    "msam_config": {"tasks", "task_head"},
    "sam_hq": set(),
    "msam": {"files", "msam_config", "task_head", "resize", "sam_hq", "tasks"},
    "tuner": set(),
    "data": {"tasks", "losses"},
    "plotting": {"tasks"},
    "small_sam": {"files", "resize"},
    "prompts": set(),
    "promptable": {"data", "losses", "prompts", "resize", "tasks"},
    "version": set(),
    "files": set(),
    "hub": {"files", "msam", "msam_config", "tuner"},
    "lora_folder": {"files", "hub"},
    "lora": {"files", "hub", "lora_folder", "msam", "tuner"},
    "sources": {"data", "losses", "tasks"},
    "engine": {"data", "msam_config", "sources", "tasks"},
    "benchmark": {
        "checkpoint",
        "data",
        "engine",
        "files",
        "losses",
        "methods",
        "metrics",
        "plotting",
        "small_sam",
        "tasks",
    },
    "fitting": {"engine", "sharding"},
    "observation": {"balancing", "checkpoint", "files", "results"},
    "stopping": set(),
    "sharding": set(),
    "metric_module": {"metrics"},
    "evaluate_modules": {"__init__", "metrics"},  # `evaluate` copies these out of the package
    "weighting": set(),
    "balancing": {"engine", "sharding", "tasks", "weighting"},
    "evaluation": {"data", "engine", "metrics", "tasks"},
    "methods": {"engine", "files", "hub", "msam", "tuner"},
    "checkpoint": {"files", "hub", "sharding"},
    "results": {"checkpoint", "version"},
    "continual": {
        "data",
        "files",
        "hub",
        "losses",
        "msam",
        "plotting",
        "prompts",
        "promptable",
        "resize",
        "sam_hq",
        "tasks",
        "tuner",
    },
    "report": {"data", "evaluation", "files", "hub", "plotting", "results", "sources", "tasks"},
}


def imported_parts(file: Path) -> set[str]:
    """Top-level parts of the package that a file imports."""
    depth = len(file.relative_to(PACKAGE).parts)
    parts = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level == depth:
                parts |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "peft_talora":
            parts |= {node.module.split(".")[1]} if "." in node.module else {"__init__"}
        elif isinstance(node, ast.Import):
            parts |= {"__init__" for alias in node.names if alias.name.split(".")[0] in ("peft_talora", "recipes")}
    return parts


def test_imports_point_one_way():
    seen = set()
    for file in PACKAGE.rglob("*.py"):
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        seen.add(part)
        assert imported_parts(file) <= ALLOWED[part] | {part}, f"{file}: {imported_parts(file)}"
    assert seen == set(ALLOWED)


def is_documented(value, name: str) -> bool:
    """Whether there is a docstring, and not the signature that Python gives a dataclass without one."""
    return bool(value.__doc__) and not value.__doc__.startswith(f"{name}(")


def test_a_dataclass_without_docstring_is_not_documented():
    assert not is_documented(make_dataclass("Bare", ["x"]), "Bare")


def test_every_public_name_is_documented_and_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for name in peft_talora.__all__:
        assert name == "__version__" or f"`{name}`" in readme, name
        value = getattr(peft_talora, name)
        assert not callable(value) or is_documented(value, name), name


def test_files_and_the_readme_s_tree_agree():
    tree = (ROOT / "README.md").read_text().split("## Files")[1]
    for file in [*PACKAGE.glob("*.py"), *(PACKAGE / "tuner").glob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        if file.name not in ("__init__.py", "version.py"):
            assert file.name in tree, file
