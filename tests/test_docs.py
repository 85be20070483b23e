"""The documents are right: commands parse, examples run, links lead to files. tests/test_figures.py has the figures."""

import argparse
import glob
import importlib
import os
import re
import runpy
import shlex
import sys
import tomllib
from itertools import takewhile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

import eval_probe
import train
from configs import base
from igpt import __main__ as command_line
from igpt.errors import UserError
from igpt.run.flags import parse_with_config

ROOT = Path(__file__).parents[1]
DOCUMENTS = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCKS = {name: re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL) for name, text in DOCUMENTS.items()}
PROSE = {name: re.sub(r"```.*?```", "", text, flags=re.DOTALL) for name, text in DOCUMENTS.items()}

START = r"python (?:train|eval_probe)\.py|python -m igpt|\bigpt [a-z]|python benchmarks/"
COMMAND = re.compile(rf"(?:{START}).*?(?=$|'\])", re.MULTILINE)
PROBE = "eval_probe.py --config=configs/probe_digits.py --model=a"
PLACEHOLDERS = {"SIZE": "l", "DATASET": "cifar10", "$I": "0", "$JOB_COMPLETION_INDEX": "0"}


# Commands


def commands_of(name: str) -> list[str]:
    """The commands in the blocks of a document, and those in its prose that have flags; each on one line."""
    blocks = [re.sub(r"\s*\\\n\s*|\n\s+(?=--)", " ", block) for kind, block in BLOCKS[name] if kind != "python"]
    spans = [span for span in re.findall(r"`([^`]+)`", PROSE[name]) if COMMAND.match(span) and "--" in span]
    return COMMAND.findall("\n".join([*blocks, *spans]))


COMMANDS = [pytest.param(line, id=f"{name}: {line[:60]}") for name in DOCUMENTS for line in commands_of(name)]


def parse(command: str, monkeypatch) -> None:
    """Parses a command of a document with the parser that would run it. Ends in an error where that one would."""
    for name, value in PLACEHOLDERS.items():
        command = command.replace(name, value)
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(takewhile(lambda word: not set(word) <= set("&;<>|()"), lexer))
    monkeypatch.chdir(ROOT)
    match words:
        case ["python", "train.py", *flags]:
            own = [] if any(flag.startswith("--config=") for flag in flags) else ["--config=configs/base.py"]
            parse_with_config(train.parser(), [*own, *flags])  # without --config, a run's own fields are overridden
        case ["python", "eval_probe.py", *flags]:
            parse_with_config(eval_probe.parser(), flags)
        case ["igpt", name, *_] | ["python", "-m", "igpt", name, *_]:
            if name in command_line.COMMANDS:
                module = importlib.import_module(command_line.COMMANDS[name][0])
                monkeypatch.setattr(module, "run", lambda args: None)
            command_line.main(words[words.index(name) :])
        case ["python", script, *_]:
            parse_benchmark(script, words[1:], monkeypatch)


class ParsedError(Exception):
    """A benchmark got as far as its work."""


def parse_benchmark(script: str, argv: list[str], monkeypatch) -> None:
    """Runs a benchmark up to the end of its `parse_args`."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(parser, *args):
        real(parser, *args)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    with mock.patch.dict(os.environ), pytest.raises(ParsedError):
        runpy.run_path(script, run_name="__main__")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_documents_parses(command, monkeypatch):
    parse(command, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "python train.py --config=configs/digits.py",
        "python train.py --config=configs/digits.py --workdir=runs/x --learning_rate=1",
        "python train.py --config=configs/digits.py --workdir=runs/x --config.optim.learning_rat=1",
        "python train.py --config=configs/digits.py --workdir=runs/x --config.train.steps=many",
        "python train.py --config=configs/absent.py --workdir=runs/x",
        "python train.py --config=configs/imagenet.py:huge --workdir=runs/x",
        "python eval_probe.py --config=configs/probe_digits.py --model=a --workdir=b --config.optim.learning_rate=1",
        "igpt smaple --model=a --out=b",
        "igpt sample --model=a --out=b --top_q=1",
        "igpt export --model=a",
        "igpt plan --config=configs/digits.py --topology=v5e:2x4 --config.train.stepz=1",
        "python -m igpt.sample --model=a --out=b",
        "python benchmarks/plan.py --enoughs=1",
        "python benchmarks/absent.py --out=a",
    ],
)
def test_a_wrong_command_in_a_document_would_be_found(command, monkeypatch):
    assert COMMAND.findall(command) == [command]
    with pytest.raises((UserError, SystemExit, FileNotFoundError)):
        parse(command, monkeypatch)


def test_no_command_of_the_documents_is_overlooked():
    found = [command for name in DOCUMENTS for command in commands_of(name)]
    for start in ("train.py --config", "eval_probe.py --config", "igpt plan --"):
        assert sum(start in command for command in found) == sum(text.count(start) for text in DOCUMENTS.values())
    assert len(found) > 40


def test_every_subcommand_in_the_prose_exists():
    named = set(re.findall(r"`igpt ([a-z]+)", "".join(PROSE.values())))
    assert named <= set(command_line.COMMANDS) and {"palette", "prepare", "plan"} <= named


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_config_field_in_the_prose_exists(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = base.get_config()
    fields = r"`(?:config\.)?(data|palette|model|objective|optim|train|mesh)\.(?!py`|npy`)(\w+)(?:=[^`]*)?`"
    for group, field in re.findall(fields, PROSE[name]):
        assert field in config[group], f"{group}.{field}"
    for flag in re.findall(r"`(--config\.(?!a\.b)[^`]+)`", PROSE[name]):
        of_a_run = re.match(r"--config\.(data|palette|model|objective|optim|train|mesh)\.", flag)
        script = "train.py --config=configs/base.py" if of_a_run else PROBE
        parse(f"python {script} --workdir=b {flag}", monkeypatch)


def test_every_extra_that_the_documents_install_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set(re.findall(r'pip install[^`\n]*"(?:\.|igpt)\[(\w+)\]"', "".join(DOCUMENTS.values())))
    assert named <= set(extras) and {"hub", "tfds", "test", "torch", "tpu"} <= named


def test_every_python_one_liner_of_the_documents_compiles():
    lines = re.findall(r'python -c "(.*)"', "".join(DOCUMENTS.values()))
    assert lines
    for line in lines:
        compile(line, "document", "exec")


# README


def test_the_readme_is_short_and_keeps_its_two_commands():
    lines = DOCUMENTS["README.md"].splitlines()
    assert len(lines) <= 140
    assert "pip install -e . && python train.py --config=configs/digits.py --workdir=runs/digits" in lines
    assert [line for line in lines if line.endswith("python -m pytest")] == [
        'pip install -e ".[test]" && python -m pytest'
    ]


def test_the_python_of_the_readme_runs(tiny_config, tmp_path, monkeypatch):
    tiny_config.train.update(steps=1, eval_every=1, num_samples=0)
    train.run(tiny_config, tmp_path / "runs" / "digits")
    monkeypatch.chdir(tmp_path)
    (example,) = [block for kind, block in BLOCKS["README.md"] if kind == "python"]
    names = run(example)
    assert names["images"].shape[:3] == (16, 8, 8) and names["images"].dtype == np.uint8
    assert names["features"].shape == (tiny_config.model.depth + 1, 16, tiny_config.model.width)


# Links and files


@pytest.mark.parametrize("path", ["README.md", "CHANGELOG.md", *(f"docs/{name}" for name in DOCUMENTS)])
def test_every_link_of_the_documents_leads_to_a_file(path):
    path = ROOT / path.replace("docs/README", "README")
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        file, _, anchor = link.partition("#")
        if file.startswith("https:"):
            continue
        target = path.parent / file if file else path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings]
            assert anchor in anchors, link


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_that_the_documents_name_exists(name):
    for file in re.findall(r"`((?:benchmarks|configs|docs|igpt|tests)/[\w./*-]*)", PROSE[name]):
        assert glob.glob(str(ROOT / file)), file


def test_the_layout_of_the_readme_names_what_exists():
    (block,) = [block for kind, block in BLOCKS["README.md"] if block.startswith("train.py ")]
    names = re.findall(r"[\w/]+(?:\.py|/)(?=\s)", block)
    assert len(names) > 10 and all((ROOT / name).exists() for name in names)


def test_the_layout_page_names_every_module():
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "igpt").rglob("*.py") if path.name != "__init__.py"}
    assert set(re.findall(r"^\| `(igpt/\S+\.py)`", DOCUMENTS["layout.md"], re.MULTILINE)) == modules


def test_the_layout_page_has_the_layers_that_imports_obey():
    (contract,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (shown, *_) = (block for _, block in BLOCKS["layout.md"])
    assert shown.split("\n")[:-1] == contract["layers"]


def test_the_changelog_names_the_new_place_of_every_module():
    rows = re.findall(r"^\| `igpt\..* \| (.*) \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert len(rows) > 15
    for module in re.findall(r"`(.*?)`", " ".join(rows)):
        assert importlib.util.find_spec(module), module


# The examples of the Hugging Face guide


EXAMPLES = [block for kind, block in BLOCKS["huggingface.md"] if kind == "python"]


@pytest.fixture
def hub_in_miniature(tmp_path, monkeypatch):
    """The working directory: a small random `openai/imagegpt-small`, and a photo."""
    torch.manual_seed(0)
    config = transformers.ImageGPTConfig(vocab_size=32, n_positions=42, n_embd=22, n_layer=3, n_head=2)
    transformers.ImageGPTForCausalImageModeling(config).save_pretrained(tmp_path / "openai" / "imagegpt-small")
    clusters = np.random.default_rng(0).uniform(-1, 1, (31, 3)).tolist()
    processor = ImageGPTImageProcessorPil(clusters=clusters, size={"height": 6, "width": 7})
    processor.save_pretrained(tmp_path / "openai" / "imagegpt-small")
    noise = np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cats.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


def run(example: str) -> dict:
    """Runs a block of Python and returns its names."""
    names = {}
    exec(compile(example, "document", "exec"), names)
    return names


def test_the_documented_examples_are_there():
    assert len(EXAMPLES) == 4


def test_the_feature_example_gives_transformers_hidden_states(hub_in_miniature):
    names = run(EXAMPLES[0])
    theirs = transformers.ImageGPTModel.from_pretrained(hub_in_miniature / "openai" / "imagegpt-small").eval()
    with torch.no_grad():
        expected = theirs(names["inputs"]["input_ids"]).last_hidden_state
    np.testing.assert_allclose(names["last_hidden_states"], expected, rtol=0, atol=1e-5)


def test_the_generation_example_ends_in_a_picture(hub_in_miniature):
    names = run(EXAMPLES[1])
    assert names["output"].shape == (4, 43) and len(np.unique(names["samples"], axis=0)) == 4
    picture = np.asarray(Image.open(hub_in_miniature / "samples.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


@pytest.mark.filterwarnings("ignore:.*initialised at random")
def test_the_classification_example_gives_logits(hub_in_miniature):
    assert run(EXAMPLES[2])["logits"].shape == (1, 2)


@pytest.mark.filterwarnings("ignore:.*initialised at random")
def test_the_training_example_learns_and_transformers_loads_it(hub_in_miniature):
    names = run(EXAMPLES[3])
    assert names["loss"] < np.log(10)
    theirs = transformers.ImageGPTForImageClassification.from_pretrained("fine-tuned").eval()
    tokens = np.asarray(names["inputs"]["input_ids"])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits
    np.testing.assert_allclose(names["model"](tokens).logits, expected, rtol=0, atol=1e-5)
