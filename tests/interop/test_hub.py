"""References to models: paths of directories, and ids of the Hugging Face hub."""

import fnmatch
import re
import sys
import types

import pytest

import igpt
from igpt.errors import UserError
from igpt.files import as_path
from igpt.interop.hf_config import ImageGPTConfig
from igpt.interop.hub import resolve
from igpt.interop.processor import ImageGPTImageProcessor
from tests.helpers import ROOT


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """hub(answer) replaces huggingface_hub's snapshot_download with `answer`, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def install(answer):
        monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=answer))

    return install


def test_a_hub_id_is_fetched_and_loaded(hub, hf):
    asked = []

    def answer(ref, revision, allow_patterns):
        asked.append((ref, revision, allow_patterns))
        return str(hf)

    hub(answer)
    assert igpt.load("someone/image.gpt-2").tokenizer.vocab_size == 17
    assert [ref for ref, _, _ in asked] == ["someone/image.gpt-2"]
    resolve("someone/else", revision="v2")
    assert asked[-1][:2] == ("someone/else", "v2")
    for file in ("config.json", "preprocessor_config.json", "model.safetensors", "model-00001-of-00002.safetensors"):
        assert any(fnmatch.fnmatch(file, pattern) for pattern in asked[0][2])
    for file in ("pytorch_model.bin", "optimizer.pt", "tf_model.h5", "run.py"):
        assert not any(fnmatch.fnmatch(file, pattern) for pattern in asked[0][2])


def test_pytorch_weights_are_fetched_only_where_there_are_no_others(hub, tmp_path):
    (tmp_path / "hub").mkdir()
    asked = []

    def answer(ref, revision, allow_patterns):
        asked.append(allow_patterns)
        if "pytorch_model.bin" in allow_patterns:
            (tmp_path / "hub" / "pytorch_model.bin").touch()
        return str(tmp_path / "hub")

    hub(answer)
    assert resolve("someone/something") == tmp_path / "hub"
    assert [any(fnmatch.fnmatch("pytorch_model.bin", p) for p in patterns) for patterns in asked] == [False, True]


def test_a_cache_without_the_weights_is_told_from_a_model(hub, tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text('{"model_type": "imagegpt"}')
    hub(lambda *args, **kwargs: str(tmp_path / "hub"))  # as huggingface_hub does when it cannot reach the hub
    with pytest.raises(UserError, match="no weights of someone/something, .* only a part .*the hub cannot be reached"):
        igpt.load("someone/something")
    assert resolve("someone/something", files=["config.json"]) == tmp_path / "hub"


@pytest.mark.parametrize("error", [OSError("offline\nmore"), ValueError("no such repository"), RuntimeError()])
def test_an_error_of_the_hub_becomes_one_line(hub, error):
    def answer(*args, **kwargs):
        raise error

    hub(answer)
    with pytest.raises(UserError) as caught:
        igpt.load("someone/something")
    assert str(caught.value) == (
        "there is no directory someone/something, and the hub sent no such model: "
        + {OSError: "offline", ValueError: "no such repository", RuntimeError: "RuntimeError"}[type(error)]
    )


def test_without_the_hub_s_library_the_message_names_the_extra(hub, monkeypatch):
    hub(None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[hub\]"'):
        igpt.load("someone/something")


def test_a_misspelt_path_fails_without_asking_the_hub(hub, tmp_path):
    def answer(*args, **kwargs):
        raise AssertionError("the hub was asked")

    hub(answer)
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    with pytest.raises(UserError, match="there is no directory runs/digit; did you mean runs/digits"):
        igpt.load("runs/digit")
    long = "x" * 97
    for ref in ("runs/typo", "runs/a/b", "../x", "./x", "/x/y", "", "a/b/c", f"{long}/y", f"y/{long}", "é/y"):
        with pytest.raises(UserError, match="give a run directory|no config.json"):
            igpt.load(ref)
    for ref in ("a/" + "x" * 5000, "a\0/b", "a\nb/c", tmp_path / "runs" / "typo"):
        with pytest.raises(UserError, match="there is no directory"):
            igpt.load(ref)


def test_configurations_and_processors_fetch_only_their_own_file(hub, hf):
    asked = []

    def answer(ref, revision, allow_patterns, **how):
        asked.append((revision, allow_patterns, how))
        return str(hf)

    hub(answer)
    ImageGPTConfig.from_pretrained("someone/imagegpt", revision="v2", token="secret", local_files_only=False)
    ImageGPTImageProcessor.from_pretrained("someone/imagegpt", cache_dir="here", force_download=True)
    assert asked == [
        ("v2", ["config.json"], dict(token="secret")),
        (None, ["preprocessor_config.json"], dict(cache_dir="here", force_download=True)),
    ]


def test_token_false_reaches_the_hub_and_asks_for_no_token(hub, hf):
    asked = []
    hub(lambda ref, **how: asked.append(how["token"]) or str(hf))
    ImageGPTConfig.from_pretrained("someone/imagegpt", token=False)
    assert asked == [False]


def test_of_a_bucket_only_the_wanted_file_is_fetched(hf, gs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for file in hf.iterdir():
        (as_path(gs) / "hf" / file.name).write_bytes(file.read_bytes())
    assert ImageGPTImageProcessor.from_pretrained(f"{gs}/hf") == ImageGPTImageProcessor.from_pretrained(hf)
    copied = {path.name.removesuffix(".fetched.json") for path in tmp_path.glob("igpt/fetched/*/*")}
    assert copied == {"preprocessor_config.json"}


def test_a_subfolder_of_the_hub_is_fetched_alone(hub, hf, tmp_path):
    asked = []
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "small").symlink_to(hf)

    def answer(ref, revision, allow_patterns):
        asked.append(allow_patterns)
        return str(tmp_path / "hub")

    hub(answer)
    assert resolve("someone/imagegpt", subfolder="small") == tmp_path / "hub" / "small"
    assert len(asked) == 1 and all(pattern.startswith("small/") for pattern in asked[0])
    with pytest.raises(UserError, match="has no folder 'large'"):
        resolve("someone/imagegpt", subfolder="large")


def test_no_file_installs_a_package_of_our_name_from_the_index():
    named = re.compile(r"""pip install (-\w+ )*["']?igpt\b""")
    files = [path for path in ROOT.rglob("*") if path.suffix in (".py", ".md", ".toml", ".yml", ".cff")]
    assert len(files) > 100
    assert [path for path in files if ".git/" not in str(path) and named.search(path.read_text())] == []
