import dataclasses
import errno
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import eval_probe
import igpt
from igpt.data.batches import Drops
from igpt.data.examples import few_labels
from igpt.data.sources import open_source
from igpt.errors import UserError
from igpt.probe import fit, selection
from igpt.probe.config import ProbeConfig
from igpt.probe.features import Features, stream_features
from igpt.probe.fit import fit_probe, layers_around
from igpt.probe.neighbours import neighbours_accuracy
from igpt.sharding import MeshConfig, make_mesh
from tests.helpers import GREY_PALETTE, PROBE_HEIGHT, PROBE_WIDTH, ROOT, grey_pictures, probe_config, write_run


def arrays_of(path):
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def everything(trained, tmp_path_factory):
    """The results of a probe with all options, and the folder of its files."""
    folder = tmp_path_factory.mktemp("everything")
    options = dict(steps="all", concatenate=3, labels_per_class=(2, 9), subsets=2)
    config = probe_config(**options, features_out=str(folder / "probe" / "features.npz"))
    return eval_probe.run(config, trained, folder / "probe"), folder / "probe"


def test_the_features_in_the_file_are_the_models(everything, trained):
    results, folder = everything
    arrays, pretrained = arrays_of(folder / "features.npz"), igpt.load(trained, step=4)
    source = open_source(pretrained.config.data)
    assert len(arrays) == 3 * (1 + 4)
    for name in ("train", "validation", "test"):
        split = getattr(source, name)
        np.testing.assert_array_equal(arrays[f"{name}_labels"], split.labels)
        assert results["images"][name] == len(split)
        one = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        features = np.concatenate([x for x, _ in stream_features(pretrained.model, split, GREY_PALETTE, 10, one)])
        for layer in range(4):
            np.testing.assert_allclose(arrays[f"{name}_layer_{layer:02d}"], features[:, layer, 0], atol=1e-5)


def fit_again(arrays, layers, chosen=None):
    """A new fit of some layers, from the features that were written."""
    parts = [
        Features({n: arrays[f"{name}_layer_{n:02d}"][:, None] for n in layers}, arrays[f"{name}_labels"])
        for name in ("train", "validation", "test")
    ]
    if chosen is not None:
        parts[0] = parts[0].take(chosen)
    return fit_probe(parts, layers, ProbeConfig.of(probe_config()), make_mesh())


def test_every_result_follows_from_the_features(everything):
    results, folder = everything
    arrays, fitted = arrays_of(folder / "features.npz"), results["pretrained"]
    assert [entry["layer"] for entry in fitted["layers"]] == [0, 1, 2, 3]
    for entry in fitted["layers"]:
        layer = entry["layer"]
        train, test = ((arrays[f"{name}_layer_{layer:02d}"], arrays[f"{name}_labels"]) for name in ("train", "test"))
        votes = neighbours_accuracy(*train, test[0][:, None], test[1], probe_config().neighbours)
        assert entry == {"layer": layer, "neighbours": votes} | fit_again(arrays, [layer])
    best = fitted["best_layer"]
    assert fitted["layers"][best]["validation_accuracy"] == max(e["validation_accuracy"] for e in fitted["layers"])
    assert fitted["test_accuracy"] == fitted["layers"][best]["test_accuracy"]
    assert results["metrics"]["probe/accuracy_layer_03"] == fitted["layers"][3]["test_accuracy"]

    around = results["concatenated"]["layers"]
    assert around == layers_around(best, 3, [0, 1, 2, 3])
    assert results["concatenated"] == {"layers": around} | fit_again(arrays, around)

    few = results["few_labels"]
    assert few["layer"] == best and [entry["labels_per_class"] for entry in few["features"]] == [2, 9]
    for entry in few["features"]:
        chosen = [few_labels(arrays["train_labels"], entry["labels_per_class"], seed) for seed in (0, 1)]
        accuracies = [fit_again(arrays, [best], indices)["test_accuracy"] for indices in chosen]
        assert entry["accuracies"] == accuracies and entry["mean"] == np.mean(accuracies)
        assert entry["std"] == np.std(accuracies)
    assert all(len(entry["accuracies"]) == 2 for entry in few["raw_pixels"]) and len(few["raw_pixels"]) == 2


def written(folder) -> set:
    """The names of the files in a folder, without the time in the name of TensorBoard's."""
    return {path.name.split(".tfevents")[0] for path in folder.iterdir()}


def test_results_are_written_and_no_other_file_is_left(everything):
    results, folder = everything
    assert written(folder) == {"probe.json", "probe.png", "features.npz", "metrics.jsonl", "events.out"}
    assert json.loads((folder / "probe.json").read_text()) == json.loads(json.dumps(results))
    assert results["class_names"] == ("dark", "medium", "light")
    printed = eval_probe.table(results)
    for text in (
        "raw pixels",
        "<- best on validation",
        "side by side",
        "step       2",
        "loss 2.5000",
        "9 labels a class",
    ):
        assert text in printed


def test_the_checkpoints_are_probed_one_by_one(everything, trained, tmp_path):
    results, _ = everything
    assert [entry["step"] for entry in results["checkpoints"]] == [2, 4]
    assert [entry.get("validation_loss") for entry in results["checkpoints"]] == [2.5, None]
    assert results["step"] == 4 and results["checkpoints"][1]["layers"] == results["pretrained"]["layers"]
    assert results["checkpoints"][0]["layers"] != results["checkpoints"][1]["layers"]

    both = eval_probe.run(probe_config(steps="4, 2"), trained, tmp_path / "both")
    assert both["checkpoints"] == results["checkpoints"]
    one = eval_probe.run(probe_config(steps="2"), trained, tmp_path / "one")
    assert one["step"] == 2 and one["pretrained"]["layers"] == results["checkpoints"][0]["layers"]
    assert "checkpoints" not in one
    newest = eval_probe.run(probe_config(layers=(2, 0, 2)), trained, tmp_path / "newest")
    assert newest["step"] == 4
    assert newest["pretrained"]["layers"] == [results["pretrained"]["layers"][layer] for layer in (0, 2)]
    assert newest["random_init"]["layers"] == [results["random_init"]["layers"][layer] for layer in (0, 2)]


def test_old_features_that_cannot_be_removed_do_no_harm(everything, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # as NFS keeps mapped files
    both = eval_probe.run(probe_config(steps="2,4", layers=(1,), baselines=False), trained, tmp_path / "probe")
    assert [entry["layers"] for entry in both["checkpoints"]] == [
        [e["layers"][1]] for e in everything[0]["checkpoints"]
    ]


def test_the_baselines_can_be_left_out(everything, trained, tmp_path):
    results = eval_probe.run(
        probe_config(baselines=False, labels_per_class=(2,), subsets=1), trained, tmp_path / "probe"
    )
    assert results["pretrained"] == everything[0]["pretrained"]
    assert not {"raw_pixels", "random_init"} & {*results, *results["few_labels"]}
    assert "raw" not in eval_probe.table(results) and "random" not in eval_probe.table(results)
    assert (tmp_path / "probe" / "probe.png").exists()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_the_mesh_changes_nothing(monkeypatch, everything, trained, tmp_path, sizes):
    devices, make = jax.devices()[: math.prod(sizes)], MeshConfig.make
    monkeypatch.setattr(MeshConfig, "make", lambda mesh: make(mesh, devices))
    config = probe_config(steps="4", layers=(1, 3), features_out=str(tmp_path / "features.npz"))
    config.mesh.update(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    results = eval_probe.run(config, trained, tmp_path / "probe")
    expected = arrays_of(everything[1] / "features.npz")
    for name, array in arrays_of(tmp_path / "features.npz").items():
        np.testing.assert_allclose(array, expected[name], atol=1e-5)
    assert results["raw_pixels"] == everything[0]["raw_pixels"]
    for name in ("pretrained", "random_init"):
        assert results[name]["layers"] == [everything[0][name]["layers"][layer] for layer in (1, 3)]


def test_lbfgs_probes_too(everything, trained, tmp_path):
    results = eval_probe.run(probe_config(solver="lbfgs", layers=(1,)), trained, tmp_path / "probe")
    (entry,) = results["pretrained"]["layers"]
    assert entry["C"] in (0.01, 0.1) and entry["converged"]
    assert abs(entry["test_accuracy"] - everything[0]["pretrained"]["layers"][1]["test_accuracy"]) <= 3.5 / 30
    assert results["solver"]["kind"] == "lbfgs" and results["solver"]["inverse_penalties"] == [0.01, 0.1]


def test_the_same_training_images_are_drawn_for_every_seed(trained, tmp_path):
    features = []
    for seed in (1, 2):
        out = tmp_path / f"{seed}.npz"
        config = probe_config(train_images=31, layers=(2,), seed=seed, features_out=str(out))
        assert eval_probe.run(config, trained, tmp_path / f"probe{seed}")["images"]["train"] == 31
        features.append(arrays_of(out)["train_layer_02"])
    np.testing.assert_array_equal(*features)


@pytest.mark.parametrize("eval_masks", [2, 0])
def test_bert_is_probed_under_masks_and_trains_on_one(source, tmp_path, eval_masks):
    run = write_run(tmp_path / "run", source, steps=(1,), causal=False, depth=1)
    config = probe_config(eval_masks=eval_masks, layers=(1,), features_out=str(tmp_path / "features.npz"))
    eval_probe.run(config, run, tmp_path / "probe")
    arrays, pretrained = arrays_of(tmp_path / "features.npz"), igpt.load(run)
    split = open_source(pretrained.config.data).test
    tokens = GREY_PALETTE.encode(split.images[:]).reshape(len(split), -1)
    drops = Drops(rate=0.15, masks=max(eval_masks, 1), seed=config.seed)
    keep = (
        jnp.moveaxis(drops.of_images(np.arange(len(split)), PROBE_HEIGHT * PROBE_WIDTH), 1, 0) if eval_masks else [None]
    )
    under_masks = [pretrained.model.features(jnp.asarray(tokens), (1,), mask)[0] for mask in keep]
    expected = np.stack(under_masks, axis=1) if eval_masks else under_masks[0]
    np.testing.assert_allclose(arrays["test_layer_01"], expected, atol=1e-5)
    assert arrays["train_layer_01"].ndim == 2 and arrays["validation_layer_01"].ndim == expected.ndim


def photos(folder):
    """Writes 90 pictures of three classes, of which 10 of the first class are broken."""
    for i, (image, label) in enumerate(zip(*grey_pictures(90), strict=True)):
        path = folder / "photos" / f"class{label}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        if i % 9 == 0:
            path.write_bytes(b"no image")
    return folder / "photos"


def test_unreadable_images_are_left_out_of_everything(tmp_path, capsys):
    run = write_run(tmp_path / "run", f"folder:{photos(tmp_path)}", steps=(1,), on_unreadable="skip", depth=1)
    config = probe_config(layers=(1,), labels_per_class=(3,), subsets=2, features_out=str(tmp_path / "features.npz"))
    results = eval_probe.run(config, run, tmp_path / "probe")
    arrays = arrays_of(tmp_path / "features.npz")
    said = capsys.readouterr().out
    assert sum(results["images"].values()) == 80 and "passed over 10 unreadable" in said
    assert "raw pixels (20 numbers an image)" in said
    for name, count in results["images"].items():
        assert len(arrays[f"{name}_layer_01"]) == len(arrays[f"{name}_labels"]) == count
    chosen = few_labels(arrays["train_labels"], 3, seed=1)
    accuracy = fit_again(arrays, [1], chosen)["test_accuracy"]
    assert results["few_labels"]["features"][0]["accuracies"][1] == accuracy


def test_labels_that_unreadable_images_take_away_are_missed_before_anything_is_fitted(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", f"folder:{photos(tmp_path)}", steps=(1,), on_unreadable="skip", depth=1)
    count = int(np.bincount(open_source(igpt.load(run).config.data).train.labels).min())  # of files
    monkeypatch.setattr(fit, "fit_probe", lambda *_: pytest.fail("fitted"))
    with pytest.raises(UserError, match=f"{count} labels of each class were asked for, but class 0 has only"):
        eval_probe.run(probe_config(labels_per_class=(count,)), run, tmp_path / "probe")


def test_a_late_failure_keeps_the_results_of_the_layers(monkeypatch, trained, tmp_path):
    def fail(*_):
        raise RuntimeError("late")

    monkeypatch.setattr(fit.Probe, "fit_few", fail)
    with pytest.raises(RuntimeError, match="late"):
        eval_probe.run(probe_config(labels_per_class=(2,), layers=(1,)), trained, tmp_path / "probe")
    kept = json.loads((tmp_path / "probe" / "probe.json").read_text())
    assert kept["pretrained"]["best_layer"] == 1 and "few_labels" not in kept


def test_the_images_are_the_runs_own_unless_the_probe_names_others(trained, tmp_path, monkeypatch):
    def opened(settings):
        seen.append(json.loads(json.dumps(dataclasses.asdict(settings))))
        raise UserError("seen")

    seen, others = [], dict(source="folder:x", preprocess="shrink", validation_fraction=0.0, data_dir="y")
    monkeypatch.setattr(selection, "open_source", opened)
    for given in ({}, others):
        with pytest.raises(UserError, match="seen"):
            eval_probe.run(probe_config(**given), trained, tmp_path / "probe")
    assert seen[0] == json.loads((trained / "config.json").read_text())["data"]
    assert seen[1] == seen[0] | others


@pytest.mark.parametrize("name", ["keep_features", "fit_probe", "load"])
def test_a_failure_during_the_probe_leaves_no_files(monkeypatch, trained, tmp_path, name):
    def fail(*args, **kwargs):
        raise RuntimeError("halfway")

    monkeypatch.setattr(eval_probe if name == "load" else fit, name, fail)
    with pytest.raises(RuntimeError, match="halfway"):
        eval_probe.run(probe_config(layers=(1,)), trained, tmp_path / "probe")
    assert not list(tmp_path.iterdir())


def test_the_results_are_written_before_features_fill_the_disk(monkeypatch, trained, tmp_path):
    def full(file, **arrays):
        file.write(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    config = probe_config(layers=(1,), features_out=str(tmp_path / "features.npz"))
    with pytest.raises(UserError, match="features_out=.* cannot be written: No space left"):
        eval_probe.run(config, trained, tmp_path / "probe")
    assert written(tmp_path / "probe") == {"probe.json", "probe.png", "metrics.jsonl", "events.out"}
    assert [path.name for path in tmp_path.iterdir()] == ["probe"]


def test_on_the_command_line_a_mistake_is_one_message(trained, tmp_path):
    command = [sys.executable, "eval_probe.py", "--config=configs/probe_digits.py", f"--model={trained}"]
    command += [f"--workdir={tmp_path}/probe", "--config.layers=(9,)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: layers is (9,)") and not list(tmp_path.iterdir())
