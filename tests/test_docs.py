"""The code in the guides runs as it stands there."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

GUIDE = Path(__file__).parents[1] / "docs" / "huggingface.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)


@pytest.fixture
def hub_in_miniature(tmp_path, monkeypatch):
    """A folder with `openai/imagegpt-small`, random and small, and a photo, as the current one."""
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
    names = {}
    exec(compile(example, str(GUIDE), "exec"), names)
    return names


def test_the_documented_examples_are_there():
    assert len(EXAMPLES) == 4


def test_the_feature_example_gives_the_hidden_states_of_transformers(hub_in_miniature):
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
def test_the_training_example_learns_and_transformers_loads_the_result(hub_in_miniature):
    names = run(EXAMPLES[3])
    assert names["loss"] < np.log(10)
    theirs = transformers.ImageGPTForImageClassification.from_pretrained("fine-tuned").eval()
    tokens = np.asarray(names["inputs"]["input_ids"])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits
    np.testing.assert_allclose(names["model"](tokens).logits, expected, rtol=0, atol=1e-5)
