"exp.norm against PyTorch (every option, mode, dtype and unlucky input), and the laws of normalising."
import copy
import inspect
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from exp.exercises import batchnorm as E6, norms as E6a
from exp.norm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, centre

SHAPES = {1: (5, 6), 2: (5, 6, 7), 3: (4, 6, 3, 5), 4: (3, 6, 2, 3, 4)}
BATCH = {(5, 6): nn.BatchNorm1d, (5, 6, 7): nn.BatchNorm1d, (4, 6, 3, 5): nn.BatchNorm2d, (3, 6, 2, 3, 4): nn.BatchNorm3d}
INSTANCE = {(5, 6, 7): nn.InstanceNorm1d, (4, 6, 3, 5): nn.InstanceNorm2d, (3, 6, 2, 3, 4): nn.InstanceNorm3d}


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


def close(a, b, **tol): torch.testing.assert_close(a, b, equal_nan=True, **tol)


def run(layer, x, modes=(True, True, False)):
    "Outputs, gradients and state, step by step."
    out = []
    wanted = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).reshape(x.shape).sin().to(x.dtype)
    for mode in modes:
        layer.train(mode); layer.zero_grad()
        inp = x.clone().requires_grad_()
        y = layer(inp)
        (y*wanted).sum().backward()
        out.append([y.detach(), inp.grad, [p.grad for p in layer.parameters()], {k: v.clone() for k, v in layer.state_dict().items()}])
    return out


def same(ours, theirs, x, **tol):
    with torch.no_grad():
        for p in theirs.parameters(): p.uniform_(.5, 2)
    ours.load_state_dict(theirs.state_dict())                    # strict, both ways
    theirs.load_state_dict(ours.state_dict())
    assert [k for k, _ in ours.named_buffers()] == [k for k, _ in theirs.named_buffers()]
    a, b = run(ours, x), run(theirs, x)
    assert [y.dtype for y, *_ in a] == [x.dtype]*3
    close(a, b, **tol)


# --- against PyTorch -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES.values())
@pytest.mark.parametrize("options", [{}, dict(eps=.3), dict(momentum=.5), dict(momentum=None), dict(momentum=0.), dict(affine=False),
                                     dict(track_running_stats=False), dict(affine=False, track_running_stats=False)], ids=str)
def test_batchnorm_is_pytorchs(shape, options):
    same(BatchNorm(6, **options).double(), BATCH[shape](6, **options).double(), 3*torch.randn(shape).double() + 2, rtol=1e-9, atol=1e-9)
    same(BatchNorm(6, **options), BATCH[shape](6, **options), 3*torch.randn(shape) + 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", INSTANCE)
@pytest.mark.parametrize("options", [{}, dict(eps=.3), dict(affine=True), dict(affine=True, track_running_stats=True),
                                     dict(track_running_stats=True, momentum=.5)], ids=str)
def test_instancenorm_is_pytorchs(shape, options):
    same(InstanceNorm(6, **options).double(), INSTANCE[shape](6, **options).double(), 3*torch.randn(shape).double() + 2, rtol=1e-9, atol=1e-9)
    same(InstanceNorm(6, **options), INSTANCE[shape](6, **options), 3*torch.randn(shape) + 2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [*SHAPES.values(), (1, 6), (1, 6, 2, 2)])
@pytest.mark.parametrize("args, options", [((1, 6), {}), ((2, 6), {}), ((3, 6), dict(eps=.3)), ((2, 6), dict(affine=False))], ids=str)
def test_groupnorm_is_pytorchs(shape, args, options):
    same(GroupNorm(*args, **options).double(), nn.GroupNorm(*args, **options).double(), 3*torch.randn(shape).double() + 2, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("args, shape", [((12,), (4, 7, 12)), ((12,), (12,)), (((7, 12),), (4, 7, 12)), (([7, 12], 1e-2), (4, 7, 12)),
                                         ((12, 1e-5, False), (4, 12)), ((12, 1e-5, True, False), (4, 12)), ((1,), (4, 1)),
                                         ((torch.Size([3, 5, 5]),), (1, 3, 5, 5))], ids=str)
def test_layernorm_is_pytorchs(args, shape):
    same(LayerNorm(*args).double(), nn.LayerNorm(*args).double(), 3*torch.randn(shape).double() + 2, rtol=1e-9, atol=1e-9)


PAIRS = [(BatchNorm, nn.BatchNorm2d), (InstanceNorm, nn.InstanceNorm2d), (GroupNorm, nn.GroupNorm), (LayerNorm, nn.LayerNorm)]


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_arguments_have_pytorchs_names_order_and_defaults(ours, theirs):
    mine, good = ([(p.name, p.default, p.kind) for p in inspect.signature(c).parameters.values()] for c in (ours, theirs))
    assert mine[:len(good)] == good or mine == [*good, ("bias", True, inspect.Parameter.KEYWORD_ONLY)]   # older PyTorch has no bias=


def make(cls, **options):
    return {BatchNorm: lambda: BatchNorm(6, **options), InstanceNorm: lambda: InstanceNorm(6, affine=True, **options),
            GroupNorm: lambda: GroupNorm(3, 6, **options), LayerNorm: lambda: LayerNorm((6, 4, 4), **options)}[cls]()
def twin(cls, **options):
    return {BatchNorm: lambda: nn.BatchNorm2d(6, **options), InstanceNorm: lambda: nn.InstanceNorm2d(6, affine=True, **options),
            GroupNorm: lambda: nn.GroupNorm(3, 6, **options), LayerNorm: lambda: nn.LayerNorm((6, 4, 4), **options)}[cls]()
FOUR = [BatchNorm, InstanceNorm, GroupNorm, LayerNorm]


@pytest.mark.parametrize("cls", FOUR)
def test_bias_device_and_dtype(cls):
    layer = make(cls, bias=False, device="cpu", dtype=torch.float64)
    assert layer.bias is None and layer.weight.dtype == torch.float64 and "bias" not in layer.state_dict()
    assert layer(torch.randn(3, 6, 4, 4).double()).dtype == torch.float64
    assert all(b.dtype in (torch.float64, torch.long) for b in layer.buffers())


@pytest.mark.parametrize("cls", FOUR)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parameters", ["half", "single"])
def test_half_precision(cls, dtype, parameters):
    ours, theirs = make(cls), twin(cls)
    if parameters == "half": ours, theirs = ours.to(dtype), theirs.to(dtype)
    same(ours, theirs, (2*torch.randn(3, 6, 4, 4) + 1).to(dtype), rtol=3e-2, atol=.15 if dtype == torch.bfloat16 else .03)


@pytest.mark.parametrize("cls", FOUR)
@pytest.mark.parametrize("scale", [1e-3, 100.])
def test_small_and_large_values(cls, scale):
    same(make(cls), twin(cls), scale*torch.randn(3, 6, 4, 4), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cls", FOUR)
def test_mean_1000_std_001_is_exact_to_single_precision(cls):
    x = 1000 + .01*torch.randn(16, 6, 4, 4)
    wide = make(cls).double()
    close(make(cls)(x), wide(x.double()).float(), rtol=1e-3, atol=1e-4)
    naive = x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()
    assert (naive - 1e-4).abs().max() > 1e-3                     # the other formula is not


@pytest.mark.parametrize("cls", FOUR)
def test_a_constant_input_gives_the_shift(cls):
    layer = make(cls)
    with torch.no_grad(): layer.bias.uniform_()
    y = layer(torch.full((3, 6, 4, 4), 1234.5))
    close(y, layer.bias.detach().reshape(1, *layer.bias.shape, *[1]*(3 - layer.bias.ndim)).expand_as(y))


@pytest.mark.parametrize("cls", FOUR)
def test_channels_last_and_views(cls):
    x = torch.randn(3, 6, 4, 4)
    right = copy.deepcopy(make(cls))(x)
    close(make(cls)(x.to(memory_format=torch.channels_last)), right)
    close(make(cls)(x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)), right)


@pytest.mark.parametrize("cls", FOUR)
def test_gradients_twice(cls):
    layer = make(cls).double() if cls is not LayerNorm else LayerNorm((6, 2, 2)).double()
    def f(x): return copy.deepcopy(layer)(x)                     # the past is a constant
    x = torch.randn(2, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x.detach().clone().requires_grad_(), atol=1e-4)


@pytest.mark.parametrize("cls", FOUR)
def test_buffers_carry_no_graph_and_modules_copy_and_pickle(cls):
    layer = make(cls)
    layer(torch.randn(3, 6, 4, 4, requires_grad=True)).sum().backward()
    assert not any(b.requires_grad or b.grad_fn for b in layer.buffers())
    x = torch.randn(3, 6, 4, 4)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))): close(other.eval()(x), layer.eval()(x))
    file = io.BytesIO(); torch.save(layer.state_dict(), file); file.seek(0)
    fresh = make(cls); fresh.load_state_dict(torch.load(file, weights_only=True))
    close(fresh.eval()(x), layer.eval()(x), rtol=0, atol=0)
    assert str(layer).startswith(cls.__name__ + "(")


def test_reset():
    for layer in (BatchNorm(6), InstanceNorm(6, affine=True, track_running_stats=True)):
        fresh = copy.deepcopy(layer.state_dict())
        layer(torch.randn(4, 6, 3)); layer.weight.data.fill_(3); layer.bias.data.fill_(3)
        layer.reset_parameters()                   # the averages, too, as PyTorch's
        close(layer.state_dict(), fresh)
    BatchNorm(6, affine=False, track_running_stats=False).reset_running_stats()
    BatchNorm(6, affine=False).reset_parameters()


# --- what cannot work says so ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layer, x", [(BatchNorm(6), (1, 6)), (BatchNorm(6), (1, 6, 1, 1)), (InstanceNorm(6), (4, 6, 1)),
                                      (InstanceNorm(6), (4, 6, 1, 1)), (GroupNorm(6, 6), (1, 6)),
                                      (BatchNorm(6, track_running_stats=False).eval(), (1, 6))])
def test_one_value_raises_what_pytorch_raises(layer, x):
    theirs = {BatchNorm: nn.BatchNorm1d if len(x) == 2 else nn.BatchNorm2d, InstanceNorm: nn.InstanceNorm1d if len(x) == 3 else nn.InstanceNorm2d}
    if isinstance(layer, GroupNorm): other = nn.GroupNorm(6, 6)
    else: other = theirs[type(layer)](6, track_running_stats=layer.track_running_stats)
    other.train(layer.training)
    with pytest.raises(ValueError, match="Expected more than 1"): other(torch.randn(x))
    with pytest.raises(ValueError, match="Expected more than 1") as mine: layer(torch.randn(x))
    assert str(tuple(x))[:-1] in str(mine.value)
    if layer.training and layer._buffers.get("running_mean") is not None: assert layer.num_batches_tracked == 0   # nothing half-done


def test_one_value_is_fine_in_evaluation():
    for shape in ((1, 6), (1, 6, 1, 1)): assert BatchNorm(6).eval()(torch.randn(shape)).shape == shape


@pytest.mark.parametrize("cls", FOUR)
@pytest.mark.parametrize("shape", [(4, 5, 4, 4), (4, 12, 4, 4), (6,)])
def test_wrong_shapes_name_the_value_and_the_cure(cls, shape):
    with pytest.raises(ValueError, match="6") as error: make(cls)(torch.randn(shape))
    assert str(shape) in str(error.value) and ("give" in str(error.value) or "must" in str(error.value))


@pytest.mark.parametrize("cls", FOUR)
def test_whole_numbers_are_refused(cls):
    with pytest.raises(TypeError, match="float"): make(cls)(torch.ones(2, 6, 4, 4, dtype=torch.long))


def test_an_empty_training_batch_is_refused():
    layer = BatchNorm(6)
    with pytest.raises(ValueError, match=r"\(0, 6, 4, 4\)"): layer(torch.empty(0, 6, 4, 4))
    assert layer.running_mean.isfinite().all()
    assert layer.eval()(torch.empty(0, 6, 4, 4)).shape == (0, 6, 4, 4)
    tracked = InstanceNorm(6, track_running_stats=True)
    assert tracked(torch.empty(0, 6, 4, 4)).shape == (0, 6, 4, 4) and tracked.running_mean.isfinite().all()


def test_a_group_of_one_value_is_refused_in_batches_too():
    with pytest.raises(ValueError, match=r"Expected more than 1.*\(5, 6"): GroupNorm(6, 6)(torch.randn(5, 6))   # PyTorch: amplified rounding


@pytest.mark.parametrize("cls", [InstanceNorm, GroupNorm, LayerNorm])
def test_an_empty_batch_stays_empty_where_items_are_alone(cls):
    assert make(cls)(torch.empty(0, 6, 4, 4)).shape == (0, 6, 4, 4)
    if cls is GroupNorm: assert make(cls)(torch.empty(0, 6)).shape == (0, 6)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"\(6\) must be divisible by num_groups \(4\)"): GroupNorm(4, 6)
    with pytest.raises(ValueError, match="normalized_shape"): LayerNorm(())(torch.randn(3, 4))


# --- buffers that were taken away, switched off, or are missing ------------------------------------------------------------

def test_averages_set_to_none():
    x, outs = torch.randn(4, 3, 5), []
    for layer in (BatchNorm(3), nn.BatchNorm1d(3)):
        layer.running_mean = layer.running_var = None
        outs.append((layer(x), layer.eval()(x)))
    close(*outs, rtol=1e-5, atol=1e-5)


def test_tracking_switched_off_later():
    x, layers = torch.randn(4, 3), (BatchNorm(3), nn.BatchNorm1d(3))
    for layer in layers: layer(x); layer.track_running_stats = False; layer(5*x)
    close(*(dict(layer.state_dict()) for layer in layers))
    close(*(layer.eval()(x) for layer in layers), rtol=1e-5, atol=1e-5)


def test_a_state_from_before_there_was_a_count_loads_and_a_damaged_one_does_not():
    old = nn.Sequential(nn.BatchNorm1d(3)); old(torch.randn(8, 3))
    for net in (nn.Sequential(BatchNorm(3)), nn.Sequential(nn.BatchNorm1d(3))):
        net.load_state_dict({k: v for k, v in old.state_dict().items() if not k.endswith("tracked")})
        assert torch.equal(net[0].running_mean, old[0].running_mean) and net[0].num_batches_tracked == 0
        with pytest.raises(RuntimeError, match="running_mean"):
            net.load_state_dict({k: v for k, v in old.state_dict().items() if not k.endswith("mean")})


@pytest.mark.parametrize("cls", FOUR)
def test_evaluation_before_any_training(cls):
    ours, theirs, x = make(cls).eval(), twin(cls).eval(), 3*torch.randn(4, 6, 4, 4) + 2
    close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


def test_sizes_may_be_numpys():
    two, six, x = np.int64(2), np.int64(6), torch.randn(4, 6)
    for layer in (LayerNorm(six), LayerNorm([six]), LayerNorm(n for n in (six,)), BatchNorm(six), GroupNorm(two, six)): assert layer(x).shape == (4, 6)
    assert LayerNorm((6,))(x).shape == LayerNorm(torch.Size([6]))(x).shape == (4, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_in_single_precision(dtype):
    x = (300 + torch.randn(64, 6, 32, 32)).to(dtype)                     # 65,536 numbers a channel: their sum is 2·10⁷
    for layer in (BatchNorm(6), GroupNorm(2, 6), InstanceNorm(6), LayerNorm((6, 32, 32))):
        close(layer(x).double(), copy.deepcopy(layer).double()(x.double()), rtol=2*torch.finfo(dtype).eps, atol=2*torch.finfo(dtype).eps)


# --- laws ------------------------------------------------------------------------------------------------------------------

numbers = st.floats(-50, 50).filter(lambda v: v == 0 or abs(v) > 1e-3)


@settings(max_examples=25, deadline=None)
@given(shift=numbers, scale=st.floats(.1, 100), seed=st.integers(0, 10**6), negative=st.booleans())
def test_shift_and_scale_of_the_input_do_not_matter(shift, scale, seed, negative):
    x = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for layer in (BatchNorm(6, eps=0.), InstanceNorm(6, eps=0.), GroupNorm(2, 6, eps=0.), LayerNorm((6, 3, 3), eps=0.)):
        layer = layer.double()
        sign = -1 if negative else 1
        close(layer(sign*scale*x + shift), sign*layer(x), rtol=1e-7, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(bs=st.integers(2, 9), seed=st.integers(0, 10**6))
def test_items_are_alone_or_not(bs, seed):
    g = torch.Generator().manual_seed(seed)
    x, order = torch.randn(bs, 6, 3, 3, generator=g), torch.randperm(bs, generator=g)
    for layer in (InstanceNorm(6), GroupNorm(3, 6), LayerNorm((6, 3, 3))):
        close(layer(x), torch.cat([layer(item[None]) for item in x]))
    close(BatchNorm(6)(x[order]), BatchNorm(6)(x)[order])


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), mean=st.floats(-1e4, 1e4), seed=st.integers(0, 10**6))
def test_centre(shape, mean, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean
    dims = list(range(0, len(shape), 2))
    d, m, var = centre(x, dims)
    wide = x.double()
    close(m.double(), wide.mean(dims, keepdim=True), rtol=2e-7, atol=2e-7)
    close(d.double(), wide - wide.mean(dims, keepdim=True), rtol=1e-5, atol=1e-5)
    close(var.double(), wide.var(dims, correction=0, keepdim=True), rtol=1e-5, atol=1e-9)


def test_group_norm_has_layer_and_instance_norm_as_ends():
    x = torch.randn(4, 6, 3, 3)
    close(GroupNorm(1, 6)(x), LayerNorm((6, 3, 3))(x))
    close(GroupNorm(6, 6)(x), InstanceNorm(6)(x))
    close(BatchNorm(6)(x[:1]), InstanceNorm(6)(x[:1]))


def test_gradient_has_no_part_along_a_shift_or_a_stretch():
    layer, x = BatchNorm(6, eps=0.).double(), torch.randn(8, 6, 3, 3).double().requires_grad_()
    (layer(x)*torch.randn_like(x)).sum().backward()
    assert x.grad.sum((0, 2, 3)).abs().max() < 1e-12 and (x.grad*x).sum((0, 2, 3)).abs().max() < 1e-12


# --- in a network ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cls", [BatchNorm, lambda c: GroupNorm(2, c), InstanceNorm], ids=["batch", "group", "instance"])
def test_a_network_with_it_learns(cls):
    net = nn.Sequential(nn.Conv2d(1, 6, 3), cls(6), nn.ReLU(), nn.Flatten(), nn.Linear(6*36, 2))
    opt = torch.optim.SGD(net.parameters(), lr=.1)
    x = torch.randn(64, 1, 8, 8); y = (x[:, 0, :, :4].mean((1, 2)) > x[:, 0, :, 4:].mean((1, 2))).long()
    for _ in range(30):
        loss = F.cross_entropy(net(x), y); loss.backward(); opt.step(); opt.zero_grad()
    assert (net.eval()(x).argmax(1) == y).float().mean() > .85


# --- the exercises' checkers -------------------------------------------------------------------------------------------

def refuses(check, answer, word):
    with pytest.raises(AssertionError, match=word): check(answer)


def fold(conv, norm, eps=True, old=True, affine=True, root=True, by_scale=True):
    with torch.no_grad():
        var = norm.running_var + (norm.eps if eps else 0)
        scale, shift = 1/(var.sqrt() if root else var), 0.
        if affine and norm.weight is not None: scale, shift = scale*norm.weight, norm.bias
        one = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups).to(conv.weight)
        bias = conv.bias if old and conv.bias is not None else 0.
        one.weight.copy_(conv.weight*scale.view(-1, 1, 1, 1))
        one.bias.copy_((bias - norm.running_mean)*(scale if by_scale else 1.) + shift)
    return one


def test_fold_batchnorm_judges_behaviour(capsys):
    def by_asking(conv, norm):
        "No formula: what does the norm make of 0 and of 1?"
        new, ask = copy.deepcopy(conv), torch.zeros(1, conv.out_channels, 1, 1).double()
        with torch.no_grad():
            shift = norm(ask).flatten()
            scale = norm(ask + 1).flatten() - shift
            new.weight = nn.Parameter(torch.einsum("o...,o->o...", conv.weight, scale))
            new.bias = nn.Parameter(shift if conv.bias is None else shift + scale*conv.bias)
        return new
    for answer in (fold, by_asking): E6.check_fold_batchnorm(answer)
    assert capsys.readouterr().out.count("✓") == 2
    def in_place(conv, norm):
        new = fold(conv, norm); conv.weight.data.copy_(new.weight.data); return new
    def undilated(conv, norm):
        new = fold(conv, norm); new.dilation = (1, 1); return new
    def square(conv, norm, name):
        "One number where the convolution has two."
        like = copy.copy(conv); setattr(like, name, getattr(conv, name)[0])
        return fold(like, norm)
    for name in ("eps", "old", "affine", "root", "by_scale"): refuses(E6.check_fold_batchnorm, lambda c, n: fold(c, n, **{name: False}), "scale each filter")
    for word, answer in {"were changed": in_place, "copy stride": undilated, "return one nn.Conv2d": nn.Sequential, "keep torch.float64": lambda c, n: fold(c, n).float(),
                         "build a new one": lambda c, n: c, "training mode": lambda c, n: fold(c, n.train())}.items(): refuses(E6.check_fold_batchnorm, answer, word)
    for name, word in (("stride", "copy stride"), ("dilation", "copy stride"), ("kernel_size", "size of tensor")):
        refuses(E6.check_fold_batchnorm, lambda c, n: square(c, n, name), word)


NORMS = BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d


@torch.no_grad()
def recalibrate(model, batches, kinds=NORMS, reset=True, none=True, all_train=False, modes_back=True, momentum_back=True, inside=True):
    norms, modes = [m for m in (model.modules() if inside else model.children()) if isinstance(m, kinds)], [(m, m.training) for m in model.modules()]
    momenta = [n.momentum for n in norms]
    model.train(all_train)
    for n in norms:
        n.train()
        if reset: n.reset_running_stats()
        if none: n.momentum = None
    for xb in batches: model(xb)
    for n, momentum in zip(norms, momenta if momentum_back else ()): n.momentum = momentum
    for m, mode in modes if modes_back else (): m.training = mode
    return model


def test_recalibrate_judges_behaviour(capsys):
    @torch.no_grad()
    def by_hand(model, batches):
        "No option of the norm: note what reaches each, and fill the buffers."
        seen, modes = {m: [] for m in model.modules() if isinstance(m, NORMS) and m.running_mean is not None}, [(m, m.training) for m in model.modules()]
        hooks = [m.register_forward_pre_hook(lambda m, inp: seen[m].append(inp[0].transpose(0, 1).flatten(1))) for m in seen]
        model.eval()
        for m in seen: m.train()
        for xb in batches: model(xb)
        for hook in hooks: hook.remove()
        for m, xs in seen.items():
            m.running_mean.copy_(sum(x.mean(1) for x in xs)/len(xs))
            m.running_var.copy_(sum(x.var(1) for x in xs)/len(xs))
        for m, mode in modes: m.training = mode
        return model
    for answer in (recalibrate, by_hand): E6.check_recalibrate_(answer)
    assert capsys.readouterr().out.count("✓") == 2
    wrong = {"first running_mean": dict(reset=False), "running_mean is": dict(none=False), "only them": dict(all_train=True), "BatchNorm1d of vectors": dict(kinds=(BatchNorm, nn.BatchNorm2d)),
             "BatchNorm3d of volumes": dict(kinds=(BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d)), "inside blocks": dict(inside=False),
             "modes have changed": dict(modes_back=False), "put each momentum back": dict(momentum_back=False)}
    for word, options in wrong.items(): refuses(E6.check_recalibrate_, lambda m, b: recalibrate(m, b, **options), word)
    refuses(E6.check_recalibrate_, lambda m, b: recalibrate(m, [torch.cat(b)]), "instead of")
    refuses(E6.check_recalibrate_, lambda m, b: recalibrate(copy.deepcopy(m), b), "the model itself")


def test_predictions_of_06(capsys):
    right = {1: 128, 2: 7, 3: 8, 4: 3**.5, 5: .25}
    for answer in (right, {1: torch.tensor(128), 2: "7", 3: 8., 4: 1.73, 5: .25}): E6.check_predictions(answer)
    for key, value, word in ((1, 256, "buffers"), (2, 8, "half"), (3, 7, "in full"), (4, 3, "variance"), (5, 4, "slopes"), (5, None, "needs a number"), (1, torch.ones(2), "needs a number")):
        refuses(E6.check_predictions, right | {key: value}, word)
    for answer in ({"a", "b", "c", "f"}, "abcf", "a, b, c, f", ["f", "c", "b", "a"]): E6.check_only_the_batch(answer)
    assert capsys.readouterr().out.count("✓") == 6
    for answer, word in (({"a", "b", "c"}, "'f'"), (set("abcdf"), "'d'"), (set("bcf"), "'a'"), (set("abcef"), "'e'"), ([["a"]], "none of"), ({1, "z"}, "none of"), (7, "a set of letters")):
        refuses(E6.check_only_the_batch, answer, word)


def rms(x, w, eps): return x*(x.square().mean(-1, keepdim=True) + eps).rsqrt()*(1 if w is None else w)


def test_rms_norm_judges_behaviour(capsys):
    def careful(x, w, eps): return rms(x.float() if x.dtype == torch.half else x, w, eps).to(x.dtype)
    def by_sums(x, w, eps):
        y = x.double()
        y = y/((y*y).sum(-1)/y.shape[-1] + eps).sqrt().unsqueeze(-1)
        return (y if w is None else y*w).to(x.dtype)
    for answer in (careful, by_sums, lambda x, w, eps: F.rms_norm(x, x.shape[-1:], w, eps)): E6a.check_rms_norm(answer)
    assert capsys.readouterr().out.count("✓") == 3
    def spoils(x, w, eps):
        y = careful(x, w, eps)
        if w is not None: w.zero_()
        return y
    wrong = {"subtract nothing": lambda x, w, eps: careful(x - x.mean(-1, keepdim=True), w, eps), "inside the root": lambda x, w, eps: x/(x.square().mean(-1, keepdim=True).sqrt() + eps)*(1 if w is None else w),
             "over the last axis": lambda x, w, eps: x*(x.square().mean() + eps).rsqrt()*(1 if w is None else w), "fit into half": rms, "x was changed": lambda x, w, eps: x.copy_(rms(x, w, eps)),
             "weight was changed": spoils, "only half precision": lambda x, w, eps: rms(x.float(), w if w is None else w.float(), eps).to(x.dtype),
             "dtype of x": lambda x, w, eps: rms(x.float() if x.dtype == torch.half else x, w, eps), "return a tensor": lambda x, w, eps: rms(x, w, eps).tolist()}
    for word, answer in wrong.items(): refuses(E6a.check_rms_norm, answer, word)
    refuses(E6a.check_rms_norm, lambda x, w, eps: careful(x, None if x.dtype == torch.half else w, eps), "multiply by the weight there")
    refuses(E6a.check_rms_norm, lambda x, w, eps: careful(x, w, eps)[0] if x.dtype == torch.half else rms(x, w, eps), "the shape of x")


def layernorm_back(grad, x, weight, eps, mean=True, along=True, gamma=True, axes=None, weighted=False):
    d = x - x.mean(-1, keepdim=True)
    r = (d.square().mean(-1, keepdim=True) + eps).rsqrt()
    h, g = d*r, grad*weight if gamma else grad
    dx = g - g.mean(-1, keepdim=True) if mean else g
    if along: dx = dx - h*(g*h).mean(-1, keepdim=True)
    axes = axes or list(range(x.ndim - 1))
    return r*dx, ((g if weighted else grad)*h).sum(axes), grad.sum(axes)


def test_layernorm_backward_judges_behaviour(capsys):
    def by_jacobian(grad, x, weight, eps):
        n, out = x.shape[-1], []
        xs, gs = x.reshape(-1, n), grad.reshape(-1, n)
        for row, g in zip(xs, gs):
            r = 1/(row.var(correction=0) + eps).sqrt()
            h = (row - row.mean())*r
            out.append((g*weight) @ (r*(torch.eye(n).double() - 1/n - torch.outer(h, h)/n)))
        h = F.layer_norm(xs, (n,), eps=eps)
        return [torch.stack(out).view_as(x), torch.einsum("ij,ij->j", gs, h), gs.sum(0)]
    for answer in (layernorm_back, by_jacobian): E6a.check_layernorm_backward(answer)
    assert capsys.readouterr().out.count("✓") == 2
    for options, word in ((dict(mean=False), "loses its mean"), (dict(along=False), "its part along"), (dict(gamma=False), "grad·weight"), (dict(axes=[0]), "all axes but"), (dict(weighted=True), "sum grad·x̂")):
        refuses(E6a.check_layernorm_backward, lambda *a: layernorm_back(*a, **options), word)
    def spoils(grad, x, weight, eps):
        out = layernorm_back(grad, x, weight, eps); weight.zero_(); return out
    def autograd(grad, x, weight, eps):
        with torch.enable_grad(): return torch.autograd.grad((F.layer_norm(x.requires_grad_(), x.shape[-1:], weight, None, eps)*grad).sum(), x)
    refuses(E6a.check_layernorm_backward, spoils, "in place")
    refuses(E6a.check_layernorm_backward, autograd, "raised RuntimeError")


def test_predictions_of_06a(capsys):
    right = {"BatchNorm, training", "BatchNorm without averages, evaluation"}
    for answer in (right, sorted(right)): E6a.check_neighbours(answer)
    for answer, word in ((right | {"BatchNorm, evaluation"}, "1 of 7"), ({"BatchNorm, training"}, "1 of 7"), (right | {"InstanceNorm, tracking, training"}, "1 of 7"), (set(), "2 of 7"), ("BatchNorm", "set of names"),
                         ({"x", 1}, "copy the names"), ([["a"]], "copy the names")): refuses(E6a.check_neighbours, answer, word)
    numbers = {1: 64, 2: 3136, 3: 32, 4: 1, 5: 1}
    for answer in (numbers, {key: torch.tensor(value) for key, value in numbers.items()}): E6a.check_predictions(answer)
    assert capsys.readouterr().out.count("✓") == 4
    for key, value, word in ((1, 8, "not per group"), (2, 64, "per entry"), (3, 4, "photo and group"), (4, .7, "one std"), (5, 2, "its std as well")): refuses(E6a.check_predictions, numbers | {key: value}, word)
