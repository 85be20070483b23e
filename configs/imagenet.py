"""ImageNet (ILSVRC 2012), for every published size: s, m and l read 32 x 32, l48 reads 48 x 48, xl reads 64 x 64.

    python train.py --config=configs/imagenet.py:s --workdir=runs/imagenet-s --config.palette.path=kmeans_centers.npy
    python train.py --config=configs/imagenet.py:l:bert ...    the BERT objective
    python train.py --config=configs/imagenet.py:l48vq ...     48 x 48 codes of a VQ-VAE of 192 x 192 pixels

palette.path is OpenAI's file, or your own file from `igpt palette`. Without it, the run fits a palette at its start.

Data: the archives of image-net.org, about 150 GB, which tensorflow_datasets prepares once (docs/data.md). 4 % of the
training images are the validation split; the official validation set is the test split (section 3.1).

Expected results, from Chen et al. 2020 (tables 2 and 3) and OpenAI's README. Not run here:

    size   parameters      linear probe  fine-tuned  test loss, nats a token
    s         76,571,648   41.9 %        -           2.0895
    m        455,157,760   54.5 %        -           2.0614
    l      1,362,250,752   60.3 %        66.3 %      2.0466
    l48    1,364,216,832   65.2 %        72.6 %      -
    xl     6,810,875,904   68.7 %        -           -           72.0 % with the features of five layers

    l:bert: its probe is 6 points below l, fine-tuned it reaches 66.5 % (section 4.6). OpenAI measured the losses with
    its own palette.

    l48vq: 69.0 % with the features of 11 layers, by the paper's first version. Train runs/imagenet-vqvae first, with
    --config=configs/imagenet.py:vqvae, and prepare its codes with igpt prepare: docs/vqvae.md. The widths of that
    VQ-VAE are our choice, because the paper says nothing about them.

Cost: 6 x parameters x tokens, without attention, is 60 EFLOP for s, 358 for m, 1,070 for l, 2,400 for l48 and 21,400
for xl. One H100 at 40 % of its bfloat16 peak of 989 TFLOP/s takes 2, 10, 31, 71 and 630 days. An H200 reached 33 % with
s as configured here, and without remat and with fewer images 36, 49 and 52 % with s, m and l (docs/speed.md). OpenAI
needed about 2,500 V100-days for l.

xl differs from the paper's in two ways. Its number of heads was never published; 24 is our choice. The paper's xl also
read 100 million web images, which were not published; 2 million steps of 64 images are 104 epochs of ImageNet alone.
"""

from ml_collections import ConfigDict

from configs import base
from igpt.errors import UserError
from igpt.model import PRESETS

SIDE = {"s": 32, "m": 32, "l": 32, "l48": 48, "xl": 64}
SIDE_OF_CODES, CODES, STRIDE = 192, 4096, 4
# Table 5 prints ten times l's rate for l48, which looks like a misprint: use a lower one if the loss rises.
LEARNING_RATE = {"s": 3e-3, "m": 3e-3, "l": 1e-3, "l48": 1e-2, "xl": 3e-4}
BERT_LEARNING_RATE = {"s": 1e-2, "m": 3e-3, "l": 1e-3}
TRAIN_IMAGES = 1_229_920  # 96 % of 1,281,167


def get_config(argument: str = "s") -> ConfigDict:
    if argument == "vqvae":
        return _vqvae()
    if argument == "l48vq":
        config = get_config("l48")
        config.tokenizer = "runs/imagenet-vqvae"
        return _of_codes(config)
    size, _, objective = argument.partition(":")
    bert = objective == "bert"
    if size not in PRESETS or objective not in ("", "bert") or argument.endswith(":"):
        raise UserError(
            f"configs/imagenet.py:{argument}: choose {', '.join(PRESETS)}, l48vq, vqvae, or add :bert, as in l:bert"
        )
    if bert and size not in BERT_LEARNING_RATE:
        raise UserError(
            f"configs/imagenet.py:{argument}: the paper has BERT for {', '.join(BERT_LEARNING_RATE)} only; choose one, "
            "such as l:bert"
        )
    preset = dict(PRESETS[size])
    del preset["seq_len"]  # one token per pixel: the image size defines it

    config = base.get_config()
    config.data.source = "tfds:imagenet2012"
    config.data.image_size = (SIDE[size], SIDE[size])
    config.data.channels = 3
    config.data.validation_fraction = 0.04
    config.data.preprocess = "crop"  # appendix A.1, which does not mention flips
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

    # The blocks' inputs and the outputs of attention are stored. Attention is the dearest result to recompute for its
    # size. With "full" only the inputs are stored. For TPUs: docs/plans.md.
    config.model.remat = "attention"
    # Weights and Adam's moments take 12 bytes per parameter: 16 GB for l, 82 GB for xl. fsdp splits them over devices.
    # These are the smallest sensible numbers; on more devices, mesh.data uses the rest.
    config.mesh.fsdp = {"s": 1, "m": 1, "l": 4, "l48": 4, "xl": 8}[size]
    return config


def _of_codes(config: ConfigDict) -> ConfigDict:
    config.data.image_size = (SIDE_OF_CODES, SIDE_OF_CODES)
    config.vqvae.codes, config.vqvae.stride = CODES, STRIDE
    return config


def _vqvae() -> ConfigDict:
    config = _of_codes(get_config("s"))
    config.program = "vqvae"
    config.vqvae.width, config.vqvae.residual_width, config.vqvae.code_width = 256, 128, 64
    config.optim.learning_rate, config.optim.b2 = 3e-4, 0.99
    config.optim.warmup_steps = 1000
    config.train.steps = 200_000
    config.train.num_samples = 8
    return config
