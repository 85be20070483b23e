"""Models on the hub: pushed with huggingface_hub's own client to a stand-in server, and used from there."""

import json
import os
import subprocess
import sys

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest

import igpt
from igpt.__main__ import main as run_igpt
from igpt.data.classes import save_names
from igpt.errors import UserError
from igpt.interop import weight_files
from igpt.interop.hub import check_push, push
from tests.helpers import write_imported_run
from tests.hub_server import READER, TOKEN

NAMES = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_imported_run(tmp_path_factory.mktemp("runs") / "run")


ELSEWHERE = """
import json, re, sys
import huggingface_hub, numpy as np, transformers
from PIL import Image

card = huggingface_hub.ModelCard.load("someone/draws")
(recipe,) = [code for code in re.findall(r"```python\\n(.*?)```", card.text, re.DOTALL) if "transformers" in code]
exec(recipe)
image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8))
tokens_of = transformers.AutoImageProcessor.from_pretrained("someone/names")
classifier = transformers.AutoModelForImageClassification.from_pretrained("someone/names")
label = classifier.config.id2label[classifier(**tokens_of(image, return_tensors="pt")).logits.argmax().item()]
samples = [list(Image.open(f"sample-{i}.png").size) for i in range(4)]
more = model.generate(do_sample=True)
assert "igpt" not in sys.modules
json.dump([card.data.to_dict(), samples, [*tokens.shape], [*more.shape], len(set(map(tuple, tokens.tolist()))),
           label], open("found.json", "w"))
"""


def test_transformers_samples_classifies_and_shows_the_card_given_only_what_was_pushed(hub, run, tmp_path):
    state, variables = hub
    classifier = write_imported_run(tmp_path / "run", num_classes=5, sos=False)
    save_names(NAMES, classifier)
    run_igpt(["export", f"--model={run}", "--push=someone/draws", "--license=mit"])
    run_igpt(["export", f"--model={classifier}", "--push=someone/names"])
    assert [repo["commits"] for repo in state.repos.values()] == [1, 1]
    (tmp_path / "elsewhere").mkdir()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    process = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], env=env, cwd=tmp_path / "elsewhere", capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    metadata, sizes, drawn, alone, different, label = json.loads((tmp_path / "elsewhere" / "found.json").read_text())
    assert metadata["license"] == "mit" and metadata["pipeline_tag"] == "unconditional-image-generation"
    assert sizes == [[7, 5]] * 4 and drawn == [4, 35] and alone == [1, 36] and different == 4
    image = np.random.default_rng(0).integers(0, 256, (1, 5, 7, 3), np.uint8)
    ours = igpt.load(classifier)
    logits = ours.model.classify(jnp.asarray(ours.tokenizer.encode(image).reshape(1, 35)))
    assert label == NAMES[int(np.argmax(logits))]


def test_what_was_pushed_is_loaded_by_its_id(hub, run):
    run_igpt(["export", f"--model={run}", "--push=someone/draws"])
    ours, back = igpt.load(run), igpt.load("someone/draws")
    tokens = jnp.asarray(np.arange(35)[None] % 17)
    assert np.array_equal(ours.model(tokens), back.model(tokens))
    assert np.array_equal(ours.tokenizer.centers, back.tokenizer.centers)


def test_a_second_push_is_one_commit_that_leaves_no_file_of_the_first(hub, run, monkeypatch, tmp_path):
    state, _ = hub
    with monkeypatch.context() as small:
        small.setattr(weight_files, "MAX_SHARD_BYTES", 20_000)
        run_igpt(["export", f"--model={run}", "--push=someone/draws"])
    run_igpt(["export", f"--model={run}", f"--out={tmp_path}/first"])
    repo = state.repos["models", "someone/draws"]
    assert "model.safetensors.index.json" in repo["files"]
    own = {"notes.txt", "models/other.safetensors", "model_int8/weights.safetensors", "model-ema.safetensors"}
    repo["files"] |= dict.fromkeys(own, b"of the user")
    run_igpt(["export", f"--model={tmp_path}/first", "--push=someone/draws"])
    names = {"README.md", "config.json", "generation_config.json", "preprocessor_config.json", "model.safetensors"}
    assert set(repo["files"]) == names | own and repo["commits"] == 2
    assert repo["files"]["README.md"] == (tmp_path / "first" / "README.md").read_bytes()


def test_a_private_repository_stays_private(hub, run, monkeypatch):
    state, _ = hub
    run_igpt(["export", f"--model={run}", "--push=someone/secret", "--private"])
    assert state.repos["models", "someone/secret"]["private"]
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="the hub sent no such model: .*401"):
        igpt.load("someone/secret")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    state.add("someone/open", {})
    with pytest.raises(SystemExit) as caught:
        run_igpt(["export", f"--model={run}", "--push=someone/open", "--private"])
    assert caught.value.code == 2 and not state.repos["models", "someone/open"]["files"]


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        ("", "someone/draws", "there is no token to push to someone/draws; run hf auth login, or set"),
        ("hf_other", "someone/draws", "the hub does not know the token; run hf auth login again"),
        (READER, "someone/draws", "the token may not write there .*You don't have the rights"),
        (TOKEN, "another/draws", "the token may not write there .*under another.*or another name"),
        (TOKEN, "draws", "--push=draws is no id on the hub: .*such as user/name"),
        (TOKEN, "someone/a--b", "--push=someone/a--b is no id on the hub: .*such as user/name"),
        (TOKEN, "gs://bucket/draws", "is no id on the hub"),
    ],
)
def test_a_push_that_is_refused_says_why(hub, monkeypatch, tmp_path, token, repo, message):
    state, _ = hub
    monkeypatch.setenv("HF_TOKEN", token)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(UserError, match=message):
        push(tmp_path, repo)
    assert not state.repos


def test_without_network_or_library_a_push_says_so(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"someone/draws was not pushed: the hub cannot be reached \(.*try again later"):
        push(tmp_path, "someone/draws")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[hub\]"'):
        check_push("someone/draws")


@pytest.mark.parametrize("flags", [[], ["--out=hf", "--private"], ["--push=draws"]], ids=str)
def test_the_command_needs_a_place_before_it_reads_the_model(flags, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run_igpt(["export", "--model=absent", *flags])
    assert caught.value.code == 2 and "absent" not in capsys.readouterr().err and not [*tmp_path.iterdir()]
