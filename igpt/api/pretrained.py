"""The base of the documented classes: making, loading and saving a model, its parameters, and its embeddings."""

import dataclasses
import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from igpt.api.generation import GenerationConfig
from igpt.api.inputs import as_array, whole_numbers
from igpt.attention import resolve_backend
from igpt.errors import UserError
from igpt.files import write_json
from igpt.interop import hf_weights
from igpt.interop.documented import (
    NO_UPLOAD,
    OF_FETCHING,
    OF_UPLOADING,
    Unsupported,
    check_refused,
    fetching,
    folder_to_save,
    refusals,
)
from igpt.interop.hf_config import ARCHITECTURES, TOKEN_IDS, ImageGPTConfig
from igpt.interop.hf_network import to_model_config
from igpt.interop.hub import GENERATION, resolve
from igpt.interop.load import parameter_fields
from igpt.interop.mapping import abstract_params
from igpt.interop.weight_files import SAFETENSORS, write_safetensors
from igpt.model import ImageGPT

OWN_NAMES = "weights have transformers' names and are float32, float16 or bfloat16"
DTYPE = "parameters are float32; from_pretrained(dtype='bfloat16') sets the type of the computation"
PARAMS = "parameters are a nested dict of JAX arrays, model.params"
LOADING = OF_FETCHING | refusals(  # arguments of from_pretrained
    (
        "JAX places the arrays; for several devices, use igpt.load with a mesh",
        dict(device_map="auto", max_memory=None, device_mesh=None, tp_plan=None, tp_size=None)
        | dict(distributed_config=None, offload_folder=None, offload_buffers=False, offload_state_dict=False),
    ),
    ("leaves are read one by one", dict(low_cpu_mem_usage=(True, False), disable_mmap=(True, False))),
    (
        OWN_NAMES,
        dict(key_mapping=None, variant=None, gguf_file=None, quantization_config=None, fusion_config=None)
        | dict(from_tf=False, from_flax=False, weights_only=True, adapter_kwargs={}, adapter_name="default"),
    ),
    (f"{PARAMS}: give params= to the constructor", dict(state_dict=None)),
    ("safetensors are read wherever they exist", dict(use_safetensors=True)),
    ("every back end computes the documented attention", dict(attn_implementation="eager")),
    ("there are no experts", dict(experts_implementation=None)),
    ("JAX compiles the model", dict(use_kernels=False, kernel_config=None, allow_all_kernels=False)),
)
SAVING = OF_UPLOADING | refusals(  # arguments of save_pretrained
    (OWN_NAMES, dict(variant=None, save_peft_format=(True, False), save_original_format=(True, False))),
    (PARAMS, dict(state_dict=None)),
    ("one process writes all files, whole or not at all", dict(is_main_process=True, save_function=None)),
    ("one process saves", dict(distributed_checkpoint=False)),
    ("a file has up to 2 GiB", dict(max_shard_size=("5GB", "50GB"))),
    ("no pickles are written", dict(safe_serialization=True)),
)
METHODS = {  # documented methods and attributes that are refused, with the reason
    **dict.fromkeys(("parameters", "named_parameters", "state_dict", "load_state_dict"), PARAMS),
    **dict.fromkeys(("zero_grad", "requires_grad_", "modules", "named_modules"), PARAMS),
    **dict.fromkeys(("half", "bfloat16", "double"), DTYPE),
    **dict.fromkeys(("prune_heads", "_prune_heads"), "heads cannot be pruned; a head_mask turns them off"),
    **dict.fromkeys(("push_to_hub",), NO_UPLOAD),
    **dict.fromkeys(("add_adapter", "load_adapter", "set_adapter", "enable_adapters"), "there are no adapters"),
    "generate": "only ImageGPTForCausalImageModeling generates",
    "compute_transition_scores": "transformers' own is wrong for this model; use output_logits",
    "compile": "every call is compiled",
    "tie_weights": "config.tie_word_embeddings decides whether the head is the embedding",
}


class Embedding(NamedTuple):
    """A table of vectors, as `get_input_embeddings` returns it. Called with ids [..., T], it looks them up."""

    weight: Float[Array, "V D"]

    def __call__(self, ids) -> Array:
        return self.weight[whole_numbers("ids", ids, len(self.weight))]

    @property
    def num_embeddings(self) -> int:
        return len(self.weight)


class ImageGPTPreTrainedModel:
    """The base of the three classes. `config` is an ImageGPTConfig, `params` a nested dict of float32 arrays.

    A new model has random weights, drawn from `seed` with transformers' distributions. `dtype` is the type of the
    computation: "float32" (the default), "bfloat16", or "auto" for the configuration's own if it is one of them. Raises
    UserError if the configuration makes no valid model.
    """

    head = "none"  # a key of ARCHITECTURES

    def __init__(self, config: Any, *, seed: int = 0, dtype: Any = "float32", params: dict | None = None):
        self.config = config if isinstance(config, ImageGPTConfig) else ImageGPTConfig.from_dict(config.to_dict())
        self.training = False
        self.generation_config = GenerationConfig.from_model_config(self.config)
        self._build(dataclasses.replace(self._described(), dtype=_computed_in(dtype, self.config)))
        self.params = _initial_params(self._network, self.config, seed, given=params or {})

    def _described(self):
        """The network that the configuration describes."""
        return to_model_config(self.config, "none" if self._tied else self.head)

    @property
    def _tied(self) -> bool:
        return self.head == "pixels" and self.config.tie_word_embeddings

    def _build(self, network) -> None:
        sizes = (network.num_heads, network.head_size, network.seq_len)
        backend = resolve_backend("auto", jax.devices()[0], network.dtype, *sizes)
        self._network = dataclasses.replace(network, attention=backend)
        self._graph = nnx.graphdef(nnx.eval_shape(lambda: ImageGPT(self._network, nnx.Rngs(0))))

    @classmethod
    def from_pretrained(
        cls,
        ref: str | Path,
        *,
        config: Any = None,
        dtype: Any = "float32",
        seed: int = 0,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        generation_config: Any = None,
        **others,
    ):
        """Loads a Hugging Face directory or hub id. With output_loading_info, returns (the model, a dict of names).

        `others` are revision, subfolder and the other arguments of FETCHING, and fields of the configuration, such as
        num_labels=10. `config` is a configuration, or where to read it. A head that the files lack is initialised at
        random from `seed`, with a warning; so is one of another size, with ignore_mismatched_sizes. A head that this
        class lacks is dropped. Raises UserError for every other difference between weights and configuration, and for
        arguments that are not supported.
        """
        if "torch_dtype" in others:
            dtype = others.pop("torch_dtype") or dtype
        directory = resolve(ref, **fetching(others))
        only_safetensors = others.get("use_safetensors")
        overrides = check_refused(f"{cls.__name__}.from_pretrained", others, LOADING)
        if config is None:
            config = ImageGPTConfig.from_pretrained(directory, **overrides)
        elif overrides:
            raise UserError(f"config and {', '.join(overrides)} are given; set them in the config")
        elif isinstance(config, str | Path):
            config = ImageGPTConfig.from_pretrained(config)
        elif not isinstance(config, ImageGPTConfig):
            config = ImageGPTConfig.from_dict(config.to_dict())
        weights = hf_weights.open_directory(directory, cls.head, config, ignore_mismatched_sizes)
        if only_safetensors and any(tensor.file.suffix == ".bin" for tensor in weights.tensors.values()):
            raise UserError(f"{directory} has no safetensors; leave use_safetensors out to read its .bin files")
        model = cls(config, seed=seed, dtype=dtype, params=weights.read())
        own = GenerationConfig.from_directory(directory) or model.generation_config
        model.generation_config = own if generation_config is None else GenerationConfig.of(generation_config)
        sizes = weights.other_sizes
        missing = sorted(hf_weights.targets(weights.model).keys() - weights.tensors.keys() - sizes.keys())
        for name, (there, here) in sizes.items():
            problem = f"{ref} has {name} of the shape {list(there)}, not {list(here)}"
            warnings.warn(f"{problem}: it is initialised at random, train it before use", stacklevel=2)
        for name in missing:
            warnings.warn(f"{ref} has no {name}: it is initialised at random, train it before use", stacklevel=2)
        if cls.head == "classes" and model.config.other.get("prepend_sos"):
            recipe = "prepend it to input_ids and drop the last token (prepend_sos in config.json)"
            warnings.warn(f"{ref} reads a start of sequence: {recipe}", stacklevel=2)
        if not output_loading_info:
            return model
        mismatched = [(name, *shapes) for name, shapes in sizes.items()]
        return model, {"missing_keys": missing, "unexpected_keys": [], "mismatched_keys": mismatched, "error_msgs": []}

    def save_pretrained(self, directory: str | Path, **refused) -> None:
        """Writes config.json, model.safetensors and generation_config.json, if it has settings, for transformers.

        Weights are float32, as the configuration then says. Raises UserError, and writes nothing, if the configuration
        no longer describes the network.
        """
        check_refused("save_pretrained", refused, SAVING, known=())
        described, built = (parameter_fields(network) for network in (self._described(), self._network))
        if changed := [name for name in built if built[name] != described[name]]:
            differing = "; ".join(f"{name} is {built[name]}, the config says {described[name]}" for name in changed)
            raise UserError(f"the config was changed after the model was made: {differing}; make a new model from it")
        directory = folder_to_save(directory)
        partial = directory / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        read = {"prepend_sos": False} if self.head == "classes" else {}  # a classifier reads what its processor gives
        settings = read | self.config.to_dict() | {"architectures": [ARCHITECTURES[self.head]], "dtype": "float32"}
        ImageGPTConfig.from_dict(settings).with_dtype("float32").save_pretrained(partial)
        if self.head == "pixels" and (how := self.generation_config.to_dict()):
            write_json(partial / GENERATION, how)
        prefix = "" if self.head == "none" else hf_weights.BASE
        write_safetensors(partial, hf_weights.named_tensors(self.params, self._network, prefix), "F32")
        written = {file.name for file in partial.iterdir()}
        for name in written:
            os.replace(partial / name, directory / name)
        partial.rmdir()
        # Remove the files of an earlier save that had more of them.
        earlier = {file.name for file in directory.iterdir() if SAFETENSORS.fullmatch(file.name)}
        for old in {GENERATION, *earlier} - written:
            (directory / old).unlink(missing_ok=True)

    def __getattr__(self, name: str):  # Python calls this only for attributes that do not exist
        if name in METHODS:
            raise Unsupported(f"{type(self).__name__} does not support {name}: {METHODS[name]}")
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def train(self, mode: bool = True):
        """Turns dropout on for calls without a dropout_key, with fresh draws each time, and returns the model."""
        self.training = bool(mode)
        return self

    def eval(self):
        """Turns dropout off, as in a new model, and returns the model."""
        return self.train(False)

    def to(self, *args, **kwargs):
        """Returns the model itself: JAX has already placed the arrays. Raises UserError if a dtype is given."""
        given = [x for x in (*args, *kwargs.values()) if "dtype" in type(x).__name__ or str(x).startswith("torch.")]
        if "dtype" in kwargs or any("float" in str(x) for x in given):
            raise Unsupported(f"the model cannot be converted: {DTYPE}")
        return self

    def cpu(self):
        """The same as `to`."""
        return self

    def cuda(self, device=None):
        """The same as `to`."""
        return self

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Each block stores only its input for the backward pass, which computes the rest again."""
        self._build(dataclasses.replace(self._network, remat="full"))

    def gradient_checkpointing_disable(self) -> None:
        self._build(dataclasses.replace(self._network, remat="none"))

    @property
    def device(self) -> jax.Device:
        """The first device that holds the parameters."""
        return min(self.params["token_table"].devices(), key=lambda device: device.id)

    @property
    def dtype(self):
        """The type of the parameters, float32."""
        return self.params["token_table"].dtype

    @property
    def num_labels(self) -> int:
        return self.config.num_labels

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameters, all of them trainable; without the token and position tables if excluded."""
        tables = ("token_table", "position_table") if exclude_embeddings else ()
        leaves = {path: leaf for path, leaf in flatten_dict(self.params).items() if path[0] not in tables}
        return sum(leaf.size for leaf in leaves.values())

    def get_input_embeddings(self) -> Embedding:
        """The token table, [vocab_size, D]. Its last row is the start of sequence."""
        return Embedding(self.params["token_table"])

    def set_input_embeddings(self, value) -> None:
        """Replaces the token table by an array, or an object with a `weight`, of the same shape."""
        shape = self.params["token_table"].shape
        table = jnp.asarray(as_array("the embedding", getattr(value, "weight", value), shape), jnp.float32)
        self.params = self.params | {"token_table": table}

    def get_output_embeddings(self) -> Embedding | None:
        """The head over colours as a table [V, D]; the token table if it is tied; None for the other classes."""
        if self.head != "pixels":
            return None
        return self.get_input_embeddings() if self._tied else Embedding(self.params["head"]["kernel"].T)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = False
    ) -> Embedding:
        """Changes the number of colours to new_num_tokens - 1, and returns the new token table.

        The start of sequence stays the last row: new colours are random, and come before it. transformers appends them
        after it, and saves a model that it cannot load again. Raises UserError for the other arguments.
        """
        refused = refusals(("new rows are random, one a colour", dict(pad_to_multiple_of=1, mean_resizing=False)))
        given = dict(pad_to_multiple_of=pad_to_multiple_of, mean_resizing=mean_resizing)
        check_refused("resize_token_embeddings", given, refused)
        if new_num_tokens is None:
            return self.get_input_embeddings()
        old, config = self.params, ImageGPTConfig.from_dict(self.config.to_dict(), vocab_size=new_num_tokens)
        kept = min(config.vocab_size, self.config.vocab_size) - 1
        old_sos, self.config.vocab_size = self.config.sos_token_id, config.vocab_size
        for settings in (self.config, self.generation_config):
            for name in TOKEN_IDS:
                if getattr(settings, name, None) == old_sos:
                    setattr(settings, name, config.sos_token_id)
        self._build(dataclasses.replace(self._network, vocab_size=config.vocab_size - 1))
        new = _initial_params(self._network, config, seed=0, given={})
        tables = [old["token_table"][:kept], new["token_table"][kept:-1], old["token_table"][-1:]]
        self.params = old | {"token_table": jnp.concatenate(tables)}
        if "head" in old:
            columns = [old["head"]["kernel"][:, :kept], new["head"]["kernel"][:, kept:]]
            self.params |= {"head": {"kernel": jnp.concatenate(columns, axis=1)}}
        return self.get_input_embeddings()

    def sampler(self) -> ImageGPT:
        """A copy of the network with an explicit head. A tied head is the token table, start of sequence included."""
        if not self._tied:
            return nnx.merge(self._graph, self.params)
        network = dataclasses.replace(self._network, pixel_head=True)
        graph = nnx.graphdef(nnx.eval_shape(lambda: ImageGPT(network, nnx.Rngs(0))))
        model = nnx.merge(graph, self.params | {"head": {"kernel": self.params["token_table"].T}})
        model.head.flat = model.head.kernel[...].shape  # one output more than a head of its own has
        return model


def _computed_in(dtype: Any, config: ImageGPTConfig) -> str:
    """The name of a computation's type. UserError unless it is float32 or bfloat16."""
    if isinstance(dtype, str) and dtype == "auto":
        saved = str(config.other.get("dtype") or config.other.get("torch_dtype"))
        return "bfloat16" if saved.endswith("bfloat16") else "float32"
    if dtype is None:
        return "float32"
    try:
        name = str(dtype).removeprefix("torch.") if type(dtype).__module__ == "torch" else jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in ("float32", "bfloat16"):
        raise UserError(f"dtype is {name}; choose 'float32', 'bfloat16' or 'auto'")
    return name


def _initial_params(network, config: ImageGPTConfig, seed: int, given: dict) -> dict:
    """Returns the parameters in `given`, and random values for the others, as in transformers' `_init_weights`.

    Kernels and tables are normal with standard deviation initializer_range, which is divided by sqrt(2L) in projections
    back to the residual stream. Norm gains are one, biases zero.
    """
    loaded = flatten_dict(given)

    def initial(path, leaf):
        names = tuple(key.key for key in path)
        if names in loaded:
            return loaded[names]
        if names[-1] == "gain":
            return jnp.ones(leaf.shape)
        if names[-1] == "bias":
            return jnp.zeros(leaf.shape)
        residual = names[-2:] in (("out", "kernel"), ("down", "kernel"))
        std = config.initializer_range / (math.sqrt(2 * config.n_layer) if residual else 1.0)
        rng = np.random.default_rng((seed, *"/".join(names).encode()))
        return jnp.asarray(std * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree_util.tree_map_with_path(initial, abstract_params(network))
