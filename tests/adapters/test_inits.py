"""Inits of LoRA: each does what its paper promises, and OLoRA's files are PEFT's."""

import copy
import re
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import minipeft
from minipeft.adapters import LoRAConfig, add_adapter, pissa, remove_adapter
from minipeft.adapters.inits import initialize_eva, initialize_loftq
from minipeft.adapters.lora import LoRALinear, find_lora_layers
from minipeft.adapters.peft_format import load_adapter, save_adapter
from minipeft.data.packing import Batch
from minipeft.errors import InputError
from minipeft.models.checkpoint import load_model, save_model
from minipeft.training.loop import TrainConfig, train

transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", module="peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def test_orthogonal_changes_nothing_and_trains_both_matrices_at_once(model, ids, packed):
    """B A = 0 without B = 0: with the usual init A has no gradient at the first step."""
    with torch.no_grad():
        before = model(ids)
        add_adapter(model, LoRAConfig(4, init="orthogonal"))
        assert (model(ids) - before).abs().max() <= 2e-5 * before.abs().max()
    for layer in find_lora_layers(model).values():
        A, B = layer.lora_A.double(), layer.lora_B.double()
        assert torch.linalg.matrix_rank(layer.lora_A) == torch.linalg.matrix_rank(layer.lora_B) == 2
        assert torch.linalg.matrix_norm(B @ A) <= 1e-6 * torch.linalg.matrix_norm(B) * torch.linalg.matrix_norm(A)
        assert 0.05 < A.square().mean().sqrt() / (0.1 / 2**0.5) < 2
    model.loss(packed.ids, packed.labels, packed.documents).backward()
    assert all(layer.lora_A.grad.abs().max() > 0 for layer in find_lora_layers(model).values())
    remove_adapter(model)
    with pytest.raises(InputError, match="rank: 3 is odd"):
        add_adapter(model, LoRAConfig(3, init="orthogonal"))


def test_orthogonal_has_pefts_scale_and_rank():
    """4 x 1024 Gaussians each: the norms differ by 2 % at most (three standard deviations), rank 4 of 8."""
    wide = torch.nn.Sequential(torch.nn.Linear(1024, 1024))
    config = peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights="orthogonal")
    theirs = peft.get_peft_model(copy.deepcopy(wide), config).base_model.model[0]
    ours = LoRALinear(wide[0], 8, 8.0, LoRAConfig(8))
    ours.initialize("orthogonal", torch.Generator().manual_seed(0))
    pairs = [(ours.lora_A, theirs.lora_A["default"].weight), (ours.lora_B, theirs.lora_B["default"].weight)]
    for own, other in pairs:
        assert torch.linalg.matrix_norm(own).item() == pytest.approx(torch.linalg.matrix_norm(other).item(), rel=0.05)
        assert torch.linalg.matrix_rank(own) == torch.linalg.matrix_rank(other) == 4


def test_olora_starts_from_an_orthonormal_part_of_the_weight(model, ids):
    with torch.no_grad():
        before = model(ids)
        add_adapter(model, LoRAConfig(4, 8.0, init="olora"))
        assert (model(ids) - before).abs().max() <= 2e-5 * before.abs().max()
    for layer in find_lora_layers(model).values():
        torch.testing.assert_close(layer.lora_B.t() @ layer.lora_B, torch.eye(4), rtol=0, atol=1e-5)
        rest = layer.weight - layer.lora_B @ layer.lora_A
        torch.testing.assert_close(
            rest[:, :4], torch.zeros_like(rest[:, :4]), rtol=0, atol=2e-6
        )  # W = Q R, R triangular
        assert torch.linalg.matrix_norm(layer.lora_B.t() @ rest) <= 1e-5


@pytest.fixture
def base(decoder, tmp_path):
    """A tiny Llama, its folder, and a way to read it with transformers."""
    model = decoder("llama")
    save_model(model, tmp_path / "base")
    read = transformers.AutoModelForCausalLM.from_pretrained
    return model, lambda: read(tmp_path / "base", attn_implementation="eager").eval()


@pytest.mark.parametrize("rslora", [False, True])
def test_olora_goes_both_ways_with_peft(base, ids, stir, apart, tmp_path, rslora):
    model, peer = base
    given = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, init_lora_weights="olora", use_rslora=rslora)
    theirs = peft.get_peft_model(peer(), given)
    add_adapter(model, LoRAConfig(4, 6.0, targets="default", rslora=rslora, init="olora"))
    for path, layer in find_lora_layers(model).items():
        twin = theirs.get_submodule(f"base_model.model.{path}")
        update = twin.lora_B["default"].weight @ twin.lora_A["default"].weight
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, update, rtol=1e-4, atol=1e-5)
    remove_adapter(model)
    stir(theirs).eval().save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        wanted = theirs(ids).logits
        load_adapter(model, tmp_path / "theirs", trainable=True)  # the tensors are A and B, not the whole update
        ours = model(ids)
        assert apart(ours, wanted) <= 1e-5
        save_adapter(model, tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(peer(), tmp_path / "ours").eval()
        assert apart(again(ids).logits, wanted) <= 1e-5
        remove_adapter(model)
        load_adapter(model, tmp_path / "ours")
        assert apart(model(ids), ours) <= 1e-5
        minipeft.merge_adapter(model)
        assert apart(model(ids), wanted) <= 2e-5
    assert load_file(tmp_path / "ours" / "adapter_model.safetensors").popitem()[1].shape.count(8) == 1  # rank 2r


def test_olora_files_that_cannot_be_read_right_are_refused(base, decoder, stir, tmp_path):
    model, peer = base
    given = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights="olora")
    stir(peft.get_peft_model(peer(), given)).save_pretrained(tmp_path / "theirs")
    bank = minipeft.AdapterBank(model)
    said = "holds LoRA with init 'olora'; a bank takes plain LoRA. Convert it to the equal plain LoRA with load_adapter"
    with pytest.raises(InputError, match=re.escape(said)):
        bank.load("x", tmp_path / "theirs")
    with pytest.raises(
        InputError, match=r"init_lora_weights: 'olora' is not supported for weights stored as \[in, out"
    ):
        load_adapter(decoder("gpt2"), tmp_path / "theirs")


def inputs_of(model, packed):
    """What each adapted linear reads in the real columns, by our own hooks."""
    seen, handles = {}, []
    for path, layer in find_lora_layers(model).items():
        layer.together = None
        keep = lambda module, inputs, path=path: seen.update({path: inputs[0][packed.documents >= 0].double()})
        handles.append(layer.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(packed.ids, packed.documents)
    for handle in handles:
        handle.remove()
    for layer in find_lora_layers(model).values():
        del layer.together
    return seen


@pytest.mark.parametrize("dora", [False, True])
def test_eva_keeps_most_of_the_inputs_energy(model, packed, ids, dora):
    with torch.no_grad():
        before = model(ids)
        add_adapter(model, LoRAConfig(4, dora=dora))
        inputs = inputs_of(model, packed)
        lost = lambda X, A: torch.linalg.matrix_norm(X - X @ A.t() @ torch.linalg.pinv(A.t()))
        random = {path: lost(inputs[path], layer.lora_A.double()) for path, layer in find_lora_layers(model).items()}
        initialize_eva(model, [packed, packed])
        assert (model(ids) - before).abs().max() <= 2e-5 * before.abs().max()
    for path, layer in find_lora_layers(model).items():
        A, values = layer.lora_A.double(), torch.linalg.svdvals(inputs[path])
        torch.testing.assert_close(A @ A.t(), torch.eye(4).double(), rtol=0, atol=1e-5)
        torch.testing.assert_close(lost(inputs[path], A), values[4:].square().sum().sqrt(), rtol=1e-3, atol=0)
        assert lost(inputs[path], A) < 0.95 * random[path]
    assert len(list(train(model, [packed], TrainConfig(1)))) == 1


def test_eva_refuses_what_it_cannot_do(decoder, packed):
    model = decoder("llama")
    with pytest.raises(InputError, match=r"initialize_eva: the model holds no plain LoRA\. add_adapter"):
        initialize_eva(model, [packed])
    add_adapter(model, LoRAConfig(16))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    short = Batch(packed.ids[:, :9], packed.labels[:, :9], packed.documents[:, :9])
    for batches, tokens in (([], 0), ([short], 9)):
        with pytest.raises(InputError, match=f"batches: {tokens} tokens have no 16 principal directions"):
            initialize_eva(model, batches)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_loftq_takes_back_the_largest_part_of_what_quantization_took(base, ids, tmp_path, apart, packed):
    plain, _ = base
    for linear in (m for m in plain.modules() if isinstance(m, torch.nn.Linear)):
        torch.nn.init.normal_(linear.weight, std=0.1)
    save_model(plain, tmp_path / "plain")
    with torch.no_grad():
        wanted = plain(ids)
        model = load_model(tmp_path / "plain", quantize="nf4")
        quantized = apart(model(ids), wanted)
        add_adapter(model, LoRAConfig(8, 12.0))
        left = initialize_loftq(model, plain)
        assert apart(model(ids), wanted) < quantized
    weights, missed, whole = dict(plain.named_parameters()), 0.0, 0.0
    for path, layer in find_lora_layers(model).items():
        error = (weights[f"{path}.weight"] - layer.weight.dequantize()).double()
        values = torch.linalg.svdvals(error)
        rest = error - layer.scale * layer.lora_B.double() @ layer.lora_A.double()
        torch.testing.assert_close(torch.linalg.matrix_norm(rest), values[8:].square().sum().sqrt(), rtol=1e-4, atol=0)
        missed, whole = missed + rest.square().sum().item(), whole + error.square().sum().item()
    assert left == pytest.approx((missed / whole) ** 0.5, rel=1e-4)
    assert left < 0.8
    for _ in train(model, [packed], TrainConfig(1)):
        pass
    save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        trained, again = model.eval()(ids), load_model(tmp_path / "plain", quantize="nf4")
        load_adapter(again, tmp_path / "adapter")  # the base is what load_model gives: the file is all there is
        assert torch.equal(again(ids), trained)


def test_loftq_refuses_what_it_cannot_do(base, decoder, tmp_path):
    model = load_model(tmp_path / "base", quantize="nf4")
    add_adapter(model, LoRAConfig(2))
    with pytest.raises(InputError, match="initialize_loftq: needs a quantized model and the plain weights beside it"):
        initialize_loftq(model, model)
    with pytest.raises(InputError, match=r"plain: has no weight like that of 'model\.layers\.0"):
        initialize_loftq(model, decoder("gpt2"))
    with pytest.raises(InputError, match="plain: 5 must be a Decoder"):
        initialize_loftq(model, 5)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (250, 250)])
def test_pissa_of_a_large_weight_leaves_nearly_the_best_residual(shape, monkeypatch):
    """The randomized SVD, against the whole one; a spectrum as flat as that of a trained weight."""
    draw = torch.Generator().manual_seed(1)
    flat = torch.linspace(1, 0.3, min(shape)) ** 2
    U, V = (torch.linalg.qr(torch.randn(n, min(shape), generator=draw)).Q for n in shape)
    W = (U * flat) @ V.t()
    best = torch.linalg.svdvals(W)[8:].norm()
    whole = pissa.compute_principal(W, 8, 2.0)
    monkeypatch.setattr(pissa, "LARGE", 64)
    A, B = pissa.compute_principal(W, 8, 2.0)
    assert not torch.equal(A, whole[0])
    assert best <= (W - 2.0 * B @ A).norm() * 1.00001 <= 1.002 * best
    assert torch.equal(A, pissa.compute_principal(W, 8, 2.0)[0])  # the same draw each time
    assert (A @ A.t() - torch.diag((A @ A.t()).diag())).abs().max() < 1e-4  # rows along singular vectors
