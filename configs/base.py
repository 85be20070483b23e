"""Every field of a run, with its default. The other configs change a few; the command line can change any.

python train.py --config=configs/digits.py --workdir=runs/digits --config.optim.learning_rate=1e-3
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of initialisation, data order, augmentation and dropout
    config.init_from = ""  # a run or Hugging Face directory, or hub id, whose weights and palette to start from

    config.data = data = ConfigDict()
    data.source = "digits"  # digits | npz:PATH | folder:PATH | tfds:NAME | tokens:PATH | openai:PREFIX
    data.image_size = (8, 8)  # height, width of the images
    data.channels = 1  # 1 grey, 3 colour; bits per dimension are counted over height x width x channels
    data.validation_fraction = 0.1  # of the images, held out for eval/loss
    data.test_fraction = 0.2  # held out for probes
    data.split_seed = 0  # apart from config.seed, so that runs with other seeds share their splits
    data.pad = 0  # pixels of padding before a random crop of the original size
    data.pad_mode = "constant"  # constant (black) | edge | reflect
    data.flip = False  # mirror left and right with probability 1/2
    data.augment_probability = 1.0  # of padding, cropping and flipping an image at all
    data.preprocess = "none"  # none | shrink: the centre, to size | crop: the paper's for ImageNet
    data.short_side = (256, 384)  # crop: the shorter side before a training crop is drawn from these lengths
    data.crop = 224  # crop: the side of the square that is cut out and shrunk
    data.filter = "bicubic"  # of every resize: nearest | box | bilinear | hamming | bicubic | lanczos
    data.split_file = ""  # of a folder: lines "path,train|validation|test" in place of the fractions
    data.data_dir = ""  # where tensorflow_datasets keeps its data; empty: its own default
    data.labels_per_class = 0  # of the training images, how many of each class are used, with their labels; 0: all
    data.subset_seed = 0  # which they are
    data.on_unreadable = "stop"  # at an image that cannot be read | skip: take the next one, and count
    data.threads = 1  # that make batches ahead of the device

    config.palette = palette = ConfigDict()
    palette.path = ""  # a .npy of centres [V, 3] in [-1, 1]; empty: the source's, else k-means on its images
    palette.colors = 512  # V
    palette.max_pixels = 1_000_000  # pixels that k-means looks at

    config.model = model = ConfigDict()
    model.width = 512  # D
    model.depth = 24  # L
    model.num_heads = 8  # N
    model.mlp_width = 0  # F; 0: 4 x width
    model.use_bias = False  # in every linear layer but the head; the paper has none
    model.embedding_dropout = 0.0  # of token plus position vectors; the paper has no dropout
    model.residual_dropout = 0.0  # of what each half of a block adds
    model.attention_dropout = 0.0  # needs attention = "reference"
    model.norm_epsilon = 1e-5  # under the root of the norm
    model.causal = True  # False, the BERT objective: every position sees all, and dropped pixels are predicted
    model.pixel_head = True  # False: a network without the head over the palette, for features and classes only
    model.num_classes = 0  # C, of a linear classifier on the pooled final norm, for fine-tuning; 0: none
    model.activation = "quick_gelu"  # gelu | gelu_new | relu | silu | tanh
    model.scale_scores = True  # by 1 / sqrt(K); False, like the next field, only to load weights trained so elsewhere
    model.scale_scores_by_layer = False  # by 1 / (l + 1) on top
    model.dtype = "auto"  # float32 | bfloat16 | auto: bfloat16 on TPU and GPU, float32 on CPU
    model.attention = "auto"  # reference | chunked | cudnn (GPU) | splash (TPU) | auto: the fastest that serves
    model.remat = "none"  # computed again to save memory: none | minimal: elementwise | dots: + attention | full: all
    model.scan_layers = True  # False unrolls the layers: slower to compile, sometimes faster to run

    config.objective = objective = ConfigDict()
    objective.generative = 1.0  # weight of the pixels' loss: next pixels, or dropped ones (BERT)
    objective.classification = 0.0  # weight of the labels' loss; above 0 is fine-tuning, in the paper 1 beside 1
    objective.drop_rate = 0.15  # BERT: the share of positions dropped; 0.15 and 0.2 did best in the paper
    objective.eval_masks = 5  # BERT: the masks that vote on an image's class in evaluation

    config.optim = optim = ConfigDict()
    optim.learning_rate = 3e-3  # the peak: linear warm-up, then the schedule
    optim.warmup_steps = 0  # linear, from almost zero; at most half of the steps
    optim.schedule = "cosine"  # cosine (to zero at the last step) | constant
    optim.b1 = 0.9  # Adam's decay of the mean
    optim.b2 = 0.95  # 0.999 spiked in the paper (section 3.3)
    optim.eps = 1e-8  # Adam's; not stated in the paper
    optim.weight_decay = 0.0  # on kernels only, decoupled
    optim.clip_norm = 0.0  # largest global gradient norm; 0: no clipping

    config.train = train = ConfigDict()
    train.steps = 1_000_000  # updates in all
    train.batch_size = 128  # over all devices and accumulation steps
    train.accumulate = 1  # micro-batches a step, one after the other
    train.log_every = 10  # steps between records in metrics.jsonl
    train.eval_every = 1000  # steps between evaluations on the validation split
    train.eval_batch_size = 128  # images at a time in evaluation
    train.sample_every = 1000  # steps between grids in samples/
    train.num_samples = 16  # images in the grid; 0: no grids. BERT's networks and such without pixel_head have none
    train.checkpoint_every = 1000  # steps between checkpoints
    train.max_to_keep = 2  # newest checkpoints kept; fine-tuning keeps that of the best validation accuracy as well
    train.profile_at = 0  # the first of 3 steps that are recorded into WORKDIR/profile; 0: none
    train.on_bad_step = "stop"  # when a loss or gradient is not finite | skip: skip that update, and count it
    train.patience = 0  # fine-tuning: evaluations in a row without a better accuracy after which it ends; 0: it goes on

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # -1: all devices that the other two leave
    mesh.fsdp = 1  # splits the batch, the parameters and Adam's moments
    mesh.tensor = 1  # splits heads and mlp channels
    mesh.dcn_data = 1  # slices, joined by a data-centre network, among which only the batch is split; 1: a single one
    mesh.cpu_devices = 0  # on a machine without accelerator: how many devices to make of its cores; 0: one
    return config
