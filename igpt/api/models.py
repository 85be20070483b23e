"""The documented ImageGPT classes of Hugging Face, on our model: change the import, keep the rest.

    from igpt.api import AutoImageProcessor, ImageGPTForCausalImageModeling

Same names, arguments, defaults and outputs; arrays are JAX's, calls are jitted, and PyTorch tensors are accepted.
Parameters are a nested dict, `model.params`; to train, take gradients of a call: `model(**inputs, params=params).loss`.
docs/huggingface.md has the examples, and what the documentation says that is not so.
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

from igpt.api.forward import IGNORED, Cache, Wanted, forward
from igpt.api.inputs import as_array, checked_inputs, of_shape, padded, whole_numbers
from igpt.attention import resolve_backend
from igpt.errors import UserError
from igpt.interop import hf_weights
from igpt.interop.hf_config import ARCHITECTURES, ImageGPTConfig, to_model_config
from igpt.interop.hub import resolve
from igpt.interop.processor import ImageGPTFeatureExtractor, ImageGPTImageProcessor
from igpt.interop.weight_files import write_safetensors
from igpt.model import ImageGPT
from igpt.sample import Sampling, continue_inputs, image_keys, padded_length

__all__ = [
    "AutoImageProcessor",
    "ImageGPTConfig",
    "ImageGPTFeatureExtractor",
    "ImageGPTForCausalImageModeling",
    "ImageGPTForImageClassification",
    "ImageGPTImageProcessor",
    "ImageGPTModel",
    "ModelOutput",
]

AutoImageProcessor = ImageGPTImageProcessor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """What a call returns. Fields that were not asked for are None, and not among `keys()` and integer indices."""

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
    """What the three classes share. `config` is an ImageGPTConfig, `params` a nested dict of float32 arrays.

    A new model has the random weights of transformers' scheme, a function of `seed`. dtype: of the computation,
    "float32" or "bfloat16". Raises UserError for what cannot be a model.
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
        """Loads a Hugging Face directory or hub id. Other keywords are fields of the configuration: num_labels=10.

        A head that the files lack is drawn from `seed`, with a warning; one that this class lacks is left out. Every
        other difference between weights and configuration is an error.
        """
        directory = resolve(ref, revision)
        config = config or ImageGPTConfig.from_pretrained(directory, **config_overrides)
        weights = hf_weights.open_directory(directory, cls.head, config)
        params = hf_weights.read_params(weights.tensors, weights.model)
        model = cls(config, seed=seed, dtype=dtype, params=params)
        for name in hf_weights.places(weights.model).keys() - weights.tensors.keys():
            warnings.warn(f"{ref} has no {name}: it is drawn at random and has to be trained", stacklevel=2)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors, as transformers reads them."""
        directory = Path(directory)
        partial = directory / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        config = ImageGPTConfig.from_dict(self.config.to_dict() | {"architectures": [ARCHITECTURES[self.head]]})
        config.save_pretrained(partial)
        prefix = "" if self.head == "none" else hf_weights.BASE
        write_safetensors(partial, hf_weights.named_tensors(self.params, self._network, prefix), "F32")
        written = {file.name for file in partial.iterdir()}
        for name in written:
            os.replace(partial / name, directory / name)
        partial.rmdir()
        for old in directory.glob("model*.safetensors*"):  # of an earlier save in another number of files
            if old.name not in written:
                old.unlink()

    def eval(self):
        """The model itself: dropout is off unless a call is given a dropout_key."""
        return self

    def to(self, *args, **kwargs):
        """The model itself: arrays live where JAX has put them. It is here so that PyTorch examples run as they are."""
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
        """The documented forward pass; jitted, and one program serves many lengths.

        input_ids [B, T] in 0..vocab_size - 1, or inputs_embeds [B, T, D]: nobody adds the start of sequence for you.
        attention_mask [B, past + T], 1 to keep, 0 to drop. position_ids [B or 1, T]. token_type_ids [B, T], looked up
        in the token table. head_mask [N] or [L, N], 1 to keep. labels: [B, T] for images, shifted inside, -100 ignored;
        [B] or [B, num_labels] for a classifier. params: in place of the model's own, to differentiate. dropout_key: a
        PRNG key, to train with dropout.
        """
        if encoder_hidden_states is not None or encoder_attention_mask is not None:
            raise UserError(
                "cross-attention is not supported: transformers' own masks it wrongly and fails with its own defaults, "
                "so that there is no behaviour to follow"
            )

        def chosen(value, field):
            return getattr(self.config, field) if value is None else value

        inputs, length, past_length = checked_inputs(
            self.config,
            input_ids,
            past_key_values,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
        )
        batch = len(inputs.embeds if inputs.tokens is None else inputs.tokens)
        inputs = inputs._replace(labels=self._checked_labels(as_array("labels", labels), batch, length))
        room = padded_length(length, max(length, self.config.n_positions))
        past = past_key_values
        if past is not None:
            capacity = padded_length(past_length + room, max(past_length + room, self.config.n_positions))
            past = past.with_room(capacity)
        capacity = room if past is None else past.keys.shape[3]
        wanted = Wanted(
            cache=bool(chosen(use_cache, "use_cache")),
            hidden_states=bool(chosen(output_hidden_states, "output_hidden_states")),
            attentions=bool(chosen(output_attentions, "output_attentions")),
            tied_head=self.head == "pixels" and self.config.tie_word_embeddings,
            problem=self._problem(inputs.labels),
        )
        results = forward(
            self._graph,
            self.params if params is None else params,
            padded(inputs, room, capacity, labels_by_position=self.head == "pixels"),
            None if past is None else (past.keys, past.values),
            past_length,
            length,
            wanted,
            dropout_key,
        )
        output = self._output(results, past_length, length)
        return output if chosen(return_dict, "return_dict") else output.to_tuple()

    def _checked_labels(self, labels, batch: int, length: int):
        if labels is not None:
            raise UserError("ImageGPTModel has no head and takes no labels")

    def _problem(self, labels) -> str:
        return ""

    def _output(self, results: dict, past_length: int, length: int) -> ModelOutput:
        """What the program returned, cut to the inputs that were given."""

        def cut(x):
            return x[:, :length]

        total = past_length + length
        past = results.get("past")
        hidden_states, attentions = results.get("hidden_states"), results.get("attentions")
        return ModelOutput(
            loss=results.get("loss"),
            logits=results.get("logits"),
            last_hidden_state=cut(results["last_hidden_state"]) if self.head == "none" else None,
            past_key_values=None if past is None else Cache(*past, total),
            hidden_states=hidden_states and tuple(cut(x) for x in hidden_states),
            attentions=attentions and tuple(x[:, :, :length, :total] for x in attentions),
        )


class ImageGPTModel(ImageGPTPreTrainedModel):
    """The bare network: `last_hidden_state` [B, T, D] after the final norm, no head."""


class ImageGPTForCausalImageModeling(ImageGPTPreTrainedModel):
    """With the head over the palette: `logits` [B, T, vocab_size - 1]; those at position i predict input i + 1.

    The head is a matrix of its own, not the embedding, unless the configuration says tie_word_embeddings.
    """

    head = "pixels"

    def _checked_labels(self, labels, batch, length):
        if labels is None:
            return None
        labels = of_shape("labels", labels, (batch, length))
        colors = self.config.vocab_size - (not self.config.tie_word_embeddings)
        return whole_numbers("labels", labels, colors, also=IGNORED)

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
        """Continues input_ids [B, P] (None: the start of sequence alone) to [B * num_return_sequences, max_length].

        All on device with a KV cache, one program for many lengths. max_length counts the inputs; by default the image
        is completed: n_positions + 1 with its start of sequence. do_sample False is greedy. The same seed draws the
        same images. PyTorch tensors come back as PyTorch tensors.
        """
        config = self.config
        if input_ids is None:
            input_ids = np.full((1, 1), config.sos_token_id, np.int32)
        inputs = np.asarray(as_array("input_ids", input_ids), np.int32)
        if inputs.ndim != 2 or 0 in inputs.shape:
            raise UserError(f"input_ids has shape {list(inputs.shape)}; [B, P] with at least one input is needed")
        inputs = whole_numbers("input_ids", inputs, config.vocab_size)
        if attention_mask is not None and not np.all(np.asarray(as_array("attention_mask", attention_mask))):
            raise UserError("generate cannot skip inputs: attention_mask has zeros; images of a batch are equally long")
        if num_return_sequences < 1:
            raise UserError(f"num_return_sequences is {num_return_sequences}; it must be at least 1")
        given = inputs.shape[1]
        stop = given + max_new_tokens if max_new_tokens is not None else max_length or config.n_positions + 1
        if not given < stop <= config.n_positions + 1:
            raise UserError(
                f"{given} inputs are to become {stop}; that must be more than there are and at most n_positions + 1, "
                f"{config.n_positions + 1}"
            )
        sampling = Sampling(temperature if do_sample else 0.0, top_k or 0, 1.0 if top_p is None else top_p)
        inputs = np.repeat(inputs, num_return_sequences, axis=0)
        tokens = continue_inputs(self._sampler(), inputs, stop, image_keys(seed, len(inputs)), sampling)
        if "torch" in sys.modules and isinstance(input_ids, sys.modules["torch"].Tensor):
            return sys.modules["torch"].tensor(np.asarray(tokens, np.int64))
        return tokens

    def _sampler(self) -> ImageGPT:
        """The network whose head predicts; a tied one is the token table, start of sequence included."""
        if not self.config.tie_word_embeddings:
            return nnx.merge(self._graph, self.params)
        network = dataclasses.replace(self._network, pixel_head=True)
        graph = nnx.graphdef(nnx.eval_shape(lambda: ImageGPT(network, nnx.Rngs(0))))
        return nnx.merge(graph, self.params | {"head": {"kernel": self.params["token_table"].T}})

    def _output(self, results, past_length, length):
        output = super()._output(results, past_length, length)
        return dataclasses.replace(output, logits=output.logits[:, :length])


class ImageGPTForImageClassification(ImageGPTPreTrainedModel):
    """With a linear head on the mean of the final hidden states: `logits` [B, num_labels].

    The loss is cross-entropy, mean squared error (num_labels 1), or binary cross-entropy (labels of floats), unless
    config.problem_type says which.
    """

    head = "classes"

    def _problem(self, labels) -> str:
        if labels is None:
            return ""
        if self.config.problem_type:
            return self.config.problem_type
        if self.config.num_labels == 1:
            return "regression"
        return "single_label_classification" if labels.dtype.kind in "iu" else "multi_label_classification"

    def _checked_labels(self, labels, batch, length):
        if labels is None:
            return None
        classes, problem = self.config.num_labels, self._problem(labels)
        if problem == "single_label_classification":
            return whole_numbers("labels", of_shape("labels", labels, (batch,)), classes, also=IGNORED)
        shape = (batch,) if labels.ndim == 1 and classes == 1 else (batch, classes)
        return jnp.asarray(of_shape("labels", labels, shape), jnp.float32)


def _initial_params(network, config: ImageGPTConfig, seed: int, given: dict) -> dict:
    """The parameters that are `given`, and for the others transformers' scheme (`_init_weights`): normal with the
    configured deviation, less in the projections back to the residual stream; norms one, biases zero."""

    def initial(path, leaf):
        names = [key.key for key in path]
        found = given
        for name in names:
            found = found.get(name) if found else None
        if found is not None:
            return found
        if names[-1] == "gain":
            return jnp.ones(leaf.shape)
        if names[-1] == "bias":
            return jnp.zeros(leaf.shape)
        residual = names[-2:] in (["out", "kernel"], ["down", "kernel"])
        std = config.initializer_range / (math.sqrt(2 * config.n_layer) if residual else 1.0)
        rng = np.random.default_rng((seed, *"/".join(names).encode()))
        return jnp.asarray(std * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree_util.tree_map_with_path(initial, hf_weights.abstract_params(network))
