"""The figures of the documents are the recorded ones, or computed from them. tests/test_docs.py has the rest."""

import json
import re
import runpy
from unittest import mock

import numpy as np
import pytest
from scipy.stats import spearmanr

from tests.helpers import ROOT

DOCUMENTS = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def percent(mean: float, interval: list[float]) -> str:
    low, high = interval
    return f"{100 * mean:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def mean_of(entry: dict) -> dict:
    return {name: entry[name] for name in ("mean", "interval")}


def study_of(data: str) -> dict:
    recorded = json.loads((ROOT / "docs" / "results" / f"study_{data}.json").read_text())
    assert recorded["seeds"] == [0, 1, 2]
    return recorded["findings"]


def section_of(heading: str) -> str:
    """A section of reproduce.md up to the next heading, in one line."""
    return " ".join(re.search(rf"{heading}\n(.*?)\n##", DOCUMENTS["reproduce.md"], re.DOTALL)[1].split())


def assert_layers_are_told(by_layer: dict, section: str) -> None:
    assert by_layer["disjoint"]
    for label, key in (("next pixels", "pretrained"), ("an untrained network", "random_init")):
        assert f"| {label} | " + " | ".join(f"{100 * e['mean']:.1f} %" for e in by_layer[key]) + " |" in section
    best = (percent(**mean_of(by_layer[f"best_{kind}"]["linear"])) for kind in ("pretrained", "untrained"))
    assert "the layer that validation chose has {}, an untrained network's {}, and raw".format(*best) in section
    assert f"raw pixels {percent(by_layer['raw_pixels']['mean'], by_layer['raw_pixels_interval'])}" in section


def votes(by_layer: dict) -> str:
    pixels, features = by_layer["neighbours_of_raw_pixels"], by_layer["best_pretrained"]["neighbours"]
    return f"raw pixels have {100 * pixels['mean']:.1f} %, and the features {100 * features['mean']:.1f} %"


@pytest.mark.parametrize(
    ("data", "heading"),
    [("scattered_digits", "## Where things move"), ("scattered_fashion", "### Clothes")],
)
def test_the_figures_of_scattered_images_are_the_recorded_ones(data, heading):
    found, section = study_of(data), section_of(heading)
    assert_layers_are_told(found["1 accuracy by layer"], section)
    assert votes(found["1 accuracy by layer"]) in section
    for row in found["5 few labels"]["rows"]:
        features, pixels = percent(**mean_of(row["features"])), f"{100 * row['raw_pixels']['mean']:.1f} %"
        assert f"| {row['labels_per_class']} | {features} | {pixels} |" in section


def test_the_figures_in_colour_are_the_recorded_ones():
    found, section = study_of("scattered_digits"), section_of("### In colour")
    black, photographs = found["7 in colour, on black"], found["7 in colour, on photographs"]
    assert_layers_are_told(black, section)
    assert votes(black) in section and votes(photographs) in section
    assert black["middle_beats_last"]["holds"] == "yes"
    best = percent(**mean_of(photographs["best_pretrained"]["linear"]))
    assert not photographs["disjoint"] and f"the best layer has {best}, and raw pixels" in section
    many = found["7 in colour, on many photographs"]
    losses, (interval,) = many["last_losses"], many["test_intervals_of_the_best"]
    assert f"loss ends at {losses['train/loss']:.2f}, its validation loss at {losses['eval/loss']:.2f}" in section
    best = percent(many["best_pretrained"]["linear"]["mean"], interval)
    assert f"the best layer has {best}, and raw pixels {100 * many['raw_pixels']['mean']:.1f} % (one seed)" in section
    longer = found["7 in colour, on photographs, longer"]
    assert f"did not help: {percent(longer['best']['mean'], longer['test_interval'])} in one run" in section
    ours, theirs = longer["last_losses"]["color"], longer["last_losses"]["color_longer"]
    for what, verb in (("train", "fell"), ("eval", "rose")):
        assert f"{verb} from {ours[f'{what}/loss']:.2f} to {theirs[f'{what}/loss']:.2f}" in section


@pytest.mark.parametrize(
    ("data", "heading"),
    [("scattered_digits", "### The other findings"), ("scattered_fashion", "### Clothes")],
)
def test_what_the_paper_found_is_told_of_scattered_images_as_recorded(data, heading):
    found, section = study_of(data), section_of(heading)
    words = {"yes": "holds", "no": "does not hold", "undecided": "undecided"}

    def told(compared: dict, ours: dict, theirs: dict) -> str:
        low, high = (100 * bound for bound in compared["difference"]["interval"])
        difference = f"{100 * compared['difference']['mean']:+.1f} [{low:.1f}, {high:.1f}]"
        means = f"{100 * ours['mean']:.1f} % against {100 * theirs['mean']:.1f} %"
        return f"**{words[compared['holds']]}** | {means} | {difference}"

    tuning = found["4 fine-tuning"]
    accuracy, probe = tuning["test_accuracy"], found["1 accuracy by layer"]["best_pretrained"]["linear"]
    joint = accuracy["joint"]
    rows = {
        "fine-tuning, the joint loss beats classes only": told(
            tuning["joint_beats_classes_only"], joint, accuracy["classes"]
        ),
        "fine-tuning beats training from scratch, equal steps": told(
            tuning["pretrained_beats_scratch"], joint, accuracy["scratch"]
        ),
        "fine-tuning beats the best probe": told(tuning["fine-tuning_beats_the_probe"], joint, probe),
    }
    if long := found.get("4 fine-tuning against scratch at equal compute"):
        rows["fine-tuning beats training from scratch, equal compute"] = told(
            long["pretrained_beats_long_scratch"], joint, accuracy["long_scratch"]
        )
    if pooled := found.get("1 pooling by attention"):
        rows["pooling by attention beats the mean"] = told(pooled["beats_the_mean"], pooled["best"], probe)
    for label, name in (
        ("equal compute", "3 next pixels against BERT"),
        ("equal predictions", "3 as many predicted positions"),
    ):
        if bert := found.get(name):
            rows[f"next pixels beat BERT in the probe, {label}"] = told(
                bert["next_pixels_beat_bert_in_the_probe"], bert["probe"]["next pixels"], bert["probe"]["BERT"]
            )
    if checkpoints := found.get("2 accuracy against validation loss"):
        low, high = checkpoints["rank_correlation"]["interval"]
        correlation = f"{checkpoints['rank_correlation']['mean']:.2f} [{low:.2f}, {high:.2f}]"
        rows["the lower a checkpoint's validation loss, the better its features"] = (
            f"**{words[checkpoints['holds']]}** | rank correlation {correlation} | "
        )
    table = dict(re.findall(r"\| ([^|]+) \| (\*\*[^|]+\*\* \| [^|]+ \| [^|]*?) ?\|", section))
    assert {label: row.strip() for label, row in table.items()} == {label: row.strip() for label, row in rows.items()}


def test_the_rank_correlation_of_the_digits_is_that_of_the_recorded_checkpoints():
    recorded = json.loads((ROOT / "docs" / "results" / "study_digits.json").read_text())["findings"]
    found = recorded["2 accuracy against validation loss"]
    values = [spearmanr([point[1:] for point in run])[0] for run in found["step, validation loss, test accuracy"]]
    assert found["rank_correlation"]["values"] == pytest.approx(values)
    figures = f"{np.mean(values):.2f} over 10 checkpoints, {max(values):.2f} to {min(values):.2f} by seed"
    assert f"rank correlation {figures}" in DOCUMENTS["reproduce.md"]


def test_the_figures_of_the_vqvae_page_are_the_recorded_ones():
    text = " ".join(DOCUMENTS["vqvae.md"].split())
    for name, colors in (("fashion_mnist", "32"), ("photos", "512")):
        recorded = json.loads((ROOT / "docs" / "results" / f"vqvae_{name}.json").read_text())
        for one in (recorded["of_vqvae"], recorded["of_palettes"][colors]):
            row = f"| {one['tokens_per_image']:,.0f} | {one['bits_per_image']:,.0f} | {one['psnr']:.1f} dB "
            assert row + f"| {one['perplexity']:.0f} | {one['tokens_in_use']} of {one['vocab_size']} |" in text
        assert f"reaches {recorded['model']['eval/loss']:.3f} nats a code" in text
    probe, tuned = recorded["probe"], recorded["fine-tuned"]
    best, tuned = (percent(x["test_accuracy"], x["interval"]) for x in (probe["best"], tuned))
    assert f"says for {best.replace(' [', ' of the test tiles [')}, from layer 0" in text
    assert f"from layer 0 of an untrained network ({100 * probe['random_init'][0]:.1f} %)" in text
    last = [f"{100 * probe[name][-1]:.1f} %" for name in ("pretrained", "random_init")]
    assert f"far ahead, {last[0]} against {last[1]}. Raw pixels: {100 * probe['raw_pixels']:.1f} %." in text
    assert f"the network names {tuned}" in text
    study = json.loads((ROOT / "docs" / "results" / "study_fashion_codes.json").read_text())
    found = study["findings"]["6 codes against pixels"]
    assert study["seeds"] == [0, 1, 2]
    assert f"Raw pixels of 14 x 14 have {100 * found['raw_pixels']['mean']:.1f} %" in text
    for kind in ("probe", "neighbours", "untrained", "fine-tuned"):
        row = " | ".join(percent(**mean_of(found[kind][name])) for name in ("codes", "pixels"))
        assert f"| {row} |" in text
    for kind in ("in_the_probe", "fine-tuned"):
        difference = found[f"codes_beat_pixels_{kind}"]["difference"]
        low, high = (100 * bound for bound in difference["interval"])
        assert f"| {100 * difference['mean']:+.1f} points [{low:.1f}, {high:.1f}] |" in text


def test_the_plan_of_the_papers_codes_is_the_recorded_one():
    plan, text = json.loads((ROOT / "docs" / "results" / "plan_l48vq.json").read_text()), DOCUMENTS["vqvae.md"]
    estimate, peak = plan["second_estimate"], plan["bytes_per_chip"]["peak"] / 2**30
    step = f"{estimate['step_seconds']:.2f} s ({estimate['mfu_causal']:.0%} MFU) and {peak:.1f} GiB of a chip's 95"
    assert plan["fits"] and step in " ".join(text.split()) and f"steps would take {estimate['days']:.0f} days" in text


def test_the_figures_of_the_readme_are_the_recorded_ones():
    recorded = json.loads((ROOT / "docs" / "results" / "digits.json").read_text())
    probe = recorded["probe"]

    def accuracy(entry):
        return percent(entry["test_accuracy"], entry["interval"])

    def best(kind):
        return accuracy(probe[kind]["layers"][probe[kind]["best_layer"]])

    moved = study_of("scattered_digits")["1 accuracy by layer"]
    assert moved["disjoint"]  # what the README says about features
    ours, untrained = (percent(**mean_of(moved[f"best_{kind}"]["linear"])) for kind in ("pretrained", "untrained"))
    raw = percent(moved["raw_pixels"]["mean"], moved["raw_pixels_interval"])
    expected = {
        "uniform over the 17 colours, and the first loss of the model": f"{recorded['first_loss']:.3f}",
        "each pixel's own histogram, the best result without context": f"{recorded['marginal_entropy']:.3f}",
        "the model, on held-out images": f"{recorded['evaluations'][-1]['eval/loss']:.3f}",
        f"linear probe, {probe['images']['test']} test images": "at random places, 3 seeds | in the same place",
        "the best layer, chosen on validation images": f"{ours} | {best('pretrained')}",
        "the best layer of an untrained network": f"{untrained} | {best('random_init')}",
        "raw pixels": f"{raw} | {accuracy(probe['raw_pixels'])}",
    }
    rows = re.findall(r"^\| (.*?) \| (.*?) \|$", DOCUMENTS["README.md"].replace("**", ""), re.MULTILINE)
    assert {label: figure for label, figure in rows if label != "loss"} == expected
    clothes = study_of("scattered_fashion")["1 accuracy by layer"]
    best, raw = (100 * entry["mean"] for entry in (clothes["best_pretrained"]["linear"], clothes["raw_pixels"]))
    assert f"{best:.1f} to {raw:.1f} %" in " ".join(DOCUMENTS["README.md"].split())
    training = next(seconds for line, seconds in recorded["seconds_with_start"].items() if "train.py" in line)
    assert "a minute and a half on 2 CPU cores" in DOCUMENTS["README.md"] and training < 90


def test_the_speed_page_is_made_from_the_recorded_figures():
    made = runpy.run_path(str(ROOT / "benchmarks" / "speed_page.py"))["page"]()
    assert DOCUMENTS["speed.md"] == made, "run python benchmarks/speed_page.py"


def test_the_readme_quotes_the_share_of_a_gpus_peak():
    rows = json.loads((ROOT / "benchmarks" / "results" / "training_gpu.json").read_text())["rows"]
    small, middle, large = (f"{100 * row['mfu_causal']['ours']:.0f}" for row in rows)
    quoted = " ".join(DOCUMENTS["README.md"].split())
    assert f"S, M and L train at {small}, {middle} and {large} % of an [H200's peak](docs/speed.md)" in quoted


def test_the_speed_page_shows_a_gpu_once_it_has_been_measured(tmp_path):
    names = runpy.run_path(str(ROOT / "benchmarks" / "speed_page.py"))
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    seconds = {"ours": 0.123, "torch.compile, SDPA": 0.2}
    row = {
        "case": "iGPT-S",
        "batch_size": 32,
        "seconds": seconds,
        "times_as_fast_as": {"torch.compile, SDPA": 1.63},
        "peak_bytes": {"ours": 10 * 2**30, "torch.compile, SDPA": 15.25 * 2**30},
        "mfu_causal": {"ours": 0.414, "torch.compile, SDPA": None},
    }
    training = {"device": "NVIDIA H200", "rows": [row | {"goal_mfu_causal": 0.35}]}
    speeds = {"images_per_s": {"ours": 123.4, "transformers": 5.67}, "share_of_bound": 0.61, "goal_images_per_s": 90}
    alone = speeds | {"images_per_s": {"ours": 45.6}}
    rows = [{"size": "s", "batch_size": 128} | speeds, {"size": "m", "batch_size": 64} | alone]
    sampling = {"device": "NVIDIA H200", "rows": rows, "not_measured": {"l": "not reached"}}
    (tmp_path / "training_gpu.json").write_text(json.dumps(training))
    (tmp_path / "sampling_gpu.json").write_text(json.dumps(sampling))
    data = {"device": "NVIDIA H200", "training_step": {"slower_by": 0.123}}
    (tmp_path / "data_gpu.json").write_text(json.dumps(data))
    with mock.patch.dict(names["page"].__globals__, RESULTS=tmp_path):
        made = names["page"]()
    assert (
        "| iGPT-S | 32 | 0.123 | 0.200 | 1.63 | 41 % | - | 35 % | 10.0 | 15.2 |" in made
        and "measured on a TPU yet" in made
    )
    assert "| S | 128 | 123 | 5.7 | 61 % | 90 |\n| M | 64 | 46 | - | 61 % | 90 |" in made and "on NVIDIA H200" in made
    assert "The same run was to measure other sizes (L: not reached)." in made
    assert "NVIDIA H200 takes 12.3 % more time with the loader" in " ".join(made.split())
