"""`show` and `plan`: facts of a model as data, and the text that shows them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from qwenspec.commands.console import counted, shown_bytes
from qwenspec.diagnostics import Diagnostic, SpecError
from qwenspec.ir import cost, shard
from qwenspec.ir.lower import lower
from qwenspec.ir.nodes import EmbeddingHead, Model
from qwenspec.ir.render import describe, render, spans
from qwenspec.spec.document import Spec

Data = dict[str, Any]
ROUNDING = {"activation": "cos and sin rounded to the model's dtype", "float32": "rotated in float32"}
USUAL_CONTEXT = 4096  # tokens, when nobody says how many

# ------------------------------------------------------------------------------------------------------- show


def show(spec: Spec, context: int | None = None) -> Data:
    """Sizes and costs, in full precision; FLOPs are those of a token that sees `context` tokens."""
    model = lower(spec)
    first, mlp, head = model.layers[0].mixer, model.layers[0].feed_forward, model.head
    architecture = spec.architecture
    context = _context(model, context)
    return {
        "variant": model.name,
        "family": model.family,
        "spec": model.spec_file,
        "sha256": model.spec_sha256,
        "dtype": model.dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": len(model.layers),
        "max_position_embeddings": model.max_position_embeddings,
        "attention": {
            "num_heads": first.num_heads,
            "num_kv_heads": first.num_kv_heads,
            "head_dim": first.head_dim,
            "bias": architecture.attention.bias.model_dump(),
            "qk_norm": architecture.attention.qk_norm,
            "logn": asdict(first.logn) if first.logn else None,
            "windows": _windows(model),
        },
        "rope": {
            "theta": model.rope.theta,
            "rotary_dim": model.rope.rotary_dim,
            "compute_dtype": model.rope.compute_dtype,
            "attention_factor": model.rope.attention_factor,
            "scaling": architecture.rope.scaling.model_dump() if architecture.rope.scaling else None,
        },
        "mlp": architecture.mlp.model_dump() | {"intermediate_size": mlp.intermediate_size},
        "head": "embedding" if isinstance(head, EmbeddingHead) else "tied" if head.tied else "linear",
        "quantization": spec.quantization.model_dump() if spec.quantization else None,
        "kv_cache": spec.kv_cache.model_dump() if spec.kv_cache else None,
        "parameters": asdict(cost.count_parameters(model)),
        "weight_bytes": cost.weight_bytes(model),
        "kv_bytes_per_token": cost.kv_bytes_per_token(model),
        "flops_per_token": {"context": context, "flops": cost.flops_per_token(model, context)},
    }


def _context(model: Model, asked: int | None) -> int:
    """Tokens of a sequence: as many as are asked for, if the model has so many positions."""
    context = asked or min(USUAL_CONTEXT, model.max_position_embeddings)
    if context > model.max_position_embeddings:
        message = f"{model.name} has {model.max_position_embeddings:,} positions, not {context:,}"
        raise SpecError([Diagnostic("context-too-long", message, hint="lower --context, or scale RoPE")])
    return context


def _windows(model: Model) -> list[Data]:
    """Every attention span and the layers that have it; null is the whole context."""
    layers: dict[int | None, list[int]] = {}
    for layer in model.layers:
        layers.setdefault(layer.mixer.window, []).append(layer.index)
    return [{"window": window, "layers": indices} for window, indices in layers.items()]


def show_text(data: Data) -> str:
    parameters, flops = data["parameters"], data["flops_per_token"]
    attention, rope, mlp = data["attention"], data["rope"], data["mlp"]
    head = {"tied": "tied to the embedding", "linear": f"{parameters['head']:,} parameters of its own"}
    biases = [part for part, present in attention["bias"].items() if present]
    features = ["per-head QK-norm"] * (attention["qk_norm"] == "per_head")
    features += [f"bias on {' and '.join(biases)}"] if biases else []
    features += [f"LogN beyond {attention['logn']['train_length']:,} tokens"] if attention["logn"] else []
    layers = data["num_hidden_layers"]
    rows = {
        "parameters": f"{parameters['total']:,}",
        "  embedding": f"{parameters['embedding']:,}  ({data['vocab_size']:,} × {data['hidden_size']:,})",
        "  layers": f"{layers} × {parameters['per_layer']:,}",
        "  head": head.get(data["head"], "none: the last token's hidden state"),
        "weights": f"{shown_bytes(data['weight_bytes'])} in {_stored(data)}",
        "KV cache": f"{shown_bytes(data['kv_bytes_per_token'])} a token in {_kv_cache(data)}",
        "compute": f"{flops['flops'] / 1e9:,.2f} GFLOP a token that sees {flops['context']:,}",
        "context": f"{data['max_position_embeddings']:,} tokens",
        "attention": ", ".join([_heads(attention), *features]),
        "  span": ", ".join(_window(entry, layers) for entry in attention["windows"]),
        "rope": f"theta {rope['theta']:,.0f}, {rope['rotary_dim']} of {attention['head_dim']} values, "
        f"{ROUNDING[rope['compute_dtype']]}{_scaling(rope)}",
        "mlp": f"{mlp['activation']}, width {mlp['intermediate_size']:,}" + ", with biases" * mlp["bias"],
        "quantization": _quantization(data["quantization"]),
    }
    title = f"{data['variant']}  (family {data['family']}, {data['spec']}, sha256 {data['sha256'][:12]})"
    return "\n".join([title, *table(rows.items())])


def _stored(data: Data) -> str:
    quantization = data["quantization"]
    return data["dtype"] if quantization is None else f"{quantization['scheme']} and {data['dtype']}"


def _kv_cache(data: Data) -> str:
    kv_cache = data["kv_cache"]
    if kv_cache is None:
        return str(data["dtype"])
    scales = "the checkpoint's scales" if kv_cache.get("scales") == "checkpoint" else "a scale a token and head"
    return f"{kv_cache['scheme']}, {scales}"


def _heads(attention: Data) -> str:
    queries, keys, width = (attention[key] for key in ("num_heads", "num_kv_heads", "head_dim"))
    return f"{counted(queries, 'query head')} on {counted(keys, 'key/value head')} of {width}"


def _window(entry: Data, layers: int) -> str:
    span = "the whole context" if entry["window"] is None else f"a window of {entry['window']:,} tokens"
    return span if len(entry["layers"]) == layers else f"{span} in layers {spans(entry['layers'])}"


def _scaling(rope: Data) -> str:
    if rope["scaling"] is None:
        return ""
    scaling = rope["scaling"]
    facts = [f"{key} {value}" for key, value in scaling.items() if isinstance(value, int | float)]
    return f", {scaling['kind']} scaling ({', '.join(facts)})"


def _quantization(quantization: Data | None) -> str:
    if quantization is None:
        return "none"
    facts = [f"{key} {value}" for key, value in quantization.items() if key not in ("scheme", "skip")]
    skipped = [f"but for {counted(len(quantization['skip']), 'module')}"] if quantization["skip"] else []
    return ", ".join([f"{quantization['scheme']} ({', '.join(facts)})" if facts else quantization["scheme"], *skipped])


# ------------------------------------------------------------------------------------------ the whole program


def program(spec: Spec) -> dict[str, dict[str, str]]:
    """Every fact of the IR: section -> address -> text."""
    return describe(lower(spec))


def program_text(spec: Spec) -> str:
    return render(lower(spec)).rstrip()


# ------------------------------------------------------------------------------------------------------- plan


def plan(spec: Spec, degree: int, context: int | None, batch: int) -> Data:
    """What each rank holds and how many bytes it needs. Raises SpecError when the degree is illegal."""
    model = lower(spec)
    context = _context(model, context)
    split = shard.plan(model, degree)
    memory = cost.memory(model, split, context, batch)
    return {
        "variant": model.name,
        "degree": degree,
        "legal_degrees": shard.legal_degrees(model),
        "refused_by_format": shard.refused_by_format(model),
        "context": context,
        "batch": batch,
        "page_size": cost.PAGE_SIZE,
        "prefill_chunk": cost.PREFILL_CHUNK,
        "per_rank": {
            "num_heads": split.num_heads,
            "num_kv_heads": split.num_kv_heads,
            "kv_head_indices": split.kv_head_indices,
            "intermediate_size": split.intermediate_size,
            "vocab_size": split.vocab_size,
        },
        "parameters": [_share(param) for param in split.params],
        "bytes": asdict(memory) | {"total": memory.total},
        "quantization": spec.quantization.model_dump() if spec.quantization else None,
        "kv_cache": spec.kv_cache.model_dump() if spec.kv_cache else None,
    }


def _share(share: shard.ShardedParam) -> Data:
    param = share.param
    return {"name": param.name, "shard": param.shard.value, "shape": param.shape, "rank_shape": share.shape}


def plan_text(data: Data) -> str:
    rank, size = data["per_rank"], data["bytes"]
    owners = rank["kv_head_indices"]
    repeated = len({head for heads in owners for head in heads}) < sum(map(len, owners))
    queries, keys = counted(rank["num_heads"], "query head"), counted(rank["num_kv_heads"], "key/value head")
    facts = {
        "attention": f"{queries} on {keys}" + (", each held by several ranks" if repeated else ""),
        "mlp width": f"{rank['intermediate_size']:,}",
        "vocabulary": f"{rank['vocab_size']:,} rows",
    }
    memory = {
        "weights": shown_bytes(size["weights"]),
        "KV cache": f"{shown_bytes(size['kv_cache'])}  ({size['kv_pages']:,} pages of {data['page_size']} tokens)",
        "activations": f"{shown_bytes(size['activations'])}  (prefill of up to {data['prefill_chunk']:,} tokens)",
        "logits": shown_bytes(size["logits"]),
        "CUDA graphs": f"{shown_bytes(size['graphs'])}  (decode steps, at most)",
        "total": f"{shown_bytes(size['total'])}  and what CUDA, cuBLAS and NCCL take for themselves",
    }
    legal = ", ".join(map(str, data["legal_degrees"]))
    return "\n".join(
        [
            f"{data['variant']} on {counted(data['degree'], 'rank')}, {data['batch']} × {data['context']:,} tokens",
            *table(facts.items()),
            "",
            "memory of a rank on a GPU",
            *table(memory.items()),
            "",
            "parameters of a rank",
            *table(map(_share_text, _alike(data["parameters"]))),
            "",
            f"degrees that work: {legal}",
            *(f"  not {degree}: {'; '.join(reasons)}" for degree, reasons in data["refused_by_format"].items()),
        ]
    )


def _alike(parameters: Sequence[Data]) -> list[Data]:
    """Every layer has the same parameters: those of layer 0 stand for all, under `layers.*`."""
    first = [p for p in parameters if not re.match(r"layers\.[1-9]", p["name"])]
    return [p | {"name": p["name"].replace("layers.0.", "layers.*.")} for p in first]


def _share_text(parameter: Data) -> tuple[str, str]:
    whole, part = (" × ".join(map(str, parameter[key])) for key in ("shape", "rank_shape"))
    return parameter["name"], part if whole == part else f"{part}  of {whole}, split by {parameter['shard']}"


# ------------------------------------------------------------------------------------------------------- text


def table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Indented lines of two aligned columns."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:{width}}  {text}".rstrip() for name, text in rows]
