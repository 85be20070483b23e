"""The recipes of docs/launch/ start train.py with flags that it has, and are what their programs accept."""

import os
import re
import shutil
import subprocess

import pytest
import yaml

import train
from igpt.plan.compiled import COMPILER_FLAGS
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


def test_no_recipe_keeps_a_run_in_a_mounted_bucket():
    for path in RECIPES:  # a save renames folders that are not empty, which gcsfuse refuses
        assert "/mnt" not in path.read_text(), path.name


def test_every_recipe_for_tpus_sets_the_flag_that_plans_are_made_with():
    for name in ("tpu_queued.sh", "jobset.yaml", "sky.yaml"):
        text = (FOLDER / name).read_text()
        assert "LIBTPU_INIT_ARGS" in text and COMPILER_FLAGS in text, name


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_sound(path):
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)


@pytest.fixture
def queued(tmp_path):
    """queued(gcloud) -> tpu_queued.sh, done, where gcloud is the given script and no command waits.

    The script of gcloud may count its calls of a kind: `nth KIND` prints the number of this one.
    """

    def run(gcloud: str) -> subprocess.CompletedProcess:
        nth = f'nth() {{ echo >> "{tmp_path}/$1"; wc -l < "{tmp_path}/$1"; }}\n'
        for name, text in {"gcloud": nth + gcloud, "sleep": ""}.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
            (tmp_path / name).chmod(0o755)
        given = {"PROJECT": "p", "ZONE": "z", "REPOSITORY": "https://r", "BUCKET": "b"}
        given["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
        options = dict(env=os.environ | given, capture_output=True, text=True, timeout=20)
        return subprocess.run(["bash", FOLDER / "tpu_queued.sh"], **options)

    return run


def test_a_warning_of_gcloud_beside_an_active_slice_does_not_stop_the_training(queued):
    done = queued("""case $* in
      *describe*) echo "WARNING: there is a newer version" >&2; echo ACTIVE ;;
      *train.py*) echo "trained $*" ;;
    esac""")
    assert done.returncode == 0, done.stderr
    assert "trained" in done.stdout and "--workdir=gs://b/igpt" in done.stdout


def test_a_slice_is_asked_for_again_when_google_is_busy(queued):
    done = queued("""case $* in
      *describe*) [ "$(cat "$0-state")" ] || { echo NOT_FOUND >&2; exit 1; }; echo ACTIVE ;;
      *create*) [ "$(nth create)" -gt 2 ] || { echo "UNAVAILABLE: 503" >&2; exit 1; }; echo made > "$0-state" ;;
      *train.py*) echo trained ;;
    esac""")
    assert done.returncode == 0 and "trained" in done.stdout, done.stderr


def test_a_slice_that_is_refused_again_and_again_ends_the_loop_with_the_reason(queued):
    done = queued("""case $* in
      *describe*) echo NOT_FOUND >&2; exit 1 ;;
      *create*) nth create >&2; echo "PERMISSION_DENIED" >&2; exit 1 ;;
    esac""")
    assert done.returncode == 1 and "PERMISSION_DENIED" in done.stderr
    assert "gives up after 4 errors in a row" in done.stderr and "\n4\n" in done.stderr


@pytest.mark.parametrize("failing", ["git clone", "pip install", "python3 -m uv venv", "python3 -m uv pip"])
def test_a_host_that_cannot_be_set_up_does_not_train(queued, tmp_path, failing):
    for name in ("git", "pip", "python3"):
        made = '[ "$1" = clone ] && mkdir igpt' if name == "git" else ":"
        (tmp_path / name).write_text(f'#!/bin/bash\n{made}\n[[ "{name} $*" != "{failing}"* ]]')
        (tmp_path / name).chmod(0o755)
    done = queued(f"""case $* in
      *describe*) echo ACTIVE ;;
      *train.py*) echo trained ;;
      *) cd {tmp_path} && rm -rf igpt
        for word; do [[ $word != --command=* ]] || exec bash -c "${{word#--command=}}"; done ;;
    esac""")
    assert done.returncode == 1 and "trained" not in done.stdout, done.stderr


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
