"""The float64 reference as a whole: structure, sequences that grow, length-dependent RoPE, wrong weights."""

from __future__ import annotations

import ast
import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

import qwenspec.spec
from qwenspec.spec.architecture import Architecture
from qwenspec.spec.checkpoint import Layout
from qwenspec.spec.document import Spec
from qwenspec.verify import dequantize, reference_kv, reference_rope
from qwenspec.verify import reference as reference_model
from qwenspec.verify.reference import Reference

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTER, VOCAB, LAYERS = 12, 4, 2, 8, 10, 23, 2
IDS = np.random.default_rng(9).integers(0, VOCAB, 24)


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def spec_of(layout: str = "qwen2", rope: dict | None = None, partial: float = 1.0, **changes) -> Spec:
    text = (Path(qwenspec.spec.__file__).parent / "layouts" / f"{layout}.yaml").read_text()
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": INTER,
        "max_position_embeddings": 16,
        "norm": {"eps": 1e-6},
        "attention": {"head_dim": HEAD_DIM},
        "rope": {"theta": 100.0, "scaling": rope, "partial_rotary_factor": partial},
    }
    architecture = Architecture.model_validate(settings | changes, strict=False)
    resolved = Layout.model_validate(yaml.safe_load(text), strict=False)
    return Spec(family="test", variant="test", architecture=architecture, layout=resolved)


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Of every tensor that any spec here may read."""
    rng = np.random.default_rng(seed)
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    found = {
        "model.embed_tokens.weight": rng.normal(size=(VOCAB, HIDDEN)),
        "model.norm.weight": rng.random(HIDDEN),
    }
    found["lm_head.weight"] = rng.normal(size=(VOCAB, HIDDEN))
    for i in range(LAYERS):
        linears = {
            "self_attn.q_proj": (q, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, q),
            "mlp.gate_proj": (INTER, HIDDEN),
            "mlp.up_proj": (INTER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTER),
        }
        for name, (rows, columns) in linears.items():
            found[f"model.layers.{i}.{name}.weight"] = rng.normal(size=(rows, columns)) / 2
            found[f"model.layers.{i}.{name}.bias"] = rng.normal(size=rows)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{name}.weight"] = rng.random(HIDDEN) + 0.5
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            found[f"model.layers.{i}.{name}.weight"] = rng.random(HEAD_DIM) + 0.5
    return found


def reference(**settings) -> Reference:
    return Reference(spec_of(**settings), weights())


# ------------------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_score_by_score(window, scale):
    """Query head h reads KV head h // 2; the weights are exponentials of scaled products over their sum."""
    attention = {"head_dim": HEAD_DIM, "scale": scale, "sliding_window": window and {"window": window}}
    taps = reference(attention=attention).taps(IDS[:7])
    q, k, context = (taps[f"layers.1.attention.{name}"] for name in ("q", "k", "context"))
    v = taps["layers.1.attention.qkv_proj"][:, (HEADS + KV_HEADS) * HEAD_DIM :].reshape(7, KV_HEADS, HEAD_DIM)
    for n in range(7):
        for head in range(HEADS):
            kv = {0: 0, 1: 0, 2: 1, 3: 1}[head]
            first = 0 if window is None else max(0, n - 2)
            products = [math.fsum(q[n, head] * k[m, kv]) for m in range(first, n + 1)]
            shares = [math.exp(p * (scale or 1 / math.sqrt(8))) for p in products]
            for d in range(HEAD_DIM):
                summed = math.fsum(s * v[first + i, kv, d] for i, s in enumerate(shares))
                assert context[n, head, d] == pytest.approx(summed / math.fsum(shares), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("qk_norm", ["none", "per_head"])
def test_taps_compose_into_the_model(qk_norm):
    """Every address's value follows from the ones before it, and a bias is where the spec says."""
    attention = {"head_dim": HEAD_DIM, "qk_norm": qk_norm, "bias": {"qkv": True, "output": True}}
    model = reference(attention=attention, mlp={"bias": True, "activation": "relu"})
    w, taps = model.weights, model.taps(IDS[:5])
    close(taps["embed_tokens"], w["model.embed_tokens.weight"][IDS[:5]])
    x = taps["embed_tokens"]
    for i in range(LAYERS):
        name, prefix = f"layers.{i}", f"model.layers.{i}"
        normed = taps[f"{name}.input_norm"]
        projected = [
            normed @ w[f"{prefix}.self_attn.{p}_proj.weight"].T + w[f"{prefix}.self_attn.{p}_proj.bias"] for p in "qkv"
        ]
        close(taps[f"{name}.attention.qkv_proj"], np.hstack(projected))
        context = taps[f"{name}.attention.context"].reshape(5, -1)
        out = context @ w[f"{prefix}.self_attn.o_proj.weight"].T + w[f"{prefix}.self_attn.o_proj.bias"]
        close(taps[f"{name}.attention.o_proj"], out)
        close(taps[f"{name}.attention"], out)
        gate, up = (
            taps[f"{name}.post_attention_norm"] @ w[f"{prefix}.mlp.{p}_proj.weight"].T
            + w[f"{prefix}.mlp.{p}_proj.bias"]
            for p in ("gate", "up")
        )
        close(taps[f"{name}.mlp.gate_up_proj"], np.hstack([gate, up]))
        hidden = np.where(gate > 0, gate * up, 0)
        close(
            taps[f"{name}.mlp"],
            hidden @ w[f"{prefix}.mlp.down_proj.weight"].T + w[f"{prefix}.mlp.down_proj.bias"],
        )
        x = x + taps[f"{name}.attention"] + taps[f"{name}.mlp"]
        close(taps[name], x)
    assert ("layers.1.attention.q_norm" in taps) == (qk_norm == "per_head")
    close(taps["logits"], taps["norm"] @ w["lm_head.weight"].T)


def test_qk_norm_is_per_head_with_one_weight():
    model = reference(attention={"head_dim": HEAD_DIM, "qk_norm": "per_head"})
    taps = model.taps(IDS[:3])
    raw = taps["layers.0.attention.qkv_proj"][:, : HEADS * HEAD_DIM].reshape(3, HEADS, HEAD_DIM)
    unit = taps["layers.0.attention.q_norm"] / model.weights["model.layers.0.self_attn.q_norm.weight"]
    close((unit**2).mean(axis=-1), (raw**2).mean(axis=-1) / ((raw**2).mean(axis=-1) + 1e-6))
    close(taps["layers.0.attention.q"][0], taps["layers.0.attention.q_norm"][0])  # position 0 does not turn


def test_partial_rotation_leaves_the_rest_of_each_head():
    taps = reference(attention={"head_dim": 8}, partial=0.5).taps(IDS[:4])
    raw = taps["layers.0.attention.qkv_proj"][:, : HEADS * HEAD_DIM].reshape(4, HEADS, HEAD_DIM)
    turned = taps["layers.0.attention.q"]
    close(turned[..., 4:], raw[..., 4:])
    # theta 100 over 4 values: frequencies 1 and 1/10, of the pairs (0, 2) and (1, 3).
    for pair, angle in ((0, 3.0), (1, 0.3)):
        a, b = raw[3, 0, pair], raw[3, 0, pair + 2]
        close(turned[3, 0, pair], a * math.cos(angle) - b * math.sin(angle))
        close(turned[3, 0, pair + 2], a * math.sin(angle) + b * math.cos(angle))


def test_attention_factor_scales_queries_and_keys():
    settings = {"kind": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
    plain = reference(rope=settings | {"attention_factor": 1.0}).taps(IDS[:4])
    scaled = reference(rope=settings | {"attention_factor": 1.5}).taps(IDS[:4])
    for name in ("q", "k"):
        close(scaled[f"layers.0.attention.{name}"], 1.5 * plain[f"layers.0.attention.{name}"])


def test_logn_scales_late_queries_alone():
    plain = reference().taps(IDS[:16])
    scaled = reference(attention={"head_dim": HEAD_DIM, "logn": {"train_length": 4}}).taps(IDS[:16])
    ratio = scaled["layers.0.attention.q"] / plain["layers.0.attention.q"]
    close(ratio[3], np.ones((HEADS, HEAD_DIM)))
    close(ratio[15], np.full((HEADS, HEAD_DIM), 2.0))  # ln 16 / ln 4
    close(scaled["layers.0.attention.k"], plain["layers.0.attention.k"])


def test_qwen1_layout_stacks_qkv_and_gates_with_w2():
    plain = weights()
    fused = {
        "transformer.wte.weight": plain["model.embed_tokens.weight"],
        "lm_head.weight": plain["lm_head.weight"],
    }
    fused["transformer.ln_f.weight"] = plain["model.norm.weight"]
    for i in range(LAYERS):
        ours, theirs = f"transformer.h.{i}", f"model.layers.{i}"
        for kind in ("weight", "bias"):
            parts = [plain[f"{theirs}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            fused[f"{ours}.attn.c_attn.{kind}"] = np.concatenate(parts)
        for new, old in {
            "attn.c_proj": "self_attn.o_proj",
            "mlp.w2": "mlp.gate_proj",
            "mlp.w1": "mlp.up_proj",
            "mlp.c_proj": "mlp.down_proj",
            "ln_1": "input_layernorm",
            "ln_2": "post_attention_layernorm",
        }.items():
            fused[f"{ours}.{new}.weight"] = plain[f"{theirs}.{old}.weight"]
    bias = {"head_dim": HEAD_DIM, "bias": {"qkv": True}}
    expected = Reference(spec_of(attention=bias), plain).logits(IDS)
    close(Reference(spec_of(layout="qwen1", attention=bias), fused).logits(IDS), expected)


def test_tied_head_is_the_embedding_even_where_a_head_lies_about():
    tied, untied = reference(tie_word_embeddings=True), reference()
    close(tied.taps(IDS)["norm"] @ tied.weights["model.embed_tokens.weight"].T, tied.logits(IDS))
    assert np.abs(tied.logits(IDS) - untied.logits(IDS)).max() > 1


@pytest.mark.parametrize("normalize", [True, False])
def test_embedding_head(normalize):
    model = reference(lm_head=None, embedding={"normalize": normalize})
    taps = model.taps(IDS)
    assert taps["logits"].shape == (len(IDS), HIDDEN)
    lengths = [math.hypot(*row) for row in taps["norm"]]
    close(taps["logits"] * (np.array(lengths)[:, None] if normalize else 1), taps["norm"])


# --------------------------------------------------------------------------------------- sequences that grow


@pytest.mark.parametrize("chunks", [[24], [1] * 24, [5, 1, 9, 8, 1]])
@pytest.mark.parametrize("window", [None, 4])
def test_chunks_and_decode_equal_one_forward(chunks, window):
    sliding = window and {"window": window, "layers": [1]}
    model = reference(attention={"head_dim": HEAD_DIM, "sliding_window": sliding, "logn": {"train_length": 6}})
    sequence, found = model.sequence(), []
    for start, n in zip(np.cumsum([0, *chunks]), chunks, strict=False):
        found.append(sequence.forward(IDS[start : start + n]))
    close(np.concatenate(found), model.logits(IDS))


def test_fork_and_popn_leave_the_parent_alone():
    model = reference()
    parent = model.sequence()
    parent.forward(IDS[:10])
    child, twin = parent.fork(at=6), parent.fork()
    other = np.concatenate([IDS[:6], IDS[14:18]])
    close(child.forward(IDS[14:18]), model.logits(other)[6:])
    close(twin.forward(IDS[10:12]), model.logits(IDS[:12])[10:])
    child.popn(3)
    close(child.forward(IDS[20:22]), model.logits(np.concatenate([IDS[:6], IDS[14:15], IDS[20:22]]))[7:])
    close(parent.forward(IDS[10:14]), model.logits(IDS[:14])[10:])


def test_dynamic_rope_turns_each_forward_for_its_length():
    """max_position_embeddings 16, factor 2: 20 tokens raise the base by 2·20/16 - 1 = 1.5, 24 by 2."""
    model = reference(rope={"kind": "dynamic", "factor": 2.0})
    sequence = model.sequence()
    close(sequence.forward(IDS[:16]), reference().logits(IDS[:16]))  # up to 16 nothing is scaled
    sequence.forward(IDS[16:20])
    keys = sequence.taps["layers.0.attention.k"]
    raised = reference(rope={"kind": "ntk", "factor": 1.5}).taps(IDS[:20])
    close(keys, raised["layers.0.attention.k"][16:])
    # Old keys keep their rotation, so the logits are neither those of the one base nor of the other.
    logits = sequence.fork(at=19).forward(IDS[19:20])
    assert np.abs(logits - raised["logits"][19:]).max() > 1e-3
    assert np.abs(logits - reference().logits(IDS[:20])[19:]).max() > 1e-3


@pytest.mark.parametrize("rope", [{"kind": "dynamic", "factor": 2.0}, {"kind": "dynamic_qwen1", "train_length": 8}])
def test_a_prompt_in_chunks_is_the_prompt(rope):
    model = reference(rope=rope)
    told, untold = model.sequence(prompt_length=24), model.sequence()
    chunks = np.split(IDS, [7, 16])
    close(np.concatenate([told.forward(chunk) for chunk in chunks]), model.logits(IDS))
    assert np.abs(np.concatenate([untold.forward(c) for c in chunks]) - model.logits(IDS)).max() > 1e-3


def test_dynamic_qwen1_keeps_the_step_of_its_prompt():
    """train_length 8: a prompt of 6 decodes unscaled past 16, a prompt of 9 keeps alpha 3."""
    model = reference(rope={"kind": "dynamic_qwen1", "train_length": 8})
    for prompt, static in ((6, reference()), (9, reference(rope={"kind": "ntk", "factor": 3.0}))):
        sequence = model.sequence()
        found = [
            sequence.forward(IDS[:prompt]),
            *(sequence.forward(IDS[n : n + 1]) for n in range(prompt, 24)),
        ]
        close(np.concatenate(found), static.logits(IDS))
        close(sequence.fork(at=2).forward(IDS[2:]), static.logits(IDS)[2:])


def test_dynamic_qwen1_chooses_anew_once_a_sequence_is_empty():
    model = reference(rope={"kind": "dynamic_qwen1", "train_length": 8})
    sequence = model.sequence()
    sequence.forward(IDS[:6])
    sequence.popn(6)
    close(sequence.forward(IDS[:9]), reference(rope={"kind": "ntk", "factor": 3.0}).logits(IDS[:9]))


@pytest.mark.parametrize("rope", [{"kind": "dynamic", "factor": 2.0}, {"kind": "dynamic_qwen1", "train_length": 8}])
def test_a_fork_keeps_the_prompt_that_was_told(rope):
    model = reference(rope=rope)
    parent = model.sequence(prompt_length=24)
    parent.forward(IDS[:5])
    close(parent.fork().forward(IDS[5:20]), model.sequence(prompt_length=24).forward(IDS[:20])[5:])


def test_longrope_chooses_at_each_forward():
    short, long = [1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 5.0, 5.0]
    rope = {
        "kind": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": 8,
    }
    model = reference(rope=rope)

    def keys_with(divisors: list[float]) -> np.ndarray:
        same = rope | {"short_factor": divisors, "long_factor": divisors}
        return reference(rope=same).taps(IDS[:10])["layers.0.attention.k"]

    sequence = model.sequence()
    sequence.forward(IDS[:8])
    close(sequence.taps["layers.0.attention.k"], keys_with(short)[:8])
    sequence.forward(IDS[8:10])
    close(sequence.taps["layers.0.attention.k"], keys_with(long)[8:])


# ---------------------------------------------------------------------------------------------------- errors


def test_wrong_weights_are_named():
    missing = weights()
    del missing["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(KeyError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        Reference(spec_of(), missing).logits(IDS)
    bent = weights() | {"model.norm.weight": np.ones(HIDDEN + 1)}
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(13,\), the spec says \(12,\)"):
        Reference(spec_of(), bent).logits(IDS)


def test_shares_nothing_with_the_compiler():
    for module in (reference_model, reference_rope, reference_kv, dequantize):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
                imported = [node.module]
            else:
                imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in imported:
                ours = name.startswith(("qwenspec.spec.", "qwenspec.verify.reference_", "qwenspec.verify.dequantize"))
                plain = {"__future__", "collections", "dataclasses", "math", "numpy", "typing"}
                assert ours or name.split(".")[0] in plain
