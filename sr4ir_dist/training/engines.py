"""Engines: what updates a network. DeepSpeed's is what runs; plain PyTorch's is its reference.

An engine owns one network and its optimizer. The step calls a network that learns through its
engine and a frozen one through `engine.module`: DeepSpeed ties hooks to every output of an engine,
so a frozen network called through its engine fails or corrupts the other engine's backward.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sr4ir_dist.settings import SGD, AdamW

REDUCED_AT_ONCE = 1 << 21
"""Numbers of gradients that ZeRO reduces together, while the backward makes the next ones: small
beside the networks, whose last ones alone are then waited for, and large enough for the link."""
_ADAMW_STATE = ("exp_avg", "exp_avg_sq")
_SGD_STATE = ("momentum_buffer",)


class Engine(Protocol):
    """A network, its optimizer, and how gradients of all ranks become one update.

    Attributes:
        module: the network itself.
        trainable: the parameters that the optimizer holds.
        base_rates: the highest learning rate of each group of parameters.
    """

    module: nn.Module
    trainable: tuple[nn.Parameter, ...]
    base_rates: tuple[float, ...]

    def __call__(self, *inputs: Any) -> Any:
        """Run the network that learns."""
        ...

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate the gradient of this rank's loss; `last` unless more follow before `step`."""
        ...

    def step(self, rates: Sequence[float]) -> None:
        """Average gradients over ranks, update each group at its rate, clear gradients."""
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's full state by `<parameter>/<key>`, on CPU; every rank must call it."""
        ...

    def optimizer_state_like(self) -> dict[str, Tensor]:
        """Tensors of the names, shapes and dtypes that `optimizer_state` has after a step."""
        ...

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state that `optimizer_state` returned, at any number of ranks or stage."""
        ...


def build_optimizer(
    settings: AdamW | SGD, groups: Sequence[tuple[str, Sequence[nn.Parameter]]]
) -> torch.optim.Optimizer:
    """The experiment's torch optimizer over the groups of a network's trainable parameters.

    Args:
        settings: of this network.
        groups: names and parameters; `aux`, segmentation's auxiliary head, has a rate of its own.
    """
    parameters = [
        {
            "params": list(members),
            "lr": settings.lr * settings.aux_factor
            if name == "aux" and isinstance(settings, SGD)
            else settings.lr,
        }
        for name, members in groups
    ]
    if isinstance(settings, AdamW):
        return torch.optim.AdamW(
            parameters,
            settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
    return torch.optim.SGD(
        parameters,
        settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        fused=True,
    )


class PlainEngine:
    """Plain PyTorch, in any precision: the reference that DeepSpeed's engine must equal."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Wrap a network whose trainable parameters the optimizer holds."""
        self.module = module
        self.trainable = tuple(p for p in module.parameters() if p.requires_grad)
        self.base_rates = _rates(optimizer)
        self._optimizer = optimizer

    def __call__(self, *inputs: Any) -> Any:
        """Run the network that learns."""
        return self.module(*inputs)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate the gradient of this rank's loss."""
        loss.backward()

    def step(self, rates: Sequence[float]) -> None:
        """Average gradients over ranks, update each group at its rate, clear gradients."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            for parameter in self.trainable:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        _set_rates(self._optimizer, rates)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's full state by `<parameter>/<key>`, on CPU."""
        return _collect_state(self.module, self._optimizer)

    def optimizer_state_like(self) -> dict[str, Tensor]:
        """Tensors of the names, shapes and dtypes that `optimizer_state` has after a step."""
        return _state_like(self.module, self.trainable, self._optimizer)

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state that `optimizer_state` returned."""
        _restore_state(self.module, self._optimizer, state)


class DeepSpeedEngine:
    """One DeepSpeed engine, with every default that would change the method pinned.

    DeepSpeed clips gradients at 1.0, replaces Adam and picks precisions unless it is told not to;
    the published method does none of that.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        stage: int,
        precision: str,
        micro_batch: int,
        gradients: str = "fp32",
        overlap: bool = True,
    ) -> None:
        """Wrap a network whose weights are final: ZeRO copies them here.

        Args:
            module: the network, on its device, with its trainable parameters requiring gradients.
            optimizer: a torch optimizer over those parameters.
            stage: ZeRO stage, 0, 1 or 2.
            precision: `fp32`, or `bf16` for autocast with float32 weights.
            micro_batch: images of a rank's step; only DeepSpeed's own reports read it.
            gradients: `fp32` or `bf16`, as which they travel between ranks.
            overlap: ZeRO 1 and 2 reduce gradients during the backward, in the order in which it
                makes them; that must be the same on every rank.
        """
        deepspeed = _deepspeed()
        self.trainable = tuple(p for p in module.parameters() if p.requires_grad)
        self.base_rates = _rates(optimizer)
        self._stage = stage
        self._optimizer = optimizer
        config = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {
                "stage": stage,
                "overlap_comm": stage > 0 and overlap,
                "reduce_bucket_size": REDUCED_AT_ONCE,
            },
            "zero_allow_untested_optimizer": True,
            "communication_data_type": gradients,
            "fp16": {"enabled": False},
            "bf16": {"enabled": False},
            "torch_autocast": {
                "enabled": precision == "bf16",
                "dtype": "bfloat16",
                # No parameter is to have its gradients reduced in bfloat16.
                "lower_precision_safe_modules": [],
            },
        }
        if gradients == "bf16":
            # Under autocast ZeRO goes by this, not by its configuration.
            for parameter in self.trainable:
                parameter.comm_dtype = torch.bfloat16  # pyright: ignore[reportAttributeAccessIssue]
        # DeepSpeed prints where its operators come from.
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, zero, _, _ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                model_parameters=list(self.trainable),  # pyright: ignore[reportArgumentType]
                config=config,
                dist_init_required=False,
            )
        self._zero: Any = zero
        self.module = module

    def __call__(self, *inputs: Any) -> Any:
        """Run the network that learns."""
        return self._engine(*inputs)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Accumulate the gradient of this rank's loss; the last one of a step is reduced."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, rates: Sequence[float]) -> None:
        """Average gradients over ranks, update each group at its rate, clear gradients."""
        _set_rates(self._zero, rates)
        self._engine.step()

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's full state by `<parameter>/<key>`, on CPU; every rank must call it."""
        if self._stage == 0:
            return _collect_state(self.module, self._optimizer)
        from deepspeed.utils import safe_get_full_optimizer_state

        state = {}
        for name, parameter in _named(self.module, self.trainable):
            for key in _state_keys(self._optimizer):
                value: Any = safe_get_full_optimizer_state(parameter, key)
                state[f"{name}/{key}"] = value.cpu()
        steps = [entry["step"] for entry in self._base().state.values() if "step" in entry]
        if steps:
            state["step"] = steps[0].detach().cpu().clone()
        return state

    def optimizer_state_like(self) -> dict[str, Tensor]:
        """Tensors of the names, shapes and dtypes that `optimizer_state` has after a step."""
        return _state_like(self.module, self.trainable, self._optimizer)

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state that `optimizer_state` returned, at any number of ranks or stage."""
        if self._stage == 0:
            _restore_state(self.module, self._optimizer, state)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        # ZeRO creates its partitions' states in the first step; a restored engine needs them now.
        for group in self._base().param_groups:
            for partition in group["params"]:
                entry = self._base().state[partition]
                entry |= {k: torch.zeros_like(partition) for k in _state_keys(self._optimizer)}
                if "step" in state:
                    entry["step"] = state["step"].to(partition.device, copy=True)
        self._zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in _named(self.module, self.trainable):
            for key in _state_keys(self._optimizer):
                value = state[f"{name}/{key}"].to(parameter.device)
                safe_set_full_optimizer_state(parameter, value, key)

    def _base(self) -> torch.optim.Optimizer:
        return self._zero.optimizer


def build_cpu_operator() -> None:
    """Build DeepSpeed's CPU operator where there is no GPU, about a minute the first time.

    Otherwise the first step does it, and every worker waits for that.
    """
    _deepspeed()
    if not torch.cuda.is_available():
        from deepspeed.comm.torch import build_shm_op

        build_shm_op()


def cpu_operator() -> Path | None:
    """The file of DeepSpeed's CPU operator if it is built for this environment, else None."""
    _settle_build()
    pattern = "deepspeed_shm_comm/deepspeed_shm_comm.so"
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        from torch.utils import cpp_extension

        # torch's default folder has one for each version of Python in it.
        pattern, root = f"*/{pattern}", cpp_extension.get_default_build_root()
    return next(Path(root).glob(pattern), None)


def _deepspeed() -> Any:
    # Importing DeepSpeed picks an accelerator, which programs that never train do not need.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _settle_build()
    import deepspeed

    return deepspeed


def _settle_build() -> None:
    # ninja builds the operator; it lies beside the interpreter, also in an environment that was
    # not activated, but torch looks for it on PATH. Another version of it that comes first there
    # would build the operator anew, and this one again the next time.
    here = Path(sys.executable).parent
    if (here / "ninja").exists() and shutil.which("ninja") != str(here / "ninja"):
        os.environ["PATH"] = f"{here}{os.pathsep}{os.environ['PATH']}"
    # Two environments that share torch's default folder would build it anew in turn.
    if os.access(sys.prefix, os.W_OK):
        folder = Path(sys.prefix) / "torch_extensions"
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder))


def _rates(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    return tuple(group["lr"] for group in optimizer.param_groups)


def _set_rates(optimizer: Any, rates: Sequence[float]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _state_keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    if isinstance(optimizer, torch.optim.AdamW):
        return _ADAMW_STATE
    return _SGD_STATE if optimizer.defaults["momentum"] else ()


def _named(module: nn.Module, parameters: Sequence[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    # Not by requires_grad, which is off while the network is frozen.
    own = {id(parameter) for parameter in parameters}
    return [(n, p) for n, p in module.named_parameters() if id(p) in own]


def _state_like(
    module: nn.Module, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    keys = _state_keys(optimizer)
    like: dict[str, Tensor] = {f"{n}/{k}": p for n, p in _named(module, parameters) for k in keys}
    if isinstance(optimizer, torch.optim.AdamW):
        like["step"] = torch.zeros(())
    return like


def _collect_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                # All parameters step together, so one count serves them all.
                path = "step" if key == "step" else f"{name}/{key}"
                state[path] = value.detach().cpu().clone()
    return state


def _restore_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]
) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in module.named_parameters():
        if id(parameter) in held:
            entry = {
                key: state[f"{name}/{key}"].to(parameter.device).clone()
                for key in _state_keys(optimizer)
            }
            if "step" in state:
                # A fused optimizer has it where the parameter is.
                entry["step"] = state["step"].to(parameter.device, copy=True)
            optimizer.state[parameter] = entry
