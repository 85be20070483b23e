"""Fashion-MNIST, shrunk and put at random places of a 16 x 16 canvas: grey, or in colours on parts of photographs.

    python train.py --config=configs/scattered_fashion.py --workdir=runs/scattered-fashion
    python train.py --config=configs/scattered_fashion.py:folder:photos --workdir=runs/scattered-fashion-colour
    python eval_probe.py --config=configs/probe.py --model=runs/scattered-fashion \\
        --workdir=runs/scattered-fashion/probe --config.train_images=4000

The argument is a source of pictures. They become backgrounds, from which a piece of clothing in a random colour takes
the difference, as in MNIST-M. The run reads fashion_mnist.npz: configs/fashion_mnist.py says how to make it.

Cost: ten minutes on one CPU core, and as much for the probe. Expect about 75 % for the best layer's linear probe, and
61 % for raw pixels (docs/results/study_scattered_fashion.json).
"""

from ml_collections import ConfigDict

from configs import scattered_digits


def get_config(background: str = "") -> ConfigDict:
    config = scattered_digits.get_config(background)
    config.data.source = "scattered:npz:fashion_mnist.npz"
    config.data.image_size = (16, 16)
    config.data.scatter_scale = (0.4, 0.5)  # 11 to 14 of 28 pixels
    config.data.scatter_copies = 1
    config.data.validation_fraction = 1 / 14  # 5,000 images
    config.data.test_fraction = 1 / 7  # 10,000 images, as in the official test set
    if not background:
        config.palette.colors = 16  # grey levels
    config.optim.weight_decay = 0.0  # no image is seen twice
    return config
