"""What a training step costs, counted without a clock: FLOPs, operators, host syncs, memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from sr4ir_dist.benchmark.scaling_work import convolution_backward

_SYNCS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_dim",
    "nms",
)
"""Operators whose result's value or shape the host needs, for which it waits on a GPU."""


@dataclass(frozen=True)
class Cost:
    """Of one step of one process.

    Attributes:
        gflops: 1e9 operations of matrix products and convolutions, multiplication and addition
            being two.
        operators: calls of operators that compute something: kernels, or a little more than that.
        syncs: of them, those for whose result the host waits. An optimizer's reading of its count
            of steps is none: that lies on the host.
        peak_mb: the most that lay in tensors at once, in 1e6 bytes: weights, optimizer states,
            gradients, images and what the backward needs; libraries' own buffers are not seen.
    """

    gflops: float
    operators: int
    syncs: int
    peak_mb: float


class _Watch(TorchDispatchMode):
    """Counts operators, and the bytes of all storages that they have touched and that live."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.syncs = self.bytes = self.peak = 0
        self._living = WeakIdKeyDictionary()
        self._updating = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.operators += not getattr(func, "is_view", False)
        self.syncs += not self._updating and _waits(func, args)
        self.see(args)
        result = func(*args, **(kwargs or {}))
        self.see(result)
        return result

    def __enter__(self) -> Self:
        self._hooks = (
            register_optimizer_step_pre_hook(lambda *_: setattr(self, "_updating", True)),
            register_optimizer_step_post_hook(lambda *_: setattr(self, "_updating", False)),
        )
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def begin(self) -> None:
        """Count from here on; what lives stays known."""
        self.operators = self.syncs = 0
        self.peak = self.bytes

    def see(self, tree: Any) -> None:
        """Note the tensors in lists, dicts and tuples."""
        for tensor in tree_leaves(tree):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage not in self._living:
                size = storage.nbytes()
                self._living[storage] = size
                self.bytes += size
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.bytes -= size


def _waits(func: Any, args: Any) -> bool:
    name = func.overloadpacket.__name__
    # Indexing by truth values asks how many are true.
    by_truth = name in ("index", "index_put_") and any(
        isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1])
    )
    return by_truth or name in _SYNCS


def count(step: Callable[[], Any], modules: Sequence[nn.Module]) -> Cost:
    """Run three steps and count two. The first one, which makes optimizer states, should be over.

    Args:
        step: runs a step.
        modules: the networks that it uses.
    """
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward}
    )
    with counter:
        step()
    # In a step of its own: the counter keeps what is recomputed alive.
    with _Watch() as watch:
        watch.see([dict(module.state_dict()) for module in modules])
        step()  # touches the optimizers' states, which then count from the beginning
        watch.begin()
        step()
    return Cost(counter.get_total_flops() / 1e9, watch.operators, watch.syncs, watch.peak / 1e6)
