"""Functions and constants that several test files use; fixtures live in conftest.py.

PyTorch, transformers and TensorFlow are imported inside the functions that need them: most tests need none of them.
"""

import contextlib
import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image

from configs import base, probe_digits
from igpt.config import Config
from igpt.data import sources
from igpt.data.examples import ArrayImages, Split
from igpt.interop.load import Pretrained
from igpt.interop.processor import ImageGPTImageProcessor
from igpt.model import ImageGPT, ModelConfig
from igpt.optim import make_optimizer
from igpt.palette import Palette
from igpt.run import checkpoint
from igpt.run.directory import save_config
from igpt.sharding import make_mesh
from igpt.state import create_state

ROOT = Path(__file__).parents[1]


# ---- comparing


def assert_trees_equal(one, other):
    """Two trees have the same structure and equal arrays."""
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_bitwise_equal(one, other):
    """Two training states, or the arrays of two checkpoints, are the same bytes."""
    paths_one, paths_other = (jax.tree_util.tree_leaves_with_path(tree) for tree in (one, other))
    assert len(paths_one) == len(paths_other) > 20
    for (path, a), (_, b) in zip(paths_one, paths_other, strict=True):
        assert a.tobytes() == b.tobytes(), f"{path} differs"


def file_contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# ---- models

TINY_MODEL = ModelConfig(width=14, depth=3, num_heads=2, vocab_size=11, seq_len=13, mlp_width=17)


@functools.cache
def random_model(config=TINY_MODEL):
    """A model in which every parameter is random, the head (zero in a new model) and the biases included."""

    def noisy(key):
        leaves, tree = jax.tree.flatten(nnx.state(ImageGPT(config, nnx.Rngs(0))))
        keys = jax.random.split(key, len(leaves))
        noise = [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(tree, jax.tree.map(jnp.add, leaves, noise))

    graph = nnx.graphdef(nnx.eval_shape(lambda: ImageGPT(config, nnx.Rngs(0))))
    return nnx.merge(graph, jax.jit(noisy)(jax.random.key(100)))


def with_config(model, **changes):
    """The same parameters in a network that computes differently."""
    target, _ = nnx.split(nnx.eval_shape(lambda: ImageGPT(dataclasses.replace(model.config, **changes), nnx.Rngs(0))))
    return nnx.merge(target, nnx.to_pure_dict(nnx.state(model)))


def random_tokens(config=TINY_MODEL, batch=3, seed=7):
    return jax.random.randint(jax.random.key(seed), (batch, config.seq_len), 0, config.vocab_size)


def pretrained_and_split(count=23, labels=True, **changes):
    """A random model of 1 x 13 tokens, random images with three classes in turn, and their tokens."""
    palette = Palette(np.linspace(-1, 1, 11)[:, None].repeat(3, axis=1))
    network = dataclasses.replace(TINY_MODEL, **changes)
    config = Config.of_network(network, (1, 13), 1)
    tokens = np.random.default_rng(0).integers(0, 11, (count, 1, 13))
    split = Split(ArrayImages(palette.decode(tokens)), np.arange(count, dtype=np.int32) % 3 if labels else None)
    return Pretrained(config, random_model(network), palette), split, tokens[:, 0]


# ---- run directories

GREY_PALETTE = Palette(np.linspace(-1, 1, 17)[:, None].repeat(3, axis=1))
RUN_MODEL = ModelConfig(width=16, depth=2, num_heads=4, vocab_size=17, seq_len=64)  # the model of write_run_config


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return {record["step"]: record["train/loss"] for record in records(workdir) if "train/loss" in record}


def read_arrays(workdir, step):
    """Every array of a checkpoint as NumPy's, whatever devices wrote it: {"params": ..., "optimizer": ...}."""
    found = {}
    with ocp.StandardCheckpointer() as reader:
        for item in ("params", "optimizer"):
            path = workdir.absolute() / checkpoint.FOLDER / str(step) / item
            shapes = reader.metadata(path).item_metadata.tree
            found[item] = reader.restore(path, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes))
    return found


def learn_with_heads(config):
    """Weighs the losses of the heads that the config's model has, as a run must."""
    pixels, classes = float(config.model.pixel_head), float(config.model.num_classes > 0)
    config.objective.update(generative=pixels, classification=classes)
    return config


def write_run_config(path, **model):
    """Writes a run directory's config and palette, no checkpoint; returns the config."""
    config = base.get_config()
    config.palette.colors = 17
    config.model.update(dict(width=16, depth=2, num_heads=4) | model)
    learn_with_heads(config)
    path.mkdir(exist_ok=True)
    save_config(Config.of(config), path)
    GREY_PALETTE.save(path / "palette.npy")
    return config


def configured(**changes):
    """The configuration of configs/base.py with 17 colours, and with changes such as **{"train.steps": 3}."""
    config = base.get_config()
    config.palette.colors = 17
    config.update_from_flattened_dict(changes)
    return Config.of(config, trains=True)


def optim_config(**changes):
    """The optimizer's settings of configs/base.py, with changes."""
    return dataclasses.replace(Config.of(base.get_config()).optim, **changes)


def default_optimizer():
    return make_optimizer(optim_config(), steps=9)[0]


def save_states(workdir, mesh, steps=(3,), seed=0):
    """Writes checkpoints of a new RUN_MODEL, the same one at every step; returns its state."""
    state = create_state(RUN_MODEL, default_optimizer(), mesh, seed)
    with checkpoint.Checkpoints(workdir, max_to_keep=2) as checkpoints:
        for step in steps:
            checkpoints.save(state, step)
    return state


# ---- probes

PROBE_HEIGHT, PROBE_WIDTH, PROBE_IMAGES, PROBE_CLASSES = 4, 5, 150, 3


def grey_pictures(count=PROBE_IMAGES):
    """Grey images of three classes that differ in brightness, noisy enough that no probe is always right."""
    labels = np.arange(count, dtype=np.int32) % PROBE_CLASSES
    levels = 70 + 50 * labels[:, None, None]
    noisy = np.random.default_rng(0).normal(levels, 110, (count, PROBE_HEIGHT, PROBE_WIDTH))
    return np.clip(noisy, 0, 255).astype(np.uint8), labels


def write_run(path, source, steps=(2, 4), on_unreadable="stop", **model):
    """Writes a run directory as train.py leaves it, without training: every step has its own random weights."""
    config = base.get_config()
    config.data.update(source=source, image_size=(PROBE_HEIGHT, PROBE_WIDTH), on_unreadable=on_unreadable)
    config.palette.colors = 17
    config.model.update(dict(width=16, depth=3, num_heads=2) | model)
    learn_with_heads(config)
    path.mkdir()
    save_config(Config.of(config), path)
    GREY_PALETTE.save(path / "palette.npy")
    optimizer, network, mesh = default_optimizer(), Config.of(config).network(), make_mesh()
    with checkpoint.Checkpoints(path, max_to_keep=9) as checkpoints:
        for step in steps:
            checkpoints.save(create_state(network, optimizer, mesh, seed=step), step)
    lines = ['{"step": 1, "train/loss": 3.0}', '{"step": 2, "eval/loss": 2.5}', '{"step": 3, "tr']  # cut short
    (path / "metrics.jsonl").write_text("\n".join(lines))
    return path


def probe_config(**changes):
    """A probe of seconds: SGD's steps compile once for any number of images."""
    config = probe_digits.get_config()
    config.update(dict(batch_size=40, solver="sgd", inverse_penalties=(0.01, 0.1)))
    config.sgd.update(learning_rates=(0.1, 0.03), steps=64, batch_size=32, weight_decay=0.1)
    config.update(changes)
    return config


# ---- data sources

PREPARE_HEIGHT, PREPARE_WIDTH, PREPARE_IMAGES = 7, 5, 61


def reading_settings(source, **fields):
    """How a source is read: the default of every field that `fields` does not name."""
    return dict(source=str(source), image_size=(8, 8), channels=3) | fields


def load_source(source, **fields):
    return sources.load_source(ConfigDict(reading_settings(source, **fields)))


def splits_of(source):
    return source.train, source.validation, source.test


def prepare_settings(source, **fields):
    """How the 7 x 5 images of the fixture `pictures` are read."""
    return reading_settings(source, image_size=(PREPARE_HEIGHT, PREPARE_WIDTH)) | fields


def open_prepare_source(source, **fields):
    return sources.load_source(ConfigDict(prepare_settings(source, **fields)))


# ---- Hugging Face's models

HF_SIZES = dict(vocab_size=18, n_positions=35, n_embd=22, n_layer=3, n_head=2)
HF_IMAGE_SIZE = (5, 7)  # the 35 positions of HF_SIZES
HF_CLUSTERS = np.random.default_rng(1).uniform(-1, 1, (17, 3))
HF_CLASSES = {
    "pixels": "ImageGPTForCausalImageModeling",
    "none": "ImageGPTModel",
    "classes": "ImageGPTForImageClassification",
}


def hf_class(head):
    import transformers

    return getattr(transformers, HF_CLASSES[head])


def hf_model(head="pixels", **settings):
    """A model of transformers with random weights, biases and gains too."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = hf_class(head)(transformers.ImageGPTConfig(**HF_SIZES | {"num_labels": 5} | settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if ".ln_" in name else 0.0, 0.1)
    return model


def save_hf_model(directory, model, clusters=HF_CLUSTERS):
    """Saves a model of transformers together with an image processor."""
    from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

    model.save_pretrained(directory)
    height, width = HF_IMAGE_SIZE
    ImageGPTImageProcessorPil(clusters=clusters, size={"height": height, "width": width}).save_pretrained(directory)
    return directory


def load_hf_strictly(directory, head):
    """The directory's model in transformers, which found every parameter there and no other."""
    model, info = hf_class(head).from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def random_params(model):
    """Parameters of a network, none of them zero."""
    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: ImageGPT(model, nnx.Rngs(0)))))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jax.device_put(0.2 * rng.standard_normal(leaf.shape, np.float32)), params)


def write_imported_run(directory, **fields):
    """Writes a run directory with parameters only, as an import does; they are random, none of them zero."""
    model = ModelConfig(**dict(width=22, depth=3, num_heads=2, vocab_size=17, seq_len=35, mlp_width=46) | fields)
    directory.mkdir()
    save_config(Config.of_network(model, HF_IMAGE_SIZE, 3), directory)
    Palette(HF_CLUSTERS).save(directory / "palette.npy")
    checkpoint.save_params(directory, random_params(model), step=3)
    return directory


# ---- the image processor

PROCESSOR_CLUSTERS = np.random.default_rng(0).uniform(-1, 1, (512, 3)).tolist()
PROCESSOR_IMAGES = np.random.default_rng(1).integers(0, 256, (3, 23, 19, 3), np.uint8)
PROCESSOR_PICTURE = Image.fromarray(PROCESSOR_IMAGES[0])
PROCESSOR_SIZE = {"height": 13, "width": 11}


def make_processor(**settings):
    return ImageGPTImageProcessor(**{"clusters": PROCESSOR_CLUSTERS, "size": PROCESSOR_SIZE} | settings)


def tokens_of(given, **overrides):
    return make_processor()(given, **{"return_tensors": "np"} | overrides)["input_ids"]


def tokens_as_rgb(images):
    """The tokens of uint8 images [B, H, W, 3] given one by one; test_processor.py compares them with transformers."""
    return tokens_of([Image.fromarray(image) for image in images])


# ---- the documented classes

API_SOS = 17
API_SIZES = dict(vocab_size=API_SOS + 1, n_positions=37, n_embd=22, n_layer=3, n_head=2)
API_PADDING = np.ones((3, 23), np.int64)
API_PADDING[0, :4] = API_PADDING[1, 10:12] = API_PADDING[2, -1] = 0


def hf_and_ours(directory, head="pixels", **config):
    """A transformers model with random weights, and ours loaded from the directory that it saved."""
    import torch
    import transformers

    from igpt import api

    torch.manual_seed(0)
    model = hf_class(head)(transformers.ImageGPTConfig(**API_SIZES | config)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3)
    model.save_pretrained(directory)
    return model, getattr(api, HF_CLASSES[head]).from_pretrained(directory)


def api_tokens(batch=3, length=23, seed=0):
    drawn = np.random.default_rng(seed).integers(0, API_SOS, (batch, length))
    drawn[:, 0] = API_SOS
    return drawn


def api_labels(tokens):
    return np.where(tokens == API_SOS, -100, tokens)


# ---- OpenAI's release

OPENAI_DIMS = dict(V=17, D=20, N=2, T=25, F=83, L=3)


def openai_variables(bert=False, classes=0, seed=0, T=OPENAI_DIMS["T"]):
    """Variables as OpenAI's src/model.py names them (scope "model"), with what a training run saves beside them."""
    rng = np.random.default_rng(seed)
    V, D, N, F, L = (OPENAI_DIMS[letter] for letter in "VDNFL")

    def normal(*shape, std=0.2):
        return rng.normal(0, std, shape).astype(np.float32)

    variables = {"wte": normal(V, D), "wpe": normal(T, D), "wtet": normal(V, D), "ln_f/g": 1 + normal(D)}
    if not bert:
        variables["sos"] = normal(D)
    if classes:
        variables["clf/wclf"] = normal(classes, D)
    for i in range(L):
        variables |= {f"h{i}/ln_1/g": 1 + normal(D), f"h{i}/ln_2/g": 1 + normal(D)}
        variables |= {f"h{i}/attn/{name}_proj": normal(N, D // N, D) for name in ("q", "k", "v", "c")}
        variables |= {f"h{i}/mlp/c_fc/w": normal(D, F), f"h{i}/mlp/c_proj/w": normal(F, D)}
    variables = {f"model/{name}": value for name, value in variables.items()}
    variables |= {"model/wte/Adam": normal(V, D), "model/wte/Adam_1": normal(V, D), "beta1_power": np.float32(0.9)}
    return variables | {"model/h0/ln_1/g/adam_m": normal(D), "global_step": np.int64(7), "model/ema_step": np.int32(7)}


def write_tf_checkpoint(prefix, variables, shards=5):
    """The V2 format that TensorFlow 1's Saver writes on several devices: prefix.index and prefix.data-*-of-*."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401 - comes with PyTorch for GPUs, and crashes the process if TensorFlow is loaded first
    import tensorflow as tf

    names, parts = list(variables), []
    for shard in range(shards):
        part = tf.raw_ops.ShardedFilename(basename=str(prefix), shard=shard, num_shards=shards)
        mine = names[shard::shards]
        tensors = [tf.convert_to_tensor(variables[name]) for name in mine]
        tf.raw_ops.SaveV2(prefix=part, tensor_names=mine, shape_and_slices=[""] * len(mine), tensors=tensors)
        parts.append(part)
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=str(prefix), delete_old_dirs=False)
    return prefix
