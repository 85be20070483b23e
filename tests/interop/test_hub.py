"""References to models: paths of directories, and ids of the Hugging Face hub."""

import fnmatch
import sys
import types

import pytest

import igpt
from igpt.errors import UserError
from igpt.interop.hub import resolve


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
    assert igpt.load("someone/image.gpt-2").palette.vocab_size == 17
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
        return str(tmp_path / "hub")

    hub(answer)
    assert resolve("someone/something") == tmp_path / "hub"
    assert [any(fnmatch.fnmatch("pytorch_model.bin", p) for p in patterns) for patterns in asked] == [False, True]


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
    with pytest.raises(UserError, match=r'pip install "igpt\[hub\]"'):
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
