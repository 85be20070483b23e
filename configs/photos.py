"""Your own pictures at 16 x 16, in colour: an Image GPT for a folder of a few hundred photographs and a laptop.

    igpt palette --source=folder:photos --size=16 --colors=256 --out=palette.npy
    igpt prepare --source=folder:photos --size=16 --palette=palette.npy --out=photos-16
    python train.py --config=configs/photos.py --workdir=runs/photos

Sub-folders are classes, if there are any. More pictures deserve more steps: --config.train.steps.

Cost: about 12 minutes on 2 CPU cores. That is extrapolated: with 200 pictures of 2 megapixels, palette and tokens took
15 seconds of processor time, and the first 300 of the 1,500 steps 2 minutes and 20 seconds, two evaluations and two
grids included (1.42 nats a token on held-out pictures, of drawn landscapes).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.data.source = "tokens:photos-16"
    config.data.image_size = (16, 16)
    config.data.channels = 3
    config.data.test_fraction = 0.1  # leaves more to learn from; read only if the source is a folder
    config.data.preprocess = "shrink"  # the same
    config.palette.colors = 256

    # A network soon memorises a few hundred pictures. Mirrored pictures, shifts and weight decay work against that.
    config.data.flip = True
    config.data.pad = 1
    config.data.pad_mode = "edge"

    config.model.width = 128
    config.model.depth = 4
    config.model.num_heads = 4
    config.model.scan_layers = False  # faster on a CPU, as in configs/digits.py

    config.optim.learning_rate = 3e-3
    config.optim.warmup_steps = 100
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0

    config.train.steps = 1500
    config.train.batch_size = 8
    config.train.eval_every = 300
    config.train.eval_batch_size = 16
    config.train.sample_every = 300
    config.train.num_samples = 16
    config.train.checkpoint_every = 300
    return config
