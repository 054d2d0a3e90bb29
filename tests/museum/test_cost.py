"""Memory and speed: saved, formed and computed tensors are counted, not timed."""

import peft
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from minipeft import FullConfig, LoRAConfig, PrefixConfig, add_adapter
from minipeft.adapters.lora import find_lora_layers
from minipeft.models.checkpoint import read_config
from minipeft.runs.planning import plan
from tests.museum.twins import peft_layers

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}


def widest_saved(layer: nn.Module, x: Tensor) -> int:
    """The bytes of the largest tensor that a layer keeps for backward, its own parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = [0]

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x).sum().backward()
    return max(kept)


def test_no_wide_copy_of_the_input(exhibit, twins):
    """AgileRL/AgileRL#623: float32 adapters on a bfloat16 base keep a float32 copy of the input of each layer for
    backward."""
    both = twins(dtype=torch.bfloat16, **WIDE)
    x = torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    add_adapter(both.ours, LoRAConfig(4, targets=("q_proj",)))
    (layer,) = find_lora_layers(both.ours).values()
    assert widest_saved(layer.train(), x) <= 2 * x.numel()
    with exhibit.theirs("peft", wrong="costs") as peer:
        model = peft.get_peft_model(both.reload(), peft.LoraConfig(r=4, target_modules=["q_proj"])).train()
        (layer,) = peft_layers(model)
        peer.right = widest_saved(layer, x) <= 2 * x.numel()


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is made inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, made.numel())
        return made


def largest_made(layer: nn.Module, x: Tensor) -> int:
    """The elements of the largest tensor that a forward pass makes."""
    with torch.no_grad(), Largest() as mode:
        layer(x)
    return mode.elements


def test_doras_norm_without_the_product(exhibit, twins):
    """huggingface/peft#3387, Stability-AI/stable-audio-3#69: each pass through DoRA forms B A, a matrix as large as the
    weight, for its norms."""
    both = twins(**WIDE)
    x = torch.randn(1, 8, 256, generator=torch.Generator().manual_seed(0))
    add_adapter(both.ours, LoRAConfig(4, targets=("q_proj",), dora=True))
    (layer,) = find_lora_layers(both.ours).values()
    assert largest_made(layer, x) <= x.numel()
    with exhibit.theirs("peft", wrong="costs") as peer:
        model = peft.get_peft_model(both.theirs, peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
        (layer,) = peft_layers(model.eval())
        peer.right = largest_made(layer, x) <= x.numel()


def test_memory_before_the_run(exhibit, twins):
    """deepspeedai/DeepSpeed#5304, axolotl-ai-cloud/axolotl#848: an estimate of a LoRA run's memory counts frozen
    parameters as trained, or there is none."""
    both = twins()
    for config in (LoRAConfig(4), PrefixConfig(5, init="peft"), FullConfig()):
        planned = plan(read_config(both.folder / "config.json"), config, rows=1, length=32)
        model = twins().ours
        report = add_adapter(model, config)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert (planned.trainable, planned.total) == (report.trainable, report.total)
        assert planned.moments == sum(8 * p.numel() for p in trained)
        assert planned.weights == sum(p.numel() * p.element_size() for p in model.parameters())
        assert planned.step > 0
