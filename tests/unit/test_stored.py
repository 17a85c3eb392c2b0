"""Which files of a folder are the checkpoint, and what headers may say: as transformers and safetensors decide."""

import json
import os
import shutil
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qwenspec.backend.runtime.stored import (
    CheckpointError,
    check,
    choose_files,
    either_name,
    explained,
    read_header,
    read_headers,
)

INDEX = "model.safetensors.index.json"


def fill(folder, *names):
    """Safetensors files, each with one tensor of its own name."""
    for name in names:
        save_file({name.partition(".")[0]: np.zeros(2, np.float32)}, folder / name)
    return folder


def index(folder, *names):
    weight_map = {name.partition(".")[0]: name for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def chosen(folder):
    return [file.name for file in choose_files(folder).files]


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        read_headers(choose_files(folder).files)
    return str(caught.value)


# -------------------------------------------------------------------------------------------- which files it is


def test_model_safetensors_comes_before_an_index(tmp_path):
    index(fill(tmp_path, "model.safetensors", "old.safetensors", "zz.safetensors"), "old.safetensors")
    files = choose_files(tmp_path)
    assert chosen(tmp_path) == ["model.safetensors"]
    assert files.notes == (
        "old.safetensors and zz.safetensors are not read: the checkpoint is model.safetensors, as for transformers.",
        f"{INDEX} is not read: model.safetensors comes first, as for transformers.",
    )


def test_an_index_comes_before_whatever_else_there_is(tmp_path):
    index(
        fill(tmp_path, "b.safetensors", "a.safetensors", "consolidated.safetensors"), "b.safetensors", "a.safetensors"
    )
    assert chosen(tmp_path) == ["a.safetensors", "b.safetensors"]
    (note,) = choose_files(tmp_path).notes
    assert note.startswith("consolidated.safetensors is not read")


def test_what_transformers_reads(tmp_path):
    """By its own function."""
    from transformers.modeling_utils import _get_resolved_checkpoint_files as resolve

    def theirs():
        files, _ = resolve(str(tmp_path), None, None, None, {}, False)
        return [os.path.basename(file) for file in files]

    index(fill(tmp_path, "a.safetensors", "b.safetensors", "adapter_model.safetensors"), "b.safetensors")
    assert chosen(tmp_path) == theirs() == ["b.safetensors"]
    fill(tmp_path, "model.safetensors")
    assert chosen(tmp_path) == theirs() == ["model.safetensors"]


def test_one_file_by_another_name_is_taken_and_told(tmp_path):
    assert chosen(fill(tmp_path, "weights.safetensors")) == ["weights.safetensors"]
    assert "taken to be weights.safetensors" in choose_files(tmp_path).notes[0]
    fill(tmp_path, "adapter_model.safetensors", "._weights.safetensors")
    assert chosen(tmp_path) == ["weights.safetensors"]
    assert choose_files(tmp_path).notes == (
        f"The checkpoint is taken to be weights.safetensors; transformers looks for model.safetensors or {INDEX}.",
    )
    fill(tmp_path, "more.safetensors")
    assert "several sets of weights (more.safetensors and weights.safetensors)" in refusal(tmp_path)


def test_numbered_shards_without_an_index(tmp_path):
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert chosen(fill(tmp_path, *shards)) == shards
    (tmp_path / shards[1]).unlink()
    assert refusal(tmp_path).endswith("neither model.safetensors.index.json nor shard 2 of 3")
    (tmp_path / shards[2]).unlink()
    fill(tmp_path, shards[1])
    assert refusal(tmp_path).endswith("nor shard 3 of 3")
    fill(tmp_path, "other-00001-of-00002.safetensors")
    assert "several sets" in refusal(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": np.zeros(1, np.float32)}, tmp_path / name)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    assert "x is in two files" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "the weights of a Hugging Face checkpoint folder are in such files"),
        (("config.json",), "the weights of a Hugging Face checkpoint folder are in such files"),
        (("pytorch_model.bin",), "pytorch_model.bin is a pickle, which may run code and is never opened"),
        (("consolidated.00.pth",), "is a pickle"),
        (("model-q4.gguf",), "is GGUF"),
        (("adapter_config.json", "adapter_model.bin"), "it is an adapter, without its base model"),
    ],
)
def test_folders_without_safetensors_say_what_they_have(tmp_path, names, said):
    for name in names:
        (tmp_path / name).write_bytes(b"\0")
    assert f"{tmp_path} has no *.safetensors file: " in refusal(tmp_path)
    assert said in refusal(tmp_path)


def test_adapters(tmp_path):
    fill(tmp_path, "adapter_model.safetensors")
    assert "it is an adapter, without its base model" in refusal(tmp_path)
    fill(tmp_path, "model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert chosen(tmp_path) == ["model.safetensors"]
    assert "is not applied" in choose_files(tmp_path).notes[-1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", f"{INDEX}:1:1 is not valid JSON"),
        ("{\n", f"{INDEX}:2:1 is not valid JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "has no `weight_map`"),
        ('{"weight_map": []}', "has no `weight_map`"),
        ('{"weight_map": {}}', "has no `weight_map`"),
        ('{"weight_map": "a.safetensors"}', "has no `weight_map`"),
        ('{"weight_map": {"a": 3}}', "`weight_map` gives a no name of a file"),
        ('{"weight_map": {"a": null}}', "`weight_map` gives a no name of a file"),
        ('{"weight_map": {"a": "x\\u0000y"}}', "`weight_map` gives a no name of a file"),
        (json.dumps({"weight_map": {"a": "x" * 5000}}), "`weight_map` gives a no name of a file"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "only files in its own folder are read"),
        ('{"weight_map": {"a": "/dev/zero"}}', "only files in its own folder are read"),
        ('{"weight_map": {"a": "."}}', "is no regular file"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "absent.safetensors cannot be read: No such file"),
        ('{"weight_map": ' + "[" * 100_000, "is nested too deep"),
        ('{"weight_map": ' + "1" * 5000 + "}", f"{INDEX} cannot be read: Exceeds the limit"),
    ],
)
def test_indexes_that_are_none(tmp_path, text, said):
    fill(tmp_path, "a.safetensors")
    (tmp_path / INDEX).write_text(text)
    assert said in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "x.safetensors"])
def test_what_is_no_file_is_not_opened(tmp_path, name):
    (tmp_path / name).mkdir()
    assert refusal(tmp_path) == f"{tmp_path / name} is no regular file"
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to("nowhere")
    assert str(tmp_path / name) in refusal(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    assert refusal(tmp_path) == f"{tmp_path / name} is no regular file"
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)  # the last: whoever opens it waits for ever
    assert refusal(tmp_path) == f"{tmp_path / name} is no regular file"


def test_links_into_a_cache_are_followed(tmp_path):
    """As huggingface_hub lays out what it downloads."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    shutil.move(fill(tmp_path, "model.safetensors") / "model.safetensors", tmp_path / "blobs/1")
    (tmp_path / "snapshot/model.safetensors").symlink_to("../blobs/1")
    assert set(read_headers(choose_files(tmp_path / "snapshot").files)) == {"model"}


# ------------------------------------------------------------------------------------------------------ headers


def file_of(tmp_path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return tmp_path / "x"


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_header_says_where_its_tensors_are(tmp_path):
    file = file_of(tmp_path, {"__metadata__": {"format": "pt"}, "b": entry(offsets=(8, 16)), "a": entry()}, bytes(16))
    found = read_header(file)
    begin = file.stat().st_size - 16
    assert {name: (tensor.start - begin, tensor.end - begin) for name, tensor in found.items()} == {
        "a": (0, 8),
        "b": (8, 16),
    }
    assert (found["a"].dtype, found["a"].shape, found["a"].name) == ("F32", (2,), "a")


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"a": entry(), "b": entry()}, 8, "overlaps another tensor"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "overlaps another tensor"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, "leaves a gap"),
        ({"a": entry()}, 7, "Was it downloaded to the end?"),
        ({"a": entry()}, 0, "Was it downloaded to the end?"),
        ({"a": entry()}, 9, "1 bytes of it are no tensor's"),
        ({"a": entry(offsets=(0, 10**18))}, 8, "has 1000000000000000000 bytes"),
        ({"a": entry(offsets=(-8, 0))}, 8, "sizes or offsets that are none"),
        ({"a": entry(offsets=(0.0, 8.0))}, 8, "sizes or offsets that are none"),
        ({"a": entry(offsets=(False, 8))}, 8, "sizes or offsets that are none"),
        ({"a": entry(offsets=("0", "8"))}, 8, "sizes or offsets that are none"),
        ({"a": entry(offsets=(10**30, 10**30 + 8))}, 8, "sizes or offsets that are none"),
        ({"a": entry(offsets=(8, 0))}, 8, "has -8 bytes"),
        ({"a": entry(offsets=(0, 8, 8))}, 8, "has not `dtype`"),
        ({"a": entry(shape=(-1, -2))}, 8, "sizes or offsets that are none"),
        ({"a": entry(shape=(3,))}, 8, "is F32 [3], and has 8 bytes"),
        ({"a": entry(dtype="Q7")}, 8, "the unknown dtype Q7"),
        ({"a": {"dtype": "F32"}}, 8, "has not `dtype`"),
        ({"__metadata__": {"format": 1}}, 0, "metadata are not texts"),
        ({"a": []}, 8, "has not `dtype`"),
        (b'{"a": 1, "a": 2}', 0, "a name is twice"),
        (b'{"a\\ud800": 1}', 0, "surrogates not allowed"),
        (b'{"a": NaN}', 0, "NaN is no number"),
        (b"[]", 0, "there is no object"),
        (b'{"a": ' + b"[" * 100_000, 0, "recursion"),
        (b"\xff\xfe", 0, "utf-8"),
    ],
)
def test_headers_that_are_refused(tmp_path, header, data, said):
    with pytest.raises(CheckpointError) as caught:
        read_header(file_of(tmp_path, header, bytes(data)))
    assert str(caught.value).startswith(f"{tmp_path / 'x'} cannot be read: ")
    assert said in str(caught.value)
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "x", framework="np")


@pytest.mark.parametrize("length", [0, 3, 1 << 30, 1 << 63, (1 << 64) - 1])
def test_lengths_of_headers(tmp_path, length):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(file_of(tmp_path, {"a": entry()}, bytes(8), length))


def test_pointers_of_git_lfs(tmp_path):
    (tmp_path / "x").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n")
    with pytest.raises(CheckpointError, match="is a pointer of git-lfs: `git lfs pull` brings"):
        read_header(tmp_path / "x")


@settings(deadline=None)
@given(st.data())
def test_what_is_read_here_safetensors_opens_too(tmp_path_factory, data):
    """A header with something changed: whatever is accepted is what safetensors finds in it."""
    offsets = st.sampled_from([0, 4, 8, 12, 16, -4, 10**18, 2**64, 4.0, None, "0"])
    header = {}
    for name in data.draw(st.lists(st.sampled_from(["a", "b", "__metadata__", "\u2028"]), max_size=3, unique=True)):
        shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 4]), max_size=2))
        dtype = data.draw(st.sampled_from(["F32", "BF16", "I8", "F8_E4M3", "F4", "F6_E2M3", "BOOL", "f32"]))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [data.draw(offsets), data.draw(offsets)]}
    file = file_of(tmp_path_factory.mktemp("drawn"), header, bytes(data.draw(st.sampled_from([0, 4, 8, 16]))))
    try:
        found = read_header(file)
    except CheckpointError:
        return
    with safe_open(file, framework="np") as opened:
        assert set(found) == set(opened.keys())
        for name, tensor in found.items():
            assert (opened.get_slice(name).get_dtype(), opened.get_slice(name).get_shape()) == (
                tensor.dtype,
                list(tensor.shape),
            )


# ---------------------------------------------------------------------------------------- what a model asks for


def stored(tmp_path, *names):
    save_file({name: np.zeros((2, 3), np.float32) for name in names}, tmp_path / "model.safetensors")
    return read_headers([tmp_path / "model.safetensors"])


def test_either_name_of_a_tied_pair(tmp_path):
    pair = ("embed", "head")
    assert set(either_name(stored(tmp_path, "embed"), pair)) == {"embed"}
    assert set(either_name(stored(tmp_path, "embed", "head"), pair)) == {"embed", "head"}
    (only,) = either_name(stored(tmp_path, "head"), pair).items()
    assert (only[0], only[1].name) == ("embed", "head")
    assert set(either_name(stored(tmp_path, "head"), ())) == {"head"}


def test_another_checkpoint_says_what_it_holds(tmp_path):
    names = [f"blocks.{i}.{name}" for i in range(30) for name in ("q", "k")] + ["wte"]
    found = stored(tmp_path, *names)
    lines = explained(check([], found, ()), found)
    assert lines[20:] == [
        "and 41 more",
        "it holds:",
        "  blocks.{i}.k F32 [2, 3], 30 times",
        "  blocks.{i}.q F32 [2, 3], 30 times",
        "  wte F32 [2, 3]",
    ]


@pytest.mark.parametrize("prefix", ["base_model.model.", "_orig_mod.", "module."])
def test_wrapped_names_are_told_once(tmp_path, prefix):
    found = stored(tmp_path, f"{prefix}a", f"{prefix}b")
    (line,) = explained(check([], found, ()), found)
    assert line.startswith(f"every tensor's name begins with `{prefix}`: ")


def test_names_are_told_in_one_line(tmp_path):
    found = stored(tmp_path, "a\n\x1b[31m", "b" * 10_000)
    assert all(line.isprintable() and len(line) < 300 for line in check([], found, ()))
