"""ResNet34: shapes, padding, determinism, and the ways it is run."""

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

from speechbrain_ram.data.audio import pad_waveforms
from speechbrain_ram.resnet import ResNet34

NARROW = (4, 8, 8, 16)


def trained_looking(model, seed=0):
    """Running statistics away from 0 and 1, as after training."""
    torch.manual_seed(seed)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 60, model.n_mels) * 3 + 1)
    return model.eval()


@pytest.mark.parametrize(
    "channels, count",
    [((32, 64, 128, 256), 7_946_336), ((16, 32, 64, 128), 2_645_296)],
)
def test_parameter_count_is_the_documented_one(channels, count):
    model = ResNet34(channels=channels)
    assert sum(p.numel() for p in model.parameters()) == count
    assert f"{count:,}" in ResNet34.__doc__


@pytest.mark.parametrize("depth", [18, 34])
def test_weight_layers(depth):
    model = ResNet34(depth=depth)
    main = [
        name
        for name, m in model.named_modules()
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))
        and "shortcut" not in name
    ]
    assert len(main) == depth


@pytest.mark.parametrize("n_frames", [1, 2, 7, 21, 200, 333])
def test_shape_and_finiteness(n_frames):
    model = ResNet34(channels=NARROW).eval()
    out = model(torch.randn(2, n_frames, 80))
    assert out.shape == (2, 1, 512)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(
    "n_mels, embedding_dim, options",
    [
        (80, 512, {}),
        (23, 7, {"depth": 18, "deviation": "sample", "norm_embedding": False}),
    ],
)
def test_padding_changes_nothing(n_mels, embedding_dim, options):
    model = ResNet34(n_mels, NARROW, embedding_dim, **options)
    trained_looking(model)
    generator = torch.Generator().manual_seed(4)
    counts = torch.randint(20, 2001, (6,), generator=generator)
    counts[0], counts[1] = 2001, 21
    feats = torch.randn(6, 2001, n_mels, generator=generator) * 2
    # Rubbish behind the end: it must not leak in.
    together = model(feats, counts / 2001)
    for i, n in enumerate(counts):
        alone = model(feats[i : i + 1, :n])
        assert (together[i] - alone[0]).abs().max() < 1e-4


def front_end():
    with open("hparams/encoder.yaml", encoding="utf-8") as file:
        hparams = load_hyperpyyaml(file, {"channels": list(NARROW)})
    trained_looking(hparams["embedding_model"])
    modules = [
        hparams[name]
        for name in ("compute_features", "mean_var_norm", "embedding_model")
    ]

    def encode(wavs, lengths):
        feats, norm, model = modules
        x = norm(feats(wavs), lengths)
        return model(x, lengths).squeeze(1)

    return encode


def test_padding_changes_nothing_through_the_front_end():
    """0.2 s to 20 s in one batch, each equal to itself alone."""
    encode = front_end()
    generator = torch.Generator().manual_seed(7)
    samples = [
        3200,
        320000,
        *torch.randint(3200, 320000, (6,), generator=generator).tolist(),
    ]
    waves = [
        torch.randn(n, generator=generator) * (0.01 + 0.1 * i)
        for i, n in enumerate(samples)
    ]
    with torch.no_grad():
        together = encode(*pad_waveforms(waves))
        for wave, row in zip(waves, together, strict=True):
            alone = encode(wave.unsqueeze(0), torch.ones(1))
            assert (alone[0] - row).abs().max() < 1e-4


def test_silence_gives_a_finite_embedding():
    encode = front_end()
    with torch.no_grad():
        out = encode(torch.zeros(1, 16000), torch.ones(1))
    assert torch.isfinite(out).all()


def test_deterministic():
    model = ResNet34(channels=NARROW).eval()
    feats = torch.randn(3, 50, 80)
    assert torch.equal(model(feats), model(feats))
    torch.manual_seed(1)
    first = ResNet34(channels=NARROW).state_dict()
    torch.manual_seed(1)
    second = ResNet34(channels=NARROW).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_channels_last_and_bfloat16_agree_with_the_default():
    model = trained_looking(ResNet34(channels=(16, 16, 16, 16)))
    feats = torch.randn(2, 120, 80)
    lengths = torch.tensor([0.5, 1.0])
    plain = model(feats, lengths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(feats, lengths).float()
    assert (
        torch.nn.functional.cosine_similarity(plain, low, dim=-1).min() > 0.99
    )
    model.to(memory_format=torch.channels_last)
    assert (model(feats, lengths) - plain).abs().max() < 1e-4


def test_channels_last_trains():
    model = ResNet34(channels=(16, 16, 16, 16))
    model.to(memory_format=torch.channels_last)
    model(torch.randn(4, 40, 80)).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_compiles():
    model = trained_looking(ResNet34(channels=NARROW))
    compiled = torch.compile(model, backend="aot_eager")
    feats = torch.randn(2, 40, 80)
    assert (compiled(feats) - model(feats)).abs().max() < 1e-5


@pytest.mark.slow
def test_compiles_with_inductor():
    model = trained_looking(ResNet34(channels=NARROW))
    feats = torch.randn(2, 40, 80)
    compiled = torch.compile(model)
    assert (compiled(feats) - model(feats)).abs().max() < 1e-4


def test_without_a_norm_training_embeds_as_evaluation_does():
    """No statistics of a batch replace those that an encoder came with."""
    model = trained_looking(ResNet34(channels=NARROW, norm_embedding=False))
    assert not [key for key in model.state_dict() if "norm_emb" in key]
    x = torch.randn(2, 40, 80)
    expected = model(x)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    assert torch.equal(model(x), expected)


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="depth is 50, allowed are 18 and 34"):
        ResNet34(depth=50)
    with pytest.raises(ValueError, match="deviation is 'biased'"):
        ResNet34(deviation="biased")
    with pytest.raises(ValueError, match="four sizes of 1 or more"):
        ResNet34(channels=(32, 64))
    with pytest.raises(ValueError, match="n_mels is 0"):
        ResNet34(n_mels=0)
    with pytest.raises(ValueError, match=r"\[batch, time, 80\] is needed"):
        ResNet34(channels=NARROW)(torch.zeros(1, 10, 40))
