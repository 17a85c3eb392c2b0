"""What must hold between the fields of a spec: each rule a function, and the paths that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qwenspec.diagnostics import listed, nearest
from qwenspec.spec.architecture import Architecture
from qwenspec.spec.attention import LayersFrom
from qwenspec.spec.checkpoint import Layout
from qwenspec.spec.document import Spec
from qwenspec.spec.kv_cache import Fp8KvCache
from qwenspec.spec.quantization import Awq, Gptq
from qwenspec.spec.rope import Dynamic, DynamicQwen1, Llama3, LongRope, Ntk, Yarn
from qwenspec.tree import Path_

SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # normal numbers in float32


@dataclass(frozen=True, slots=True)
class Mistake:
    """What is wrong, and the path in the spec of the value to change."""

    path: Path_
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """`reads`: the parts of a spec that must be valid for the rule to be applied."""

    code: str
    reads: tuple[Path_, ...]
    check: Callable[[Spec], Iterator[Mistake]]


RULES: list[Rule] = []


Check = Callable[[Spec], Iterator[Mistake]]


def rule(code: str, *reads: str) -> Callable[[Check], Check]:
    """Registers a rule; `reads` are dotted paths, inside the architecture unless they begin with a top-level key."""

    def register(check: Check) -> Check:
        paths = (tuple(path.split(".")) for path in reads)
        RULES.append(Rule(code, tuple(p if p[0] in _TOP else ("architecture", *p) for p in paths), check))
        return check

    return register


_TOP = ("layout", "quantization", "kv_cache")
_HEADS = ("hidden_size", "num_attention_heads", "attention.head_dim")


def _arch(*path: str | int) -> Path_:
    return ("architecture", *path)


def _head_dim(arch: Architecture) -> int:
    return arch.attention.head_dim or arch.hidden_size // arch.num_attention_heads


def _head_dim_is_whole(arch: Architecture) -> bool:
    return arch.attention.head_dim is not None or arch.hidden_size % arch.num_attention_heads == 0


def _rotary_dim(arch: Architecture) -> int:
    return int(_head_dim(arch) * arch.rope.partial_rotary_factor)


# ------------------------------------------------------------------------------------------------- attention


@rule("heads-do-not-divide", *_HEADS)
def heads_divide_hidden_size(spec: Spec) -> Iterator[Mistake]:
    arch = spec.architecture
    if not _head_dim_is_whole(arch):
        message = f"{arch.num_attention_heads} heads do not divide hidden_size, {arch.hidden_size}"
        yield Mistake(_arch("num_attention_heads"), message, "set `attention.head_dim` if the heads' width is its own")


@rule("kv-heads-do-not-divide", "num_attention_heads", "num_key_value_heads")
def kv_heads_divide_heads(spec: Spec) -> Iterator[Mistake]:
    arch = spec.architecture
    heads, kv_heads = arch.num_attention_heads, arch.num_key_value_heads
    if kv_heads and heads % kv_heads:
        legal = [str(n) for n in range(1, heads + 1) if heads % n == 0][-12:] if heads < 10**6 else []
        hint = f"possible here: {', '.join(legal)}" if legal else ""
        message = f"{kv_heads} key/value heads do not divide {heads} attention heads"
        yield Mistake(_arch("num_key_value_heads"), message, hint)


@rule("sliding-layers", "num_hidden_layers", "attention.sliding_window")
def sliding_layers_exist(spec: Spec) -> Iterator[Mistake]:
    sliding, count = spec.architecture.attention.sliding_window, spec.architecture.num_hidden_layers
    path = _arch("attention", "sliding_window", "layers")
    match sliding and sliding.layers:
        case None | "all":
            return
        case LayersFrom(from_=first):
            # From the layer after the last is what released configs say when none slides.
            if first > count:
                message = f"`from` is {first}, but there are {count} layers"
                yield Mistake((*path, "from"), message, f"`from: {count}` means that no layer slides")
        case ():
            yield Mistake(path, "no layer slides", "write `sliding_window: null`")
        case tuple(layers):
            for position, layer in enumerate(layers):
                if layer >= count:
                    message = f"there is no layer {layer}: the layers are 0 to {count - 1}"
                    yield Mistake((*path, position), message)
                elif position and layer <= layers[position - 1]:
                    message = f"layer {layer} does not come after layer {layers[position - 1]}"
                    yield Mistake((*path, position), message, "list each layer once, in order")


# ---------------------------------------------------------------------------------- rotary position embedding


@rule("rotary-dim", *_HEADS, "rope")
def rotary_dim_is_even(spec: Spec) -> Iterator[Mistake]:
    arch = spec.architecture
    if not _head_dim_is_whole(arch):
        return
    dim, scaling = _rotary_dim(arch), arch.rope.scaling
    factor = arch.rope.partial_rotary_factor
    written = arch.attention.head_dim is not None
    rotates = f"{dim} values of each head rotate" + (f" ({factor:g} of {_head_dim(arch)})" if factor != 1 else "")
    path = _arch("attention", "head_dim") if written else _arch("hidden_size")
    path = _arch("rope", "partial_rotary_factor") if factor != 1 else path
    if dim % 2 or dim == 0:
        yield Mistake(path, f"{rotates}; the number must be even and above 0, as they rotate in pairs")
    elif dim == 2 and isinstance(scaling, Ntk | Dynamic | DynamicQwen1):
        message = f"{rotates}; `{scaling.kind}` needs more than 2, as its formula has d / (d - 2)"
        yield Mistake(path, message)


@rule("longrope-length", *_HEADS, "rope")
def longrope_has_a_divisor_a_pair(spec: Spec) -> Iterator[Mistake]:
    arch, scaling = spec.architecture, spec.architecture.rope.scaling
    if isinstance(scaling, LongRope) and _head_dim_is_whole(arch):
        pairs = _rotary_dim(arch) // 2
        for key, divisors in (("short_factor", scaling.short_factor), ("long_factor", scaling.long_factor)):
            if len(divisors) != pairs:
                message = f"`{key}` has {len(divisors)} values; there are {pairs} rotating pairs in a head"
                yield Mistake(_arch("rope", "scaling", key), message)


@rule("norm-eps", "norm")
def eps_is_a_normal_float32(spec: Spec) -> Iterator[Mistake]:
    """What is smaller GPUs take for 0."""
    eps = spec.architecture.norm.eps
    if eps < SMALLEST:
        message = f"`eps` is {eps:g}, and the smallest normal float32 number, as norms compute, is {SMALLEST:.3g}"
        yield Mistake(_arch("norm", "eps"), message, "1e-6 is usual")


@rule("rope-range", "rope")
def frequencies_are_float32(spec: Spec) -> Iterator[Mistake]:
    """A power of what is larger would be infinite even in float64."""
    rope = spec.architecture.rope
    numbers = {("theta",): rope.theta, ("scaling", "factor"): getattr(rope.scaling, "factor", None)}
    for place, value in numbers.items():
        if value is not None and value > LARGEST:
            message = f"`{place[-1]}` is {value:g}, beyond float32, in which frequencies are: at most {LARGEST:.3g}"
            yield Mistake(_arch("rope", *place), message)


@rule("yarn-betas", "rope.scaling")
def yarn_ramp_rises(spec: Spec) -> Iterator[Mistake]:
    scaling = spec.architecture.rope.scaling
    if isinstance(scaling, Yarn) and scaling.beta_fast <= scaling.beta_slow:
        message = f"`beta_fast`, {scaling.beta_fast:g}, must be above `beta_slow`, {scaling.beta_slow:g}"
        yield Mistake(_arch("rope", "scaling", "beta_fast"), message, "they count rotations; 32 and 1 are usual")


@rule("yarn-mscale", "rope.scaling")
def yarn_mscales_come_together(spec: Spec) -> Iterator[Mistake]:
    scaling = spec.architecture.rope.scaling
    if isinstance(scaling, Yarn) and (scaling.mscale is None) != (scaling.mscale_all_dim is None):
        given, absent = ("mscale", "mscale_all_dim")[:: 1 if scaling.mscale is not None else -1]
        message = f"`{given}` is only read together with `{absent}`"
        yield Mistake(_arch("rope", "scaling", given), message, f"set `{absent}` too, or remove `{given}`")


@rule("llama3-frequencies", "rope.scaling")
def llama3_band_has_a_width(spec: Spec) -> Iterator[Mistake]:
    scaling = spec.architecture.rope.scaling
    if isinstance(scaling, Llama3) and scaling.high_freq_factor <= scaling.low_freq_factor:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        message = f"`high_freq_factor`, {high:g}, must be above `low_freq_factor`, {low:g}"
        yield Mistake(_arch("rope", "scaling", "high_freq_factor"), message)


@rule("original-length", "max_position_embeddings", "rope.scaling")
def original_length_is_not_beyond(spec: Spec) -> Iterator[Mistake]:
    scaling, longest = spec.architecture.rope.scaling, spec.architecture.max_position_embeddings
    if isinstance(scaling, Yarn | LongRope | Llama3) and scaling.original_max_position_embeddings > longest:
        original = scaling.original_max_position_embeddings
        message = f"the original length, {original}, is beyond `max_position_embeddings`, {longest}"
        yield Mistake(_arch("rope", "scaling", "original_max_position_embeddings"), message)


# ------------------------------------------------------------------------------------------------------ head


@rule("one-head", "lm_head", "embedding")
def one_head(spec: Spec) -> Iterator[Mistake]:
    arch = spec.architecture
    if arch.lm_head is not None and arch.embedding is not None:
        message = "a text-embedding model has no LM head"
        yield Mistake(_arch("embedding"), message, "write `lm_head: null`, or remove `embedding`")
    if arch.lm_head is None and arch.embedding is None:
        message = "the model returns nothing: `lm_head` is null and there is no `embedding`"
        yield Mistake(_arch("lm_head"), message, "remove `lm_head: null`, or add `embedding: {}`")


# ---------------------------------------------------------------------------------------------------- layout


@rule("layout-index", "layout")
def layer_has_an_index(spec: Spec) -> Iterator[Mistake]:
    layer = spec.layout.layer
    if layer.count("{i}") != 1 or set("{}") & set(layer.replace("{i}", "")):
        message = f'`layer` must hold `{{i}}`, the layer\'s index, once; found "{layer}"'
        yield Mistake(("layout", "layer"), message, "for example `model.layers.{i}`")
    for path, _, name in _module_names(spec.layout):
        if "{i}" in name:
            message = f"`{{i}}` in `{name}`: a layer's index stands in the name of `layer` alone"
            yield Mistake(path, message, "write the name as the checkpoint has it")


@rule("layout-parts", "layout")
def fused_parts(spec: Spec) -> Iterator[Mistake]:
    qkv, gate_up = spec.layout.attention.qkv, spec.layout.mlp.gate_up
    if len(qkv) not in (1, 3):
        message = f"`qkv` must list 3 names (q, k, v) or 1 (fused in that order); found {len(qkv)}"
        yield Mistake(("layout", "attention", "qkv"), message)
    if len(gate_up) not in (1, 2):
        message = f"`gate_up` must list 2 names (gate, up) or 1 (fused in that order); found {len(gate_up)}"
        yield Mistake(("layout", "mlp", "gate_up"), message)


@rule("layout-names", "layout")
def distinct_modules(spec: Spec) -> Iterator[Mistake]:
    seen: dict[tuple[bool, str], Path_] = {}
    for path, inside_layer, name in _module_names(spec.layout):
        if name.endswith((".weight", ".bias")):
            message = f"`{name}` names a tensor; `.weight` and `.bias` are appended to a module's name"
            yield Mistake(path, message, f"write `{name.rpartition('.')[0]}`")
        first = seen.setdefault((inside_layer, name), path)
        if first != path:
            yield Mistake(path, f"`{name}` is already the name of `{'.'.join(map(str, first[1:]))}`")


def _module_names(layout: Layout) -> Iterator[tuple[Path_, bool, str]]:
    """Every module name with its path, and whether it is inside a layer."""
    attention, mlp = layout.attention, layout.mlp
    yield ("layout", "embedding"), False, layout.embedding
    yield ("layout", "norm"), False, layout.norm
    yield ("layout", "lm_head"), False, layout.lm_head
    yield ("layout", "input_norm"), True, layout.input_norm
    yield ("layout", "post_attention_norm"), True, layout.post_attention_norm
    for index, name in enumerate(attention.qkv):
        yield ("layout", "attention", "qkv", index), True, name
    for key, module in (("o", attention.o), ("q_norm", attention.q_norm), ("k_norm", attention.k_norm)):
        if module is not None:
            yield ("layout", "attention", key), True, module
    for index, name in enumerate(mlp.gate_up):
        yield ("layout", "mlp", "gate_up", index), True, name
    yield ("layout", "mlp", "down"), True, mlp.down


@rule("layout-qk-norm", "layout", "attention.qk_norm", "checkpoint")
def qk_norm_has_names(spec: Spec) -> Iterator[Mistake]:
    names = spec.layout.attention
    absent = [key for key in ("q_norm", "k_norm") if getattr(names, key) is None]
    if spec.architecture.attention.qk_norm != "none" and absent:
        message = f"the checkpoint layout has no name for {listed(absent, 'and')}"
        yield Mistake(_arch("attention", "qk_norm"), message, "add it to the layout, or choose another layout")


@rule("layout-kv-scales", "layout", "kv_cache")
def kv_scales_have_names(spec: Spec) -> Iterator[Mistake]:
    stored = isinstance(spec.kv_cache, Fp8KvCache) and spec.kv_cache.scales == "checkpoint"
    if stored and spec.layout.attention.kv_scales is None:
        hint = "add it to the layout, or choose `scales: token`"
        yield Mistake(("kv_cache", "scales"), "the checkpoint layout has no name for `kv_scales`", hint)


# ---------------------------------------------------------------------------------------------- quantisation

_SIZES = (*_HEADS, "num_key_value_heads", "intermediate_size", "quantization")


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A quantised matrix: the layout's names of its parts, their rows, and its columns."""

    keys: str
    names: tuple[str, ...]
    parts: tuple[tuple[str, int], ...]
    columns: int

    @property
    def stored(self) -> tuple[tuple[str, int], ...]:
        """The parts as they lie on disk: all in one when they are fused there."""
        return ((self.keys, sum(rows for _, rows in self.parts)),) if len(self.names) == 1 else self.parts


def _matrices(spec: Spec) -> Iterator[_Matrix]:
    """The linear modules of a layer that are quantised in at least one layer."""
    arch, layout = spec.architecture, spec.layout
    width, hidden, inner = _head_dim(arch), arch.hidden_size, arch.intermediate_size
    queries = arch.num_attention_heads * width
    keys = (arch.num_key_value_heads or arch.num_attention_heads) * width
    skipped = set(spec.quantization.skip) if spec.quantization else set()
    if not _head_dim_is_whole(arch):
        return
    for matrix in (
        _Matrix("qkv", layout.attention.qkv, (("q", queries), ("k", keys), ("v", keys)), hidden),
        _Matrix("o", (layout.attention.o,), (("o", hidden),), queries),
        _Matrix("gate_up", layout.mlp.gate_up, (("gate", inner), ("up", inner)), hidden),
        _Matrix("down", (layout.mlp.down,), (("down", hidden),), inner),
    ):
        if any(name not in skipped for name in _in_every_layer(spec, matrix.names)):
            yield matrix


def _in_every_layer(spec: Spec, names: tuple[str, ...]) -> list[str]:
    """The full checkpoint names of modules inside layers."""
    layers = [spec.layout.layer.replace("{i}", str(i)) for i in range(spec.architecture.num_hidden_layers)]
    return [f"{layer}.{name}" for layer in layers for name in names]


@rule("unknown-module", "quantization", "layout", "num_hidden_layers")
def skipped_modules_exist(spec: Spec) -> Iterator[Mistake]:
    if spec.quantization is None or not spec.quantization.skip:
        return
    layout = spec.layout
    inside = (*layout.attention.qkv, layout.attention.o, *layout.mlp.gate_up, layout.mlp.down)
    modules = dict.fromkeys([*_in_every_layer(spec, inside), layout.embedding, layout.lm_head])
    for position, name in enumerate(spec.quantization.skip):
        if name not in modules:
            close = nearest(name, modules)
            hint = f"did you mean `{close}`? " if close else ""
            example = layout.layer.replace("{i}", "0")
            yield Mistake(
                ("quantization", "skip", position),
                f"the checkpoint has no linear module `{name}`",
                f"{hint}A name is written in full, such as `{example}.{layout.mlp.down}`",
            )


@rule("group-does-not-divide", *_SIZES, "layout", "num_hidden_layers")
def groups_divide_inputs(spec: Spec) -> Iterator[Mistake]:
    """AutoAWQ's groups are whole; the other formats' last group may be smaller."""
    if isinstance(spec.quantization, Awq):
        size = spec.quantization.group_size
        for columns, names in _by_size((m.keys, m.columns) for m in _matrices(spec)).items():
            if columns % size:
                message = f"groups of {size} do not divide the {columns} inputs of {names}"
                yield Mistake(("quantization", "group_size"), message)


@rule("packing-does-not-divide", *_SIZES, "layout", "num_hidden_layers")
def packing_divides(spec: Spec) -> Iterator[Mistake]:
    """An int32 holds neighbouring outputs of AWQ's values; of GPTQ's values inputs, and of its zero points outputs."""
    match spec.quantization:
        case Awq(bits=bits):
            axes = ["outputs"]
        case Gptq(bits=bits):
            axes = ["inputs", "outputs"]
        case _:
            return
    packed = 32 // bits
    for axis in axes:
        sizes = [(m.keys, m.columns) for m in _matrices(spec)]
        if axis == "outputs":
            sizes = [part for m in _matrices(spec) for part in m.stored]
        for size, names in _by_size(sizes).items():
            if size % packed:
                message = f"the {size} {axis} of {names} do not fill words of {packed} values"
                yield Mistake(("quantization", "scheme"), message, "list the modules in `skip`")


def _by_size(sizes: Iterator[tuple[str, int]] | list[tuple[str, int]]) -> dict[int, str]:
    """{4096: "q and up", …}: one entry a size, so that one mistake is told once."""
    names: dict[int, list[str]] = {}
    for name, size in sizes:
        names.setdefault(size, []).append(name)
    return {size: listed(dict.fromkeys(found), "and") for size, found in names.items()}
