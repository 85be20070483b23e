"""Named tensors in the weight files of a stranger's directory: listed first, then read one by one.

Looked for in this order: model.safetensors, the shards of model.safetensors.index.json, pytorch_model.bin, the shards
of pytorch_model.bin.index.json. The .bin files are pickles: they are looked through first, and refused unless they name
nothing but tensors; then torch's weights_only loader, which executes nothing, maps them.
"""

import io
import json
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from igpt.errors import UserError
from igpt.files import read_json, write_text

MAX_SHARD_BYTES = 2 << 30  # of the files that are written here
MAX_HEADER_BYTES = 2 << 20  # of a safetensors header or a pickle; iGPT-XL's have about 100 kB
FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# All that the pickle of a state dict has to name. torch's weights_only would let more through, bytearray(10**10) too.
PICKLED = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch [A-Z]\w*Storage")
LEGACY_PICKLES = (
    5  # magic number, protocol, system, state dict, storage keys: what torch < 1.6 wrote before the numbers
)
TORCH_WITH_SAFE_LOADER = (2, 10)  # weights_only could be bypassed before (CVE-2025-32434, CVE-2026-24747)


class Tensor(NamedTuple):
    """A tensor that has not been read yet. `dtype` is a key of FLOATS, or the file's own name of another type."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    read: Callable[[], np.ndarray]


def list_tensors(directory: Path, errors: list[str]) -> dict[str, Tensor]:
    """Every tensor of a directory by name. What is wrong with single tensors is added to `errors`.

    Raises UserError when there are no weights or a file is damaged.
    """
    for index, single, list_file in (
        ("model.safetensors.index.json", "model.safetensors", _list_safetensors),
        ("pytorch_model.bin.index.json", "pytorch_model.bin", _list_pickle),
    ):
        if (directory / single).is_file():
            return list_file(directory / single)
        if (directory / index).is_file():
            return _list_shards(directory / index, list_file, errors)
    raise UserError(
        f"{directory} has no weights: model.safetensors, pytorch_model.bin, or shards of either with their index.json "
        "are read; convert other formats with transformers' save_pretrained"
    )


def _list_shards(index: Path, list_file: Callable, errors: list[str]) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index} has no 'weight_map' from tensor names to file names")
    tensors = {}
    for file in sorted(set(weight_map.values())):
        if not _is_beside(index, file):
            raise UserError(f"{index} names the shard {file[:99]!r}, which is no weight file beside it")
        for name, tensor in list_file(index.parent / file).items():
            if name in tensors:
                errors.append(f"{name} is in {tensors[name].file.name} and again in {file}")
            elif weight_map.get(name) != file:
                errors.append(f"{name} is in {file}, where the index says {weight_map.get(name, 'nothing of it')}")
            tensors[name] = tensor
    absent = [name for name in weight_map if name not in tensors]
    errors += [f"{name} is not in {weight_map[name]}, where the index says it is" for name in absent]
    return tensors


def _is_beside(index: Path, file: str) -> bool:
    """A shard is of its index's kind and in its directory: no name may lead anywhere else."""
    kind = index.name.split(".")[1]  # safetensors or bin
    try:
        return Path(file).name == file and file.endswith(f".{kind}") and (index.parent / file).is_file()
    except OSError:  # no file system has names this long
        return False


def _list_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > MAX_HEADER_BYTES:
                raise UserError(
                    f"{path} announces a header of {header_bytes:,} bytes; at most {MAX_HEADER_BYTES:,} are accepted, "
                    "and no ImageGPT comes near"
                )
            with safe_open(path, framework="numpy"):  # the format's own library validates every entry and the length
                header = json.loads(file.read(header_bytes))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a sound safetensors file ({error}); fetch it again") from None

    def tensor(entry: dict) -> Tensor:
        start, stop = (8 + header_bytes + offset for offset in entry["data_offsets"])

        def read() -> np.ndarray:  # an ordinary read: pages of a memory map would count as ours until evicted
            dtype = np.dtype(FLOATS[entry["dtype"]])
            flat = np.fromfile(path, dtype, (stop - start) // dtype.itemsize, offset=start)
            return flat.reshape(entry["shape"])

        return Tensor(tuple(entry["shape"]), entry["dtype"], path, read)

    return {name: tensor(entry) for name, entry in header.items() if name != "__metadata__"}


def _list_pickle(path: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f'{path} is a PyTorch file; reading it needs torch: pip install "igpt[torch]", or convert it to safetensors'
        ) from None
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < TORCH_WITH_SAFE_LOADER:
        raise UserError(
            f"torch {torch.__version__} cannot read {path} safely; install torch 2.10 or newer, "
            "or convert the file to safetensors"
        )
    try:
        mappable = _check_pickle(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{path} was refused: it is damaged or holds more than tensors ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path} holds a {type(state).__name__}; a state dict from names to tensors is needed")
    plain = [
        value
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    ]
    if len(plain) < len(state):
        raise UserError(f"{path} holds more than plain tensors; a state dict is needed")
    # A tied head is there twice. Expanded tensors of few stored numbers could ask for any amount of memory.
    if sum(value.nbytes for value in plain) > 2 * path.stat().st_size:
        raise UserError(f"{path} was refused: its tensors are larger than the file, repeating what it holds")
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

    def tensor(value) -> Tensor:
        def read() -> np.ndarray:
            return value.detach().to(torch.float32).numpy()

        return Tensor(tuple(value.shape), names.get(value.dtype, str(value.dtype)), path, read)

    return {name: tensor(value) for name, value in state.items()}


def _check_pickle(path: Path) -> bool:
    """Raises ValueError unless a .bin file's pickles are those of a state dict. True if it is torch 1.6's zip or newer.

    Nothing is unpickled: the operations are read one by one.
    """
    with path.open("rb") as file:
        head = file.read(MAX_HEADER_BYTES)
        zipped = zipfile.is_zipfile(file)
        if zipped != head.startswith(b"PK\x03\x04"):
            raise ValueError("it is a zip file in part")
        if zipped:
            with zipfile.ZipFile(file) as archive:
                head = _zipped_pickle(archive, path.stat().st_size)
    pickles = io.BytesIO(head)
    for _ in range(1 if zipped else LEGACY_PICKLES):
        for operation, argument, _ in pickletools.genops(pickles):
            if operation.name == "GLOBAL" and PICKLED.fullmatch(argument):
                continue
            if operation.name in ("GLOBAL", "STACK_GLOBAL", "INST") or operation.name.startswith("EXT"):
                raise ValueError(f"it names {argument or operation.name}")
    return zipped


def _zipped_pickle(archive: zipfile.ZipFile, size: int) -> bytes:
    """The one pickle of torch's zip format, in which every part is stored as it is."""
    parts = archive.infolist()
    pickles = [part for part in parts if part.filename.endswith("data.pkl")]
    if len(pickles) != 1 or len({part.filename for part in parts}) < len(parts):
        raise ValueError("parts of it are there twice, or none is data.pkl")
    stored = all(part.compress_type == zipfile.ZIP_STORED and part.file_size == part.compress_size for part in parts)
    if not stored or sum(part.file_size for part in parts) > size or pickles[0].file_size > MAX_HEADER_BYTES:
        raise ValueError("it holds more than its size allows")
    return archive.read(pickles[0])


def write_safetensors(directory: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """Writes model.safetensors, or numbered shards and their index when there is more than a shard may hold.

    `dtype` is a key of FLOATS. Tensors of that type are written without being copied.
    """
    dtype = np.dtype(FLOATS[dtype])
    shards = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.size * dtype.itemsize
        if shards[-1] and filled + size > MAX_SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        contiguous = {name: np.ascontiguousarray(tensor, dtype) for name, tensor in shard.items()}
        save_file(contiguous, directory / file, {"format": "pt"})  # older transformers refuse files without it
    if len(files) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        size = sum(tensor.size for tensor in tensors.values()) * dtype.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
