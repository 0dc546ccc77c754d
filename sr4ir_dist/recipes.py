"""The paper as data: what each training scenario updates, with which losses, on which images.

A *term* is one weighted loss on one view. A *view* is an image that a step can render: `hr`,
`lr_up` (bilinear enlargement of the LR image), `sr`, `cqmix`. A *phase* names the networks that it
updates and its terms; every other network is frozen for its duration. A *recipe* is a tuple of
phases, the view it is judged on, and where its networks start.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sr4ir_dist.config import ExperimentError, Role

View = Literal["hr", "lr_up", "sr", "cqmix"]
Loss = Literal["pixel", "tdp", "task"]
Mode = Literal["train", "eval"]

PRETRAINED = "pretrained"
"""Start from the experiment's own weight file, or from a random start where it names none."""


@dataclass(frozen=True)
class Term:
    """One weighted loss of a phase.

    Attributes:
        loss: `pixel` (L1 to HR), `tdp` (paper equation 2, features against HR's), `task`.
        view: the image that the loss judges.
        weight: factor of the published recipe.
        after_warmup: the term is left out of the first `warmup_epochs` epochs.
    """

    loss: Loss
    view: View
    weight: float = 1.0
    after_warmup: bool = False

    @property
    def name(self) -> str:
        """Name of the term in metrics and messages, such as `task_cqmix`."""
        return f"{self.loss}_{self.view}"


@dataclass(frozen=True)
class Phase:
    """A part of a step: the networks that it updates, and by which losses.

    Attributes:
        updates: networks that learn, in train mode.
        terms: losses, in the order in which they are computed.
        frozen_modes: mode of a network that does not learn; eval where it is not named.
    """

    updates: tuple[Role, ...]
    terms: tuple[Term, ...]
    frozen_modes: Mapping[Role, Mode] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """One training scenario.

    Attributes:
        title: the paper's label.
        about: what is trained and why, in a sentence.
        phases: what a step does, in order.
        judged_on: the view that evaluation gives to the task network and to PSNR and SSIM.
        init_from: for each network, `PRETRAINED` or the recipe whose last checkpoint it starts
            from. Its keys are the networks that the recipe uses.
        restart: the learning rates restart when the warm-up ends (spec: cosine periods
            `[warmup, rest]`); otherwise one cosine spans the run.
    """

    title: str
    about: str
    phases: tuple[Phase, ...]
    judged_on: View
    init_from: Mapping[Role, str]
    restart: bool = False

    @property
    def updates(self) -> tuple[Role, ...]:
        """Networks that any phase updates."""
        return tuple(role for role in self.init_from if any(role in p.updates for p in self.phases))


_PIXEL = Term("pixel", "sr")

RECIPES: dict[str, Recipe] = {
    "pretrain": Recipe(
        title="SR pre-training",
        about="SR network alone from a random start, by the pixel loss; others start from it.",
        phases=(Phase(("sr",), (_PIXEL,)),),
        judged_on="sr",
        init_from={"sr": PRETRAINED},
    ),
    "h2t": Recipe(
        title="H->T (oracle)",
        about="Task network on HR images; what could be reached without any loss of resolution.",
        phases=(Phase(("task",), (Term("task", "hr"),)),),
        judged_on="hr",
        init_from={"task": PRETRAINED},
    ),
    "l2t": Recipe(
        title="L->T",
        about="Task network on bilinear enlargements of LR images; no SR network.",
        phases=(Phase(("task",), (Term("task", "lr_up"),)),),
        judged_on="lr_up",
        init_from={"task": PRETRAINED},
    ),
    "s": Recipe(
        title="S",
        about="SR network on the task's images by the pixel loss; S->T starts from it.",
        phases=(Phase(("sr",), (_PIXEL,)),),
        judged_on="sr",
        init_from={"sr": PRETRAINED},
    ),
    "s2t": Recipe(
        title="S->T",
        about="Task network on the images of a fixed SR network, taken from recipe s.",
        phases=(Phase(("task",), (Term("task", "sr"),)),),
        judged_on="sr",
        init_from={"sr": "s", "task": PRETRAINED},
    ),
    "t2s": Recipe(
        title="T->S",
        about="SR network by pixel and task loss through a fixed task network from recipe h2t.",
        phases=(Phase(("sr",), (_PIXEL, Term("task", "sr"))),),
        judged_on="sr",
        init_from={"sr": PRETRAINED, "task": "h2t"},
    ),
    "joint": Recipe(
        title="S+T",
        about="Both networks at once by pixel and task loss on SR images.",
        phases=(Phase(("sr", "task"), (_PIXEL, Term("task", "sr"))),),
        judged_on="sr",
        init_from={"sr": PRETRAINED, "task": PRETRAINED},
    ),
    "sr4ir": Recipe(
        title="SR4IR",
        about="Alternating phases: SR network by pixel and TDP loss with the task network frozen, "
        "then the task network on SR, HR and CQMix images (paper equation 3).",
        phases=(
            Phase(("sr",), (_PIXEL, Term("tdp", "sr", after_warmup=True))),
            Phase(
                ("task",),
                # The published order: batch norm's running statistics see SR, then HR, then CQMix.
                tuple(Term("task", view, 0.34) for view in ("sr", "hr", "cqmix")),
                # The published phase 2 renders with the SR network in train mode, which matters
                # for networks with stochastic depth.
                frozen_modes={"sr": "train"},
            ),
        ),
        judged_on="sr",
        init_from={"sr": PRETRAINED, "task": PRETRAINED},
        restart=True,
    ),
}


def get(name: str) -> Recipe:
    """Look up a recipe.

    Raises:
        ExperimentError: no such recipe; the nearest name is given.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ExperimentError(f"unknown recipe {name!r}{hint}; allowed: {', '.join(RECIPES)}")
    return RECIPES[name]
