"""A run's configuration. Each section is a frozen dataclass, made from the ConfigDict of a config file and checked.

configs/base.py explains every field. Some sections are defined beside the code that they configure: DataConfig in
data/settings.py, ModelConfig in model.py, OptimConfig in optim.py, MeshConfig in sharding.py. The others are here.
"""

import dataclasses
import math
from collections.abc import Mapping

from igpt.attention import resolve_backend
from igpt.data.settings import DataConfig
from igpt.errors import UserError
from igpt.fields import check_at_least, check_choice, make_section
from igpt.model import ModelConfig
from igpt.optim import OptimConfig
from igpt.sharding import MeshConfig, all_devices
from igpt.track.names import check_names
from igpt.vqvae import VQConfig


@dataclasses.dataclass(frozen=True)
class PaletteConfig:
    """The palette: the number of its colours, a file to load it from, and the largest number of pixels for a fit."""

    colors: int
    path: str = ""
    max_pixels: int = 1_000_000

    def __post_init__(self):
        check_at_least(self, "palette.", colors=1, max_pixels=1)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The weights of the two losses, and BERT's masks."""

    generative: float = 1.0
    classification: float = 0.0
    drop_rate: float = 0.15
    eval_masks: int = 5

    def __post_init__(self):
        check_at_least(self, "objective.", generative=0.0, classification=0.0, eval_masks=1)
        if not self.classification and self.generative not in (0.0, 1.0):
            raise UserError(
                f"objective.generative is {self.generative}; without objective.classification it is the only loss, and "
                "its weight must be 1"
            )
        if not self.generative + self.classification > 0:
            raise UserError("objective.generative and objective.classification are both 0: there is nothing to learn")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long a run trains, and how often it logs, evaluates, samples and saves."""

    steps: int
    batch_size: int
    accumulate: int
    log_every: int
    eval_every: int
    eval_batch_size: int
    sample_every: int
    num_samples: int
    checkpoint_every: int
    max_to_keep: int
    profile_at: int = 0
    on_bad_step: str = "stop"
    patience: int = 0

    def __post_init__(self):
        every = dict(log_every=1, eval_every=1, sample_every=1, checkpoint_every=1)
        check_at_least(self, "train.", steps=1, batch_size=1, accumulate=1, eval_batch_size=1, max_to_keep=1, **every)
        check_at_least(self, "train.", num_samples=0, profile_at=0, patience=0)
        check_choice(self, "train.", on_bad_step=("stop", "skip"))

    def is_due(self, step: int, every: int) -> bool:
        """Whether an action is due after `step`. It is due after every `every` steps, and after the last step."""
        return step == self.steps or step % every == 0


SECTIONS = {
    "data": DataConfig,
    "palette": PaletteConfig,
    "vqvae": VQConfig,
    "model": ModelConfig,
    "objective": ObjectiveConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "mesh": MeshConfig,
}
DERIVED = ("vocab_size", "seq_len", "platform")  # fields of the model that no user sets
OF_TRAINING = ("optim", "train", "mesh")  # the sections that only training reads; an imported model has none of them


@dataclasses.dataclass(frozen=True)
class Config:
    """The full configuration of a run. Fields of the model may be "auto"; `network` replaces it."""

    data: DataConfig
    palette: PaletteConfig
    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig | None = None
    train: TrainConfig | None = None
    mesh: MeshConfig | None = None
    seed: int = 0
    init_from: str = ""
    track: tuple[str, ...] = ("tensorboard",)
    program: str = "igpt"
    tokenizer: str = "palette"
    vqvae: VQConfig = dataclasses.field(default_factory=VQConfig)

    def __post_init__(self):
        check_at_least(self, "", seed=0)
        check_choice(self, "", program=("igpt", "vqvae"))
        check_names(self.track)
        objective, model = self.objective, self.model
        if not model.causal and not 0.0 < objective.drop_rate < 1.0:
            raise UserError(f"objective.drop_rate is {objective.drop_rate}; BERT drops a share between 0 and 1")
        if self.train is not None:
            self._check_heads()
        if self.program == "vqvae":
            self._check_vqvae()

    def _check_heads(self) -> None:
        """Raises UserError for a loss without head, a classifier without a loss, or `patience` without a classifier."""
        generative, classification = self.objective.generative, self.objective.classification
        if generative and not self.model.pixel_head:
            raise UserError(
                f"objective.generative is {generative}, but model.pixel_head is False: no pixel can be predicted; set "
                "objective.generative=0 to learn classes only, or model.pixel_head=True"
            )
        classes = self.model.num_classes
        if bool(classification) != bool(classes) or classes == 1:
            raise UserError(
                f"objective.classification is {classification}, but model.num_classes is {classes}; set both to learn "
                "classes, the latter to their number, 2 or more; or set both to 0"
            )
        if self.train.patience and not classification:
            raise UserError(
                "train.patience waits for a better validation accuracy, which only fine-tuning has; set "
                "train.patience=0, or objective.classification=1"
            )

    def _check_vqvae(self) -> None:
        """Raises UserError for a field that the training of a VQ-VAE cannot follow."""
        self.vqvae.grid(*self.data.image_size)
        named = {"init_from": self.init_from, "objective.classification": self.objective.classification}
        for name, value in named.items():
            if value:
                raise UserError(
                    f"{name} is {value}, but program=vqvae starts from scratch and learns no classes; empty it"
                )
        if self.optim and self.optim.name != "adam":
            raise UserError(f"optim.name is {self.optim.name}, which is for transformers; set optim.name=adam")
        if self.train and self.train.accumulate != 1:
            problem = f"train.accumulate is {self.train.accumulate}; a VQ-VAE's codebook follows whole batches"
            raise UserError(f"{problem}: set train.accumulate=1 and a smaller train.batch_size")

    @classmethod
    def of(cls, values: "Mapping | Config", trains: bool = False) -> "Config":
        """Makes a Config from a ConfigDict or a nested dict. Returns a Config unchanged.

        With `trains`, the sections that only training reads are required, too. Raises UserError, which names the field,
        for an unknown field, a missing field, or an impossible value.
        """
        fields = vars(values) if isinstance(values, cls) else dict(values.items())
        needed = ("data", "palette", "model", *(("objective", *OF_TRAINING) if trains else ()))
        if missing := [name for name in needed if fields.get(name) is None]:
            kind = "training configuration" if trains else "configuration of igpt"
            raise UserError(f"this is no {kind}: it has no {', '.join(missing)}; start from configs/base.py")
        if isinstance(values, cls):
            return values
        for name in (name for name in SECTIONS if name in fields and name != "model"):
            fields[name] = make_section(SECTIONS[name], f"{name}.", fields[name])
        vqvae = fields["vqvae"] = dataclasses.replace(fields.get("vqvae", VQConfig()), channels=fields["data"].channels)
        vocab_size, grid = fields["palette"].colors, fields["data"].image_size  # a palette has a token for each pixel
        if fields.get("tokenizer", "palette") != "palette":
            vocab_size, grid = vqvae.codes, vqvae.grid(*grid)
        derived = dict(vocab_size=vocab_size, seq_len=math.prod(grid))
        model = fields["model"]
        given = dict(model.items()) | derived if hasattr(model, "items") else model
        fields["model"] = make_section(ModelConfig, "model.", given)
        return make_section(cls, "", fields)

    @classmethod
    def of_network(cls, model: ModelConfig, image_size: tuple[int, int], channels: int) -> "Config":
        """The configuration of an imported network. It has no data source and none of the sections of training."""
        model = dataclasses.replace(model, dtype="auto", attention="auto")
        return cls(DataConfig("", image_size, channels), PaletteConfig(model.vocab_size), model)

    def network(self, device=None, tensor: int = 1) -> ModelConfig:
        """The model section with each "auto" replaced by the best choice for a device (default: JAX's first device).

        `tensor` devices share the heads. Raises UserError if the attention back end cannot run on the device.
        """
        device = device or all_devices()[0]
        model, dtype, attention = self.model, self.model.dtype, self.model.attention
        if dtype == "auto":
            dtype = "float32" if device.platform == "cpu" else "bfloat16"
        heads = model.num_heads // tensor if attention == "auto" else model.num_heads
        attention = resolve_backend(attention, device, dtype, max(1, heads), model.head_size, model.seq_len)
        # A scan copies what each layer keeps for the backward pass, or fills the arrays for it with zeros first. Only a
        # TPU's compiler takes minutes for layers without a scan.
        scan = {"auto": "yes" if device.platform == "tpu" else "no"}.get(model.scan_layers, model.scan_layers)
        return dataclasses.replace(model, dtype=dtype, attention=attention, platform=device.platform, scan_layers=scan)

    def to_dict(self) -> dict:
        """Nested dicts, as in config.json, without the fields of the model that `of` and `network` determine."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        fields["model"] = {k: v for k, v in fields["model"].items() if k not in DERIVED}
        del fields["vqvae"]["channels"]
        if fields["program"] == "igpt" and fields["tokenizer"] == "palette":  # the configuration has no VQ-VAE
            for name in ("program", "tokenizer", "vqvae"):
                del fields[name]
        return fields

    def flat(self) -> dict:
        """All fields in one dict: {"section.field": value}."""
        flat = {}
        for name, value in self.to_dict().items():
            flat |= {f"{name}.{field}": item for field, item in value.items()} if name in SECTIONS else {name: value}
        return flat
