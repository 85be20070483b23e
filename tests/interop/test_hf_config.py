import json
import time
import tracemalloc

import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import ImageGPTConfig as PeerConfig

from igpt.errors import UserError
from igpt.files import MAX_JSON_DEPTH
from igpt.interop.hf_config import ACTIVATIONS, DEFAULTS, MAX_LABELS, SAME_ACTIVATION, UNREAD, ImageGPTConfig
from igpt.interop.hf_network import from_model_config, to_model_config
from igpt.interop.processor import ImageGPTImageProcessor
from igpt.model import ModelConfig

SMALL = dict(vocab_size=18, n_positions=16, n_embd=22, n_layer=3, n_head=2)
STRANGE = [  # values that a foreign file may have in a field of any other type
    *(None, True, False, 0, -1, 2**31, 2**63, 10**400, -(10**400), 0.5, 1e308, float("nan"), float("inf"), "", "x"),
    *("imagegpt", "\ud800", "x" * 10**6, [], [[]], ["x"], [None] * 9, {}, {"x": 1}, {"0": None}, {"height": "x"}),
]
CLUSTERS = np.linspace(-1, 1, 51).reshape(17, 3).tolist()


def loads_or_is_refused(load) -> bool:
    """Whether `load` succeeded. Fails for an exception other than UserError, for 64 MB, and for five seconds."""
    tracemalloc.start()
    start = time.process_time()
    try:
        load()
        return True
    except UserError:
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 << 20, f"{peak:,} bytes"
        assert time.process_time() - start < 5


def test_defaults_and_their_file_are_those_of_transformers(tmp_path):
    PeerConfig().save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "config.json").read_text())
    ours = ImageGPTConfig().to_dict()
    assert {name: theirs[name] for name in ours} == ours
    assert ImageGPTConfig.from_pretrained(tmp_path).to_json_string() == (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    "settings",
    [
        dict(num_labels=5),
        dict(id2label={0: "cat", 1: "dog", 2: "cow"}, label2id={"cat": 0, "dog": 1, "cow": 2}),
        dict(num_labels=1, problem_type="regression", output_attentions=True, use_cache=False, n_inner=46),
        dict(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True, activation_function="gelu_new"),
    ],
)
def test_a_file_of_transformers_is_written_back_byte_for_byte(tmp_path, settings):
    PeerConfig(**SMALL, **settings).save_pretrained(tmp_path)
    written = (tmp_path / "config.json").read_text()
    ImageGPTConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == written
    assert ImageGPTConfig(**SMALL, **settings).num_labels == PeerConfig.from_pretrained(tmp_path).num_labels


def test_an_old_file_with_few_fields_gets_the_defaults(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "imagegpt", "n_embd": 22, "n_head": 2, "num_hidden_layers": 3}'
    )
    config = ImageGPTConfig.from_pretrained(tmp_path)
    assert (config.n_embd, config.n_layer, config.vocab_size, config.activation_function) == (22, 3, 513, "quick_gelu")


@pytest.mark.parametrize("activation", [*ACTIVATIONS, *SAME_ACTIVATION])
def test_every_network_survives_conversion_in_both_directions(activation):
    config = ImageGPTConfig(**SMALL, n_inner=46, activation_function=activation, scale_attn_weights=False, num_labels=5)
    for head in ("pixels", "classes", "none"):
        model = to_model_config(config, head)
        assert to_model_config(from_model_config(model, head), head) == model


@pytest.mark.parametrize(
    ("head", "stated", "reads"),
    [
        ("pixels", {}, True),
        ("none", {"transformers_version": "5.23.0"}, True),
        ("classes", {"transformers_version": "5.23.0"}, False),  # trained there, where nobody prepends the SOS
        ("classes", {}, True),  # an export of ours before the key
        ("classes", {"transformers_version": "5.23.0", "prepend_sos": True}, True),  # an export that was saved there
        ("pixels", {"prepend_sos": False}, False),
        ("pixels", {"prepend_sos": "no"}, True),
    ],
)
def test_the_config_says_whether_a_network_reads_the_sos(head, stated, reads):
    model = to_model_config(ImageGPTConfig.from_dict(SMALL | stated), head)
    assert model.sos == reads and to_model_config(from_model_config(model, head), head) == model


def test_every_setting_reaches_the_network():
    settings = dict(n_inner=46, activation_function="swish", num_labels=5, layer_norm_epsilon=1e-3)
    settings |= dict(embd_pdrop=0.2, resid_pdrop=0.3, attn_pdrop=0.4)
    settings |= dict(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True)
    assert to_model_config(ImageGPTConfig(**SMALL, **settings), "classes") == ModelConfig(
        **dict(width=22, depth=3, num_heads=2, vocab_size=17, seq_len=16, mlp_width=46, use_bias=True),
        **dict(embedding_dropout=0.2, residual_dropout=0.3, attention_dropout=0.4, norm_epsilon=1e-3),
        **dict(pixel_head=False, num_classes=5, activation="silu", scale_scores=False, scale_scores_by_layer=True),
    )


def test_messages_name_a_misspelt_keyword_and_a_bad_value():
    with pytest.raises(UserError, match="no 'n_layers'; did you mean 'n_layer'"):
        ImageGPTConfig(n_layers=3)
    with pytest.raises(UserError, match="n_embd 22 is not divisible by n_head 3"):
        ImageGPTConfig(**SMALL | {"n_head": 3})
    with pytest.raises(UserError, match="n_layer is True; it must be a positive whole number"):
        ImageGPTConfig(n_layer=True)
    with pytest.raises(UserError, match="layer_norm_epsilon is 1000"):
        ImageGPTConfig(layer_norm_epsilon=10**400)  # no float is that large
    for name in ("id2label", "label2id"):
        with pytest.raises(UserError, match=rf"{name} is \['cat'\]; it must be None or a dict"):
            ImageGPTConfig(**{name: ["cat"]})
    for name, value in dict(add_cross_attention=True, pruned_heads={0: [1]}, per_layer_config={1: {}}).items():
        with pytest.raises(UserError, match=f"ImageGPTConfig does not support {name}="):
            ImageGPTConfig(**{name: value})
    for name in ("prelu", "xielu"):
        with pytest.raises(UserError, match=f"'{name}' has parameters of its own"):
            ImageGPTConfig(activation_function=name)
    with pytest.raises(UserError, match="num_labels is 1; a classifier needs two classes"):
        ImageGPTConfig(problem_type="single_label_classification", num_labels=1)
    with pytest.raises(UserError, match="model_type is 'gpt2'; only 'imagegpt'"):
        ImageGPTConfig.from_dict({"model_type": "gpt2"})


@pytest.mark.parametrize("value", STRANGE, ids=range(len(STRANGE)))
def test_any_value_in_any_field_loads_or_is_refused(tmp_path, value):
    loaded = 0
    settings = json.loads(PeerConfig(**SMALL).to_json_string(use_diff=False))
    fields = [*settings, "architectures", "id2label", "label2id", "num_labels", "quantization_config", "torch_dtype"]
    for name in fields:
        (tmp_path / "config.json").write_text(json.dumps(settings | {name: value}))

        def load():
            config = ImageGPTConfig.from_pretrained(tmp_path)
            to_model_config(config, "pixels")
            assert config.to_json_string()

        loaded += loads_or_is_refused(load)
    assert 0 < loaded < len(set(fields))


@pytest.mark.parametrize("value", STRANGE, ids=range(len(STRANGE)))
def test_any_value_in_any_field_of_a_processor_loads_or_is_refused(tmp_path, value):
    settings = ImageGPTImageProcessor(clusters=CLUSTERS, size=4).to_dict() | {"feature_extractor_type": None}
    loaded = 0
    for name in settings:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | {name: value}))
        loaded += loads_or_is_refused(lambda: ImageGPTImageProcessor.from_pretrained(tmp_path).to_json_string())
    assert (loaded == len(settings)) == (value is None)  # None gives every field its default


def test_a_message_does_not_repeat_a_megabyte():
    with pytest.raises(UserError) as error:
        ImageGPTConfig(n_embd=["x" * 10**6] * 99)
    assert len(str(error.value)) < 300


def test_files_that_are_no_json_objects_are_refused(tmp_path):
    nested = b'{"a":' * 10**5 + b"1" + b"}" * 10**5
    for content in (b"", b"[]", b"3", b"null", b'"x"', b"{", b"\xff\xfe{", b'{"n_embd": 1e', b"{}{}", nested):
        for file in ("config.json", "preprocessor_config.json"):
            (tmp_path / file).write_bytes(content)
        assert not loads_or_is_refused(lambda: ImageGPTConfig.from_pretrained(tmp_path))
        assert not loads_or_is_refused(lambda: ImageGPTImageProcessor.from_pretrained(tmp_path))


def test_json_that_is_nested_too_deep_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a":' * MAX_JSON_DEPTH + "1" + "}" * MAX_JSON_DEPTH)
    assert ImageGPTConfig.from_pretrained(tmp_path).to_json_string()
    path.write_text('{"a":' * (MAX_JSON_DEPTH + 1) + "1" + "}" * (MAX_JSON_DEPTH + 1))
    with pytest.raises(UserError, match="nested more than 32 deep"):
        ImageGPTConfig.from_pretrained(tmp_path)


CAT = {0: "cat", 1: "dog", 2: "cow"}


@pytest.mark.parametrize(
    "fields",
    [
        dict(id2label=CAT),
        dict(id2label={str(i): name for i, name in CAT.items()}),
        dict(label2id={name: i for i, name in CAT.items()}),
        dict(label2id={name: str(i) for i, name in CAT.items()}, num_labels=3),
        dict(num_labels=3, id2label=dict(reversed(CAT.items()))),
        dict(id2label=CAT, label2id={name: i for i, name in CAT.items()}, num_labels=3),
    ],
    ids=str,
)
def test_class_names_agree_however_they_are_given(fields, tmp_path):
    assigned, reversed_order = ImageGPTConfig(), ImageGPTConfig()
    for name, value in fields.items():
        setattr(assigned, name, value)
    for name, value in reversed(fields.items()):
        setattr(reversed_order, name, value)
    ImageGPTConfig(num_labels=7).save_pretrained(tmp_path)
    overridden = ImageGPTConfig.from_pretrained(tmp_path, **fields)
    overridden.save_pretrained(tmp_path)
    loaded = ImageGPTConfig.from_pretrained(tmp_path)
    for config in (ImageGPTConfig(**fields), assigned, reversed_order, overridden, loaded):
        assert config.num_labels == 3 and config.id2label == CAT
        assert config.label2id == {"cat": 0, "dog": 1, "cow": 2}
    assert PeerConfig.from_pretrained(tmp_path).id2label == CAT
    assert ImageGPTConfig.from_pretrained(tmp_path, num_labels=3).id2label == CAT
    assert ImageGPTConfig.from_pretrained(tmp_path, num_labels=2).id2label == {0: "LABEL_0", 1: "LABEL_1"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(id2label=CAT, num_labels=4), "num_labels is 4, but 3 classes have names"),
        (dict(id2label=CAT, label2id={"cat": 1, "dog": 0, "cow": 2}), "not the inverse of id2label"),
        (dict(id2label=CAT, label2id={"cat": 0}), "not the inverse of id2label"),
        (dict(id2label={1: "cat", 2: "dog"}), r"id2label has the numbers \[1, 2\]; they must be 0\.\.1"),
        (dict(label2id={"cat": 0, "dog": 0}), "label2id has the numbers"),
        (dict(id2label={0: "cat", "0": "dog"}), "id2label has the numbers"),
        (dict(id2label={0.5: "cat"}), "whole numbers and names are needed"),
        (dict(id2label={0: 7}), "whole numbers and names are needed"),
        (dict(id2label={}), "a dict of at least one class"),
        (dict(num_labels=MAX_LABELS + 1), "num_labels is 65537"),
        (dict(num_labels=0), "num_labels is 0"),
    ],
    ids=str,
)
def test_class_names_that_disagree_are_refused(fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        ImageGPTConfig(**fields)
    ImageGPTConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        ImageGPTConfig.from_pretrained(tmp_path, **fields)


def test_names_of_a_file_take_precedence_over_its_outdated_fields():
    config = ImageGPTConfig.from_dict({"id2label": CAT, "label2id": {"LABEL_0": 0}, "num_labels": 2})
    assert config.num_labels == 3 and config.label2id["cow"] == 2


def test_labels_that_are_none_when_loading_leave_those_of_the_file():
    for name in ("num_labels", "id2label", "label2id"):
        assert ImageGPTConfig.from_dict({"id2label": CAT}, **{name: None}).num_labels == 3
    assert ImageGPTConfig.from_dict({"id2label": CAT}, id2label=None, num_labels=5).num_labels == 5


def test_a_config_changed_in_place_is_not_saved_broken(tmp_path):
    config = ImageGPTConfig(id2label=CAT)
    config.id2label[5] = "gap"
    with pytest.raises(UserError, match="id2label has the numbers"):
        config.save_pretrained(tmp_path)
    config = ImageGPTConfig(**SMALL)
    config.n_head = 5
    with pytest.raises(UserError, match="n_embd 22 is not divisible by n_head 5"):
        config.save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_fields_that_the_network_does_not_read_are_kept(tmp_path):
    extra = {name: 16 for name in UNREAD if name != "dtype"} | dict(my_own_note="x")
    config = ImageGPTConfig(**SMALL, **extra)
    config.pad_token_id = 3
    config.save_pretrained(tmp_path)
    loaded = ImageGPTConfig.from_pretrained(tmp_path, bos_token_id=4, my_own_note="y")
    assert (loaded.type_vocab_size, loaded.pad_token_id, loaded.bos_token_id, loaded.my_own_note) == (16, 3, 4, "y")
    known = DEFAULTS.keys() | {*UNREAD, "add_cross_attention", "label2id", "model_type", "_name_or_path"}
    assert PeerConfig().to_dict().keys() <= known
    with pytest.raises(UserError, match="no 'n_layers'; did you mean 'n_layer'"):
        config.n_layers = 3


def test_overrides_are_checked_with_the_fields_of_the_file_and_not_with_the_defaults():
    file = dict(n_embd=48, n_head=4, num_labels=3)
    config = ImageGPTConfig.from_dict(file, n_head=6, problem_type="single_label_classification")
    assert (config.n_embd, config.n_head) == (48, PeerConfig.from_dict(file, n_head=6).n_head) == (48, 6)
    for overrides, message in (
        (dict(n_head=5), "n_embd 48 is not divisible by n_head 5"),
        (dict(n_layer=0), "n_layer is 0"),
        (dict(n_layers=2), "did you mean 'n_layer'"),
        (dict(pruned_heads={0: [1]}), "does not support pruned_heads="),
    ):
        with pytest.raises(UserError, match=message):
            ImageGPTConfig.from_dict(file | {"n_layers": 3}, **overrides)


@pytest.mark.parametrize("name", ["bos_token_id", "pad_token_id", "eos_token_id"])
def test_token_ids_are_none_by_default_and_have_the_types_of_transformers(name):
    assert getattr(ImageGPTConfig(), name) is None is getattr(PeerConfig(), name)
    for value in ("x", 1.5, True, {}, [1], [1, "x"], [True], -1, 600):
        try:
            PeerConfig(**{name: value})
        except StrictDataclassFieldValidationError:
            with pytest.raises(UserError, match=f"{name} is .*; it must be None or a whole number"):
                ImageGPTConfig(**{name: value})
        else:
            assert getattr(ImageGPTConfig(**{name: value}), name) == value


def test_aliases_read_set_and_construct_the_same_fields():
    config = ImageGPTConfig(**SMALL)
    for alias, field in dict(hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head").items():
        assert getattr(config, alias) == getattr(config, field)
        setattr(config, alias, 44)
        assert getattr(config, field) == getattr(ImageGPTConfig(**{alias: 8}), field) * 5.5 == 44


def test_json_files_folders_and_unused_arguments_are_documented_ways_to_load(tmp_path):
    config = ImageGPTConfig(**SMALL)
    config.to_json_file(tmp_path / "any.json")
    assert ImageGPTConfig.from_json_file(tmp_path / "any.json") == config
    config.save_pretrained(tmp_path / "inner")
    loaded, unused = ImageGPTConfig.from_pretrained(
        tmp_path, subfolder="inner", n_inner=46, nonsense=3, return_unused_kwargs=True
    )
    assert loaded.n_inner == 46 and unused == {"nonsense": 3}
    for name in ("nonsense", "torch_type"):
        with pytest.raises(UserError, match=f"no .*'{name}'"):
            ImageGPTConfig.from_pretrained(tmp_path / "inner", **{name: 3})
    with pytest.raises(UserError, match="from_pretrained does not support proxies="):
        ImageGPTConfig.from_pretrained(tmp_path / "inner", proxies={"http": "x"})
    with pytest.raises(UserError, match="save_pretrained does not support push_to_hub=True: these classes upload"):
        config.save_pretrained(tmp_path, push_to_hub=True)
