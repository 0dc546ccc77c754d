"""The paper as data: what each training scenario updates, with which losses, on which images.

A *term* is one weighted loss on one view. A *view* is an image that a step can render: `hr`,
`lr_up` (bilinear enlargement of the LR image), `sr`, `cqmix`. A *phase* names the networks that it
updates and its terms; every other network is frozen for its duration. A *recipe* is a tuple of
phases, the view it is judged on, and where its networks start.

The scenarios of Tables 1 to 3 come first, then the ablations and studies. What the paper leaves
open is decided in each recipe's `choices`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from sr4ir_dist.config import ExperimentError, Network, Role
from sr4ir_dist.suggestions import did_you_mean

View = Literal["hr", "lr_up", "sr", "cqmix"]
Loss = Literal["pixel", "tdp", "perceptual", "task", "adversarial", "real_fake"]
Mode = Literal["train", "eval"]

PRETRAINED = "pretrained"
"""Start from the experiment's own weights, or from a random start where it names none."""


@dataclass(frozen=True)
class Term:
    """One weighted loss of a phase.

    Attributes:
        loss: `pixel` (L1 to HR), `tdp` (paper equation 2, a task network's features against HR's),
            `perceptual` (the same in VGG's features), `task`, `adversarial` (the task network's
            real/fake score takes the image for HR), `real_fake` (the score tells HR from SR).
        view: the image that the loss judges.
        weight: factor of the published recipe.
        after_warmup: the term is left out of the first `warmup_epochs` epochs.
        network: the network that judges; pixel losses need none.
    """

    loss: Loss
    view: View
    weight: float = 1.0
    after_warmup: bool = False
    network: Network = "task"

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
    frozen_modes: Mapping[Network, Mode] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """One training scenario.

    Attributes:
        title: the paper's label.
        about: what is trained and why, in a sentence.
        phases: what a step does, in order; none where networks are only judged together.
        judged_on: the view that evaluation gives to the task network and to PSNR and SSIM.
        init_from: for each network, `PRETRAINED` or the recipe whose last checkpoint it starts
            from. Its keys are the networks that the recipe uses.
        warmup: the part of the epochs in which terms with `after_warmup` are left out.
        restart: the learning rates restart when the warm-up ends (cosine periods `[warmup, rest]`);
            otherwise one cosine spans the run.
        choices: what the paper does not say, and what is done here.
    """

    title: str
    about: str
    phases: tuple[Phase, ...]
    judged_on: View
    init_from: Mapping[Network, str]
    warmup: float = 0.0
    restart: bool = False
    choices: str = ""

    @property
    def updates(self) -> tuple[Role, ...]:
        """Networks that any phase updates."""
        roles: tuple[Role, ...] = ("sr", "task")
        return tuple(role for role in roles if any(role in p.updates for p in self.phases))

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms of all phases."""
        return tuple(term for phase in self.phases for term in phase.terms)

    @property
    def scored(self) -> bool:
        """Whether the task network has a real/fake score as one more output."""
        return any(term.loss in ("adversarial", "real_fake") for term in self.terms)


_PIXEL = Term("pixel", "sr")
_TDP = Term("tdp", "sr", after_warmup=True)
_TASK_SR = Term("task", "sr")
_FROM_PRETRAINED: Mapping[Network, str] = {"sr": PRETRAINED, "task": PRETRAINED}
_MIXED: tuple[View, ...] = ("sr", "hr", "cqmix")


def _task_terms(*views: View, weight: float = 0.34) -> tuple[Term, ...]:
    # The published order: batch norm's running statistics see SR, then HR, then CQMix.
    return tuple(Term("task", view, weight) for view in views)


def _alternating(
    title: str,
    about: str,
    *judges: Term,
    task_terms: tuple[Term, ...] = _task_terms(*_MIXED),
    more: Mapping[Network, str] | None = None,
    choices: str = "",
) -> Recipe:
    """SR4IR with other losses: the SR network learns by pixel loss and `judges`, then the task."""
    return Recipe(
        title=title,
        about=about,
        phases=(
            Phase(("sr",), (_PIXEL, *judges)),
            # The published phase 2 renders with the SR network in train mode, which matters for
            # networks with stochastic depth.
            Phase(("task",), task_terms, frozen_modes={"sr": "train"}),
        ),
        judged_on="sr",
        init_from={**_FROM_PRETRAINED, **(more or {})},
        warmup=0.1,
        restart=True,
        choices=choices,
    )


def _sr_alone(title: str, about: str, *judges: Term, choices: str = "") -> Recipe:
    networks: tuple[Network, ...] = ("sr", *(term.network for term in judges))
    return Recipe(
        title=title,
        about=about,
        phases=(Phase(("sr",), (_PIXEL, *judges)),),
        judged_on="sr",
        init_from=dict.fromkeys(networks, PRETRAINED),
        choices=choices,
    )


def _task_alone(title: str, about: str, view: View, sr: str | None = None) -> Recipe:
    init: dict[Network, str] = {} if sr is None else {"sr": sr}
    return Recipe(
        title=title,
        about=about,
        phases=(Phase(("task",), (Term("task", view),)),),
        judged_on=view,
        init_from={**init, "task": PRETRAINED},
    )


def _judged_by_h2t(title: str, about: str, sr: str) -> Recipe:
    return Recipe(
        title=title, about=about, phases=(), judged_on="sr", init_from={"sr": sr, "task": "h2t"}
    )


_SHARES = "The weights of the kept terms are not stated: each is 1 / their number."

RECIPES: dict[str, Recipe] = {
    "pretrain": _sr_alone(
        "SR pre-training",
        "SR network alone from a random start, by the pixel loss; others start from it.",
        choices="Patches of 48 LR pixels and L1, as EDSR and SwinIR publish; on DIV2K's 800 images "
        "`folder_sr` is their 300,000 and 500,000 steps with their halvings of the rate; AdamW "
        "without decay is their Adam. x8 starts at random like the others.",
    ),
    "h2t": _task_alone(
        "H->T (oracle)",
        "Task network on HR images; what could be reached without any loss of resolution.",
        "hr",
    ),
    "l2t": _task_alone(
        "L->T", "Task network on bilinear enlargements of LR images; no SR network.", "lr_up"
    ),
    "s": _sr_alone("S", "SR network on the task's images by the pixel loss; S->T starts from it."),
    "s2t": _task_alone(
        "S->T", "Task network on the images of a fixed SR network, taken from recipe s.", "sr", "s"
    ),
    "t2s": Recipe(
        title="T->S",
        about="SR network by pixel and task loss through a fixed task network from recipe h2t.",
        phases=(Phase(("sr",), (_PIXEL, _TASK_SR)),),
        judged_on="sr",
        init_from={"sr": PRETRAINED, "task": "h2t"},
    ),
    "joint": Recipe(
        title="S+T",
        about="Both networks at once by pixel and task loss on SR images.",
        phases=(Phase(("sr", "task"), (_PIXEL, _TASK_SR)),),
        judged_on="sr",
        init_from=_FROM_PRETRAINED,
    ),
    "sr4ir": _alternating(
        "SR4IR",
        "Alternating phases: SR network by pixel and TDP loss with the task network frozen, then "
        "the task network on SR, HR and CQMix images (paper equation 3).",
        _TDP,
    ),
    "sr4ir-no-tdp": _alternating(
        "SR4IR without TDP (Table 4)", "SR4IR whose SR network learns by the pixel loss alone."
    ),
    "sr4ir-only-sr": _alternating(
        "SR4IR, T on SR (Table 5)",
        "SR4IR whose task network learns from SR images alone.",
        _TDP,
        task_terms=_task_terms("sr", weight=1.0),
        choices=_SHARES,
    ),
    "sr4ir-only-hr": _alternating(
        "SR4IR, T on HR (Table 5)",
        "SR4IR whose task network learns from HR images alone.",
        _TDP,
        task_terms=_task_terms("hr", weight=1.0),
        choices=_SHARES,
    ),
    "sr4ir-no-cqmix": _alternating(
        "SR4IR, T on SR and HR (Table 5)",
        "SR4IR whose task network learns from SR and HR images, without CQMix.",
        _TDP,
        task_terms=_task_terms("sr", "hr", weight=0.5),
        choices=_SHARES,
    ),
    "sr4ir-vgg": _alternating(
        "Perceptual loss in VGG (Table 6 A)",
        "SR4IR with features of a fixed ImageNet VGG19 in place of the task network's.",
        Term("perceptual", "sr", after_warmup=True, network="vgg"),
        more={"vgg": PRETRAINED},
        choices="Depth, layer and weight are not stated: VGG19's conv5_4 before its ReLU "
        "(`fixed.vgg_layer`), L1 mean, weight 1, from the end of the warm-up on like TDP.",
    ),
    "sr4ir-fixed-tdp": _alternating(
        "TDP in a fixed task network (Table 6 B)",
        "SR4IR whose TDP loss compares features of a second, fixed task network from recipe h2t.",
        Term("tdp", "sr", after_warmup=True, network="oracle"),
        more={"oracle": "h2t"},
    ),
    "joint-tdp": Recipe(
        title="TDP in joint training (Table 6 C)",
        about="Both networks at once by pixel, TDP and task losses; expected to collapse.",
        phases=(Phase(("sr", "task"), (_PIXEL, _TDP, *_task_terms(*_MIXED))),),
        judged_on="sr",
        init_from=_FROM_PRETRAINED,
        warmup=0.1,
        restart=True,
        choices="The task terms are not stated: SR4IR's three at 0.34. TDP is the gradient of one "
        "objective over both networks, so that HR's features carry gradient too; the task network "
        "is in train mode; warm-up and restart are SR4IR's.",
    ),
    "tdsr": Recipe(
        title="TDSR (Table 7)",
        about="SR network by the pixel loss, after a third of the training with 0.01 times the "
        "task loss through a fixed task network from recipe h2t.",
        phases=(Phase(("sr",), (_PIXEL, Term("task", "sr", 0.01, after_warmup=True))),),
        judged_on="sr",
        init_from={"sr": PRETRAINED, "task": "h2t"},
        warmup=1 / 3,
        choices="That the task network is fixed is taken from TDSR itself; one cosine spans the "
        "run; the task loss is each task's own where the paper speaks of cross-entropy.",
    ),
    "sod-mtgan": Recipe(
        title="SOD-MTGAN (Table 7)",
        about="The task network also tells HR from SR, and the SR network learns by pixel, task "
        "and adversarial loss through it.",
        phases=(
            Phase(("sr",), (_PIXEL, _TASK_SR, Term("adversarial", "sr", 0.001))),
            Phase(
                ("task",),
                (
                    *_task_terms("sr", "hr", weight=0.5),
                    Term("real_fake", "sr", 0.5),
                    Term("real_fake", "hr", 0.5),
                ),
                frozen_modes={"sr": "train"},
            ),
        ),
        judged_on="sr",
        init_from=_FROM_PRETRAINED,
        choices="The GAN's kind, where the score attaches and the schedule are not stated: binary "
        "cross-entropy, one linear layer on the globally pooled last TDP feature map, alternating "
        "phases without warm-up, the task network on SR and HR at half weight each.",
    ),
    "s-vgg": _sr_alone(
        "S by pixel and perceptual loss (Table S1)",
        "SR network by the pixel loss and a perceptual loss in a fixed ImageNet VGG19.",
        Term("perceptual", "sr", network="vgg"),
        choices="Layer and weight are not stated: VGG19's conv5_4, weight 1, from the start.",
    ),
    "s-vgg2t": _task_alone(
        "S->T, S by perceptual loss (Table S1)",
        "A fresh task network on the images of the fixed SR network of recipe s-vgg.",
        "sr",
        "s-vgg",
    ),
    "sr4ir2t": _task_alone(
        "S->T, S by SR4IR (Table S1)",
        "A fresh task network on the images of the fixed SR network of recipe sr4ir.",
        "sr",
        "sr4ir",
    ),
    "h2t-on-s": _judged_by_h2t(
        "S judged by H->T (Table S2)", "Recipe s's images judged by the network of h2t.", "s"
    ),
    "h2t-on-s-vgg": _judged_by_h2t(
        "S by perceptual loss, judged by H->T (Table S2)",
        "Recipe s-vgg's images judged by the network of h2t.",
        "s-vgg",
    ),
    "h2t-on-sr4ir": _judged_by_h2t(
        "SR4IR's S judged by H->T (Table S2)",
        "Recipe sr4ir's images judged by the network of h2t.",
        "sr4ir",
    ),
}


def get(name: str) -> Recipe:
    """Look up a recipe.

    Raises:
        ExperimentError: no such recipe; the nearest name is given.
    """
    if name not in RECIPES:
        hint = did_you_mean(name, RECIPES)
        raise ExperimentError(f"unknown recipe {name!r}{hint}; allowed: {', '.join(RECIPES)}")
    return RECIPES[name]
