"""Every field of a run, with its default. The other configs change some of them; the command line can change any.

python train.py --config=configs/digits.py --workdir=runs/digits --config.optim.learning_rate=1e-3
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # for all that is random: parameters, order, augmentation, masks, dropout, samples, a new palette
    config.init_from = ""  # start from its weights and palette: a run directory, a Hugging Face directory or a hub id
    config.track = ("tensorboard",)  # copies of metrics.jsonl: some of tensorboard, wandb, trackio; (): none

    config.program = "igpt"  # what is trained: igpt: the transformer | vqvae: a tokenizer for it (docs/vqvae.md)
    config.tokenizer = "palette"  # palette | PATH: the run of a VQ-VAE, with its vqvae.codes and vqvae.stride below

    config.data = data = ConfigDict()
    # digits | npz:PATH | folder:PATH | tfds:NAME | hf:NAME | tokens:PATH | openai:PREFIX | scattered:SOURCE
    data.source = "digits"  # where the images come from: docs/data.md
    data.image_size = (8, 8)  # height, width of the images
    data.channels = 1  # 1: grey | 3: colour. Bits per dimension count height x width x channels
    data.validation_fraction = 0.1  # of the images, held out for evaluation, if the source has no validation split
    data.test_fraction = 0.2  # of the images, held out for testing, if the source has no test split
    data.split_seed = 0  # chooses what is held out; separate from config.seed, so that seeds can share splits
    data.pad = 0  # pixels of padding before a random crop of the original size
    data.pad_mode = "constant"  # constant (black) | edge | reflect
    data.flip = False  # mirror left and right with probability 1/2
    data.augment_probability = 1.0  # probability that an image is padded, cropped and flipped at all
    data.preprocess = "none"  # none | shrink: largest centre part | crop: as the paper does for ImageNet
    data.short_side = (256, 384)  # crop: in training, the shorter side is resized to a random length in this range
    data.crop = 224  # crop: side of the square that is cut out, then shrunk to image_size
    data.filter = "bicubic"  # for every resize: nearest | box | bilinear | hamming | bicubic | lanczos
    data.split_file = ""  # for a folder: a file with lines "path,train|validation|test"; replaces the fractions
    data.data_dir = ""  # where tensorflow_datasets keeps its data; empty: its own folder
    # scattered:SOURCE puts each image of digits or npz:PATH at a random place of a canvas of image_size.
    data.scatter_scale = (1.0, 1.0)  # smallest, largest scale of the images
    data.scatter_color = False  # each image has a random colour
    data.scatter_background = ""  # a source of pictures, such as folder:PATH, that are cut to the canvas; empty: black
    data.scatter_copies = 1  # places of each training image in a probe; training draws a new place in each step
    data.labels_per_class = 0  # training images used from each class; 0: all
    data.subset_seed = 0  # chooses these images
    data.on_unreadable = "stop"  # if an image cannot be read: stop | skip: use the next one, and count it
    data.threads = 1  # threads that prepare batches while the device computes

    config.palette = palette = ConfigDict()
    palette.path = ""  # a .npy of centres [V, 3] in [-1, 1]; empty: the source's own, or k-means on its images
    palette.colors = 512  # V
    palette.max_pixels = 1_000_000  # pixels that k-means samples

    config.vqvae = vqvae = ConfigDict()
    vqvae.codes = 512  # V, rows of the codebook
    vqvae.stride = 4  # pixels of a code's side: 2 | 4 | 8
    vqvae.width = 64  # channels of the convolutions; half of it next to the image
    vqvae.code_width = 64  # channels of a code
    vqvae.residual_blocks = 2  # in the encoder, and in the decoder
    vqvae.residual_width = 32  # channels inside a residual block
    vqvae.commitment = 0.25  # weight of the loss that keeps latents near their codes
    vqvae.decay = 0.99  # of the moving averages that the codebook consists of
    vqvae.revive_below = 0.1  # a code with a smaller share of the mean usage becomes a latent of the batch

    config.model = model = ConfigDict()
    model.width = 512  # D, channels of a position
    model.depth = 24  # L, blocks
    model.num_heads = 8  # N, attention heads
    model.mlp_width = 0  # F, hidden channels of the mlp; 0: 4 x width
    model.use_bias = False  # in all linear layers of the blocks; the paper has no biases
    model.embedding_dropout = 0.0  # on the sum of token and position vectors; the paper has no dropout
    model.residual_dropout = 0.0  # on what attention and mlp add to the residual stream
    model.attention_dropout = 0.0  # on the attention weights; needs attention = "reference"
    model.norm_epsilon = 1e-5  # added to the mean square in each norm
    model.causal = True  # False: the BERT objective, where every position sees all and dropped pixels are predicted
    model.sos = True  # reads the start of sequence; False: as transformers' pipelines, which feed none. BERT reads none
    model.pixel_head = True  # False: no head over the palette, for features and classes only
    model.num_classes = 0  # C, of the classifier on the pooled final norm, for fine-tuning; 0: no classifier
    model.activation = "quick_gelu"  # or gelu, relu, ...: igpt/activations.py has all
    model.scale_scores = True  # by 1 / sqrt(K); change this and the next field only for weights that were trained so
    model.scale_scores_by_layer = False  # in addition by 1 / (l + 1), for layer l = 0, 1, ...
    model.dtype = "auto"  # float32 | bfloat16 | auto: bfloat16 on TPU and GPU, float32 on CPU
    model.attention = "auto"  # reference | chunked | cudnn (GPU) | fused, splash (TPU) | auto: the fastest here
    model.remat = "none"  # recomputed: none | minimal: elementwise | dots: + attention | attention: all but it | full
    model.scan_layers = "auto"  # yes: one compiled block for all layers | no: each has its own | auto: yes on TPUs

    config.objective = objective = ConfigDict()
    objective.generative = 1.0  # weight of the pixel loss: next pixels, or dropped pixels (BERT)
    objective.classification = 0.0  # weight of the label loss; above 0 for fine-tuning, where the paper weights both 1
    objective.drop_rate = 0.15  # BERT: share of positions that are dropped; 0.15 and 0.2 were best in the paper
    objective.eval_masks = 5  # BERT: masks for each image in evaluation, which vote on its class

    config.optim = optim = ConfigDict()
    optim.name = "adam"  # adam, as in the paper | muon: for the kernels of the blocks, with adam for all else
    optim.learning_rate = 3e-3  # the highest, at the end of the warm-up
    optim.warmup_steps = 0  # steps of linear warm-up from almost zero; at most half of train.steps
    optim.schedule = "cosine"  # after the warm-up: cosine (to zero at the last step) | constant
    optim.b1 = 0.9  # Adam's decay of the first moment
    optim.b2 = 0.95  # Adam's decay of the second moment; with 0.999 the paper saw spikes (section 3.3)
    optim.eps = 1e-8  # Adam's epsilon; the paper does not state it
    optim.weight_decay = 0.0  # decoupled (AdamW), on kernels only; with muon on those of the blocks
    optim.clip_norm = 0.0  # gradients with a larger global norm are scaled down to it; 0: no clipping

    config.train = train = ConfigDict()
    train.steps = 1_000_000  # updates of the parameters in the whole run
    train.batch_size = 128  # images in an update, over all devices and micro-batches
    train.accumulate = 1  # micro-batches in an update, one after the other, to save memory
    train.log_every = 10  # steps between records in metrics.jsonl
    train.eval_every = 1000  # steps between evaluations on the validation split
    train.eval_batch_size = 128  # images in a forward pass of an evaluation
    train.sample_every = 1000  # steps between grids in samples/
    train.num_samples = 16  # images in a grid; 0: no grids. Runs without SOS or without the pixel loss draw none
    train.checkpoint_every = 1000  # steps between checkpoints
    train.max_to_keep = 2  # newest checkpoints kept; fine-tuning also keeps the one with the best validation accuracy
    train.profile_at = 0  # first of 3 steps whose profile is written to WORKDIR/profile; 0: no profile
    train.on_bad_step = "stop"  # if loss or gradient is not finite: stop | skip: leave the network unchanged, and count
    train.patience = 0  # fine-tuning stops after so many evaluations without a better accuracy; 0: never

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # splits the batch; -1: all devices that fsdp and tensor leave
    mesh.fsdp = 1  # splits the batch, the parameters and Adam's moments
    mesh.tensor = 1  # splits attention heads and mlp channels
    mesh.dcn_data = 1  # TPU slices, joined by a data-centre network; only the batch is split over them; 1: one slice
    mesh.cpu_devices = 0  # read by the commands: devices to make from the cores of a machine without GPU or TPU; 0: 1
    return config
