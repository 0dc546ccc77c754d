"""Reports as people see them, in a real browser (`--chromium=PATH`)."""

import pytest
from random_runs import publish_random

from sr4ir_dist.analysis.report.write import Shown, write_report

HISTORY = [
    {"epoch": 1, "step": 1, "miou": 20.5, "psnr": 21.25, "ssim": 0.61234, "lpips": 0.4},
    {"epoch": 2, "step": 2, "miou": 31.5, "psnr": 22.75, "ssim": 0.65432, "lpips": 0.3},
]


@pytest.fixture(scope="module")
def browser(request):
    path = request.config.getoption("--chromium")
    if not path:
        pytest.skip("needs --chromium PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(published, small_data, tmp_path_factory):
    """Of three runs with long names, one of them of the paper's."""
    folder = tmp_path_factory.mktemp("report")
    runs = {
        "L->T": published("drawn_seg/x4/l2t", history=HISTORY),
        "SR4IR with a rather long label of its own": published("drawn_seg/edsr-x4/sr4ir"),
        "paper": str(folder / "run"),
    }
    small = ("data.resize=32", "data.crop=32", "evaluation.border=2", "data.center_crop=true")
    small += ("sr.blocks=1", "sr.features=8", "task.classes=8", f"sr.weights={'long/' * 40}")
    publish_random(runs["paper"], "voc_seg/edsr-x4/s2t", *small, data=small_data, history=HISTORY)
    out = folder / "report.html"
    write_report(runs, str(out), Shown(count=2))
    return out


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_shows_all_images_and_fetches_nothing(browser, report, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.goto(report.as_uri())
    assert [url for url in requests if not url.startswith("data:")] == [report.as_uri()]
    assert errors == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("img").count() == 6 * 6
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    # What is on top must be read: text in another lightness than what is below it.
    ink, paper = page.evaluate(
        "(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))"
    )
    shades = [sum(map(int, colour.strip("rgb()").split(","))) for colour in (ink, paper)]
    assert (shades[0] < shades[1]) == (scheme == "light")
    page.close()


def test_what_a_blind_reader_gets(browser, report):
    page = browser.new_page()
    page.goto(report.as_uri())
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(image.get_attribute("alt") for image in page.locator("img").all())
    assert page.get_by_role("img", name="mIoU % over the epochs").count() == 1
    assert page.get_by_role("table").count() >= 3
    assert page.get_by_role("columnheader", name="LPIPS (lower is better)").count() == 1
    page.close()
