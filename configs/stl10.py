"""STL-10, shrunk from 96 x 96 to 32 x 32: the same as configs/cifar10.py, on 4,500 images.

    python train.py --config=configs/stl10.py --workdir=runs/stl10

So few images rather test transfer than teach a network: usually they probe a model that was pretrained on other images
(configs/probe_cifar10.py:stl10). The 100,000 unlabelled images are not used, as in the paper (section 3.1).

Cost: a download of 2.6 GB, mostly unlabelled images, and a twelfth of the compute of configs/cifar10.py. Not run here.
For comparison, the paper's iGPT-L, pretrained on ImageNet: linear probe 95.5 % (Chen et al. 2020, table 1).
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config() -> ConfigDict:
    config = cifar10.get_config()
    config.data.source = "tfds:stl10"
    config.data.preprocess = "shrink"

    config.optim.warmup_steps = 350  # ten epochs, because one has only 35 steps
    config.train.steps = 5600  # 160 epochs
    config.train.eval_every = 350
    config.train.sample_every = 1400
    config.train.checkpoint_every = 350
    return config
