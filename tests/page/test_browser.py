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
