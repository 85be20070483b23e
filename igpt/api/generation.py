"""`generate` of the documented classes: its arguments, left padding and outputs. igpt/sample.py draws the tokens."""

import copy
import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
from flax import nnx

from igpt.api.inputs import checked_mask, rows, whole_numbers
from igpt.api.outputs import GenerateOutput
from igpt.draw import Sampling, image_keys, truncate
from igpt.errors import UserError
from igpt.fields import LARGEST_SEED
from igpt.files import read_json
from igpt.interop.documented import check_refused, refusals
from igpt.interop.hf_config import TOKEN_IDS, ImageGPTConfig
from igpt.interop.hub import GENERATION
from igpt.sample import continue_inputs

DEFAULTS = (  # the settings of a draw, with transformers' defaults; without a length, the image is completed
    dict(max_length=None, max_new_tokens=None, num_return_sequences=1)
    | dict(do_sample=False, temperature=1.0, top_k=50, top_p=1.0)
    | dict.fromkeys(TOKEN_IDS)
    | dict(return_dict_in_generate=False, output_scores=False, output_logits=False, use_cache=True)
    | dict(output_attentions=False, output_hidden_states=False)
    | dict(min_length=0, min_new_tokens=None)  # without an end token, all rows are longer; with one, see _stop
)
FLAGS = [name for name, value in DEFAULTS.items() if isinstance(value, bool)]
REFUSED = refusals(
    (
        "there is no beam search; draw several images with num_return_sequences",
        dict(num_beams=1, num_beam_groups=1, early_stopping=False, length_penalty=1.0, diversity_penalty=0.0)
        | dict(constraints=None, force_words_ids=None, prefix_allowed_tokens_fn=None),
    ),
    (
        "only temperature, top_k and top_p change a draw",
        dict(typical_p=1.0, repetition_penalty=1.0, encoder_repetition_penalty=1.0, guidance_scale=1.0)
        | dict(epsilon_cutoff=0.0, eta_cutoff=0.0, penalty_alpha=0.0, min_p=None, top_h=None, dola_layers=None)
        | dict(no_repeat_ngram_size=0, encoder_no_repeat_ngram_size=0, renormalize_logits=False)
        | dict(remove_invalid_values=False, token_healing=False, logits_processor=[], bad_words_ids=None)
        | dict(suppress_tokens=None, begin_suppress_tokens=None, sequence_bias=None, watermarking_config=None)
        | dict(exponential_decay_length_penalty=None, forced_bos_token_id=None, forced_eos_token_id=None)
        | dict(negative_prompt_ids=None, negative_prompt_attention_mask=None),
    ),
    ("rows end at max_length or at eos_token_id", dict(stopping_criteria=[], stop_strings=None, max_time=None)),
    (
        "one compiled program draws all tokens",
        dict(assistant_model=None, prompt_lookup_num_tokens=None, assistant_early_exit=None, use_mtp=False)
        | dict(assistant_ensemble_weight=None, max_matching_ngram_size=None, speculation_type=None)
        | dict(is_assistant=False, num_assistant_tokens=20, num_assistant_tokens_schedule="constant")
        | dict(assistant_confidence_threshold=0.4, assistant_lookbehind=10, target_lookbehind=10, low_memory=False)
        | dict(cache_implementation=("static", "dynamic"), cache_config=None, max_cache_len=None, streamer=None)
        | dict(compile_config=None, disable_compile=False, prefill_chunk_size=None, synced_gpus=False)
        | dict(continuous_batching_config=None),
    ),
    ("code of a repository is never run", dict(custom_generate=None, trust_remote_code=False)),
    (
        "a prompt is input_ids or inputs_embeds, with an attention_mask",
        dict(token_type_ids=None, position_ids=None, head_mask=None, cache=None, past_key_values=None)
        | dict(encoder_hidden_states=None, encoder_attention_mask=None, decoder_start_token_id=None),
    ),
)


class GenerationConfig:
    """The settings of `generate`, as attributes. UserError for a setting that is refused, TypeError if unknown."""

    def __init__(self, **settings):
        vars(self).update(check_refused("GenerationConfig", settings, REFUSED, known=DEFAULTS))

    def to_dict(self) -> dict:
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def of(cls, given) -> "GenerationConfig":
        """From one of these, a dict, a configuration of transformers, or None."""
        settings = given or {}
        return cls(**_public(settings if isinstance(settings, Mapping) else settings.to_dict()))

    @classmethod
    def from_model_config(cls, config: ImageGPTConfig) -> "GenerationConfig":
        """The settings of a model whose directory has no others: the token ids of its configuration."""
        return cls(**{name: getattr(config, name) for name in TOKEN_IDS})

    @classmethod
    def from_directory(cls, directory: Path) -> "GenerationConfig | None":
        """Reads generation_config.json, if it is there. `generate` checks it, since a model has other uses, too."""
        path, config = directory / GENERATION, cls()
        if not path.is_file():
            return None
        found = _public(read_json(path))
        vars(config).update({name: value for name, value in found.items() if not hasattr(cls, name)})  # no methods
        return config


def _public(settings: Mapping) -> dict:
    """Without what transformers notes beside the settings."""
    return {name: value for name, value in settings.items() if name != "transformers_version" and name[:1] != "_"}


def generate(model, inputs, generation_config, arguments: dict, seed: int | None):
    """`ImageGPTForCausalImageModeling.generate`. `arguments` are its other keywords, settings or parts of a prompt."""
    prompt = {name: arguments.pop(name, None) for name in ("input_ids", "inputs_embeds", "attention_mask")}
    how = _settings(model, generation_config, arguments)
    if inputs is not None and prompt["input_ids"] is not None:
        raise UserError("inputs and input_ids are both given; they are the same argument, give one")
    given_ids = prompt["input_ids"] if inputs is None else inputs
    network, ids, embeds, pads = _prompt(model, given_ids, prompt["inputs_embeds"], prompt["attention_mask"], how)
    count, given = ids.shape
    stop = _stop(model.config, given, how)
    sampling = Sampling(
        float(how.temperature) if how.do_sample else 0.0, how.top_k or 0, 1.0 if how.top_p is None else how.top_p
    )
    if seed is None:  # NumPy's global state is seeded once per process, or by the caller
        seed = int(np.random.randint(LARGEST_SEED + 1, dtype=np.int64))
    keys = image_keys(seed, count)
    if not pads.any():
        tokens = continue_inputs(network, ids, stop, keys, sampling)
    else:
        tokens = np.concatenate([ids, np.zeros((count, stop - given), np.int32)], axis=1)
        for pad in np.unique(pads):  # rows with equally much padding are continued without it
            at = np.flatnonzero(pads == pad)
            tokens[at, pad:] = continue_inputs(network, ids[at, pad:], stop - int(pad), keys[at], sampling)
    if how.eos_token_id is not None:
        tokens = _ended(np.array(tokens), given, how)
    result = tokens if embeds is None else tokens[:, given:]
    torch = sys.modules.get("torch")
    if torch and any(isinstance(x, torch.Tensor) for x in (given_ids, *prompt.values())):
        result = torch.tensor(np.asarray(result, np.int64))
    else:
        result = jnp.asarray(result)
    if not how.return_dict_in_generate:
        return result
    return _outputs(model, result, np.asarray(tokens), embeds, pads, given, how, sampling)


def _settings(model, given, arguments: dict) -> SimpleNamespace:
    """All settings. `arguments` take precedence over the given configuration, and that over the model's own."""
    own = check_refused("the model's generation_config", model.generation_config.to_dict(), REFUSED)
    settings = DEFAULTS | own | GenerationConfig.of(given).to_dict()
    off = ("top_k", "top_p", *TOKEN_IDS)  # for these, None means that they are not used
    arguments = check_refused("generate", arguments, REFUSED, known=DEFAULTS)
    settings |= {name: value for name, value in arguments.items() if value is not None or name in off}
    _check(settings, model.config.vocab_size)
    return SimpleNamespace(**settings)


def _check(settings: dict, vocab_size: int) -> None:
    """Raises UserError for a value that a setting cannot have. Files are untrusted, generation_config.json too."""

    def is_id(value):
        return _is_whole(value) and value < vocab_size

    def are_ids(value):
        ids = value if isinstance(value, list | tuple) else [value]
        return len(ids) > 0 and all(map(is_id, ids))

    an_id = f"a whole number from 0 to {vocab_size - 1}"
    checks = (  # names of settings, the condition on their values, and the same condition in words
        (["max_length", "max_new_tokens", "num_return_sequences"], lambda x: _is_whole(x, 1), "a whole number from 1"),
        (["min_length", "min_new_tokens", "top_k"], _is_whole, "a whole number from 0"),
        (["temperature", "top_p"], _is_finite, "a finite number"),
        (FLAGS, lambda x: isinstance(x, bool | np.bool_), "True or False"),
        (["bos_token_id", "pad_token_id"], is_id, an_id),
        (["eos_token_id"], are_ids, f"{an_id}, or a list of them"),
    )
    for names, holds, allowed in checks:
        for name in names:
            if (value := settings[name]) is not None and not holds(value):
                raise UserError(f"{name} is {reprlib.repr(value)}; give {allowed}")


def _is_whole(value, least: int = 0) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and value >= least


def _is_finite(value) -> bool:
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def _prompt(model, input_ids, embeds, mask, how):
    """The network that continues the prompt, the prompt's ids, int32 [B, P], its embeddings or None, and its padding.

    Embeddings [B, P, D] become rows of the network's token table, with ids beyond the start of sequence.
    """
    config, network = model.config, model.sampler()
    if input_ids is not None and embeds is not None:
        raise UserError("give either input_ids or inputs_embeds, and not both")
    if embeds is not None:
        embeds = np.asarray(rows("inputs_embeds", embeds, axes=3), np.float32)
        if embeds.ndim != 3 or embeds.shape[2] != config.n_embd or 0 in embeds.shape:
            raise UserError(f"inputs_embeds has shape {list(embeds.shape)}; give [B, P, {config.n_embd}]")
        ids = config.vocab_size + np.arange(embeds[..., 0].size, dtype=np.int32).reshape(embeds.shape[:2])
        table = jnp.concatenate([network.token_table[...], embeds.reshape(-1, config.n_embd)])
        network.token_table = nnx.Param(table)
    else:
        if input_ids is None and how.bos_token_id is None and config.other.get("prepend_sos") is False:
            raise UserError("this model reads no start of sequence; give the first tokens of an image")
        start = config.sos_token_id if how.bos_token_id is None else how.bos_token_id
        ids = rows("input_ids", np.full((1, 1), start, np.int32) if input_ids is None else input_ids)
        ids = whole_numbers("input_ids", ids, config.vocab_size)
    pads = np.zeros(len(ids), np.int32)
    if mask is not None:
        keep = np.asarray(checked_mask(mask, ids.shape)) != 0
        pads = (~keep).sum(axis=1)
        if not np.array_equal(keep, np.arange(ids.shape[1]) >= pads[:, None]) or (pads == ids.shape[1]).any():
            raise UserError("attention_mask has zeros after ones; generate skips only padding on the left of a prompt")
    repeated = [None if x is None else np.repeat(x, how.num_return_sequences, axis=0) for x in (ids, embeds, pads)]
    return network, *repeated


def _stop(config, given: int, how) -> int:
    """The length at which to stop. Raises UserError unless it is above the prompt's and within the positions.

    Also raises it if end tokens are given and a smallest length: all tokens are drawn, and cut off after an end token.
    """
    for name, least in (("min_length", (how.min_length or 0) - given), ("min_new_tokens", how.min_new_tokens or 0)):
        if how.eos_token_id is not None and least > 0:
            problem = f"{name} is {getattr(how, name)}, and eos_token_id is {how.eos_token_id}"
            raise UserError(f"{problem}: an end token may be drawn earlier; give {name}=0 or eos_token_id=None")
    most = config.n_positions + 1
    stop = given + how.max_new_tokens if how.max_new_tokens is not None else how.max_length or most
    if not given < stop <= most:
        allowed = f"give a max_length above {given} and at most n_positions + 1, {most}"
        raise UserError(f"the prompt has {given} inputs and would be continued to {stop}; {allowed}")
    return stop


def _ended(tokens: np.ndarray, given: int, how) -> np.ndarray:
    """Replaces what follows a row's first end token by padding, and cuts off the columns that all rows have padded."""
    ends = np.atleast_1d(how.eos_token_id)
    is_end = np.isin(tokens[:, given:], ends)
    after = np.cumsum(is_end, axis=1) - is_end > 0
    tokens[:, given:][after] = ends[0] if how.pad_token_id is None else how.pad_token_id
    return tokens[:, : given + int((~after).any(axis=0).sum())]


def _outputs(model, sequences, tokens, embeds, pads, given, how, sampling) -> GenerateOutput:
    """Runs the finished rows through the model once: position i gives the logits of token i + 1."""
    read = tokens[:, :-1]
    position = np.arange(read.shape[1])[None]
    inputs = dict(input_ids=read)
    if embeds is not None:
        table = np.asarray(model.params["token_table"])
        inputs = dict(inputs_embeds=np.concatenate([embeds, table[read[:, given:]]], axis=1))
    if pads.any():
        inputs |= dict(attention_mask=position >= pads[:, None], position_ids=np.maximum(position - pads[:, None], 0))
    wanted = {name: bool(getattr(how, name)) for name in ("use_cache", "output_attentions", "output_hidden_states")}
    full = copy.copy(model).eval()(**inputs, **wanted, return_dict=True)
    logits = tuple(full.logits[:, i] for i in range(given - 1, read.shape[1]))
    scores = logits
    if not sampling.greedy:
        scores = tuple(truncate(x / sampling.temperature, sampling.top_k, sampling.top_p) for x in logits)
    steps = [(0, given), *((i, i + 1) for i in range(given, read.shape[1]))]  # the inputs that each step reads
    return GenerateOutput(
        sequences=sequences,
        scores=scores if how.output_scores else None,
        logits=logits if how.output_logits else None,
        attentions=full.attentions and tuple(tuple(x[:, :, i:j, :j] for x in full.attentions) for i, j in steps),
        hidden_states=full.hidden_states and tuple(tuple(x[:, i:j] for x in full.hidden_states) for i, j in steps),
        cache=full.cache,
    )
