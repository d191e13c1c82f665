#!/usr/bin/env python3
"""Train a speaker encoder, verify it, and export it for inference.

    python train_speaker_embeddings.py hparams/ram_resnet34.yaml
    python train_speaker_embeddings.py hparams/ram_resnet34.yaml \
        --objective am --margin 0.2 --seed 2 --precision bf16
    torchrun --nproc_per_node=2 train_speaker_embeddings.py YAML

Any key of the YAML is an option, and so are SpeechBrain's own (--help). The
same command continues an interrupted run. Exit status 75: asked to leave by a
signal or --max_hours, with a checkpoint written (docs/robust-training.md).
"""

import sys
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.distributed import ddp_broadcast, if_main_process

from speechbrain_ram.brain import SpeakerBrain
from speechbrain_ram.corpora.manifest import read_manifest
from speechbrain_ram.dataset import original_speakers, speaker_datasets
from speechbrain_ram.decision import Decision
from speechbrain_ram.inference import encoder_section, export_inference
from speechbrain_ram.memory import keep_freed_memory
from speechbrain_ram.metrics import eer
from speechbrain_ram.pretrained import start_from
from speechbrain_ram.processes import leave_group
from speechbrain_ram.report import System, write_report
from speechbrain_ram.scoring import score_trials, write_scores
from speechbrain_ram.stopping import (
    Interrupted,
    StopRequest,
    leave_on_signals,
)
from speechbrain_ram.trials import check_utterances, read_trials


def train(hparams_file, run_opts, overrides):
    """Everything from the YAML to OUTPUT/inference."""
    with open(hparams_file, encoding="utf-8") as file:
        hparams = load_hyperpyyaml(file, overrides)
    stop = StopRequest(hparams["max_hours"])  # its clock starts here
    output = Path(hparams["output_folder"])
    sb.create_experiment_directory(
        experiment_directory=output,
        hyperparams_to_save=hparams_file,
        overrides=overrides,
    )

    # Data: manifests, then datasets of crops; the labels count the speakers.
    manifests = None
    if if_main_process():
        if hparams.get("make_corpus"):
            hparams["make_corpus"]()
        manifests = hparams["prepare"]()
    train_csv, valid_csv = ddp_broadcast(manifests)
    reading = {
        "sample_rate": hparams["encoder"]["sample_rate"],
        "resample": hparams["resample"],
        "mixdown": hparams["mixdown"],
    }
    augment = None
    if hparams.get("make_augmentation"):
        augment = hparams["make_augmentation"]()
    train_set, valid_set, label_encoder = speaker_datasets(
        train_csv,
        valid_csv,
        hparams["data_root"],
        crop_seconds=hparams["crop_seconds"],
        seed=hparams["seed"],
        speeds=hparams["speeds"],
        augment=augment,
        cache=hparams.get("decoded_cache"),
        **reading,
    )
    trials = None
    if hparams.get("trials"):
        trials = read_trials(hparams["trials"])
        check_utterances(trials, hparams["trials_root"])

    # Modules: one row of the classifier for each speaker.
    classifier = hparams["make_classifier"](out_neurons=len(label_encoder))
    hparams["checkpointer"].add_recoverable("classifier", classifier)
    if hparams.get("pretrained"):
        start_from(
            hparams["pretrained"],
            encoder_section(output / "hyperparams.yaml"),
            hparams["encoder"]["embedding_model"],
            classifier,
            label_encoder,
        )
    brain = SpeakerBrain(
        modules={**hparams["modules"], "classifier": classifier},
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
        dev_trials=trials,
        dev_root=hparams.get("trials_root"),
        read_options=reading,
        stop=stop,
    )
    loader = {
        "batch_size": hparams["batch_size"],
        "num_workers": hparams["num_workers"],
    }
    brain.fit(
        hparams["epoch_counter"],
        train_set,
        valid_set,
        train_loader_kwargs={**loader, "shuffle": True},
        valid_loader_kwargs=loader,
    )

    # The best checkpoint becomes the folder that others load.
    brain.load_best()
    some = read_manifest(valid_csv)[:1000]
    paths = [row.path(hparams["data_root"]) for row in some]
    embeddings = brain.embed(paths, "")
    decision = None
    if trials is not None:
        decision = verify(brain, trials, hparams, output)
    if if_main_process():
        names, rows = original_speakers(label_encoder, hparams["speeds"])
        classifier.weight = torch.nn.Parameter(classifier.weight[rows])
        objective = "{objective}, margin {margin}, scale {scale}"
        if hparams["objective"] in ("ram", "raam"):
            objective += ", form {form}"
        export_inference(
            output / "inference",
            encoder_section(output / "hyperparams.yaml"),
            hparams["encoder"]["embedding_model"],
            classifier,
            names,
            torch.from_numpy(embeddings.matrix).mean(dim=0),
            decision,
            {"objective": objective.format(**hparams), **hparams["facts"]},
        )
        print(f"Inference folder: {output / 'inference'}")


def verify(brain, trials, hparams, output):
    """Score the trials with the best checkpoint and say how it did."""
    embeddings = brain.embed_dev()
    if not if_main_process():
        return None
    scores = score_trials(trials, embeddings.ids, embeddings.matrix)
    name = Path(hparams["trials"]).name
    write_scores(trials, scores, output / "scores.txt")
    try:
        systems = {hparams["objective"]: System(scores)}
        write_report(output / "report", name, trials, systems)
        print(f"Report: {output / 'report' / 'results.md'}")
    except ImportError as error:  # everything but the pictures goes on
        print(f"No report: {error}")
    if hasattr(brain, "untrained"):
        print(f"EER before training: {brain.untrained['EER']:.2f} %")
    print(f"EER after training: {eer(scores, trials.labels):.2f} %")
    return Decision.fit(scores, trials.labels, name)


if __name__ == "__main__":
    hparams_file, run_opts, overrides = sb.parse_arguments(sys.argv[1:])
    leave_on_signals()
    keep_freed_memory()
    sb.utils.distributed.ddp_init_group(run_opts)
    status = 0
    try:
        train(hparams_file, run_opts, overrides)
    except Interrupted as asked:
        status = asked.code
    leave_group()
    sys.exit(status)
