"""Every shipped configuration can be built, and every kind of wrong one gets its own message."""

import importlib
import math
import re
import subprocess
import sys

import jax
import pytest
from flax import nnx

from igpt.config import Config
from igpt.errors import UserError
from igpt.interop.load import parameter_fields
from igpt.model import PRESETS, ImageGPT
from igpt.probe.config import ProbeConfig
from igpt.state import build_program
from tests.helpers import ROOT

TRAINABLE = [path.stem for path in (ROOT / "configs").glob("*.py") if not path.stem.startswith("probe")]
BERT = ["s:bert", "m:bert", "l:bert"]
PROBES = [("probe", ()), ("probe_digits", ()), ("probe_imagenet", ())]
PROBES += [("probe_cifar10", (name,)) for name in ("cifar10", "cifar100", "stl10")]


def get_config(name: str, *arguments: str):
    return importlib.import_module(f"configs.{name}").get_config(*arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(name, ()) for name in TRAINABLE]
    + [(name, (size,)) for name in ("imagenet", "finetune_imagenet") for size in (*PRESETS, *BERT)]
    + [("imagenet", (name,)) for name in ("l48vq", "vqvae")]
    + [(name, ("folder:photos",)) for name in ("scattered_digits", "scattered_fashion")]
    + [("finetune_cifar10", (size,)) for size in ("s:cifar100", "m:stl10", "l")],
)
def test_a_shipped_config_builds_its_whole_state_abstractly(name, arguments):
    config = Config.of(get_config(name, *arguments), trains=True)
    state = build_program(config, config.mesh.make()).abstract
    assert config.train.eval_batch_size % 8 == 0
    if config.program == "vqvae":
        assert state.params["codebook"].shape == (config.vqvae.codes, config.vqvae.code_width)
        return
    assert state.params["head"]["kernel"].shape == (config.model.width, config.model.vocab_size)
    assert ("classifier" in state.params) == name.startswith("finetune_")


@pytest.mark.parametrize(("name", "arguments"), PROBES)
def test_a_shipped_probe_config_is_one(name, arguments):
    ProbeConfig.of(get_config(name, *arguments))


@pytest.mark.parametrize("size", [*PRESETS, *BERT])
def test_fine_tuning_starts_from_the_network_of_pretraining(size):
    ours, theirs = (Config.of(get_config(name, size)).network() for name in ("finetune_imagenet", "imagenet"))
    assert parameter_fields(ours) | {"num_classes": 0} == parameter_fields(theirs)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("s", 76_571_648),
        ("m", 455_157_760),
        ("l", 1_362_250_752),
        ("l48", 1_364_216_832),
        ("xl", 6_810_875_904),
    ],
)
def test_the_imagenet_configs_have_the_published_numbers_of_parameters(size, parameters):
    model = Config.of(get_config("imagenet", size)).network()
    abstract = nnx.eval_shape(lambda: ImageGPT(model, rngs=nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(abstract, nnx.Param))) == parameters


@pytest.mark.parametrize(
    ("argument", "rate", "batch", "steps", "warmup"),
    [
        ("s", 3e-3, 128, 1_000_000, 9608),
        ("m", 3e-3, 128, 1_000_000, 9608),
        ("l", 1e-3, 128, 1_000_000, 9608),
        ("l48", 1e-2, 128, 1_000_000, 9608),
        ("xl", 3e-4, 64, 2_000_000, 19217),
        ("s:bert", 1e-2, 128, 1_000_000, 9608),
        ("m:bert", 3e-3, 128, 1_000_000, 9608),
        ("l:bert", 1e-3, 128, 1_000_000, 9608),
    ],
)
def test_the_imagenet_configs_train_as_published(argument, rate, batch, steps, warmup):
    config = get_config("imagenet", argument)
    assert (config.optim.learning_rate, config.train.batch_size, config.train.steps) == (rate, batch, steps)
    assert config.optim.warmup_steps == warmup and config.optim.schedule == "cosine"
    assert (config.optim.b1, config.optim.b2, config.optim.weight_decay) == (0.9, 0.95, 0.0)
    assert config.data.validation_fraction == 0.04 and config.model.causal == (":" not in argument)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("xs", "choose s, m, l, l48, xl"),
        ("", "choose s, m, l, l48, xl"),
        ("s:gan", "or add :bert, as in l:bert"),
        ("s:", "or add :bert, as in l:bert"),
        ("xl:bert", "BERT for s, m, l only"),
    ],
)
def test_an_unknown_argument_names_the_choices(argument, message):
    for name in ("imagenet", "finetune_imagenet"):
        with pytest.raises(UserError, match=message):
            get_config(name, argument)


@pytest.mark.parametrize(("name", "argument"), [("finetune_cifar10", "xl"), ("probe_cifar10", "mnist")])
def test_an_unknown_data_set_or_size_names_the_choices(name, argument):
    with pytest.raises(UserError, match=rf"{name}\.py:{argument}: choose"):
        get_config(name, argument)


def test_an_unknown_argument_on_the_command_line_is_one_message():
    command = [sys.executable, "train.py", "--config=configs/imagenet.py:huge", "--workdir=never"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "choose s, m, l, l48, xl" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", [name for name in TRAINABLE if name != "base"])
def test_a_shipped_config_is_headed_by_its_command_and_its_cost(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    assert f"python train.py --config=configs/{name}.py" in text and "--workdir=" in text
    assert "\nCost: " in text


def test_every_field_is_explained_where_it_is_set():
    fields = [
        line for line in (ROOT / "configs" / "base.py").read_text().splitlines() if re.match(r"    \w+\.\w+ = ", line)
    ]
    assert [line for line in fields if "#" not in line and "ConfigDict()" not in line] == []
