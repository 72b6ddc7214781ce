"""Claim: a recursive head trains on what it will see when it drafts, step by step and with the keys of true states."""

from collections.abc import Callable

import pytest
import torch
from conftest import EXACT, tiny
from recursive_heads import decoded_states
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from mull import MTPConfig, MullForCausalLM, wrap_transformer_with_etd
from mull.layers.heads import RunBlock, before_norm, shifted
from mull.layers.recursive_heads import ChainedSteps, StepKeys, chain_mask
from mull.model.executor import run_layer

Exact = Callable[..., PreTrainedModel]
Ids = Callable[..., Tensor]
NATIVE = MTPConfig(num_predict_tokens=2, mtp_head_type="native")
STREAM = MTPConfig(num_predict_tokens=2, mtp_head_type="native", native_hidden_state="stream")
SHARED = MTPConfig(num_predict_tokens=2, mtp_head_type="sequential", share_weights_across_steps=True)
N_STEPS = 4
"""More than are trained: decoding may go on."""


def with_heads(base: PreTrainedModel, config: MTPConfig) -> MullForCausalLM:
    model = wrap_transformer_with_etd(base, None, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in [*model.mtp_heads.parameters(), *model.model.norm.parameters()]:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.2)
    return model


def trained_states(model: MullForCausalLM, tokens: Tensor, run_block: RunBlock | None = None) -> Tensor:
    """``[B, T, N_STEPS, D]``: states of all steps of all chains at once."""
    hidden = model.hidden_states(tokens)
    embedded = model.model.embed_tokens(tokens)
    run_block = run_block or model._run_block(hidden, model.model.layer_inputs(hidden))
    states = [model.head_input(hidden)]
    for k in range(1, 1 + N_STEPS):
        states.append(model.mtp_heads(k, states[-1], shifted(embedded, k), run_block))
    return torch.stack(states[1:], 2)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [NATIVE, STREAM, SHARED], ids=["native", "stream", "shared"])
@pytest.mark.parametrize("family_name", ["qwen3", "olmo3", "qwen3_next-dense", "qwen3_next-moe", "qwen3_5"])
@pytest.mark.latin(2, "family_name", "config", "implementation")
def test_the_steps_of_training_are_those_of_decoding(
    family_name: str, config: MTPConfig, implementation: str, exact: Exact, ids: Ids
) -> None:
    model = with_heads(exact(family_name), config)
    model.set_attn_implementation(implementation)
    tokens = ids(1, 11)
    hidden = model.hidden_states(tokens)
    embedded = F.pad(model.model.embed_tokens(tokens), (0, 0, 0, N_STEPS))
    expected = model.lm_head(decoded_states(model, hidden, embedded, N_STEPS))
    actual = model.lm_head(trained_states(model, tokens))
    assert expected.std() > 0.1
    # The softmax of transformers' eager attention is fp32.
    torch.testing.assert_close(actual, expected, atol=EXACT if implementation == "sdpa" else 2e-5, rtol=0)


@torch.no_grad()
def test_attending_over_the_states_of_the_same_step_is_something_else(exact: Exact, ids: Ids) -> None:
    """As FastMTP trains: from the second step on it differs from decoding, and the comparison above can tell."""
    model = with_heads(exact("qwen3"), NATIVE)
    tokens = ids(1, 11)
    hidden = model.hidden_states(tokens)
    inputs = model.model.layer_inputs(hidden)
    plain = trained_states(model, tokens, lambda block, h, _k: run_layer(block, "full_attention", h, inputs, None))
    difference = (plain - trained_states(model, tokens)).abs().amax((0, 1, 3))
    assert difference[0] < EXACT
    assert (difference[1:] > 1e-2).all()


@torch.no_grad()
@pytest.mark.parametrize("form", ["boolean", "by-kind"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_mask_of_queries_and_keys_is_obeyed_in_every_step(
    form: str, implementation: str, exact: Exact, ids: Ids
) -> None:
    model = with_heads(exact("qwen3"), NATIVE)
    model.set_attn_implementation(implementation)
    tokens = ids(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    document = torch.tensor([0] * 5 + [1] * 7)
    mask = ((document[:, None] == document) & torch.ones(12, 12, dtype=torch.bool).tril())[None, None]
    if implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    hidden = model.hidden_states(tokens, position_ids=positions)
    targets = torch.randint(97, (1, 12, 3))
    coefficients = torch.ones(targets.shape, dtype=torch.float64)
    given = mask if form == "boolean" else {"full_attention": mask}
    _, expected = model.head_losses(hidden, tokens, targets, coefficients, position_ids=positions)
    _, actual = model.head_losses(hidden, tokens, targets, coefficients, position_ids=positions, attention_mask=given)
    torch.testing.assert_close(actual, expected, atol=EXACT, rtol=0)
    _, blind = model.head_losses(hidden, tokens, targets, coefficients)
    assert ((blind - actual)[..., 1:].abs().amax((0, 1)) > 1e-3).all()


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention", None])
def test_attention_that_takes_no_such_mask_is_refused(implementation: str | None) -> None:
    with pytest.raises(
        ValueError, match=r"attn_implementation=.* does not support\. Load the model with .*'sdpa' or 'eager'"
    ):
        ChainedSteps(None, torch.arange(4)[None], lambda positions: positions, implementation)


def test_a_step_sees_the_first_one_up_to_its_chain_and_its_own_chain() -> None:
    first = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    assert chain_mask(first, 1).equal(first)
    rows = ["".join("x" if seen else "." for seen in row) for row in chain_mask(first, 3)[0, 0]]
    assert rows == ["x..x..x..", "xx..x..x.", "xxx..x..x"]


def test_the_keys_of_a_step_may_be_made_twice() -> None:
    """As checkpointing does when it computes a layer again."""
    past, new, again = (torch.randn(2, 1, 2, 3, 4) for _ in range(3))
    view = StepKeys((past[0], past[1]))
    for key, value in (new, again):
        keys, values = view.update(key, value, 0)
        assert torch.equal(keys, torch.cat([past[0], key], 2))
        assert torch.equal(values, torch.cat([past[1], value], 2))
    assert view.present is not None
    assert torch.equal(view.present[0], torch.cat([past[0], new[0]], 2)), "what the first run left"


@pytest.mark.parametrize("family_name", ["qwen3", "olmo3", "qwen3_next-dense", "qwen3_5"])
def test_the_stream_is_found_behind_the_norm_with_its_gradient(family_name: str) -> None:
    base = tiny(family_name, dtype=torch.float64).model
    norm, reader = base.norm, type(base.norm)(32, base.config.rms_norm_eps).double()
    with torch.no_grad():
        for each in (norm, reader):
            each.weight.uniform_(-3, 3)
    stream = (torch.randn(2, 5, 32, dtype=torch.float64) * 20).requires_grad_()
    upstream = torch.randn(2, 5, 32, dtype=torch.float64)
    expected = reader(stream)
    (wanted,) = torch.autograd.grad(expected, stream, upstream)
    actual = reader(before_norm(norm(stream), norm))
    into_stream, into_norm = torch.autograd.grad(actual, [stream, norm.weight], upstream)
    # The second norm's epsilon is up to 1e-5, and transformers' norms compute in fp32.
    torch.testing.assert_close(actual, expected, atol=0, rtol=1e-5)
    torch.testing.assert_close(into_stream, wanted, atol=1e-5 * wanted.abs().max().item(), rtol=0)
    through = torch.autograd.grad(reader(norm(stream)), norm.weight, upstream)[0]
    assert into_norm.abs().max() < 1e-5 * through.abs().max()


def test_a_dimension_that_the_norm_erases_is_zero(exact: Exact) -> None:
    norm = exact("qwen3").model.norm
    with torch.no_grad():
        norm.weight[3] = 0
    stream = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    out = before_norm(norm(stream), norm)
    out.square().sum().backward()
    assert not out[..., 3].any()
    assert out.isfinite().all()
    assert stream.grad.isfinite().all()
    assert norm.weight.grad.isfinite().all()


@torch.no_grad()
def test_heads_on_the_stream_read_the_stream(exact: Exact, ids: Ids) -> None:
    """The same module reads the two kinds of states differently, and the stream as it is in front of the final norm."""
    base = exact("qwen3")
    model = with_heads(base, STREAM)
    entered: list[Tensor] = []
    base.model.norm.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    hidden = model.hidden_states(ids(1, 9))
    read = model.head_input(hidden)
    stream = entered[0]
    assert F.cosine_similarity(read, stream, dim=-1).min() > 1 - 1e-10
    assert F.cosine_similarity(hidden, stream, dim=-1).min() < 0.999
    normed = with_heads(exact("qwen3"), NATIVE)
    assert normed.head_input(hidden) is hidden


def test_native_heads_are_routed_where_the_backbone_is() -> None:
    mixed = with_heads(tiny("qwen3_next-moe", mlp_only_layers=[3]), NATIVE)
    assert mixed.model.layers[3].block_type == "full_attention"
    assert not hasattr(mixed.model.layers[3].mlp, "experts")
    assert hasattr(mixed.mtp_heads.layers[0].mlp, "experts")
    assert not hasattr(with_heads(tiny("qwen3_next-dense"), NATIVE).mtp_heads.layers[0].mlp, "experts")


def test_native_heads_have_the_names_of_released_checkpoints() -> None:
    model = with_heads(tiny("qwen3_5"), NATIVE)
    attention = [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    layer = ["input_layernorm", "post_attention_layernorm", *attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    outside = ["fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"]
    names = {f"mtp.{name}.weight" for name in [*outside, *(f"layers.0.{name}" for name in layer)]}
    assert {name for name in model.state_dict() if not name.startswith(("model.", "lm_head."))} == names
    assert model.mtp.fc.weight.shape == (32, 64)
    assert model.mtp_heads is model.mtp


@torch.no_grad()
def test_the_embedding_stands_before_the_state(exact: Exact, ids: Ids) -> None:
    """``fc`` maps ``[e; h]``, as in the checkpoints and the engines that serve them."""
    model = with_heads(exact("qwen3"), NATIVE)
    heads = model.mtp_heads
    embedded, hidden = torch.randn(2, 1, 6, 32, dtype=torch.float64)
    read: list[Tensor] = []

    def run(_block: nn.Module, h: Tensor, _k: int) -> Tensor:
        read.append(h)
        return h

    out = heads(1, hidden, embedded, run)
    of_embedding, of_hidden = heads.fc.weight[:, :32], heads.fc.weight[:, 32:]
    expected = heads.pre_fc_norm_embedding(embedded) @ of_embedding.T + heads.pre_fc_norm_hidden(hidden) @ of_hidden.T
    torch.testing.assert_close(read[0], expected)
    assert torch.equal(out, heads.norm(read[0]))
