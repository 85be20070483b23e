"""`--config=FILE --config.a.b=value`: fields are overridden by name and type, and a mistake names what is right."""

import pytest

from igpt.command import Parser
from igpt.config import Config
from igpt.errors import UserError
from igpt.run.directory import save_config
from igpt.run.flags import parse_with_config
from tests.helpers import ROOT

DIGITS = f"--config={ROOT}/configs/digits.py"


def parse(*arguments, resumes=False):
    parser = Parser("train.py", "Trains.")
    parser.add_argument("--workdir", required=False, help="where the run is written")
    return parse_with_config(parser, list(arguments), resumes)


def test_fields_are_overridden_and_the_others_stay():
    config, changed = parse(DIGITS).config, parse(DIGITS, "--config.train.steps=7", "--workdir=run")
    assert changed.workdir == "run" and changed.config.train.steps == 7 != config.train.steps
    assert changed.config.model.width == config.model.width


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model.use_bias=True", True),
        ("optim.learning_rate=1e-4", 1e-4),
        ("optim.learning_rate=1", 1.0),
        ("data.image_size=(28,7)", (28, 7)),
        ("data.source=folder:my photos", "folder:my photos"),
        ("train.steps=50", 50),
    ],
)
def test_a_value_is_read_as_the_type_of_its_field(override, value):
    section, name = override.partition("=")[0].split(".")
    found = getattr(getattr(parse(DIGITS, f"--config.{override}").config, section), name)
    assert found == value and type(found) is type(value)


def test_a_negative_value_may_stand_apart_from_its_field():
    assert parse(DIGITS, "--config.mesh.data", "-1", "--config.seed", "3").config.seed == 3


def test_a_run_is_resumed_by_its_directory_alone(tmp_path):
    original = parse(DIGITS, "--config.data.image_size=(8,8)").config
    save_config(Config.of(original), tmp_path)

    def resume(*arguments):
        return parse(f"--workdir={tmp_path}", *arguments, resumes=True).config

    assert Config.of(resume()) == Config.of(original)
    changed = resume("--config.train.steps=7", "--config.optim.learning_rate=1e-4", "--config.data.short_side=(7,9)")
    assert (changed.train.steps, changed.optim.learning_rate, changed.data.short_side) == (7, 1e-4, (7, 9))
    assert changed.model.width == original.model.width
    with pytest.raises(UserError, match=r"there is no field 'widht'; did you mean 'width'\?"):
        resume("--config.model.widht=3")
    with pytest.raises(UserError, match=f"--config is missing, and --workdir={tmp_path}/absent holds no run to resume"):
        resume(f"--workdir={tmp_path}/absent")
    with pytest.raises(UserError, match="--config is missing"):
        parse(f"--workdir={tmp_path}")  # a probe's --workdir has no configuration of its own


def test_what_stands_behind_the_files_name_goes_to_get_config():
    large = parse(f"--config={ROOT}/configs/imagenet.py:l").config
    assert large.model.width == 1536 and large.model.depth == 48


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([DIGITS, "--config.model.widht=3"], r"there is no field 'widht'; did you mean 'width'\?"),
        ([DIGITS, "--config.optim.zzz=1"], r"there is no field 'zzz' \(every field and its default: configs/base.py"),
        ([DIGITS, "--config.model.width=wide"], "model.width=wide"),
        ([DIGITS, "--config.train.steps=2.5"], "train.steps=2.5"),
        ([DIGITS, "stray"], "'stray' is not a flag; options are written --name=value"),
        ([DIGITS, "--wrkdir=run"], r"'--wrkdir=run' is not a flag; did you mean --workdir\?"),
        ([DIGITS, "--confg=1"], r"'--confg=1' is not a flag; did you mean --config\?"),
        (["--config=configs/absent.py"], "No such file or directory: 'configs/absent.py'"),
        ([], "--config is missing. train.py --help has examples"),
    ],
)
def test_a_mistake_is_named_with_what_is_right(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "def get_config(:",
            r"mine\.py: SyntaxError: invalid syntax \(mine\.py, line 1\) \(every field and",
        ),
        ("import absent_package", r"mine\.py, line 1: ModuleNotFoundError: No module named 'absent_package' \(every"),
        ("def get_config():\n    return confg", r"mine\.py, line 2: NameError: name 'confg' is not defined"),
        ("def get_config():\n    raise ValueError('no')", r"mine\.py, line 2: ValueError: no \(every"),
        ("seed = 1", r"mine\.py: AttributeError: .* has no attribute 'get_config'"),
        ("def get_config():\n    return {}", r"mine\.py: get_config\(\) returned dict; it must return a ConfigDict"),
        ("def get_config():\n    open('absent.txt')", r"could not be loaded: No such file or directory: 'absent\.txt'"),
    ],
)
def test_an_error_in_a_config_file_is_named_with_its_line(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message):
        parse(f"--config={tmp_path}/mine.py")


def test_a_folder_is_no_config_file(tmp_path):
    with pytest.raises(UserError, match="could not be loaded: Is a directory"):
        parse(f"--config={tmp_path}")
