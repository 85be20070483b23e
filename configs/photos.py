"""Your own pictures at 16 x 16, in colour: an Image GPT for a folder of a few hundred photographs and a laptop.

    igpt palette --source=folder:photos --size=16 --colors=256 --out=palette.npy
    igpt prepare --source=folder:photos --size=16 --palette=palette.npy --out=photos-16
    python train.py --config=configs/photos.py --workdir=runs/photos

Sub-folders are classes, if there are any. More pictures deserve more steps: --config.train.steps.

Cost: not run to its end here yet, so we promise no figure; the run tells its time after the first steps.
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

    config.train.steps = 2000
    config.train.batch_size = 8
    config.train.eval_every = 500
    config.train.eval_batch_size = 16
    config.train.sample_every = 500
    config.train.num_samples = 16
    config.train.checkpoint_every = 500
    return config
