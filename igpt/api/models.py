"""The documented ImageGPT classes of Hugging Face, on our model: change the import and keep the rest of your code.

    from igpt.api import AutoImageProcessor, ImageGPTForCausalImageModeling

Names, arguments, defaults and outputs are those of transformers. Outputs are JAX arrays, calls are jitted, and PyTorch
tensors are accepted. Parameters are a nested dict, `model.params`; to train, take gradients of a call:
`model(**inputs, params=params).loss`. docs/huggingface.md has examples, and a list of differences from transformers.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from igpt.api.forward import IGNORED, Options, forward
from igpt.api.generation import GenerationConfig, generate
from igpt.api.inputs import as_array, checked_inputs, padded, rows, whole_numbers
from igpt.api.outputs import Cache, ModelOutput
from igpt.api.pretrained import ImageGPTPreTrainedModel
from igpt.errors import UserError
from igpt.fields import LARGEST_SEED
from igpt.interop.documented import check_refused, refusals
from igpt.interop.hf_config import ImageGPTConfig
from igpt.interop.processor import ImageGPTImageProcessor

__all__ = ["GenerationConfig", "ImageGPTConfig", "ImageGPTPreTrainedModel", "ModelOutput"]

AutoImageProcessor = ImageGPTFeatureExtractor = ImageGPTImageProcessor  # the older name left transformers 5
ImageGPTImageProcessorFast = ImageGPTImageProcessorPil = ImageGPTImageProcessor

REFUSED = refusals(
    (
        "cross-attention is not supported, because transformers masks its own wrongly",
        dict(encoder_hidden_states=None, encoder_attention_mask=None),
    ),
    ("positions follow from the cache; give position_ids", dict(cache_position=None)),
    ("it has no head and takes no labels; use a class with a head", dict(labels=None)),
)
ARGUMENTS = (
    *("input_ids", "cache", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "labels", "use_cache"),
    *("output_attentions", "output_hidden_states", "return_dict"),
    *("past_key_values", "head_mask", "params", "dropout_key"),  # these have names only
)


class _Callable(ImageGPTPreTrainedModel):
    """The call that the three classes share. Their signatures have the order of transformers 5.24.

    Give input_ids [B, T] in 0..vocab_size - 1 or inputs_embeds [B, T, D]; no start of sequence is added. One row needs
    no first axis. cache, or past_key_values, is that of an earlier call, or (keys, values) for each layer.
    attention_mask [B, past + T] and head_mask [N] or [L, N]: 1 keeps, 0 drops. position_ids [B or 1, T].
    token_type_ids [B, T] are looked up in the token table. labels: [B, T] for images, shifted by this method; [B],
    [B, 1] or [B, num_labels] for a classifier; -100 is ignored. Booleans that are None take the configuration's value.
    params replace the model's own, to differentiate by them. dropout_key, a PRNG key, turns dropout on. Raises
    UserError for arguments that do not fit or are not supported, and TypeError for unknown ones.
    """

    def _call(self, local_variables: dict) -> ModelOutput | tuple:
        """The documented forward pass, jitted.

        `local_variables` are the `locals()` of `__call__`: "self", the arguments of its signature, and "more", a dict
        of further ones. So each signature lists the documented arguments in their order, and nothing lists them again.
        """
        given = {name: value for name, value in local_variables.items() if name not in ("self", "more")}
        given |= local_variables["more"]
        refused = {name: why for name, why in REFUSED.items() if name != "labels" or self.head == "none"}
        given = check_refused(type(self).__name__, given, refused, known=ARGUMENTS)
        x = SimpleNamespace(**dict.fromkeys(ARGUMENTS) | given)
        if x.cache is not None and x.past_key_values is not None:
            raise UserError("cache and past_key_values are both given; they are the same argument, give one")
        config, cache = self.config, x.past_key_values if x.cache is None else x.cache
        prompt = x.input_ids, x.inputs_embeds, x.attention_mask, x.token_type_ids, x.position_ids, x.head_mask
        inputs, past = checked_inputs(config, cache, *prompt)
        labels = x.labels
        if labels is not None:
            labels = self._checked_labels(as_array("labels", labels), *inputs.shape)
            inputs = inputs._replace(labels=labels)

        def chosen(name):
            value = getattr(x, name)
            return bool(getattr(config, name) if value is None else value)

        options = Options(
            cache=chosen("use_cache"),
            hidden_states=chosen("output_hidden_states"),
            attentions=chosen("output_attentions"),
            tied_head=self._tied,
            problem="" if labels is None else self._problem(labels),
        )
        params = self.params if x.params is None else x.params
        key = self._training_key(params, inputs) if x.dropout_key is None else x.dropout_key
        length, past_length = inputs.shape[1], 0 if past is None else past.length
        inputs, past = padded(inputs, past, config.n_positions, label_positions=self.head == "pixels")
        cached = None if past is None else (past.keys, past.values)
        results = forward(self._graph, params, inputs, cached, past_length, length, options, key)

        # Remove the padding from the outputs.
        logits, hidden_states, attentions = (results.get(name) for name in ("logits", "hidden_states", "attentions"))
        output = ModelOutput(
            loss=results.get("loss"),
            logits=logits[:, :length] if self.head == "pixels" else logits,
            last_hidden_state=results["last_hidden_state"][:, :length] if self.head == "none" else None,
            cache=Cache(*results["past"], past_length + length) if options.cache else None,
            hidden_states=hidden_states and tuple(x[:, :length] for x in hidden_states),
            attentions=attentions and tuple(x[:, :, :length, : past_length + length] for x in attentions),
        )
        return output if chosen("return_dict") else output.to_tuple()

    def _training_key(self, params, inputs):
        """A fresh key for dropout in training mode, else None. A traced call would repeat it, and needs its own."""
        if not (self.training and self._network.has_dropout):
            return None
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, inputs))):
            remedy = "give a dropout_key, or call eval() first to leave dropout out"
            raise UserError(f"the model is in training mode, and a traced call cannot draw dropout afresh; {remedy}")
        return jax.random.key(int(np.random.randint(LARGEST_SEED + 1, dtype=np.int64)))

    def _checked_labels(self, labels, batch: int, length: int):
        raise NotImplementedError

    def _problem(self, labels) -> str:
        return "next_token"


class ImageGPTModel(_Callable):
    """The bare network: returns `last_hidden_state` [B, T, D] after the final norm, and has no head."""

    def __call__(
        self,
        input_ids=None,
        cache=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        **more,
    ) -> ModelOutput | tuple:
        return self._call(locals())

    forward = __call__


class ImageGPTForCausalImageModeling(_Callable):
    """The network with a head over the palette: `logits` [B, T, vocab_size - 1]. Position i predicts input i + 1.

    The head has its own matrix, unless the configuration sets tie_word_embeddings. Then the head is the embedding
    [vocab_size, D], which includes the start of sequence, and `logits` are [B, T, vocab_size].
    """

    head = "pixels"

    def __call__(
        self,
        input_ids=None,
        cache=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        **more,
    ) -> ModelOutput | tuple:
        return self._call(locals())

    forward = __call__

    def _checked_labels(self, labels, batch, length):
        """Labels of the first position are not predicted, and may be the start of sequence."""
        labels = whole_numbers("labels", rows("labels", labels), self.config.vocab_size, (batch, length), also=IGNORED)
        colors = self.config.vocab_size - (not self.config.tie_word_embeddings)
        if labels.shape[1] > 1:
            whole_numbers("labels after the first position", labels[:, 1:], colors, also=IGNORED)
        return labels

    def generate(
        self,
        inputs=None,
        generation_config=None,
        logits_processor=None,
        stopping_criteria=None,
        prefix_allowed_tokens_fn=None,
        synced_gpus=None,
        assistant_model=None,
        streamer=None,
        negative_prompt_ids=None,
        negative_prompt_attention_mask=None,
        custom_generate=None,
        *,
        seed: int | None = None,
        **settings,
    ):
        """Continues a prompt to max_length inputs: int [B * num_return_sequences, max_length].

        inputs, or input_ids: [B, P]; without them, one row starts from the start of sequence. inputs_embeds [B, P, D]
        may be given instead, and then only new tokens are returned. attention_mask [B, P] has zeros for padding on the
        left. The settings are those in `generation.DEFAULTS`, and may be in a generation_config, too; all others that
        transformers documents are refused by name. max_length counts the prompt; by default the image is completed.
        With do_sample False, decoding is greedy. Equal seeds draw equal images; without a seed, each call draws others.
        With return_dict_in_generate, the result is a GenerateOutput. The tokens are a PyTorch tensor if the prompt is
        one. Raises UserError for arguments that do not fit.
        """
        refused = dict(
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            synced_gpus=synced_gpus,
            assistant_model=assistant_model,
            streamer=streamer,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            custom_generate=custom_generate,
        )
        return generate(self, inputs, generation_config, refused | settings, seed)


class ImageGPTForImageClassification(_Callable):
    """The network with a linear head on the mean of the final hidden states over positions: logits [B, num_labels].

    config.problem_type chooses the loss. If it is None: mean squared error if num_labels is 1, cross-entropy for
    labels of whole numbers, binary cross-entropy for labels of floats.
    """

    head = "classes"

    def __call__(
        self,
        input_ids=None,
        cache=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        **more,
    ) -> ModelOutput | tuple:
        return self._call(locals())

    forward = __call__

    def _checked_labels(self, labels, batch, length):
        classes = self.config.num_labels
        if self._problem(labels) == "single_label_classification":
            labels = labels[:, 0] if labels.shape == (batch, 1) else labels  # transformers flattens them
            return whole_numbers("labels", labels, classes, (batch,), also=IGNORED)
        shape = (batch,) if labels.ndim == 1 and classes == 1 else (batch, classes)
        return jnp.asarray(as_array("labels", labels, shape), jnp.float32)

    def _problem(self, labels) -> str:
        if self.config.problem_type:
            return self.config.problem_type
        if self.config.num_labels == 1:
            return "regression"
        return "single_label_classification" if labels.dtype.kind in "iu" else "multi_label_classification"
