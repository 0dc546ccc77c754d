import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sr4ir_dist import checkpoint, experiments
from sr4ir_dist.analysis.report import images
from sr4ir_dist.analysis.report.curves import chart
from sr4ir_dist.analysis.report.gather import assignments, differences, gather
from sr4ir_dist.analysis.report.page import page
from sr4ir_dist.analysis.report.write import Shown, write_report
from sr4ir_dist.overrides import override

HISTORY = (
    {"epoch": 1, "step": 10, "top1": 20.5, "psnr": 21.25, "ssim": 0.61234, "images": 8},
    {"epoch": 2, "step": 20, "top1": 31.5, "psnr": 22.75, "ssim": 0.65432, "images": 8},
)
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """What is on a page: its text, its tags with attributes, and that they are closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self._open = [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def read(out):
    return Page(Path(out).read_text())


def test_a_report_of_two_runs(published, small_data, tmp_path):
    runs = {
        "L->T": published("drawn_cls/x4/l2t", history=HISTORY),
        "SR4IR": published("drawn_cls/edsr-x4/sr4ir", "epochs=7", history=HISTORY[:1]),
    }
    out, told = tmp_path / "report.html", []
    write_report(runs, str(out), Shown(count=2), told=lambda *now: told.append(now))
    seen = read(out)
    assert seen.all("html")[0]["lang"] == "en"
    assert told[-1] == ("images by SR4IR", 8, 100)
    # A row for each of 2 first, 2 worst and 2 best images: LR, bilinear, both runs, HR.
    assert len(seen.all("img")) == 6 * 5
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in seen.all("img"))
    drawn = [svg for svg in seen.all("svg") if svg.get("role") == "img"]
    assert len(drawn) == 3  # top-1, PSNR, SSIM
    assert "31.5 at epoch 2" in drawn[0]["aria-label"]
    for words in ("31.5", "22.75", "0.6543", "unfinished after 2 of 7 epochs", "epochs 20 7"):
        assert words in seen.text, words
    assert "First of val" in seen.text
    assert "Worst of SR4IR" in seen.text
    assert small_data in seen.text


def test_worst_and_best_are_those_of_the_last_run(published, tmp_path):
    from sr4ir_dist.analysis.comparison import compare, figures

    runs = {"S": published("drawn_cls/edsr-x4/s"), "T": published("drawn_cls/x4/l2t")}
    compared = compare(runs)
    found = figures(compared, "T", None)
    groups, said = images.choose(compared, count=2, judged=8)
    assert "first 8 images" in said
    lines = [[float(line.split()[-2]) for line, _ in group.rows] for group in groups]
    assert lines[0] == [round(value, 1) for value in found[:2]]
    assert lines[1] == [round(value, 1) for value in sorted(found)[:2]]
    assert lines[2] == [round(value, 1) for value in sorted(found)[::-1][:2]]


@pytest.mark.parametrize(
    ("name", "columns"),
    [("drawn_seg/h2t", 2), ("drawn_det/edsr-x4/sr4ir", 4), ("drawn_cls/edsr-x4/s", 4)],
)
def test_every_kind_of_run_has_a_page(published, tmp_path, name, columns):
    out = tmp_path / "report.html"
    (run,) = write_report({"it": published(name)}, str(out), Shown(count=1))
    seen = read(out)
    assert len(seen.all("img")) % columns == 0
    assert len(seen.all("img")) >= columns
    assert run.final == {}
    assert "No run was evaluated yet" in seen.text


def test_runs_that_see_different_images_are_shown_apart(published, tmp_path):
    runs = {"a": published("drawn_cls/edsr-x4/s"), "b": published("drawn_cls/x8/l2t")}
    out = tmp_path / "report.html"
    write_report(runs, str(out), Shown(count=1))
    seen = read(out)
    assert "the scale of b is 8" in seen.text
    assert len(seen.all("img")) == 2 * 3 * 4


def test_what_files_say_is_text(published, tmp_path):
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    history = [HISTORY[0] | {evil: 1.0, "nan": float("nan"), "words": evil, "epoch": 1}]
    run = published("drawn_cls/x4/l2t", f"task.weights={evil}", history=history)
    # A finished run, whose result has a note.
    step = checkpoint.load(checkpoint.resolve(run)).json("progress.json")["step"]
    Path(run, "result.json").write_text(json.dumps({"notes": [evil], "steps": step}))
    out = tmp_path / "report.html"
    write_report({evil: run}, str(out), Shown(count=1), title=evil)
    seen = read(out)
    assert seen.all("script") == []
    assert all("onerror" not in attributes for _, attributes in seen.tags)
    assert all(image["src"].startswith("data:") for image in seen.all("img"))
    assert evil.split("<")[0] in seen.text
    assert "finished: 1 steps" in seen.text


def test_a_page_holds_so_many_bytes_of_images(published, monkeypatch, tmp_path):
    monkeypatch.setattr(images, "MOST_BYTES", 100_000)
    out = tmp_path / "report.html"
    write_report({"L->T": published("drawn_cls/x4/l2t")}, str(out), Shown(count=4))
    assert out.stat().st_size < 150_000
    assert re.search(r"\d+ rows are left out", read(out).text)


def test_the_papers_figures_stand_below(published, tmp_path):
    history = [{"epoch": 1, "step": 1, "top1": 12.5}]
    run = gather("ours", published("cars/edsr-x8/sr4ir", "task.classes=8", history=history))
    seen = Page(page("x", [run], []))
    assert "ours, in the paper 71.4" in seen.text
    assert "0.326" in seen.text
    assert "12.5" in seen.text


def test_the_command_makes_the_same_experiment(published):
    run = gather("it", published("drawn_cls/edsr-x4/sr4ir", "epochs=7", "losses.tdp=0.5"))
    words = shlex.split(run.command.replace("\\\n", ""))
    assert words[:3] == ["python", "jobs/train.py", "drawn_cls/edsr-x4/sr4ir"]
    changed = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    assert {"epochs=7", "losses.tdp=0.5", "sr.features=8"} <= set(changed)
    again = override(experiments.make(run.experiment.name), [*changed, "task.classes=8"])
    assert experiments.relevant(again) == experiments.relevant(run.experiment)


@pytest.mark.parametrize("text", ["a b", "123", "null", "x=y", "[1]"])
def test_any_text_is_a_value(text):
    made = override(experiments.make("cars/h2t"), [f"task.weights={json.dumps(text)}"])
    made = experiments.relevant(made)
    assert override(experiments.make("cars/h2t"), assignments(made)) == made


def test_differences_are_of_what_runs_do_not_share(published):
    runs = [
        gather("a", published("drawn_cls/edsr-x4/s")),
        gather("b", published("drawn_cls/edsr-x4/s", "epochs=7")),
    ]
    assert differences(runs) == {"epochs": ["20", "7"]}


def test_damaged_runs_are_named(published, tmp_path):
    out = str(tmp_path / "report.html")
    with pytest.raises(ValueError, match="neither a checkpoint nor a run"):
        write_report({"x": str(tmp_path / "none")}, out)
    run = published("drawn_cls/edsr-x4/s", "seed=3")
    weights = Path(checkpoint.resolve(run), "sr.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8] + b"damaged!")
    with pytest.raises(ValueError, match="sr.safetensors of checkpoint .* is not what was"):
        write_report({"x": run}, out)
    assert not Path(out).exists()
    weights.unlink()
    with pytest.raises(ValueError, match="has lost sr.safetensors"):
        write_report({"x": run}, out)
    Path(run, "result.json").write_text("[]")
    with pytest.raises(ValueError, match="result.json is not the result of a run"):
        gather("x", run)


def test_a_dataset_that_is_gone_costs_the_images_alone(published, tmp_path):
    from random_runs import publish_random

    run = str(tmp_path / "run")
    small = ("sr.blocks=1", "sr.features=8")
    publish_random(run, "drawn_cls/edsr-x4/s", *small, data=str(tmp_path / "gone"))
    out = tmp_path / "report.html"
    write_report({"S": run}, str(out))
    assert "No images (name the dataset by --data" in read(out).text
    with pytest.raises(ValueError, match="gone"):
        write_report({"S": run}, str(out), Shown(data=(str(tmp_path / "gone"),)))


def test_a_report_from_a_bucket_into_it(s3, small_data):
    from random_runs import publish_random

    from sr4ir_dist import storage

    bucket = s3()
    run = storage.join(bucket, "runs", "x")
    size = ("data.resize=32", "data.crop=32", "evaluation.border=2", "task.classes=8")
    publish_random(run, "drawn_cls/x4/l2t", *size, data=small_data, history=HISTORY)
    out = storage.join(bucket, "report.html")
    write_report({"L->T": run}, out, Shown(count=1))
    seen = Page(storage.read_bytes(out).decode())
    assert len(seen.all("img")) == 3 * 4
    assert f"--storage {bucket}/runs" in seen.text


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [-3.5, 1e6], [1e-7, 2e-7], [99.99, 100.0]])
def test_curves_stay_inside_their_picture(values):
    drawn = str(chart("x", {"a": [(epoch + 1, value) for epoch, value in enumerate(values)]}))
    (path,) = re.findall(r'class="line" style="[^"]*" d="M([^"]*)"', drawn)
    places = [tuple(map(float, place.split())) for place in path.split("L")]
    assert len(places) == len(values)
    assert all(0 <= x <= 440 and 0 <= y <= 250 for x, y in places)
    if len(values) > 1 and values[0] < values[1]:
        assert places[0][0] < places[1][0]
        assert places[0][1] > places[1][1]
