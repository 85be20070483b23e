"""Linear probes of a model's layers on the data it was trained on. Every field of a probe is here, with its default.

python eval_probe.py --config=configs/probe_digits.py --model=runs/digits --workdir=runs/digits/probe
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 1  # of the untrained baseline, BERT's masks and SGD's order; not the training seed
    config.steps = ""  # checkpoints to probe: empty: the newest (of fine-tuning: the best) | 1000,2000 | all
    config.source = ""  # of the images, as data.source in configs/base.py; empty: what the model was trained on
    config.preprocess = ""  # of the images, as data.preprocess; empty: as the model's were
    config.validation_fraction = -1.0  # held out to choose layer and penalty; negative: as the model's were
    config.data_dir = ""  # where tensorflow_datasets keeps its data; empty: as the model's run
    config.train_images = 0  # so many random training images are enough; 0: all
    config.layers = ()  # to probe; empty: all. Only blocks below the last of them are computed
    config.batch_size = 64  # images a forward pass
    config.baselines = True  # also probe the raw pixels and an untrained network
    config.concatenate = 0  # also probe so many layers round the best one, side by side; 0: no. The paper: 5
    config.labels_per_class = ()  # also probe the best layer with so few labels of each class; the paper: 4, 25, 400
    config.subsets = 5  # random subsets for each of these numbers, by seed 0, 1, ...
    config.eval_masks = 5  # BERT: masks that vote on an image; 0: nothing is masked, in training neither
    config.features_out = ""  # an .npz to write the features to

    config.solver = "lbfgs"  # on all features of a layer at once | sgd: a batch at a time, for sets of ImageNet's size
    config.inverse_penalties = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # C; chosen on validation
    config.max_iter = 1000  # of L-BFGS
    config.sgd = sgd = ConfigDict()
    sgd.learning_rates = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)  # at the start of a cosine; chosen on validation
    sgd.steps = 2000
    sgd.batch_size = 256
    sgd.weight_decay = 0.0  # of half the squared norm; 1 / (C N) is L-BFGS's

    config.mesh = mesh = ConfigDict()  # as in configs/base.py
    mesh.data = -1
    mesh.fsdp = 1
    mesh.tensor = 1
    mesh.cpu_devices = 2  # one a core, as in configs/digits.py
    return config
