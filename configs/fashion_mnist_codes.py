"""Fashion-MNIST as 7 x 7 codes of a VQ-VAE, which configs/vqvae_fashion_mnist.py trains and igpt prepare writes.

    python train.py --config=configs/fashion_mnist_codes.py --workdir=runs/fashion-codes

docs/vqvae.md has the results.

Cost: 6 minutes on 2 CPU cores; 2.90 nats a code on held-out images (seed 0).
"""

from ml_collections import ConfigDict

from configs import fashion_mnist


def get_config() -> ConfigDict:
    config = fashion_mnist.get_config()
    config.data.source = "tokens:fashion-codes"
    config.data.flip = False  # the codes of a mirrored image are not the mirrored codes
    config.tokenizer = "runs/fashion-vqvae"
    config.vqvae.codes = 512
    config.vqvae.stride = 4

    config.train.steps = 800
    config.train.batch_size = 64
    config.train.eval_every = 400
    config.train.eval_batch_size = 200
    config.train.sample_every = 400
    config.train.num_samples = 32
    config.train.checkpoint_every = 200
    return config
