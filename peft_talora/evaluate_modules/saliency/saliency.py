"""How well what stands out is found, as a module of `evaluate`."""

import peft_talora.metric_module as dense
from peft_talora.metrics import SaliencyMetric


class Saliency(dense.ProbabilityMetric):
    """Saliency from its probability (H, W) and references of 0, 1 and 255 (ignored).

    `peft_talora.metrics.SaliencyMetric` says what its figures are.
    """

    def make_metric(self) -> SaliencyMetric:
        """There are no options."""
        return SaliencyMetric()
