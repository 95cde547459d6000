"""How well edges are found, as a module of `evaluate`."""

import peft_talora.metric_module as dense
from peft_talora.metrics import EdgesMetric


class Edges(dense.ProbabilityMetric):
    """Edges from their probability (H, W) and references of 0, 1 and 255 (ignored).

    `peft_talora.metrics.EdgesMetric` says what its figures are, and how they differ from those of the BSDS benchmark.
    """

    def make_metric(self) -> EdgesMetric:
        """There are no options."""
        return EdgesMetric()
