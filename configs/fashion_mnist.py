"""Fashion-MNIST, 28 x 28 grey, read from an array file: one size larger than the digits.

    python train.py --config=configs/fashion_mnist.py --workdir=runs/fashion

The run reads fashion_mnist.npz. These lines make it from the four IDX files of github.com/zalandoresearch/fashion-mnist
or of Debian's package dataset-fashion-mnist, which puts them into FOLDER=/usr/share/datasets/fashion-mnist:

    import gzip, numpy as np
    idx = lambda kind, skip: b"".join(gzip.open(f"FOLDER/{s}-{kind}-ubyte.gz").read()[skip:] for s in ("train", "t10k"))
    np.savez("fashion_mnist.npz", images=np.frombuffer(idx("images-idx3", 16), "u1").reshape(-1, 28, 28),
             labels=np.frombuffer(idx("labels-idx1", 8), "u1"))

All 70,000 images are split again, with 10,000 for testing, so results on the official test split may differ.

Cost: not run to its end here, so we promise no figure. The first 20 steps (2.13 nats a token) took 6 to 20 seconds
each, on 2 CPU cores that were busy with other work. The digits' speed suggests 2 seconds on idle cores, or 2 hours for
the run; that was not measured.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.data.source = "npz:fashion_mnist.npz"
    config.data.image_size = (28, 28)
    config.data.validation_fraction = 1 / 14  # 5,000 images
    config.data.test_fraction = 1 / 7  # 10,000 images, as in the official test set
    config.data.flip = True

    config.palette.colors = 32  # grey levels

    config.model.width = 128
    config.model.depth = 4
    config.model.num_heads = 4

    config.optim.learning_rate = 3e-3
    config.optim.warmup_steps = 150
    config.optim.clip_norm = 1.0

    config.train.steps = 3400  # one epoch of 55,000 images
    config.train.batch_size = 16
    config.train.eval_every = 850
    config.train.eval_batch_size = 64
    config.train.sample_every = 850
    config.train.num_samples = 16
    config.train.checkpoint_every = 425
    return config
