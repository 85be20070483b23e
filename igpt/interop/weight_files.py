"""Lists the tensors in the weight files of a directory, reads them one by one, and writes safetensors files.

The first of these that exists is read: model.safetensors, the shards of model.safetensors.index.json,
pytorch_model.bin, the shards of pytorch_model.bin.index.json. Formats: https://huggingface.co/docs/safetensors, and
torch.save. A .bin file is a pickle, which can run code when it is loaded. So a file is refused
if it names anything but tensors. After this check, torch's weights_only loader maps it into memory and runs no code.
"""

import io
import json
import math
import os
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from igpt.errors import UserError, first_line
from igpt.files import read_json, write_text
from igpt.interop.mapping import Tensor

MAX_SHARD_BYTES = 2 << 30  # bytes per file that this module writes
MAX_HEADER_BYTES = 2 << 20  # bytes per safetensors header or pickle; iGPT-XL needs about 100 kB
# The names of files that an export writes. Others, such as model_best.safetensors, are the user's.
SAFETENSORS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# All names that the pickle of a state dict needs. torch's weights_only loader would allow bytearray(10**10), too.
PICKLED = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch [A-Z]\w*Storage")
LEGACY_PICKLES = 5  # pickles in a file of torch < 1.6: magic number, protocol, system, state dict, storage keys
TORCH_WITH_SAFE_LOADER = (2, 10)  # in older versions, files can bypass weights_only (CVE-2025-32434, CVE-2026-24747)


def list_tensors(directory: Path, errors: list[str]) -> dict[str, Tensor]:
    """Lists every tensor of a directory by name. Appends a message to `errors` for each tensor with a problem.

    Raises UserError if there are no weights, or if a file is damaged. `Tensor.dtype` is a key of FLOATS; for any other
    type, it is the name that the file uses.
    """
    for single, list_file in (("model.safetensors", _list_safetensors), ("pytorch_model.bin", _list_pickle)):
        if (directory / single).is_file():
            return list_file(directory / single)
        if (index := directory / f"{single}.index.json").is_file():
            return _list_shards(index, list_file, errors)
    needed = "model.safetensors, pytorch_model.bin, or shards of either with their index.json are needed"
    raise UserError(f"{directory} has no weights: {needed}; convert other formats with transformers' save_pretrained")


def _list_shards(index: Path, list_file: Callable, errors: list[str]) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index} has no 'weight_map' from tensor names to file names; fetch it again")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    tensors = {}
    for file in sorted(set(weight_map.values())):
        # A shard must lie in the folder of the index and have its format. os.path.isfile is False for invalid names.
        if Path(file).name != file or not file.endswith(suffix) or not os.path.isfile(index.parent / file):
            raise UserError(f"{index} names the shard {file[:99]!r}, which is no weight file beside it")
        for name, tensor in list_file(index.parent / file).items():
            if name in tensors:
                errors.append(f"{name} is in {tensors[name].file.name} and again in {file}")
            elif weight_map.get(name) != file:
                errors.append(f"{name} is in {file}, but the index names {weight_map.get(name, 'no file for it')}")
            tensors[name] = tensor
    absent = [name for name in weight_map if name not in tensors]
    errors += [f"{name} is not in {weight_map[name]}, which the index names for it" for name in absent]
    return tensors


def _list_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise UserError(f"{path} announces a header of {length:,} bytes; {MAX_HEADER_BYTES:,} are allowed")
            with safe_open(path, framework="numpy"):  # the safetensors library checks the header
                header = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a sound safetensors file ({error}); fetch it again") from None

    def tensor(entry: dict) -> Tensor:
        shape, dtype, start = entry["shape"], entry["dtype"], 8 + length + entry["data_offsets"][0]

        def read() -> np.ndarray:  # not a memory map: its pages would count as this process's memory
            return np.fromfile(path, FLOATS[dtype], math.prod(shape), offset=start).reshape(shape)

        return Tensor(tuple(shape), dtype, path, read)

    return {name: tensor(entry) for name, entry in header.items() if name != "__metadata__"}


def _list_pickle(path: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError:
        raise UserError(f'{path} needs torch: pip install -e ".[torch]", or convert it to safetensors') from None
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < TORCH_WITH_SAFE_LOADER:
        raise UserError(f"torch {torch.__version__} cannot read {path} safely; install torch 2.10 or newer")
    try:
        mappable = _check_pickle(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # a damaged pickle can raise any exception
        reason = first_line(error)[:200]
        raise UserError(f"{path} was refused: it is damaged or holds more than tensors ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path} holds a {type(state).__name__}; a state dict from names to tensors is needed")
    for value in state.values():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            raise UserError(f"{path} holds more than plain tensors; a state dict is needed")
    # A huge tensor can be a view of a few stored numbers. The factor 2 allows a tied head, which is listed twice.
    if sum(value.nbytes for value in state.values()) > 2 * path.stat().st_size:
        raise UserError(f"{path} was refused: its tensors repeat numbers and exceed the file; save copies of them")
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

    def tensor(value) -> Tensor:
        dtype = names.get(value.dtype, str(value.dtype))
        return Tensor(tuple(value.shape), dtype, path, lambda: value.detach().to(torch.float32).numpy())

    return {name: tensor(value) for name, value in state.items()}


def _check_pickle(path: Path) -> bool:
    """Raises ValueError if a .bin file has more than a state dict. Returns whether it is a zip file (torch >= 1.6)."""
    with path.open("rb") as file:
        head, zipped = file.read(MAX_HEADER_BYTES), zipfile.is_zipfile(file)
        if zipped != head.startswith(b"PK\x03\x04"):
            raise ValueError("only a part of it is a zip file")
        if zipped:
            parts = (archive := zipfile.ZipFile(file)).infolist()
            pickles = [part for part in parts if part.filename.endswith("data.pkl")]
            if len(pickles) != 1 or len({part.filename for part in parts}) < len(parts):
                raise ValueError("it does not have exactly one data.pkl, or another name is there twice")
            packed = any(part.compress_type or part.compress_size != part.file_size for part in parts)
            larger = sum(part.file_size for part in parts) > path.stat().st_size
            if packed or larger or pickles[0].file_size > MAX_HEADER_BYTES:
                raise ValueError("it holds more than its size allows")
            head = archive.read(pickles[0])
    stream = io.BytesIO(head)  # pickletools only lists the operations: nothing is unpickled
    for _ in range(1 if zipped else LEGACY_PICKLES):
        for operation, argument, _ in pickletools.genops(stream):
            names = operation.name in ("GLOBAL", "STACK_GLOBAL", "INST") or operation.name.startswith("EXT")
            if names and not (operation.name == "GLOBAL" and PICKLED.fullmatch(argument)):
                raise ValueError(f"it names {argument or operation.name}")
    return zipped


def write_safetensors(directory: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """Writes model.safetensors, or numbered shards and their index if the weights exceed MAX_SHARD_BYTES.

    `dtype` is a key of FLOATS. Tensors of that type are not copied.
    """
    dtype = np.dtype(FLOATS[dtype])
    shards, room = [], 0
    for name, tensor in tensors.items():
        size = tensor.size * dtype.itemsize
        if not shards or size > room:
            shards.append({})
            room = MAX_SHARD_BYTES
        shards[-1][name] = tensor
        room -= size
    numbered = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = numbered if len(shards) > 1 else ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        contiguous = {name: np.ascontiguousarray(tensor, dtype) for name, tensor in shard.items()}
        path = directory / file
        path.touch()
        mode = path.stat().st_mode  # the mode of every new file: safetensors makes files that only their owner can read
        save_file(contiguous, path, {"format": "pt"})  # older transformers versions require "format"
        path.chmod(mode)
    if len(files) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        size = sum(tensor.size for tensor in tensors.values()) * dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
