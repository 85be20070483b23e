"""scikit-learn's handwritten digits, 8 x 8: an Image GPT that learns in minutes on a laptop.

python train.py --config=configs/digits.py --workdir=runs/digits
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.palette.colors = 17  # every grey level of the data set, exactly

    config.data.pad = 1
    config.data.augment_probability = 0.5

    config.model.width = 96
    config.model.depth = 6
    config.model.num_heads = 3

    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 100
    config.optim.clip_norm = 1.0

    config.train.steps = 2000
    config.train.batch_size = 16
    config.train.eval_every = 500
    config.train.eval_batch_size = 60
    config.train.sample_every = 500
    config.train.num_samples = 36
    config.train.checkpoint_every = 500

    config.mesh.cpu_devices = 2
    return config
