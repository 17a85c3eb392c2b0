"""config.json to a spec: what the file says, checked against what the checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, get_args

from qwenspec import source
from qwenspec import tree as source_tree
from qwenspec.diagnostics import listed
from qwenspec.hf import quantization, qwen1, qwen2, tensors
from qwenspec.hf.config import Config, Report
from qwenspec.hf.harmless import FIXED
from qwenspec.hf.tensors import Held
from qwenspec.hf.writer import write_spec
from qwenspec.spec.architecture import Architecture
from qwenspec.spec.base import Dtype
from qwenspec.spec.check import check
from qwenspec.spec.checkpoint import Layout
from qwenspec.spec.document import BESIDE, Spec
from qwenspec.spec.layout import builtin

FAMILIES = {"qwen": "qwen1", "qwen2": "qwen2", "qwen3": "qwen3"}
BACKBONES = {"qwen": "QWenModel", "qwen2": "Qwen2Model", "qwen3": "Qwen3Model"}
LANGUAGE_MODELS = {"qwen": "QWenLMHeadModel", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ImportResult:
    """A spec document with one variant, that variant, and what a person should know about it."""

    tree: Tree
    notes: tuple[str, ...]
    spec: Spec


def import_config(
    config: Mapping[str, Any],
    *,
    name: str,
    source_file: str = "config.json",
    root: source_tree.Mapping | None = None,
    held: Held | None = None,
    normalize: bool | None = None,
    ignore: tuple[str, ...] = (),
) -> ImportResult:
    """The spec of a config.json of model type qwen, qwen2 or qwen3.

    `root` is the parsed file, for places in diagnostics. `held` is what the checkpoint holds: it and tying are checked
    against the config, and a released embedding model is known by its tensors. `normalize` is given where
    sentence-transformers' modules.json makes it an embedding model: whether that divides by the norm. `ignore` are
    patterns (fnmatch) of tensors that nobody needs.

    Raises SpecError with everything that is missing, wrong, contradictory or read by nobody.
    """
    report = Report(source_file, root)
    keys = Config(config, report)
    model_type = keys.choice("model_type", tuple(FAMILIES))
    if model_type is None:
        report.check()
    assert model_type is not None, "a model type that is not allowed was reported"
    architecture = qwen1.read(keys) if model_type == "qwen" else qwen2.read(keys, model_type == "qwen3")
    architecture |= {"dtype": _dtype(keys, held)} | _head(keys, model_type, held, normalize)
    layout = Layout.model_validate(source_tree.plain(builtin(architecture["checkpoint"]["layout"])))
    if ignore:
        architecture["checkpoint"]["ignore"] = list(ignore)
    has_head = not architecture["tie_word_embeddings"] and architecture.get("lm_head", True) is not None
    quantized = quantization.read(keys, layout, architecture["num_hidden_layers"] or 0, has_head)
    for key, (allowed, why) in FIXED.items():
        keys.fixed(key, *allowed, why=why)
    keys.report_unread()
    report.check()
    tree: Tree = {
        "schema_version": 1,
        "family": FAMILIES[model_type],
        "description": f"Imported from {'/'.join(PurePath(source_file).parts[-2:])}.",
        "default_variant": name,
        "architecture": {key: architecture[key] for key in Architecture.model_fields if key in architecture},
        "quantization": quantized,
        "variants": {name: {}},
    }
    spec = _spec(tree, report)
    if held is not None:
        tensors.check(spec, held, report)
        report.check()
    return ImportResult(tree, tuple(report.notes), spec)


def _dtype(config: Config, held: Held | None) -> str | None:
    """The weights' dtype: dtype, torch_dtype, params_dtype or Qwen-1's three flags, which must agree."""
    found: dict[str, str] = {}
    for key in ("dtype", "torch_dtype", "params_dtype"):
        value = config.get(key)
        if value not in (None, "auto"):
            found[key] = str(value).removeprefix("torch.")
    for key, dtype in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")):
        if config.get(key):
            found[key] = dtype
    for key, dtype in found.items():
        if dtype not in get_args(Dtype):
            config.error("wrong-value", f"`{key}` is {dtype}, not {listed(get_args(Dtype))}", key)
    if len(set(found.values())) > 1:
        said = " and ".join(f"`{key}` {dtype}" for key, dtype in found.items())
        config.error("conflict", f"the dtype is given twice: {said}", list(found)[-1])
    if found:
        return next(iter(found.values()))
    if held is not None and (stored := tensors.main_dtype(held)):
        config.note(f"The dtype is not given: {stored}, that of the checkpoint's tensors.")
        return stored
    config.note("The dtype is not given: bfloat16, in which Qwen models are released.")
    return "bfloat16"


def _head(config: Config, model_type: str, held: Held | None, normalize: bool | None) -> Tree:
    """Tying, what the model returns, and the checkpoint's layout."""
    backbone = _is_backbone(config, model_type) or normalize is not None
    tied = config.flag("tie_word_embeddings", default=False)
    if model_type == "qwen":
        if backbone:
            config.error("unsupported-architecture", "Qwen-1 has no embedding models", "architectures")
        return {"tie_word_embeddings": tied, "checkpoint": {"layout": "qwen1"}}
    names = None if held is None else held.names
    prefixless = backbone if names is None else tensors.is_prefixless(names)
    checkpoint = {"layout": "qwen3_embedding" if prefixless else "qwen2"}
    # Qwen3-Embedding's config.json claims to be a language model: its tensors tell, and its modules.json.
    if backbone or (names is not None and prefixless and not tensors.has_head(names)):
        return {
            "tie_word_embeddings": False,
            "lm_head": None,
            "embedding": {"normalize": normalize is not False},
            "checkpoint": checkpoint,
        }
    return {"tie_word_embeddings": tied, "checkpoint": checkpoint}


def _is_backbone(config: Config, model_type: str) -> bool:
    """Whether `architectures` is the decoder without an LM head: an embedding model."""
    architectures = config.names("architectures")
    known = (LANGUAGE_MODELS[model_type], BACKBONES[model_type])
    for name in architectures:
        if name not in known:
            message = f"`architectures` has {name}; for {model_type} {listed(known)} are supported"
            config.error("unsupported-architecture", message, "architectures")
    return BACKBONES[model_type] in architectures


def _spec(tree: Tree, report: Report) -> Spec:
    """The document's one variant, read back from its text, so that every rule of a spec file holds."""
    root = source.parse(write_spec(tree), report.file).root
    merged = {key: entry for key, entry in root.entries.items() if key in ("architecture", *BESIDE)}
    name, family, description = tree["default_variant"], tree["family"], tree["description"]
    spec, findings = check(source_tree.Mapping(merged, root.location), name, family, description, report.file)
    for finding in findings:
        keys = [step for step in finding.path if isinstance(step, str)]
        told = finding.diagnostic
        report.error(told.code, told.message, report.find(keys[-1]), told.hint)
    report.check()
    assert spec is not None, "a spec without findings is complete"
    return spec
