"""Being asked to stop: SIGTERM is noted, and acted on where the run can be taken up again."""

from __future__ import annotations

import signal
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce

STOPPED = 128 + signal.SIGTERM
"""Exit code of a run that stopped when it was asked to: what a shell reports of the signal itself. 0 would
tell a scheduler of jobs that it is finished."""


class StopSignal:
    """Whether any process was sent SIGTERM while this was entered; the handler before it is put back after."""

    def __init__(self):
        self._received = False

    def __enter__(self) -> StopSignal:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: Any) -> None:
        self._received = True

    def asked(self) -> bool:
        """Whether to stop now: the same in all processes, which all ask at the same places."""
        state = PartialState()
        if state.num_processes == 1:
            return self._received
        return bool(reduce(torch.tensor(float(self._received), device=state.device), "sum") > 0)
