"""Batch norm over two ranks with shares of 3+2 and 1+0 images (`rank_process.py`)."""

import pytest
import torch
from rank_process import batch_norm_case, batch_norm_layer
from torch import nn

from sr4ir_dist.training.batch_norm import SyncBatchNorm2d, synchronise

pytestmark = pytest.mark.timeout(900)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def whole_batches(dtype):
    """What plain batch norm makes of the whole batches, in the order of the rank processes."""
    layer = batch_norm_layer(dtype)
    results = {}
    for count in (5, 1):
        x, grad = batch_norm_case(count, dtype)
        x.requires_grad_()
        layer.zero_grad()
        output = layer(x)
        output.backward(grad)
        results[count] = {
            "output": output.detach(),
            "grad": x.grad,
            **{f"grad_{name}": p.grad.clone() for name, p in layer.named_parameters()},
            **{name: value.clone() for name, value in layer.named_buffers()},
        }
    layer.eval()
    results["eval"] = layer(batch_norm_case(5, dtype)[0]).detach()
    return results


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("count", [5, 1])
def test_synchronised_layers_equal_one_layer_on_the_whole_batch(two_ranks, dtype, count):
    expected = whole_batches(dtype)[count]
    found = [results["batch_norm"][f"{dtype}/{count}"] for results in two_ranks.by_rank]
    assert [len(result["output"]) for result in found] == [-(-count // 2), count // 2]
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for name in ("output", "grad"):
        joined = torch.cat([result[name] for result in found])
        torch.testing.assert_close(joined, expected[name], **close)
    for name in ("grad_0.weight", "grad_0.bias"):
        total = sum(result[name] for result in found)
        torch.testing.assert_close(total, expected[name.replace("0.", "")], **close)
    for result in found:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(result[f"0.{name}"], expected[name], **close)
            assert torch.equal(result[f"0.{name}"], found[0][f"0.{name}"])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_evaluation_reads_the_running_statistics_without_other_ranks(two_ranks, dtype):
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for results in two_ranks.by_rank:
        found = results["batch_norm"][f"{dtype}/eval"]
        torch.testing.assert_close(found, whole_batches(dtype)["eval"], **close)


def test_one_value_in_all_keeps_statistics_finite(two_ranks):
    for results in two_ranks.by_rank:
        found = results["batch_norm"]["one value"]
        torch.testing.assert_close(found["0.running_mean"], torch.full((6,), 0.1))
        torch.testing.assert_close(found["0.running_var"], torch.full((6,), 0.9))


def test_synchronise_keeps_weights_and_keys_and_replaces_every_layer():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    parameters = list(network.parameters())
    assert synchronise(network) is network
    kinds = [type(layer) for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert kinds == [SyncBatchNorm2d] * 2
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))


def test_local_statistics_are_averaged_by_share(two_ranks):
    first, second = (results["local"] for results in two_ranks.by_rank)
    for step, weights in enumerate(((0.6, 0.4), (1.0, 0.0))):
        shares = first[step]["before"], second[step]["before"]
        differ = False
        for name, mine in shares[0].items():
            after = first[step]["after"][name]
            assert torch.equal(after, second[step]["after"][name])
            if name.endswith("num_batches_tracked"):
                assert after == step + 1
                continue
            mean = weights[0] * mine + weights[1] * shares[1][name]
            torch.testing.assert_close(after, mean)
            assert after.isfinite().all()
            differ |= not torch.equal(mine, shares[1][name])
        assert differ


@pytest.mark.parametrize("recipe", ["sr4ir", "joint"])
def test_bf16_keeps_weights_in_float32_and_stays_near_float32(two_ranks, recipe):
    for results in two_ranks.by_rank:
        found, exact = results["bf16"][recipe], results["engines"][f"{recipe}/plain"]
        assert {value.dtype for value in found["weights"].values()} == {torch.float32}
        first = [name for name in exact["losses"] if name.startswith("0/")]
        assert len(first) >= 2
        for name in first:
            loss, near = found["losses"][name].item(), exact["losses"][name].item()
            assert loss == pytest.approx(near, rel=0.05)
            assert loss != near
        for name in found["losses"]:
            assert found["losses"][name].isfinite(), name
