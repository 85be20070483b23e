import errno
import json

import pytest

from igpt.errors import UserError
from igpt.probe import report
from igpt.probe.report import check_features_out, table, validation_loss, write_results

FIT = {"test_accuracy": 0.5, "interval": [0.25, 0.75]}
LAYERS = [{"layer": layer} | FIT for layer in (0, 3)]
RESULTS = {"pretrained": {"best_layer": 3, "test_accuracy": 0.5, "layers": LAYERS}}
FEW = [{"labels_per_class": 9, "accuracies": [0.5, 0.7], "mean": 0.6, "std": 0.1}]


def test_the_table_has_a_line_for_everything_that_was_fitted():
    results = RESULTS | {
        "random_init": {"layers": LAYERS},
        "raw_pixels": FIT,
        "concatenated": {"layers": [0, 3]} | FIT,
        "checkpoints": [RESULTS["pretrained"] | {"step": 2, "validation_loss": 2.5}],
        "few_labels": {"layer": 3, "features": FEW, "raw_pixels": FEW},
    }
    assert table(results).splitlines() == [
        "layer       pretrained    95% interval      random initialisation",
        "00                50.0 %   [25.0, 75.0]          50.0 %",
        "03                50.0 %   [25.0, 75.0]          50.0 %  <- best on validation",
        "00..03            50.0 %   [25.0, 75.0]  side by side",
        "raw pixels        50.0 %   [25.0, 75.0]",
        "step       2: best layer 03 50.0 %, validation loss 2.5000",
        "9 labels a class, layer 03: 60.0 % +- 10.0 over 2 subsets",
        "9 labels a class, raw pixels: 60.0 % +- 10.0 over 2 subsets",
    ]
    assert len(table(RESULTS).splitlines()) == 3 and "random" not in table(RESULTS)


@pytest.mark.parametrize(("solver", "section"), [("sgd", "sgd"), ("adamw", "attention")])
def test_a_learning_rate_at_the_end_of_those_tried_is_told(solver, section):
    settings = {"learning_rates": [0.3, 3.0]} | (
        {"attention": {"learning_rates": [0.01, 0.1]}} if "w" in solver else {}
    )
    largest = 3.0 if solver == "sgd" else 0.1
    for rate, told in ((largest, True), (0.1 * largest, False)):
        layers = [fit | {"solver": solver, "learning_rate": rate} for fit in LAYERS]
        results = {"pretrained": RESULTS["pretrained"] | {"layers": layers}, "solver": settings}
        expected = (
            f"{largest:g}, the largest learning rate of those tried; larger ones may do better: config.{section}."
        )
        assert (expected in table(results)) == told


def test_a_full_disk_still_prints_the_results(monkeypatch, tmp_path):
    write_results(RESULTS, tmp_path)
    assert json.loads((tmp_path / "probe.json").read_text()) == RESULTS and (tmp_path / "probe.png").exists()

    def full(path, content, indent):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report, "write_json", full)
    with pytest.raises(UserError, match="cannot be written any more: No space left on device") as raised:
        write_results(RESULTS, tmp_path)
    assert table(RESULTS) in str(raised.value)


def test_features_out_is_a_file_in_a_writable_folder(tmp_path):
    for name in ("absent/features.npz", "."):
        with pytest.raises(UserError, match=f"features_out={name} cannot be written"):
            check_features_out(name, tmp_path)
    for name in ("", str(tmp_path / "features.npz"), str(tmp_path / "new" / "features.npz")):
        check_features_out(name, tmp_path / "new")


def test_the_validation_loss_is_the_last_one_logged_at_the_step(tmp_path):
    assert validation_loss(tmp_path, 2) == {}
    lines = ['{"step": 2, "eval/loss": 3.0}', '{"step": 2, "eval/loss": 2.5}', '{"step": 2}', "[1]", '{"step": 2, "ev']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert validation_loss(tmp_path, 2) == {"validation_loss": 2.5} and validation_loss(tmp_path, 3) == {}
