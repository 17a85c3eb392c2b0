"""The float64 reference against Hugging Face in float64 with random weights.

Hugging Face takes norms, softmax and rotary tables in float32 whatever the model's dtype: hence 1e-5.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from hf_parity.cases import CASES, LENGTH, NATIVE, random_case
from hf_parity.oracle import QWEN1, Oracle, some_ids, tiny_spec
from qwenspec.verify.reference import Reference


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Every position and every logit, relative to the largest logit."""
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def both(oracle: Oracle, n: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    ids = some_ids(oracle.spec, n)
    return Reference(oracle.spec, oracle.weights()).logits(ids), oracle.logits(ids, torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_each_feature(case):
    assert_close(*both(Oracle(tiny_spec(*CASES[case]))))


@pytest.mark.parametrize("seed", range(24))
def test_random_combinations(seed):
    assert_close(*both(Oracle(tiny_spec(*random_case(seed)), seed)))


@pytest.mark.parametrize("n", [7, 8, 9])
def test_around_a_window(n):
    assert_close(*both(Oracle(tiny_spec(*CASES["qwen2-sliding-all"])), n))


@pytest.mark.parametrize("n", [15, 16, 17])
@pytest.mark.parametrize("case", ["qwen3-dynamic-beyond", "qwen3-longrope-long"])
def test_around_a_threshold_of_length(case, n):
    assert_close(*both(Oracle(tiny_spec(*CASES[case])), n))


@pytest.mark.parametrize("n", [7, 8, 9, 16, 17, 32, 33])
def test_around_the_steps_of_qwen1(n):
    assert_close(*both(Oracle(tiny_spec(*CASES["qwen1-long"])), n))


def test_growing_beyond_the_first_length_with_a_cache():
    """Dynamic NTK, token by token: Hugging Face too keeps the rotation of keys in its cache."""
    oracle = Oracle(tiny_spec(*CASES["qwen3-dynamic-beyond"]))
    ids = some_ids(oracle.spec, 24)
    sequence = Reference(oracle.spec, oracle.weights()).sequence()
    model = oracle.model.double()
    cache, start = None, 0
    for n in (10, 6, 1, 1, 6):
        chunk = ids[start : start + n]
        with torch.no_grad():
            tokens = torch.tensor(chunk, dtype=torch.int64)[None]
            out = model(tokens, past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + n
        assert_close(sequence.forward(chunk), out.logits[0].numpy())


def test_qwen1_through_the_qwen2_class():
    """Gate from w2, up from w1, c_attn cut in three: written out here, not taken from the layout."""
    config = Qwen2Config(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
    )
    rng = np.random.default_rng(5)
    weights = {
        "transformer.wte.weight": rng.normal(size=(101, 64)),
        "lm_head.weight": rng.normal(size=(101, 64)),
    }
    weights["transformer.ln_f.weight"] = rng.random(64) + 0.5
    for i in range(2):
        shapes = {
            "ln_1.weight": (64,),
            "attn.c_attn.weight": (192, 64),
            "attn.c_attn.bias": (192,),
            "attn.c_proj.weight": (64, 64),
            "ln_2.weight": (64,),
            "mlp.w1.weight": (56, 64),
            "mlp.w2.weight": (56, 64),
            "mlp.c_proj.weight": (64, 56),
        }
        for name, shape in shapes.items():
            weights[f"transformer.h.{i}.{name}"] = rng.normal(size=shape) / 4
    state = {
        "model.embed_tokens.weight": weights["transformer.wte.weight"],
        "model.norm.weight": weights["transformer.ln_f.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    for i in range(2):
        ours, theirs = f"transformer.h.{i}", f"model.layers.{i}"
        for kind in ("weight", "bias"):
            q, k, v = np.split(weights[f"{ours}.attn.c_attn.{kind}"], 3)
            state[f"{theirs}.self_attn.q_proj.{kind}"] = q
            state[f"{theirs}.self_attn.k_proj.{kind}"] = k
            state[f"{theirs}.self_attn.v_proj.{kind}"] = v
        state[f"{theirs}.self_attn.o_proj.weight"] = weights[f"{ours}.attn.c_proj.weight"]
        state[f"{theirs}.mlp.gate_proj.weight"] = weights[f"{ours}.mlp.w2.weight"]
        state[f"{theirs}.mlp.up_proj.weight"] = weights[f"{ours}.mlp.w1.weight"]
        state[f"{theirs}.mlp.down_proj.weight"] = weights[f"{ours}.mlp.c_proj.weight"]
        state[f"{theirs}.input_layernorm.weight"] = weights[f"{ours}.ln_1.weight"]
        state[f"{theirs}.post_attention_layernorm.weight"] = weights[f"{ours}.ln_2.weight"]
    model = Qwen2ForCausalLM(config).double().eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    spec = tiny_spec(QWEN1)
    ids = some_ids(spec, LENGTH)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()
    assert_close(Reference(spec, weights).logits(ids), expected)


# ---------------------------------------------------------------------------------------- the oracle itself


@pytest.mark.parametrize("case", [c for c in NATIVE if "embedding" not in c])
def test_checkpoint_names_are_those_of_hugging_face(case, tmp_path):
    """The folder that the oracle saves loads in Hugging Face's own way, with nothing missing or left over."""
    oracle = Oracle(tiny_spec(*CASES[case]))
    folder = oracle.save(tmp_path, shards=2)
    loaded, report = type(oracle.model).from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = some_ids(oracle.spec, 9)
    with torch.no_grad():
        expected = loaded(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    assert_close(oracle.logits(ids), expected.double().numpy(), 1e-6)


@pytest.mark.parametrize("case", ["qwen2", "qwen3-bias", "qwen1-long", "all-biases"])
def test_every_weight_matters(case):
    """A mistake in any tensor is far above the tolerance: each rolled by one changes the logits."""
    oracle = Oracle(tiny_spec(*CASES[case]))
    ids = some_ids(oracle.spec, LENGTH)
    weights = oracle.weights()
    expected = Reference(oracle.spec, weights).logits(ids)
    for name, value in weights.items():
        rolled = Reference(oracle.spec, weights | {name: np.roll(value, 1)}).logits(ids)
        assert np.abs(rolled - expected).max() > 0.01 * np.abs(expected).max(), name


def test_the_oracle_forgets_earlier_calls():
    oracle = Oracle(tiny_spec(*CASES["qwen3-dynamic-beyond"]))
    ids = some_ids(oracle.spec, LENGTH)
    first = oracle.logits(ids[:16])
    oracle.logits(ids)
    assert (oracle.logits(ids[:16]) == first).all()
