"""The network that a Hugging Face configuration describes, and the configuration that describes a network."""

from collections import Counter
from collections.abc import Sequence

from igpt.data.classes import distinct_names, full_names
from igpt.interop.hf_config import ARCHITECTURES, SAME_ACTIVATION, ImageGPTConfig
from igpt.model import ModelConfig

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
    ordered = list(config.id2label.values())  # in the order of their numbers
    if all(name in (str(i), f"LABEL_{i}") for i, name in enumerate(ordered)):
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
