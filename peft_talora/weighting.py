"""How the losses of several tasks are weighed against each other in a step.

Axes: T tasks of which S have labels in this step, N shared parameters.

A weighting gives the gradient of the shared parameters, a sum of the tasks' gradients with weights w,

    g = Σ_t w_t ∇L_t,

where L_t is the loss of the whole step: of all its batches and of all processes. What belongs to one task alone, such
as its head, gets w_t ∇L_t as well, or just ∇L_t where only gradients that are shared are balanced. A task that has no
label in a step takes no part in it.

====================  ================================================================================================
``equal``             w = 1
``fixed``             w as given, such as the paper's 1 : 1 : 4
``rlw``               w = T softmax(z), z ~ N(0, 1) anew in each step (arXiv:2111.10603)
``dwa``               w = T softmax(r / 2), r_t the ratio of the mean losses of the last two epochs (arXiv:1803.10704)
``uncertainty``       w = exp(−s) / 2, s learnt by ½ Σ (exp(−s_t) L_t + s_t) (arXiv:1705.07115)
``imtl-l``            w = exp(s), s learnt by Σ (exp(s_t) L_t − s_t) (Liu et al., ICLR 2021, equation 8)
``gls``               of the geometric mean G of the losses: w = G / (T L) (arXiv:1904.08492)
``famo``              w = c z / L, z = softmax(x), c = 1 / Σ (z_t / L_t), x learnt by how each log L_t falls
                      (arXiv:2306.03792, algorithm 1)
``gradnorm``          w learnt so that tasks that lag have larger gradients (arXiv:1711.02257, equation 2, α = 1.5)
``db-mtl``            gradients of log L, their moving means scaled up to the longest one (arXiv:2308.12029)
``pcgrad``, ...       of the gradients' inner products, by TorchJD: see `AGGREGATORS`
====================  ================================================================================================
"""

from __future__ import annotations

import importlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

_LEAST = 1e-12  # of a loss whose logarithm or inverse is taken

AGGREGATORS = ("pcgrad", "cagrad", "mgda", "nash-mtl", "aligned-mtl", "upgrad")
"""Those of TorchJD: arXiv 2001.06782, 2110.14048, 1810.04650, 2202.01017, 2305.19000, 2406.16232."""


class Weighting(ABC):
    """One way to weigh T tasks. Its state is the same in all processes, for it sees losses and gradients of all.

    Args:
        tasks: their names, in order.

    Raises:
        ValueError: without tasks.
    """

    def __init__(self, tasks: Sequence[str]):
        if not tasks:
            raise ValueError("tasks are none; a weighting needs at least one.")
        self.tasks = list(tasks)

    @abstractmethod
    def note(self, losses_S: Tensor, labelled_S: Tensor, epoch: int) -> None:
        """Learn from the losses (S,), float64, of a step of an epoch; called after each.

        `labelled_S` are the positions, int64, of the tasks that had labels.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What it has learnt."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""


class LossWeighting(Weighting):
    """Knows its weights before a step, whose losses are then summed: one backward pass, in whatever order."""

    @abstractmethod
    def weights(self, step: int, epoch: int = 0) -> Tensor:
        """The weights (T,) of a step of an epoch, float64."""


class GradientWeighting(Weighting):
    """Needs the losses and gradients of a step, of each task apart.

    Attributes:
        latest_S: the weights (S,) that the latest step's gradients of the shared parameters were summed with.
    """

    latest_S: Tensor

    def weighed_sum(self, w_S: Tensor, gradients_SN: Tensor) -> Tensor:
        """Σ w ∇L, (N,), in the gradients' dtype; the weights become the latest."""
        self.latest_S = w_S
        return w_S.to(gradients_SN) @ gradients_SN

    @abstractmethod
    def combine(self, losses_S: Tensor, gradients_SN: Tensor, labelled_S: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The gradient (N,) of the shared parameters, and the weights (S,) of what belongs to one task alone.

        The gradient is a `weighed_sum`, which keeps its weights for whoever looks.

        Args:
            losses_S: of the tasks that have labels in this step, float64.
            gradients_SN: of these losses.
            labelled_S: the positions of these tasks, int64.
            step: number of the step.
        """


class _Memoryless:
    """What a weighting that learns nothing knows of learning."""

    def note(self, losses_S: Tensor, labelled_S: Tensor, epoch: int) -> None:
        """Nothing is learnt."""

    def state_dict(self) -> dict[str, Any]:
        """There is none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if there is one."""
        if state:
            raise ValueError(f"state has {sorted(state)}; {type(self).__name__} has none.")


class Numbers:
    """A number per task, learnt by Adam from gradients that are written down rather than traced.

    Args:
        start: values (T,), float64.
        learning_rate: of Adam.
        weight_decay: of Adam.
    """

    def __init__(self, start: Tensor, learning_rate: float, weight_decay: float = 0.0):
        self.parameter_T = nn.Parameter(start.clone())
        self.optimizer = torch.optim.Adam([self.parameter_T], lr=learning_rate, weight_decay=weight_decay)

    @property
    def values_T(self) -> Tensor:
        """The numbers."""
        return self.parameter_T.detach()

    def learn(self, gradient_S: Tensor, labelled_S: Tensor) -> None:
        """Take a step; the other tasks have a gradient of 0."""
        self.parameter_T.grad = torch.zeros_like(self.parameter_T)
        self.parameter_T.grad[labelled_S] = gradient_S
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The numbers, and Adam's moments."""
        return {"values": self.values_T.clone(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.parameter_T.data.copy_(state["values"])
        self.optimizer.load_state_dict(state["optimizer"])


class _Learnt(Weighting):
    """A weighting of which `numbers` is all that it has learnt."""

    numbers: Numbers

    def state_dict(self) -> dict[str, Any]:
        """That of the numbers."""
        return self.numbers.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.numbers.load_state_dict(state)


# --- known before the step ---


class Fixed(_Memoryless, LossWeighting):
    """The same weights in every step.

    Args:
        tasks: see `Weighting`.
        given: weight by task; None: all are 1.
    """

    def __init__(self, tasks: Sequence[str], given: Mapping[str, float] | None = None):
        super().__init__(tasks)
        self.given_T = torch.tensor([1.0 if given is None else given[name] for name in tasks], dtype=torch.float64)

    def weights(self, step: int, epoch: int = 0) -> Tensor:
        """As given."""
        return self.given_T


class RandomWeights(_Memoryless, LossWeighting):
    """RLW: drawn anew in each step, the same ones in every process and in a run that was resumed.

    Args:
        tasks: see `Weighting`.
        seed: of what is drawn, together with the step.
    """

    def __init__(self, tasks: Sequence[str], seed: int = 0):
        super().__init__(tasks)
        self.seed = seed

    def weights(self, step: int, epoch: int = 0) -> Tensor:
        """T softmax(z)."""
        z_T = torch.randn(len(self.tasks), generator=generator_of(self.seed, step), dtype=torch.float64)
        return len(z_T) * z_T.softmax(0)


class DynamicAverage(LossWeighting):
    """DWA: a task whose loss falls slower gets more; all weights are 1 until two epochs are over.

    Args:
        tasks: see `Weighting`.
        temperature: the larger, the more alike the weights.
    """

    def __init__(self, tasks: Sequence[str], temperature: float = 2.0):
        super().__init__(tasks)
        self.temperature = temperature
        self.epoch = 0
        # Sums of losses and their numbers: of the epoch under way, of the last one and of the one before.
        self.sums_3T = torch.zeros(3, len(tasks), dtype=torch.float64)
        self.counts_3T = torch.zeros(3, len(tasks), dtype=torch.float64)

    def weights(self, step: int, epoch: int = 0) -> Tensor:
        """T softmax(r / temperature); a task that an epoch has no loss of counts as one whose loss stays."""
        self._begin(epoch)
        last, before = (self.sums_3T[k] / self.counts_3T[k] for k in (1, 2))
        known_T = (self.counts_3T[1:] > 0).all(0)
        if not known_T.any():
            return torch.ones(len(self.tasks), dtype=torch.float64)
        ratio_T = torch.where(known_T, last / before.clamp(min=_LEAST), 1.0)
        return len(ratio_T) * (ratio_T / self.temperature).softmax(0)

    def note(self, losses_S: Tensor, labelled_S: Tensor, epoch: int) -> None:
        """Add to the means of the epoch; another one begins new ones."""
        self._begin(epoch)
        self.sums_3T[0, labelled_S] += losses_S
        self.counts_3T[0, labelled_S] += 1

    def _begin(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch = epoch
            for sums in (self.sums_3T, self.counts_3T):
                sums[1:] = sums[:-1].clone()
                sums[0] = 0

    def state_dict(self) -> dict[str, Any]:
        """Means of the epochs."""
        return {"epoch": self.epoch, "sums": self.sums_3T, "counts": self.counts_3T}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.epoch, self.sums_3T, self.counts_3T = state["epoch"], state["sums"].clone(), state["counts"].clone()


class _LearntScales(_Learnt, LossWeighting):
    """Weights that follow from a number s per task, 0 at first.

    Args:
        tasks: see `Weighting`.
        learning_rate: of s.
    """

    def __init__(self, tasks: Sequence[str], learning_rate: float = 1e-2):
        super().__init__(tasks)
        self.numbers = Numbers(torch.zeros(len(tasks), dtype=torch.float64), learning_rate)


class Uncertainty(_LearntScales):
    """Homoscedastic uncertainty: s_t is the logarithm of a task's variance."""

    def weights(self, step: int, epoch: int = 0) -> Tensor:
        """exp(−s) / 2."""
        return (-self.numbers.values_T).exp() / 2

    def note(self, losses_S: Tensor, labelled_S: Tensor, epoch: int) -> None:
        """Learn s by the derivative (1 − exp(−s) L) / 2."""
        self.numbers.learn((1 - (-self.numbers.values_T[labelled_S]).exp() * losses_S) / 2, labelled_S)


class ImpartialLosses(_LearntScales):
    """IMTL-L: s_t scales the losses to one size, for at the optimum exp(s_t) L_t = 1."""

    def weights(self, step: int, epoch: int = 0) -> Tensor:
        """exp(s)."""
        return self.numbers.values_T.exp()

    def note(self, losses_S: Tensor, labelled_S: Tensor, epoch: int) -> None:
        """Learn s by the derivative exp(s) L − 1."""
        self.numbers.learn(self.numbers.values_T[labelled_S].exp() * losses_S - 1, labelled_S)


# --- of the losses or gradients of the step ---


class GeometricLoss(_Memoryless, GradientWeighting):
    """GLS: the gradient of (Π L_t)^(1 / T) over the tasks that have labels."""

    def combine(self, losses_S: Tensor, gradients_SN: Tensor, labelled_S: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """G / (T L)."""
        losses_S = losses_S.clamp(min=_LEAST)
        w_S = losses_S.log().mean().exp() / (len(losses_S) * losses_S)
        return self.weighed_sum(w_S, gradients_SN), w_S


class FAMO(_Learnt, GradientWeighting):
    """FAMO: every task's logarithm of the loss shall fall alike; z is learnt from what a step did to it.

    Args:
        tasks: see `Weighting`.
        learning_rate: of x.
        weight_decay: of x.
    """

    def __init__(self, tasks: Sequence[str], learning_rate: float = 0.025, weight_decay: float = 0.001):
        super().__init__(tasks)
        self.numbers = Numbers(torch.zeros(len(tasks), dtype=torch.float64), learning_rate, weight_decay)
        self.before_S: Tensor | None = None

    def combine(self, losses_S: Tensor, gradients_SN: Tensor, labelled_S: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """c z / L; z is of the tasks that have labels."""
        self.before_S = losses_S.clamp(min=_LEAST)
        share_S = self.numbers.values_T[labelled_S].softmax(0) / self.before_S
        w_S = share_S / share_S.sum()
        return self.weighed_sum(w_S, gradients_SN), w_S

    def note(self, losses_S: Tensor, labelled_S: Tensor, epoch: int) -> None:
        """What counts is what comes after the step: `note_after`."""

    def note_after(self, losses_S: Tensor, labelled_S: Tensor) -> None:
        """Learn x from the losses (S,) of the step's own images after it.

        The derivative is that of Σ z_t (log L_t before − log L_t after), the falls taken as they are.
        """
        falls_S = self.before_S.log() - losses_S.clamp(min=_LEAST).log()
        z_S = self.numbers.values_T[labelled_S].softmax(0)
        self.numbers.learn(z_S * (falls_S - (z_S * falls_S).sum()), labelled_S)


class GradNorm(GradientWeighting):
    """GradNorm: |w_t ∇L_t| shall be the tasks' mean times how much a task lags, to the power of `restoring`.

    How much it lags is L_t over its first loss, over the mean of that over the tasks.

    Args:
        tasks: see `Weighting`.
        learning_rate: of w.
        restoring: α of the paper.
    """

    def __init__(self, tasks: Sequence[str], learning_rate: float = 0.025, restoring: float = 1.5):
        super().__init__(tasks)
        self.numbers = Numbers(torch.ones(len(tasks), dtype=torch.float64), learning_rate)
        self.restoring = restoring
        self.first_T = torch.full((len(tasks),), math.nan, dtype=torch.float64)  # of each task's first loss

    def combine(self, losses_S: Tensor, gradients_SN: Tensor, labelled_S: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The weights of before, which then learn: their derivative is |∇L_t| · sign(|w_t ∇L_t| − the aim)."""
        first_S = self.first_T[labelled_S]
        first_S = torch.where(first_S.isnan(), losses_S.clamp(min=_LEAST), first_S)
        self.first_T[labelled_S] = first_S
        w_S = self.numbers.values_T[labelled_S].clone()
        norms_S = gradients_SN.norm(dim=1).cpu().double()
        ratio_S = losses_S / first_S
        lag_S = ratio_S / ratio_S.mean().clamp(min=_LEAST)
        aim_S = (w_S * norms_S).mean() * lag_S**self.restoring
        self.numbers.learn(norms_S * (w_S * norms_S - aim_S).sign(), labelled_S)
        self.numbers.values_T.clamp_(min=1e-4)  # a weight that became negative would make a loss larger
        self.numbers.values_T.mul_(len(self.tasks) / self.numbers.values_T.sum())
        return self.weighed_sum(w_S, gradients_SN), w_S

    def note(self, losses_S: Tensor, labelled_S: Tensor, epoch: int) -> None:
        """All is learnt in `combine`."""

    def state_dict(self) -> dict[str, Any]:
        """The weights, and the first losses."""
        return {"weights": self.numbers.state_dict(), "first": self.first_T}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.numbers.load_state_dict(state["weights"])
        self.first_T = state["first"].clone()


class DualBalancing(GradientWeighting):
    """DB-MTL: losses are balanced by their logarithms, gradients by their lengths.

        m_t ← β m_t + (1 − β) ∇ log L_t,    g = max_s |m_s| · Σ_t m_t / |m_t|

    A task's moving mean begins with its first gradient; what belongs to one task alone gets ∇ log L_t.

    Args:
        tasks: see `Weighting`.
        decay: β, in [0, 1).
    """

    def __init__(self, tasks: Sequence[str], decay: float = 0.1):
        super().__init__(tasks)
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` is {decay}; allowed: 0 to below 1.")
        self.decay = decay
        self.means: dict[str, Tensor] = {}

    def combine(self, losses_S: Tensor, gradients_SN: Tensor, labelled_S: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """See the class."""
        inverse_S = 1 / losses_S.clamp(min=_LEAST)
        means = []
        for row, index in enumerate(labelled_S.tolist()):
            own = inverse_S[row].to(gradients_SN.dtype) * gradients_SN[row]
            name = self.tasks[index]
            if name in self.means and self.decay:
                before = self.means[name].to(own.device)  # a restored one is on the CPU
                own = self.decay * before + (1 - self.decay) * own
            if self.decay:
                self.means[name] = own
            means.append(own)
        means_SN = torch.stack(means)
        norms_S = means_SN.norm(dim=1)
        w_S = torch.where(norms_S > 0, norms_S.max() / norms_S.clamp(min=_LEAST), 0)
        return self.weighed_sum(w_S, means_SN), inverse_S

    def note(self, losses_S: Tensor, labelled_S: Tensor, epoch: int) -> None:
        """All is learnt in `combine`."""

    def state_dict(self) -> dict[str, Any]:
        """The moving means."""
        return {"means": self.means}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.means = {name: value.clone() for name, value in state["means"].items()}


class Aggregated(_Memoryless, GradientWeighting):
    """One of TorchJD's, which reads the inner products of the gradients; the tasks' own parameters are not weighed.

    Args:
        tasks: see `Weighting`.
        kind: one of `AGGREGATORS`.
        seed: of what PCGrad draws, together with the step.

    Raises:
        ImportError: if TorchJD is not there.
    """

    def __init__(self, tasks: Sequence[str], kind: str, seed: int = 0):
        super().__init__(tasks)
        self.kind, self.seed = kind, seed
        try:
            self.aggregation = importlib.import_module("torchjd.aggregation")
        except ImportError as error:
            raise ImportError(f"the weighting {kind!r} is TorchJD's: pip install 'peft_talora[balancing]'.") from error

    def combine(self, losses_S: Tensor, gradients_SN: Tensor, labelled_S: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Weights that follow from the inner products, in float64; a task that is alone has its own gradient."""
        if len(losses_S) == 1:
            return self.weighed_sum(torch.ones_like(losses_S), gradients_SN), torch.ones_like(losses_S)
        gradients = gradients_SN.double()
        gramian_SS = (gradients @ gradients.T).cpu()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(Random(f"weighting {self.seed} {step}").getrandbits(63))
            w_S = self._weigh(gramian_SS)
        return self.weighed_sum(w_S, gradients_SN), torch.ones_like(losses_S)

    def _weigh(self, gramian_SS: Tensor) -> Tensor:
        known = self.aggregation
        if self.kind == "nash-mtl":
            # Made anew: it would begin where the step before ended, and a resumed run would not. It reads a matrix of
            # which only the inner products matter, so it is given a small one with the same.
            solve = known.NashMTL(len(gramian_SS), max_norm=0.0, update_weights_every=1, optim_niter=20)
            with warnings.catch_warnings():
                # Each problem is solved once, so that it does not matter that the next one would not be faster.
                warnings.filterwarnings("ignore", message="You are solving a parameterized problem that is not DPP")
                return solve.weighting(square_root(gramian_SS))
        if self.kind == "cagrad":
            return known.CAGradWeighting(c=0.4)(gramian_SS)
        kinds = {
            "pcgrad": "PCGradWeighting",
            "mgda": "MGDAWeighting",
            "aligned-mtl": "AlignedMTLWeighting",
            "upgrad": "UPGradWeighting",
        }
        return getattr(known, kinds[self.kind])()(gramian_SS)


def square_root(gramian_SS: Tensor) -> Tensor:
    """A symmetric matrix whose rows have these inner products."""
    values_S, vectors_SS = torch.linalg.eigh(gramian_SS)
    return vectors_SS @ values_S.clamp(min=0).sqrt().diag() @ vectors_SS.T


def generator_of(seed: int, step: int) -> torch.Generator:
    """Random numbers of a step."""
    return torch.Generator().manual_seed(Random(f"weighting {seed} {step}").getrandbits(63))


LOSS_WEIGHTINGS = ("equal", "fixed", "uncertainty", "dwa", "rlw", "imtl-l")
"""Kinds that are a `LossWeighting`; all others need each task's gradients."""
WEIGHTINGS = (*LOSS_WEIGHTINGS, "gls", "famo", "gradnorm", "db-mtl", *AGGREGATORS)
"""All kinds, as `make_weighting` takes them."""


def make_weighting(
    kind: str, tasks: Sequence[str], given: Mapping[str, float] | None = None, seed: int = 0
) -> Weighting:
    """A weighting by its name.

    Args:
        kind: one of `WEIGHTINGS`.
        tasks: names, in order.
        given: weight by task, for ``"fixed"``.
        seed: of what is drawn.

    Raises:
        ValueError: for an unknown kind.
        ImportError: for one of TorchJD's where that is missing.
    """
    if kind in AGGREGATORS:
        return Aggregated(tasks, kind, seed)
    makers = {
        "equal": lambda: Fixed(tasks),
        "fixed": lambda: Fixed(tasks, given),
        "rlw": lambda: RandomWeights(tasks, seed),
        "dwa": lambda: DynamicAverage(tasks),
        "uncertainty": lambda: Uncertainty(tasks),
        "imtl-l": lambda: ImpartialLosses(tasks),
        "gls": lambda: GeometricLoss(tasks),
        "famo": lambda: FAMO(tasks),
        "gradnorm": lambda: GradNorm(tasks),
        "db-mtl": lambda: DualBalancing(tasks),
    }
    if kind not in makers:
        raise ValueError(f"weighting is {kind!r}; allowed: {', '.join(WEIGHTINGS)}.")
    return makers[kind]()
