"""ONNX graphs of networks, checked by onnxruntime against the networks themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sr4ir_dist.tasks import Task

TOLERANCE = 1e-3
"""Largest difference to our output, over its largest magnitude.

Kernels that only sum float32 in another order differ by 2e-5 at most in all networks here, by 3e-4
where batch norm amplifies rounding errors; a border that is padded or a resize that is aligned in
another way makes 0.1 and more.
"""
_LIBRARIES = ("onnx", "onnxruntime", "onnxscript")
# Images, height and width. The first is traced, so its sides must differ; then odd ones, and less
# than a window of SwinIR.
_LR_SHAPES = ((2, 24, 20), (1, 13, 31), (3, 5, 9))
_IMAGE_SHAPES = ((2, 64, 96), (1, 97, 75), (3, 40, 33))


class ExportError(ValueError):
    """A network that cannot be exported as asked; the message says why and what can be done."""


@dataclass(frozen=True)
class Graph:
    """A checked ONNX graph.

    Attributes:
        data: the file's bytes, weights included.
        about: its `opset`, `inputs` and `outputs` with their axes, `tolerance`, and as `checked`
            each input shape that was compared and the largest relative difference there.
    """

    data: bytes
    about: dict[str, Any]


class Recognition(nn.Module):
    """A task network with its normalisation: images in [0, 1] to class scores."""

    def __init__(self, task: Task, network: nn.Module) -> None:
        """Takes a network of the task, classification or segmentation."""
        super().__init__()
        self.network = network
        self._task = task

    def forward(self, images: Tensor) -> Tensor:
        """Logits: N,K of images, or N,K,H,W of their pixels."""
        outputs = self._task.forward(self.network, images)
        return outputs["out"] if self._task.target == "mask" else outputs


def check_libraries() -> None:
    """Refuse to start without what ONNX needs.

    Raises:
        ExportError: a library is not installed.
    """
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"format onnx needs {', '.join(missing)}: pip install -e '.[export]', "
            "or leave that format out"
        )


def make_graph(network: nn.Module, name: str, output: str, about: Mapping[str, Any]) -> Graph:
    """Trace a network into ONNX, for every batch size and image size, and check it.

    Args:
        network: takes a batch of images N,3,H,W and returns a tensor.
        name: of its input, `lr` or `images`.
        output: name of its output.
        about: is written into the file's metadata, each value as JSON.

    Raises:
        ExportError: onnxruntime's results are not the network's; the message says how far.
    """
    import onnx
    import torch.onnx

    network = network.eval().requires_grad_(False)
    examples = _examples(name)
    # Before the trace, too, because what a forward keeps for later must not be the trace's.
    expected = [(network(example),) for example in examples]
    program = torch.onnx.export(
        network,
        (examples[0],),
        input_names=[name],
        output_names=[output],
        dynamic_shapes=({0: "batch", 2: f"{name}_height", 3: f"{name}_width"},),
        external_data=False,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    for part in [*model.graph.node, *model.graph.value_info, *model.graph.input]:
        del part.metadata_props[:]  # stack traces with this machine's paths
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in about.items()})
    return _checked(model, examples, expected)


def join_graphs(first: Graph, second: Graph, networks: tuple[nn.Module, nn.Module]) -> Graph:
    """One graph from LR images to SR images and to what a task network makes of these, checked.

    Args:
        first: from `lr` to `sr`, by `make_graph`.
        second: from `images` to `logits`, by `make_graph`.
        networks: of which they were made.

    Raises:
        ExportError: as for `make_graph`.
    """
    import onnx
    from onnx import compose

    enlarge, recognise = (onnx.load_from_string(graph.data) for graph in (first, second))
    recognise = compose.add_prefix(recognise, "task.", rename_inputs=False, rename_outputs=False)
    model = compose.merge_models(enlarge, recognise, [("sr", "images")], outputs=["sr", "logits"])
    examples = _examples("lr")
    expected = [(sr := networks[0](example), networks[1](sr)) for example in examples]
    return _checked(model, examples, expected)


def _examples(name: str) -> list[Tensor]:
    """Smooth images with a little noise: pure noise excites rounding errors, as photos do not."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for count, height, width in _LR_SHAPES if name == "lr" else _IMAGE_SHAPES:
        coarse = torch.rand(count, 3, 6, 7, generator=generator)
        noise = torch.rand(count, 3, height, width, generator=generator)
        examples.append(0.8 * F.interpolate(coarse, (height, width), mode="bilinear") + 0.2 * noise)
    return examples


def _checked(
    model: Any, examples: Sequence[Tensor], expected: Sequence[tuple[Tensor, ...]]
) -> Graph:
    """The graph, if onnxruntime computes what is expected of each example."""
    import onnxruntime

    data = model.SerializeToString()
    inputs = {value.name: _axes(value) for value in model.graph.input}
    outputs = {value.name: _axes(value) for value in model.graph.output}
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (name,) = inputs
    checked = []
    for example, wanted in zip(examples, expected, strict=True):
        results = session.run(list(outputs), {name: example.numpy()})
        differences = {}
        for output, ours, result in zip(outputs, wanted, results, strict=True):
            theirs = torch.from_numpy(result)
            difference = float("inf")
            if ours.shape == theirs.shape:
                difference = float((theirs - ours).abs().max() / ours.abs().max())
            if not difference <= TOLERANCE:
                raise ExportError(
                    f"onnxruntime's {output} {tuple(theirs.shape)} differs from the network's "
                    f"{tuple(ours.shape)} by {difference:.2g} of its magnitude for {name} "
                    f"{tuple(example.shape)}; allowed: {TOLERANCE:g}"
                )
            differences[output] = difference
        checked.append({"shape": list(example.shape), "difference": differences})
    about = {"opset": model.opset_import[0].version, "inputs": inputs, "outputs": outputs}
    return Graph(data, about | {"tolerance": TOLERANCE, "checked": checked})


def _axes(value: Any) -> list[int | str]:
    dimensions = value.type.tensor_type.shape.dim
    return [d.dim_param if d.HasField("dim_param") else d.dim_value for d in dimensions]
