"""A tiny exported encoder, for the tests of everything that uses one."""

from pathlib import Path

import numpy as np
import torch
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.lobes.models.ECAPA_TDNN import Classifier

from speechbrain_ram.export.folder import export_inference
from speechbrain_ram.resnet import ResNet34
from speechbrain_ram.verification.calibration import Decision

DIM = 16
CHANNELS = [4, 4, 4, 4]
SPEAKERS = ["ada", "bob", "cy"]

YAML = f"""
sample_rate: 16000
embedding_dim: {DIM}
compute_features: !apply:speechbrain_ram.features.make_front_end
  name: NAME
mean_var_norm: !new:speechbrain.processing.features.InputNormalization
  norm_type: sentence
  std_norm: True
  epsilon: 1.0e-3
embedding_model: !new:speechbrain_ram.resnet.ResNet34
  n_mels: 80
  channels: {CHANNELS}
  embedding_dim: {DIM}
"""


def small_network(seed=0):
    """Untrained, with statistics that are not those of initialisation."""
    torch.manual_seed(seed)
    network = ResNet34(80, CHANNELS, DIM)
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, 100, 80))
    return network.eval()


def dev_scores():
    """Scores and labels of an imagined development list."""
    generator = np.random.default_rng(0)
    targets = generator.normal(0.7, 0.15, 400)
    nontargets = generator.normal(0.1, 0.15, 4000)
    scores = np.clip(np.concatenate([targets, nontargets]), -1, 1)
    return scores, np.repeat([1, 0], [400, 4000])


def export_small(
    folder,
    front_end="fbank",
    decision=True,
    seed=0,
    classifier=None,
    **options,
):
    """Export an untrained encoder of 16 dimensions; returns the folder.

    `decision` may be one of the caller's own.
    """
    label_encoder = CategoricalEncoder()
    label_encoder.update_from_iterable(SPEAKERS)
    torch.manual_seed(seed)
    if decision is True:
        decision = Decision.fit(*dev_scores(), "imagined")
    if decision:
        options["decision"] = decision
    return export_inference(
        Path(folder),
        YAML.replace("NAME", front_end),
        small_network(seed),
        classifier or Classifier(DIM, out_neurons=len(SPEAKERS)),
        label_encoder,
        torch.randn(DIM),
        **options,
    )


def voice(seconds, pitch=120.0, rate=16000, seed=0):
    """Something voiced: gliding harmonics in moving resonances, and noise.

    It changes all the time, as speech does: in a band that stays constant,
    the normalisation of its variance would enlarge float32's rounding.
    """
    generator = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    glide = 1 + 0.2 * np.sin(2 * np.pi * 1.3 * time)
    phase = 2 * np.pi * pitch * np.cumsum(glide) / rate
    wave = np.zeros_like(time)
    for harmonic in range(1, int(rate / 2.5 / pitch)):
        for formant, speed in ((5 * pitch, 3.1), (14 * pitch, 2.3)):
            centre = formant * (1 + 0.4 * np.sin(2 * np.pi * speed * time))
            distance = (harmonic * pitch - centre) / 150
            wave += np.sin(harmonic * phase) / (1 + distance**2)
    wave *= 0.5 + 0.5 * np.sin(2 * np.pi * 4 * time) ** 2
    wave += 0.2 * generator.standard_normal(len(time))
    return (0.3 * wave / np.abs(wave).max()).astype(np.float32)
