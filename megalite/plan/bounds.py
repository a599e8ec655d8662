"""Lower bounds on a layout's time (least_time.py) and memory (least_memory.py). With them the search rules layouts out
without choosing a cut of the layers or building a program. tests/unit/plan/test_plan.py compares both bounds with every
layout of small worlds. Next: search.py.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from megalite.config.optimizer_rules import REDUCE_BUCKET_ELEMENTS, moments_kept
from megalite.pipeline.steps import AHEAD
from megalite.plan.activations import FP32
from megalite.plan.candidates import Candidate, Search
from megalite.plan.device_figures import FRAGMENTS, OVERHEAD_BYTES, Device
from megalite.plan.least_memory import LeastKept, Rates
from megalite.plan.least_time import LeastWork, least_length
from megalite.plan.sharing import Held, Sharing
from megalite.plan.states import DTYPES
from megalite.plan.work import BACKWARD, FORWARD, Work
from megalite.programs.schedules import SCHEDULES, ends_together

NOTHING = LeastKept(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(eq=False)
class LowerBounds:
    """Lower bounds for the layouts of a search on a device."""

    search: Search
    device: Device
    _works: dict[tuple[object, ...], Work] = field(default_factory=dict, init=False, repr=False)
    _least: dict[Work, LeastWork] = field(default_factory=dict, init=False, repr=False)
    _kept: dict[tuple[Work, str], LeastKept] = field(default_factory=dict, init=False, repr=False)
    _layers: dict[tuple[int, int], Held] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def dtype_bytes(self) -> int:
        """Bytes per element of weights and activations."""
        return DTYPES[self.search.config.precision].itemsize

    @cached_property
    def moments(self) -> int:
        """Number of state tensors that the optimizer keeps per weight."""
        optimizer = self.search.config.document.optimizer
        return 2 if optimizer is None else moments_kept(optimizer)

    def work_of(self, one: Candidate) -> Work:
        """The work of one of a candidate's micro-batches."""
        recompute = "full" if one.recompute.isdigit() else one.recompute
        key = one.tensor, one.context, one.attention, one.expert, one.micro, one.sequence, recompute
        if key not in self._works:
            config = self.search.config
            self._works[key] = Work(
                spec=self.search.spec,
                device=self.device.among(self.search.world_size),
                tensor=one.tensor,
                micro=one.micro,
                length=config.data.sequence_length,
                dtype_bytes=self.dtype_bytes,
                sequence=one.sequence,
                recompute=recompute,
                counted=config.data.counted_share,
                expert=one.expert,
                context=one.context,
                by_heads=one.attention == "heads",
                documents=config.data.reset_attention,
                fp16=config.precision == "fp16",
                compiled=config.train.compile,
            )
        return self._works[key]

    def least_of(self, one: Candidate) -> LeastWork:
        """The times that the bounds of its seconds are computed from."""
        work = self.work_of(one)
        if work not in self._least:
            self._least[work] = LeastWork(work)
        return self._least[work]

    def kept_of(self, one: Candidate) -> LeastKept:
        """The sizes that the bounds of its bytes are computed from."""
        key = self.work_of(one), one.recompute
        if key not in self._kept:
            self._kept[key] = LeastKept.of(*key)
        return self._kept[key]

    def sharing(self, one: Candidate) -> Sharing:
        """How a candidate shares its weights among ranks."""
        return Sharing(
            data=self.search.data(one),
            tensor=one.tensor,
            zero=one.zero,
            offload=one.offload != "none",
            moments=self.moments,
            context=one.context,
            expert=one.expert,
            bucket=self._bucket_elements,
        )

    def micro_batches(self, one: Candidate) -> int:
        """Number of micro-batches per step on one data rank."""
        return self.search.batch // (self.search.data(one) * one.micro)

    def weights(self, one: Candidate) -> Held:
        """Elements of the weights of the fullest pipe rank, at least: the mean over the pipe axis."""
        ranks = one.pipe * one.tensor
        routed = self.search.spec.expert_parameters if one.expert > 1 else 0
        return Held((self._parameters - routed) / ranks, routed / one.expert / ranks)

    @cached_property
    def _parameters(self) -> int:
        return self.search.spec.num_parameters

    def least_seconds(self, one: Candidate, evenly: bool = False) -> float:
        """Lower bound of a step's seconds. evenly: for any schedule, as if ranks never waited."""
        least, m, p, chunks = self.least_of(one), self.micro_batches(one), one.pipe, one.chunks
        sharing, held = self.sharing(one), self.weights(one)
        added = chunks * sharing.micro(least.work, held.part(chunks), m > 1).sum(axis=1)
        whole = least.whole + p * float(added[[FORWARD, BACKWARD]].sum())
        world = self.search.world_size
        shared = self.device.ranks_a_core(world)
        if p == 1:
            length = m * whole
        elif evenly:
            length = m * max(whole / p, least.longest(p))
        else:
            length = least_length(least, one.schedule, p, m, whole)
        length = max(length, shared * m * whole / p)
        if p > 1:
            length /= self.device.pipe_share
        return length + shared * sum(sharing.end(least.work, held, world).values())

    def least_bytes(self, one: Candidate) -> float:
        """Lower bound of the bytes of the fullest rank: the larger of when its forwards keep the most, and of the end
        of the last backward, when all gradients exist."""
        gradients = self._has_gradients(one)
        bucket = self.bucket_bytes(one)
        kept = self._least_level(one, gradients, self.kept_of(one))
        if one.zero == 1 and gradients:
            kept += bucket
        at_the_end = self._least_level(one, True, NOTHING) + bucket
        return self.fixed_bytes(one) + max(kept, at_the_end)

    def _has_gradients(self, one: Candidate) -> bool:
        """Whether all gradients surely exist at a moment when forwards keep the most: late in a step that has more
        micro-batches than stages."""
        m = self.micro_batches(one)
        return m > one.pipe and (one.pipe == 1 or one.schedule == "1f1b")

    def _least_level(self, one: Candidate, gradients: bool, kept: LeastKept) -> float:
        """Lower bound of the states and activations of the fullest rank. If pipe rank r holds E_r + n_r k_r bytes with
        n_r layers, the maximum over r is least when all are equal: (layers + ΣE_r/k_r) / Σ1/k_r."""
        spec, p = self.search.spec, one.pipe
        if p == 1:
            states = self.rates(one).of(self.weights(one), gradients)
            return states + kept.layer * spec.num_layers + kept.of_head
        first, each, last = self.state_bytes(one, gradients)
        counts = np.array(SCHEDULES[one.schedule].least_held(p, self.micro_batches(one)))
        by_layer = each + kept.layer * counts
        beside = np.full(p, float(kept.recomputed))
        if ends_together(one.schedule, p, one.chunks):  # on the first rank
            beside[0] = kept.of_head + first + last
        else:  # the last rank's chunk may be the head alone
            beside[0] += first
            beside[-1] = kept.head + kept.logits + last
        level = (spec.num_layers + (beside / by_layer).sum()) / (1 / by_layer).sum()
        return (AHEAD + 1) * kept.hidden + float(level)

    def layer_elements(self, one: Candidate) -> Held:
        """Elements of the weights of the smallest layer on a rank."""
        key = one.tensor, one.expert
        if key not in self._layers:
            spec, sizes = self.search.spec, []
            for layer in range(spec.num_layers):
                routed, mixture = 0.0, spec.mixture_of(layer)
                if mixture is not None and one.expert > 1:
                    routed = spec.expert_parameters / len(mixture.layers)
                shared = spec.layer_parameters(layer) - routed
                shared -= 4 * spec.norm_parameters  # a layer may lack some of its norms
                sizes.append(Held(shared / one.tensor, routed / one.expert / one.tensor))
            self._layers[key] = Held(*(min(elements) for elements in zip(*sizes, strict=True)))
        return self._layers[key]

    def table_elements(self, one: Candidate) -> tuple[float, float]:
        """Elements of the weights of the embedding, and of the head if it has its own."""
        spec = self.search.spec
        table = spec.vocabulary_size * spec.hidden_size / one.tensor
        together = ends_together(one.schedule, one.pipe, one.chunks)
        return table, 0.0 if spec.labels or (spec.tied and together) else table

    def state_bytes(self, one: Candidate, gradients: bool) -> tuple[float, float, float]:
        """Bytes of the states of the embedding, the smallest layer and the head; gradients: whether theirs count."""
        rates, (first, last) = self.rates(one), self.table_elements(one)
        layer = rates.of(self.layer_elements(one), gradients)
        return rates.of(Held(first), gradients), layer, rates.of(Held(last), gradients)

    def rates(self, one: Candidate) -> Rates:
        """Bytes per element of a candidate's states."""
        away = one.offload == "nvme" or (one.offload != "none" and not self.device.cores)
        tensors = self.moments + 1 if one.zero else self.moments  # ZeRO keeps masters
        optimizer = 0 if away else FP32 * tensors
        width, ranks = self.dtype_bytes, self.search.data(one) * one.context

        def of(copies: float) -> tuple[float, float]:
            match one.zero:
                case 0:
                    return width + optimizer, FP32
                case 1:
                    return width + optimizer / copies, FP32
                case 2:
                    return width + optimizer / copies, FP32 / copies
            # ZeRO-3's gradients always exist.
            return width / copies + optimizer / copies + FP32 / copies, 0.0

        return Rates(*of(ranks), *of(ranks / one.expert))

    def fixed_bytes(self, one: Candidate) -> float:
        """Bytes that do not depend on the layers and are always in use."""
        if self.device.cores:
            return 0.0
        return OVERHEAD_BYTES + FRAGMENTS * self.device.memory_bytes

    def bucket_bytes(self, one: Candidate) -> float:
        """Bytes of the reduction bucket, which exists at the end of each backward."""
        if self.device.cores:
            return 0.0
        zero = self.search.config.document.zero_optimization
        if one.zero == 0 or (zero is not None and zero.contiguous_gradients is False):
            return 0.0
        return self._bucket_elements * (self.dtype_bytes if one.zero == 2 else FP32)

    @cached_property
    def _bucket_elements(self) -> int:
        zero = self.search.config.document.zero_optimization
        given = None if zero is None else zero.reduce_bucket_size
        return max(1, REDUCE_BUCKET_ELEMENTS if given is None else given)
