"""A step asks the device for nothing, and a bad one leaves nothing there."""

import copy
import functools
import math
import re
from collections import Counter

import pytest
import torch
from conftest import REPOSITORY, run_recipe
from speechbrain.utils.checkpoints import Checkpointer
from torch.utils._python_dispatch import TorchDispatchMode

from speechbrain_ram.training.brain import SpeakerBrain
from speechbrain_ram.training.steps import (
    KeptBuffers,
    Outcome,
    fused_on_cuda,
    skips_on_the_device,
)

SGD = REPOSITORY / "recipes" / "YourCorpus" / "hparams" / "ram_resnet34.yaml"


class Waits(TorchDispatchMode):
    """Counts what a GPU would be waited for."""

    READS = {
        torch.ops.aten._local_scalar_dense.default,  # item, float, int, bool
        torch.ops.aten.nonzero.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.masked_select.default,
    }

    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations[func] += 1
        return func(*args, **(kwargs or {}))

    @property
    def reads(self):
        return sum(self.operations[each] for each in self.READS)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Steps are counted later, by an optimiser that skips by itself."""
    init = SpeakerBrain.init_optimizers

    def init_optimizers(self):
        self.opt_class = fused_on_cuda(self.opt_class)  # CPUs have it, too
        init(self)

    monkeypatch.setattr(SpeakerBrain, "init_optimizers", init_optimizers)
    monkeypatch.setattr(SpeakerBrain, "defers", True)


def run(corpus, folder, **overrides):
    return run_recipe(
        corpus,
        folder,
        recipe=SGD,
        corpus=str(corpus.train_root),
        dev_share=0.2,
        verify_untrained=False,
        trials=None,
        batch_size=4,  # of 18 utterances: five steps an epoch
        **overrides,
    )


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_waits_for_nothing(
    tiny_corpus, tmp_path, monkeypatch, as_on_a_gpu, fused
):
    """But for the outcome of the step before."""
    fit, reads, settled = SpeakerBrain.fit_batch, [], []
    read = Outcome.read

    def fit_batch(self, batch):
        settled.append([])
        with Waits() as waits:
            loss = fit(self, batch)
        reads.append(waits.reads)
        return loss

    def noted(self):
        settled[-1].append(self.step)
        return read(self)

    monkeypatch.setattr(SpeakerBrain, "fit_batch", fit_batch)
    monkeypatch.setattr(Outcome, "read", noted)
    run(tiny_corpus, tmp_path, number_of_epochs=1, fused_loss=fused)
    # What is read on CPUs only: F.one_hot and the fused loss look at the
    # range of the labels, and the fused loss at the classes to visit.
    assert reads == [3 if fused else 2] * 5
    assert settled == [[], [1], [2], [3], [4, 5]]


def test_steps_counted_later_are_the_same_steps(
    tiny_corpus, tmp_path, monkeypatch, as_on_a_gpu
):
    later = run(tiny_corpus, tmp_path / "later")
    monkeypatch.setattr(SpeakerBrain, "defers", False)
    now = run(tiny_corpus, tmp_path / "now")
    logs = []
    for folder in (later, now):
        text = (folder / "train_log.txt").read_text()
        logs.append(re.sub(r"utterances/s: [\d.]+", "", text))
    assert logs[0] == logs[1]
    states = [
        torch.load(
            Checkpointer(folder / "save").find_checkpoint().path
            / "embedding_model.ckpt"
        )
        for folder in (later, now)
    ]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def test_momentum_begins_at_nothing_whenever_a_parameter_joins():
    """Where the first step is bad, and where an encoder thaws later."""

    def trained(opt_class, bad):
        early, late = (torch.nn.Parameter(torch.ones(9000)) for _ in "ab")
        optimizer = opt_class([early, late])
        if bad:
            early.grad = torch.full_like(early, float("nan"))
            for _ in range(20):
                torch.full_like(early, 7e5)  # what freed memory holds
            optimizer.found_inf = torch.tensor(1.0)
            optimizer.step()
            optimizer.found_inf = torch.tensor(0.0)
        for step in range(4):
            early.grad = torch.ones_like(early)
            late.grad = torch.full_like(late, 0.3) if step else None
            optimizer.step()
        return torch.stack([early, late]).detach()

    sgd = functools.partial(
        torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1
    )
    expected = trained(sgd, bad=False)
    for bad in (False, True):
        assert torch.allclose(trained(fused_on_cuda(sgd), bad), expected)


def test_frozen_epochs_on_a_gpu(tiny_corpus, tmp_path, as_on_a_gpu):
    """The momentum of the encoder begins later than the classifier's."""
    folder = run(tiny_corpus, tmp_path, number_of_epochs=2, frozen_epochs=1)
    assert "epoch: 2" in (folder / "train_log.txt").read_text()


def test_gradients_of_two_rates_are_shortened_together(
    tiny_corpus, tmp_path, monkeypatch
):
    step, norms = torch.optim.SGD.step, []

    def noted(self, *args, **kwargs):
        groups = [
            [p.grad for p in group["params"] if p.grad is not None]
            for group in self.param_groups
        ]
        norms.append([float(torch.nn.utils.get_total_norm(g)) for g in groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    run(
        tiny_corpus,
        tmp_path,
        number_of_epochs=1,
        max_grad_norm=0.5,
        encoder_lr_factor=0.1,
    )
    assert len(norms) == 5
    for each in norms:
        assert len(each) == 2 and min(each) > 0
        assert math.hypot(*each) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(
    "what, opt_class", [("features", "SGD"), ("gradient", "Adam")]
)
def test_a_bad_step_leaves_nothing_on_the_device(
    tiny_corpus, tmp_path, monkeypatch, as_on_a_gpu, what, opt_class
):
    fit, start = SpeakerBrain.fit_batch, SpeakerBrain.on_fit_start
    init = SpeakerBrain.init_optimizers
    states, bad = [], set()

    def init_optimizers(self):
        self.opt_class = functools.partial(
            getattr(torch.optim, opt_class), lr=0.01, weight_decay=0.1
        )
        init(self)

    def on_fit_start(self):
        start(self)
        self.modules["classifier"].weight.register_hook(
            lambda grad: grad * float("nan") if "gradient" in bad else grad
        )

    def fit_batch(self, batch):
        bad.clear()
        if self.step == 3:
            bad.add(what)
        if "features" in bad:
            batch.data.to("cpu").sig.data[0] = float("nan")
        loss = fit(self, batch)
        optimizer = self.optimizer.state_dict()["state"]
        states.append(
            [each.clone() for each in self.modules.state_dict().values()]
            + [v.clone() for s in optimizer.values() for v in s.values()]
        )
        states[-1].append(torch.tensor(self.optimizer_step))
        return loss

    monkeypatch.setattr(SpeakerBrain, "fit_batch", fit_batch)
    monkeypatch.setattr(SpeakerBrain, "on_fit_start", on_fit_start)
    monkeypatch.setattr(SpeakerBrain, "init_optimizers", init_optimizers)
    folder = run(tiny_corpus, tmp_path, number_of_epochs=1)
    _, before, after, following, _ = states
    for a, b in zip(before[:-1], after[:-1], strict=True):
        assert torch.equal(a, b)
    pairs = zip(after, following, strict=True)
    assert sum(not torch.equal(*pair) for pair in pairs) > 100
    # Counted at first, and taken back when the host has learned of it.
    steps = [int(each[-1]) for each in states]
    assert steps == [1, 2, 3, 3, 4]
    log = (folder / "train_log.txt").read_text()
    assert "train skipped steps: 1" in log and "nan" not in log


def test_buffers_are_put_back_where_a_step_is_bad():
    module = torch.nn.Sequential(
        torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(2)
    )
    for good in (True, False):
        before = [each.clone() for each in module.buffers()]
        kept = KeptBuffers(module)
        for each in module.buffers():
            each.add_(5)
        kept.undo_unless(torch.tensor(good))
        for each, old in zip(module.buffers(), before, strict=True):
            assert torch.equal(each, old + 5 if good else old)
    KeptBuffers(torch.nn.Linear(2, 2)).undo_unless(torch.tensor(False))


def test_optimisers_that_cannot_skip_are_used_as_they_are():
    weights = [torch.nn.Parameter(torch.ones(2))]
    for opt_class, skips in (
        (torch.optim.SGD, True),
        (torch.optim.AdamW, True),
        (torch.optim.Adadelta, False),  # has no fused kind
        (functools.partial(torch.optim.Rprop, lr=0.1), False),
    ):
        optimizer = fused_on_cuda(opt_class)(iter(weights))
        assert skips_on_the_device(optimizer) == skips
        assert optimizer.param_groups[0]["params"] == weights
    assert not skips_on_the_device(torch.optim.SGD(weights))
    assert not skips_on_the_device(None)


@pytest.mark.parametrize("opt_class", [torch.optim.SGD, torch.optim.Adam])
def test_a_checkpoint_from_a_cpu_goes_on_where_steps_can_be_skipped(opt_class):
    make = functools.partial(opt_class, lr=0.1)
    if opt_class is torch.optim.SGD:
        make = functools.partial(make, momentum=0.9)
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    plain, fused = make(weights[:1]), fused_on_cuda(make)(weights[1:])

    def step(optimizer, weight, value):
        weight.grad = torch.full((3,), value)
        optimizer.step()

    step(plain, weights[0], 1.0)
    weights[1].data.copy_(weights[0])
    fused.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert fused.param_groups[0]["fused"]
    fused.found_inf = torch.tensor(1.0)
    step(fused, weights[1], 2.0)
    assert torch.equal(weights[1], weights[0])
    fused.found_inf = torch.tensor(0.0)
    for optimizer, weight in zip((plain, fused), weights, strict=True):
        step(optimizer, weight, 2.0)
    assert torch.allclose(weights[0], weights[1], rtol=1e-6)
