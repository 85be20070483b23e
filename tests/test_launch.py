"""The recipes of docs/launch/ start train.py with flags that it has, and are what their programs accept."""

import re
import shutil
import subprocess

import pytest
import yaml

import train
from igpt.run.flags import parse_with_config
from tests.helpers import ROOT

FOLDER = ROOT / "docs" / "launch"
RECIPES = sorted(FOLDER.iterdir())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_flag_of_a_recipe_is_one_of_train_py(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = path.read_text().replace('"', "")
    flags = re.findall(r"--(?:config[.\w]*|workdir|coordinator|processes|process)=[^\s}\"']+", text)
    config = [flag for flag in flags if flag.startswith("--config=")]
    assert config and any(flag.startswith("--workdir=") for flag in flags)
    rest = [re.sub(r"=\$.*", "=1", flag) if flag.startswith("--process") else flag for flag in set(flags) - set(config)]
    parse_with_config(train.parser(), [config[-1], *rest])


def test_the_recipes_go_on_after_code_75():
    for path in RECIPES:
        assert "75" in path.read_text(), path.name


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_sound(path):
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)


def test_the_job_set_asks_each_host_for_its_chips():
    spec = yaml.safe_load((FOLDER / "jobset.yaml").read_text())["spec"]
    (slice_,) = spec["replicatedJobs"]
    pod = slice_["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    chips = int(container["resources"]["limits"]["google.com/tpu"]) * slice_["template"]["spec"]["completions"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert chips == int(rows) * int(columns) == int(re.search(r"mesh\.fsdp=(\d+)", str(container["args"]))[1])
    rules = slice_["template"]["spec"]["podFailurePolicy"]["rules"]
    assert [75] in [rule.get("onExitCodes", {}).get("values") for rule in rules]


def test_sky_recovers_from_code_75():
    task = yaml.safe_load((FOLDER / "sky.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
