"""A model of WeSpeaker's with random numbers, and its formulas in PyTorch.

Written without anything of the package, which is compared with it.
"""

import torch
import torch.nn.functional as F
from torchaudio.compliance import kaldi

BLOCKS = {"ResNet34": [3, 4, 6, 3], "ResNet18": [2, 2, 2, 2]}
STRIDES = [1, 2, 2, 2]
DIM = 24

CONFIG = """
exp_dir: exp/ResNet34-TSTP-emb24-fbank80
gpus: "[0,1]"
enable_amp: False
dataset_args:
  resample_rate: 16000
  speed_perturb: True
  num_frms: 200
  fbank_args:
    num_mel_bins: 80
    frame_shift: 10
    frame_length: 25
    dither: 1.0
  spec_aug: False
model: ResNet34 # ResNet18, ResNet34, ResNet50
model_init: null
model_args:
  feat_dim: 80
  embed_dim: 24
  pooling_func: "TSTP"
  two_emb_layer: False
projection_args:
  project_type: "arc_margin"
  scale: 32.0
"""


def norm(state, name, channels):
    state[f"{name}.weight"] = 0.5 + torch.rand(channels)
    state[f"{name}.bias"] = 0.2 * torch.randn(channels)
    state[f"{name}.running_mean"] = 0.2 * torch.randn(channels)
    state[f"{name}.running_var"] = 0.5 + torch.rand(channels)
    # as averaged checkpoints have it
    state[f"{name}.num_batches_tracked"] = torch.tensor(12345.6)


def conv(state, name, out, into, size=3):
    scale = (2 / into / size**2) ** 0.5
    state[f"{name}.weight"] = scale * torch.randn(out, into, size, size)


def make_state(model="ResNet34", width=4, dim=DIM, bands=80, speakers=7):
    """What WeSpeaker would save, with random numbers."""
    state = {}
    conv(state, "conv1", width, 1)
    norm(state, "bn1", width)
    before = width
    for k, (count, stride) in enumerate(
        zip(BLOCKS[model], STRIDES, strict=True)
    ):
        out = width * 2**k
        for i in range(count):
            name = f"layer{k + 1}.{i}"
            conv(state, f"{name}.conv1", out, before)
            norm(state, f"{name}.bn1", out)
            conv(state, f"{name}.conv2", out, out)
            norm(state, f"{name}.bn2", out)
            if (stride != 1 and i == 0) or before != out:
                conv(state, f"{name}.shortcut.0", out, before, 1)
                norm(state, f"{name}.shortcut.1", out)
            before = out
    size = 2 * before * (bands // 8)
    state["seg_1.weight"] = torch.randn(dim, size) / size**0.5
    state["seg_1.bias"] = torch.randn(dim)
    state["projection.weight"] = torch.randn(speakers, dim)
    return state


def fbank(wav, bands=80, scale=2**15, window="hamming"):
    """Waveform [N] to features [T, bands] without their mean, by torchaudio.

    WeSpeaker's, or 3D-Speaker's with a scale of 1 and Povey's window.
    """
    feats = kaldi.fbank(
        torch.as_tensor(wav)[None] * scale,
        num_mel_bins=bands,
        frame_length=25,
        frame_shift=10,
        sample_frequency=16000,
        window_type=window,
        use_energy=False,
        dither=0.0,
    )
    return feats - feats.mean(dim=0)


def network(state, feats, model="ResNet34"):
    """Features [B, T, bands] to embeddings [B, E], by WeSpeaker's formulas."""

    def bn(x, name):
        return F.batch_norm(
            x,
            state[f"{name}.running_mean"],
            state[f"{name}.running_var"],
            state[f"{name}.weight"],
            state[f"{name}.bias"],
        )

    x = feats.transpose(1, 2).unsqueeze(1)
    x = F.relu(bn(F.conv2d(x, state["conv1.weight"], padding=1), "bn1"))
    for k, (count, stride) in enumerate(
        zip(BLOCKS[model], STRIDES, strict=True)
    ):
        for i in range(count):
            name = f"layer{k + 1}.{i}"
            step = stride if i == 0 else 1
            out = F.conv2d(x, state[f"{name}.conv1.weight"], None, step, 1)
            out = F.relu(bn(out, f"{name}.bn1"))
            out = F.conv2d(out, state[f"{name}.conv2.weight"], padding=1)
            out = bn(out, f"{name}.bn2")
            if f"{name}.shortcut.0.weight" in state:
                x = F.conv2d(x, state[f"{name}.shortcut.0.weight"], stride=step)
                x = bn(x, f"{name}.shortcut.1")
            x = F.relu(out + x)
    std = torch.sqrt(torch.var(x, dim=-1) + 1e-7)
    stats = torch.cat([x.mean(dim=-1).flatten(1), std.flatten(1)], dim=1)
    return F.linear(stats, state["seg_1.weight"], state["seg_1.bias"])


def reference(state, wav, model="ResNet34", bands=80):
    """Waveform [N] to embedding [E], by WeSpeaker's formulas."""
    return network(state, fbank(wav, bands)[None], model)[0]


class Network(torch.nn.Module):
    """The same as a module, such as WeSpeaker's export gives to ONNX."""

    def __init__(self, state, model="ResNet34"):
        super().__init__()
        self.state, self.model = state, model

    def forward(self, feats):
        return network(self.state, feats, self.model)


def write_onnx(path, state, model="ResNet34", **metadata):
    """A file as WeSpeaker's export_onnx.py writes it; the mean is not in it.

    With metadata, as sherpa-onnx's scripts add them.
    """
    torch.onnx.export(
        Network(state, model).eval(),
        (torch.ones(1, 200, 80),),
        str(path),
        opset_version=14,
        input_names=["feats"],
        output_names=["embs"],
        dynamic_axes={"feats": {0: "B", 1: "T"}, "embs": {0: "B"}},
        dynamo=False,
    )
    return add_metadata(path, path, **metadata)


def add_metadata(source, path, **metadata):
    import onnx

    model = onnx.load(source)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=str(value))
    onnx.save(model, path)
    return path


def write_model(folder, state=None, config=CONFIG, name="avg_model.pt"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)
    torch.save(make_state() if state is None else state, folder / name)
    return folder
