"""Targets of encoders: exported folders, checkpoints, runs, stores."""

import contextlib
import dataclasses
import json
import re
import shutil
from functools import partial
from hashlib import blake2b

import fuzz_formats as formats
import numpy as np
import torch
import yaml
from fuzz_targets import Target
from safetensors.numpy import load, save
from safetensors.torch import load_file
from small_encoder import (
    DIM,
    SPEAKERS,
    YAML,
    dev_scores,
    export_small,
    small_network,
)
from speechbrain.dataio.encoder import CategoricalEncoder
from speechbrain.lobes.models.ECAPA_TDNN import Classifier
from speechbrain.utils.checkpoints import (
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.epoch_loop import EpochCounter
from wespeaker_model import CONFIG, make_state, write_model

from speechbrain_ram.data.plain import parse_yaml
from speechbrain_ram.data.record import checksum, seal
from speechbrain_ram.export.architecture import fingerprint
from speechbrain_ram.export.folder import start_from
from speechbrain_ram.export.importers import import_encoder
from speechbrain_ram.export.onnx_model import settings
from speechbrain_ram.features import KaldiFbank
from speechbrain_ram.inference import (
    EncoderError,
    OnnxEncoder,
    SpeakerEncoder,
)
from speechbrain_ram.training.checkpoints import (
    CheckpointError,
    SafeCheckpointer,
    read_checkpoint,
)
from speechbrain_ram.training.distributed import Tally, random_state
from speechbrain_ram.training.run import Run, RunError, read_run
from speechbrain_ram.training.state import COUNTERS, read_state
from speechbrain_ram.verification.calibration import Decision
from speechbrain_ram.verification.enrolment import (
    EnrolmentDatabase,
    EnrolmentError,
)
from speechbrain_ram.verification.store import (
    EmbeddingSet,
    EmbeddingStore,
    StoreError,
)


def encoders(folder):
    """Everything that holds or continues an encoder."""
    return {
        **_exported(folder),
        **_imported(folder / "imported"),
        **_onnx(folder),
        **_checkpoints(folder / "run"),
        **_runs(folder / "trained"),
        **_embeddings(folder),
    }


def _exported(folder):
    encoder = export_small(folder / "encoder")
    edited = export_small(folder / "edited")
    start = export_small(folder / "start")
    yaml_text = YAML.replace("NAME", "fbank")
    network, classifier = small_network(), Classifier(DIM, out_neurons=3)
    speakers = CategoricalEncoder()
    speakers.update_from_iterable(SPEAKERS)

    def place(folder, name, changes, many, read):
        path = folder / name
        good = path.read_bytes()
        return Target(read, EncoderError, good, path, changes, many)

    def begin(_):
        start_from(start, yaml_text, network, classifier, speakers)

    def load_as_it_is(_):
        used(SpeakerEncoder.from_folder(encoder))

    def load_edited(_):
        used(edited_encoder(edited))

    json_values, header = formats.json_values, formats.safetensors_header
    return {
        "encoder.json": place(
            encoder, "encoder.json", json_values, 3_000, load_as_it_is
        ),
        "encoder.safetensors": place(
            encoder, "encoder.safetensors", header, 3_000, load_as_it_is
        ),
        "edited encoder.json": place(
            edited, "encoder.json", json_values, 9_000, load_edited
        ),
        "edited encoder.safetensors": place(
            edited, "encoder.safetensors", header, 4_000, load_edited
        ),
        "classifier.ckpt": place(
            start, "classifier.ckpt", formats.state, 3_000, begin
        ),
        "label_encoder.ckpt": place(
            start, "label_encoder.ckpt", labels, 3_000, begin
        ),
    }


def _imported(folder):
    """A model of WeSpeaker's, which becomes a folder of ours."""
    config = CONFIG.replace("model: ResNet34", "model: ResNet18")
    source = write_model(
        folder / "model", make_state("ResNet18", width=1), config
    )
    np.save(source / "mean_vec.npy", np.ones(24))
    output = folder / "encoder"

    def read(_):
        try:
            import_encoder("wespeaker", source, output)
            used(SpeakerEncoder.from_folder(output))
        finally:
            shutil.rmtree(output, ignore_errors=True)

    found = {}
    for name, changes, many in (
        ("config.yaml", formats.yaml_values, 3_000),
        ("avg_model.pt", formats.state, 2_000),
        ("mean_vec.npy", formats.columns, 2_000),
    ):
        place = source / name
        good = place.read_bytes()
        found[name] = Target(read, EncoderError, good, place, changes, many)
    return found


def _onnx(folder):
    """A small network on features, and what an export of ours notes."""
    import onnx
    from onnx import TensorProto, helper

    ends = {"feats": ["B", "T", 80], "embs": ["B", 4]}
    taken, given = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in ends.items()
    )
    weights = np.ones((80, 4), np.float32)
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("ReduceMean", ["feats"], ["m"], axes=[1]),
                helper.make_node("Squeeze", ["m", "a"], ["s"]),
                helper.make_node("MatMul", ["s", "w"], ["embs"]),
            ],
            "g",
            [taken],
            [given],
            [
                onnx.numpy_helper.from_array(weights, "w"),
                helper.make_tensor("a", TensorProto.INT64, [1], [1]),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    model.ir_version = 8
    noted = {
        "sample_rate": 16000,
        "output_dim": 4,
        "front_end": json.dumps(settings(KaldiFbank())),
        "decision": json.dumps(Decision.fit(*dev_scores(), "dev").to_dict()),
        "facts": json.dumps({"corpus": ["a", "b"], "speakers": 3}),
    }
    for key, value in noted.items():
        model.metadata_props.add(key=key, value=str(value))
    path = folder / "model.onnx"
    onnx.save(model, path)

    def read(_):
        used(OnnxEncoder(path))

    def changes(good):
        """Of the graph, which begins the file, and of what is noted."""
        found = formats.little(good, 0, 200)
        for key in ("front_end", "decision", "facts"):
            value = noted[key].encode()
            found += [
                partial(put, good, key, change)
                for change in formats.json_values(value)
            ]
        return found

    def put(good, key, change):
        changed = onnx.ModelProto.FromString(good)
        for each in changed.metadata_props:
            if each.key == key:
                each.value = change().decode("utf-8", "replace")
        return changed.SerializeToString()

    good = path.read_bytes()
    return {
        "model.onnx": Target(read, EncoderError, good, path, changes, 2_000)
    }


def labels(good):
    """Lines ``'ada' => 0`` of SpeechBrain's label encoder."""
    spans = [m.span() for m in re.finditer(rb"[^\s=>]+|=>", good)]
    literals = [b"{'a': 1}", b"[0]", b"()", b"1j", b"b'a'", b"{}", b"set()"]
    literals += [b"__import__('os')", b"-" * 5000 + b"1", b"1" * 5000, b"..."]
    literals += [b"'a' 'b'", b"(" * 500 + b")" * 500, b"'ada'", b"lambda: 0"]
    hostile = [*literals, *formats.values.in_text()]
    return formats._at(good, spans, hostile) + formats._lines(good)


def edited_encoder(folder):
    """An encoder whose description was edited by who knows fingerprints.

    Without a new one nearly every change would be refused for that alone.
    """
    file = folder / "encoder.json"
    with contextlib.suppress(Exception):
        text = file.read_text(encoding="utf-8")
        description = json.loads(text)
        weights = load_file(folder / "encoder.safetensors")
        new = fingerprint(description["architecture"], weights)
        # in the text: other values may be what JSON cannot say again
        file.write_text(text.replace(description["fingerprint"], new))
    return SpeakerEncoder.from_folder(folder)


def used(encoder):
    """What is read must be fit for use, too."""
    if encoder.decision is not None:
        for name in ("EER", "FAR=1%"):
            with contextlib.suppress(ValueError):
                encoder.threshold(name)
        encoder.decision.llr(0.3)
        encoder.decision.shares(0.3)
        json.dumps(encoder.decision.to_dict())
    json.dumps(encoder.facts)


def _checkpoints(folder):
    """A run of which SpeakerEncoder takes the best checkpoint."""
    folder.mkdir()
    parts = {"embedding_model": small_network()}
    saved = SafeCheckpointer(folder / "save", parts)
    checkpoint = saved.save_checkpoint(meta={"EER": 3.5}).path
    (folder / "hyperparams.yaml").write_text(YAML.replace("NAME", "fbank"))
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    parts = {"model": model, "optimizer": optimizer, "brain": _Brain()}
    parts["counter"] = EpochCounter(3)
    plain = folder / "plain"
    other = SafeCheckpointer(plain, parts).save_checkpoint(name="a").path
    meta = yaml.safe_load((other / "CKPT.yaml").read_text())
    # as SpeechBrain writes it: checksums would refuse all changes
    for key in ("files", "checksum", "format"):
        del meta[key]
    (other / "CKPT.yaml").write_text(yaml.dump(meta))

    def recover(_):
        SafeCheckpointer(plain, parts).recover_if_possible()

    found = {}
    for name, place, read, error, changes, many in (
        (
            "hyperparams.yaml",
            folder / "hyperparams.yaml",
            lambda _: SpeakerEncoder.from_folder(checkpoint),
            EncoderError,
            formats.yaml_values,
            4_000,
        ),
        (
            "embedding_model.ckpt",
            # the checkpoint's own folder, whose checksums are not asked
            checkpoint / "embedding_model.ckpt",
            lambda _: SpeakerEncoder.from_folder(checkpoint),
            EncoderError,
            formats.state,
            3_000,
        ),
        (
            "optimizer.ckpt",
            other / "optimizer.ckpt",
            recover,
            CheckpointError,
            formats.state,
            2_000,
        ),
        (
            "brain.ckpt",
            other / "brain.ckpt",
            recover,
            CheckpointError,
            formats.state,
            4_000,
        ),
        (
            "counter.ckpt",
            other / "counter.ckpt",
            recover,
            CheckpointError,
            formats.columns,
            2_000,
        ),
    ):
        good = place.read_bytes()
        found[name] = Target(read, error, good, place, changes, many)
    for name, sealed in (("CKPT.yaml", bytes), ("sealed CKPT.yaml", _summed)):
        place = checkpoint / "CKPT.yaml"
        found[name] = Target(
            lambda _: read_checkpoint(checkpoint),
            CheckpointError,
            place.read_bytes(),
            place,
            formats.yaml_values,
            3_000,
            sealed,
        )
    return found


@register_checkpoint_hooks
class _Brain:
    """Saves and loads what a brain keeps of a running epoch."""

    @mark_as_saver
    def save(self, path):
        state = dict.fromkeys((*COUNTERS, "step", "joint_batch", "threads"), 3)
        state |= {"avg_train_loss": 0.5, "kept": {}, "log": "epoch: 1\n"}
        state["tally"] = dataclasses.asdict(Tally(1, 2, 0.5, 1, 0.1))
        state["faults"] = {"a.wav": "is empty"}
        state["random"] = [random_state()]
        torch.save(state, path)

    @mark_as_loader
    def load(self, path, end_of_epoch):
        read_state(path, {}, 0)


def _summed(data):
    """A CKPT.yaml whose checksum is that of its values."""
    with contextlib.suppress(Exception):
        meta = parse_yaml(data.decode(), "CKPT.yaml")  # within bounds
        old = meta.pop("checksum").encode()
        text = json.dumps(meta, sort_keys=True, default=str)
        new = blake2b(text.encode(), digest_size=16).hexdigest()
        return data.replace(old, new.encode())
    return data


def _runs(folder):
    (folder / "inference").mkdir(parents=True)
    run = Run(
        id="0123456789abcdef",
        settings={"lr": 0.1, "opt_class.momentum": 0.9, "speeds": [1.0, 0.9]},
        epochs=3,
        speakers=["ada", "bob"],
        files={"train": {"lines": 3, "checksum": "00"}},
        facts={"name": "x", "license": None},
    )
    run.write(folder)

    def read(_):
        found = read_run(folder, folder / "save")
        found.label_encoder()
        json.dumps(found.corrected({"name": "y"}).facts)

    place = folder / "run.json"
    return {
        "run.json": Target(
            read,
            RunError,
            place.read_bytes(),
            place,
            formats.json_values,
            50_000,
        )
    }


def _embeddings(folder):
    path, whose = folder / "e.safetensors", "f00d"
    store = EmbeddingStore(path, whose)
    draw = np.random.default_rng(0)
    store.save(
        EmbeddingSet(
            ("a.wav", "b.wav"),
            draw.normal(size=(2, 4)).astype(np.float32),
            np.ones(2, np.float32),
            np.zeros((2, 3), np.int64),
        )
    )

    def read_store(_):
        found = store.load()
        found.renamed({name: name for name in found.ids})

    people = folder / "speakers.db"
    database = partial(EnrolmentDatabase, people, whose, 4, timeout=1.0)
    database().enrol_many({"ada": draw.normal(size=(2, 4)), "bo": np.eye(4)[0]})

    def read_people(_):
        found = database()
        found.speakers()
        found.identify(np.eye(4)[1])
        found.score("ada", np.eye(4)[1])
        found.enrol("bo", np.eye(4)[:2])

    return {
        "store": Target(
            read_store,
            StoreError,
            path.read_bytes(),
            path,
            partial(_stored, store.made_with),
            30_000,
        ),
        "enrolment": Target(
            read_people,
            EnrolmentError,
            people.read_bytes(),
            people,
            partial(_enrolled, folder / "changed.db"),
            5_000,
        ),
    }


def _stored(made_with, good):
    """Stores whose arrays are others, sealed; and other headers."""
    arrays = load(good)

    def written(arrays):
        sums = seal(made_with, *_parts(arrays))
        whole = {name: np.asarray(each) for name, each in arrays.items()}
        return save(whole, metadata={"record": sums})

    def named(change):
        names = np.frombuffer(change(), np.uint8)
        return written({**arrays, "ids": names})

    ids = formats.json_values(arrays["ids"].tobytes())
    return [
        *formats.arrays(written, arrays),
        *(partial(named, change) for change in ids),
        *formats.safetensors_header(good),
    ]


def _parts(arrays):
    for name in ("ids", "matrix", "seconds", "files"):
        if name in arrays:
            array = np.ascontiguousarray(arrays[name])
            yield f"{name} {array.dtype} {array.shape}"
            yield array.reshape(-1).view(np.uint8).data


def _enrolled(path, good):
    def sealed(connection):
        rows = connection.execute(
            "SELECT rowid, name, recordings, total FROM speakers"
        ).fetchall()
        for row, name, count, total in rows:
            with contextlib.suppress(TypeError, AttributeError):
                sums = checksum(name, str(count), total)
                connection.execute(
                    "UPDATE speakers SET checksum = ? WHERE rowid = ?",
                    (sums, row),
                )

    columns = [
        *(("speakers", c) for c in ("name", "recordings", "total", "checksum")),
        *(("record", c) for c in ("seal", "state")),
    ]
    return formats.database(path, good, columns, sealed)
