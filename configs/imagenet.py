"""ImageNet (ILSVRC 2012) at every published size: s, m and l read 32 x 32, l48 reads 48 x 48, xl reads 64 x 64.

    python train.py --config=configs/imagenet.py:s --workdir=runs/imagenet-s --config.palette.path=kmeans_centers.npy
    python train.py --config=configs/imagenet.py:l:bert ...    the BERT objective

The palette is OpenAI's file, or one of your own: igpt palette; without palette.path it is fitted at the
start of the run.

Data: the archives of image-net.org, prepared once by tensorflow_datasets (docs/data.md), some 150 GB. 4 % of the
training images are held out for validation; the official validation set is the test set (section 3.1).

To expect, from Chen et al. 2020 (tables 2 and 3) and OpenAI's README; none of it was run here:

    size   parameters      linear probe  fine-tuned  test loss, nats a token
    s         76,571,648   41.9 %        -           2.0895
    m        455,157,760   54.5 %        -           2.0614
    l      1,362,250,752   60.3 %        66.3 %      2.0466
    l48    1,364,216,832   65.2 %        72.6 %      -
    xl     6,810,875,904   68.7 %        -           -           72.0 % with the features of five layers

    l:bert: probe 6 points below l, fine-tuned 66.5 % (section 4.6). Losses were measured with OpenAI's palette.

Cost: 6 x parameters x tokens, attention not counted, is 60 EFLOP for s, 358 for m, 1,070 for l, 2,400 for l48 and
21,400 for xl. At 40 % of an H100's bfloat16 peak of 989 TFLOP/s: 2, 10, 31, 71 and 630 days on one of them. OpenAI
needed some 2,500 V100-days for l.

xl differs from the paper's in two ways: its heads were never published (24 are ours), and the 100 million web images
that it saw besides ImageNet never were either. Its 2 million steps of 64 images would be 104 epochs of ImageNet alone.
"""

from ml_collections import ConfigDict

from configs import base
from igpt.errors import UserError
from igpt.model import PRESETS

SIDE = {"s": 32, "m": 32, "l": 32, "l48": 48, "xl": 64}
# Table 5. That of l48, ten times that of l, is printed so and looks like a slip: lower it if the loss climbs.
LEARNING_RATE = {"s": 3e-3, "m": 3e-3, "l": 1e-3, "l48": 1e-2, "xl": 3e-4}
BERT_LEARNING_RATE = {"s": 1e-2, "m": 3e-3, "l": 1e-3}
TRAIN_IMAGES = 1_229_920  # 96 % of 1,281,167


def get_config(argument: str = "s") -> ConfigDict:
    size, _, objective = argument.partition(":")
    bert = objective == "bert"
    if size not in PRESETS or objective not in ("", "bert") or argument.endswith(":"):
        raise UserError(f"configs/imagenet.py:{argument}: choose {', '.join(PRESETS)}, or with :bert behind it")
    if bert and size not in BERT_LEARNING_RATE:
        raise UserError(
            f"configs/imagenet.py:{argument}: the paper has BERT for {', '.join(BERT_LEARNING_RATE)} only; choose one, "
            "such as l:bert"
        )
    preset = dict(PRESETS[size])
    del preset["seq_len"]  # a token a pixel: it follows from the image size

    config = base.get_config()
    config.data.source = "tfds:imagenet2012"
    config.data.image_size = (SIDE[size], SIDE[size])
    config.data.channels = 3
    config.data.validation_fraction = 0.04
    config.data.preprocess = "crop"  # appendix A.1; nothing is said of flips
    config.data.threads = 16

    config.model.update(preset)
    config.model.causal = not bert

    config.optim.learning_rate = (BERT_LEARNING_RATE if bert else LEARNING_RATE)[size]
    config.train.batch_size = 64 if size == "xl" else 128
    config.train.steps = 2_000_000 if size == "xl" else 1_000_000
    config.optim.warmup_steps = TRAIN_IMAGES // config.train.batch_size  # one epoch
    config.train.log_every = 100
    config.train.eval_every = 10_000
    config.train.eval_batch_size = config.train.batch_size
    config.train.sample_every = 10_000
    config.train.checkpoint_every = 5000

    # s is small enough to keep the outputs of its matrix products. From m on the activations of the layers outgrow
    # an accelerator's memory, and all but their inputs are computed again. For TPUs: docs/plans.md.
    config.model.remat = "dots" if size == "s" else "full"
    # Weights and Adam's moments take 12 bytes a parameter: 16 GB for l, 82 GB for xl. fsdp spreads them, and divides
    # the number of devices: these are the smallest machines to think of, a larger one leaves the rest to mesh.data.
    config.mesh.fsdp = {"s": 1, "m": 1, "l": 4, "l48": 4, "xl": 8}[size]
    return config
