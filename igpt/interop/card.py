"""The model card of an export, README.md: what the model is, where it comes from, how good it is, how it is used.

transformers' pipelines and processors feed x_0, ..., x_{T-1}. A network that reads SOS, x_0, ..., x_{T-2} is less
accurate there, and transformers has no setting that would prepend the SOS. So the card has the recipes.
"""

import dataclasses
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from igpt.config import Config
from igpt.data.classes import listed
from igpt.data.folder import printable
from igpt.files import is_bucket
from igpt.interop.results import CLASSES, DRAWING, Figure
from igpt.model import ModelConfig, count_params

SOURCES = ("source", "scatter_background")  # fields of `data` that name images
UNKNOWN = "unknown"  # the hub's word for a licence that nobody has stated

DRAW = """The network reads the start of sequence (SOS), token {sos}, and then the pixels. Neither the processor nor the
model of transformers adds it. `generate` begins with it, because `bos_token_id` names it:

```python
import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, ImageGPTForCausalImageModeling

folder = "{name}"{comment}
processor = AutoImageProcessor.from_pretrained(folder)
model = ImageGPTForCausalImageModeling.from_pretrained(folder).eval()
tokens = model.generate(do_sample=True, bos_token_id={sos}, max_length={length}, num_return_sequences=4)
tokens = tokens[:, 1:]  # the first one is the SOS
pixels = np.rint(127.5 * (np.asarray(processor.clusters)[tokens.numpy()] + 1)).astype(np.uint8)
for i, image in enumerate(pixels.reshape(-1, {height}, {width}, 3)):
    Image.fromarray(image).save(f"sample-{{i}}.png")
```

To complete an image, give `generate` the SOS and the tokens of its first rows. To measure a loss, give the model the
SOS and all tokens but the last: position i then predicts token i.
"""

FIRST_TOKENS = """The network reads the tokens of an image, without a start of sequence. Position i predicts token
i + 1, and nothing predicts the first token. So give `generate` the first tokens of an image, and not the start of
sequence.
"""

PIPELINE = """The network reads the tokens of an image, without a start of sequence. So transformers' pipeline serves it
as it is:

```python
from transformers import pipeline

classifier = pipeline("image-classification", model="{name}"){comment}
print(classifier("image.png"))
```
"""

RECIPE = """**Do not use `pipeline("image-classification")` with this model.** The network reads the start of
sequence (SOS), then all tokens of the image but the last. The pipeline gives it the tokens only, and the accuracy falls
without an error. Prepend the SOS and drop the last token:

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

folder = "{name}"{comment}
processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModelForImageClassification.from_pretrained(folder).eval()
tokens = processor(images=Image.open("image.png").convert("RGB"), return_tensors="pt")["input_ids"]
sos = torch.full_like(tokens[:, :1], model.config.vocab_size - 1)
with torch.no_grad():
    logits = model(torch.cat([sos, tokens[:, :-1]], dim=1)).logits
print(model.config.id2label[logits.argmax(dim=-1).item()])
```

If you train the model further without the SOS, set `"prepend_sos": false` in config.json.
"""

FEATURES = """The model has no head. `ImageGPTModel` of transformers gives its hidden states.
"""


@dataclasses.dataclass(frozen=True)
class Card:
    """What a model card tells.

    model: the exported network. config, step, class_names: those of the run. name: the id on the hub, or "" for a
    directory. license, data_license: of the model and of its training images. pictures: {file name: what it shows}.
    """

    model: ModelConfig
    config: Config
    step: int
    class_names: tuple[str, ...] | None = None
    name: str = ""
    license: str = UNKNOWN
    data_license: str = UNKNOWN
    figures: tuple[Figure, ...] = ()
    pictures: dict[str, str] = dataclasses.field(default_factory=dict)

    def text(self) -> str:
        """README.md: metadata as YAML, then Markdown."""
        parts = [self._metadata(), self._introduction(), *self._results(), self._use(), self._configuration()]
        return printable("\n".join(parts))  # paths may have bytes that are not UTF-8

    def _metadata(self) -> str:
        """The YAML block that the hub reads. Values are written as JSON, which is YAML as well."""
        task = CLASSES if self.model.num_classes else DRAWING
        in_pipeline = (task == CLASSES) != self.model.sos and self._has_head()
        fields = {"library_name": "transformers", "license": self.license}
        fields |= {"pipeline_tag": task} if in_pipeline else {}
        fields |= {"tags": ["image-gpt", "igpt", "jax"]}
        source = public_source(self.config.data.source)
        data_set = source.removeprefix("hf:").partition(",")[0]
        if source.startswith("hf:") and source == self.config.data.source and not Path(data_set).exists():
            fields |= {"datasets": [data_set]}
        if self.figures:
            fields |= {"model-index": [{"name": self._title(), "results": [*self._model_index(source)]}]}
        lines = (f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items())
        return "\n".join(["---", *lines, "---"])

    def _model_index(self, source: str) -> Iterator[dict]:
        for figure in self.figures:
            metric = {"type": figure.kind, "name": f"{figure.images} {figure.name}", "value": figure.value}
            of_figure = public_source(figure.source) or source
            dataset = {"type": of_figure, "name": of_figure, "split": figure.images}
            yield {"task": {"type": figure.task}, "dataset": dataset, "metrics": [metric]}

    def _has_head(self) -> bool:
        return bool(self.model.num_classes or self.model.pixel_head)

    def _title(self) -> str:
        what = "classifier" if self.model.num_classes else "model of images" if self.model.pixel_head else "network"
        return self.name or f"An Image GPT {what}"

    def _introduction(self) -> str:
        model, data = self.model, self.config.data
        height, width = data.image_size
        rows = {
            "network": f"Image GPT: width {model.width}, depth {model.depth}, {model.num_heads} heads, "
            f"{count_params(model):,} parameters",
            "images": f"{height} x {width}, {'grey' if data.channels == 1 else 'colour'}, as {model.seq_len} tokens of "
            f"{model.vocab_size} colours",
        }
        if model.num_classes:
            names = f": {listed(self.class_names)}" if self.class_names else ""
            rows["classes"] = f"{model.num_classes}{names}"
        if data.source:
            rows["trained on"] = f"`{public_source(data.source)}`"
        rows |= {"licence of the training images": self.data_license, "licence of the model": self.license}
        if self.config.init_from:
            rows["started from"] = f"the weights of `{_public_path(self.config.init_from)}`"
        if self.step:
            rows["trained for"] = f"{self.step:,} steps"
        table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
        return f"# {self._title()}\n\n| | |\n|---|---|\n{table}\n"

    def _results(self) -> Iterator[str]:
        if self.figures:
            lines = "\n".join(
                f"| {figure.images}{self._of_others(figure)} | {figure.name} | {figure.value:.4f}"
                + (" [{:.4f}, {:.4f}]".format(*figure.interval) if figure.interval else "")
                + " |"
                for figure in self.figures
            )
            yield f"## Results\n\n| images | figure | value, 95 % interval |\n|---|---|---|\n{lines}\n"
        for file, shown in self.pictures.items():
            yield f"![{shown}]({file})\n"

    def _of_others(self, figure: Figure) -> str:
        """Names the source of a figure that was measured on other data than the run's own."""
        own = figure.source in ("", self.config.data.source)
        return "" if own else f" of {_cell(public_source(figure.source))}"

    def _use(self) -> str:
        model, (height, width) = self.model, self.config.data.image_size
        text = FEATURES
        if model.num_classes:
            text = RECIPE if model.sos else PIPELINE
        elif model.pixel_head:
            text = DRAW if model.sos else FIRST_TOKENS
        name, comment = self.name or ".", "" if self.name else "  # this directory, or its id on the hub"
        settings = dict(name=name, comment=comment, sos=model.vocab_size, height=height, width=width)
        settings |= dict(length=model.seq_len + 1)
        command = "igpt predict --model={name} image.png" if model.num_classes else "igpt evaluate --model={name}"
        if model.pixel_head and not model.num_classes:
            command = "igpt sample --model={name} " + (
                "--num=16 --out=samples.png" if model.sos else "--complete=image.png --num=8 --out=completions.png"
            )
        ours = f'```bash\n{command}\n```\n\n```python\nimport igpt\n\nmodel = igpt.load("{{name}}").model\n```\n'
        return f"## In igpt\n\n{ours}\n## In transformers\n\n{text}".format(**settings)

    def _configuration(self) -> str:
        """The fields of the configuration, as flags of train.py, without the folders of the machine that trained."""
        local = {f"data.{name}": public_source(getattr(self.config.data, name)) for name in SOURCES}
        local["data.data_dir"] = ""
        for name in ("data.split_file", "palette.path", "init_from"):
            local[name] = _public_path(self.config.flat()[name])
        lines = [f"--config.{name}={shlex.quote(str(value))}" for name, value in (self.config.flat() | local).items()]
        return "\n".join(["## Configuration", "", "```", *lines, "```", ""])


def _cell(text: str) -> str:
    """Text in a table of Markdown, where "|" would end the cell, and "<" would begin HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def public_source(source: str) -> str:
    """A data source without the folder of a file or its bucket: folder:/home/me/photos is folder:photos."""
    kind, _, place = source.partition(":")
    if kind == "scattered":
        return f"{kind}:{public_source(place)}"
    if kind in ("npz", "folder", "tokens", "openai"):
        return f"{kind}:{_public_path(place)}"
    if kind == "hf":
        name, comma, options = place.partition(",")
        return f"hf:{_public_path(name)}{comma}{options}"
    return source


def _public_path(path: str) -> str:
    """A relative path as it is; of an absolute one, or one in a bucket, the last part."""
    if is_bucket(path):
        place = path.partition("://")[2].partition("/")[2]  # of a bucket alone, nothing is published
        return Path(place).name
    return Path(path).name if Path(path).is_absolute() else path


def notice(model: ModelConfig, directory: Path | str) -> str:
    """What `igpt export` prints about an exported classifier, or "" for other networks."""
    if not model.num_classes:
        return ""
    if not model.sos:
        return 'pipeline("image-classification") of transformers serves it as it is: it reads no start of sequence'
    return (
        "WARNING: this classifier reads a start of sequence (SOS), which transformers' pipelines do not prepend: there "
        f"its accuracy falls without an error. {directory}/README.md has the recipe. To make a classifier that "
        "pipelines serve as it is, fine-tune with --config.model.sos=False."
    )
