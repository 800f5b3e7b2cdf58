"""Works with: `torch.compile`, default and fullgraph, attached before or after, accumulation included."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.models import Images, small_vit, stem_of
from helpers.oracle import assert_close, expected
from hf_tract import apply_tract
from hf_tract.core.ops import precondition

# What TrAct adds is in the graph before a backend sees it. Two tests compare inductor's own code in every run, and the
# others do with `pytest -m slow`, since it takes g++ most of a minute for a ViT.
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.compiler.reset()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, dilation=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))


def grads(model: nn.Module, stem: nn.Module, x: torch.Tensor) -> torch.Tensor:
    stem.zero_grad()
    model(x).square().mean().backward()
    return stem.weight.grad


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("when", ["before compile", "after compile", "after the first call"])
def test_the_gradient_is_that_of_eager(fullgraph, when):
    model, x = network(), torch.randn(5, 3, 9, 9)
    model(x)
    plain = copy.deepcopy(model)
    if when == "before compile":
        apply_tract(model)
    compiled = torch.compile(model, fullgraph=fullgraph)
    if when == "after the first call":
        ordinary = grads(compiled, model[0], x).clone()
        assert_close(ordinary, grads(plain, plain[0], x), 1e-5)
    if when != "before compile":
        handle = apply_tract(model)
    wanted = expected(grads(plain, plain[0], x), x, plain[0], 0.1)
    for _ in range(2):
        assert_close(grads(compiled, model[0], x), wanted, 1e-5)
    if when == "after the first call":
        handle.remove()
        assert torch.equal(grads(compiled, model[0], x), ordinary)


def test_a_layer_that_gets_tract_again_needs_no_new_graph():
    """As of one `train()` after another: a new graph each time would end at torch's limit of recompilations."""
    model, x = network(), torch.randn(5, 3, 9, 9)
    model(x)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    apply_tract(model).remove()
    handle = apply_tract(model)
    grads(compiled, model[0], x)
    handle.remove()
    apply_tract(model, lam=0.2)
    wanted = expected(grads(plain, plain[0], x), x, plain[0], 0.2)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_close(grads(compiled, model[0], x), wanted, 1e-5)


def test_changing_batch_sizes_accumulation_and_lam_need_no_new_graph():
    model = network()
    model(torch.randn(2, 3, 9, 9))
    plain = copy.deepcopy(model)
    apply_tract(model)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    x = torch.randn(11, 3, 9, 9)
    grads(compiled, model[0], x[:4])
    assert graphs.frame_count == 1
    model.zero_grad()
    apply_tract(model, lam=0.3)
    compiled(x[:4]).square().sum().backward()
    compiled(x[4:]).square().sum().backward()
    assert graphs.frame_count == 1
    plain(x).square().sum().backward()
    assert_close(model[0].weight.grad, expected(plain[0].weight.grad, x, plain[0], 0.3), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_vit_with_checkpointed_blocks_and_autocast_has_the_rule(autocast, backend):
    plain, batch = small_vit().train(), Images().batch(0, 8)
    model = copy.deepcopy(plain)
    apply_tract(model)
    # transformers before 5.2x has the older name, which newer ones warn about
    enable = "activation_checkpointing_enable"
    getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")()
    compiled = torch.compile(model, backend=backend)
    for net in (plain, compiled):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = net(**batch).loss
        loss.backward()
    wanted = expected(stem_of(plain).weight.grad, batch["pixel_values"], stem_of(plain), 0.1)
    assert_close(stem_of(model).weight.grad, wanted, 0.05 if autocast else 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_calls_in_one_graph_share_one_moment(backend):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 3)

        def forward(self, x, y):
            return self.stem(x).square().sum() + self.stem(y).sin().sum()

    plain, x, y = Twice(), torch.randn(5, 3, 9, 9), 3 * torch.randn(2, 3, 9, 9)
    model = copy.deepcopy(plain)
    apply_tract(model, layers="stem")
    torch.compile(model, fullgraph=True, backend=backend)(x, y).backward()
    plain(x, y).backward()
    assert_close(model.stem.weight.grad, expected(plain.stem.weight.grad, [x, y], plain.stem, 0.1), 1e-5)


def test_cuda_graphs_leave_the_operator_out():
    """A replay would not call it: inductor cuts its graph there, or makes none."""
    assert torch.Tag.cudagraph_unsafe in precondition.tags


class Checkpointed(nn.Module):
    """Recomputes its first layer in backward."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)

    def forward(self, x):
        return checkpoint(self.stem, x, use_reentrant=False).square().sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_full_graph_with_a_checkpoint_over_the_layer_has_the_rule(backend):
    plain = Checkpointed()
    model = copy.deepcopy(plain)
    apply_tract(model, layers="stem")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    parts = torch.randn(3, 3, 9, 9), 3 * torch.randn(2, 3, 9, 9)
    for x in parts:  # two micro-steps
        compiled(x).backward()
        plain(x).backward()
    assert_close(model.stem.weight.grad, expected(plain.stem.weight.grad, [*parts], plain.stem, 0.1), 1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_16_bit_operation_before_an_activation_in_place_loses_no_precision(backend):
    """The weight's gradient is as good as the ordinary 16-bit one, in spite of what inv(C + lam I) enlarges."""
    plain, x = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True)), torch.randn(8, 3, 9, 9).cumsum(-1)
    model, ordinary = copy.deepcopy(plain), copy.deepcopy(plain)
    apply_tract(model)
    for net in (torch.compile(model, fullgraph=True, backend=backend), ordinary):
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x)
        out.float().square().mean().backward()
    plain(x).square().mean().backward()
    rounding = (ordinary[0].weight.grad - plain[0].weight.grad).norm() / plain[0].weight.grad.norm()
    wanted = expected(plain[0].weight.grad, x, plain[0], 0.1)
    assert_close(model[0].weight.grad, wanted, 5 * float(rounding))
    assert_close(model[0].bias.grad, ordinary[0].bias.grad, 1e-2)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # compiled autograd's own
def test_compiled_autograd_has_the_rule():
    plain, parts = network(), [torch.randn(4, 3, 9, 9), 3 * torch.randn(2, 3, 9, 9)]
    plain(parts[0])
    model = copy.deepcopy(plain)
    apply_tract(model)
    for _ in range(3):
        plain.zero_grad()
        model.zero_grad()
        for x in parts:
            plain(x).square().sum().backward()
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
                model(x).square().sum().backward()
        assert_close(model[0].weight.grad, expected(plain[0].weight.grad, parts, plain[0], 0.1), 1e-5)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # compiled autograd's own
def test_compiled_autograd_has_the_rule_in_one_graph_under_autocast():
    plain, x = network(), torch.randn(4, 3, 9, 9)
    plain(x)
    model = copy.deepcopy(plain)
    apply_tract(model)
    plain(x).square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        value = model(x).float().square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        value.backward()
    assert_close(model[0].weight.grad, expected(plain[0].weight.grad, [x], plain[0], 0.1), 5e-2)
