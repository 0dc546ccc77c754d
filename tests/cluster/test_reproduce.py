"""Tables run again by `jobs/reproduce.py`, and the lanes that train their runs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from random_runs import publish_random, write_drawn_image
from torchvision.models.vgg import cfgs, make_layers

from sr4ir_dist import checkpoint, experiments, storage
from sr4ir_dist.overrides import override
from sr4ir_dist.training import lanes, launch
from sr4ir_dist.training.plan import make_plan, make_request
from sr4ir_dist.training.run_queue import Order

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
    pytest.mark.timeout(900),
]
SMALL = (
    *("epochs=2", "warmup_epochs=1", "batch_size=8", "data.resize=32", "data.crop=32"),
    *("evaluation.border=2", "evaluation.every_epochs=2"),
)
ONE = launch.Resources(workers=1, cpus=1, gpu=False)


def small(name):
    experiment = override(experiments.make(name), SMALL)
    if experiment.sr is not None:
        experiment = override(experiment, ["sr.blocks=1", "sr.features=8"])
    return experiments.relevant(experiment)


def tensors(run_uri):
    saved = checkpoint.load(checkpoint.resolve(run_uri))
    names = [name for name in saved.files if name.endswith(".safetensors")]
    return {name: saved.read(name) for name in names}


@pytest.mark.slow
def test_a_lane_trains_each_run_as_if_it_had_its_workers_for_itself(cluster, drawn, tmp_path):
    """Bit for bit, after another run, and with one that nobody can train in between."""
    s, s2t = small("drawn_cls/edsr-x4/s"), small("drawn_cls/edsr-x4/s2t")
    vgg, joint = small("drawn_cls/edsr-x4/sr4ir-vgg"), small("drawn_cls/edsr-x4/joint")
    absent = override(vgg, [f"fixed.vgg={tmp_path}/none.pth"])
    orders = [Order(s, drawn), Order(absent, drawn), Order(joint, drawn), Order(s2t, drawn, (0,))]
    told = []
    outcomes = lanes.train_all(
        orders,
        ONE,
        storage_uri=str(tmp_path / "lanes"),
        lanes=1,
        settled=lambda number, outcome: told.append(number),
    )
    assert [outcome.kind for outcome in outcomes] == ["done", "failed", "done", "done"]
    assert "none.pth" in outcomes[1].why
    assert sorted(told) == [0, 1, 2, 3]
    # Nothing of the lanes' own is left.
    assert not [n for n in storage.list_names(str(tmp_path / "lanes")) if n.startswith("lanes-")]
    plan = make_plan(joint, data=drawn, storage_uri=str(tmp_path / "alone"))
    alone = launch.train(plan, ONE)
    assert alone["metrics"] == outcomes[2].result["metrics"]
    assert tensors(alone["run_uri"]) == tensors(outcomes[2].result["run_uri"])
    # All of it once more needs no workers.
    started = time.monotonic()
    again = lanes.train_all(orders[:1], ONE, storage_uri=str(tmp_path / "lanes"), lanes=1)
    assert again[0] == outcomes[0]
    assert time.monotonic() - started < 10


@pytest.mark.slow
def test_another_task_network_judges_as_table_s2s_recipe_does(cluster, drawn, tmp_path):
    sr4ir, h2t = small("drawn_cls/edsr-x4/sr4ir"), small("drawn_cls/h2t")
    judged = small("drawn_cls/edsr-x4/h2t-on-sr4ir")
    orders = [Order(sr4ir, drawn), Order(h2t, drawn), Order(judged, drawn, (0, 1))]
    outcomes = lanes.train_all(orders, ONE, storage_uri=str(tmp_path), lanes=1)
    runs = [outcome.result["run_uri"] for outcome in outcomes]
    request = make_request(runs[0], data=None, split="val", settings=(), networks={"task": runs[1]})
    (figures,) = launch.evaluate([request], ONE)
    expected = outcomes[2].result["metrics"]
    assert figures == {name: expected[name] for name in figures}


@pytest.mark.slow
def test_a_cell_without_weights_is_left_out_and_says_why(cluster, drawn, tmp_path, run_job):
    folder = tmp_path / "paper"
    arguments = ["table6", "--data", f"drawn_cls={drawn}", "--storage", folder, "--scale", "4"]
    arguments += ["--budget", "0.1", "--cpus", "1", "--cpu", "--lanes", "2"]
    for setting in (*SMALL[2:5], "sr.blocks=1", "sr.features=8"):
        arguments += ["--set", setting]
    # No network for VGG's weights: a proxy where nobody listens.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("https_proxy", "http://127.0.0.1:9")
        result = run_job("reproduce", *arguments, "--json", tmp_path / "table.json")
    assert result.exit_code == 0, result.output
    table = json.loads((tmp_path / "table.json").read_text())
    cells = {row[0]["experiment"].split("/")[-1]: row[0] for row in table["cells"]}
    assert "vgg19" in cells["sr4ir-vgg"]["why"]
    for recipe in ("sr4ir-fixed-tdp", "joint-tdp", "sr4ir"):
        assert cells[recipe]["why"] == ""
        assert 0 <= cells[recipe]["figures"][0]["mean"] <= 100
    for suffix in ("md", "csv", "html", "json"):
        assert (folder / "tables" / f"table6.{suffix}").stat().st_size > 100


@pytest.mark.slow
def test_tables_that_are_measured_on_runs(cluster, drawn, tmp_path, run_job):
    """S4 and S6 on the drawn dataset, which has labels and masks, from the same runs."""
    benchmark = tmp_path / "Two"
    for number in range(2):
        write_drawn_image(benchmark / "HR" / f"{number}.png", 48, 40, seed=number)
    places = ["--data", f"drawn_seg={drawn}", "--data", f"drawn_cls={drawn}"]
    places += ["--storage", tmp_path / "paper", "--scale", "4", "--cpus", "1", "--cpu"]
    for setting in (*SMALL[2:5], "sr.blocks=1", "sr.features=8"):
        places += ["--set", setting]

    def run(name, *more):
        json_file = tmp_path / f"{name}.json"
        result = run_job("reproduce", name, *places, "--budget", "0.1", *more, "--json", json_file)
        assert result.exit_code == 0, result.output
        table = json.loads(json_file.read_text())
        assert not any(cell["why"] for row in table["cells"] for cell in row)
        return [[cell["figures"][0]["mean"] for cell in row] for row in table["cells"]]

    matrix = run("tableS4")
    runs = {
        uri.split("-")[0]: storage.read_json(f"{tmp_path}/paper/{uri}/result.json")["metrics"]
        for uri in storage.list_names(str(tmp_path / "paper"))
        if "-sr4ir-" in uri
    }
    # The diagonal is what the runs themselves reported.
    assert matrix[0][0] == pytest.approx(runs["drawn_seg"]["miou"])
    assert matrix[1][1] == pytest.approx(runs["drawn_cls"]["top1"])
    pretrained, sr4ir, bicubic = run("tableS6", "--benchmark", f"Two={benchmark}")
    assert all(5 < row[0] < 60 for row in (pretrained, sr4ir, bicubic))


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory):
    """Random weights under torchvision's names."""
    layers = make_layers(cfgs["D"])
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save({f"features.{name}": value for name, value in layers.state_dict().items()}, path)
    return path


@pytest.mark.slow
def test_finished_runs_are_judged_again_when_the_weights_of_lpips_are_at_hand(
    cluster, drawn, tmp_path, run_job, vgg16
):
    words = ["table3", "--data", f"drawn_cls={drawn}", "--storage", tmp_path, "--scale", "4"]
    words += ["--sr", "edsr", "--budget", "0.1", "--cpus", "1", "--cpu", "--lanes", "1"]
    for setting in (*SMALL[2:5], "sr.blocks=1", "sr.features=8", "evaluation.border=2"):
        words += ["--set", setting]
    json_file = tmp_path / "table.json"

    def table(*more):
        result = run_job("reproduce", *words, *more, "--json", json_file)
        assert result.exit_code == 0, result.output
        rows = json.loads(json_file.read_text())["cells"]
        return result.output, {row[0]["experiment"].split("/")[-1]: row[0] for row in rows}

    _, without = table()
    assert {cell["figures"][1]["mean"] for cell in without.values()} == {None}
    output, cells = table("--set", f"evaluation.lpips={vgg16}")
    assert "judging 5 finished runs again, for LPIPS" in output
    for recipe, cell in cells.items():
        assert cell["figures"][0] == without[recipe]["figures"][0]
        assert (cell["figures"][1]["mean"] is None) == (recipe == "h2t")
    output, again = table("--set", f"evaluation.lpips={vgg16}")
    assert "judging" not in output
    assert again == cells


@pytest.mark.slow
def test_training_a_finished_run_again_adds_lpips(
    cluster, drawn, tmp_path, run_job, train_command, vgg16
):
    words = train_command(drawn, str(tmp_path), "--json", str(tmp_path / "result.json"))
    results = []
    for more in ((), ("--set", f"evaluation.lpips={vgg16}"), ()):
        told = run_job("train", *words, *more)
        assert told.exit_code == 0, told.output
        results.append(json.loads((tmp_path / "result.json").read_text()))
    first, second, third = (result.pop("metrics") for result in results)
    assert second == third == first | {"lpips": second["lpips"]}
    assert results[0] == results[1]


@pytest.mark.slow
def test_checkpoints_are_judged_by_commands_with_one_thing_exchanged(
    cluster, drawn, tmp_path, run_job
):
    runs = {}
    for task in ("cls", "seg"):
        name, size = f"drawn_{task}/edsr-x4/sr4ir", ("sr.blocks=1", "sr.features=8")
        settings = (*size, *SMALL[3:6], "task.classes=8")
        publish_random(tmp_path / task, name, *settings, data=drawn)
        runs[task] = f"{task}={tmp_path / task}"

    def run(*words):
        words = (*words, "--cpus", "1", "--cpu", "--json", tmp_path / "out.json")
        told = run_job(*words)
        assert told.exit_code == 0, told.output
        return told.output, json.loads((tmp_path / "out.json").read_text())

    output, matrix = run("analyze", "cross-task", *runs.values())
    assert {(each["sr"], each["task"]) for each in matrix} == {(a, b) for a in runs for b in runs}
    assert "(71.4)" in output  # the paper's, by the labels
    _, sweep = run("analyze", "degradations", runs["cls"], "--blur", 0, "--blur", 5)
    assert [each["blur"] for each in sweep] == ["0", "5"]
    assert sweep[1]["metrics"]["psnr"] != sweep[0]["metrics"]["psnr"]


DRAWN = (
    *("--pretrain", "--budget", "0.2", "--scale", "4", "--sr", "edsr"),
    *("--set", "precision=bf16", "--set", "evaluation.batch_size=64"),
)


def job(name, *arguments):
    return [sys.executable, f"jobs/{name}.py", *map(str, arguments)]


def alone():
    """The environment of a command that starts its own Ray, and fetches nothing."""
    return os.environ | {"RAY_ADDRESS": "local", "https_proxy": "http://127.0.0.1:9"}


def without_weights(tables):
    """Experiments whose cells say why they are empty."""
    filled = [cell for table in tables.values() for row in table["cells"] for cell in row]
    return {cell["experiment"] for cell in filled if cell["why"]}


@pytest.mark.proof
@pytest.mark.timeout(2400)
def test_tables_of_the_drawn_dataset_within_a_quarter_of_an_hour(repository, tmp_path, record):
    """A column, Tables 5 and 6 by the job's own command, killed once and given again."""
    uri, folder = tmp_path / "drawn", tmp_path / "paper"
    converting = job("prepare_data", "drawn", "--out", uri)
    subprocess.run(converting, cwd=repository, check=True, timeout=300)
    tables, started, killed_after = {}, time.monotonic(), None
    for name in ("table3", "table5", "table6"):
        words = job("reproduce", name, "--data", f"drawn_cls={uri}", "--storage", folder, *DRAWN)
        words += ["--json", str(tmp_path / f"{name}.json")]
        if killed_after is None:
            killed_after = run_and_kill(words, repository, alone(), "[4/")
        done = subprocess.run(words, cwd=repository, env=alone(), timeout=2000, check=False)
        assert done.returncode == 0
        tables[name] = json.loads((tmp_path / f"{name}.json").read_text())
    seconds = time.monotonic() - started
    shown = " ".join(DRAWN)
    commands = [
        f"python jobs/reproduce.py {name} --data drawn_cls=datasets/drawn {shown}"
        for name in tables
    ]
    times = {"seconds": round(seconds), "killed_after_seconds": round(killed_after)}
    record("tables_drawn_cls", {"commands": commands, **times, "tables": tables})
    assert without_weights(tables) == {"drawn_cls/edsr-x4/sr4ir-vgg"}
    assert seconds < 15 * 60


WIDER = ("1", "2", "4", "7", "S1", "S2", "S3", "S4", "S5")
# Batches of 8, for the networks to take 128 steps.
FEW = (*DRAWN, "--set", "batch_size=8")


@pytest.mark.proof
@pytest.mark.timeout(5400)
def test_every_other_table_of_a_small_drawn_dataset(repository, tmp_path, record):
    """Four epochs of 256 images: what is shown is the graphs of experiments, not the figures."""
    uri, folder = tmp_path / "drawn", tmp_path / "paper"
    counts = ("--train-count", "256", "--val-count", "64")
    converting = job("prepare_data", "drawn", "--out", uri, *counts)
    subprocess.run(converting, cwd=repository, check=True, timeout=300)
    places = [f"--data=drawn_{task}={uri}" for task in ("seg", "det", "cls")]
    shown = [place.replace(str(uri), "datasets/drawn") for place in places]
    tables, commands, started = {}, [], time.monotonic()
    for name in (f"table{number}" for number in WIDER):
        words = job("reproduce", name, *places, "--storage", folder, *FEW)
        words += ["--json", str(tmp_path / f"{name}.json")]
        done = subprocess.run(words, cwd=repository, env=alone(), timeout=3000, check=False)
        assert done.returncode == 0
        tables[name] = json.loads((tmp_path / f"{name}.json").read_text())
        commands.append(" ".join(["python jobs/reproduce.py", name, *shown, *FEW]))
    seconds = round(time.monotonic() - started)
    commands.insert(0, f"python jobs/prepare_data.py drawn --out datasets/drawn {' '.join(counts)}")
    record("tables_drawn_wide", {"commands": commands, "seconds": seconds, "tables": tables})
    assert {name.split("/")[2] for name in without_weights(tables)} == {"s-vgg2t", "h2t-on-s-vgg"}


CUB = (
    *("--sr", "edsr", "--seeds", "1,2,3", "--pretrain", "--budget", "0.03", "--size", "64"),
    *("--set", "batch_size=32", "--set", "sr.blocks=8", "--set", "sr.features=32"),
    *("--set", "optimizers.sr.lr=5e-4", "--set", "optimizers.task.lr=0.01"),
    *("--set", "task.partial=true"),
)


@pytest.fixture
def birds(repository, real_data, tmp_path):
    """Runs a table on CUB at a small budget, from a part of ImageNet's weights.

    Gives the table and its command without this machine's folders.
    """
    data = tmp_path / "cub200"
    converting = job("prepare_data", "cub200", "--root", real_data / "CUB_200_2011", "--out", data)
    subprocess.run(converting, cwd=repository, check=True, timeout=300)

    def run(name, *more):
        weights = real_data / "weights" / "resnet18_imagenet_partial.pth"
        words = ["jobs/reproduce.py", name, "--data", f"cub200={data}", *CUB, *more]
        words += ["--set", f"task.weights={weights}"]
        places = ["--storage", str(tmp_path / "paper"), "--json", str(tmp_path / "table.json")]
        command = [sys.executable, *words, *places]
        done = subprocess.run(command, cwd=repository, env=alone(), timeout=7000, check=False)
        assert done.returncode == 0
        told = (tmp_path / "table.json").read_text(), f"python {' '.join(words)}"
        for folder in (data.parent, weights.parent, real_data / "sr_benchmarks"):
            told = tuple(text.replace(f"{folder}/", "") for text in told)
        return json.loads(told[0]), told[1]

    return run


@pytest.mark.proof
@pytest.mark.timeout(7200)
def test_table_3_on_birds_with_three_seeds(birds, record):
    started = time.monotonic()
    table, command = birds("table3", "--scale", "4", "--scale", "8", "--set", "precision=bf16")
    seconds = round(time.monotonic() - started)
    record(
        "table3_cub200", {"commands": [command], "seconds": seconds, "tables": {"table3": table}}
    )
    assert without_weights({"table3": table}) == set()


@pytest.mark.proof
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_table_s6_on_birds_with_three_seeds_and_a_report(
    precision, birds, repository, real_data, tmp_path, record
):
    """In both precisions, whose top-1 is kept beside the table."""
    folder, started = real_data / "sr_benchmarks", time.monotonic()
    words = [
        word for name in ("Set5", "Set14") for word in ("--benchmark", f"{name}={folder / name}")
    ]
    table, command = birds("tableS6", *words, "--set", f"precision={precision}")
    seconds = round(time.monotonic() - started)
    runs = sorted((tmp_path / "paper").glob("cub200-edsr-x4-sr4ir-*"))
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    places = ["--out", tmp_path / "report.html", "--json", tmp_path / "report.json"]
    reporting = job("report", *(f"SR4IR {n}={run}" for n, run in enumerate(runs, 1)), *places)
    subprocess.run(reporting, cwd=repository, env=alone(), check=True, timeout=900)
    images = (tmp_path / "report.html").read_text().count("<img")
    told = {"commands": [command], "seconds": seconds, "table": table}
    told |= {"metrics_of_sr4ir": [result["metrics"] for result in results]}
    record(f"tableS6_cub200_{precision}", told | {"images_of_the_report": images})
    assert len(runs) == 3
    assert images > 9
    _, sr4ir, _ = table["cells"]  # between the one start of all seeds and bicubic
    assert None not in [figure["std"] for cell in sr4ir for figure in cell["figures"]]


def run_and_kill(words, repository, environment, when):
    """Run a command until it tells something, then kill it and all it started."""
    started = time.monotonic()
    process = subprocess.Popen(
        words,
        cwd=repository,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    with process.stderr:
        told = any(line.startswith(when) for line in process.stderr)
    assert told, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)
    return time.monotonic() - started
