import io
import json
import os
import pickle
import resource
import time
import tracemalloc
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from igpt.errors import UserError
from igpt.interop import weight_files
from igpt.interop.weight_files import FLOATS, MAX_HEADER_BYTES, list_tensors, write_safetensors

rng = np.random.default_rng(0)
ARRAYS = {"a": rng.normal(size=(5, 7)), "b": rng.normal(size=(3,)), "c": rng.normal(size=(2, 2, 3))}
ARRAYS = {name: array.astype(np.float32) for name, array in ARRAYS.items()}
PLAIN = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})


def read_all(directory) -> dict[str, np.ndarray]:
    errors = []
    arrays = {name: tensor.read() for name, tensor in list_tensors(directory, errors).items()}
    assert errors == []
    return arrays


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name], np.float32), np.asarray(array, np.float32))


def reads_or_is_refused(directory, limit=16 << 20, seconds=5.0) -> bool:
    """Whether all was read. Fails for an exception other than UserError, and above these limits of memory and time."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # tracemalloc does not count torch's memory
    tracemalloc.start()
    start = time.process_time()
    try:
        errors = []
        for tensor in list_tensors(directory, errors).values():
            if tensor.dtype in FLOATS:
                assert tensor.read().shape == tensor.shape
        return not errors
    except UserError:
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < limit, f"{peak:,} bytes"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < resident + (64 << 10), "kilobytes"
        assert time.process_time() - start < seconds


def with_header(header: bytes | str, data: bytes = bytes(8), length: int | None = None) -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("most", [10**9, 60])
def test_written_tensors_are_read_from_one_file_or_from_shards(tmp_path, monkeypatch, dtype, most):
    monkeypatch.setattr(weight_files, "MAX_SHARD_BYTES", most)
    expected = {name: array.astype(FLOATS[dtype]) for name, array in ARRAYS.items()}
    write_safetensors(tmp_path, ARRAYS, dtype)
    found = read_all(tmp_path)
    assert_equal(found, expected)
    assert {array.dtype for array in found.values()} == {np.dtype(FLOATS[dtype])}
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    if most == 60:  # "a" has 35 numbers, "b" 3, "c" 12
        assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    else:
        assert files == ["model.safetensors"]


def test_a_directory_without_weights_lists_the_allowed_files(tmp_path):
    (tmp_path / "tf_model.h5").touch()
    with pytest.raises(UserError, match=r"has no weights: model.safetensors, pytorch_model.bin, .* save_pretrained"):
        list_tensors(tmp_path, [])


@pytest.mark.parametrize("legacy", [False, True])
def test_pytorch_files_old_and_new_are_read(tmp_path, legacy):
    state = OrderedDict((name, torch.from_numpy(array)) for name, array in ARRAYS.items())
    state["b"] = torch.nn.Parameter(state["b"].to(torch.bfloat16))
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert_equal(read_all(tmp_path), ARRAYS | {"b": ARRAYS["b"].astype(ml_dtypes.bfloat16)})


def test_shards_of_pytorch_files_are_read(tmp_path):
    weight_map = {}
    for name, array in ARRAYS.items():
        weight_map[name] = f"pytorch_model-{name}.bin"
        torch.save({name: torch.from_numpy(array)}, tmp_path / weight_map[name])
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_equal(read_all(tmp_path), ARRAYS)


def test_tensors_that_differ_between_index_and_shards_are_named(tmp_path):
    save_file({"a": ARRAYS["a"], "b": ARRAYS["b"]}, tmp_path / "1.safetensors")
    save_file({"b": ARRAYS["b"], "d": ARRAYS["b"]}, tmp_path / "2.safetensors")
    weight_map = {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    errors = []
    list_tensors(tmp_path, errors)
    assert errors == [
        "b is in 1.safetensors, but the index names 2.safetensors",
        "b is in 1.safetensors and again in 2.safetensors",
        "d is in 2.safetensors, but the index names no file for it",
        "c is not in 2.safetensors, which the index names for it",
    ]


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_index_can_name_files_of_its_own_folder_only(tmp_path, kind):
    (tmp_path / "in").mkdir()
    name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
    for folder in (tmp_path, tmp_path / "in"):
        if kind == "bin":
            torch.save({"a": torch.ones(2)}, folder / f"shard.{kind}")
        else:
            save_file(ARRAYS, folder / f"shard.{kind}")
    (tmp_path / "in" / f"folder.{kind}").mkdir()
    (tmp_path / "in" / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "in" / f"pipe.{kind}")
    (tmp_path / "in" / f"link.{kind}").symlink_to("/dev/zero")
    index = tmp_path / "in" / f"{name}.index.json"
    absolute = str(tmp_path / f"shard.{kind}")
    bad = (
        f"../shard.{kind}",
        absolute,
        f"./shard.{kind}",
        f"folder.{kind}",
        f"absent.{kind}",
        index.name,
        "config.json",
    )
    for shard in (
        *bad,
        "",
        ".",
        "..",
        f"\0.{kind}",
        f"{'x' * 300}.{kind}",
        f"pipe.{kind}",
        f"link.{kind}",
        f"\ud800.{kind}",
    ):
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(UserError, match="no weight file beside it"):
            list_tensors(tmp_path / "in", [])
    for weight_map in (None, [], "x", {"a": 1}, {"a": None}, {"a": ["x"]}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match="no 'weight_map' from tensor names to file names"):
            list_tensors(tmp_path / "in", [])
    index.write_text(json.dumps({"weight_map": {"a": f"shard.{kind}"}}))
    assert "a" in list_tensors(tmp_path / "in", [])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        with_header(PLAIN, length=100 << 20),
        with_header(PLAIN, length=(1 << 64) - 1),
        with_header(PLAIN, length=1 << 63),
        with_header(PLAIN, length=MAX_HEADER_BYTES + 1),
        with_header(PLAIN + " " * (40 << 20)),
        with_header(PLAIN, data=bytes(7)),
        with_header(PLAIN, data=bytes(9)),
        with_header(PLAIN.replace("[0, 8]", "[-8, 0]")),
        with_header(PLAIN.replace("[0, 8]", "[8, 0]")),
        with_header(PLAIN.replace("[0, 8]", "[4, 12]")),
        with_header(PLAIN.replace("[0, 8]", f"[0, {1 << 62}]")),
        with_header(PLAIN.replace("[2]", f"[{1 << 62}]")),
        with_header(PLAIN.replace("[2]", f"[{1 << 32}, {1 << 32}, 2]")),  # 2 elements modulo 2^64
        with_header(PLAIN.replace("[2]", "[-2]")),
        with_header(PLAIN.replace("[2]", "[2.0]")),
        with_header(PLAIN.replace("[2]", "[NaN]")),
        with_header(PLAIN.replace("[2]", "[true, 2]")),
        with_header(PLAIN.replace("F32", "F33")),
        with_header(PLAIN.replace('"F32"', "null")),
        with_header('{"a": ' + PLAIN[6:-1] + ', "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'),
        with_header('{"a": {"dtype": "F32", "shape": [2], "shape": [1], "data_offsets": [0, 8]}}'),
        with_header('{"a": []}'),
        with_header("[]"),
        with_header('{"__metadata__": {"format": 1}}', data=b""),
        with_header(b'{"\xff": {}}'),
        with_header(PLAIN.encode("utf-16")),
        with_header('{"a":' * 10000 + "1" + "}" * 10000),
        with_header('{"a":' + "[" * 100000),
        with_header("[" * 1000000),
    ],
    ids=range(31),
)
def test_hostile_safetensors_headers_are_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert not reads_or_is_refused(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(with_header(PLAIN))
    assert reads_or_is_refused(tmp_path)


def test_a_header_of_a_hundred_megabytes_is_not_parsed(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header(PLAIN, length=100 << 20))
    os.truncate(path, 200 << 20)
    assert not reads_or_is_refused(tmp_path, limit=1 << 20, seconds=1.0)


def mutations(content: bytes, head: int, seed: int):
    """Copies of `content` with bytes flipped, inserted, replaced or removed, mostly among the first `head`."""
    rng = np.random.default_rng(seed)
    for i in range(150):
        mutant = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, min(head, len(mutant)) if rng.random() < 0.8 else len(mutant)))
            match i % 4:
                case 0:
                    mutant[at] ^= 1 << int(rng.integers(8))
                case 1:
                    mutant[at:at] = rng.bytes(int(rng.integers(1, 9)))
                case 2:
                    del mutant[at : at + int(rng.integers(1, 9))]
                case 3:
                    mutant[at] = int(rng.choice(list(b'09-{}[]",:e.\x00\xff')))
        yield bytes(mutant if i % 5 else mutant[: int(rng.integers(len(mutant)))])


def test_mutated_safetensors_files_are_read_or_refused(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    outcomes = set()
    for mutant in mutations(content, head=len(content) - sum(array.nbytes for array in ARRAYS.values()), seed=0):
        (tmp_path / "model.safetensors").write_bytes(mutant)
        outcomes.add(reads_or_is_refused(tmp_path, limit=1 << 20))
    assert outcomes == {True, False}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True])
def test_mutated_pytorch_files_are_read_or_refused(tmp_path, legacy):
    path = tmp_path / "pytorch_model.bin"
    state = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    outcomes = set()
    for mutant in mutations(path.read_bytes(), head=900, seed=1):
        path.write_bytes(mutant)
        outcomes.add(reads_or_is_refused(tmp_path))
    assert outcomes == {True, False}


def test_mutated_index_files_are_read_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "MAX_SHARD_BYTES", 100)
    write_safetensors(tmp_path, ARRAYS, "F32")
    index = tmp_path / "model.safetensors.index.json"
    content = index.read_bytes()
    outcomes = set()
    for mutant in mutations(content, head=len(content), seed=2):
        index.write_bytes(mutant)
        outcomes.add(reads_or_is_refused(tmp_path))
    assert outcomes == {True, False}


class Opens:
    """An object whose unpickling would create a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


class Calls:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("form", ["zip", "legacy", "plain", "zip by hand"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path, name, protocol, form):
    marker = tmp_path / "marker"
    state = {"a": torch.ones(2), "b": Opens(marker)}
    path = tmp_path / name
    match form:
        case "plain":
            path.write_bytes(pickle.dumps({"b": Opens(marker)}, protocol))
        case "zip by hand":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", pickle.dumps({"b": Opens(marker)}, protocol))
                archive.writestr("archive/version", "3\n")
        case _:
            torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
    marker.unlink(missing_ok=True)
    with pytest.raises(UserError, match="refused|not a sound safetensors file|announces a header"):
        list_tensors(tmp_path, [])
    assert not marker.exists()


@pytest.mark.parametrize(
    "state",
    [
        {"a": Calls(bytearray, 10**10)},  # torch's weights_only allows it
        {"a": torch.zeros(1).expand(1000, 1000)},
        {"a": torch.zeros(3).to_sparse()},
        {"a": torch.zeros(3, device="meta")},
        {"a": 3},
        {3: torch.ones(2)},
        [torch.ones(2)],
        torch.ones(2),
        None,
        {"a": {"b": torch.ones(2)}},
    ],
    ids=range(10),
)
@pytest.mark.parametrize("legacy", [False, True])
def test_pytorch_files_with_more_than_stored_tensors_are_refused(tmp_path, monkeypatch, state, legacy):
    if legacy and isinstance(state, dict) and getattr(state.get("a"), "is_sparse", False):
        pytest.skip("torch itself cannot write it")
    if isinstance(state, dict) and isinstance(state.get("a"), Calls):
        monkeypatch.setattr("torch.load", None)  # the file must be refused before it is loaded
        path = tmp_path / "pytorch_model.bin"
        data = pickle.dumps(state, 2)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")
    else:
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert not reads_or_is_refused(tmp_path)
    with pytest.raises(UserError, match=r"refused|holds"):
        list_tensors(tmp_path, [])


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_that_is_compressed_or_ambiguous_is_refused(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "pytorch_model.bin")
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin") as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    monkeypatch.setattr("torch.load", None)  # the file must be refused before it is loaded

    def refused(compression=zipfile.ZIP_STORED, more=(), before=b""):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", compression) as archive:
            for name, data in (*parts.items(), *more):
                archive.writestr(name, data)
        (tmp_path / "pytorch_model.bin").write_bytes(before + content.getvalue())
        with pytest.raises(UserError) as error:
            list_tensors(tmp_path, [])
        return str(error.value)

    assert "more than its size allows" in refused(zipfile.ZIP_DEFLATED)
    assert "there twice" in refused(more=[("other/data.pkl", parts["pytorch_model/data.pkl"])])
    assert "there twice" in refused(more=[("x", b"1"), ("x", b"2")])
    assert "only a part of it is a zip file" in refused(before=b"\x80\x02")
    parts["pytorch_model/data/0"] = rng.bytes(4 << 20)  # not larger when unpacked, but torch could not map it
    assert "more than its size allows" in refused(zipfile.ZIP_DEFLATED)
    parts["pytorch_model/data.pkl"] += bytes(MAX_HEADER_BYTES)
    assert "more than its size allows" in refused()


def test_a_torch_with_an_unsafe_loader_is_not_used(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(UserError, match=r"torch 2\.9\.1\+cpu cannot read .* safely; install torch 2\.10 or newer"):
        list_tensors(tmp_path, [])


def test_without_torch_the_message_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").touch()
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[torch\]"'):
        list_tensors(tmp_path, [])
