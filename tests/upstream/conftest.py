"""How PEFT's tests run here: under PEFT's own handling of warnings, and without the cases that do not apply."""

from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path

import pytest

from peft_talora.tuner import TALoRAConfig, TALoRAModel

HERE = Path(__file__).parent
# What PEFT's tests are known to be warned of, through what they do on purpose; any other warning is shown.
WARNINGS = [
    "default",
    "ignore:The PEFT config's `base_model_name_or_path` was renamed",  # several models with one configuration
    "ignore:Could not find a config file in:UserWarning",  # small nets have none
    "ignore:Adapter .* was active which is now deleted",
    "ignore:Already following adapters were merged",
    "ignore:The configuration file contains a `runtime_config` key",
    "ignore:FSDP is switching to use `NO_SHARD`",  # one process
    "ignore:When using ``NO_SHARD``",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # PEFT's old names of transformers' methods
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
    "ignore:Class-scoped fixtures defined as instance methods",
]


@pytest.hookimpl(tryfirst=True)  # before `-k` takes tests away
def pytest_collection_modifyitems(config, items):
    """Skip what a module's `LEFT_OUT` lists; refuse a list that is stale or leaves too little."""
    whole_files = not any("::" in argument for argument in config.args)
    ours = [item for item in items if item.path.parent == HERE]
    for module, group in groupby(ours, key=lambda item: item.module):
        stale, run = set(module.LEFT_OUT), 0
        for item in group:
            item.add_marker(pytest.mark.filterwarnings(*WARNINGS))
            name = item.nodeid.split("::", 1)[1]
            patterns = [pattern for pattern in module.LEFT_OUT if fnmatch(name, pattern)]
            stale.difference_update(patterns)
            run += not patterns
            if patterns:
                item.add_marker(pytest.mark.skip(reason=module.LEFT_OUT[patterns[0]]))
        if whole_files and stale:
            raise pytest.UsageError(f"{module.__name__}: `LEFT_OUT` names what PEFT does not test: {sorted(stale)}.")
        if whole_files and run < module.AT_LEAST:
            raise pytest.UsageError(f"{module.__name__} runs {run} tests of PEFT; {module.AT_LEAST} are expected.")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Select a task where there are several; fail a test that proves nothing of ours.

    PEFT's tests call without `task_ids`, so an adapter of several tasks has its second one selected from the start.
    """
    if pyfuncitem.path.parent != HERE:
        return (yield)
    seen = [value for value in _parameters(pyfuncitem) if value is TALoRAConfig or isinstance(value, TALoRAConfig)]
    inject, post_init = TALoRAModel.inject_adapter, TALoRAConfig.__post_init__

    def inject_and_select(self, model, adapter_name, *args, **kwargs):
        seen.append(adapter_name)
        inject(self, model, adapter_name, *args, **kwargs)
        if len(self.peft_config[adapter_name].task_names) > 1:
            self.task_state.select([adapter_name], 1)

    def count_and_init(self):
        seen.append(self)
        post_init(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TALoRAModel, "inject_adapter", inject_and_select)
        patch.setattr(TALoRAConfig, "__post_init__", count_and_init)
        try:
            result = yield
        except pytest.skip.Exception as skipped:
            pytest.fail(f"PEFT itself skips this: put it into `LEFT_OUT`. {skipped}", pytrace=False)
    if not seen:
        pytest.fail("Our configuration takes no part in this: put it into `LEFT_OUT`.", pytrace=False)
    return result


def _parameters(item: pytest.Function) -> list:
    return list(item.callspec.params.values()) if "callspec" in vars(item) else []
