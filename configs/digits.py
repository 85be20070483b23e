"""scikit-learn's handwritten digits, 8 x 8: an Image GPT that learns in minutes on a laptop.

    python train.py --config=configs/digits.py --workdir=runs/digits

Cost: a minute and a half on 2 CPU cores. Expect 1.230 nats a token on held-out images and 95.3 % for the best layer's
linear probe (measured here, seed 0: docs/results/digits.json).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.palette.colors = 17  # exactly the grey levels of the data set

    # A network soon memorises 1,258 images. Shifts by up to a pixel and weight decay work against that.
    config.data.pad = 1
    config.data.augment_probability = 0.5

    config.model.width = 128
    config.model.depth = 4
    config.model.num_heads = 4

    config.optim.name = "muon"  # a lower loss in a quarter of Adam's steps (docs/decisions.md)
    config.optim.learning_rate = 6e-3
    config.optim.warmup_steps = 50
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0

    config.train.steps = 700
    config.train.batch_size = 16
    config.train.eval_every = 175
    config.train.eval_batch_size = 64
    config.train.sample_every = 350
    config.train.num_samples = 36
    config.train.checkpoint_every = 175

    return config
