"Residual networks: shapes for every size, how they start, what they hold; timm's resnet-D family number for number."
import copy
import importlib
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from exp import xresnet as X
from exp.exercises import xresnet as E
from exp.hooks import Hooks, find_layers, summary
from exp.norm import BatchNorm, GroupNorm
from exp.testing import test_like

LAST = torch.channels_last
SMALL = dict(widths=(4, 8, 8, 12), stem=(4, 4, 4))
WIDE = dict(widths=(8, 16, 16, 24), stem=(4, 4, 8))          # of bottlenecks
ints = st.integers


def small18(*args, **options): return X.xresnet18(*args, **SMALL | options)
def small50(*args, **options): return X.xresnet50(*args, **WIDE | options)


def wake(model):
    "Norms' numbers and averages as after some training, so that nothing is hidden by a zero."
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for m in model.modules():
            for name in ("weight", "running_var") if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)) else ():
                if getattr(m, name, None) is not None: getattr(m, name).copy_(torch.rand(getattr(m, name).shape, generator=g) + .5)
            for name in ("bias", "running_mean") if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)) else ():
                if getattr(m, name, None) is not None: getattr(m, name).copy_(torch.randn(getattr(m, name).shape, generator=g)/5)
    return model


def blocks(model): return list(find_layers(model, X.ResBlock).values())


def ins_and_outs(model, xb):
    "What goes into each block and comes out."
    seen = []
    with torch.no_grad(), Hooks(find_layers(model, X.ResBlock), lambda hook, m, inp, out: seen.append((inp[0].clone(), out.clone()))): model(xb)
    return seen


# --- sizes -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [small18, small50])
@pytest.mark.parametrize("size", [127, 128, 225, 240, (127, 240), (1, 1), (33, 7)])
def test_any_size(make, size):
    h, w = size if isinstance(size, tuple) else (size, size)
    model = make().eval()
    with torch.no_grad():
        body = model.stages(model.stem(torch.randn(1, 3, h, w)))
        assert body.shape[2:] == (math.ceil(h/32), math.ceil(w/32)) and model(torch.randn(2, 3, h, w)).shape == (2, 10)


@given(h=ints(1, 40), w=ints(1, 40), stride=ints(1, 3), ni=ints(1, 3), nf=ints(1, 3), kind=st.sampled_from(["basic_block", "bottleneck"]))
def test_a_blocks_two_ways_fit_for_every_size(h, w, stride, ni, nf, kind):
    block, x = getattr(X, kind)(4*ni, 4*nf, stride).eval(), torch.randn(1, 4*ni, h, w)
    with torch.no_grad():
        assert block.branch(x).shape == block.shortcut(x).shape == block(x).shape == (1, 4*nf, math.ceil(h/stride), math.ceil(w/stride))


@given(h=ints(1, 7), w=ints(1, 7), stride=ints(2, 3))
@settings(max_examples=20)
def test_the_shortcut_is_the_mean_of_what_is_there(h, w, stride):
    "Windows that reach over the border count the pixels inside; then one convolution mixes channels."
    short, x = X.pool_shortcut(2, 3, stride, norm=None), torch.randn(1, 2, h, w, dtype=torch.float64)
    short.double()
    rows = [[x[:, :, i:i + stride, j:j + stride].mean((2, 3)) for j in range(0, w, stride)] for i in range(0, h, stride)]
    pooled = torch.stack([torch.stack(row, -1) for row in rows], -2)
    test_like(short[0](x), pooled)
    test_like(short(x), torch.einsum("bihw,oi->bohw", pooled, short[1][0].weight[..., 0, 0]) + short[1][0].bias.view(1, -1, 1, 1))


@pytest.mark.parametrize("make", [small18, small50])
def test_channels_and_classes_are_arguments(make):
    for c_in, n_classes in ((1, 7), (4, 1)):
        model = make(n_classes, c_in)
        assert model(torch.randn(2, c_in, 40, 40)).shape == (2, n_classes)
        assert model.stem[0][0].in_channels == c_in and model.head[-1].out_features == n_classes
    with pytest.raises(RuntimeError, match="channels"): make()(torch.randn(2, 1, 40, 40))


# --- what it holds -----------------------------------------------------------------------------------------------------------

COUNTS = {18: 11_708_744, 34: 21_816_904, 50: 25_576_264, 101: 44_568_392, 152: 60_212_040}      # with 1,000 classes; timm's resnet18d, …


@pytest.fixture
def unfilled(monkeypatch):
    "Networks whose weights nobody fills: made at once, however large."
    for layer in (nn.Conv2d, nn.Linear): monkeypatch.setattr(layer, "reset_parameters", lambda self: None)
    monkeypatch.setattr(X, "init_cnn", lambda model: model)


@pytest.mark.parametrize("depth", COUNTS)
def test_layers_strides_and_numbers(depth, unfilled):
    model = getattr(X, f"xresnet{depth}")(1000)
    convs = find_layers(model.stages, nn.Conv2d)
    assert sum("branch" in name for name in convs) + 2 == depth, "the stem counts as one, the linear layer as one"
    assert all(c.kernel_size == (3, 3) for c in convs.values() if c.stride == (2, 2)), "a 1×1 of stride 2 would skip pixels"
    assert [c.stride for c in find_layers(model.stem, nn.Conv2d).values()] == [(2, 2), (1, 1), (1, 1)]
    assert not any("conv" in type(m).__name__.lower() and m.bias is not None for m in convs.values())
    assert sum(p.numel() for p in model.parameters()) == COUNTS[depth]
    assert len(find_layers(model, nn.AvgPool2d)) == 3 and all(p.ceil_mode for p in find_layers(model, nn.AvgPool2d).values())
    assert sum(c.stride == (2, 2) for c in convs.values()) == 3


def test_there_are_three_parts():
    model = small18()
    assert [name for name, _ in model.named_children()] == ["stem", "stages", "head"] and len(model.stages) == 4
    assert isinstance(model.stages[0][0].shortcut, nn.Sequential) and len(model.stages[0][0].shortcut) == 0     # 4 channels in, 4 out
    assert len(model.stages[1][0].shortcut) == 2 and len(small18(widths=(6, 8, 8, 8)).stages[0][0].shortcut) == 1


def test_every_place_has_an_activation_of_its_own():
    for make, n in ((small18, 3 + 8*2), (small50, 3 + 16*3)):
        model = make(act=nn.SiLU)
        assert len(set(find_layers(model, nn.SiLU).values())) == n and not find_layers(model, nn.ReLU)
    model = small18(act=partial(nn.LeakyReLU, .1))
    assert {m.negative_slope for m in find_layers(model, nn.LeakyReLU).values()} == {.1}
    slopes = small18(act=nn.PReLU)                                            # activations that learn
    assert len(find_layers(slopes, nn.PReLU)) == 19
    for b in blocks(slopes): assert all(m.weight.item() == .25 for m in b.modules() if isinstance(m, nn.PReLU)), "no slope was taken for a γ"


@given(depth=ints(1, 4), n=ints(1, 3), width=ints(1, 3), stem=ints(1, 4), data=st.data())
@settings(max_examples=10)
def test_any_number_of_stages_and_any_stem(depth, n, width, stem, data):
    model = X.XResNet(X.bottleneck, [n]*depth, 5, 2, [4*width*(i + 1) for i in range(depth)], [3]*stem).eval()
    assert len(model.stages) == depth and all(len(s) == n for s in model.stages) and len(model.stem) == stem + 1
    with torch.no_grad(): assert model(torch.randn(2, 2, 50, 50)).shape == (2, 5)


# --- how it starts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, dict(norm=None), dict(norm=partial(nn.GroupNorm, 1)), dict(norm=partial(nn.BatchNorm2d, affine=False)), dict(norm=BatchNorm),
                                     dict(norm=partial(GroupNorm, 2)), dict(act=nn.SiLU), dict(act=nn.PReLU), dict(norm=None, act=nn.PReLU)],
                         ids=["plain", "no norm", "one group", "no affine", "ours", "two groups", "SiLU", "PReLU", "no norm, PReLU"])
@pytest.mark.parametrize("make", [small18, small50])
@pytest.mark.parametrize("train", [True, False])
def test_every_block_starts_as_its_shortcut(make, options, train):
    torch.manual_seed(0)
    model = make(**options).train(train)
    seen = ins_and_outs(model, torch.randn(3, 3, 64, 64))
    for b, (x, out) in zip(blocks(model), seen, strict=True):
        with torch.no_grad(): test_like(out, b.act(copy.deepcopy(b.shortcut)(x)), rtol=0, atol=0)


def test_only_the_last_norm_of_a_branch_is_zero():
    for model in (small18(), small50()):
        for b in blocks(model):
            *others, last = find_layers(b.branch, nn.BatchNorm2d).values()
            assert not last.weight.any() and not last.bias.any() and all((n.weight == 1).all() for n in others)
            assert all((n.weight == 1).all() for n in find_layers(b.shortcut, nn.BatchNorm2d).values())


def test_a_zero_gamma_learns_first_and_the_rest_of_the_branch_a_step_later():
    torch.manual_seed(0)
    model, x, y = small18(), torch.randn(8, 3, 32, 32), torch.arange(8)
    opt = torch.optim.SGD(model.parameters(), .1)
    for step in range(2):
        F.cross_entropy(model(x), y).backward()
        for b in blocks(model):
            *inner, last = [p for name, p in b.branch.named_parameters() if not name.endswith("1.bias")]
            assert last.grad.any() and all(bool(p.grad.any()) == (step > 0) for p in inner)
        opt.step(); opt.zero_grad()


def test_convolutions_start_by_kaimings_rule():
    torch.manual_seed(0)
    for name, m in find_layers(X.xresnet18(), (nn.Conv2d, nn.Linear)).items():
        fan = m.weight[0].numel()
        assert abs(m.weight.std().item()/math.sqrt(2/fan) - 1) < .1, name
        assert m.bias is None or not m.bias.any()


class Foreign(nn.Module):
    "A block of somebody else's, whose layers start as PyTorch starts them: uniform, with random biases."
    def __init__(self, ni, nf, stride=1, act=nn.ReLU, norm=nn.BatchNorm2d):
        super().__init__()
        self.layer, self.act = nn.Conv2d(ni, nf, 3, stride, 1), act()

    def forward(self, x): return self.act(self.layer(x))


def test_a_foreign_block_starts_by_kaimings_rule_too():
    torch.manual_seed(0)
    model = X.XResNet(Foreign, (1, 2), widths=(32, 64), stem=(16, 32))
    for name, m in find_layers(model.stages, nn.Conv2d).items():
        assert abs(m.weight.std().item()/math.sqrt(2/m.weight[0].numel()) - 1) < .1 and not m.bias.any(), name
    def either(ni, nf, stride, act, norm): return Foreign(ni, nf, stride, act) if nf > ni else X.basic_block(ni, nf, stride, act, None)
    mixed = X.XResNet(either, (1, 2), widths=(4, 8), stem=(4,))
    kinds = [type(b) for stage in mixed.stages for b in stage]
    assert kinds == [X.ResBlock, Foreign, X.ResBlock]
    for b in blocks(mixed): assert not list(find_layers(b.branch, (nn.Conv2d, nn.BatchNorm2d)).values())[-1].weight.any(), "a ResBlock keeps its own start"


def test_residual_blocks_are_filled_once_and_before_stem_and_head():
    "So that a seed means the same network as it did before foreign blocks were filled."
    torch.manual_seed(5)
    model = small18()
    torch.manual_seed(5)
    stem = nn.Sequential(*[X.conv(a, b, 3, s, nn.ReLU, nn.BatchNorm2d) for a, b, s in ((3, 4, 2), (4, 4, 1), (4, 4, 1))])
    stages = [X.basic_block(a, b, s) for a, b, s in ((4, 4, 1), (4, 4, 1), (4, 8, 2), (8, 8, 1), (8, 8, 2), (8, 8, 1), (8, 12, 2), (12, 12, 1))]
    head = nn.Linear(12, 10)
    X.init_cnn(stem); X.init_cnn(head)
    by_hand = nn.ModuleList([stem, *stages, head])
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True): assert torch.equal(p, q)


def test_what_the_docstring_says_of_a_zero_that_is_filled_again():
    "With norms the zero is a γ and survives; without, it is a convolution's."
    from exp.conv import init_cnn
    for norm, survives in ((nn.BatchNorm2d, True), (None, False)):
        model = init_cnn(small18(norm=norm))
        for b in blocks(model):
            last = [m for m in b.branch.modules() if getattr(m, "weight", None) is not None][-1]
            assert bool(last.weight.any()) != survives


@pytest.mark.parametrize("ni, nf, stride, kinds", [(4, 4, 1, []), (4, 6, 1, ["Sequential"]), (4, 4, 2, ["AvgPool2d", "Sequential"]), (4, 6, 3, ["AvgPool2d", "Sequential"])])
def test_a_shortcut_holds_no_more_than_it_must(ni, nf, stride, kinds):
    assert [type(m).__name__ for m in X.pool_shortcut(ni, nf, stride)] == kinds


def test_one_seed_one_network():
    torch.manual_seed(3); a = small18()
    torch.manual_seed(3); b = small18()
    for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True): assert torch.equal(p, q)


# --- what it computes --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [small18, small50])
def test_a_batch_in_evaluation_is_its_items_one_by_one(make):
    torch.manual_seed(0)
    model, x = wake(make()).eval().double(), torch.randn(5, 3, 45, 38, dtype=torch.float64)
    with torch.no_grad():
        test_like(model(x), torch.cat([model(one[None]) for one in x]))
        test_like(model(x[[3, 0]]), model(x)[[3, 0]])


@pytest.mark.parametrize("kind", [X.basic_block, X.bottleneck])
@pytest.mark.parametrize("ni, nf, stride", [(4, 4, 1), (4, 8, 2), (8, 4, 2)])
def test_gradcheck(kind, ni, nf, stride):
    torch.manual_seed(0)
    block = wake(kind(ni, nf, stride, act=nn.Tanh, norm=partial(nn.GroupNorm, 1))).double()
    x, names = torch.randn(1, ni, 3, 2, dtype=torch.float64, requires_grad=True), [n for n, _ in block.named_parameters()]
    def f(x, *ps): return torch.func.functional_call(block, dict(zip(names, ps)), (x,))
    assert torch.autograd.gradcheck(f, (x, *block.parameters()), fast_mode=True)


def test_the_identity_hands_the_gradient_on():
    "d(act(branch + x)) reaches x twice: through the branch, and as it is."
    torch.manual_seed(0)
    block = wake(X.basic_block(4, 4, act=nn.Identity)).double().eval()
    x, g = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    through, = torch.autograd.grad(block.branch(x), x, g)
    both, = torch.autograd.grad(block(x), x, g)
    test_like(both, through + g)


@pytest.mark.parametrize("make", [small18, small50])
def test_channels_last_is_kept_through_the_whole_net(make):
    torch.manual_seed(0)
    model, x = wake(make()).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad(): want = model(x)
    model.to(memory_format=LAST)
    kept, layers = {}, {n: m for n, m in find_layers(model, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, X.ResBlock)).items()}
    x = x.to(memory_format=LAST).requires_grad_()
    with Hooks(layers, lambda hook, m, inp, out: kept.update({hook.name: out.is_contiguous(memory_format=LAST)})): got = model(x)
    assert len(kept) == len(layers) and all(kept.values()), [n for n, ok in kept.items() if not ok]
    test_like(got, want, rtol=1e-4, atol=1e-4)
    got.sum().backward()
    assert x.grad.is_contiguous(memory_format=LAST) and all(p.grad.is_contiguous(memory_format=LAST) for p in model.parameters() if p.ndim == 4)


def test_half_precision_and_autocast():
    model, x = wake(small18()).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        with torch.autocast("cpu", torch.bfloat16): got = model(x)
        assert got.dtype == torch.bfloat16 and (got.float() - want).abs().max() < .1*want.abs().max() + .05
        assert copy.deepcopy(model).bfloat16()(x.bfloat16()).isfinite().all()


def test_copies_states_and_hooks_leave_it_alone():
    model, x = wake(small18()).eval(), torch.randn(2, 3, 40, 40)
    twin = small18().eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        want = model(x)
        test_like(twin(x), want, rtol=0, atol=0); test_like(copy.deepcopy(model)(x), want, rtol=0, atol=0)
    kept = []
    with torch.no_grad(), Hooks(find_layers(model), lambda hook, m, inp, out: kept.append((out, out.clone()))): model(x)
    assert all(torch.equal(a, b) for a, b in kept), "a later layer wrote into what an earlier one has given"


def test_it_learns_a_batch_by_heart():
    torch.manual_seed(0)
    model, x, y = small18(), torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    opt = torch.optim.SGD(model.parameters(), .1, momentum=.9)
    losses = []
    for _ in range(30):
        losses.append(F.cross_entropy(model(x), y)); losses[-1].backward(); opt.step(); opt.zero_grad()
    assert losses[-1] < losses[0]/3


def test_flops_and_parameters_of_the_two_blocks():
    "18·c² weights against 17/16·c²: a bottleneck of 256 channels is about as dear as a basic block of 64."
    for c in (16, 64):
        for make, weights in ((X.basic_block, 18*c*c), (X.bottleneck, 17*c*c//16)):
            found = summary(make(c, c), torch.zeros(1, c, 6, 5))
            norms = sum(p.numel() for m in make(c, c).modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
            assert found.params == weights + norms and found.flops == 2*weights*30


# --- what is refused -----------------------------------------------------------------------------------------------------------

def test_one_width_a_stage():
    with pytest.raises(ValueError, match=r"n_blocks \(2, 2, 2, 2\), widths \(8, 8\), .*number from 1 up for each stage"): X.xresnet18(widths=(8, 8))


@pytest.mark.parametrize("wrong", [dict(n_blocks=(2, 0, 2, 2)), dict(stem=())])
def test_a_stage_without_blocks_or_a_stem_without_layers(wrong):
    with pytest.raises(ValueError, match="from 1 up for each stage"): X.XResNet(X.basic_block, **{"n_blocks": (1, 1, 1, 1), **wrong})


def test_an_activation_that_is_made_already():
    with pytest.raises(TypeError, match="act is ReLU.*give what makes one, ReLU"): X.xresnet18(act=nn.ReLU())


def test_a_bottleneck_too_thin_to_have_an_inside():
    with pytest.raises(ValueError, match="fans need"), pytest.warns(UserWarning): X.bottleneck(8, 3)


def test_unknown_options():
    with pytest.raises(TypeError, match="width"): X.xresnet50(width=3)


# --- timm ----------------------------------------------------------------------------------------------------------------------

def timm_name(ours: str) -> str:
    "stages.1.0.branch.0.1.weight -> layer2.0.bn1.weight, and so on."
    part, *rest = ours.split(".")
    if part == "head": return f"fc.{rest[-1]}"
    if part == "stem":
        n, kind, name = int(rest[0]), int(rest[1]), rest[2]
        return f"bn1.{name}" if (n, kind) == (2, 1) else f"conv1.{3*n + kind}.{name}"
    stage, block, way, n, kind, name = rest[0], rest[1], rest[2], *(rest[3:] if len(rest) == 6 else (None, *rest[3:]))
    where = f"layer{int(stage) + 1}.{block}"
    if way == "shortcut": return f"{where}.downsample.{1 + int(kind)}.{name}"
    return f"{where}.{('conv', 'bn')[int(kind)]}{int(n) + 1}.{name}"


def timm():
    try: return importlib.import_module("timm")
    except ImportError: pytest.skip("timm is not here")


def strides(model): return [(tuple(m.kernel_size), tuple(m.stride), m.in_channels, m.out_channels) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_layers_strides_and_parameters_are_timms(depth):
    peer = timm()
    with torch.device("meta"): theirs, ours = peer.create_model(f"resnet{depth}d", num_classes=10), getattr(X, f"xresnet{depth}")()
    a, b = ours.state_dict(), theirs.state_dict()
    assert [timm_name(name) for name in a] == list(b), "names in the same order"
    assert [v.shape for v in a.values()] == [v.shape for v in b.values()]
    assert strides(ours) == strides(theirs)


@pytest.mark.parametrize("depth, size", [(18, 96), (18, 127), (34, 65), (50, 64), (50, 97)])
def test_with_timms_weights_it_gives_timms_scores_and_gradients(depth, size):
    peer = timm()
    torch.manual_seed(0)
    theirs, ours = wake(peer.create_model(f"resnet{depth}d", num_classes=10)), getattr(X, f"xresnet{depth}")()
    state = theirs.state_dict()
    ours.load_state_dict({name: state[timm_name(name)] for name in ours.state_dict()})
    x, y = torch.randn(2, 3, size, size), torch.tensor([3, 7])
    for train in (False, True):
        ours.train(train); theirs.train(train)
        got, want = ours(x), theirs(x)
        test_like(got, want, rtol=1e-4, atol=1e-4*want.detach().abs().max().item())
    F.cross_entropy(got, y).backward(); F.cross_entropy(want, y).backward()
    names = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        g = names[timm_name(name)].grad
        assert (p.grad - g).norm() < 2e-3*g.norm() + 1e-6, name


def test_in_one_channel_too():
    peer = timm()
    theirs, ours = peer.create_model("resnet18d", num_classes=3, in_chans=1).eval(), X.xresnet18(3, 1).eval()
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    x = torch.randn(2, 1, 50, 33)
    with torch.no_grad(): test_like(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


# --- the exercises' checkers -----------------------------------------------------------------------------------------------------

def refuses(check, answer, word):
    with pytest.raises(AssertionError, match=word): check(answer)


def per_item(x): return (len(x), *[1]*(x.ndim - 1))


def kept(x, p): return (torch.rand(per_item(x)) >= p).to(x.dtype)


def test_drop_path_judges_behaviour(capsys):
    def plain(x, p, training):
        if not training or p == 0: return x
        return x*kept(x, p)/(1 - p) if p < 1 else torch.zeros_like(x)
    def loop(x, p, training):
        return torch.stack([(item*0 if torch.rand(()) < p else item/(1 - p)) if training else item for item in x])
    def bernoulli(x, p, training):
        mask = x.new_empty(per_item(x)).bernoulli_(1 - p)
        return torch.where(mask > 0, x/max(1 - p, 1e-9), 0.) if training and p else x.clone()
    for answer in (plain, loop, bernoulli): E.check_drop_path(answer)
    assert capsys.readouterr().out.count("✓") == 3
    wrong = {"each item": lambda x, p, t: x*kept(x[:1], p)/max(1 - p, 1e-9) if t and p else x,
             "one by one": lambda x, p, t: F.dropout(x, p, t),
             r"multiplied by 1, not by": lambda x, p, t: x*kept(x, p) if t else x,
             "chance to be dropped": lambda x, p, t: x*(torch.rand(per_item(x)) < p)/max(1 - p, 1e-9) if t and p else x,
             "comes out as it is": lambda x, p, t: x*kept(x, p)/max(1 - p, 1e-9) if p else x,
             "divides by 0": lambda x, p, t: x*(kept(x, p)/(1 - torch.tensor(p))) if t else x,
             "was changed": lambda x, p, t: x.mul_(kept(x, p)/max(1 - p, 1e-9)) if t and p else x,
             "became": lambda x, p, t: (x*kept(x, p)/max(1 - p, 1e-9) if t and p else x).float(),
             "return a tensor": lambda x, p, t: [1], "returned None": lambda x, p, t: None}
    for word, answer in wrong.items(): refuses(E.check_drop_path, answer, word)


def folded(conv, norm, eps=True, bias=True, root=True, out=True, dims=(-1, 1, 1, 1)):
    new = copy.deepcopy(conv)
    var = norm.running_var + (norm.eps if eps else 0)
    gamma, beta = (norm.weight, norm.bias) if norm.affine else (torch.ones_like(var), torch.zeros_like(var))
    scale = gamma/(var.sqrt() if root else var)
    new.weight = nn.Parameter((conv.weight*scale.view(dims)).detach())
    old = conv.bias if conv.bias is not None and bias else torch.zeros_like(var)
    new.bias = nn.Parameter((beta + (old - norm.running_mean)*scale).detach()) if out else new.bias
    return new


def test_fold_norm_judges_behaviour(capsys):
    from torch.nn.utils.fusion import fuse_conv_bn_eval
    def by_pulses(conv, norm):
        "No formula: ask norm(conv(·)) what it does to zeros, and scale by what it does to γ's channel."
        new = copy.deepcopy(conv)
        with torch.no_grad():
            zero, one = torch.zeros(1, norm.num_features, 1, 1).double(), torch.ones(1, norm.num_features, 1, 1).double()
            shift = norm(zero).flatten(); scale = norm(one).flatten() - shift
            new.weight = nn.Parameter(conv.weight*scale.view(-1, 1, 1, 1))
            new.bias = nn.Parameter(shift if conv.bias is None else shift + conv.bias*scale)
        return new
    def torchs(conv, norm): return fuse_conv_bn_eval(conv.eval(), norm) if norm.affine else folded(conv, norm)
    for answer in (folded, by_pulses, torchs): E.check_fold_norm(answer)
    assert capsys.readouterr().out.count("✓") == 3
    for options in (dict(eps=False), dict(bias=False), dict(root=False), dict(out=False)): refuses(E.check_fold_norm, partial(folded, **options), "scale")
    def in_place(conv, norm): new = folded(conv, norm); conv.weight.data.copy_(new.weight); return new
    refuses(E.check_fold_norm, in_place, "work on a copy")
    refuses(E.check_fold_norm, lambda conv, norm: nn.Sequential(conv, norm), "return an nn.Conv2d, not Sequential")
    refuses(E.check_fold_norm, lambda conv, norm: nn.Conv2d(4, conv.out_channels, conv.kernel_size), "options|off by")
    refuses(E.check_fold_norm, lambda conv, norm: None, "returned None")
    refuses(E.check_fold_norm, lambda conv, norm: conv.weight*norm.weight, "raised")


def test_receptive_field_judges_behaviour(capsys):
    def forwards(layers):
        side = step = 1
        for k, s in layers: side += (k - 1)*step; step *= s
        return side, step
    def backwards(layers):
        side = 1
        for k, s in reversed(layers): side = (side - 1)*s + k
        return [side, math.prod(s for _, s in layers)]
    def tensors(layers): return torch.tensor(forwards(layers))
    for answer in (forwards, backwards, tensors): E.check_receptive_field(answer)
    assert capsys.readouterr().out.count("✓") == 3
    def stride_first(layers):
        side = step = 1
        for k, s in layers: step *= s; side += (k - 1)*step
        return side, step
    def no_stride(layers): return 1 + sum(k - 1 for k, _ in layers), math.prod(s for _, s in layers)
    def added(layers): return forwards(layers)[0], 1 + sum(s - 1 for _, s in layers)
    refuses(E.check_receptive_field, stride_first, "before")
    refuses(E.check_receptive_field, no_stride, "before")
    refuses(E.check_receptive_field, added, "all strides multiply")
    refuses(E.check_receptive_field, lambda layers: 3, "two numbers")
    refuses(E.check_receptive_field, lambda layers: "ab", "two numbers")
    refuses(E.check_receptive_field, lambda layers: (1, 1, 1), "not 3")
    def popping(layers): out = forwards(layers); layers.clear(); return out
    refuses(E.check_receptive_field, popping, "was changed")


def test_predictions_and_paths(capsys):
    right = dict(weights=2_359_296, threes=19, side=8, start=0, seen=.015625)
    E.check_predictions(right); E.check_predictions({k: torch.tensor(float(v)) for k, v in right.items()})
    E.check_predictions(right | dict(seen=.0156))                 # a pencil's rounding
    for key, value, word in (("weights", 2048*2048*9, "quarter"), ("threes", 16, "stem"), ("side", 7, "rounded up"), ("start", 1, "γ"), ("seen", .25, "four"), ("seen", .015, "four"), ("threes", 18, "stem"), ("side", 8.2, "rounded up"), ("start", 1e-6, "γ")):
        refuses(E.check_predictions, right | {key: value}, word)
    refuses(E.check_predictions, {k: v for k, v in right.items() if k != "seen"}, "needs a number")
    def pascal(n):
        row = [1]
        for _ in range(n): row = [a + b for a, b in zip([0, *row], [*row, 0])]
        return row
    for answer in (pascal, lambda n: [math.comb(n, k) for k in range(n + 1)], lambda n: torch.tensor(pascal(n))): E.check_path_lengths(answer)
    assert capsys.readouterr().out.count("✓") == 6
    refuses(E.check_path_lengths, lambda n: [1]*(n + 1), "two ways")
    refuses(E.check_path_lengths, lambda n: pascal(n)[1:], "make")
    refuses(E.check_path_lengths, lambda n: [2**n - n, *[1]*n], "choose the blocks")
    refuses(E.check_path_lengths, lambda n: 2**n, "list of whole numbers")
    refuses(E.check_path_lengths, lambda n: None, "returned None")
