"""What may differ between a run and the command that resumes it: fields of its configuration, and its images.

WORKDIR/images.json has the fingerprint of the images that the run learns from, and for a folder WORKDIR/splits.csv the
split of every file, as data.split_file takes it.
"""

from collections.abc import Collection

from igpt.config import Config
from igpt.data.examples import Source
from igpt.data.fingerprint import differences, file_splits, is_fingerprint, split_lines
from igpt.errors import UserError
from igpt.files import AnyPath, read_json, whole, write_json
from igpt.optim import make_optimizer

IMAGES_FILE, SPLITS_FILE = "images.json", "splits.csv"
DATA = "data"  # the word for other images

# Fields that may change when a run is resumed: they affect how it is carried out, not what a training step computes.
FREE = (
    "track",
    *("data.data_dir", "data.on_unreadable", "data.threads"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.dcn_data", "mesh.cpu_devices"),
    *("model.attention", "model.remat", "model.scan_layers"),
    *("train.log_every", "train.eval_every", "train.eval_batch_size", "train.sample_every", "train.num_samples"),
    *("train.checkpoint_every", "train.max_to_keep", "train.patience", "train.on_bad_step", "train.profile_at"),
)
# Fields that say which images are read. Once images.json exists, the images themselves are compared instead.
OF_IMAGES = (
    *("data.source", "data.split_file", "data.split_seed", "data.validation_fraction", "data.test_fraction"),
    "data.scatter_background",
)
# Fields that may change with a word of the user: the network and the optimizer's state keep their arrays.
WITH_A_WORD = (
    *("optim.learning_rate", "optim.warmup_steps", "optim.schedule", "optim.weight_decay"),
    *("optim.b1", "optim.b2", "optim.eps", "train.steps", "train.batch_size", "train.accumulate"),
    *("model.embedding_dropout", "model.residual_dropout", "model.attention_dropout", "objective.drop_rate"),
    *("data.pad", "data.pad_mode", "data.flip", "data.augment_probability", "init_from", "palette.path"),
)


def parse_changes(text: str) -> tuple[str, ...]:
    """Reads the value of the flag --change: names with commas between them. Raises UserError for any other name."""
    names = tuple(name.strip().removeprefix("config.") for name in text.split(",") if name.strip())
    for name in names:
        if name not in (DATA, *WITH_A_WORD):
            raise UserError(
                f"--change={name}: a run cannot change that when it resumes; with this flag it can change {DATA} (its "
                f"images), {', '.join(WITH_A_WORD)}"
            )
    return names


def changed_fields(there: Config, here: Config, workdir: AnyPath, allowed: Collection[str] = ()) -> list[str]:
    """Describes the changed fields, "name: value there, value here", that need no word of the user or are `allowed`.

    FREE fields are left out; train.steps may always grow. Raises UserError, which names every other changed field.
    """
    if there.train is None:
        remedy = f"start from its weights: --config.init_from={workdir} with another --workdir"
        raise UserError(f"{workdir} holds an imported model, which has no training to resume; {remedy}")
    before, now = there.flat(), here.flat()
    compared_by_images = OF_IMAGES if (workdir / IMAGES_FILE).exists() else ()
    changed = {
        name: f"{name}: {before.get(name, 'absent')!r} there, {now.get(name, 'absent')!r} here"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in (*FREE, *compared_by_images)
    }
    allowed = {*allowed, *(["train.steps"] if here.train.steps > there.train.steps else [])}
    refused = [name for name in changed if name not in allowed]
    if not refused:
        return list(changed.values())
    lines = "\n".join(f"  {changed[name]}" for name in refused)
    can = [name for name in refused if name in WITH_A_WORD]
    remedies = [
        *([f"add --change={','.join(can)} to go on with the new values"] if can == refused else []),
        f"leave out --config: --workdir={workdir} alone resumes the run as it is",
        "give another --workdir",
        "--start_over to rename the old run and train from step 0",
        f"--config.init_from={workdir} with another --workdir to start from its weights",
    ]
    also = f"Only {', '.join(can)} could change, with the flag --change. " if can and can != refused else ""
    raise UserError(
        f"{workdir} holds a run with another configuration:\n{lines}\n{also}Either {', or '.join(remedies)}."
    )


def learning_rate_text(there: Config, here: Config, step: int) -> str:
    """Says what changed steps or a changed schedule mean for the learning rate after `step`. Empty if nothing."""
    old, new = (float(make_optimizer(one.optim, one.train.steps)[1](step)) for one in (there, here))
    if old == new:
        return ""
    falls = f"falls along the cosine to 0 at step {here.train.steps:,}"
    course = {"cosine": falls, "constant": "stays there"}[here.optim.schedule]
    warmup = min(here.optim.warmup_steps, here.train.steps // 2)
    rises = f"rises to {here.optim.learning_rate:.3g} at step {warmup:,}, and then " if step < warmup else ""
    return f"the learning rate after step {step:,} is {new:.3g} instead of {old:.3g}, and then {rises}{course}"


def changed_images(workdir: AnyPath, source: Source, found: dict) -> list[str]:
    """Describes how the images of a source, whose fingerprint is `found`, differ from those that the run learned from.

    A run of an earlier version has no fingerprint. Its images then count as the same.
    """
    if not (workdir / IMAGES_FILE).exists():
        return []
    there = read_json(workdir / IMAGES_FILE)
    there.pop("source", None)
    if there == found:  # the usual case, in which the files need not be compared one by one
        return []
    if there.get("format") != found["format"]:
        raise UserError(f"{workdir / IMAGES_FILE} was written by another version of igpt; with it, the run resumes")
    if not is_fingerprint(there):
        raise UserError(f"{workdir / IMAGES_FILE} is damaged; restore it from a copy, or delete it to trust the images")
    return differences(there, found, read_splits(workdir / SPLITS_FILE), file_splits(source))


def images_error(workdir: AnyPath, changed: list[str]) -> UserError:
    """The error for images that changed without a word of the user. Only process 0 knows what changed."""
    lines = "\n".join(f"  {line}" for line in changed or ["process 0 compared them, and its message says how"])
    keep = ""
    if (workdir / SPLITS_FILE).exists():
        keep = (
            f"To keep each old file in its split, also copy {workdir / SPLITS_FILE}, add a line for each new file, and "
            "give it as --config.data.split_file. "
        )
    return UserError(
        f"the images are not those that {workdir} learned from:\n{lines}\nRestore them, or add --change={DATA} to go "
        f"on with the images as they are now. {keep}Or give another --workdir."
    )


def record_images(workdir: AnyPath, source: Source, found: dict) -> None:
    """Writes images.json and, for a folder, splits.csv. Writes nothing if they are there already."""
    content = {"source": source.name} | found
    if (workdir / IMAGES_FILE).exists() and read_json(workdir / IMAGES_FILE) == content:
        return
    if lines := split_lines(source):
        with whole(workdir / SPLITS_FILE) as file:
            file.write(lines.encode("utf-8", "surrogateescape"))
    write_json(workdir / IMAGES_FILE, content)


def read_splits(path: AnyPath) -> dict[str, str]:
    """The split of every file that splits.csv names. Empty without this file."""
    try:
        lines = path.read_bytes().decode("utf-8", "surrogateescape").replace("\r\n", "\n").split("\n")
    except FileNotFoundError:
        return {}
    return dict(line.rpartition(",")[::2] for line in lines if line)
