"""Classes spread over two gloo processes against one process."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from speechbrain_ram.class_parallel import ClassParallelClassifier
from speechbrain_ram.fused import FusedMarginClassifier
from speechbrain_ram.losses import make_objective
from speechbrain_ram.processes import leave_group

N_CLASSES, DIM, RATE = 41, 12, 0.5
SIZES = 5, 7  # utterances of each rank
CASES = [
    ("am", "paper"),
    ("raam", "paper"),
    ("ram", "released"),
    ("ram", "hinge"),
]


def samples():
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(sum(SIZES), DIM, dtype=torch.float64, generator=draw)
    labels = torch.randint(N_CLASSES, (sum(SIZES),), generator=draw)
    labels[:4] = torch.tensor([0, 19, 20, 40])  # the slices' borders
    return x, labels


def encoder():
    torch.manual_seed(2)
    return torch.nn.Linear(DIM, DIM, dtype=torch.float64)


def two_steps(encode, classifier, x, labels):
    """Losses of two steps of gradient descent, taken in place."""
    losses = []
    parameters = [*encode.parameters(), *classifier.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=RATE)
    for _ in range(2):
        optimizer.zero_grad()
        loss = classifier(encode(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def of_one_process(name, form, weight):
    loss_fn = make_objective(name, 0.2, 30.0, form)
    classifier = FusedMarginClassifier(DIM, N_CLASSES, loss_fn).double()
    classifier.weight.data.copy_(weight)
    encode = encoder()
    losses = two_steps(encode, classifier, *samples())
    return losses, encode.weight.detach(), classifier.weight.detach()


def rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    compare(rank)
    assert gloo_threads() > 0
    leave_group()
    assert gloo_threads() == 0, "the process can abort when it ends"


def gloo_threads():
    files = Path("/proc/self/task").glob("*/comm")
    return sum("gloo" in file.read_text() for file in files)


def compare(rank):
    x, labels = samples()
    mine = slice(0, SIZES[0]) if rank == 0 else slice(SIZES[0], None)
    for name, form in CASES:
        torch.manual_seed(3)  # the same on both ranks, as is usual
        loss_fn = make_objective(name, 0.2, 30.0, form)
        classifier = ClassParallelClassifier(
            DIM, N_CLASSES, loss_fn, chunk_size=8
        )
        assert len(classifier.weight) == (20, 21)[rank]
        classifier.double()
        whole = classifier.gather_weight()
        encode = torch.nn.parallel.DistributedDataParallel(encoder())
        losses = two_steps(encode, classifier, x[mine], labels[mine])

        expected = of_one_process(name, form, copy.deepcopy(whole))
        assert losses == pytest.approx(expected[0], rel=1e-12)
        ours = encode.module.weight.detach(), classifier.gather_weight()
        for a, b in zip(ours, expected[1:], strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    halves = ClassParallelClassifier(DIM, 40, loss_fn).gather_weight()
    assert not torch.equal(halves[:20], halves[20:])  # seeds are split
    with pytest.raises(ValueError, match="from 0 to 41.*0 to 40"):
        classifier(x[:2], torch.tensor([0, 41]))
    with pytest.raises(ValueError, match="no rank holds the cosines"):
        classifier(x)
    with pytest.raises(ValueError, match="out_neurons is 3 for 2 ranks"):
        ClassParallelClassifier(DIM, 3, loss_fn)


def test_two_ranks_equal_one_process(tmp_path):
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=2)


def test_without_ranks():
    with pytest.raises(RuntimeError, match="torchrun"):
        ClassParallelClassifier(8, 10, make_objective("ram"))
