"""One training step: forward and backward of its micro-batches, then the update. The host waits for none of it.

A step whose gradients are not finite is skipped: weights, optimizer, momentum encoder, queue and running statistics
stay as they were. That is decided on the device, from the gradients all ranks share, so they agree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fasttrain.engine.optim import Rates, make_optimizer, set_rates, take_step
from fasttrain.engine.options import OptimisationOptions
from fasttrain.engine.precision import DTYPES
from fasttrain.engine.ranks import data_parallel
from fasttrain.engine.skips import Skips
from fasttrain.methods import Method, Output, Progress, Sample
from fasttrain.networks.batch_norm import RunningStatistics


class TrainStep:
    """Makes the steps of a method. It owns the optimizer and the loss scale, and counts what it skips."""

    def __init__(
        self, method: Method, options: OptimisationOptions, device: torch.device, cuda_graph: bool = False
    ) -> None:
        """method: on the device."""
        self.optimizer = make_optimizer(options, method, method.steady)
        self.skips_3 = torch.tensor(Skips(), device=device)  # never read by the host here
        self._method, self._model = method, data_parallel(method, static_graph=options.accumulate == 1)
        self._scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "fp16")
        self._autocast = device.type, DTYPES[options.precision]
        self._accumulate, self._clip_norm, self._cuda_graph = options.accumulate, options.clip_norm, cuda_graph
        self._statistics = RunningStatistics(method)
        self.features_NF: Tensor | None = None  # of the last step's images, see Output
        self.good = torch.tensor(True, device=device)  # was the last step taken? Never read by the host here, either
        self._carry: tuple[Tensor, ...] = ()  # between forward_backward and update, as is _progress
        self._progress = Progress()

    def forward_backward(self, sample: Sample) -> dict[str, Tensor]:
        """The gradients of this rank's share of the batch, a micro-batch after the other, summed over the ranks.

        Returns the loss and its terms: scalars on the device, means over the micro-batches.
        """
        if self._cuda_graph:
            torch.compiler.cudagraph_mark_step_begin()
        self._statistics.save()
        outputs = [self._micro_batch(part, last) for part, last in _micro_batches(sample, self._accumulate)]
        self._carry, self._progress = outputs[0].carry, sample.progress
        features = [output.features_NF for output in outputs if output.features_NF is not None]
        self.features_NF = torch.cat(features) if features else None
        if len(outputs) > 1:
            self._carry = tuple(map(torch.cat, zip(*(output.carry for output in outputs), strict=True)))
        all_terms = [{"loss": output.loss.detach(), **output.terms} for output in outputs]
        if len(all_terms) == 1:
            return all_terms[0]
        return {name: torch.stack([terms[name] for terms in all_terms]).mean() for name in all_terms[0]}

    def _micro_batch(self, sample: Sample, last: bool) -> Output:
        """Add a micro-batch's gradients to those before it; the last one's backward sums them over the ranks."""
        wait = isinstance(self._model, DistributedDataParallel) and not last
        kind, dtype = self._autocast
        with self._model.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
            with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
                output: Output = self._model(sample)
            self._scaler.scale(output.loss / self._accumulate).backward()
        return output

    def update(self, step: int, rates: Rates) -> None:
        """Move weights, momentum encoder and queue by what forward_backward left; nothing where it is not finite.

        step: its number, from 0, by which it is named if it is skipped.
        """
        self._scaler.unscale_(self.optimizer)
        self._method.after_backward(self._progress)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        good = norm.isfinite()
        if self._clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self._clip_norm, norm)
        set_rates(self.optimizer, rates)
        take_step(self.optimizer, good)
        self._scaler.update()
        self.optimizer.zero_grad()
        self._statistics.keep_if(good)
        self._method.update(good, self._progress, self._carry)
        self._carry, self.good = (), good

        total, in_a_row, last = self.skips_3.unbind()
        bad = (~good).long()
        self.skips_3 = torch.stack([total + bad, (in_a_row + 1) * bad, torch.where(good, last, step)])

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self._scaler.state_dict(), "skips": self.skips_3}

    def load_state_dict(self, state: dict) -> None:
        # What groups are set to follows from the options and the step; a version before may have known less of it.
        own, saved = self.optimizer.state_dict()["param_groups"], state["optimizer"]["param_groups"]
        kept = "params", "step"  # LAMB counts its steps there
        groups = [
            {**group, **{name: before[name] for name in kept if name in before}}
            for group, before in zip(own, saved, strict=True)
        ]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        self._scaler.load_state_dict(state["scaler"])
        self.skips_3 = state["skips"].to(self.skips_3).view(3)


def _micro_batches(sample: Sample, count: int) -> Iterator[tuple[Sample, bool]]:
    """The sample cut into parts of equal size, each with whether it is the last."""
    if count == 1:
        yield sample, True
        return
    # copied, so that a group's views lie one after the other in a part, as they do in the whole
    cut = ([part.contiguous() for part in group.permute(0, 1, 3, 4, 2).chunk(count, dim=1)] for group in sample.views)
    views = ((part.permute(0, 1, 4, 2, 3) for part in parts) for parts in zip(*cut, strict=True))
    labels = [None] * count if sample.label_B is None else sample.label_B.chunk(count)
    parts = zip(views, labels, sample.index_B.chunk(count), strict=True)
    for number, part in enumerate(parts):
        yield Sample(tuple(part[0]), *part[1:], sample.progress), number == count - 1
