import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from igpt import chunked
from igpt.errors import UserError
from igpt.loss import next_pixel
from igpt.model import PRESETS, ImageGPT, ModelConfig, count_params
from igpt.plan import compiled as planned
from tests.helpers import TINY_MODEL, random_model, random_tokens, with_config

# Compiled, because op by op a first forward pass takes seconds.
logits_of = jax.jit(lambda model, tokens, key=None: model(tokens, key))
features_of = jax.jit(lambda model, tokens, keep=None: model.features(tokens, keep=keep))
masked_logits_of = jax.jit(lambda model, tokens, keep: model.logits(model.normed(tokens, keep=keep)))


def by_hand(model, tokens, keep=1.0):
    """Logits and pooled features in float64 NumPy, following OpenAI's src/model.py line by line.

    BERT's mask multiplies the tokens' vectors, before the positions' are added.
    """
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model)))
    config, blocks = model.config, params["blocks"]

    def norm(x, gain):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * gain

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    inputs = np.concatenate([np.full((len(tokens), 1), config.vocab_size), tokens[:, :-1]], axis=1)
    if not (config.causal and config.sos):
        inputs = tokens
    h = params["token_table"][inputs] * np.expand_dims(keep, -1) + params["position_table"]
    features = []
    for layer in range(config.depth):
        n = norm(h, blocks["attention_norm"]["gain"][layer])
        features.append(n.mean(1))
        q, k, v = np.einsum("btd,dcnk->cbntk", n, blocks["qkv"]["kernel"][layer])
        if config.use_bias:
            bias = blocks["qkv"]["bias"][layer][:, None, :, None]
            q, k, v = q + bias[0], k + bias[1], v + bias[2]
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(config.head_size)
        if not config.scale_scores:
            scores = scores * np.sqrt(config.head_size)
        if config.scale_scores_by_layer:
            scores = scores / (layer + 1)
        if config.causal:
            scores = np.where(np.tril(np.ones(scores.shape[-2:])), scores, -1e10)
        a = np.einsum("bntk,nkd->btd", softmax(scores) @ v, blocks["out"]["kernel"][layer])
        h = h + a + (blocks["out"]["bias"][layer] if config.use_bias else 0)
        m = norm(h, blocks["mlp_norm"]["gain"][layer]) @ blocks["up"]["kernel"][layer]
        m = m + (blocks["up"]["bias"][layer] if config.use_bias else 0)
        m = m / (1 + np.exp(-1.702 * m)) @ blocks["down"]["kernel"][layer]
        h = h + m + (blocks["down"]["bias"][layer] if config.use_bias else 0)
    n = norm(h, params["final_norm"]["gain"])
    return n @ params["head"]["kernel"], np.stack([*features, n.mean(1)])


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("s", 76_571_648), ("m", 455_157_760), ("l", 1_362_250_752), ("l48", 1_364_216_832), ("xl", 6_810_875_904)],
)
def test_published_sizes_have_the_published_parameter_counts(preset, expected):
    assert count_params(ModelConfig(**PRESETS[preset])) == expected


def test_the_first_loss_is_exactly_ln_v():
    config = dataclasses.replace(TINY_MODEL, vocab_size=512)
    tokens = random_tokens(config)
    losses = next_pixel(logits_of(ImageGPT(config, nnx.Rngs(0)), tokens), tokens)
    np.testing.assert_allclose(losses, np.log(512), atol=1e-6)


def test_bert_reads_no_sos_and_a_network_without_it_needs_two_tokens():
    assert ModelConfig(12, 2, 2, causal=False) == ModelConfig(12, 2, 2, causal=False, sos=False)
    with pytest.raises(UserError, match=r"model\.seq_len is 1; it must be at least 2"):
        dataclasses.replace(TINY_MODEL, sos=False, seq_len=1)


def test_initialisation_has_the_released_standard_deviations():
    config = ModelConfig(width=256, depth=4, num_heads=4, vocab_size=512, seq_len=400)
    params = nnx.to_pure_dict(nnx.state(ImageGPT(config, nnx.Rngs(0))))
    blocks = params["blocks"]
    for leaf, std in (
        (params["token_table"], 0.02),
        (params["position_table"], 0.01),
        (blocks["qkv"]["kernel"], 256**-0.5),
        (blocks["out"]["kernel"], (256 * 4) ** -0.5),
        (blocks["up"]["kernel"], 0.02),
        (blocks["down"]["kernel"], 0.02),
    ):
        assert abs(float(leaf.std()) / std - 1) < 0.02
        assert abs(float(leaf.mean())) < 0.02 * std
    assert not np.array_equal(blocks["up"]["kernel"][0], blocks["up"]["kernel"][1])
    assert (params["head"]["kernel"] == 0).all() and (blocks["mlp_norm"]["gain"] == 1).all()


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(use_bias=True),
        dict(causal=False),  # OpenAI's BERT graph, with nothing dropped
        dict(sos=False),
        dict(scale_scores=False),
        dict(scale_scores_by_layer=True),
    ],
    ids=str,
)
def test_logits_and_features_equal_the_released_arithmetic(fields):
    model = random_model(dataclasses.replace(TINY_MODEL, **fields))
    tokens = random_tokens()
    logits, features = by_hand(model, np.asarray(tokens))
    np.testing.assert_allclose(logits_of(model, tokens), logits, atol=5e-5)
    np.testing.assert_allclose(features_of(model, tokens), features, atol=5e-6)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_logits_at_i_depend_on_no_token_from_i_on(monkeypatch, backend):
    monkeypatch.setattr(chunked, "BLOCK", 4)
    model = with_config(random_model(), attention=backend)
    tokens = random_tokens(batch=1)

    def logits(soft_tokens):  # a row of weights over the palette for each token, so that there is a gradient
        table = jnp.concatenate([model.token_table[-1:], (soft_tokens @ model.token_table[:-1])[:-1]])
        x, _ = model.run_blocks((table + model.position_table[...])[None])
        return model.logits(model.final_norm(x))[0]

    one_hot = jax.nn.one_hot(tokens[0], model.config.vocab_size)
    np.testing.assert_allclose(jax.jit(logits)(one_hot), logits_of(model, tokens)[0], atol=1e-5)
    influence = np.abs(jax.jit(jax.jacobian(logits))(one_hot)).sum(axis=(1, 3))  # [position, token]
    assert (np.triu(influence) == 0).all()
    assert (influence[np.tril_indices(model.config.seq_len, -1)] > 0).all()


BERT = dataclasses.replace(TINY_MODEL, causal=False, num_classes=5)


def random_keep(rate=0.6, seed=8):
    return jax.random.bernoulli(jax.random.key(seed), rate, (3, TINY_MODEL.seq_len))


def test_bert_computes_the_released_arithmetic_with_tokens_dropped():
    model, tokens, keep = random_model(BERT), random_tokens(), random_keep()
    logits, features = by_hand(model, np.asarray(tokens), np.asarray(keep))
    np.testing.assert_allclose(masked_logits_of(model, tokens, keep), logits, atol=5e-5)
    np.testing.assert_allclose(features_of(model, tokens, keep), features, atol=5e-6)
    classes = jax.jit(lambda model: model.classify(tokens, keep))(model)
    np.testing.assert_allclose(classes, features[-1] @ np.asarray(model.classifier.kernel[...]), atol=5e-5)


def test_kept_tokens_and_all_positions_have_influence_dropped_tokens_none():
    model, tokens, keep = random_model(BERT), random_tokens(), random_keep()
    other = jnp.where(keep, tokens, (tokens + 5) % 11)
    for compute in (masked_logits_of, features_of):
        np.testing.assert_array_equal(compute(model, tokens, keep), compute(model, other, keep))
    params, graph = nnx.to_pure_dict(nnx.state(model)), nnx.graphdef(model)

    def logits(positions):
        return nnx.merge(graph, params | {"position_table": positions}).normed(tokens, keep=keep)

    by_position = jax.jit(jax.jacobian(logits))(params["position_table"])  # [B, T, D, positions, D]
    assert (jnp.abs(by_position).sum(axis=(2, 4)) > 0).all()
    image, position = 1, int(jnp.flatnonzero(keep[1])[-1])  # the last kept token, which earlier positions see too
    changed = tokens.at[image, position].set((tokens[image, position] + 5) % 11)
    difference = abs(masked_logits_of(model, tokens, keep) - masked_logits_of(model, changed, keep)).max(axis=-1)
    assert (difference[image] > 1e-6).all() and (difference[jnp.array([0, 2])] == 0).all()


@pytest.mark.parametrize("config", [TINY_MODEL, BERT], ids=["causal", "bert"])
def test_features_of_some_layers_equal_their_rows_among_all_layers(config):
    model, tokens, keep = random_model(config), random_tokens(), None if config.causal else random_keep()
    whole = features_of(model, tokens, keep)
    orders = [(0,), (1,), (3,), (2, 0), (1, 3), (2, 0, 2), (3, 2, 1, 0), np.array([1, 0])]
    several = jax.jit(lambda model, tokens, keep: [model.features(tokens, order, keep) for order in orders])
    for order, rows in zip(orders, several(model, tokens, keep), strict=True):
        np.testing.assert_allclose(rows, whole[jnp.asarray(order)], atol=1e-6)


def test_blocks_above_the_last_layer_asked_for_are_not_computed():
    model, tokens = random_model(), random_tokens()
    for layer in range(4):
        program = jax.make_jaxpr(lambda model, tokens, layer=layer: model.features(tokens, [layer]))(model, tokens)
        assert [eqn.params["length"] for eqn in program.eqns if eqn.primitive.name == "scan"] == [layer]


@pytest.mark.parametrize("layers", [[4], [-1], [], [0, 7]])
def test_a_layer_that_does_not_exist_is_refused(layers):
    with pytest.raises(UserError, match=r"layers .* were asked for; this model has 0 \(the embedding's norm\) to 3"):
        random_model().features(random_tokens(), layers)


@pytest.mark.parametrize(
    "change",
    [
        {"scan_layers": "no"},
        {"remat": "minimal"},
        {"remat": "dots"},
        {"remat": "full"},
        {"attention": "reference"},
    ],
)
def test_ways_of_computing_agree_in_loss_and_gradients(monkeypatch, change):
    monkeypatch.setattr(chunked, "BLOCK", 4)  # several blocks, the last one incomplete
    tokens = random_tokens()

    def loss_and_grads(model):
        graph, params = nnx.split(model)
        return jax.jit(jax.value_and_grad(lambda p: next_pixel(nnx.merge(graph, p)(tokens), tokens).mean()))(params)

    model = random_model()
    for one, other in zip(
        jax.tree.leaves(loss_and_grads(model)),
        jax.tree.leaves(loss_and_grads(with_config(model, **change))),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_remat_keeps_less_for_the_backward_pass():
    def kept_and_temporary(remat):
        config = ModelConfig(width=32, depth=6, num_heads=2, vocab_size=11, seq_len=320, remat=remat)  # two blocks
        graph, params = nnx.split(ImageGPT(config, nnx.Rngs(0)))
        tokens = random_tokens(config, batch=8)
        traced = jax.jit(jax.grad(lambda p: next_pixel(nnx.merge(graph, p)(tokens), tokens).mean())).trace(params)
        stacked = [x for x in planned.saved_by_scans(traced.jaxpr.jaxpr) if x.shape[0] == config.depth]
        kept = sum(x.size * x.dtype.itemsize for x in stacked)
        return kept, traced.lower().compile().memory_analysis().temp_size_in_bytes

    kept, temporary = zip(*map(kept_and_temporary, ("full", "dots", "minimal", "none")), strict=True)
    assert kept[0] < kept[1] < kept[2] < kept[3]
    assert temporary[0] < min(temporary[1:3]) and max(temporary[1:3]) < temporary[3]  # dots, minimal: as XLA schedules


def test_the_backward_pass_gets_each_hidden_layer_once():
    """It computes the activation again, instead of storing the layer before and after it."""
    graph, params = nnx.split(random_model())
    tokens = random_tokens()
    loss = jax.grad(lambda params: next_pixel(nnx.merge(graph, params)(tokens), tokens).mean())
    hidden = (TINY_MODEL.depth, *tokens.shape, TINY_MODEL.mlp_width)
    assert [x.shape for x in planned.saved_by_scans(jax.make_jaxpr(loss)(params).jaxpr)].count(hidden) == 1


def test_dropout_needs_a_key_and_repeats_with_it():
    model = with_config(random_model(), embedding_dropout=0.2, residual_dropout=0.2)
    tokens = random_tokens()
    plain = with_config(model, embedding_dropout=0.0, residual_dropout=0.0)
    plain = logits_of(plain, tokens)
    np.testing.assert_array_equal(logits_of(model, tokens), plain)
    one, same, other = (logits_of(model, tokens, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other) and not np.allclose(one, plain)


def test_bfloat16_computes_close_to_float32_and_returns_float32():
    model = random_model()
    tokens = random_tokens()
    half = with_config(model, dtype="bfloat16")
    rough, exact = logits_of(half, tokens), logits_of(model, tokens)
    assert rough.dtype == features_of(half, tokens).dtype == jnp.float32
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.05


def test_the_classifier_reads_the_pooled_final_norm():
    model = random_model(dataclasses.replace(TINY_MODEL, num_classes=5))
    tokens = random_tokens()
    expected = features_of(model, tokens)[-1] @ model.classifier.kernel[...]
    np.testing.assert_allclose(jax.jit(lambda m, t: m.classify(t))(model, tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("platform", "fixed"), [("", False), ("cpu", False), ("gpu", True), ("tpu", True)])
def test_the_layout_of_a_layers_input_is_fixed_on_accelerators(platform, fixed):
    model = with_config(random_model(), platform=platform)
    assert ("layout_constraint" in str(jax.make_jaxpr(model)(random_tokens()))) == fixed


def test_a_model_without_a_head_refuses_to_use_it():
    bare = random_model(dataclasses.replace(TINY_MODEL, pixel_head=False))
    assert features_of(bare, random_tokens()).shape == (4, 3, 14)
    with pytest.raises(UserError, match="no pixel head"):
        bare(random_tokens())
    with pytest.raises(UserError, match="no classifier"):
        bare.classify(random_tokens())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 15}, "width 15 is not divisible by model.num_heads 2"),
        ({"depth": 0}, "depth is 0"),
        ({"residual_dropout": 1.0}, r"residual_dropout is 1.0.*\[0, 1\)"),
        ({"dtype": "float16"}, "'float16'; choose float32, bfloat16"),
        ({"attention": "flash"}, "'flash'; choose reference"),
        ({"remat": "some"}, "'some'; choose none"),
        ({"mlp_width": -1}, "mlp_width is -1"),
    ],
)
def test_impossible_networks_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY_MODEL, **change)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("read", ["features", "classify", "normed", "__call__", "inputs"])
def test_ids_that_are_no_colours_are_refused_outside_jit(read, causal):
    model = with_config(random_model(dataclasses.replace(TINY_MODEL, num_classes=3)), causal=causal)
    for wrong in (11, 200, -1):
        tokens = np.zeros((2, 13), np.int16)
        tokens[1, 5] = wrong
        for array in (tokens, jnp.asarray(tokens)):
            with pytest.raises(UserError, match=r"tokens run from \S+ to \S+; this model's ids are 0\.\.10"):
                getattr(model, read)(array)
    with pytest.raises(UserError, match="this model's ids are 0..11"):  # the start of sequence is an input
        model.embed(jnp.full((2, 13), 12))
    jax.eval_shape(lambda tokens: getattr(model, read)(tokens), random_tokens())  # traced values are unknown


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int64])
def test_the_start_of_sequence_fits_into_tokens_of_any_type(dtype):
    colors = 256 if dtype == np.uint8 else 128
    model = nnx.eval_shape(lambda: ImageGPT(dataclasses.replace(TINY_MODEL, vocab_size=colors), nnx.Rngs(0)))
    tokens = np.asarray(random_tokens(model.config))
    expected = np.concatenate([np.full((3, 1), colors), tokens[:, :-1]], axis=1)
    np.testing.assert_array_equal(model.inputs(tokens.astype(dtype)), expected)
    np.testing.assert_array_equal(model.inputs(jnp.asarray(tokens.astype(dtype))), expected)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("changes", [{}, {"use_bias": True, "num_classes": 3}], ids=str)
def test_each_platforms_products_give_the_same_logits_features_and_gradients(changes, platform):
    plain = random_model(dataclasses.replace(TINY_MODEL, **changes))
    other = random_model(dataclasses.replace(TINY_MODEL, **changes, platform=platform))
    tokens = random_tokens()
    np.testing.assert_allclose(logits_of(other, tokens), logits_of(plain, tokens), atol=1e-5)
    np.testing.assert_allclose(features_of(other, tokens), features_of(plain, tokens), atol=1e-5)

    def gradient(model):
        graph, params = nnx.split(model)
        loss = jax.jit(jax.grad(lambda params: jnp.mean(next_pixel(nnx.merge(graph, params)(tokens), tokens))))
        return nnx.to_pure_dict(loss(params))

    pairs = zip(jax.tree.leaves(gradient(other)), jax.tree.leaves(gradient(plain)), strict=True)
    for ours, expected in pairs:
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_the_gradient_of_a_kernel_sums_over_one_dimension_on_cpus():
    """XLA's CPU backend multiplies over two dimensions only after transposing a copy."""
    model = random_model(dataclasses.replace(TINY_MODEL, platform="cpu"))
    graph, stacked = nnx.split(model.blocks.up)
    x, d_y = jnp.ones((5, 7, TINY_MODEL.width)), jnp.ones((5, 7, model.config.mlp_width))

    def gradient(params, d_y):
        return jax.vjp(lambda params: nnx.merge(graph, params)(x), params)[1](d_y)

    text = jax.jit(gradient).lower(jax.tree.map(lambda leaf: leaf[0], stacked), d_y).as_text()
    (contracted,) = {
        line.split("contracting_dims = ")[1].split(",")[0] for line in text.splitlines() if "dot_general" in line
    }
    assert contracted == "[0] x [0]"
