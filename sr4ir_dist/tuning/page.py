"""A search in pictures: PNG files, and one HTML page that holds them and the trials' table."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import optuna
from markupsafe import Markup
from optuna.visualization import matplotlib as plots

from sr4ir_dist import storage
from sr4ir_dist.analysis.report.document import document
from sr4ir_dist.tuning.outcome import Outcome, cells, headings, ranked
from sr4ir_dist.tuning.space import Space
from sr4ir_dist.tuning.strategy import TIME, distribution

_LEAST = 3  # trials that importance and parallel coordinates need to say anything


def write_page(folder: str, title: str, space: Space, trials: Sequence[Outcome]) -> str:
    """Write the plots as PNG files and a self-contained page into a search's folder.

    The plots are Optuna's: the metric over the epochs, against each parameter, parallel
    coordinates, and how much of the metric's spread each parameter explains (PED-ANOVA).

    Args:
        folder: URI of the search.
        title: the page's heading.
        space: what was searched.
        trials: all of them.

    Returns:
        The page's URI.

    Raises:
        StorageError: the storage cannot be written.
    """
    pictures = {}
    for name, (heading, data) in _pictures(space, trials).items():
        storage.write_bytes(storage.join(folder, f"{name}.png"), data)
        pictures[heading] = data
    uri = storage.join(folder, "report.html")
    storage.write_bytes(uri, _page(title, space, trials, pictures).encode())
    return uri


def study_of(space: Space, trials: Sequence[Outcome]) -> optuna.Study:
    """The evaluated trials as a study of Optuna's."""
    study = optuna.create_study(direction="minimize" if space.mode == "min" else "maximize")
    for trial in trials:
        value = trial.figure(space.metric)
        if value is None:
            continue
        values = {path: trial.values[path] for path in space.parameters if path in trial.values}
        study.add_trial(
            optuna.trial.create_trial(
                params=values,
                distributions={path: distribution(space.parameters[path]) for path in values},
                value=value,
                intermediate_values={
                    record[TIME]: record[space.metric] for record in trial.history
                },
            )
        )
    return study


def _pictures(space: Space, trials: Sequence[Outcome]) -> dict[str, tuple[str, bytes]]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = study_of(space, trials)
    if not study.trials:
        return {}
    metric = space.metric
    paths = [path for path in space.parameters if any(path in t.params for t in study.trials)]
    wanted: dict[str, tuple[str, Callable[[], Any]]] = {
        "epochs": (
            f"{metric} over the epochs",
            lambda: plots.plot_intermediate_values(study),
        ),
        "parameters": (
            f"{metric} against each parameter",
            lambda: plots.plot_slice(study, params=paths, target_name=metric),
        ),
    }
    if len(study.trials) >= _LEAST and len(paths) > 1:
        wanted["coordinates"] = (
            "Parallel coordinates",
            lambda: plots.plot_parallel_coordinate(study, params=paths, target_name=metric),
        )
    if len(study.trials) >= _LEAST and _common(space, study):
        wanted["importance"] = (
            f"What explains {metric}",
            lambda: plots.plot_param_importances(
                study,
                evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
                params=_common(space, study),
                target_name=metric,
            ),
        )
    return {name: (heading, _png(draw)) for name, (heading, draw) in wanted.items()}


def _common(space: Space, study: optuna.Study) -> list[str]:
    """The parameters of all trials, which alone have an importance, and which took values."""
    return [
        path
        for path in space.parameters
        if all(path in trial.params for trial in study.trials)
        and len({trial.params[path] for trial in study.trials}) > 1
    ]


def _png(draw: Callable[[], Any]) -> bytes:
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    with warnings.catch_warnings(), mpl.rc_context({"backend": "agg"}):
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.simplefilter("ignore", UserWarning)  # of an axis with a single value
        axes = draw()
        figure = (axes if hasattr(axes, "figure") else axes.flat[0]).figure
        for part in figure.axes:
            # Those of logarithmic axes lie on one another where there is little room.
            part.xaxis.set_minor_formatter(NullFormatter())
        sink = io.BytesIO()
        figure.savefig(sink, format="png", dpi=110, bbox_inches="tight")
        pyplot.close(figure)
    return sink.getvalue()


def _page(title: str, space: Space, trials: Sequence[Outcome], pictures: dict[str, bytes]) -> str:
    rows = []
    for place, trial in enumerate(ranked(space, trials)):
        mark = (
            Markup(' class="best"') if place == 0 and trial.figure(space.metric) is not None else ""
        )
        row = Markup("").join(Markup("<td>{}</td>").format(cell) for cell in cells(space, trial))
        rows.append(Markup("<tr{}>{}</tr>").format(mark, row))
    images = [
        Markup('<h2>{0}</h2><img alt="{0}" src="data:image/png;base64,{1}">').format(
            heading, base64.b64encode(data).decode()
        )
        for heading, data in pictures.items()
    ]
    head = Markup("").join(
        Markup('<th scope="col">{}</th>').format(heading) for heading in headings(space)
    )
    body = Markup(
        '<h1>{}</h1><p>{}</p><div class="scroll" role="region" aria-label="Trials" tabindex="0">'
        '<table class="figures ranked"><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>{}'
    ).format(title, space.about, head, Markup("").join(rows), Markup("").join(images))
    return document(title, body)
