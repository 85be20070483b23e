"""scikit-learn's digits at random places of a 12 x 12 canvas: what features are worth where pixels have no fixed place.

    python train.py --config=configs/scattered_digits.py --workdir=runs/scattered
    python eval_probe.py --config=configs/probe.py --model=runs/scattered --workdir=runs/scattered/probe \\
        --config.train_images=4000

The argument is a source of pictures: scattered_digits.py:folder:photos puts digits in random colours on parts of them.

Cost: 2:09 minutes on 2 idle CPU cores, and 70 s for the probe (benchmarks/results/scattered_digits_cpu.json). Expect
about 92 % for the best layer's linear probe, and 32 % for raw pixels (docs/results/study_scattered_digits.json).
"""

from ml_collections import ConfigDict

from configs import digits


def get_config(background: str = "") -> ConfigDict:
    config = digits.get_config()
    config.data.source = "scattered:digits"
    config.data.image_size = (12, 12)
    config.data.scatter_copies = 20
    config.data.pad = 0  # the places are augmentation enough
    config.data.augment_probability = 1.0
    if background:
        config.data.scatter_background = background
        config.data.scatter_color = True
        config.data.channels = 3
        config.palette.colors = 64

    config.model.width = 96
    config.model.depth = 8  # twice the quickstart's layers at its cost

    config.train.steps = 500
    config.train.eval_every = 125
    config.train.sample_every = 250
    config.train.checkpoint_every = 125
    return config
