"""The page's server, asked as a browser asks it, and as nobody should."""

import base64
import contextlib
import dataclasses
import http.client
import io
import json
import re
import socket
import threading
import time
from importlib import resources

import numpy as np
import pytest
from PIL import Image

import igpt
from igpt.draw import Sampling
from igpt.errors import UserError
from igpt.page.answers import Answers
from igpt.page.server import FILES, MAX_CONNECTIONS, MAX_UPLOAD, make_server
from igpt.sample import complete_images
from tests.helpers import grey_pictures, write_run

PROBE = {"pretrained": {"best_layer": 1, "layers": [{"layer": i, "test_accuracy": i / 4} for i in range(3)]}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    images, labels = grey_pictures()
    np.savez(folder / "images.npz", images=images, labels=labels, names=("dark", "medium", "light"))
    path = write_run(folder / "run", f"npz:{folder}/images.npz", steps=(2,), depth=2)
    (path / "probe").mkdir()
    (path / "probe" / "probe.json").write_text(json.dumps(PROBE))
    (path / "probe" / "probe.png").write_bytes(b"a picture")
    return igpt.load(path)


@contextlib.contextmanager
def serving(answers, host="127.0.0.1"):
    with make_server(answers, host, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server(run):
    with serving(Answers(run, train_images=40)) as server:
        yield server


@pytest.fixture
def ask(server):
    """ask("GET", "/about") -> (status, headers, body)."""

    def ask(method, path, body=None, **headers):
        with contextlib.closing(http.client.HTTPConnection(*server.server_address, timeout=60)) as connection:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    return ask


def pixels(data_url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data_url.removeprefix("data:image/png;base64,")))))


def png_of(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def test_the_page_needs_nothing_from_elsewhere(ask):
    for path, (name, _) in FILES.items():
        status, headers, body = ask("GET", path)
        assert status == 200 and body == resources.files("igpt.page").joinpath(name).read_bytes()
        assert not re.search(rb"https?:|//\w+\.", body.replace(b"// ", b"")), path
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self';")


def test_it_tells_what_the_model_can_do_and_what_its_probe_found(ask, run):
    status, _, body = ask("GET", "/about")
    about = json.loads(body)
    assert status == 200 and about["text"] in repr(run) and about["can_complete"] and about["can_sample"]
    assert about["layers"] == [{"layer": i, "accuracy": i / 4} for i in range(3)] and about["best_layer"] == 1
    assert (about["examples"], about["train_images"]) == (8, 40)
    assert ask("GET", "/probe.png")[2] == b"a picture"


def test_completions_come_row_by_row_and_are_those_of_the_sampler(ask, run):
    photo = png_of(np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8))
    seen = pixels("data:image/png;base64," + base64.b64encode(ask("POST", "/picture", photo)[2]).decode())
    status, _, body = ask("POST", "/complete?keep=0.5&num=3&seed=7&temperature=1.2&top_k=5", photo)
    states = [np.stack([pixels(url) for url in json.loads(line)]) for line in body.splitlines()]
    whole = complete_images(run, seen[None], 0.5, 3, 7, Sampling(1.2, 5))[0]
    assert status == 200 and len(states) == 2
    np.testing.assert_array_equal(states[-1], whole)
    np.testing.assert_array_equal(states[0][:, :3], whole[:, :3])
    assert (states[0][:, 3:] == 255).all()


def test_a_training_image_is_nearest_to_itself(ask, server):
    own = server.RequestHandlerClass.answers.train.images[[17]][0]
    found = json.loads(ask("POST", "/nearest?layer=1", png_of(own))[2])
    assert len(found) == 8 and found[0]["cosine"] == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_array_equal(pixels(found[0]["image"]), own)
    assert {one["class"] for one in found} <= {"dark", "medium", "light"}
    assert found[0]["cosine"] >= found[1]["cosine"] >= found[-1]["cosine"]


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/picture", b"no picture", 400, "the picture cannot be read as an image"),
        ("/picture?example=8", b"", 400, "there is no example 8"),
        ("/picture?example=-1", b"", 400, "the example is '-1'; a whole number is needed"),
        ("/complete?example=0&num=17&seed=0", b"", 400, "17 pictures were asked for; the page draws 1 to 16"),
        ("/complete?example=0&num=1&seed=0&keep=1", b"", 400, "keep is 1.0"),
        ("/complete?example=0&num=1&seed=0&keep=much", b"", 400, "keep is 'much'; a number is needed"),
        ("/sample?num=1&seed=4294967296", b"", 400, "seed is 4294967296"),
        ("/sample?num=1&seed=0&temperature=nan", b"", 400, "temperature is nan"),
        ("/nearest?example=0&layer=3", b"", 400, "this model has layers 0 to 2"),
        ("/../config.json", b"", 404, "there is no /../config.json"),
    ],
)
def test_a_wrong_request_is_explained(ask, path, body, status, message):
    found, _, text = ask("POST", path, body)
    assert found == status and message in text.decode()


def test_a_large_upload_is_refused_before_it_is_read(server):
    with socket.create_connection(server.server_address, timeout=20) as connection:
        connection.sendall(
            f"POST /picture HTTP/1.1\r\nHost: localhost\r\nContent-Length: {MAX_UPLOAD + 1}\r\n\r\n".encode()
        )
        answer = connection.makefile("rb").read()
    assert b" 413 " in answer and b"16,777,217 bytes; the limit is 16,777,216" in answer


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://elsewhere.example"}, {"Host": "elsewhere.example"}, {"Origin": "null"}], ids=str
)
def test_pages_of_other_sites_are_refused(ask, headers):
    for method, path in (("GET", "/about"), ("POST", "/sample?num=1&seed=0")):
        assert ask(method, path, **headers)[0] == 403


def has_ipv6():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as one:
        one.bind(("::1", 0))
        return True
    return False


@pytest.mark.parametrize(
    "name",
    ["127.0.0.2", "LOCALHOST", pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="needs IPv6"))],
)
def test_the_page_answers_to_the_name_that_it_was_given(run, name):
    with serving(Answers(run, train_images=0), name) as server:
        address = (name, server.server_address[1])
        with contextlib.closing(http.client.HTTPConnection(*address, timeout=60)) as connection:
            connection.request("GET", "/about")
            assert connection.getresponse().status == 200


def test_an_image_without_a_label_is_near_without_a_class(run):
    answers = Answers(run, train_images=8)
    labels = np.array([-1, *answers.train.labels[1:]])
    answers.train = dataclasses.replace(answers.train, labels=labels)
    own = answers.train.images[[0]][0]
    assert answers.nearest(own, 1)[0][2] == "" and all(one[2] for one in answers.nearest(own, 1)[1:])


def test_the_nearest_of_a_folder_are_different_images_also_if_some_cannot_be_read(tmp_path):
    images, labels = grey_pictures(12)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "photos" / "train" / f"class{label}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png_of(image) if i % 3 else b"no picture")
    run = write_run(tmp_path / "run", f"folder:{tmp_path}/photos", steps=(2,), depth=1, on_unreadable="skip")
    answers = Answers(igpt.load(run), train_images=500)
    readable = [i for i in range(len(answers.train)) if answers.train.read(np.array([i]))[1] == i]
    found = answers.nearest(images[1], 1)
    assert 3 < len(readable) < len(answers.train) and len(found) == min(8, len(readable))
    assert len({image.tobytes() for image, *_ in found}) == len(found)


def probed(folder, **results):
    folder.mkdir()
    (folder / "probe.json").write_text(json.dumps(results))
    return folder


def test_accuracies_are_those_of_the_step_that_is_shown_or_say_their_own(run, tmp_path):
    newest = PROBE["pretrained"]
    older = {"step": 2, "best_layer": 2, "layers": [{"layer": 2, "test_accuracy": 0.9}]}
    both = Answers(run, 10, probed(tmp_path / "both", step=5, pretrained=newest, checkpoints=[older])).about()
    assert [one["accuracy"] for one in both["layers"]] == [None, None, 0.9] and both["best_layer"] == 2
    assert both["probe_step"] is None
    other = Answers(run, 10, probed(tmp_path / "other", step=5, pretrained=newest) / "probe.json").about()
    assert other["layers"][1]["accuracy"] == 0.25 and other["probe_step"] == 5
    same = Answers(run, 10, probed(tmp_path / "same", step=2, pretrained=newest)).about()
    assert same["layers"][1]["accuracy"] == 0.25 and same["probe_step"] is None


def test_a_probe_of_a_deeper_model_is_refused(run, tmp_path):
    deeper = {"best_layer": 7, "layers": [{"layer": 7, "test_accuracy": 0.9}]}
    with pytest.raises(UserError, match="is of a model with layer 7, and this one has layers 0 to 2; name .* --probe"):
        Answers(run, 10, probed(tmp_path / "deeper", step=2, pretrained=deeper))


@pytest.mark.parametrize("content", [{}, {"pretrained": {"best_layer": 1, "layers": []}}, {"pretrained": 3}], ids=str)
def test_a_file_that_is_no_probe_is_named(run, tmp_path, content):
    with pytest.raises(UserError, match=r"probe\.json is no result of eval_probe\.py; name .* --probe, or remove"):
        Answers(run, 10, probed(tmp_path / "other", **content))


def test_a_client_that_goes_away_stops_its_drawing(server, ask, monkeypatch):
    stopped = threading.Event()

    def endless(*_):
        try:
            while True:
                time.sleep(0.01)
                yield np.zeros((1, 4, 5, 3), np.uint8)
        finally:
            stopped.set()

    with monkeypatch.context() as patched:
        patched.setattr(server.RequestHandlerClass.answers, "sample", endless)
        with socket.create_connection(server.server_address) as connection:
            connection.sendall(b"POST /sample?num=1&seed=0 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
            connection.recv(1000)
        assert stopped.wait(20)
    assert ask("POST", "/nearest?example=0&layer=0")[0] == 200


def test_more_connections_than_allowed_are_closed(server, ask):
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(socket.create_connection(server.server_address)) for _ in range(MAX_CONNECTIONS)]
        time.sleep(0.5)
        with socket.create_connection(server.server_address, timeout=20) as late:
            assert late.recv(1) == b""
        assert len(waiting) == MAX_CONNECTIONS
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            assert ask("GET", "/")[0] == 200
            return
        assert time.monotonic() < deadline


def test_a_port_in_use_and_a_missing_probe_are_explained(server, run, tmp_path):
    with pytest.raises(UserError, match="cannot be used: Address already in use; --port=0 takes a free port"):
        make_server(server.RequestHandlerClass.answers, *server.server_address)
    with pytest.raises(UserError, match="--host=192.0.2.1 .* cannot be used: .*; --host=127.0.0.1 is this machine"):
        make_server(server.RequestHandlerClass.answers, "192.0.2.1", 0)  # an address for documentation, RFC 5737
    with pytest.raises(UserError, match="--host is empty, which means every interface"):
        make_server(server.RequestHandlerClass.answers, "", 0)
    with pytest.raises(UserError, match="has no probe.json; eval_probe.py --workdir="):
        Answers(run, 10, tmp_path)
