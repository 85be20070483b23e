"""A run's configuration: from the command line to checked values, and to and from config.json."""

import dataclasses
import json
from pathlib import Path

import jax
from ml_collections import ConfigDict

from igpt.attention import resolve_backend
from igpt.errors import UserError
from igpt.files import write_text
from igpt.model import ModelConfig

# Fields that change how a run is carried out, not what it computes: free to change when it is resumed.
FREE_ON_RESUME = (
    "data.data_dir",
    "data.on_unreadable",
    "data.threads",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.dcn_data",
    "mesh.cpu_devices",
    "model.attention",
    "model.remat",
    "model.scan_layers",
    "train.log_every",
    "train.eval_every",
    "train.eval_batch_size",
    "train.sample_every",
    "train.num_samples",
    "train.checkpoint_every",
    "train.max_to_keep",
    "train.patience",
    "train.on_bad_step",
    "train.profile_at",
    "optim.spike_sigma",
)


# What a run means that is older than these fields; and, of data, how the images of a model from elsewhere are read.
READING = dict(
    validation_fraction=0.1,
    test_fraction=0.2,
    split_seed=0,
    preprocess="none",
    short_side=(256, 384),
    crop=224,
    filter="bicubic",
    split_file="",
    data_dir="",
    on_unreadable="stop",
    labels_per_class=0,
    subset_seed=0,
)
OBJECTIVE = dict(generative=1.0, classification=0.0, drop_rate=0.15, eval_masks=5)
TRAIN = dict(patience=0, on_bad_step="stop", profile_at=0)
OPTIM = dict(spike_sigma=0.0)
MESH = dict(dcn_data=1)
ADDED = {"data": READING, "objective": OBJECTIVE, "train": TRAIN, "optim": OPTIM, "mesh": MESH}


def check_network(config: ConfigDict) -> None:
    """Raises UserError unless `config` says what network it is of, on which images: enough to load one."""
    missing = [name for name in ("data", "palette", "model") if name not in config]
    if missing:
        raise UserError(f"this is no configuration of ours: it has no {', '.join(missing)}; start from configs/base.py")
    size = config.data.image_size
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise UserError(f"data.image_size is {size}; give (height, width), such as '(28,28)'")
    if config.data.channels not in (1, 3):
        raise UserError(f"data.channels is {config.data.channels}; choose 1 (grey) or 3 (colour)")
    if config.palette.colors < 1:
        raise UserError(f"palette.colors is {config.palette.colors}; it must be at least 1")


def check(config: ConfigDict) -> None:
    """Raises UserError for values that no part of a training run could use. Parts check what only they know."""
    check_network(config)
    missing = [name for name in ("objective", "optim", "train", "mesh") if name not in config]
    if missing:
        raise UserError(
            f"this is no training configuration: it has no {', '.join(missing)}; start from configs/base.py"
        )
    least = {
        "seed": 0,
        "data.split_seed": 0,
        "data.threads": 1,
        "palette.max_pixels": 1,
        "optim.warmup_steps": 0,
        "optim.weight_decay": 0.0,
        "optim.clip_norm": 0.0,
        "optim.eps": 0.0,
        "train.steps": 1,
        "train.batch_size": 1,
        "train.accumulate": 1,
        "train.log_every": 1,
        "train.eval_every": 1,
        "train.eval_batch_size": 1,
        "train.sample_every": 1,
        "train.num_samples": 0,
        "train.checkpoint_every": 1,
        "train.max_to_keep": 1,
        "train.patience": 0,
        "train.profile_at": 0,
        "data.labels_per_class": 0,
        "data.subset_seed": 0,
        "objective.generative": 0.0,
        "objective.classification": 0.0,
        "objective.eval_masks": 1,
        "mesh.dcn_data": 1,
        "mesh.cpu_devices": 0,
    }
    values = flatten(config)
    for name, smallest in least.items():
        if values[name] < smallest:
            raise UserError(f"{name} is {values[name]}; it must be at least {smallest}")
    if config.train.on_bad_step not in ("stop", "skip"):
        raise UserError(f"train.on_bad_step is {config.train.on_bad_step!r}; choose stop or skip")
    _check_objective(config)


def _check_objective(config: ConfigDict) -> None:
    """Raises UserError unless there is something to learn, and a head for it."""
    objective, model = config.objective, config.model
    if not objective.classification and objective.generative not in (0.0, 1.0):
        raise UserError(f"objective.generative is {objective.generative}; the only loss that there is has weight 1")
    if not objective.generative + objective.classification > 0:
        raise UserError("objective.generative and objective.classification are both 0: there is nothing to learn")
    if objective.generative and not model.pixel_head:
        raise UserError(
            f"objective.generative is {objective.generative}, but model.pixel_head is False, so that no pixel can be "
            "predicted; set objective.generative=0 to learn classes only, or model.pixel_head=True"
        )
    if objective.classification and model.num_classes < 2:
        raise UserError(
            f"objective.classification is {objective.classification}, but model.num_classes is {model.num_classes}; "
            "set it to the number of classes, 2 or more"
        )
    if model.num_classes and not objective.classification:
        raise UserError(
            f"model.num_classes is {model.num_classes}, but objective.classification is 0: the classifier would learn "
            "nothing; set objective.classification=1, or model.num_classes=0"
        )
    if not model.causal and not 0.0 < objective.drop_rate < 1.0:
        raise UserError(f"objective.drop_rate is {objective.drop_rate}; BERT drops a share between 0 and 1")
    if config.train.patience and not objective.classification:
        raise UserError(
            "train.patience waits for a better validation accuracy, which only fine-tuning has; set train.patience=0, "
            "or objective.classification=1"
        )


def model_config(config: ConfigDict, device=None) -> ModelConfig:
    """The network that a run's configuration means on a device, by default this machine's: settles every "auto"."""
    device = device or jax.devices()[0]
    height, width = config.data.image_size  # the palette's grid: a token a pixel
    fields = dict(config.model, attention="chunked", vocab_size=config.palette.colors, seq_len=height * width)
    if fields["dtype"] == "auto":
        fields["dtype"] = "float32" if device.platform == "cpu" else "bfloat16"
    model = ModelConfig(**fields)
    attention = resolve_backend(config.model.attention, device, model.dtype, model.head_size, model.seq_len)
    return dataclasses.replace(model, attention=attention)


def of_network(model: ModelConfig, image_size: tuple[int, int], channels: int) -> ConfigDict:
    """The configuration of a network that was not trained here: no data source, no training."""
    fields = dataclasses.asdict(model) | {"dtype": "auto", "attention": "auto"}
    del fields["vocab_size"], fields["seq_len"]
    data = dict(source="", image_size=image_size, channels=channels) | READING
    return ConfigDict(dict(data=data, palette=dict(colors=model.vocab_size), model=fields, objective=OBJECTIVE))


def flatten(config: ConfigDict, prefix: str = "") -> dict:
    """{"a.b": value} of all fields, tuples as lists, so that it compares equal before and after JSON."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def save(config: ConfigDict, workdir: Path) -> None:
    """Writes workdir/config.json, whole or not at all."""
    write_text(workdir / "config.json", config.to_json(indent=2) + "\n")


def load(workdir: Path) -> ConfigDict:
    """Reads workdir/config.json."""
    path = workdir / "config.json"
    try:
        config = ConfigDict(json.loads(path.read_text()))
        check_network(config)
        config.objective = config.get("objective", ConfigDict())
        for section, defaults in ADDED.items():
            for name in defaults.keys() - config.get(section, defaults).keys():
                config[section][name] = defaults[name]
        return config
    except FileNotFoundError:
        raise UserError(f"{workdir} is not a run directory: it has no config.json") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or not ours: {error!r}") from None


def check_resumable(new: ConfigDict, workdir: Path) -> None:
    """Raises UserError when `workdir` holds a run of another configuration, naming every field that differs."""
    old, new = flatten(load(workdir)), flatten(new)
    differing = [
        f"  {name}: {old.get(name, 'absent')!r} there, {new.get(name, 'absent')!r} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in FREE_ON_RESUME
    ]
    if differing:
        raise UserError(
            f"{workdir} holds a run with another configuration:\n" + "\n".join(differing) + "\n"
            "Give another --workdir, or --start_over to set the old run aside and begin anew, or "
            f"--config.init_from={workdir} with another --workdir to start from its weights."
        )
