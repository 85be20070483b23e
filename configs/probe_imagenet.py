"""Linear probes on ImageNet: one pass writes the features of each layer to disk, and SGD fits them.

    python eval_probe.py --config=configs/probe_imagenet.py --model=runs/imagenet-l --workdir=runs/imagenet-l/probe \\
        --config.layers="(20,24,28)"

The paper's protocol (Chen et al. 2020, section 3.4): momentum 0.9, a cosine to zero, a million steps, learning rates
tried from 30 downwards. The paper does not state batch size and augmentation. Here features come from the evaluation
crop and are standardised, so other learning rates may be best.

Disk: D features of 1.28 million images take 5.1 x D MB per layer, in every process: 7.9 GB for L, 16 GB for XL. All 61
layers of XL would be 1 TB, so name some in config.layers. Memory: config.concatenate=5 puts the features of five layers
side by side, 76 GB for XL.
"""

from ml_collections import ConfigDict

from configs import probe


def get_config() -> ConfigDict:
    config = probe.get_config()
    config.source = "tfds:imagenet2012"
    config.preprocess = "crop"
    config.validation_fraction = 0.04
    config.batch_size = 256
    config.baselines = False
    config.neighbours = 0  # a million images are too many to compare with one by one
    config.solver = "sgd"
    config.sgd.learning_rates = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
    config.sgd.steps = 1_000_000
    config.sgd.batch_size = 128
    return config
