"""A VQ-VAE of your own photographs at 32 x 32, in colour: 8 x 8 codes of 512.

    python train.py --config=configs/vqvae_photos.py --workdir=runs/photos-vqvae
    igpt prepare --source=folder:photos --size=32 --preprocess=shrink --test_fraction=0.1 \\
        --tokenizer=runs/photos-vqvae --out=photos-codes
    python train.py --config=configs/photos.py --config.data.source=tokens:photos-codes \\
        --config.data.image_size="(32,32)" --config.data.flip=False --config.data.pad=0 \\
        --config.tokenizer=runs/photos-vqvae --config.vqvae.codes=512 --config.vqvae.stride=4 \\
        --config.train.batch_size=32 --config.train.steps=900 --workdir=runs/photos-codes

Cost: 8 minutes for the VQ-VAE and 4 for the model, each on one CPU core (docs/vqvae.md has the results).

A few hundred photographs fill a small codebook only: the line "perplexity" of the evaluation says how many codes are in
use, and --config.vqvae.codes=128 makes fewer.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.program = "vqvae"
    config.data.source = "folder:photos"
    config.data.image_size = (32, 32)
    config.data.channels = 3
    config.data.test_fraction = 0.1
    config.data.preprocess = "shrink"
    config.data.flip = True
    config.data.pad = 2
    config.data.pad_mode = "edge"

    config.vqvae.codes = 512
    config.vqvae.stride = 4  # 8 x 8 codes

    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 100
    config.optim.b2 = 0.99

    config.train.steps = 3000
    config.train.batch_size = 32
    config.train.eval_every = 500
    config.train.eval_batch_size = 32
    config.train.sample_every = 500
    config.train.num_samples = 8
    config.train.checkpoint_every = 500
    return config
