"""What users of an exported model must know about its inputs: the model card, and a notice on the terminal.

transformers' pipelines and processors feed x_0, ..., x_{T-1}. A network that reads SOS, x_0, ..., x_{T-2} is less
accurate there, and transformers has no setting that would prepend the SOS.
"""

from pathlib import Path

from igpt.model import ModelConfig

PIPELINE = """---
library_name: transformers
pipeline_tag: image-classification
---
# An Image GPT classifier

The network reads the tokens of an image, without a start of sequence. So transformers' pipeline serves it as it is:

```python
from transformers import pipeline

classifier = pipeline("image-classification", model=".")  # this directory, or its id on the hub
print(classifier("image.png"))
```
"""

RECIPE = """---
library_name: transformers
---
# An Image GPT classifier that reads a start of sequence

**Do not use `pipeline("image-classification")` with this model.** The network reads the start of sequence (SOS), then
all tokens of the image but the last. The pipeline gives it the tokens only, and the accuracy falls without an error.
Prepend the SOS and drop the last token:

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

folder = "."  # this directory, or its id on the hub
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

NO_FIRST_TOKEN = """---
library_name: transformers
---
# An Image GPT without a start of sequence

The network reads the tokens of an image. Position i predicts token i + 1, and nothing predicts the first token. So give
`generate` the first tokens of an image, and not the start of sequence.
"""


def card(model: ModelConfig) -> str:
    """The README.md of an exported network, or "" for one that reads SOS and has no classifier: the usual case."""
    if model.num_classes:
        return RECIPE if model.sos else PIPELINE
    return "" if model.sos else NO_FIRST_TOKEN


def notice(model: ModelConfig, directory: Path) -> str:
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
