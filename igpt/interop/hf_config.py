"""Hugging Face's documented `ImageGPTConfig`. hf_network.py converts it to and from our ModelConfig.

Source of names, defaults and meanings: transformers 5.24, models/imagegpt/configuration_imagegpt.py.
"""

import copy
import dataclasses
import difflib
import json
import reprlib
import sys
from pathlib import Path
from typing import ClassVar

from igpt.activations import ACTIVATIONS
from igpt.errors import UserError
from igpt.files import read_json, write_text
from igpt.interop.documented import OF_FETCHING, OF_UPLOADING, check_refused, fetching, folder_to_save, refusals
from igpt.interop.hub import resolve

MAX_LAYERS = 1000  # a limit, so that a malicious config cannot request endless lists of names
MAX_LABELS = 1 << 16  # the same

ALIASES = {  # alias -> field, as in the documentation's attribute_map
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
SAME_ACTIVATION = {"swish": "silu", "gelu_python": "gelu"} | dict.fromkeys(
    ("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), "gelu_new"
)
LEARNED = ("prelu", "xielu")  # activations of transformers with parameters of their own
# Settings of `generate`, if the directory has no others. They are None by default, and written only if they are given.
TOKEN_IDS = ("bos_token_id", "pad_token_id", "eos_token_id")
# Fields of the configurations of transformers 4 and 5 that this network does not read. They are kept and written back.
UNREAD = (
    *("architectures", "attn_implementation", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward"),
    *("cross_attention_hidden_size", "decoder_start_token_id", "dtype", "eos_token_id", "experts_implementation"),
    *("finetuning_task", "gradient_checkpointing", "is_decoder", "is_encoder_decoder", "layer_types", "max_length"),
    *("n_ctx", "name_or_path", "num_beams", "pad_token_id", "prefix", "sep_token_id", "task_specific_params"),
    *("tf_legacy_loss", "tie_encoder_decoder", "tie_last_hidden_states", "tokenizer_class", "torch_dtype"),
    *("torchscript", "transformers_version", "type_vocab_size", "use_bfloat16"),
)
REFUSED = refusals(  # fields that would change the network in a way that is not supported
    ("transformers' own is masked wrongly; set it to False", dict(add_cross_attention=False)),
    ("heads cannot be pruned; a head_mask turns them off", dict(pruned_heads={})),
    ("all layers have the same configuration", dict(per_layer_config={})),
    ("weights are float32, float16 or bfloat16", dict(quantization_config={})),
)
ARCHITECTURES = dict(  # a model's head -> its class in transformers
    pixels="ImageGPTForCausalImageModeling", classes="ImageGPTForImageClassification", none="ImageGPTModel"
)


@dataclasses.dataclass(init=False, eq=False, repr=False)
class ImageGPTConfig:
    """The documented configuration. `other` keeps fields that the network does not read, and `to_dict` returns them.

    num_labels, id2label {number: name} and label2id {name: number} always agree: any of them sets all three. Names of
    unnamed classes are LABEL_0, LABEL_1, ... Raises UserError, which names the field, for an impossible value and for a
    keyword that looks misspelt.
    """

    vocab_size: int = 513  # the colours of the palette, then the start of sequence
    n_positions: int = 1024
    n_embd: int = 512
    n_layer: int = 24
    n_head: int = 8
    n_inner: int | None = None  # None: 4 x n_embd
    activation_function: str = "quick_gelu"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    scale_attn_by_inverse_layer_idx: bool = False  # scales scores by 1 / (layer_idx + 1)
    reorder_and_upcast_attn: bool = False  # has no effect here: scores are always float32
    # Every Hugging Face model has the fields below. A file contains only those that differ from the default.
    id2label: dict | None = None  # the names of the classes; num_labels and label2id are derived from it
    problem_type: str | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True

    model_type: ClassVar[str] = "imagegpt"

    def __init__(self, **settings):
        for name in settings:
            _check_name(name)
        self._set(settings, *(settings.get(name) for name in LABELS))

    def _set(self, settings: dict, num_labels=None, id2label=None, label2id=None) -> None:
        settings = DEFAULTS | {ALIASES.get(name, name): value for name, value in settings.items()}
        settings["id2label"] = _class_names(num_labels, id2label, label2id)
        self.other = {name: value for name, value in settings.items() if name not in DEFAULTS and name not in LABELS}
        vars(self).update({name: settings[name] for name in DEFAULTS})
        self.check()

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @property
    def label2id(self) -> dict[str, int]:
        return {name: number for number, name in self.id2label.items()}

    def __getattr__(self, name):  # Python calls this only for attributes that are not set
        if name in ALIASES:
            return getattr(self, ALIASES[name])
        if name in self.__dict__.get("other", {}):
            return self.other[name]
        if name in TOKEN_IDS:
            return None
        raise AttributeError(f"ImageGPTConfig has no {name!r}")

    def __setattr__(self, name, value):
        name = ALIASES.get(name, name)
        if name in LABELS:
            names = _class_names(**{name: value})
            if name != "num_labels" or len(names) != self.num_labels:  # the old names are wrong for another number
                vars(self)["id2label"] = names
        elif name in DEFAULTS or name == "other":
            vars(self)[name] = value
        else:
            _check_name(name)
            self.other[name] = value

    def __eq__(self, other):
        return isinstance(other, ImageGPTConfig) and self.to_dict() == other.to_dict()

    def __repr__(self):
        return f"ImageGPTConfig {self.to_json_string()}"

    def check(self) -> None:
        """Raises UserError if a field has a value that no network could have."""
        if self.activation_function in LEARNED:
            learned = f"activation_function {self.activation_function!r} has parameters of its own"
            raise UserError(f"{learned}, which igpt does not have; choose one of {', '.join(KNOWN_ACTIVATIONS)}")
        for names, holds, allowed in RULES:
            for name in names:
                if not holds(value := getattr(self, name)):
                    raise UserError(f"{name} is {reprlib.repr(value)}; it must be {allowed}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            remedy = "a classifier needs two classes, and one number is a regression"
            raise UserError(f"problem_type is {self.problem_type!r} and num_labels is 1; {remedy}")
        _class_names(id2label=self.id2label)  # the dict may have been changed in place
        check_refused("ImageGPTConfig", self.other, REFUSED)

    @property
    def sos_token_id(self) -> int:
        """The start of sequence, the last row of the embedding. Callers must prepend it (docs/huggingface.md)."""
        return self.vocab_size - 1

    def to_dict(self) -> dict:
        """The configuration as transformers writes it to config.json."""
        settings = {name: getattr(self, name) for name in DEFAULTS} | {"label2id": self.label2id}
        if self.id2label == _class_names():
            del settings["id2label"], settings["label2id"]
        settings = {k: value for k, value in settings.items() if k not in COMMON or value != DEFAULTS[k]}
        return copy.deepcopy(settings | self.other) | {"model_type": self.model_type}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, path) -> None:
        """Writes the text of `to_json_string`."""
        write_text(path, self.to_json_string())

    @classmethod
    def from_json_file(cls, path) -> "ImageGPTConfig":
        """Reads a file of `to_json_file`, or a config.json of any version of transformers."""
        return cls.from_dict(read_json(Path(path)))

    @classmethod
    def from_dict(cls, settings: dict, **overrides) -> "ImageGPTConfig | tuple":
        """Reads a dict from `to_dict` or any version of transformers. `overrides` replace fields, and must be fields.

        With return_unused_kwargs=True, returns (the configuration, the overrides that are no fields).
        """
        model_type = settings.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise UserError(f"model_type is {reprlib.repr(model_type)}; only {cls.model_type!r} models can be loaded")
        return_unused, unused = overrides.pop("return_unused_kwargs", False), {}
        for name in overrides.keys() - {*DEFAULTS, *ALIASES, *LABELS, *UNREAD, *REFUSED, *settings}:
            if not return_unused:
                _check_name(name)
                raise UserError(f"ImageGPTConfig has no field {name!r}; there are {', '.join(DEFAULTS)}, num_labels")
            unused[name] = overrides.pop(name)
        config = cls.__new__(cls)
        labels = {name: settings.get(name) for name in LABELS}
        if labels["id2label"] is not None:  # as in transformers, a file's id2label takes precedence over the other two
            labels = {"id2label": labels["id2label"]}
        config._set({name: value for name, value in settings.items() if name != "model_type"}, **labels)
        labels = {name: value for name in LABELS if (value := overrides.pop(name, None)) is not None}
        if labels.keys() == {"num_labels"}:
            config.num_labels = labels["num_labels"]
        elif labels:
            config.id2label = _class_names(**labels)
        for name, value in overrides.items():
            setattr(config, name, value)
        config.check()
        return (config, unused) if return_unused else config

    @classmethod
    def from_pretrained(cls, ref, **overrides) -> "ImageGPTConfig | tuple":
        """Reads config.json of a directory or hub id. UserError, with the path, if it is damaged or unsuitable.

        `overrides`: revision, subfolder and the other arguments of FETCHING, and those of `from_dict`.
        """
        path = resolve(ref, files=["config.json"], **fetching(overrides)) / "config.json"
        overrides = check_refused("ImageGPTConfig.from_pretrained", overrides, OF_FETCHING)
        settings = read_json(path)
        if {"data", "palette", "model"} <= settings.keys():
            raise UserError(f"{ref} is a run directory; convert it first: igpt export --model={ref} --out=DIR")
        try:
            return cls.from_dict(settings, **overrides)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def save_pretrained(self, directory, push_to_hub: bool = False) -> None:
        """Writes config.json into the directory. UserError, and nothing is written, if it could not be loaded again."""
        check_refused("save_pretrained", {"push_to_hub": push_to_hub}, OF_UPLOADING)
        self.check()
        self.to_json_file(folder_to_save(directory) / "config.json")

    def with_dtype(self, dtype: str) -> "ImageGPTConfig":
        """A copy whose field dtype, or torch_dtype in older files, names the type of the weights beside it."""
        settings = self.to_dict()
        return type(self).from_dict(settings | {n: dtype for n in ("dtype", "torch_dtype") if n in settings})


DEFAULTS = {field.name: field.default for field in dataclasses.fields(ImageGPTConfig)}
COMMON = list(DEFAULTS)[list(DEFAULTS).index("id2label") :]  # the fields of every Hugging Face model
LABELS = ("num_labels", "id2label", "label2id")


def _check_name(name: str) -> None:
    """Raises UserError for a name that is no field, but looks like a misspelt one."""
    known = {*DEFAULTS, *ALIASES, *LABELS}
    if name in known or name in UNREAD or name in REFUSED:
        return
    if close := difflib.get_close_matches(name, known, 1, cutoff=0.8):
        raise UserError(f"ImageGPTConfig has no {name!r}; did you mean {close[0]!r}?")


def _class_names(num_labels=None, id2label=None, label2id=None) -> dict[int, str]:
    """The name of each class 0..C-1, from any of the three fields. UserError if the fields that are given disagree."""
    if num_labels is not None and not (_is_whole(num_labels) and num_labels <= MAX_LABELS):
        raise UserError(f"num_labels is {reprlib.repr(num_labels)}; it must be a whole number, 1 to {MAX_LABELS}")
    names = None if id2label is None else _numbered("id2label", id2label, lambda pair: pair)
    if label2id is not None and names is None:
        names = _numbered("label2id", label2id, reversed)
    elif label2id is not None:
        pairs = {(str(number), name) for number, name in names.items()}
        if not isinstance(label2id, dict) or {(str(number), name) for name, number in label2id.items()} != pairs:
            raise UserError(f"label2id is {reprlib.repr(label2id)}, not the inverse of id2label; give one of them")
    if names is None:
        return {i: f"LABEL_{i}" for i in range(num_labels or 2)}
    if num_labels not in (None, len(names)):
        raise UserError(f"num_labels is {num_labels}, but {len(names)} classes have names; give one of them")
    return names


def _numbered(field: str, value, pair_of) -> dict[int, str]:
    """{number: name} from a dict whose items `pair_of` turns into (number, name). JSON's numbers are strings."""
    names = {}
    if not isinstance(value, dict) or not 1 <= len(value) <= MAX_LABELS:
        raise UserError(f"{field} is {reprlib.repr(value)}; it must be None or a dict of at least one class")
    for number, name in map(pair_of, value.items()):
        if not (str(number).isdecimal() and len(str(number)) < 10 and isinstance(name, str)):
            shown = f"{reprlib.repr(number)} and {reprlib.repr(name)}"
            raise UserError(f"{field} has {shown}; whole numbers and names are needed, such as 0 and 'cat'")
        names[int(number)] = name
    if sorted(names) != list(range(len(value))):
        raise UserError(f"{field} has the numbers {reprlib.repr(sorted(names))}; they must be 0..{len(value) - 1}")
    return dict(sorted(names.items()))


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 1 << 31


def _is_id(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_from_0(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


KNOWN_ACTIVATIONS = (*ACTIVATIONS, *SAME_ACTIVATION)
PROBLEMS = (None, "regression", "single_label_classification", "multi_label_classification")
BOOLEANS = [name for name, value in DEFAULTS.items() if isinstance(value, bool)]
RULES = (  # names of fields, the condition on their values, and the same condition in words
    (["vocab_size", "n_positions", "n_embd", "n_layer", "n_head"], _is_whole, "a positive whole number"),
    (["n_layer"], lambda value: value <= MAX_LAYERS, f"at most {MAX_LAYERS}"),
    (["vocab_size"], lambda value: value >= 2, "at least 2: a colour and the start of sequence"),
    (["n_inner"], lambda value: value is None or _is_whole(value), "None or a positive whole number"),
    (["resid_pdrop", "embd_pdrop", "attn_pdrop"], lambda value: _is_from_0(value) and value < 1, "in [0, 1)"),
    (["layer_norm_epsilon", "initializer_range"], _is_from_0, "a finite number, 0 or more"),
    (BOOLEANS, lambda value: isinstance(value, bool), "true or false"),
    (["bos_token_id", "pad_token_id"], lambda value: value is None or _is_id(value), "None or a whole number"),
    (
        ["eos_token_id"],
        lambda value: value is None or all(map(_is_id, value if isinstance(value, list) else [value])),
        "None or a whole number, or a list of whole numbers",
    ),
    (["activation_function"], lambda value: value in KNOWN_ACTIVATIONS, f"one of {', '.join(KNOWN_ACTIVATIONS)}"),
    (["problem_type"], lambda value: value in PROBLEMS, f"one of {PROBLEMS}"),
)
