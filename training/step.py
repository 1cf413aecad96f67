"""One optimizer step: the gradients of a batch, and their application if all of its numbers are finite.

    batches = latent_batches(data, DataOrder(len(data), 256, seed=0))
    optimizer = make_optimizer(network)
    step = TrainingStep(network, DeepFlowLoss(), optimizer, batches, batch_size=256, scaling_factor=data.scaling_factor)
    for i in range(100):
        numbers, _ = step.launch(i, step.gradients(i)).read()

All that is random in a step is a function of (seed, step), drawn for the whole batch, of which each process and
micro-batch takes its rows: loss and gradients do not depend on how the batch is divided, and a step can be repeated.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.flags import PRECISIONS
from common.processes import reported_by_any_process
from dataset import LatentBatch
from loss import DeepFlowLoss
from models.autoencoder import sample_latents
from training import parallel
from training.guard import NamedTerms, Verdict
from training.optimizer import skips_on_device


class Network(Protocol):
    """What a step needs of the module that it trains; a `DeepFlow` has it."""

    num_branches: int

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor, /) -> Any:
        """Velocities, accelerations and projections, see `models.deepflow.DeepFlowOutput`."""

    def null_condition(self, count: int) -> Tensor:
        """The condition of no class or text, (count, ...)."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the module."""


class Gradients(NamedTuple):
    """A step whose gradients are in the parameters, not applied yet."""

    sums: dict[str, Tensor]  # scalars by name: loss and its terms, summed over this process's samples
    terms: list[NamedTerms]  # of each micro-batch
    loss_scale: float


class Update(NamedTuple):
    """A step that the device may still be computing, or may not have applied."""

    names: list[str]
    verdict: Verdict
    terms: list[NamedTerms]

    def read(self) -> tuple[dict[str, float], bool]:
        """The step's numbers by name, means over the batch, the same on all processes; and whether to stop after it.

        A step with a number that is not finite was not applied.
        """
        *numbers, stop = self.verdict.read()
        return dict(zip(self.names, numbers, strict=True)), stop > 0


class TrainingStep:
    """The steps of one network on all processes.

    Args:
        network: what is trained, for example a `DeepFlow`, on its device.
        loss_fn: the objective.
        optimizer: over the network's parameters. If its kernel cannot skip a step, the host waits for the device.
        batches: this process's micro-batches in order, `accumulation` for each step.
        batch_size: images of a step, over all processes and micro-batches.
        scaling_factor: of the latents.
        accumulation: micro-batches per step and process.
        seed: of times, noise and dropped conditions.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them as they are.
        precision: `no` (float32), `fp16` or `bf16`, of the network's computation.
        encoders: SSL encoders of images, used where the batches hold no features.
        model: what computes the network's gradients on all processes; the network itself where there is one.
        rank: this process's number among `world`.
        learning_rate: step -> factor of each parameter group's own rate; None leaves the rates alone.
    """

    def __init__(
        self,
        network: Network,
        loss_fn: DeepFlowLoss,
        optimizer: torch.optim.Optimizer,
        batches: Iterator[LatentBatch],
        *,
        batch_size: int,
        scaling_factor: float,
        accumulation: int = 1,
        seed: int = 0,
        max_grad_norm: float = 1.0,
        precision: str = "no",
        encoders: Sequence[Callable[[Tensor], Tensor]] = (),
        model: Callable[..., Any] | None = None,
        rank: int = 0,
        world: int = 1,
        learning_rate: Callable[[int], float] | None = None,
    ) -> None:
        self.network, self.model, self.loss_fn, self.optimizer = network, model or network, loss_fn, optimizer
        self.batches, self.encoders, self.learning_rate = batches, encoders, learning_rate
        self.batch_size, self.accumulation = batch_size, accumulation
        self.scaling_factor, self.seed = scaling_factor, seed
        self.max_grad_norm, self.dtype = max_grad_norm or math.inf, PRECISIONS[precision]
        self.rank, self.world = rank, world
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.device = parallel.local(self.parameters[0]).device
        self.generator = torch.Generator(self.device)
        self.pending: dict[int, list[LatentBatch]] = {}  # micro-batches of steps that may be tried again
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def gradients(self, step: int, loss_scale: float = 1.0) -> Gradients:
        """Add up the gradients of the mean loss over this process's part of the batch, averaged over the processes.

        They are multiplied by `loss_scale`. The batches of this step and of the one before are kept, for another try.

        Raises:
            UserError: for samples that cannot be read.
        """
        self.pending = {earlier: batches for earlier, batches in self.pending.items() if earlier >= step - 1}
        if step not in self.pending:
            with reported_by_any_process(self.rank):
                self.pending[step] = [next(self.batches) for _ in range(self.accumulation)]
        shape = (self.batch_size, *self.latent_shape(self.pending[step][0]))
        self.generator.manual_seed(noise_seed(self.seed, step))
        latent_noise = torch.randn(shape, generator=self.generator, device=self.device)
        draws = self.loss_fn.draw(self.network.num_branches, shape, self.generator)
        per_process, micro_batch = self.batch_size // self.world, self.batch_size // self.world // self.accumulation
        sums: dict[str, Tensor] = {}
        named_terms = []
        for i, batch in enumerate(self.pending[step]):
            first = self.rank * per_process + i * micro_batch
            rows = slice(first, first + micro_batch)
            x0 = sample_latents(self.moved(batch.moments), self.scaling_factor, latent_noise[rows])
            condition, null = self.moved(batch.condition), self.network.null_condition(micro_batch)
            with parallel.averaging(self.model, wanted=i == self.accumulation - 1):
                terms = self.loss_fn.terms(self.forward, x0, condition, null, draws.rows(rows), self.features(batch))
                total = self.loss_fn.total(terms)
                (total.sum() * (loss_scale / per_process)).backward()
            named = {name: term.detach() for name, term in terms.named().items()}
            for name, term in {"loss": total.detach(), **named}.items():
                sums[name] = sums.get(name, 0) + term.sum()
            named_terms.append((batch.indices, named))
        return Gradients(sums, named_terms, loss_scale)

    def launch(self, step: int, gradients: Gradients, stop_requested: bool = False) -> Update:
        """Clip, and have the device apply the step if all of its numbers are finite, on all processes.

        The host does not wait: `Update.read` returns the outcome, and whether any process has `stop_requested`.
        """
        # Gradients are clipped as they are, multiplied by the loss scale; the optimizer's kernel divides by it.
        limit = self.max_grad_norm * gradients.loss_scale
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        grad_norm = (grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm) / gradients.loss_scale
        means = torch.stack(list(gradients.sums.values())) / (self.batch_size // self.world)
        stop = torch.full((1,), float(stop_requested), device=self.device)
        row = mean_over_processes(torch.cat([grad_norm.reshape(1), means, stop]))
        if self.learning_rate is not None:
            factor = self.learning_rate(step)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        self.apply(row.isfinite().all(), gradients.loss_scale)
        self.optimizer.zero_grad()
        return Update(["grad_norm", *gradients.sums], Verdict(row), gradients.terms)

    def apply(self, finite: Tensor, loss_scale: float) -> None:
        """The optimizer's part of a step, skipped where `finite`, a scalar on the device, is false."""
        if skips_on_device(self.optimizer):
            fused: Any = self.optimizer  # torch declares neither of these attributes
            fused.found_inf = 1 - finite.float()
            fused.grad_scale = torch.full((), loss_scale, device=self.device)
            fused.step()
        elif finite.item():  # waits for the device, which cannot decide by itself
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], loss_scale)
            self.optimizer.step()

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Any:
        """The model's output in the precision of the run."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.model(x, t, condition)

    def features(self, batch: LatentBatch) -> list[Tensor] | None:
        """Tokens (B, T, z) of every SSL encoder, for the alignment; None without alignment."""
        packed = [self.moved(tokens) for tokens in batch.features or []]
        images = cast(Tensor, batch.images)  # a batch has them where there are encoders
        return packed or [encoder(images) for encoder in self.encoders] or None

    def latent_shape(self, batch: LatentBatch) -> tuple[int, ...]:
        """(C, h, w) of a latent, half the channels of its moments."""
        channels, height, width = batch.moments.shape[1:]
        return channels // 2, height, width

    def moved(self, tensor: Tensor) -> Tensor:
        """On the device, without a wait where the memory is pinned."""
        return tensor.to(self.device, non_blocking=True)


def mean_over_processes(row: Tensor) -> Tensor:
    """The mean of a tensor over all processes, on each of them."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(row)
        row /= dist.get_world_size()
    return row


def noise_seed(seed: int, step: int) -> int:
    """The seed of all that is random in one step: latents, times, noise, dropped conditions."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0] >> np.uint64(1))
