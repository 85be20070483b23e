"""Writes a model as a Hugging Face directory, which transformers' ImageGPT classes load, and pushes it to the hub.

    igpt export --model=runs/digits --out=hf_digits
    igpt export --model=runs/digits --push=user/igpt-digits --private

The run's palette becomes the clusters of the directory's image processor. README.md, the model card, has what the run
knows: data, configuration, figures and pictures. If a run was imported, its export has the weights and configurations
of the imported directory. Of a VQ-VAE's run, --out gets vqvae.safetensors, for PyTorch: docs/vqvae.md.

--push needs pip install -e ".[hub]" and a token of the hub: hf auth login, or $HF_TOKEN.
"""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
from flax import nnx

from igpt.command import Parser, add_shared
from igpt.data.settings import FILTERS, DataConfig
from igpt.errors import UserError
from igpt.files import AnyPath, check_new, read_json, write_json, write_new, write_text
from igpt.interop import card, hf_weights, hub, results
from igpt.interop.hf_config import ImageGPTConfig
from igpt.interop.hf_network import from_model_config, to_model_config
from igpt.interop.load import Pretrained, config_of, is_huggingface, load, parameter_fields, processor_of
from igpt.interop.processor import ImageGPTImageProcessor
from igpt.interop.weight_files import FLOATS, write_safetensors
from igpt.model import ModelConfig
from igpt.tokenizer import find_tokenizer

ORIGIN = "huggingface.json"  # the configurations of an imported directory; an export writes them unchanged
PICTURES_OF_ORIGIN = "huggingface"  # the folder with the pictures of an imported model card
MAX_CARD_BYTES = 1 << 20


def export(
    ref: str | Path,
    out: str | Path,
    step: int | None = None,
    name: str = "",
    license: str = card.UNKNOWN,
    data_license: str = card.UNKNOWN,
) -> Path:
    """Writes the model `ref` as the Hugging Face directory `out`, which must be new or empty.

    transformers loads it without missing or unexpected weights. If the network has no biases, zeros are written. If a
    model has a classifier and a palette head, only the classifier is exported: transformers has no class with both.
    `name`, an id on the hub, and the two licences are for README.md. A Hugging Face directory keeps its own README.md.
    """
    check_new(out)
    directory = hub.resolve(ref)
    pretrained = load(directory, step)
    model = pretrained.model.config
    if not model.causal:
        raise UserError(f"{ref} was trained with the BERT objective, but transformers' ImageGPT is always causal")
    head = "classes" if model.num_classes else "pixels" if model.pixel_head else "none"
    config, processor, dtype = _configurations(directory, pretrained, head)
    config = config.with_dtype(np.dtype(FLOATS[dtype]).name)
    params = nnx.to_pure_dict(nnx.state(pretrained.model))
    exported = dataclasses.replace(model, pixel_head=head == "pixels")
    tensors = hf_weights.named_tensors(params, exported, "" if head == "none" else hf_weights.BASE)
    network = to_model_config(config, head)
    kept = kept_files(directory)
    if "card" in kept and {license, data_license} != {card.UNKNOWN}:
        raise UserError(f"{ref} has its own {hub.CARD}, which is kept; leave the licences out, and edit that file")
    described = dataclasses.replace(network, use_bias=model.use_bias)  # the biases that we add are zeros
    facts = dict(model=described, name=name, license=license, data_license=data_license)

    def write(folder: Path) -> None:
        write_safetensors(folder, tensors, dtype)
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        if network.pixel_head:
            write_json(folder / hub.GENERATION, kept.get("generation", generation_settings(network)), indent=2)
        if "card" in kept:
            write_text(folder / hub.CARD, kept["card"])
            copy_pictures(directory if is_huggingface(directory) else directory / PICTURES_OF_ORIGIN, folder)
        else:
            write_text(folder / hub.CARD, _new_card(directory, pretrained, folder, facts))

    return write_new(out, write)


def export_codes(directory: AnyPath, out: str | Path) -> Path:
    """Writes the VQ-VAE of a run as `out`/vqvae.safetensors."""
    check_new(out)
    codes = find_tokenizer(directory)
    return write_new(out, lambda folder: codes.save(folder / codes.file))


def _new_card(directory: AnyPath, pretrained: Pretrained, folder: Path, facts: dict) -> str:
    """The model card of a run, whose pictures it writes into `folder`."""
    model = facts["model"]
    of_run = (directory, pretrained.step, model.num_classes > 0)
    known = dict(config=pretrained.config, step=pretrained.step, class_names=pretrained.class_names)
    known |= dict(figures=results.figures(*of_run, model.depth), pictures=results.pictures(*of_run, folder))
    return card.Card(**facts, **known).text()


def generation_settings(model: ModelConfig) -> dict:
    """generation_config.json, with which transformers' `generate` draws whole images, from all colours.

    Without a start of sequence nothing can be drawn from scratch: then `generate` completes a prompt of first tokens.
    """
    begin = {"bos_token_id": model.vocab_size} if model.sos else {}
    return begin | {"do_sample": True, "max_length": model.seq_len + model.sos, "temperature": 1.0, "top_k": 0}


def kept_files(directory: AnyPath) -> dict:
    """What an import and a new export keep of a Hugging Face directory: "card" and "generation", if it has them."""
    if not is_huggingface(directory):
        origin = read_json(directory / ORIGIN) if (directory / ORIGIN).is_file() else {}
        kept = {name: origin[name] for name in ("card", "generation") if name in origin}
        if not isinstance(kept.get("card", ""), str) or not isinstance(kept.get("generation", {}), dict):
            raise UserError(f"{directory / ORIGIN} is damaged; delete it to export with a new configuration")
        return kept
    path, settings, kept = directory / hub.CARD, directory / hub.GENERATION, {}
    if settings.is_file():
        kept["generation"] = read_json(settings)
    if path.is_file() and path.stat().st_size <= MAX_CARD_BYTES:
        kept["card"] = path.read_text(encoding="utf-8", errors="replace")
    return kept


def copy_pictures(source: AnyPath, folder: Path) -> None:
    """Copies the pictures of a model card into `folder`, which is made if `source` has any."""
    for name in results.PICTURES:
        if (source / name).is_file():
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes((source / name).read_bytes())


def _configurations(directory: AnyPath, pretrained: Pretrained, head: str) -> tuple:
    """The ImageGPTConfig, ImageGPTImageProcessor and dtype (a key of FLOATS) to write: as imported, or new ones."""
    if is_huggingface(directory):
        weights = hf_weights.open_directory(directory)
        return weights.config, processor_of(directory), weights.dtype
    path, network, palette = directory / ORIGIN, pretrained.model.config, pretrained.tokenizer
    if palette.colors is None:
        carries = "transformers' image processor makes tokens of colours only, and cannot hold a network"
        raise UserError(f"{directory} reads {palette.noun} of a {palette.kind}: {carries}; use this model with igpt")
    if not path.is_file():
        data, clusters = pretrained.config.data, palette.centers.tolist()
        size = dict(zip(("height", "width"), data.image_size, strict=True))
        unused = data.preprocess == "none" and data.filter == DataConfig.filter
        resample = None if unused else FILTERS[data.filter]  # None: the default of transformers
        processor = ImageGPTImageProcessor(clusters, size=size, resample=resample)
        return from_model_config(network, head, pretrained.class_names), processor, "F32"
    origin = read_json(path)
    parts = (origin.get("config"), origin.get("preprocessor"))
    if not all(isinstance(part, dict) for part in parts) or origin.get("weights") not in FLOATS:
        raise UserError(f"{path} is damaged; delete it to export with a new configuration")
    config, processor = ImageGPTConfig.from_dict(parts[0]), ImageGPTImageProcessor.from_dict(parts[1])
    same = parameter_fields(to_model_config(config, head)) == parameter_fields(network)
    if not same or not np.array_equal(processor.palette().centers, palette.centers):
        raise UserError(f"{path} belongs to another model than {directory}; delete it to export without it")
    return config, processor, origin["weights"]


def add_arguments(parser: Parser) -> None:
    add_shared(parser, "model", "step")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", help="the Hugging Face directory to make")
    place.add_argument("--push", help="the id on the hub to push to, such as user/name")
    parser.add_argument("--private", action="store_true", help="a new repository on the hub is private")
    parser.add_argument("--license", default=card.UNKNOWN, help="of the model, as the hub calls it, such as apache-2.0")
    parser.add_argument("--data_license", default=card.UNKNOWN, help="of the training images, for the model card")


def run(args) -> None:
    """`igpt export`."""
    if args.push:
        hub.check_push(args.push)
    elif args.private:
        raise UserError("--private is for --push only; leave it out")
    licences = (args.license, args.data_license)
    directory = hub.resolve(args.model)
    if config_of(directory).program == "vqvae":
        if not args.out:
            raise UserError(
                f"{args.model} is a VQ-VAE, which no class of transformers reads; give --out instead of --push"
            )
        if args.step is not None or licences != (card.UNKNOWN, card.UNKNOWN):
            given = "--step, --license and --data_license are"
            raise UserError(f"{given} for a transformer; the newest network of a VQ-VAE is exported, without a card")
        made = export_codes(directory, args.out)
        print(f"wrote {made}: {', '.join(sorted(path.name for path in made.iterdir()))}")
        return
    if args.push:
        with tempfile.TemporaryDirectory(prefix="igpt-export-") as folder:
            made = export(args.model, folder, args.step, args.push, *licences)
            model = hf_weights.open_directory(made).model
            print(f"pushed to {hub.push(made, args.push, args.private)}")
    else:
        made = export(args.model, args.out, args.step, "", *licences)
        model = hf_weights.open_directory(made).model
        print(f"wrote {made}: {', '.join(sorted(path.name for path in made.iterdir()))}")
    if text := card.notice(model, args.push or made):
        print(text)
