"""The fused classifier against SpeechBrain's path and naive formulas."""

import contextlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hyperpyyaml import load_hyperpyyaml
from speechbrain.lobes.models.ECAPA_TDNN import Classifier
from speechbrain.nnet.losses import AngularMargin, LogSoftmaxWrapper
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from speechbrain_ram.losses import (
    FORMS,
    OBJECTIVES,
    RealMargin,
    make_objective,
)
from speechbrain_ram.training import fused as fused_torch
from speechbrain_ram.training.diagnostics import (
    effective_classes,
    nearest_others,
    satisfied_below,
    satisfied_share,
    target_cosines,
)
from speechbrain_ram.training.fused import (
    FUSED_FROM,
    FusedMarginClassifier,
    make_classifier,
)

# SpeechBrain's AAM computes in float32 whatever comes in.
IN_FLOAT32 = ("aam", "real aam")

REAL = (*OBJECTIVES[3:], "real am", "real aam")
CASES = [(name, "paper") for name in OBJECTIVES[:3]]
CASES += [(name, form) for name in REAL for form in FORMS]
each_objective = pytest.mark.parametrize("name, form", CASES)


def objective(name, *args):
    """As make_objective; "real am" is RealMargin around "am"."""
    loss_fn = make_objective(name.removeprefix("real "), *args)
    return RealMargin(loss_fn, args[-1]) if "real " in name else loss_fn


def batch(n, n_classes, dim, dtype=torch.float32, near=0.0, seed=0):
    """Embeddings, weights, labels; `near` pulls them to their classes."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_classes, dim, dtype=dtype, generator=draw)
    labels = torch.randint(n_classes, (n,), generator=draw)
    x = torch.randn(n, dim, dtype=dtype, generator=draw)
    return x + near * weight[labels], weight, labels


def fused_loss(x, weight, labels, loss_fn, chunk_size=None):
    """What the classifier gives with these weights."""
    # Of any size, for its own weights are not used.
    classifier = FusedMarginClassifier(1, 2, loss_fn, chunk_size)
    return functional_call(classifier, {"weight": weight}, (x, labels))


def naive_loss(x, weight, labels, loss_fn):
    """The table of losses.py, word by word, for moderate exponents."""
    total = 0.0
    for row, label in zip(F.normalize(x), labels.tolist(), strict=True):
        cosines = F.normalize(weight) @ row
        one = torch.ones(1, 1, dtype=cosines.dtype)
        a = loss_fn(cosines[label].view(1, 1), one).squeeze()
        z = (
            loss_fn.scale * torch.cat([cosines[:label], cosines[label + 1 :]])
            - a
        )
        form = getattr(loss_fn, "form", None)
        if form == "paper":
            terms = z.clamp(min=0).exp()
        elif form == "released":
            terms = torch.where(z > 0, z.exp(), (-a).exp())
        elif form == "hinge":
            terms = torch.expm1(z.clamp(min=0))
        else:
            terms = z.exp()
        total = total + torch.log1p(terms.sum())
    return total / len(labels)


def gradients(function, x, weight):
    x = x.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    loss = function(x, weight)
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


def assert_close(ours, theirs, rtol):
    for name, a, b in zip(
        ("loss", "d embeddings", "d weight"), ours, theirs, strict=True
    ):
        # Of 1 at least: cross-entropy of a confident sample cancels.
        allowed = rtol * b.abs().max().clamp(min=1)
        excess = (a - b).abs().max() - allowed
        assert excess <= 0, f"{name} off by {excess:.2e} more than allowed"


@each_objective
@pytest.mark.parametrize("chunk", [1, 10, 37, None])
def test_equals_the_formulas_in_float64(name, form, chunk):
    loss_fn = objective(name, 0.2, 15.0, form)
    x, weight, labels = batch(9, 37, 8, torch.float64, near=0.4)
    labels[:4] = torch.tensor([0, 9, 10, 36])  # borders of chunks of 10
    ours = gradients(
        lambda x, w: fused_loss(x, w, labels, loss_fn, chunk), x, weight
    )
    naive = gradients(lambda x, w: naive_loss(x, w, labels, loss_fn), x, weight)
    assert_close(ours, naive, 2e-6 if name in IN_FLOAT32 else 1e-11)


@each_objective
@pytest.mark.parametrize(
    "n, n_classes, chunk",
    [(1, 2, None), (1, 2, 1), (3, 2, 5), (5, 1000, 128), (70, 129, 64)],
)
def test_equals_speechbrains_path_in_float32(name, form, n, n_classes, chunk):
    loss_fn = objective(name, 0.3, 30.0, form)
    x, weight, labels = batch(n, n_classes, 16, near=0.3)
    ours = FusedMarginClassifier(16, n_classes, loss_fn, chunk)
    theirs = Classifier(16, out_neurons=n_classes)
    theirs.load_state_dict(ours.state_dict())  # same name, same shape
    wrapper = LogSoftmaxWrapper(loss_fn)

    def run(classifier, loss_of):
        classifier.weight.grad = None
        inputs = x.clone().unsqueeze(1).requires_grad_()  # [N, 1, E]
        loss = loss_of(inputs)
        loss.backward()
        return loss.detach(), inputs.grad, classifier.weight.grad

    targets = labels.unsqueeze(1)  # [N, 1]
    assert_close(
        run(ours, lambda x: ours(x, targets)),
        run(theirs, lambda x: wrapper(theirs(x), targets)),
        5e-6,
    )
    cosines = x.unsqueeze(1)
    assert torch.equal(ours(cosines), theirs(cosines))


@each_objective
def test_gradcheck(name, form):
    if name in IN_FLOAT32:
        pytest.skip("SpeechBrain's AAM computes in float32; raam shares its a")
    loss_fn = objective(name, 0.2, 5.0, form)
    x, weight, labels = batch(4, 7, 5, torch.float64, seed=3)
    inputs = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: fused_loss(x, w, labels, loss_fn, 3), inputs
    )


@each_objective
def test_large_scales_stay_finite_and_right(name, form):
    # z reaches 64 (2 + 0.3), and e^z would leave float32 at 88.
    loss_fn = objective(name, 0.3, 64.0, form)
    x, weight, labels = batch(8, 30, 4)
    x[0] = -weight[labels[0]]  # opposite to its own class
    x[1] = weight[labels[1]] * 1e3  # on top of it
    single = gradients(
        lambda x, w: fused_loss(x, w, labels, loss_fn, 7), x, weight
    )
    assert all(part.isfinite().all() for part in single)
    double = gradients(
        lambda x, w: fused_loss(x, w, labels, loss_fn, 7),
        x.double(),
        weight.double(),
    )
    # At |c| = 1 the angle's derivative is ill-conditioned: leave row 1 out.
    angular = name in ("raam", *IN_FLOAT32)
    parts = slice(0, 1) if angular else slice(0, 3)
    for a, b in list(zip(single, double, strict=True))[parts]:
        assert torch.allclose(a.double(), b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_backward_visits_violated_classes_only(form, monkeypatch):
    # 40 orthogonal classes; samples 0 and 1 lean on class 5 and on each other.
    weight = torch.eye(40)
    x = weight[:8].clone()
    x[0, 5] = x[1, 0] = 0.9
    labels = torch.arange(8)
    visited = []

    def spy(x, w, *args):
        visited.append(w)
        return fused_torch_gradient(x, w, *args)

    fused_torch_gradient = fused_torch.gradient
    monkeypatch.setattr(fused_torch, "gradient", spy)
    loss_fn = make_objective("ram", 0.2, 30.0, form)
    ours = gradients(
        lambda x, w: fused_loss(x, w, labels, loss_fn, 7), x, weight
    )
    rows = torch.cat(visited).argmax(dim=1)
    assert rows.tolist() == [0, 5]
    naive = gradients(lambda x, w: naive_loss(x, w, labels, loss_fn), x, weight)
    assert_close(ours, naive, 2e-6)
    assert ours[2][8:].eq(0).all()  # satisfied, and nobody's target


def test_hinge_of_separated_classes_is_exactly_nothing():
    weight = torch.eye(12)
    loss_fn = make_objective("ram", 0.3, 30.0, "hinge")
    parts = gradients(
        lambda x, w: fused_loss(x, w, torch.arange(12), loss_fn, 5),
        weight,
        weight,
    )
    assert all(part.eq(0).all() for part in parts)


def test_autocast_computes_in_float32():
    loss_fn = make_objective("ram", 0.3, 30.0)
    x, weight, labels = batch(6, 50, 8)

    def loss(x, w):
        return fused_loss(x, w, labels, loss_fn, 20)

    plain = gradients(loss, x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gradients(loss, x, weight)  # backward inside, too
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
    # bfloat16 weights: gradients come back in bfloat16, sums in float32.
    half = gradients(loss, x, weight.bfloat16())
    assert half[0].dtype == torch.float32 and half[2].dtype == torch.bfloat16
    rounded = gradients(loss, x, weight.bfloat16().float())
    assert torch.equal(half[0], rounded[0])
    assert torch.allclose(half[2].float(), rounded[2], rtol=2**-7)


def test_gradients_accumulate():
    x, weight, labels = batch(6, 50, 8)
    weight.requires_grad_()
    loss_fn = make_objective("am", 0.2, 30.0)
    for _ in range(2):
        fused_loss(x, weight, labels, loss_fn, 20).backward()
    once = gradients(
        lambda x, w: fused_loss(x, w, labels, loss_fn, 20), x, weight
    )[2]
    assert torch.allclose(weight.grad, 2 * once)


class LargestTensors(TorchDispatchMode):
    """Notes the sizes of all tensors that are made under it."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor):
                storage = one.untyped_storage()
                self.sizes[storage.data_ptr()] = storage.nbytes()
        return out


@each_objective
def test_no_large_matrix_beside_the_weight_gradient(name, form):
    x, weight, labels = batch(32, 20_000, 16)
    x.requires_grad_(), weight.requires_grad_()
    with LargestTensors() as made:
        loss_fn = objective(name, 0.2, 30.0, form)
        fused_loss(x, weight, labels, loss_fn, 500).backward()
    weight_bytes = weight.untyped_storage().nbytes()
    known = {weight.data_ptr(), x.data_ptr(), weight.grad.data_ptr()}
    others = [s for place, s in made.sizes.items() if place not in known]
    # [N, chunk] is 5 % of the weights here, int64 indices of C are 12.5 %.
    assert max(others) <= 0.125 * weight_bytes


@each_objective
@pytest.mark.parametrize("chunk", [1, 7, None])
@pytest.mark.parametrize("near", [0.0, 0.6, 4.0])
def test_margins_are_those_of_the_cosines(name, form, chunk, near):
    loss_fn = objective(name, 0.3, 30.0, form)
    x, weight, labels = batch(9, 23, 16, near=near)
    classifier = FusedMarginClassifier(16, 23, loss_fn, chunk)
    classifier.weight.data.copy_(weight)
    loss, margins = classifier(x, labels, with_margins=True)
    assert torch.equal(loss, classifier(x, labels))
    assert not any(each.requires_grad for each in margins)

    cosines = classifier(x).squeeze(1).detach().requires_grad_()
    one_hot = F.one_hot(labels, 23).to(cosines.dtype)
    F.cross_entropy(loss_fn(cosines, one_hot), labels).backward()
    below = satisfied_below(loss_fn, cosines, labels)
    for found, expected, allowed in [
        (margins.cosine, target_cosines(cosines, labels), 1e-6),
        (margins.nearest, nearest_others(cosines, labels), 1e-6),
        (margins.satisfied, satisfied_share(cosines, labels, below), 1e-6),
        (
            margins.gradient_classes,
            # The wrapper's path loses what is 1e-7 of the largest.
            effective_classes(cosines.grad, labels),
            2e-3,
        ),
    ]:
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= allowed


def test_nobody_has_a_gradient():
    loss_fn = make_objective("ram", 0.3, 30.0, "hinge")
    classifier = FusedMarginClassifier(12, 12, loss_fn, 5)
    classifier.weight.data.copy_(torch.eye(12))
    _, margins = classifier(torch.eye(12), torch.arange(12), with_margins=True)
    assert margins.satisfied.eq(1).all()
    assert margins.gradient_classes.eq(0).all()


@each_objective
def test_a_device_is_not_waited_for(name, form, monkeypatch):
    """Meta tensors hold no numbers: whoever asks for one gets an error."""
    monkeypatch.setattr(  # these have none
        torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext()
    )
    with torch.device("meta"):
        loss_fn = objective(name, 0.2, 30.0, form)
        classifier = FusedMarginClassifier(16, 300, loss_fn, 100)
        x = torch.randn(4, 16, requires_grad=True)
        labels = torch.zeros(4, dtype=torch.long)
        with Operations() as made:
            classifier(x, labels, with_margins=True)[0].backward()
    assert x.grad.shape == x.shape
    assert torch.ops.aten._assert_async.msg in made.names


class Operations(TorchDispatchMode):
    """Notes every operation."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func)
        return func(*args, **(kwargs or {}))


PEAK = """
import torch
from speechbrain_ram.losses import make_objective
from speechbrain_ram.training.fused import make_classifier
from speechbrain_ram.utils import keep_freed_memory

def peak():
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024

keep_freed_memory()
loss_fn = make_objective("ram", 0.2, 30.0)
make_classifier(64, 2048, loss_fn, True)(
    torch.randn(512, 64), torch.arange(512)
).backward()
classifier = make_classifier(64, 100_000, loss_fn)  # chooses the fused one
before = peak()
classifier(torch.randn(512, 64), torch.arange(512), True)[0].backward()
print(peak() - before)
"""


def test_memory_of_512_samples_and_100_000_classes():
    """The matrix [N, C] alone would be 205 MB, its five copies a gigabyte."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True
    )
    gradient = 100_000 * 64 * 4 / 2**20
    assert int(done.stdout) - gradient < 100  # three or four chunks of 8 MB


def test_chosen_by_the_number_of_classes():
    loss_fn = make_objective("ram")
    few, many = FUSED_FROM - 1, FUSED_FROM
    assert type(make_classifier(8, few, loss_fn)) is Classifier
    assert type(make_classifier(8, many, loss_fn)) is FusedMarginClassifier
    assert type(make_classifier(8, many, loss_fn, False)) is Classifier
    assert type(make_classifier(8, 2, loss_fn, True)) is FusedMarginClassifier


class Own(AngularMargin):
    """Of a known kind, but it may compute anything."""


@pytest.mark.parametrize(
    "loss_fn, name",
    [
        (torch.nn.Identity(), "Identity"),
        (Own(), "Own"),
        (RealMargin(Own()), "RealMargin around Own"),
        (RealMargin(torch.nn.Identity()), "RealMargin around Identity"),
    ],
)
def test_a_loss_that_may_compute_something_else_is_not_fused(loss_fn, name):
    assert type(make_classifier(8, FUSED_FROM, loss_fn)) is Classifier
    with pytest.raises(ValueError, match=f"is {name}, all.*--fused_loss Fal"):
        make_classifier(8, 2, loss_fn, True)


def test_yaml_drop_in():
    yaml = """
classifier: !new:speechbrain_ram.training.fused.FusedMarginClassifier
    input_size: 8
    out_neurons: 20
    loss_fn: !apply:speechbrain_ram.losses.make_objective
        objective: raam
        form: hinge
"""
    classifier = load_hyperpyyaml(yaml)["classifier"]
    x, _, labels = batch(4, 20, 8)
    assert list(classifier.state_dict()) == ["weight"]
    assert classifier(x.unsqueeze(1), labels.unsqueeze(1)).ndim == 0


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"labels": torch.tensor([0, 5])}, ValueError, "from 0 to 5.*0 to 4"),
        ({"labels": torch.tensor([-1, 0])}, ValueError, "from -1.*label enc"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"\(3,\)"),
        ({"weight": torch.ones(5, 4)}, ValueError, r"\(5, 4\)"),
        ({"x": torch.ones(2, 2, 3)}, ValueError, "singleton"),
        ({"x": torch.ones(0, 3)}, ValueError, "N at least 1"),
        ({"loss_fn": LogSoftmaxWrapper(None)}, TypeError, "LogSoftmaxWrapper"),
        ({"chunk_size": 0}, ValueError, "chunk_size is 0"),
    ],
)
def test_says_what_is_wrong(change, error, message):
    kwargs = {
        "x": torch.ones(2, 3),
        "weight": torch.ones(5, 3),
        "labels": torch.tensor([0, 4]),
        "loss_fn": make_objective("ram"),
    }
    fused_loss(**kwargs)
    with pytest.raises(error, match=message):
        fused_loss(**{**kwargs, **change})


def test_needs_two_classes():
    with pytest.raises(ValueError, match="out_neurons 1.*label encoder"):
        FusedMarginClassifier(8, 1, make_objective("ram"))
