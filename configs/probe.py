"""Linear probes of any model's layers, on the data that trained it. This file has every field of a probe.

python eval_probe.py --config=configs/probe.py --model=runs/photos --workdir=runs/photos/probe
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 1  # for the untrained baseline, BERT's masks and SGD's order; not the training seed
    config.steps = ""  # checkpoints to probe; empty: the newest (after fine-tuning, the best) | 1000,2000 | all
    config.source = ""  # of the images, like data.source in configs/base.py; empty: that of the model's run
    config.preprocess = ""  # of the images, like data.preprocess; empty: that of the model's run
    config.validation_fraction = -1.0  # held out to choose layer and penalty; negative: that of the model's run
    config.data_dir = ""  # where tensorflow_datasets keeps its data; empty: that of the model's run
    config.train_images = 0  # number of training images to use, chosen at random; 0: all
    config.layers = ()  # to probe; empty: all. Blocks above the highest are not computed
    config.batch_size = 64  # images in one forward pass
    config.baselines = True  # also probe the raw pixels and an untrained network
    config.concatenate = 0  # also probe so many layers around the best one, concatenated; 0: no. The paper uses 5
    config.labels_per_class = ()  # also probe the best layer with so few labels per class. The paper uses 4, 25 and 400
    config.subsets = 5  # random subsets for each of these numbers, with seeds 0, 1, ...
    config.eval_masks = 5  # BERT: masks per image, which vote on its class; 0: nothing is masked
    # mean: of all positions, as in the paper | grid:G: means of G x G parts | attention: a weighted mean, whose weights
    # a learnt query gives | attention:H: H such means. With attention, features take T times the disk.
    config.pool = "mean"
    config.neighbours = 20  # also let so many most similar training images vote, layer by layer; 0: no
    config.features_out = ""  # a .npz to write the features to
    config.track = ("tensorboard",)  # copies of metrics.jsonl: some of tensorboard, wandb, trackio; (): none

    # auto: newton or lbfgs, by size | newton: small sets, on the host | lbfgs: all features of a layer on the devices |
    # sgd: in batches, for data sets like ImageNet
    config.solver = "auto"
    config.inverse_penalties = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # C; validation chooses
    config.max_iter = 1000  # iterations of L-BFGS, and of Newton's method for each penalty
    config.sgd = sgd = ConfigDict()
    sgd.learning_rates = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)  # at the start of a cosine; chosen on the validation split
    sgd.steps = 2000
    sgd.batch_size = 256
    sgd.weight_decay = 0.0  # times half the squared norm; 1 / (C N) is equivalent to L-BFGS's C
    config.attention = attention = ConfigDict()  # AdamW, for pool=attention
    # At the start of a cosine; chosen on the validation split.
    attention.learning_rates = (0.1, 0.03, 0.01, 0.003, 0.001)
    attention.steps = 500
    attention.batch_size = 128
    attention.weight_decay = 0.1  # decoupled, on the classifier's kernel

    config.mesh = mesh = ConfigDict()  # as in configs/base.py
    mesh.data = -1
    mesh.fsdp = 1
    mesh.tensor = 1
    mesh.cpu_devices = 2  # one per core
    return config
