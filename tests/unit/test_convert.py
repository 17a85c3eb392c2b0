"""Converting a checkpoint: what is written, and what is refused."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversions import QWEN1, QWEN3, SCHEMES, files, refusal, request
from ir_specs import make_spec
from safetensors import safe_open

from qwenspec.backend.runtime.stored import read_header
from qwenspec.convert import convert as conversion
from qwenspec.convert.convert import convert
from qwenspec.diagnostics import SpecError
from qwenspec.hf.checkpoint import import_path, tensors_in
from qwenspec.hf.tensors import expected
from qwenspec.spec.document import Spec
from qwenspec.spec.kv_cache import Fp8KvCache
from qwenspec.spec.load import load
from qwenspec.verify.checkpoint import StoredTensors
from qwenspec.verify.dequantize import Dequantized
from qwenspec.verify.quantize import quantized
from qwenspec.verify.weights import random_weights, save_checkpoint

# ------------------------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_tensors_are_those_that_the_reference_rounds_to(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: Any, tied: bool
) -> None:
    """By the proof's own quantiser, which shares nothing with this one; a tensor is several pieces here."""
    monkeypatch.setattr(conversion, "PIECE", 500)
    monkeypatch.setattr(conversion, "COPIED", 300)
    spec, folder = source(tie_word_embeddings=tied, vocab_size=111, hidden_size=49)
    made = request((spec, folder), tmp_path / "out", scheme)
    convert(made)
    full = StoredTensors(folder)
    wanted = quantized(made.result, {name: np.asarray(full[name], np.float32) for name in full}, seed=0)
    written = StoredTensors(made.out)
    assert set(written) == set(wanted) == expected(made.result)[0]
    for name, values in wanted.items():
        if name.endswith(".qweight") and values.dtype == np.uint8 and full[name[:-7] + "weight"].shape[1] % 2:
            np.testing.assert_array_equal(written[name][:, :-1], values[:, :-1], err_msg=name)
            np.testing.assert_array_equal(written[name][:, -1] & 15, values[:, -1] & 15, err_msg=name)
        else:
            np.testing.assert_array_equal(np.asarray(written[name], values.dtype), values, err_msg=name)
            assert name in full or written[name].dtype == values.dtype


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("architecture", [{}, {"tie_word_embeddings": True}, QWEN1])
def test_what_is_written_imports_as_the_spec_with_its_quantisation(
    source: Any, tmp_path: Path, scheme: Any, architecture: Any
) -> None:
    if architecture is QWEN1:
        scheme = scheme.model_copy(update={"skip": ("transformer.h.0.attn.c_attn",) if scheme.skip else ()})
    made = request(source(**architecture), tmp_path / "out", scheme)
    convert(made)
    returned = import_path(made.out).spec
    assert returned.quantization == scheme
    assert returned.architecture == made.spec.architecture


def test_an_embedding_model_stays_one(source: Any, tmp_path: Path) -> None:
    made = request(source(lm_head=None, embedding={}, checkpoint={"layout": "qwen3_embedding"}), tmp_path / "out")
    convert(made)
    returned = import_path(made.out).spec
    assert (returned.architecture, returned.quantization) == (made.spec.architecture, made.quantization)
    assert "embed_tokens.weight" in tensors_in(made.out).stored


@pytest.mark.parametrize("tied", [False, True])
def test_a_backbone_with_a_head_stays_a_language_model(source: Any, tmp_path: Path, tied: bool) -> None:
    """Its tensors have no prefix, as those of embedding models; and there is no `lm_head.weight` any more."""
    spec, folder = source(checkpoint={"layout": "qwen3_embedding"})
    config = json.dumps({**minimal_config(spec), "tie_word_embeddings": tied})
    (folder / "config.json").write_text(config)
    if tied:
        spec = spec.model_copy(
            update={"architecture": spec.architecture.model_copy(update={"tie_word_embeddings": True})}
        )
    made = request((spec, folder), tmp_path / "out")
    convert(made)
    returned = import_path(made.out).spec
    assert returned.architecture.lm_head is not None
    assert returned.architecture.tie_word_embeddings is tied


def minimal_config(spec: Spec) -> dict[str, Any]:
    """config.json of the same model with the usual names."""
    from qwenspec.hf.exporter import export_config

    usual = spec.architecture.checkpoint.model_copy(update={"layout": "qwen2"})
    return export_config(
        spec.model_copy(update={"architecture": spec.architecture.model_copy(update={"checkpoint": usual})})
    )


def test_a_head_that_the_config_ties_wrongly_is_untied(source: Any, tmp_path: Path) -> None:
    """As the import does, by the bytes, which are not there to compare afterwards."""
    _, folder = source()
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    made = request((import_path(folder).spec, folder), tmp_path / "out")
    convert(made)
    assert not made.spec.architecture.tie_word_embeddings
    assert not import_path(made.out).spec.architecture.tie_word_embeddings


def test_scales_of_a_kv_cache_are_kept(source: Any, tmp_path: Path) -> None:
    """They may be [] or [1]."""
    from safetensors.numpy import save_file

    spec, folder = source("float32")
    names = [f"model.layers.{i}.self_attn.{x}_scale" for i in range(2) for x in "kv"]
    scales = {name: np.full([1] * (number % 2), number, np.float32) for number, name in enumerate(names)}
    save_file({**StoredTensors(folder), **scales}, folder / "model.safetensors")
    cached = spec.model_copy(update={"kv_cache": Fp8KvCache(scheme="fp8_e4m3", scales="checkpoint")})
    made = request((cached, folder), tmp_path / "out")
    convert(made)
    written = StoredTensors(made.out)
    assert [written[name].tolist() for name in names] == [[0], [1], [2], [3]]


def test_small_files_go_along(source: Any, tmp_path: Path) -> None:
    made = request(source(), tmp_path / "out")
    (made.out).mkdir()  # an empty folder is as good as none
    convert(made)
    assert set(files(made.out)) == {
        "1_Pooling/config.json",
        "config.json",
        "model.safetensors",
        "quantization_report.json",
        "spec.yaml",
        "tokenizer.json",
    }
    assert not (tmp_path / "out.partial").exists()


def test_a_spec_that_fits_is_written(source: Any, tmp_path: Path) -> None:
    """In place of the old one, and with the names of a layout that was a file beside it."""
    spec, folder = source()
    (folder / "spec.yaml").write_text((tmp_path / "spec.yaml").read_text())
    own = spec.model_copy(
        update={
            "architecture": spec.architecture.model_copy(
                update={"checkpoint": spec.architecture.checkpoint.model_copy(update={"layout": "./names.yaml"})}
            )
        }
    )
    made = request((own, folder), tmp_path / "Tiny int4")
    convert(made)
    written = load(made.out / "spec.yaml")
    assert (written.variant, written.family) == ("tiny-int4", spec.family)
    assert written.quantization == made.quantization
    assert written.layout == spec.layout
    changed = {"architecture": spec.architecture}
    assert written.architecture.model_copy(update={"checkpoint": spec.architecture.checkpoint}) == spec.architecture
    assert expected(written.model_copy(update=changed))[0] == set(StoredTensors(made.out))


def test_links_are_followed_within_the_checkpoint(source: Any, tmp_path: Path) -> None:
    spec, folder = source()
    (tmp_path / "secret").write_text("root:x:0:0")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    (folder / "gone.txt").symlink_to(tmp_path / "nothing")
    (folder / "merges.txt").symlink_to("tokenizer.json")
    made = request((spec, folder), tmp_path / "out")
    assert convert(made).left_out == ("notes.txt",)
    written = files(made.out)
    assert written["merges.txt"] == written["tokenizer.json"]
    assert not {"notes.txt", "gone.txt"} & set(written)
    assert b"root:x" not in b"".join(written.values())


def test_the_cache_of_hugging_face_is_links(source: Any, tmp_path: Path) -> None:
    """snapshots/REVISION/FILE leads to blobs/HASH."""
    spec, folder = source()
    cache = tmp_path / "models--Qwen--Tiny"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    blobs.mkdir(parents=True)
    folder.rename(tmp_path / "moved")
    for name in files(tmp_path / "moved"):
        (tmp_path / "moved" / name).rename(blobs / name.replace("/", "-"))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / name.replace("/", "-"))
    made = request((spec, snapshot), tmp_path / "out")
    assert convert(made).left_out == ()
    assert {"tokenizer.json", "1_Pooling/config.json"} < set(files(made.out))


@pytest.mark.parametrize("shards", [1, 3])
def test_shards_are_as_hugging_face_has_them(source: Any, tmp_path: Path, shards: int) -> None:
    from transformers.utils.hub import get_checkpoint_shard_files

    checkpoint = source(shards=shards, hidden_size=49, vocab_size=111)
    made = request(checkpoint, tmp_path / "out", shard_bytes=8_000)
    whole = request(checkpoint, tmp_path / "whole")
    convert(made)
    convert(whole)
    index = made.out / "model.safetensors.index.json"
    paths, metadata = get_checkpoint_shard_files(str(made.out), str(index))
    assert len(paths) > 3
    assert metadata["total_size"] == sum(tensor.nbytes for tensor in StoredTensors(made.out).values())
    one, many = StoredTensors(whole.out), StoredTensors(made.out)
    assert all(np.array_equal(one[name], many[name]) for name in one)
    assert set(one) == set(many)
    for path in paths:
        with safe_open(path, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            starts = {name: where.start for name, where in read_header(Path(path)).items()}
            assert not any(start % opened.get_tensor(name).itemsize for name, start in starts.items())  # aligned
            largest = max(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118 - no mapping
        assert Path(path).stat().st_size <= max(8_000, largest) + 4_000  # and a header


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_any_float_is_read(source: Any, tmp_path: Path, dtype: str) -> None:
    """Norms keep the dtype that they have."""
    spec, folder = source("float32" if dtype == "float64" else dtype)
    if dtype == "float64":
        from safetensors.numpy import save_file

        save_file({n: t.astype(np.float64) for n, t in StoredTensors(folder).items()}, folder / "model.safetensors")
    made = request((spec, folder), tmp_path / "out")
    convert(made)
    written = StoredTensors(made.out)
    assert str(written["model.norm.weight"].dtype) == dtype
    wanted = quantized(made.result, random_weights(spec, 0), seed=0)
    name = "model.layers.1.mlp.up_proj.qweight"
    np.testing.assert_array_equal(written[name], wanted[name])


def test_the_report_has_the_errors_of_each_tensor(source: Any, tmp_path: Path) -> None:
    made = request(source(), tmp_path / "out")
    report = convert(made)
    data = json.loads((made.out / "quantization_report.json").read_text())
    assert data == report.to_data()
    full, rounded = StoredTensors(made.folder), Dequantized(made.result, StoredTensors(made.out))
    squares = errors = largest = 0.0
    assert len(data["tensors"]) == 2 * 7 + 1
    for entry in data["tensors"]:
        values = np.asarray(full[entry["tensor"]], np.float64)
        difference = rounded[entry["tensor"]] - values
        assert entry["shape"] == list(values.shape)
        assert entry["relative_rms_error"] == pytest.approx(
            np.linalg.norm(difference) / np.linalg.norm(values), rel=1e-4
        )
        assert entry["largest_error"] == pytest.approx(np.abs(difference).max(), rel=1e-4)
        assert entry["format"] == ("int8" if entry["tensor"] == "lm_head.weight" else "int4")
        squares, errors = squares + (values**2).sum(), errors + (difference**2).sum()
        largest = max(largest, float(np.abs(difference).max()))
    assert data["relative_rms_error"] == pytest.approx((errors / squares) ** 0.5, rel=1e-4)
    assert data["largest_error"] == pytest.approx(largest, rel=1e-4)
    worst = [entry.error.relative for entry in report.worst(3)]
    assert worst == sorted((entry["relative_rms_error"] for entry in data["tensors"]), reverse=True)[:3]
    assert data["bytes"]["after"] == sum(tensor.nbytes for tensor in StoredTensors(made.out).values())
    assert data["bytes"]["before"] == sum(tensor.nbytes for tensor in full.values())


# ------------------------------------------------------------------------------------------------ what is refused


def test_out_is_no_folder_of_anything_else(source: Any, tmp_path: Path) -> None:
    made = source()
    assert refusal(request(made, made[1] / "inside"))[0] == "usage"
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for out, said in ((full, "not empty"), (full / "file", "not a folder"), (tmp_path / "link", "a link")):
        with pytest.raises(SpecError, match=said):
            convert(request(made, out))
    assert [path.name for path in full.iterdir()] == ["file"]


def test_checkpoints_that_are_not_of_the_spec(source: Any, tmp_path: Path) -> None:
    spec, folder = source()
    wider = make_spec(tmp_path, **QWEN3 | {"intermediate_size": 44})
    with pytest.raises(SpecError) as caught:
        convert(request((wider, folder), tmp_path / "out"))
    (told,) = [d.message for d in caught.value.diagnostics if d.code == "wrong-shape"]
    assert (
        "model.layers.0.mlp.gate_proj.weight is [40, 48], and layers.0.mlp.gate_up_proj.weight needs [44, 48]" in told
    )
    assert told.endswith("; and 1 more")
    tied = make_spec(tmp_path, **QWEN3 | {"num_hidden_layers": 1})
    assert refusal(request((tied, folder), tmp_path / "out"))[0] == "unknown-tensor"
    convert(request((spec, folder), tmp_path / "done"))
    assert refusal(request((spec, tmp_path / "done"), tmp_path / "out"))[0] == "already-quantized"


def test_checkpoints_that_are_not_whole(source: Any, tmp_path: Path) -> None:
    spec, folder = source(shards=2)
    _, second = sorted(folder.glob("*.safetensors"))
    content = second.read_bytes()
    second.write_bytes(content[:-1])
    assert refusal(request((spec, folder), tmp_path / "out"))[0] == "checkpoint"
    second.unlink()
    with pytest.raises(SpecError, match=r"safetensors cannot be read: No such file"):
        convert(request((spec, folder), tmp_path / "out"))
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("value", "scheme", "code"),
    [
        (np.nan, SCHEMES[0], "not-finite"),
        (np.inf, SCHEMES[2], "not-finite"),
        (-np.inf, SCHEMES[0], "not-finite"),
        (-7 * 65520.0, SCHEMES[2], "scale-too-large"),
    ],
)
def test_weights_that_cannot_be_rounded(source: Any, tmp_path: Path, value: float, scheme: Any, code: str) -> None:
    spec, folder = source("float32")
    weights = random_weights(spec, 0)
    weights["model.layers.1.self_attn.o_proj.weight"][3, 2] = value
    save_checkpoint(spec, weights, folder, "float32")
    found, message = refusal(request((spec, folder), tmp_path / "out", scheme))
    assert found == code
    assert "`model.layers.1.self_attn.o_proj.weight` cannot be" in message


def test_a_full_disk(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(source(), tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(conversion.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
        assert refusal(asked)[0] == "no-space"

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(conversion, "_copy", full)
        assert refusal(asked)[0] == "no-space"
    convert(asked)
    assert import_path(asked.out).spec.quantization == asked.quantization


# -------------------------------------------------------------------------------------------------------- memory

_MEASURE = """
import resource, sys
from pathlib import Path
from qwenspec.convert.convert import Request, convert
from qwenspec.spec.load import load
from qwenspec.spec.quantization import Int4
import numpy
folder, spec, out = sys.argv[1:]
request = Request(Path(folder), load(spec), Int4(scheme="int4", group_size=32, head="int4"), Path(out))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(request)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_stays_small_beside_a_tensor(tmp_path: Path) -> None:
    """Two matrices of 128 MiB, and every other of less than one, in a file of holes."""
    spec = make_spec(tmp_path, **QWEN3 | {"num_hidden_layers": 1, "vocab_size": 1 << 17, "hidden_size": 512})
    from qwenspec.ir.lower import lower

    entries, end = {}, 0
    for param in lower(spec).params():
        for tensor in param.sources:
            shape = [tensor.rows, *param.shape[1:]]
            start, end = end, end + 2 * int(np.prod(shape))
            entries[tensor.tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    folder = tmp_path / "zeros"
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    command = [sys.executable, "-c", _MEASURE, str(folder), str(tmp_path / "spec.yaml"), str(tmp_path / "out")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)  # KiB
    assert grown < 32 << 10
