"""Sample images from a model, or complete the lower part of given ones.

    igpt sample --model=runs/digits --num=16 --out=samples.png
    igpt sample --model=runs/digits --complete=test --keep=0.5 --num=7 --out=completions.png
    igpt sample --model=runs/faces --complete=photo.png --num=7 --out=completions.png

Each row of a picture of completions has the given upper part, --num continuations, and the original.

Each device samples its own images, unless --tensor splits the model over several devices. With several processes, run
this command in each process; process 0 writes the picture.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Integer

from igpt.bandwidth import Clock
from igpt.command import Parser, add_shared, at_least
from igpt.compiler import token_options
from igpt.config import Config
from igpt.data.images import read_image
from igpt.data.sources import open_source
from igpt.decode import KVCache, decode, decoder_of, grow, prefill
from igpt.draw import STATIC_RULES, Sampling, draw_tokens, image_keys
from igpt.errors import UserError
from igpt.files import check_writable, written
from igpt.interop.load import Pretrained, load, picture_settings
from igpt.model import ImageGPT
from igpt.plots import image_grid, save_png
from igpt.run.cluster import add_process_arguments, is_first_process, join_from
from igpt.sharding import batch_shards, make_mesh, replicate, shard_batch
from igpt.token_ids import checked_ids
from igpt.tokenizer import Tokenizer

SEGMENTS = 8  # more of them save little reading: 1/8 of the longest cache is read in vain on average
SHORTEST_SEGMENT = 128


def sample_tokens(
    model: ImageGPT,
    prefix: Integer[np.ndarray, "B P"],
    keys: Array,
    sampling: Sampling = Sampling(),
    clock: Clock | None = None,
) -> Int[Array, "B T"]:
    """Continues each row of `prefix` to T tokens; P = 0 samples whole images. One compiled program draws all tokens.

    A `clock` counts them and their time.

    Raises UserError if a token is no palette id of the model, and for a network that cannot continue the prefix: one of
    BERT's, or P = 0 for a network without SOS.
    """
    inputs, before = inputs_of(model, prefix), int(model.config.sos)
    return continue_inputs(model, inputs, model.config.seq_len + before, keys, sampling, clock)[:, before:]


def inputs_of(model: ImageGPT, prefix: Integer[np.ndarray, "B P"]) -> Integer[np.ndarray, "B I"]:
    """What the network reads of `prefix`: its tokens, after the SOS if there is one. Raises as `sample_tokens` says."""
    length = model.config.seq_len
    if not model.config.causal:
        raise UserError("this model was trained with the BERT objective: it predicts masked pixels and cannot sample")
    if not prefix.shape[1] < length:
        raise UserError(f"{prefix.shape[1]} of {length} pixels are given: there is nothing left to sample")
    prefix = checked_ids("tokens", prefix, model.config.vocab_size)
    if model.config.sos:
        start = np.full((len(prefix), 1), model.config.vocab_size, np.int32)
        return np.concatenate([start, prefix], axis=1)
    if prefix.shape[1] == 0:
        problem = "this model was trained without SOS (model.sos=False), so that it knows no first pixel"
        raise UserError(f"{problem}; complete an image, of which you keep a row or more (igpt sample: --complete)")
    return prefix


def continue_inputs(
    model: ImageGPT,
    inputs: Integer[np.ndarray, "B P"],
    stop: int,
    keys: Array,
    sampling: Sampling,
    clock: Clock | None = None,
) -> Int[Array, "B stop"]:
    """Continues rows of inputs (tokens, after the SOS if the model reads one) to `stop` entries, at most T + 1.

    `inputs` are padded to a power of two, and `stop` is traced, so that a few compiled programs serve all lengths.
    """
    given = inputs.shape[1]
    inputs = checked_ids("inputs", inputs, model.token_table[...].shape[0])
    padded = np.pad(inputs, [(0, 0), (0, padded_length(given, model.config.seq_len) - given)])
    graph, params = nnx.split(model)
    lengths = segments(padded.shape[1], model.config.seq_len)
    arguments = graph, params, padded, given, stop, keys, *sampling.rules(model.config.vocab_size), lengths
    if clock is None:
        return generator()(*arguments)[:, :stop]
    generator().lower(*arguments).compile()  # the call below finds the program, so that no compilation is timed
    with clock.times(model.config, len(inputs), given, stop):
        return jax.block_until_ready(generator()(*arguments))[:, :stop]


def padded_length(length: int, most: int) -> int:
    """The smallest power of two that is at least `length`, but no more than `most`."""
    return min(1 << (length - 1).bit_length(), most)


def generator() -> Callable:
    """The compiled function that draws all tokens."""
    return for_tokens(_generate, ("graph", *STATIC_RULES, "lengths"))


@functools.cache
def for_tokens(function: Callable, static: tuple[str, ...]) -> Callable:
    """`function`, compiled with the options for drawing on this platform. `static` names its static arguments."""
    return jax.jit(function, static_argnames=static, compiler_options=token_options(jax.default_backend()))


def _generate(graph, params, inputs, given, stop, keys, temperature, greedy, top_k, top_p, lengths):
    model = nnx.merge(graph, params)
    decoder = decoder_of(model)
    inputs, keys = shard_batch(inputs), shard_batch(keys)
    draw = functools.partial(draw_tokens, keys, temperature, greedy, top_k, top_p)
    tokens, cache = begin(model, inputs, given, draw)
    first = given
    for length in lengths:  # a step reads the whole cache, so each segment has a cache of its own length
        tokens, cache = advance(decoder, tokens, cache, first, jnp.minimum(length, stop - 1), length, draw)
        first = jnp.maximum(given, length)
    return replicate(tokens)


def begin(model: ImageGPT, inputs: Int[Array, "B P"], given, draw: Callable) -> tuple[Int[Array, "B S"], KVCache]:
    """Reads the first `given` inputs and draws the next one. Returns room for T + 1 inputs, with these, and the cache.

    igpt/rows.py calls this function and `advance`, too, and stops between rows.
    """
    room = [(0, 0), (0, model.config.seq_len + 1 - inputs.shape[1])]
    logits, cache = prefill(model, inputs, given)
    return _put(jnp.pad(inputs, room), given, draw(logits, given - 1)), cache


def advance(decoder, tokens, cache: KVCache, first, last, length: int, draw: Callable):
    """Reads the inputs from `first` up to before `last` and draws the one after each, with a cache of `length`."""

    def step(position, carry):  # reads the input at `position` and writes the next one
        tokens, cache = carry
        token = jax.lax.dynamic_index_in_dim(tokens, position, axis=1, keepdims=False)
        logits, cache = decode(decoder, token, position, cache)
        return _put(tokens, position + 1, draw(logits, position)), cache

    return jax.lax.fori_loop(first, last, step, (tokens, grow(cache, length)))


def _put(tokens, position, token):
    return jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None].astype(tokens.dtype), position, axis=1)


def segments(given: int, length: int) -> tuple[int, ...]:
    """The lengths to which the cache grows, from `given` positions: multiples of a step, and `length` at last."""
    step = max(SHORTEST_SEGMENT, math.ceil(length / SEGMENTS))
    ends = (min(end, length) for end in range(step, length + step, step))
    return tuple(end for end in ends if end >= given)


def sample_images(
    pretrained: Pretrained, num: int, seed=0, sampling=Sampling(), batch_size=64, clock: Clock | None = None
) -> np.ndarray:
    """Samples `num` unconditional images, uint8 [num, H, W, 3]. A `clock` counts the tokens and their time."""
    return _in_batches(pretrained, np.zeros((num, 0), np.int32), seed, sampling, batch_size, clock)


def complete_images(
    pretrained: Pretrained,
    images: np.ndarray,
    keep: float,
    num: int,
    seed=0,
    sampling=Sampling(),
    batch_size=64,
    clock: Clock | None = None,
) -> np.ndarray:
    """Samples `num` continuations, uint8 [N, num, H, W, 3], of the upper part of each image, uint8 [N, H, W, 3].

    `keep` is the fraction of rows of tokens that is given. The model samples at least one row.
    """
    tokens = pretrained.tokenizer.encode(images)
    given = tokens[:, : kept_rows(keep, tokens.shape[1])].reshape(len(images), -1)
    finished = _in_batches(pretrained, np.repeat(given, num, axis=0), seed, sampling, batch_size, clock)
    return finished.reshape(len(images), num, *images.shape[1:])


def kept_rows(keep: float, rows: int) -> int:
    """The number of upper rows that the model is given. Raises UserError unless `keep` is in [0, 1)."""
    if not 0.0 <= keep < 1.0:
        raise UserError(f"keep is {keep}; it is the fraction of the rows that is given, at least 0 and below 1")
    return min(round(keep * rows), rows - 1)


def _in_batches(pretrained, prefix, seed, sampling, batch_size, clock) -> np.ndarray:
    """Samples in batches. Rounds `batch_size` up so that all devices of the current mesh get equally many images.

    Copies of the last image fill the last batch, so that all batches have one shape and share one compiled program.
    """
    grid = pretrained.tokenizer.grid(*pretrained.config.data.image_size)
    count, images = len(prefix), []
    if count < 1 or batch_size < 1:
        raise UserError(f"{count} images in batches of {batch_size} were asked for; give at least 1 of each")
    keys = image_keys(seed, count)
    batch_size = min(batch_size, count)
    batch_size += -batch_size % batch_shards(jax.sharding.get_abstract_mesh())
    for start in range(0, count, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        tokens = np.asarray(sample_tokens(pretrained.model, prefix[rows], keys[rows], sampling, clock))
        images.append(pretrained.tokenizer.decode(tokens.reshape(-1, *grid)))
    return np.concatenate(images)[:count]


def add_arguments(parser: Parser) -> None:
    add_shared(parser, "model", "step")
    parser.add_argument("--out", required=True, help="the PNG to write")
    parser.add_argument("--num", type=at_least(1), default=16, help="samples, or completions per image (default 16)")
    parser.add_argument("--complete", metavar="IMAGE", help="an image file, or 'test' for images of the test split")
    parser.add_argument("--images", type=at_least(1), help="with --complete=test: how many images (default 8)")
    parser.add_argument("--keep", type=float, help="with --complete: fraction of the rows that is given (default 0.5)")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits; 0 is greedy (default 1)")
    parser.add_argument("--top_k", type=int, default=0, help="draw from the k likeliest tokens (default 0: from all)")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest share p (default 1: all)")
    add_shared(parser, "seed", "batch_size", "fsdp", "tensor")
    add_process_arguments(parser)


def run(args) -> None:
    """Samples or completes images and writes the picture."""
    join_from(args)
    _check_completion(args)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    keep = 0.5 if args.keep is None else args.keep
    if is_first_process():
        check_writable(args.out, "--out", ".png")
    mesh = make_mesh(fsdp=args.fsdp, tensor=args.tensor)
    pretrained = load(args.model, args.step, mesh)
    clock = Clock()
    options = args.num, args.seed, sampling, args.batch_size, clock
    with jax.set_mesh(mesh):
        if args.complete is not None:
            images = _images_to_complete(args, pretrained.config)
            continuations = complete_images(pretrained, images, keep, *options)
            count = len(images) * args.num
            picture = completion_picture(pretrained.tokenizer, images, keep, continuations)
            note = kept_note(pretrained.tokenizer, images.shape[1:3], keep)
        else:
            count, note = args.num, ""
            picture = image_grid(sample_images(pretrained, *options))
    if is_first_process():
        with written(f"--out={args.out}"):
            save_png(picture, args.out)
        print(f"drew {count} images: {clock.speed()}{note}")
        print(f"wrote {args.out}")


def _check_completion(args) -> None:
    """Raises UserError for flags of completions that would be ignored."""
    if args.complete == "":
        raise UserError("--complete is empty; name an image file, or 'test' for images of the test split")
    if args.keep is not None and args.complete is None:
        raise UserError(f"--keep={args.keep} needs --complete: without it, whole images are drawn")
    if args.images is not None and args.complete != "test":
        raise UserError(f"--images={args.images} needs --complete=test; --num is the number of pictures to draw")


def _images_to_complete(args, config: Config) -> np.ndarray:
    """Returns the image of the file --complete, or the first --images images of the test split: uint8 [N, H, W, 3]."""
    if args.complete != "test":
        return read_image(args.complete, picture_settings(config, "shrink"))[None]
    if not config.data.source:
        raise UserError(f"{args.model} was not trained here and has no test split; give an image file")
    return open_source(config.data).test.images[: args.images or 8]


def kept_note(tokenizer: Tokenizer, size: tuple[int, int], keep: float) -> str:
    """Says which pixels were given, if a row of tokens is more than a row of pixels. Otherwise ""."""
    rows, height = tokenizer.grid(*size)[0], size[0]
    kept = kept_rows(keep, rows)
    pixels = f"the upper {kept * height // rows} of {height} rows of pixels"
    return "" if rows == height else f"\ngiven: {pixels}, as {kept} of {rows} rows of {tokenizer.noun}"


def completion_picture(tokenizer: Tokenizer, images: np.ndarray, keep: float, continuations: np.ndarray) -> np.ndarray:
    """One row for each image: its given upper part, its continuations, and the original.

    images: uint8 [N, H, W, 3]; they are drawn as the model reads them, in the palette's colours. continuations:
    [N, num, H, W, 3], the result of `complete_images` for these images and `keep`.
    """
    originals = tokenizer.decode(tokenizer.encode(images))
    given, height = originals.copy(), images.shape[1]
    rows = tokenizer.grid(*images.shape[1:3])[0]
    given[:, kept_rows(keep, rows) * height // rows :] = 255
    cells = np.concatenate([given[:, None], continuations, originals[:, None]], axis=1)
    return image_grid(cells.reshape(-1, *images.shape[1:]), columns=cells.shape[1])
