"""What a published version says of itself, for programs (`card.json`) and people (`readme.md`)."""

from __future__ import annotations

import getpass
import math
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from sr4ir_dist import recipes
from sr4ir_dist.checkpoint import Checkpoint
from sr4ir_dist.config import from_json
from sr4ir_dist.data.splits import dataset_uris
from sr4ir_dist.hub.names import HubError

CARD, README = "card.json", "readme.md"
_MOST_BYTES = 1 << 20  # of a card, which has a few hundred


def _line(text: str) -> str:
    # What others wrote goes to people's terminals, which obey control characters.
    if not text.isprintable():
        raise ValueError("expected one line of printable characters")
    return text


Line = Annotated[str, Field(max_length=2000), AfterValidator(_line)]


class Card(BaseModel):
    """A published version in short; `experiment.json` beside it has every setting."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    published: Line
    """When, in UTC, as ISO 8601."""
    by: Line
    note: Line
    source: Line
    """URI of the checkpoint that was copied."""
    data: tuple[Line, ...]
    """URI of each dataset that the run was trained on."""
    experiment: Line
    recipe: Line
    task: Line | None
    sr: Line | None
    """The SR network."""
    scale: int | None
    """None where no image is degraded."""
    step: int
    metrics: dict[Line, float]
    """The evaluation at this very step; empty where there was none."""
    bytes: int
    """Of all files that were copied."""

    @property
    def dataset(self) -> str:
        """The first part of the experiment's name: `voc_seg`."""
        return self.experiment.partition("/")[0]


def make_card(saved: Checkpoint, note: str) -> Card:
    """The card of a checkpoint that is about to be published.

    Raises:
        HubError: the note is not one line, or the checkpoint says not where it comes from.
        CheckpointError: the checkpoint is damaged.
    """
    try:
        return Card.model_validate(_tree(saved, note))
    except ValidationError as error:
        raise HubError(_explained(f"the card of {saved.uri}", error)) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise HubError(f"checkpoint {saved.uri} is malformed: {error!r:.200}") from error


def _tree(saved: Checkpoint, note: str) -> dict[str, Any]:
    experiment = from_json(saved.read("experiment.json", _MOST_BYTES))
    progress, run = saved.json("progress.json"), saved.json("run.json")
    degraded = recipes.get(experiment.recipe).judged_on != "hr"
    return {
        "published": now(),
        "by": user(),
        "note": note,
        "source": saved.uri,
        "data": dataset_uris(run["data"]),
        "experiment": experiment.name,
        "recipe": experiment.recipe,
        "task": experiment.task and experiment.task.name,
        "sr": experiment.sr and experiment.sr.network,
        "scale": experiment.scale if degraded else None,
        "step": progress["step"],
        "metrics": _metrics(progress),
        "bytes": sum(size for size, _ in saved.files.values()),
    }


def load_card(saved: Checkpoint) -> Card:
    """The card of a published version.

    Raises:
        HubError: it is malformed.
        CheckpointError: it is not what was published, or longer than 1 MiB.
    """
    try:
        return Card.model_validate_json(saved.read(CARD, _MOST_BYTES))
    except ValidationError as error:
        raise HubError(_explained(f"{CARD} of {saved.uri}", error)) from error


def readme(card: Card, name: str) -> str:
    """A model card in Markdown, of what is published under a name (`hub://NAME@VERSION`)."""
    recipe = recipes.get(card.recipe)
    rows = {
        "experiment": card.experiment,
        "recipe": f"{recipe.title}: {recipe.about}",
        "task": card.task or "none",
        "SR network": f"{card.sr or 'none'}{f' x{card.scale}' if card.scale else ''}",
        "trained on": ", ".join(card.data),
        "steps": str(card.step),
        **{metric: f"{value:.4g}" for metric, value in card.metrics.items()},
        "published": f"{card.published} by {card.by}",
        "from": card.source,
    }
    lines = [f"# {name}", "", card.note, "", "| | |", "|---|---|"]
    lines += [f"| {what} | {value.replace('|', '&#124;')} |" for what, value in rows.items()]
    lines += ["", "`experiment.json` has every setting. To judge, to start from, to fetch:", ""]
    lines += ["```bash", f"python jobs/evaluate.py {name}"]
    lines += [f"python jobs/train.py ... --set {role}.weights={name}" for role in recipe.updates]
    lines += [f"python jobs/checkpoints.py pull {name} --to FOLDER", "```", ""]
    return "\n".join(lines)


def now() -> str:
    """This second in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def user() -> str:
    """Who this process runs for."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"  # a container whose user has no name


def _metrics(progress: dict[str, Any]) -> dict[str, float]:
    record = progress["history"][-1] if progress["history"] else {}
    if record.get("step") != progress["step"]:
        # Between evaluations: the last figures are those of another checkpoint.
        return {}
    return {
        name: value
        for name, value in record.items()
        if name not in ("epoch", "step", "images") and math.isfinite(value)
    }


def _explained(what: str, error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{what}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
