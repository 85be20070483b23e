"""The page, clicked through in headless Chromium. What it draws is what `igpt sample` writes."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from igpt.__main__ import main as run_igpt
from tests.helpers import ROOT, grey_pictures, random_params, write_run

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="needs chromium")]

HEIGHT, WIDTH, NUM, SEED = 4, 5, 6, 11


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with random weights that differ from pixel to pixel, 60 training images and a probe."""
    from igpt.run import checkpoint
    from igpt.run.directory import load_config

    folder = tmp_path_factory.mktemp("browser")
    images, labels = grey_pictures()
    np.savez(folder / "images.npz", images=images, labels=labels, names=("dark", "medium", "light"))
    path = write_run(folder / "run", f"npz:{folder}/images.npz", steps=(), depth=2)
    checkpoint.save_params(path, random_params(load_config(path).network()), step=2)
    (path / "probe").mkdir()
    fits = [{"layer": layer, "test_accuracy": 0.5 + layer / 10} for layer in range(3)]
    (path / "probe" / "probe.json").write_text(json.dumps({"pretrained": {"best_layer": 2, "layers": fits}}))
    Image.new("RGB", (60, 40), "teal").save(path / "probe" / "probe.png")
    return path


@pytest.fixture(scope="module")
def address(run):
    """The address of `igpt demo` in a process of its own."""
    command = [sys.executable, "-m", "igpt", "demo", f"--model={run}", "--port=0", "--compilation_cache=off"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield re.search(r"http://\S+", server.stdout.readline())[0]
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def page(address):
    """The open page. Every request must go to the page's own address, and no script may fail."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, problems = browser.new_page(viewport={"width": 1180, "height": 900}), []
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: problems.append(error))
        page.on("console", lambda message: problems.append(message.text) if is_a_problem(message) else None)
        page.on("request", lambda request: None if local(request.url, address) else problems.append(request.url))
        page.goto(address)
        page.locator("#picture").wait_for()
        yield page
        browser.close()
        assert not problems


def is_a_problem(message):
    """Whether the console shows an error other than the refusal of a file that is no picture."""
    return message.type == "error" and "status of 400" not in message.text


def local(url, address):
    return url.startswith((address, "data:", f"blob:{address}"))


def shown(page):
    """The images that the page has drawn, uint8 [N, H, W, 3]."""
    urls = page.eval_on_selector_all("#drawn img", "images => images.map(image => image.src)")
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls])


def cells(path, columns):
    """The images of a picture that `igpt sample` wrote, in one row: uint8 [columns, H, W, 3]."""
    picture = np.asarray(Image.open(path))
    scale = -(-64 // WIDTH)
    rows = [
        np.arange(2 + column * (WIDTH * scale + 2), WIDTH * scale + 2 + column * (WIDTH * scale + 2), scale)
        for column in range(columns)
    ]
    return np.stack([picture[2 : 2 + HEIGHT * scale : scale, row] for row in rows])


def photo(path):
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (37, 52, 3), np.uint8)).save(path)
    return path


def test_a_dropped_picture_is_completed_as_igpt_sample_does(page, run, tmp_path):
    page.set_input_files("#file", photo(tmp_path / "photo.png"))
    page.locator("#examples [aria-pressed=true]").wait_for(state="detached")
    for field, value in (("num", NUM), ("seed", SEED), ("top_k", 9)):
        page.fill(f"#{field}", str(value))
    page.eval_on_selector("#keep", "it => { it.value = 0.25; it.dispatchEvent(new Event('input')); }")
    page.eval_on_selector("#temperature", "it => { it.value = 1.5; it.dispatchEvent(new Event('input')); }")
    page.evaluate(
        "window.seen = [];"
        "new MutationObserver(() => window.seen.push(document.getElementById('status').textContent))"
        ".observe(document.getElementById('status'), {childList: true})"
    )
    page.get_by_role("button", name="Complete").click()
    page.get_by_text("drawn in").wait_for()
    assert [text for text in page.evaluate("window.seen") if text.startswith("row")][-1] == "row 4 of 4"
    flags = ["--keep=0.25", f"--num={NUM}", f"--seed={SEED}", "--top_k=9", "--temperature=1.5"]
    run_igpt(["sample", f"--model={run}", f"--complete={tmp_path}/photo.png", *flags, f"--out={tmp_path}/c.png"])
    np.testing.assert_array_equal(shown(page), cells(tmp_path / "c.png", NUM + 2)[1:-1])
    assert len(np.unique(shown(page), axis=0)) == NUM


def test_samples_are_those_of_igpt_sample(page, run, tmp_path):
    page.fill("#num", "1")
    page.fill("#top_k", "0")
    page.fill("#seed", str(SEED))
    page.eval_on_selector("#temperature", "it => { it.value = 1; it.dispatchEvent(new Event('input')); }")
    page.get_by_role("button", name="Sample").click()
    page.locator("#drawn img").nth(1).wait_for(state="detached")
    page.get_by_text("drawn in").wait_for()
    run_igpt(["sample", f"--model={run}", "--num=1", f"--seed={SEED}", f"--out={tmp_path}/s.png"])
    np.testing.assert_array_equal(shown(page), cells(tmp_path / "s.png", 1))


def test_layers_show_their_accuracy_and_the_nearest_images(page):
    page.locator("#examples button").nth(2).click()
    page.locator("#examples button[aria-pressed=true]").wait_for()
    assert page.locator("#layer option").all_inner_texts() == ["0: 50.0 %", "1: 60.0 %", "2: 70.0 %"]
    assert page.input_value("#layer") == "2"
    page.get_by_role("button", name="Nearest training images").click()
    page.get_by_text("by layer 2").wait_for()
    captions = page.locator("#neighbours figcaption").all_inner_texts()
    assert len(captions) == 8 and all(re.fullmatch(r"(dark|medium|light) [01]\.\d{3}", text) for text in captions)
    assert page.eval_on_selector("#probe", "image => image.naturalWidth") == 60


def test_a_file_that_is_no_picture_is_explained(page, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    page.set_input_files("#file", tmp_path / "notes.png")
    page.get_by_text("cannot be read as an image").wait_for()
    assert page.locator("#status.error").count() == 1
    (tmp_path / "large.png").write_bytes(bytes((16 << 20) + 1))
    page.set_input_files("#file", tmp_path / "large.png")
    page.get_by_text("larger than 16 MiB").wait_for()
    page.set_input_files("#file", photo(tmp_path / "good.png"))
    page.locator("#status.error").wait_for(state="detached")


def choose_example(page, number):
    page.locator("#examples button").nth(number).click()
    page.locator(f"#examples button:nth-child({number + 1})[aria-pressed=true]").wait_for()


def held(page, waiting, count):
    """Waits until `waiting` has so many requests."""
    while len(waiting) < count:
        page.wait_for_timeout(50)


def test_a_slow_answer_is_not_shown_under_another_picture(page):
    choose_example(page, 2)
    waiting = []
    page.route("**/nearest?*", lambda route: waiting.append(route))
    page.get_by_role("button", name="Nearest training images").click()
    held(page, waiting, 1)
    choose_example(page, 3)
    waiting[0].continue_()
    page.locator("#stop").wait_for(state="hidden")
    page.unroute("**/nearest?*")
    assert page.locator("#neighbours figure").count() == 0 and page.locator("#status").inner_text() == ""


def test_a_file_can_be_chosen_again_and_may_change_on_disk_meanwhile(page, tmp_path):
    choose_example(page, 0)
    page.set_input_files("#file", photo(tmp_path / "photo.png"))
    page.locator("#examples [aria-pressed=true]").wait_for(state="detached")
    (tmp_path / "photo.png").write_bytes(b"another file")
    page.get_by_role("button", name="Complete").click()
    page.get_by_text("drawn in").wait_for()
    assert page.input_value("#file") == ""  # otherwise, the browser would report no change


def test_a_refused_picture_leaves_the_one_that_is_shown(page, tmp_path):
    choose_example(page, 1)
    waiting = []
    page.route("**/picture?*", lambda route: waiting.append(route))
    page.set_input_files("#file", photo(tmp_path / "slow.png"))
    held(page, waiting, 1)
    (tmp_path / "notes.png").write_text("no picture")
    page.set_input_files("#file", tmp_path / "notes.png")
    held(page, waiting, 2)
    with page.expect_response("**/picture?*"):
        waiting[0].continue_()
    page.wait_for_timeout(200)
    waiting[1].continue_()
    page.get_by_text("cannot be read as an image").wait_for()
    page.unroute("**/picture?*")
    assert page.evaluate("chosen") == 1
    assert page.locator("#examples button").nth(1).get_attribute("aria-pressed") == "true"


def test_a_model_that_does_not_draw_and_a_probe_of_another_step_are_explained(page, address):
    about = page.request.get(f"{address}about").json()
    other = page.context.browser.new_page()
    other.set_default_timeout(120_000)
    changed = {"causal": False, "can_complete": False, "can_sample": False, "probe_step": 7}
    other.route("**/about", lambda route: route.fulfill(json=about | changed))
    other.goto(address)
    other.get_by_text("was trained with the BERT objective: it predicts masked pixels and cannot sample").wait_for()
    assert other.get_by_text("probe of step 7").is_visible()
    other.close()


def test_every_tab_stop_does_something(page):
    assert page.locator("[tabindex]").count() == 0
