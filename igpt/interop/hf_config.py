"""Hugging Face's documented `ImageGPTConfig`, and its conversion to and from our ModelConfig.

Source of names, defaults and meanings: transformers 5.23, models/imagegpt/configuration_imagegpt.py.
"""

import copy
import dataclasses
import difflib
import json
import reprlib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from igpt.data.classes import distinct_names, full_names
from igpt.errors import UserError
from igpt.files import read_json, write_text
from igpt.interop.hub import resolve
from igpt.model import ACTIVATIONS, ModelConfig

MAX_LAYERS = 1000  # a limit, so that a malicious config cannot request endless lists of names

ALIASES = {  # alias -> field, as in the documentation's attribute_map
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
SAME_ACTIVATION = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "gelu_python": "gelu"}
SAME_FIELD = {  # field of ModelConfig -> field of ImageGPTConfig with the same value
    "width": "n_embd",
    "depth": "n_layer",
    "num_heads": "n_head",
    "seq_len": "n_positions",
    "embedding_dropout": "embd_pdrop",
    "residual_dropout": "resid_pdrop",
    "attention_dropout": "attn_pdrop",
    "norm_epsilon": "layer_norm_epsilon",
    "scale_scores": "scale_attn_weights",
    "scale_scores_by_layer": "scale_attn_by_inverse_layer_idx",
}

ARCHITECTURES = dict(  # a model's head -> its class in transformers
    pixels="ImageGPTForCausalImageModeling", classes="ImageGPTForImageClassification", none="ImageGPTModel"
)


@dataclasses.dataclass(init=False, eq=False, repr=False)
class ImageGPTConfig:
    """The documented configuration. `other` keeps unknown keys of a file, and `to_dict` returns them.

    Raises UserError, which names the field, for an impossible value and for a keyword that looks misspelt.
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
    num_labels: int = 2
    id2label: dict | None = None
    label2id: dict | None = None
    problem_type: str | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True

    model_type: ClassVar[str] = "imagegpt"

    def __init__(self, **settings):
        known = DEFAULTS.keys() | ALIASES.keys()
        for name in settings.keys() - known:
            if close := difflib.get_close_matches(name, known, 1, cutoff=0.8):
                raise UserError(f"ImageGPTConfig has no {name!r}; did you mean {close[0]!r}?")
        self._set(settings)

    def _set(self, settings: dict) -> None:
        settings = DEFAULTS | {ALIASES.get(name, name): value for name, value in settings.items()}
        if isinstance(settings["id2label"], dict):
            settings["num_labels"] = len(settings["id2label"])
        self.other = {name: settings.pop(name) for name in list(settings) if name not in DEFAULTS}
        vars(self).update(settings)
        self.check()

    def __getattr__(self, name):  # Python calls this only for attributes that are not set
        if name in ALIASES:
            return getattr(self, ALIASES[name])
        if name in self.__dict__.get("other", {}):
            return self.other[name]
        raise AttributeError(f"ImageGPTConfig has no {name!r}")

    def __setattr__(self, name, value):
        super().__setattr__(ALIASES.get(name, name), value)
        if name == "num_labels":
            self.id2label = self.label2id = None  # the old names are wrong for the new number of classes

    def __eq__(self, other):
        return isinstance(other, ImageGPTConfig) and self.to_dict() == other.to_dict()

    def __repr__(self):
        return f"ImageGPTConfig {self.to_json_string()}"

    def check(self) -> None:
        """Raises UserError if a field has a value that no network could have."""
        for names, holds, allowed in RULES:
            for name in names:
                if not holds(value := getattr(self, name)):
                    raise UserError(f"{name} is {reprlib.repr(value)}; it must be {allowed}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.other.get("add_cross_attention"):
            raise UserError("add_cross_attention is true, but transformers' own is masked wrongly; set it to false")

    @property
    def sos_token_id(self) -> int:
        """The start of sequence, the last row of the embedding. Callers must prepend it (docs/huggingface.md)."""
        return self.vocab_size - 1

    def to_dict(self) -> dict:
        """The configuration as transformers writes it to config.json."""
        settings = {name: getattr(self, name) for name in DEFAULTS}
        if self.num_labels != DEFAULTS["num_labels"] and self.id2label is None:
            settings["id2label"] = {str(i): f"LABEL_{i}" for i in range(self.num_labels)}
            settings["label2id"] = {f"LABEL_{i}": i for i in range(self.num_labels)}
        del settings["num_labels"]  # transformers derives it from id2label
        settings = {k: value for k, value in settings.items() if k not in COMMON or value != DEFAULTS[k]}
        return copy.deepcopy(settings | self.other) | {"model_type": self.model_type}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, settings: dict, **overrides) -> "ImageGPTConfig":
        """Reads a dict from `to_dict` or any version of transformers. `overrides` are arguments of the constructor."""
        model_type = settings.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise UserError(f"model_type is {reprlib.repr(model_type)}; only {cls.model_type!r} models can be loaded")
        config = cls.__new__(cls)
        config._set({name: value for name, value in settings.items() if name != "model_type"})
        cls(**overrides)  # raises for misspelt names and invalid values
        for name, value in overrides.items():
            setattr(config, name, value)
        config.check()
        return config

    @classmethod
    def from_pretrained(cls, ref, **overrides) -> "ImageGPTConfig":
        """Reads config.json of a directory or hub id. UserError, with the path, if it is damaged or unsuitable."""
        path = resolve(ref) / "config.json"
        settings = read_json(path)
        if {"data", "palette", "model"} <= settings.keys():
            raise UserError(f"{ref} is a run directory; convert it first: igpt export --model={ref} --out=DIR")
        try:
            return cls.from_dict(settings, **overrides)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def save_pretrained(self, directory) -> None:
        """Writes config.json into the directory."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_text(Path(directory) / "config.json", self.to_json_string())


DEFAULTS = {field.name: field.default for field in dataclasses.fields(ImageGPTConfig)}
COMMON = list(DEFAULTS)[list(DEFAULTS).index("num_labels") :]  # the fields of every Hugging Face model


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 1 << 31


def _is_from_0(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


KNOWN_ACTIVATIONS = (*ACTIVATIONS, *SAME_ACTIVATION)
PROBLEMS = (None, "regression", "single_label_classification", "multi_label_classification")
BOOLEANS = [name for name, value in DEFAULTS.items() if isinstance(value, bool)]
RULES = (  # names of fields, the condition on their values, and the same condition in words
    (["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "num_labels"], _is_whole, "a positive whole number"),
    (["n_layer"], lambda value: value <= MAX_LAYERS, f"at most {MAX_LAYERS}"),
    (["vocab_size"], lambda value: value >= 2, "at least 2: a colour and the start of sequence"),
    (["n_inner"], lambda value: value is None or _is_whole(value), "None or a positive whole number"),
    (["resid_pdrop", "embd_pdrop", "attn_pdrop"], lambda value: _is_from_0(value) and value < 1, "in [0, 1)"),
    (["layer_norm_epsilon", "initializer_range"], _is_from_0, "a finite number, 0 or more"),
    (BOOLEANS, lambda value: isinstance(value, bool), "true or false"),
    (["activation_function"], lambda value: value in KNOWN_ACTIVATIONS, f"one of {', '.join(KNOWN_ACTIVATIONS)}"),
    (["problem_type"], lambda value: value in PROBLEMS, f"one of {PROBLEMS}"),
    (["id2label", "label2id"], lambda value: value is None or isinstance(value, dict), "None or a dict"),
)


def reads_sos(config: ImageGPTConfig, head: str) -> bool:
    """Whether the network of a directory reads the start of sequence; `head` is a key of ARCHITECTURES.

    The key "prepend_sos" of our exports states it. Without the key, a classifier that transformers saved reads none,
    because neither its processor nor its pipeline prepends one. All other networks read it.
    """
    stated = config.other.get("prepend_sos")
    return stated if isinstance(stated, bool) else head != "classes" or "transformers_version" not in config.other


def to_model_config(config: ImageGPTConfig, head: str, dtype: str = "float32") -> ModelConfig:
    """The network that a configuration describes; `head` is a key of ARCHITECTURES."""
    return ModelConfig(
        **{ours: getattr(config, theirs) for ours, theirs in SAME_FIELD.items()},
        vocab_size=config.vocab_size - 1,
        mlp_width=config.n_inner or 0,
        use_bias=True,
        sos=reads_sos(config, head),
        pixel_head=head == "pixels",
        num_classes=config.num_labels if head == "classes" else 0,
        activation=SAME_ACTIVATION.get(config.activation_function, config.activation_function),
        dtype=dtype,
    )


def names_of_labels(config: ImageGPTConfig) -> tuple[str, ...] | None:
    """The class names in "id2label", or None if it has none: numbers, or LABEL_0, ... as transformers invents them.

    A name that several classes have is followed by the class's number.
    """
    names = {str(number): str(name) for number, name in (config.id2label or {}).items()}
    ordered = [names.get(str(i)) for i in range(config.num_labels)]
    if None in ordered or all(name in (str(i), f"LABEL_{i}") for i, name in enumerate(ordered)):
        return None
    counts = Counter(ordered)
    return distinct_names(
        (name if counts[name] == 1 else f"{name} ({i})" for i, name in enumerate(ordered)), "id2label"
    )


def from_model_config(model: ModelConfig, head: str, class_names: Sequence[str] | None = None) -> ImageGPTConfig:
    """The configuration with which transformers computes the same as `model`; `head` is a key of ARCHITECTURES.

    A classifier's `class_names` become "id2label" and "label2id"; without names, the classes are called by number.
    """
    # Only networks that read SOS and have no classifier lack the key: fine-tuned in transformers, they will read none.
    stated = {"prepend_sos": model.sos} if head == "classes" or not model.sos else {}
    labels = {}
    if head == "classes":
        names = full_names(class_names, model.num_classes)
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return ImageGPTConfig(
        **labels,
        **{theirs: getattr(model, ours) for ours, theirs in SAME_FIELD.items()},
        vocab_size=model.vocab_size + 1,
        n_inner=None if model.mlp_width == 4 * model.width else model.mlp_width,
        activation_function=model.activation,
        architectures=[ARCHITECTURES[head]],
        **stated,
    )
