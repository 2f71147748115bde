"""The central promise on many architectures: in a batch of several clients each has the outputs and gradients it has alone."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import ARCHITECTURES, DECODER, PICTURE, adapted_shapes, batch_of, output_of, tiny
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

import hetlora_kernels as hk
from hetlora_kernels.peft import attach, client_segments, detach

CLIENTS = [1, 0, 1, 0, 0]


def filled_bank(name, model):
    dtype = ARCHITECTURES[name].dtype
    bank = hk.AdapterBank(adapted_shapes(name, model), [3, 2], dtype=dtype)
    g = torch.Generator().manual_seed(5)
    for factor in bank.parameters():
        factor.data.copy_(torch.randn(factor.shape, generator=g, dtype=torch.float64) * 0.2)
    return bank


def merged(model, bank, client):
    """A copy of the model with one client's factors added into the weights: no adapter code."""
    alone = copy.deepcopy(model)
    for layer, layout in bank.layouts.items():
        rows, module = layout.rows(client), alone.get_submodule(layer)
        delta = bank.bt[layer].detach()[rows].t() @ bank.a[layer].detach()[rows]
        module.weight.data += delta if isinstance(module, nn.Linear) else delta.t()
    return alone


@pytest.mark.parametrize(("sequences", "length"), [(3, 9), (5, 5)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_are_those_of_each_alone(name, sequences, length):
    """Also where the length is the number of sequences, and in a second batch of another size, when the layers are known."""
    model = tiny(name)
    bank = filled_bank(name, model)
    tolerance = 1e-9 if ARCHITECTURES[name].dtype == torch.float64 else 1e-4
    alone = [merged(model, bank, client) for client in (0, 1)]
    attach(model, bank)
    for count in (sequences, 4):
        inputs, ids = batch_of(name, count, length), CLIENTS[:count]
        with torch.no_grad(), client_segments(model, ids):
            together = output_of(model, inputs)
        for row, client in enumerate(ids):
            with torch.no_grad():
                own = output_of(alone[client], {key: value[row : row + 1] for key, value in inputs.items()})
                other = output_of(alone[1 - client], {key: value[row : row + 1] for key, value in inputs.items()})
            error = float((together[row] - own[0]).abs().max() / own.abs().max())
            assert error < tolerance, (row, error)
            assert float((other - own).abs().max() / own.abs().max()) > 1e-3  # the adapters matter


@pytest.mark.parametrize("name", ["llama", "opt", "switch", "xlnet", "t5", "bert classifier", "bart classifier", "deepseek_v3", "swin", "llava"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_gradients_are_those_of_each_alone(name, checkpointing):
    """Of a loss of one client's sequences, in a mixed batch: its own as in a batch of its own, the others' zero. Checkpointed, outside the block too."""
    if checkpointing is not None and name not in ("llama", "opt", "switch", "t5"):
        pytest.skip("checkpointing is tested on four of them")
    model, dtype = tiny(name), ARCHITECTURES[name].dtype
    bank = filled_bank(name, model)
    inputs, ids = batch_of(name, 3, 6), [1, 0, 1]
    attach(model, bank)

    def gradients(rows, within):
        bank_factors = list(bank.parameters())
        for factor in bank_factors:
            factor.grad = None
        own = {key: value[rows] for key, value in inputs.items()}
        with client_segments(model, [ids[row] for row in rows]):
            out = output_of(model, own)
            loss = sum(out[at].square().sum() for at, row in enumerate(rows) if ids[row] == 1)
            if within:
                loss.backward()
        if not within:
            loss.backward()
        return {(layer, side): getattr(bank, side)[layer].grad for layer in bank.shapes for side in ("a", "bt")}

    alone = gradients([0, 2], True)
    if checkpointing is not None:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    mixed = gradients([0, 1, 2], checkpointing is None)
    assert any(grad is not None for grad in alone.values())
    for (layer, side), grad in mixed.items():
        layout = bank.layouts[layer]
        if grad is None:
            assert alone[layer, side] is None or not bool(alone[layer, side].any())
            continue
        assert not bool(grad[layout.rows(0)].any()), layer
        expected = alone[layer, side]
        expected = torch.zeros_like(grad) if expected is None else expected
        torch.testing.assert_close(
            grad[layout.rows(1)], expected[layout.rows(1)], rtol=1e-7 if dtype == torch.float64 else 1e-3, atol=1e-9 if dtype == torch.float64 else 2e-3
        )


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "t5", "bart", "mixtral"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True, "top_k": 1, "num_return_sequences": 3}]
)
def test_generation(name, options):
    """With the cache, beams and several answers: ids of the batch before or after it is repeated."""
    model = tiny(name)
    bank = filled_bank(name, model)
    for factor in bank.parameters():
        factor.data *= 3
    tokens, ids = batch_of(name, 3, 5)["input_ids"], [1, 0, 1]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, **options}

    def generate(own, clients):
        with client_segments(model, clients):
            return model.generate(own, attention_mask=torch.ones_like(own), **options)

    attach(model, bank)
    alone = torch.cat([generate(tokens[row : row + 1], [client]) for row, client in enumerate(ids)])
    times = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    for clients in (ids, [client for client in ids for _ in range(times)]):
        assert torch.equal(generate(tokens, clients), alone)
    assert not torch.equal(generate(tokens, [1 - client for client in ids]), alone)
    if times > 1:
        mixed = [(client + n) % 2 for client in ids for n in range(times)]  # beams of one sequence under two clients
        if name in ("t5", "bart"):
            with pytest.raises(ValueError, match=r"^ids: .*layer 'encoder|^ids: .*layer 'model\.encoder"):
                generate(tokens, mixed)


# ---------------------------------------------------------------- pictures


def qwen2_vl():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 24, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
    tokens = {"image_token_id": PICTURE, "vision_start_token_id": 59, "vision_end_token_id": 58, "video_token_id": 57}
    text = DECODER | {"rope_parameters": rope, "num_key_value_heads": 2}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)).double().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    return model


def test_patches_of_pictures_of_several_sizes():
    """Refused by the layer's name; right where `rows` says whose patches are whose."""
    model, grids, ids = qwen2_vl(), [(4, 4), (4, 8)], [0, 1]
    shapes = {name: (m.out_features, m.in_features) for name, m in model.named_modules() if name.endswith(("q_proj", "qkv", "fc1", "mlp.0"))}
    bank = hk.AdapterBank(shapes, [3, 2], dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    for factor in bank.parameters():
        factor.data.copy_(torch.randn(factor.shape, generator=g, dtype=torch.float64) * 0.2)
    tokens = torch.randint(3, 50, (2, 14), generator=g)
    for row, (height, width) in enumerate(grids):
        count = height * width // 4
        tokens[row, 1], tokens[row, 2 : 2 + count], tokens[row, 2 + count] = 59, PICTURE, 58
    patches = [torch.randn(height * width, 96, generator=g, dtype=torch.float64) for height, width in grids]
    sizes = torch.tensor([[1, height, width] for height, width in grids])

    def run(model, rows):
        pixels = torch.cat([patches[row] for row in rows])
        types = (tokens[rows] == PICTURE).long()
        return model(input_ids=tokens[rows], pixel_values=pixels, image_grid_thw=sizes[rows], mm_token_type_ids=types, use_cache=False).logits

    with torch.no_grad():
        alone = torch.cat([run(merged(model, bank, client), [client]) for client in ids])
    attach(model, bank)
    text = r"whose the rows of layer 'model\.visual\.blocks\.0\..*' are; name them with"
    with torch.no_grad(), pytest.raises(ValueError, match=text), client_segments(model, ids):
        run(model, [0, 1])
    rows = {"visual.blocks": [0] * 16 + [1] * 32, "visual.merger": [0] * 4 + [1] * 8}
    with torch.no_grad(), client_segments(model, ids, rows=rows):
        torch.testing.assert_close(run(model, [0, 1]), alone, rtol=1e-9, atol=1e-9)
    text = r"^rows: expected shape \(12,\), the rows of layer 'model\.visual\.merger"
    with torch.no_grad(), pytest.raises(ValueError, match=text), client_segments(model, ids, rows={"visual": rows["visual.blocks"]}):
        run(model, [0, 1])
    detach(model)


def test_two_pictures_in_one_sequence():
    """As many pictures as sequences, but not one each: what was taken for another sequence's is refused where it meets the text."""
    model = tiny("llava")
    bank = filled_bank("llava", model)
    attach(model, bank)
    inputs = batch_of("llava", 2, 12)
    with client_segments(model, [0, 1]):
        output_of(model, inputs)  # one each: known by now
    inputs["input_ids"] = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    inputs["input_ids"][0, 1:9] = PICTURE
    text = r"^rows: the model writes rows that passed layer 'model\.vision_tower.* into the text, .*rows="
    with pytest.raises(ValueError, match=text), client_segments(model, [0, 1]):
        output_of(model, inputs)
