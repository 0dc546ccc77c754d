"""The published step written down once more, on torchvision alone: records for the parity test.

It follows the method's description line by line and shares no code with the package but the SR
network and the degradation, which have records of their own. Its records have the layout of those
that were made with the published implementation.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large
from torchvision.ops import FrozenBatchNorm2d

from sr4ir_dist.degradation import degrade
from sr4ir_dist.networks.edsr import EDSR

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCHES, EPOCHS, WARMUP = 1, 4, 1
FEATURES = {"seg": ("C5",), "det": ("0", "1")}
WEIGHTS = {"seg": (1.0,), "det": (0.5, 0.5)}


def make_record(task, scale):
    """Two steps of SR4IR on random images and weights, the second with the TDP loss."""
    torch.manual_seed(0)
    sr = EDSR(scale)
    network = _network(task)
    for layer in network.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    record = {
        "task": task,
        "scale": scale,
        "init_sr": {name: value.clone() for name, value in sr.state_dict().items()},
        "init_task": {name: value.clone() for name, value in network.state_dict().items()},
        "train_opt": _settings(task),
        "batches": [_batch(task, number) for number in range(BATCHES)],
        "steps": [],
    }
    sr.double()
    network.double()
    learner = record["train_opt"][f"optim_{task}"]
    groups = _groups(task, network)
    adam = torch.optim.AdamW([p for p in sr.parameters() if p.requires_grad], weight_decay=0)
    sgd = torch.optim.SGD(
        [{"params": group} for group in groups],
        lr=1.0,
        momentum=0.9,
        weight_decay=learner["weight_decay"],
    )
    for number in range(2):
        record["steps"].append(_step(record, number, sr, network, adam, sgd))
    return record


def _network(task):
    if task == "seg":
        return deeplabv3_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=21, aux_loss=True
        )
    network = fasterrcnn_mobilenet_v3_large_fpn(
        weights=None, weights_backbone=None, num_classes=21, min_size=96, max_size=128
    )
    sample_few(network)
    body = network.backbone.body
    _freeze_batch_norm(body)
    for index in range(7):
        body[str(index)].requires_grad_(False)
    return network


def sample_few(network):
    """Makes a detector train on fewer proposals than published, so that a step takes seconds."""
    network.roi_heads.fg_bg_sampler.batch_size_per_image = 32


def _freeze_batch_norm(module):
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features)  # eps 1e-5
            setattr(module, name, frozen)
        else:
            _freeze_batch_norm(child)


def _settings(task):
    rate, decay = 2e-2, {"seg": 1e-6, "det": 1e-4}[task]
    periods = [1, 3]
    return {
        "batch_size": 2,
        "epoch": EPOCHS,
        "warmup_epoch": WARMUP,
        "optim_sr": {"type": "AdamW", "lr": 1e-4, "weight_decay": 0, "betas": [0.9, 0.999]},
        f"optim_{task}": {"type": "SGD", "lr": rate, "momentum": 0.9, "weight_decay": decay},
        "scheduler_sr": {"periods": periods, "eta_min": 1e-6},
        f"scheduler_{task}": {"periods": periods, "eta_min": 1e-4},
    }


def _groups(task, network):
    if task == "det":
        return [[p for p in network.parameters() if p.requires_grad]]
    parts = (network.backbone, network.classifier, network.aux_classifier)
    return [list(part.parameters()) for part in parts]


def _batch(task, number):
    generator = torch.Generator().manual_seed(number)
    if task == "seg":
        images = (torch.rand(2, 3, 96, 96, generator=generator) * 255).round() / 255
        masks = torch.randint(0, 22, (2, 96, 96), generator=generator)
        return [images, torch.where(masks == 21, 255, masks)]
    sizes = [(45, 61), (43, 62)]
    images = [(torch.rand(3, *size, generator=generator) * 255).round() / 255 for size in sizes]
    targets = []
    for index in range(2):
        corner = torch.rand(3, 2, generator=generator) * 20
        side = torch.rand(3, 2, generator=generator) * 14 + 8
        labels = torch.randint(1, 21, (3,), generator=generator)
        boxes = torch.cat([corner, corner + side], dim=1)
        targets.append({"boxes": boxes, "labels": labels, "image_id": torch.tensor(index)})
    return [images, targets]


def _rate(base, floor, number, task):
    """After `number` steps; the cosine periods of 1 and 3 epochs begin after detection's rise."""
    if task == "det":
        if number < BATCHES:
            return base  # the rise of an epoch of one step
        number -= BATCHES
    start, end = (0, BATCHES) if number <= BATCHES else (BATCHES, EPOCHS * BATCHES)
    return floor + 0.5 * (base - floor) * (1 + math.cos(math.pi * (number - start) / (end - start)))


def _normalized(images):
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def _features(task, network, images):
    if task == "seg":
        return [network.backbone(_normalized(images))["out"]]
    canvas = network.transform(images)[0].tensors
    levels = network.backbone(canvas)
    return [levels[name] for name in FEATURES["det"]]


def _task_loss(task, network, images, targets):
    if task == "seg":
        outputs = network(_normalized(images))
        main, aux = (F.cross_entropy(outputs[k], targets, ignore_index=255) for k in ("out", "aux"))
        return main + 0.5 * aux, outputs["out"]
    boxes = [{"boxes": t["boxes"].double(), "labels": t["labels"]} for t in targets]
    return sum(network(images, boxes).values()), None


def _canvas(task, images, scale):
    if task == "seg":
        return images.double()
    height, width = (-(-max(i.shape[d] for i in images) // scale) * scale for d in (1, 2))
    padded = [
        F.pad(
            image.double()[None],
            (0, width - image.shape[2], 0, height - image.shape[1]),
            mode="reflect",
        )
        for image in images
    ]
    return torch.cat(padded)


def _own(task, canvas, images):
    """What the task network sees of a canvas."""
    if task == "seg":
        return canvas
    return [c[:, : i.shape[1], : i.shape[2]] for c, i in zip(canvas, images, strict=True)]


def _step(record, number, sr, network, adam, sgd):
    task, scale, settings = record["task"], record["scale"], record["train_opt"]
    epoch, index = number // BATCHES + 1, number % BATCHES
    images, targets = record["batches"][index]
    rate = settings[f"optim_{task}"]["lr"]
    lr_sr = [_rate(1e-4, 1e-6, number, task)]
    bases = [rate, rate, rate * 10] if task == "seg" else [rate]
    lr_task = [_rate(base, 1e-4, number, task) for base in bases]
    hr = _canvas(task, images, scale)
    lr = degrade(hr, scale)
    step = {"batch_index": index, "epoch": epoch, "sr_in": [lr], "lr_sr": lr_sr, "losses": []}
    step |= {"lr_task": lr_task, "sr_out": [], "task_calls": []}
    adam.param_groups[0]["lr"] = lr_sr[0]
    for group, value in zip(sgd.param_groups, lr_task, strict=True):
        group["lr"] = value

    # Phase 1: the SR network learns.
    sr.train()
    network.eval()
    out = sr(lr)
    step["sr_out"].append(_summary(out))
    loss = (out - hr).abs().mean()
    step["losses"].append(["cri_pix", loss.item()])
    if epoch > WARMUP:
        pairs = zip(
            _features(task, network, _own(task, out, images)),
            _features(task, network, _own(task, hr, images)),
            WEIGHTS[task],
            strict=True,
        )
        pairs = [(a, b.detach(), weight) for a, b, weight in pairs]
        for side in (0, 1):
            features = dict(zip(FEATURES[task], (pair[side] for pair in pairs), strict=True))
            step["task_calls"].append(_call(False, features))
        tdp = sum(weight * (a - b).abs().mean() for a, b, weight in pairs)
        step["losses"].append(["cri_tdp", tdp.item()])
        loss = loss + tdp
    gradients = torch.autograd.grad(loss, adam.param_groups[0]["params"])
    _apply(step, "sr", sr, adam, gradients)

    # Phase 2: the task network learns.
    network.train()
    out = sr(lr).detach()
    step["sr_out"].append(_summary(out))
    cells = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(number)) < 0.5
    step["mask_cells"] = [cells.to(torch.uint8)]
    mask = F.interpolate(cells.double(), size=hr.shape[-2:], mode="nearest")
    total = torch.zeros((), dtype=torch.float64)
    for name, view in (("sr", out), ("hr", hr), ("cqmix", mask * out + (1 - mask) * hr)):
        seen = {}
        hook = network.backbone.register_forward_hook(
            lambda _, __, output, seen=seen: seen.update(output)
        )
        loss, logits = _task_loss(task, network, _own(task, view, images), targets)
        hook.remove()
        features = {"C5": seen["out"]} if task == "seg" else {k: seen[k] for k in FEATURES["det"]}
        step["task_calls"].append(_call(True, features, logits))
        step["losses"].append([f"cri_{task}_{name}", 0.34 * loss.item()])
        total = total + 0.34 * loss
    members = [p for group in sgd.param_groups for p in group["params"]]
    _apply(step, "task", network, sgd, torch.autograd.grad(total, members))
    return step


def _apply(step, role, network, optimizer, gradients):
    members = [p for group in optimizer.param_groups for p in group["params"]]
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    norms = {}
    for parameter, gradient in zip(members, gradients, strict=True):
        parameter.grad = gradient
        norms[names[id(parameter)]] = gradient.norm().item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    step[f"grad_norms_{role}"] = norms
    step[f"grad_total_{role}"] = math.hypot(*norms.values())
    state = {name: value for name, value in network.state_dict().items() if value.dim()}
    step[f"param_csum_{role}"] = {name: _summary(value) for name, value in state.items()}


def _call(training, features, logits=None):
    call = {"training": training, "feats": {name: _summary(f) for name, f in features.items()}}
    return call if logits is None else {**call, "logits": logits.detach()}


def _summary(tensor):
    tensor = tensor.detach().double()
    return {
        "shape": list(tensor.shape),
        "sum": tensor.sum().item(),
        "abs": tensor.abs().sum().item(),
        "l2": tensor.norm().item(),
        "first": tensor.flatten()[:4].tolist(),
    }
