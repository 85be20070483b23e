"""The documented ImageGPT classes of Hugging Face, on our model: change the import and keep the rest of your code.

    from igpt.api import AutoImageProcessor, ImageGPTForCausalImageModeling

Names, arguments, defaults and outputs are those of transformers. Outputs are JAX arrays, calls are jitted, and PyTorch
tensors are accepted. Parameters are a nested dict, `model.params`; to train, take gradients of a call:
`model(**inputs, params=params).loss`. docs/huggingface.md has examples, and a list of differences from transformers.
"""

import dataclasses
import math
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from igpt.api.forward import IGNORED, Cache, Options, forward
from igpt.api.inputs import as_array, checked_inputs, checked_prompt, padded, whole_numbers
from igpt.attention import resolve_backend
from igpt.errors import UserError
from igpt.interop import hf_weights
from igpt.interop.hf_config import ARCHITECTURES, ImageGPTConfig, to_model_config
from igpt.interop.hub import resolve
from igpt.interop.mapping import abstract_params
from igpt.interop.processor import ImageGPTImageProcessor
from igpt.interop.weight_files import write_safetensors
from igpt.model import ImageGPT
from igpt.sample import Sampling, continue_inputs, image_keys

AutoImageProcessor = ImageGPTFeatureExtractor = ImageGPTImageProcessor  # the older name left transformers 5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """The outputs of a call. Fields that were not requested are None; keys() and integer indices skip them.

    Shapes: loss [], logits [B, T, V] or [B, num_labels], last_hidden_state [B, T, D]. hidden_states is a tuple of
    L + 1 arrays [B, T, D]; attentions is a tuple of L arrays [B, N, T, past + T].
    """

    loss: Any = None
    logits: Any = None
    last_hidden_state: Any = None
    past_key_values: Cache | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None

    def to_tuple(self) -> tuple:
        return tuple(value for value in vars(self).values() if value is not None)

    def keys(self) -> list[str]:
        return [name for name, value in vars(self).items() if value is not None]

    def __getitem__(self, key: str | int | slice):
        return vars(self)[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self):
        return iter(self.keys())


class ImageGPTPreTrainedModel:
    """The base of the three classes. `config` is an ImageGPTConfig, `params` a nested dict of float32 arrays.

    A new model has random weights, drawn from `seed` with transformers' distributions. `dtype` is the type of the
    computation, "float32" (the default) or "bfloat16". Raises UserError if the configuration makes no valid model.
    """

    head = "none"  # a key of ARCHITECTURES

    def __init__(self, config: ImageGPTConfig, *, seed: int = 0, dtype: Any = "float32", params: dict | None = None):
        self.config = config
        head = "none" if self.head == "pixels" and config.tie_word_embeddings else self.head
        model = to_model_config(config, head, jnp.dtype(dtype).name)
        backend = resolve_backend("auto", jax.devices()[0], model.dtype, model.head_size, model.seq_len)
        self._network = dataclasses.replace(model, attention=backend)
        self._graph = nnx.graphdef(nnx.eval_shape(lambda: ImageGPT(self._network, nnx.Rngs(0))))
        self.params = _initial_params(self._network, config, seed, given=params or {})

    @classmethod
    def from_pretrained(
        cls,
        ref: str | Path,
        *,
        config: ImageGPTConfig | None = None,
        dtype: Any = "float32",
        seed: int = 0,
        revision: str | None = None,
        **config_overrides,
    ):
        """Loads a Hugging Face directory or hub id. Other keywords are configuration fields, such as num_labels=10.

        A head that the files lack is initialised at random from `seed`, with a warning. A head that this class lacks is
        dropped. Every other difference between weights and configuration raises UserError.
        """
        directory = resolve(ref, revision)
        config = config or ImageGPTConfig.from_pretrained(directory, **config_overrides)
        weights = hf_weights.open_directory(directory, cls.head, config)
        params = weights.read()
        model = cls(config, seed=seed, dtype=dtype, params=params)
        for name in hf_weights.targets(weights.model).keys() - weights.tensors.keys():
            warnings.warn(f"{ref} has no {name}: it is initialised at random, train it before use", stacklevel=2)
        if cls.head == "classes" and model.config.other.get("prepend_sos"):
            recipe = "prepend it to input_ids and drop the last token (prepend_sos in config.json)"
            warnings.warn(f"{ref} reads a start of sequence: {recipe}", stacklevel=2)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors in the form that transformers reads."""
        directory = Path(directory)
        partial = directory / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        read = {"prepend_sos": False} if self.head == "classes" else {}  # a classifier reads what its processor gives
        settings = read | self.config.to_dict() | {"architectures": [ARCHITECTURES[self.head]]}
        config = ImageGPTConfig.from_dict(settings)
        config.save_pretrained(partial)
        prefix = "" if self.head == "none" else hf_weights.BASE
        write_safetensors(partial, hf_weights.named_tensors(self.params, self._network, prefix), "F32")
        written = {file.name for file in partial.iterdir()}
        for name in written:
            os.replace(partial / name, directory / name)
        partial.rmdir()
        # Remove the shards of an earlier save that had more files.
        for old in {file.name for file in directory.glob("model*.safetensors*")} - written:
            (directory / old).unlink()

    def eval(self):
        """Returns the model itself: dropout is off unless a call receives a dropout_key."""
        return self

    def to(self, *args, **kwargs):
        """Returns the model itself: JAX has already placed the arrays. The method lets PyTorch examples run."""
        return self

    def __call__(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        head_mask=None,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        labels=None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        params: dict | None = None,
        dropout_key: jax.Array | None = None,
    ) -> ModelOutput | tuple:
        """The documented forward pass, jitted. Booleans that are None take the configuration's value.

        Give input_ids [B, T] in 0..vocab_size - 1 or inputs_embeds [B, T, D]; no start of sequence is added.
        attention_mask [B, past + T] and head_mask [N] or [L, N]: 1 keeps, 0 drops. position_ids [B or 1, T].
        token_type_ids [B, T] are looked up in the token table. labels: [B, T] for images, shifted by this method;
        [B] or [B, num_labels] for a classifier; -100 is ignored. params replace the model's own, to differentiate by
        them. dropout_key, a PRNG key, turns dropout on. Raises UserError for arguments that do not fit.
        """
        if encoder_hidden_states is not None or encoder_attention_mask is not None:
            # Cross-attention in transformers applies a wrong mask, and fails with its default arguments.
            raise UserError("cross-attention is not supported: omit encoder_hidden_states and encoder_attention_mask")
        config, past = self.config, past_key_values
        inputs = checked_inputs(
            config, past, input_ids, inputs_embeds, attention_mask, token_type_ids, position_ids, head_mask
        )
        if labels is not None:
            labels = self._checked_labels(as_array("labels", labels), *inputs.shape)
            inputs = inputs._replace(labels=labels)

        def chosen(value, field):
            return getattr(config, field) if value is None else value

        options = Options(
            cache=bool(chosen(use_cache, "use_cache")),
            hidden_states=bool(chosen(output_hidden_states, "output_hidden_states")),
            attentions=bool(chosen(output_attentions, "output_attentions")),
            tied_head=self.head == "pixels" and config.tie_word_embeddings,
            problem="" if labels is None else self._problem(labels),
        )
        params = self.params if params is None else params
        length, past_length = inputs.shape[1], 0 if past is None else past.length
        inputs, past = padded(inputs, past, self.config.n_positions, label_positions=self.head == "pixels")
        cached = None if past is None else (past.keys, past.values)
        results = forward(self._graph, params, inputs, cached, past_length, length, options, dropout_key)

        # Remove the padding from the outputs.
        logits, hidden_states, attentions = (results.get(name) for name in ("logits", "hidden_states", "attentions"))
        output = ModelOutput(
            loss=results.get("loss"),
            logits=logits[:, :length] if self.head == "pixels" else logits,
            last_hidden_state=results["last_hidden_state"][:, :length] if self.head == "none" else None,
            past_key_values=Cache(*results["past"], past_length + length) if options.cache else None,
            hidden_states=hidden_states and tuple(x[:, :length] for x in hidden_states),
            attentions=attentions and tuple(x[:, :, :length, : past_length + length] for x in attentions),
        )
        return output if chosen(return_dict, "return_dict") else output.to_tuple()

    def _checked_labels(self, labels, batch: int, length: int):
        raise UserError("ImageGPTModel has no head and takes no labels; use a class with a head")

    def _problem(self, labels) -> str:
        return "next_token"


class ImageGPTModel(ImageGPTPreTrainedModel):
    """The bare network: returns `last_hidden_state` [B, T, D] after the final norm, and has no head."""


class ImageGPTForCausalImageModeling(ImageGPTPreTrainedModel):
    """The network with a head over the palette: `logits` [B, T, vocab_size - 1]. Position i predicts input i + 1.

    The head has its own matrix, unless the configuration sets tie_word_embeddings. Then the head is the embedding
    [vocab_size, D], which includes the start of sequence, and `logits` are [B, T, vocab_size].
    """

    head = "pixels"

    def _checked_labels(self, labels, batch, length):
        colors = self.config.vocab_size - (not self.config.tie_word_embeddings)
        return whole_numbers("labels", labels, colors, (batch, length), also=IGNORED)

    def generate(
        self,
        input_ids=None,
        *,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = 50,
        top_p: float | None = 1.0,
        num_return_sequences: int = 1,
        attention_mask=None,
        seed: int = 0,
    ):
        """Continues input_ids [B, P] to max_length inputs: int [B * num_return_sequences, max_length].

        Without input_ids, one row starts from the start of sequence. max_length counts the prompt; the default,
        n_positions + 1, completes the image. With do_sample False, decoding is greedy. Equal seeds draw equal images.
        One program with a KV cache runs on the device from the first token to the last, and serves many lengths.
        The result is a PyTorch tensor if input_ids is one. Raises UserError for arguments that do not fit.
        """
        prompt, stop = checked_prompt(self.config, input_ids, attention_mask, max_length, max_new_tokens)
        if num_return_sequences < 1:
            raise UserError(f"num_return_sequences is {num_return_sequences}; give 1 or more")
        prompt = np.repeat(prompt, num_return_sequences, axis=0)
        sampling = Sampling(temperature if do_sample else 0.0, top_k or 0, 1.0 if top_p is None else top_p)
        tokens = continue_inputs(self._sampler(), prompt, stop, image_keys(seed, len(prompt)), sampling)
        if "torch" in sys.modules and isinstance(input_ids, sys.modules["torch"].Tensor):
            return sys.modules["torch"].tensor(np.asarray(tokens, np.int64))
        return tokens

    def _sampler(self) -> ImageGPT:
        """The network with an explicit head. A tied head is the token table, which includes the start of sequence."""
        if not self.config.tie_word_embeddings:
            return nnx.merge(self._graph, self.params)
        network = dataclasses.replace(self._network, pixel_head=True)
        graph = nnx.graphdef(nnx.eval_shape(lambda: ImageGPT(network, nnx.Rngs(0))))
        return nnx.merge(graph, self.params | {"head": {"kernel": self.params["token_table"].T}})


class ImageGPTForImageClassification(ImageGPTPreTrainedModel):
    """The network with a linear head on the mean of the final hidden states over positions: logits [B, num_labels].

    config.problem_type chooses the loss. If it is None: mean squared error if num_labels is 1, cross-entropy for
    labels of whole numbers, binary cross-entropy for labels of floats.
    """

    head = "classes"

    def _checked_labels(self, labels, batch, length):
        classes = self.config.num_labels
        if self._problem(labels) == "single_label_classification":
            return whole_numbers("labels", labels, classes, (batch,), also=IGNORED)
        shape = (batch,) if labels.ndim == 1 and classes == 1 else (batch, classes)
        return jnp.asarray(as_array("labels", labels, shape), jnp.float32)

    def _problem(self, labels) -> str:
        if self.config.problem_type:
            return self.config.problem_type
        if self.config.num_labels == 1:
            return "regression"
        return "single_label_classification" if labels.dtype.kind in "iu" else "multi_label_classification"


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
