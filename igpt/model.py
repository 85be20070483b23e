"""The iGPT transformer. From tokens it computes logits or pooled features of every layer (igpt/decode.py: one token).

Architecture: Chen et al. 2020, section 2.2, in the exact form of OpenAI's release (src/model.py). Dims: B batch,
T tokens, V palette size, D width, N heads, K head size, F mlp width, L layers.
"""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from igpt.activations import ACTIVATIONS
from igpt.attention import BACKENDS, attention
from igpt.errors import UserError
from igpt.fields import check_at_least, check_choice
from igpt.layers import Linear, Norm, dropout, rows_of
from igpt.remat import REMAT
from igpt.sharding import channels_last, replicate, shard_batch
from igpt.token_ids import Tokens, checked_ids

# Sizes: Chen et al. 2020, table 2. Heads: OpenAI's README. XL's heads are unpublished; we chose 24 heads of size 128.
PRESETS = {
    "s": dict(width=512, depth=24, num_heads=8, seq_len=1024),
    "m": dict(width=1024, depth=36, num_heads=8, seq_len=1024),
    "l": dict(width=1536, depth=48, num_heads=16, seq_len=1024),
    "l48": dict(width=1536, depth=48, num_heads=16, seq_len=2304),
    "xl": dict(width=3072, depth=60, num_heads=24, seq_len=4096),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """All fields that define the network. Raises UserError, which names the field, for an impossible value."""

    width: int
    depth: int
    num_heads: int
    vocab_size: int = 512
    seq_len: int = 1024
    mlp_width: int = 0  # 0 means four times the width
    use_bias: bool = False  # the paper and OpenAI's code use no biases; Hugging Face's models have biases
    embedding_dropout: float = 0.0  # the paper uses no dropout; Hugging Face's default is 0.1 for all three rates
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0
    norm_epsilon: float = 1e-5
    causal: bool = True  # False for BERT: no causal mask, and no SOS
    sos: bool = True  # reads SOS, x_0, ..., x_{T-2}. False: x_0, ..., x_{T-1}, as BERT and transformers' pipelines do
    pixel_head: bool = True  # False: the network has no head that predicts pixels
    num_classes: int = 0  # C, the number of classes of a linear classifier on the pooled final norm; 0: no classifier
    activation: str = "quick_gelu"  # a key of ACTIVATIONS
    scale_scores: bool = True  # multiplies scores by 1 / sqrt(K); only Hugging Face's models set this or the next field
    scale_scores_by_layer: bool = False  # also multiplies the scores of layer l = 0, 1, ... by 1 / (l + 1)
    dtype: str = "float32"  # dtype of the computation; parameters are always float32
    attention: str = "chunked"  # a name in BACKENDS; `Config.network` replaces each "auto"
    remat: str = "none"  # a key of REMAT
    platform: str = ""  # "cpu", "gpu" or "tpu": products take the form that is fast there; `Config.network` sets it
    scan_layers: str | bool = "yes"  # one compiled block serves all layers | "no": they are unrolled | "auto"

    def __post_init__(self):
        object.__setattr__(self, "sos", self.sos and self.causal)
        check_at_least(self, "model.", width=1, depth=1, num_heads=1, vocab_size=1, seq_len=1 + self.first_predicted)
        check_at_least(self, "model.", mlp_width=0, num_classes=0, norm_epsilon=0.0)
        given = self.scan_layers  # a boolean in runs of earlier versions
        object.__setattr__(self, "scan_layers", {"true": "yes", "false": "no"}.get(str(given).lower(), given))
        check_choice(self, "model.", scan_layers=("yes", "no", "auto"))
        check_choice(self, "model.", dtype=("float32", "bfloat16", "auto"), attention=(*BACKENDS, "auto"))
        check_choice(self, "model.", activation=tuple(ACTIVATIONS), remat=tuple(REMAT))
        if self.width % self.num_heads:
            raise UserError(
                f"model.width {self.width} is not divisible by model.num_heads {self.num_heads}; "
                "every head gets width / num_heads channels"
            )
        for name in ("embedding_dropout", "residual_dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if self.mlp_width == 0:
            object.__setattr__(self, "mlp_width", 4 * self.width)

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads

    @property
    def first_predicted(self) -> int:
        """The first token with a prediction: 1 for next pixels without SOS, where nothing precedes token 0; else 0."""
        return int(self.causal and not self.sos)

    def query_scale(self, layer: Array | int) -> Array | float:
        """A factor for the queries. Every back end divides scores by sqrt(K); this factor gives other scales."""
        scale = 1.0 if self.scale_scores else self.head_size**0.5
        return scale / (layer + 1) if self.scale_scores_by_layer else scale

    @property
    def has_dropout(self) -> bool:
        return max(self.embedding_dropout, self.residual_dropout, self.attention_dropout) > 0.0


class Block(nnx.Module):
    """x += attention(norm(x)); x += mlp(norm(x)). Initial values: as in OpenAI's src/model.py, `attn` and `mlp`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        D, N, K, F = config.width, config.num_heads, config.head_size, config.mlp_width

        def bias(*shape):
            return shape if config.use_bias else None

        self.attention_norm = Norm(D, config.norm_epsilon)
        linear = functools.partial(Linear, rngs=rngs, platform=config.platform)
        self.qkv = linear("...d,dch->...ch", (D, 3, N, K), D**-0.5, bias(3, N, K), flat=(D, 3, N * K))
        self.out = linear("...h,hd->...d", (N, K, D), (D * config.depth) ** -0.5, bias(D), flat=(N * K, D))
        self.mlp_norm = Norm(D, config.norm_epsilon)
        self.up = linear("...d,df->...f", (D, F), 0.02, bias(F))
        self.down = linear("...f,fd->...d", (F, D), 0.02, bias(D))

    def __call__(self, x: Float[Array, "B T D"], layer: Array | int, attend, key: Array | None = None, pooling=None):
        """Returns the block's output and its BlockOutputs. `pooling` makes their features; None: the mean.

        `attend(q, k, v, key)` computes attention: it returns the mixed values and an extra result, or None. q, k, v and
        the mixed values are [B, T, N, K]. The caller gets the extra result of every layer as `BlockOutputs.extra`.
        """
        config = self.config
        normed = self.attention_norm(x)
        heads = (*x.shape[:2], config.num_heads, config.head_size)
        # For the TPU's kernels XLA joins these slices again without a copy (igpt/fused.py): keep the order of axes.
        q, k, v = (x.reshape(heads) for x in jnp.unstack(jnp.moveaxis(self.qkv(normed), 2, 0)))
        if not config.scale_scores or config.scale_scores_by_layer:
            q = (q * config.query_scale(layer)).astype(k.dtype)
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        mixed, extra = attend(q, k, v, keys[0])
        y = x + dropout(self.out(mixed.reshape(x.shape)), config.residual_dropout, keys[1])

        def project(hidden):
            return self.down(ACTIVATIONS[config.activation](hidden))

        if config.remat == "none":
            project = jax.checkpoint(project)  # the backward pass gets the hidden layer as it was before the activation
        y = y + dropout(project(self.up(self.mlp_norm(y))), config.residual_dropout, keys[2])
        return y, BlockOutputs(x, (pooling or pool)(normed), k, v, extra)


class BlockOutputs(NamedTuple):
    """Intermediate results of a block. Under jit, XLA removes those that the caller does not use."""

    inputs: Float[Array, "B T D"]
    features: Float[Array, "B d"]
    keys: Float[Array, "B T N K"]
    values: Float[Array, "B T N K"]
    extra: Any


class ImageGPT(nnx.Module):
    """The whole network. It holds the parameters. Every method is a pure function of parameters and arguments."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        # The last row of the token table is the start-of-sequence vector.
        self.token_table = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.vocab_size + 1, config.width)))
        self.position_table = nnx.Param(0.01 * jax.random.normal(rngs.params(), (config.seq_len, config.width)))
        layer_keys = jax.random.split(rngs.params(), config.depth)
        self.blocks = jax.vmap(lambda key: Block(config, nnx.Rngs(key)))(layer_keys)  # every leaf is [L, ...]
        self.final_norm = Norm(config.width, config.norm_epsilon)
        # Zero kernels make the first prediction uniform and the first loss ln V (Chen et al. 2020, appendix A.1).
        D, V, C = config.width, config.vocab_size, config.num_classes
        linear = functools.partial(Linear, std=0.0, bias_shape=None, rngs=rngs, platform=config.platform)
        self.head = linear("...d,dv->...v", (D, V)) if config.pixel_head else None
        self.classifier = linear("...d,dc->...c", (D, C)) if C else None

    def __call__(self, tokens: Tokens, key: Array | None = None) -> Float[Array, "B T V"]:
        """Float32 logits. Position i predicts tokens[:, i], from tokens[:, :i] if causal. A key turns dropout on.

        Without SOS, position i of a causal network predicts tokens[:, i + 1] (`ModelConfig.first_predicted`).
        """
        return self.logits(self.normed(tokens, key))

    def classify(self, tokens: Tokens, keep: Bool[Array, "B T"] | None = None) -> Float[Array, "B C"]:
        """Class logits: a linear function of the pooled final norm (section 2.4)."""
        return self.class_logits(pool(self.normed(tokens, keep=keep)))

    def normed(
        self, tokens: Tokens, key: Array | None = None, keep: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """The output of the final norm, which both heads read. Where `keep` is False (BERT), the token is hidden."""
        keys = (None, None) if key is None else jax.random.split(key)
        x = dropout(self.embed(self.inputs(tokens), keep=keep), self.config.embedding_dropout, keys[0])
        x, _ = self.run_blocks(x, keys[1])
        return self.final_norm(x)

    def features(
        self, tokens: Tokens, layers: Collection | None = None, keep: Bool[Array, "B T"] | None = None, pooling=None
    ) -> Float[Array, "l B d"]:
        """f^l, the mean over positions of block l's normed input, and f^L, the mean of the final norm (section 2.4).

        `layers` selects l layers and their order (default: all L + 1). Blocks above the highest selected are skipped.
        `pooling` replaces the mean by another function of [B, T, D], such as `grid_pool`.
        """
        depth = self.config.depth
        layers = range(depth + 1) if layers is None else layers
        if not len(layers) or not all(0 <= layer <= depth for layer in layers):
            raise UserError(f"layers {list(layers)} were asked for; this model has 0 (the embedding's norm) to {depth}")
        last = int(max(layers))
        x, outputs = self.run_blocks(self.embed(self.inputs(tokens), keep=keep), depth=last, pooling=pooling)
        norm = self.final_norm
        if last < depth:
            graph, stacked = nnx.split(self.blocks.attention_norm)
            norm = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[last], stacked))
        return jnp.concatenate([outputs.features, (pooling or pool)(norm(x))[None]])[jnp.asarray(layers)]

    def inputs(self, tokens: Tokens) -> Int[Array, "B T"]:
        """The model's inputs: SOS, x_0, ..., x_{T-2}, or x_0, ..., x_{T-1} for a model without SOS.

        Raises UserError if a token is no palette id. Under jit the values are unknown, and are not checked.
        """
        tokens = checked_ids("tokens", tokens, self.config.vocab_size)
        if not self.config.sos:
            return tokens
        start = jnp.full_like(tokens[:, :1], self.config.vocab_size)
        return jnp.concatenate([start, tokens[:, :-1]], axis=1)

    def embed(
        self, inputs: Int[Array, "B P"], first_position: Array | int = 0, keep: Bool[Array, "B P"] | None = None
    ) -> Float[Array, "B P D"]:
        """The sum of token and position vectors, for inputs at positions first_position, first_position + 1, ...

        Where `keep` is False, the token's vector is zero, as for BERT in OpenAI's src/model.py.
        """
        # Both tables are small: all-gather them first, so that the lookup itself needs no communication.
        inputs = checked_ids("inputs", inputs, self.config.vocab_size + 1)
        tokens, positions = replicate(self.token_table[...]), replicate(self.position_table[...])
        x = rows_of(tokens, inputs) if self.config.platform == "gpu" else tokens[inputs]
        x = x if keep is None else x * keep[..., None]
        x = x + jax.lax.dynamic_slice_in_dim(positions, first_position, inputs.shape[1])[None]
        return shard_batch(x.astype(self.config.dtype))

    def logits(self, normed: Float[Array, "B P D"]) -> Float[Array, "B P V"]:
        if self.head is None:
            raise UserError("this model has no pixel head: it gives features, but can neither be sampled nor scored")
        return self.head(normed, jnp.float32)  # accumulated in float32, and not rounded to bfloat16 before the softmax

    def class_logits(self, pooled: Float[Array, "B D"]) -> Float[Array, "B C"]:
        if self.classifier is None:
            raise UserError("this model has no classifier; fine-tune it, or load a model that has one")
        return self.classifier(pooled, jnp.float32)

    def run_blocks(
        self,
        x: Float[Array, "B P D"],
        key: Array | None = None,
        attend=None,
        by_layer=None,
        depth: int | None = None,
        pooling=None,
    ) -> tuple[Array, BlockOutputs]:
        """Runs all blocks, or the first `depth`. Returns the output and BlockOutputs stacked over layers, [L, B, ...].

        `attend(q, k, v, key, of_layer)` replaces `self.attend`; `of_layer` is the layer's slice of `by_layer`.
        """
        config = self.config
        depth = config.depth if depth is None else depth
        graph, stacked = nnx.split(self.blocks)
        if depth < config.depth:
            stacked = jax.tree.map(lambda leaf: leaf[:depth], stacked)
        attend = attend or self.attend

        def run_block(x, layer):
            params, index, key, of_layer = layer
            if config.platform in ("gpu", "tpu"):
                # On GPUs XLA would put B last in x, on TPUs T, and then transpose what each product reads.
                x = channels_last(x)
            x, outputs = nnx.merge(graph, params)(x, index, functools.partial(attend, of_layer=of_layer), key, pooling)
            return shard_batch(x), outputs

        if config.remat != "none":
            run_block = jax.checkpoint(run_block, policy=REMAT[config.remat])
        keys = None if key is None else jax.random.split(key, depth)
        unroll = max(depth, 1) if config.scan_layers == "no" else 1
        return jax.lax.scan(run_block, x, (stacked, jnp.arange(depth), keys, by_layer), unroll=unroll)

    def attend(self, q, k, v, key, of_layer=None):
        """Attention of every position to itself and to earlier positions, or to all if the model is not causal."""
        c = self.config
        return attention(q, k, v, backend=c.attention, causal=c.causal, dropout=c.attention_dropout, key=key), None


def pool(normed: Float[Array, "B P D"]) -> Float[Array, "B D"]:
    """The mean over positions, in float32, because a bfloat16 sum of a thousand numbers loses the small ones."""
    return jnp.mean(normed.astype(jnp.float32), axis=1)


def grid_pool(normed: Float[Array, "B T D"], shape: tuple[int, int], cells: int) -> Float[Array, "B d"]:
    """The means over cells x cells parts of an image of `shape` (height, width), one after the other: d = cells^2 D.

    Sides that `cells` does not divide have parts that differ by a pixel. Raises UserError if a part would be empty.
    """
    check_cells(shape, cells)
    rows, columns = ([jnp.arange(side) * cells // side == cell for cell in range(cells)] for side in shape)
    inside = jnp.stack([jnp.outer(row, column).reshape(-1) for row in rows for column in columns])  # [cells^2, T]
    shares = inside / jnp.sum(inside, axis=1, keepdims=True)
    means = jnp.einsum("ct,btd->bcd", shares, normed.astype(jnp.float32), precision="highest")
    return means.reshape(len(normed), -1)


def check_cells(shape: tuple[int, int], cells: int) -> None:
    """Raises UserError if an image of `shape` (height, width) has too few tokens for cells x cells parts."""
    if cells > min(shape):
        raise UserError(f"an image of {shape[0]} x {shape[1]} cannot be cut into {cells} x {cells} parts; use fewer")


def count_params(config: ModelConfig) -> int:
    """The exact number of parameters, computed from shapes without allocating arrays."""
    abstract = nnx.eval_shape(lambda: ImageGPT(config, nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract)))
