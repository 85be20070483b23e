"""CIFAR-10, 32 x 32: pretraining iGPT-S on 45,000 of its training images, the other 5,000 for validation.

    python train.py --config=configs/cifar10.py --workdir=runs/cifar10

tensorflow_datasets brings the images (162 MB); the first run prepares them, which takes pip install "igpt[tfds]".

Cost: 76.6 million parameters on 9 million images, 4.2 EFLOP (6 x parameters x tokens, attention not counted): three
hours of one H100 at 40 % of its bfloat16 peak. Not run here, so that neither loss nor accuracy can be promised. For
comparison, the paper's iGPT-L, pretrained on ImageNet and not on CIFAR-10: linear probe 96.3 %, fine-tuned 99.0 %
(Chen et al. 2020, tables 1 and 3). The paper pretrains on nothing but ImageNet and web images; learning rate, steps
and augmentation are ours.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.data.source = "tfds:cifar10"
    config.data.image_size = (32, 32)
    config.data.channels = 3

    # 45,000 images are seen many times over. The paper fine-tunes with this padding and flip; for pretraining the
    # choice is ours, as is that one image in five stays as it is, so that samples do not have to show mirrored edges.
    config.data.pad = 4
    config.data.pad_mode = "reflect"
    config.data.flip = True
    config.data.augment_probability = 0.8
    config.data.threads = 4

    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 352  # one epoch
    config.optim.clip_norm = 1.0

    config.train.steps = 70_400  # 200 epochs
    config.train.batch_size = 128
    config.train.eval_every = 1760
    config.train.sample_every = 3520
    config.train.checkpoint_every = 1760

    config.model.remat = "dots"  # a step's activations of 128 x 1024 tokens then fit into 40 GB
    return config
