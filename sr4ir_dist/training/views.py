"""What a step works on: the networks, a rank's images, and the views rendered from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sr4ir_dist.batch import Batch
from sr4ir_dist.config import Experiment, Network, Role
from sr4ir_dist.cqmix import cqmix, draw_cells
from sr4ir_dist.degradation import crop_back, degrade, enlarge_bilinear, pad_to
from sr4ir_dist.recipes import Phase, Recipe, View
from sr4ir_dist.tasks import Task
from sr4ir_dist.tasks.scored import forward_scored
from sr4ir_dist.training.batch_norm import apart
from sr4ir_dist.training.engines import Engine


@dataclass(frozen=True)
class Setup:
    """What stays the same from step to step on one rank.

    Attributes:
        experiment: all settings.
        recipe: the experiment's phases and terms.
        modules: the networks that the recipe uses, on this rank's device.
        engines: an engine for each network that the recipe updates.
        task: the task's adapter, or None where the recipe has no task network.
        rank: this process among those that train.
        world_size: number of ranks.
        lpips: the network of the LPIPS metric, where it is reported.
    """

    experiment: Experiment
    recipe: Recipe
    modules: Mapping[Network, nn.Module]
    engines: Mapping[Role, Engine]
    task: Task | None
    rank: int = 0
    world_size: int = 1
    lpips: nn.Module | None = None

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        parameters = (p for module in self.modules.values() for p in module.parameters())
        return next(parameters).device

    def autocast(self) -> torch.autocast:
        """The precision of every forward, of engines and of frozen networks alike."""
        enabled = self.experiment.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)


@dataclass(frozen=True)
class Inputs:
    """A rank's images of one step, on its device.

    Attributes:
        hr: N,3,H,W in [0,1]: a canvas whose sides are multiples of the scale.
        lr: N,3,H/scale,W/scale in [0,1], on the 8-bit grid; None where no view needs it.
        sizes: each image's own height and width, at the canvas's top left.
        targets: what the task's loss compares with.
        cells: N,1,grid,grid CQMix cells, 1 for SR; None where no term needs them.
        share: this rank's images over an even share of the global batch.
        task_share: the same for the task loss, in what that averages over.
        most: images of the rank that has the most of them in this step.
    """

    hr: Tensor
    lr: Tensor | None
    sizes: Sequence[tuple[int, int]]
    targets: Any
    cells: Tensor | None = None
    share: float = 1.0
    task_share: float | Tensor = 1.0
    most: int = 0


def make_inputs(setup: Setup, batch: Batch, epoch: int | None = None) -> Inputs:
    """Degrade a batch and draw its CQMix cells (paper section 3.3), keyed by sample and epoch.

    Args:
        setup: the recipe, and the ranks that train together.
        batch: this rank's images.
        epoch: the epoch of a training step, in which every rank takes part; None to judge.
    """
    experiment, recipe = setup.experiment, setup.recipe
    batch = batch.to(setup.device)
    hr = _canvas(setup, batch, training=epoch is not None)
    lr = None
    if recipe.judged_on != "hr" or any(term.view != "hr" for term in recipe.terms):
        settings = experiment.degradation
        lr = degrade(hr, experiment.scale, kind=settings.kind, blur=settings.blur)
    sizes = [(height, width) for height, width in batch.sizes.tolist()]
    if epoch is None:
        return Inputs(hr, lr, sizes, batch.targets)
    cells = None
    if any(term.view == "cqmix" for term in recipe.terms):
        cells = draw_cells(experiment.seed, epoch, batch.keys, experiment.cqmix.grid)
    share = len(hr) * setup.world_size / batch.global_size
    task_share = _task_share(setup, batch, share)
    most = -(-batch.global_size // setup.world_size)
    return Inputs(hr, lr, sizes, batch.targets, cells, share, task_share, most)


def in_passes(setup: Setup, inputs: Inputs) -> list[Inputs]:
    """A rank's images in as many parts, on every rank, as `micro_batch` asks for.

    The parts' losses, each times its shares, add up to those of the whole.
    """
    slices = cut(len(inputs.hr), inputs.most, setup.experiment.micro_batch)
    if len(slices) == 1:
        return [inputs]

    def count(targets: Any, images: int) -> int | Tensor:
        found = None if setup.task is None else setup.task.loss_count(targets)
        return images if found is None else found

    parts = []
    images = max(1, len(inputs.hr))
    whole = count(inputs.targets, images)
    for at in slices:
        size = at.stop - at.start
        targets = None if inputs.targets is None else inputs.targets[at]
        weight = count(targets, size) / (whole if isinstance(whole, int) else whole.clamp(min=1))
        parts.append(
            replace(
                inputs,
                hr=inputs.hr[at],
                lr=None if inputs.lr is None else inputs.lr[at],
                sizes=inputs.sizes[at],
                targets=targets,
                cells=None if inputs.cells is None else inputs.cells[at],
                share=inputs.share * size / images,
                task_share=inputs.task_share * weight,
            )
        )
    return parts


def cut(images: int, most: int, micro_batch: int | None) -> list[slice]:
    """Where a rank's images are cut into passes: as evenly as it goes.

    Args:
        images: of this rank; it may have fewer than passes.
        most: images of the rank with the most of them, which decides how many passes there are.
        micro_batch: the most images of a pass; None for one pass of any size.
    """
    passes = 1 if micro_batch is None else max(1, -(-most // micro_batch))
    ends = [images * done // passes for done in range(passes + 1)]
    return [slice(*pair) for pair in pairwise(ends)]


def _canvas(setup: Setup, batch: Batch, *, training: bool) -> Tensor:
    """The images on one canvas that the scale divides, the same size on every rank."""
    scale, hr = setup.experiment.scale, batch.hr
    reflect = setup.task is not None and setup.task.padding == "reflect"
    height, width = hr.shape[-2:]
    if reflect and training and setup.world_size > 1:
        # The pixel loss is a mean over the canvas, and CQMix's cells are parts of it.
        largest = torch.tensor([height, width], device=hr.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        height, width = largest.tolist()
    height, width = (-(-side // scale) * scale for side in (height, width))
    if reflect and len(hr):
        images = crop_back(hr, batch.sizes)
        hr = torch.cat([pad_to(image[None], height, width, "reflect") for image in images])
    else:
        hr = pad_to(hr, height, width)
    return hr.contiguous(memory_format=torch.channels_last)


def _task_share(setup: Setup, batch: Batch, share: float) -> float | Tensor:
    if setup.task is None or setup.world_size == 1:
        return share
    count = setup.task.loss_count(batch.targets)
    if count is None:
        return share
    total = count.clone()
    dist.all_reduce(total)
    return count * setup.world_size / total.clamp(min=1)


@dataclass(frozen=True)
class _Run:
    """One forward of the task network."""

    outputs: Any
    scores: Tensor | None
    features: dict[str, Tensor] = field(default_factory=dict)


def _split(outputs: Any, parts: int) -> Sequence[Any]:
    """The outputs of a joined batch, one by one: a tensor, tensors by name, or None."""
    if outputs is None:
        return [None] * parts
    if isinstance(outputs, Tensor):
        return outputs.tensor_split(parts)
    split = {name: value.tensor_split(parts) for name, value in outputs.items()}
    return [{name: values[n] for name, values in split.items()} for n in range(parts)]


class Views:
    """The images of one phase, each rendered when it is first asked for.

    The networks are as they are at that moment, so phase 2 of SR4IR sees the SR network that phase
    1 has just updated.
    """

    def __init__(self, setup: Setup, phase: Phase, inputs: Inputs) -> None:
        """Render nothing yet."""
        self._setup = setup
        self._phase = phase
        self._inputs = inputs
        self._images: dict[View, Tensor] = {"hr": inputs.hr}
        self._runs: dict[View, _Run] = {}
        self._joined: Sequence[View] = ()
        if setup.experiment.joined_views and phase.updates == ("task",):
            self._joined = tuple(dict.fromkeys(term.view for term in phase.terms))
        self.relay: Tensor | None = None

    def image(self, view: View) -> Tensor:
        """A canvas of the phase, N,3,H,W; SR images are neither clamped nor quantised."""
        if view not in self._images:
            self._images[view] = self._render(view)
        return self._images[view]

    def task_outputs(self, view: View) -> Any:
        """The task network's outputs on a view; a detector's losses where the phase has terms."""
        return self._run(view).outputs

    def scores(self, view: View) -> Tensor:
        """The task network's real/fake scores of a view: N logits."""
        scores = self._run(view).scores
        assert scores is not None
        return scores

    def compared(self, view: View, network: Network) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Features of a view and of HR, by layer.

        Those of a network that learns are of its own forwards. Otherwise HR's carry no gradient.
        """
        if network in self._phase.updates:
            return self._run(view).features, self._run("hr").features
        return self._features(view, network), self._features("hr", network)

    def forget_runs(self) -> None:
        """Let go of the task network's outputs; a later question would run it again."""
        self._runs.clear()

    def _features(self, view: View, network: Network) -> dict[str, Tensor]:
        setup = self._setup
        module = setup.modules[network]
        with setup.autocast(), torch.set_grad_enabled(view != "hr"):
            if network == "vgg":
                features = module(self._judged(view))
            else:
                assert setup.task is not None
                features = setup.task.features(module, self._task_images(view))
        return {name: value.to(self._inputs.hr.dtype) for name, value in features.items()}

    def _judged(self, view: View) -> Tensor:
        """The canvas as another network gets it.

        Where both networks learn, the graph is cut at the SR image: no gradient may flow from one
        engine's outputs into another engine. `relay` then collects the gradient at the cut.
        """
        if view != "sr" or set(self._phase.updates) != {"sr", "task"}:
            return self.image(view)
        if self.relay is None:
            self.relay = self.image("sr").detach().requires_grad_()
        return self.relay

    def _task_images(self, view: View) -> Tensor | list[Tensor]:
        """A view's images at their own sizes: a list for detection, else a batch of one size."""
        canvas, sizes = self._judged(view), self._inputs.sizes
        assert self._setup.task is not None
        if self._setup.task.target == "boxes":
            return crop_back(canvas, sizes)
        height, width = sizes[0] if sizes else canvas.shape[-2:]
        return canvas[..., :height, :width]

    def _run(self, view: View) -> _Run:
        if view not in self._runs:
            self._runs |= self._forward(self._joined if view in self._joined else (view,))
        return self._runs[view]

    def _forward(self, views: Sequence[View]) -> dict[View, _Run]:
        setup, phase = self._setup, self._phase
        assert setup.task is not None
        learns = "task" in phase.updates
        network = setup.engines["task"] if learns else setup.modules["task"]
        targets = self._inputs.targets if phase.terms else None
        images: Any = [self._task_images(view) for view in views]
        call = (network, images[0] if len(views) == 1 else torch.cat(images), targets)
        kinds = apart(setup.modules["task"], len(views))
        with setup.autocast(), self._tapped() as features, kinds:
            if setup.recipe.scored:
                outputs, scores = forward_scored(setup.task, *call)
            else:
                outputs, scores = setup.task.forward(*call), None
        if len(views) == 1:
            return {views[0]: _Run(outputs, scores, features)}
        parts = zip(views, _split(outputs, len(views)), _split(scores, len(views)), strict=True)
        return {view: _Run(*own) for view, *own in parts}

    @contextmanager
    def _tapped(self) -> Iterator[dict[str, Tensor]]:
        """Keep the features of a forward, where a term compares those of a network that learns."""
        phase, features = self._phase, {}
        if not any(t.loss == "tdp" and t.network in phase.updates for t in phase.terms):
            yield features
            return
        task = self._setup.task
        assert task is not None

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            dtype = self._inputs.hr.dtype
            features.update({name: x.to(dtype) for name, x in task.select(output).items()})

        handle = task.backbone(self._setup.modules["task"]).register_forward_hook(keep)
        try:
            yield features
        finally:
            handle.remove()

    def _render(self, view: View) -> Tensor:
        inputs, setup = self._inputs, self._setup
        if view == "cqmix":
            assert inputs.cells is not None
            return cqmix(self._judged("sr"), inputs.hr, inputs.cells)
        assert inputs.lr is not None
        if view == "lr_up":
            return enlarge_bilinear(inputs.lr, setup.experiment.scale)
        with setup.autocast():
            if "sr" in self._phase.updates:
                sr = setup.engines["sr"](inputs.lr)
            else:
                with torch.no_grad():
                    sr = setup.modules["sr"](inputs.lr)
        return sr.to(inputs.hr.dtype)
