"""CIFAR-10, 32 x 32: pretrains iGPT-S on 45,000 training images; the other 5,000 are the validation split.

    python train.py --config=configs/cifar10.py --workdir=runs/cifar10

tensorflow_datasets downloads the images (162 MB). The first run prepares them, which needs pip install -e ".[tfds]".

Cost: 76.6 million parameters on 9 million images, 4.2 EFLOP (6 x parameters x tokens, without attention). That is three
hours of one H100 at 40 % of its bfloat16 peak. Not run here, so we promise neither a loss nor an accuracy. For
comparison, the paper's iGPT-L, pretrained on ImageNet instead of CIFAR-10: linear probe 96.3 %, fine-tuned 99.0 %
(Chen et al. 2020, tables 1 and 3). The paper pretrains only on ImageNet and web images; learning rate, steps and
augmentation are our choice.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.data.source = "tfds:cifar10"
    config.data.image_size = (32, 32)
    config.data.channels = 3

    # The run repeats 45,000 images many times, so it augments them. The paper uses this padding and flip to fine-tune.
    # For pretraining they are our choice. One image in five stays unchanged, so that samples can have plain edges.
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

    config.model.remat = "dots"  # so that the activations of 128 x 1024 tokens fit into 40 GB
    return config
