"""Train a speaker encoder, verify it, and export it for inference.

Called by ``speechbrain-ram train`` and ``train_speaker_embeddings.py``. Any key
of the YAML is an option, and so are SpeechBrain's own. Exit status 75: asked to
leave by a signal or --max_hours, with a checkpoint written
(docs/robust-training.md).
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NoReturn

import ruamel.yaml
import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.distributed import if_main_process

from speechbrain_ram.cli.recipes import recipe_file
from speechbrain_ram.data.dataset import (
    original_speakers,
    speaker_datasets,
    speaker_labels,
)
from speechbrain_ram.data.manifest import embedding_names, read_manifest
from speechbrain_ram.data.shards import at_rate
from speechbrain_ram.export.architecture import read_hyperparams
from speechbrain_ram.export.folder import (
    read_folder,
    recipe_options,
    start_from,
)
from speechbrain_ram.export.limits import check_architecture
from speechbrain_ram.inference import encoder_section, export_inference
from speechbrain_ram.training.advice import session_note, verdict
from speechbrain_ram.training.brain import SpeakerBrain
from speechbrain_ram.training.leaving import (
    Interrupted,
    StopRequest,
    leave_on_signals,
)
from speechbrain_ram.training.options import check_device, check_settings
from speechbrain_ram.training.run import (
    begin_run,
    check_settings_of,
    data_files,
    prepare_data,
    read_run,
    sole_owner,
)
from speechbrain_ram.training.settings import (
    learned_settings,
    output_folder_of,
    resolved_recipe,
)
from speechbrain_ram.utils import (
    keep_freed_memory,
    leave_group,
    n_processes,
    of_rank_0,
    one_line_errors,
    printable,
)
from speechbrain_ram.verification.bootstrap import too_few_speakers
from speechbrain_ram.verification.calibration import Decision
from speechbrain_ram.verification.metrics import eer
from speechbrain_ram.verification.report import (
    System,
    with_intervals,
    write_report,
)
from speechbrain_ram.verification.scores import score_trials, write_scores
from speechbrain_ram.verification.speakers import known_speakers
from speechbrain_ram.verification.trials import (
    check_utterances,
    read_list_and_models,
    speakers_beside,
)

# The module of SpeechBrain's training log warns, when it is imported, that
# another class of it would need torchvision. Nothing here does.
logging.getLogger("speechbrain.utils.train_logger").addFilter(
    lambda record: "torchvision" not in str(record.msg)
)


def train(hparams_file, run_opts, overrides):
    """Everything from the YAML to OUTPUT/inference."""
    overrides = with_encoder_of_pretrained(hparams_file, overrides)
    # First on every process, since loading the YAML makes folders already.
    output = output_folder_of(hparams_file, overrides)
    alone = sole_owner(output) if if_main_process() else nullcontext()
    with alone:
        with open(hparams_file, encoding="utf-8") as file:
            hparams = load_hyperpyyaml(file, overrides)
        try:
            _train(hparams_file, hparams, run_opts, overrides)
        except Interrupted as leaving:
            leaving.goes_on = "There is no checkpoint yet: the same command "
            leaving.goes_on += "begins anew."
            if any(Path(hparams["save_folder"]).glob("CKPT*")):
                leaving.goes_on = "The same command goes on."
            raise


def with_encoder_of_pretrained(hparams_file, overrides):
    """The overrides, and the options of the encoder that a run starts from.

    What the command line says stands; :func:`start_from` compares.
    """
    recipe = resolved_recipe(hparams_file, overrides)
    start = recipe.get("pretrained")
    if not start:
        return overrides
    kept = Path(recipe["output_folder"]) / "hyperparams.yaml"
    if kept.exists() and not Path(start).exists():  # a run that goes on
        architecture = read_hyperparams(kept)
    else:
        found = read_folder(start)
        architecture = found.architecture
        check_architecture(architecture, found.place)
    if isinstance(overrides, str):
        overrides = ruamel.yaml.YAML().load(overrides) or {}
    options = recipe_options(architecture)
    return {k: v for k, v in options.items() if k in recipe} | overrides


def _train(hparams_file, hparams, run_opts, overrides):
    stop = StopRequest(hparams["max_hours"])  # its clock starts here
    output = Path(hparams["output_folder"])
    run, (train_csv, valid_csv) = of_rank_0(
        lambda: find_run(hparams_file, hparams, run_opts, overrides)
    )
    # Not before: it writes the YAML of this command.
    sb.create_experiment_directory(
        experiment_directory=output,
        hyperparams_to_save=hparams_file,
        overrides=overrides,
    )
    reading = {
        "sample_rate": hparams["encoder"]["sample_rate"],
        "resample": hparams["resample"],
        "mixdown": hparams["mixdown"],
    }
    train_set, valid_set, label_encoder = _datasets(
        hparams, run, train_csv, valid_csv, reading
    )
    trials = None
    if hparams.get("trials"):
        trials = read_list_and_models(hparams["trials"])
        check_utterances(trials, hparams["trials_root"])
    classifier = _classifier(hparams, run, label_encoder)
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

    _export(brain, hparams, run, label_encoder, classifier, valid_csv)


def _export(brain, hparams, run, label_encoder, classifier, valid_csv):
    """The best checkpoint becomes the folder that others load."""
    output, trials = Path(hparams["output_folder"]), brain.dev_trials
    brain.load_best()
    some = embedding_names(read_manifest(valid_csv))[:1000]
    embeddings = brain.embed(some, hparams["data_root"])
    decision, notes = None, []
    if trials is not None:
        decision, notes = verify(brain, trials, hparams, output)
    if if_main_process():
        names, rows = original_speakers(label_encoder, hparams["speeds"])
        classifier.weight = torch.nn.Parameter(classifier.weight[rows])
        export_inference(
            output / "inference",
            encoder_section(output / "hyperparams.yaml"),
            hparams["encoder"]["embedding_model"],
            classifier,
            names,
            torch.from_numpy(embeddings.matrix).mean(dim=0),
            decision,
            {**run.facts, **({"note": " ".join(notes)} if notes else {})},
        )
        print(f"Inference folder: {output / 'inference'}")


def _datasets(hparams, run, train_csv, valid_csv, reading):
    """Crops to train on and to validate with, and the label encoder."""
    augment = None
    if hparams.get("make_augmentation"):
        augment = hparams["make_augmentation"](
            sample_rate=reading["sample_rate"], resample=reading["resample"]
        )
    return speaker_datasets(
        train_csv,
        valid_csv,
        hparams["data_root"],
        crop_seconds=hparams["crop_seconds"],
        label_encoder=run.label_encoder(),
        seed=hparams["seed"],
        speeds=hparams["speeds"],
        augment=augment,
        **reading,
    )


def _classifier(hparams, run, label_encoder):
    """One row for each speaker, perhaps those of another encoder."""
    classifier = hparams["make_classifier"](out_neurons=len(label_encoder))
    hparams["checkpointer"].add_recoverable("classifier", classifier)
    hparams["checkpointer"].add_recoverable("run", run)
    learned = hparams["checkpointer"].find_checkpoint() is not None
    if hparams.get("pretrained") and not learned:
        start_from(
            hparams["pretrained"],
            encoder_section(
                Path(hparams["output_folder"]) / "hyperparams.yaml"
            ),
            hparams["encoder"]["embedding_model"],
            classifier,
            label_encoder,
        )
    return classifier


def objective_of(hparams):
    """What the exported folder's README says of the objective."""
    name = str(hparams["objective"])
    text = "{objective}, scale {scale}"
    if name != "softmax":
        text = "{objective}, margin {margin}, scale {scale}"
    if name in ("ram", "raam") or name.startswith("real-"):
        text += ", form {form}"
    if hparams.get("sub_centers", 1) > 1:
        text += ", {sub_centers} sub-centres a speaker"
    return text.format(**hparams)


def find_run(hparams_file, hparams, run_opts, overrides):
    """The run that this command begins or continues, and its manifests."""
    output = Path(hparams["output_folder"])
    epochs = hparams["number_of_epochs"]
    settings = learned_settings(hparams_file, overrides)
    settings["batch_size of all processes"] = (
        hparams["batch_size"]
        * n_processes()
        * (run_opts.get("grad_accumulation_factor") or 1)
    )
    run = read_run(output, hparams["save_folder"])
    if "max_grad_norm" in run_opts.overridden_args:  # SpeechBrain's own
        settings["max_grad_norm"] = run_opts["max_grad_norm"]
    start = hparams.get("pretrained")
    if start and run and not Path(start).exists():
        settings["pretrained"] = run.settings.get("pretrained")
    elif start:
        settings["pretrained"] = read_folder(start).fingerprint
    if run is not None:
        check_settings_of(run, settings, epochs, output)
    if hparams.get("make_corpus"):
        hparams["make_corpus"]()
    # As training reads: the rate may be that of --pretrained.
    prepare = at_rate(hparams["prepare"], hparams["encoder"]["sample_rate"])
    trials = hparams.get("trials")
    manifests = prepare_data(prepare, run, output, trials)
    facts = {"objective": objective_of(hparams), **hparams["facts"]}
    if run is None:
        labels = speaker_labels(manifests[0], hparams["speeds"])
        files = data_files(*manifests, trials)
        run = begin_run(output, settings, epochs, labels, files, facts)
    else:
        run = run.corrected(facts)
        run.write(output)
    return run, manifests


def verify(brain, trials, hparams, output):
    """Score the trials with the best checkpoint and say how it did."""
    embeddings = brain.embed_dev()
    if not if_main_process():
        return None, []
    scores = score_trials(trials, embeddings.ids, embeddings.matrix)
    name = Path(hparams["trials"]).name
    write_scores(trials, scores, output / "scores.txt")
    rate = after = eer(scores, trials.labels)
    untrained = brain.untrained.get("EER")
    pretrained = bool(hparams.get("pretrained"))
    notes = verdict(untrained, rate, pretrained)
    systems = {hparams["objective"]: System(scores)}
    speakers = known_speakers(
        trials, speaker_of=speakers_beside(hparams["trials"])
    )
    few = ""
    if speakers:
        few = too_few_speakers(trials.labels, speakers.enrol, speakers.test)
        systems = with_intervals(systems, trials, speakers)
        after = systems[hparams["objective"]].intervals.get("EER", rate)
    try:
        said = [*notes, session_note(trials), *filter(None, [few])]
        write_report(output / "report", name, trials, systems, notes=said)
        print(f"Report: {output / 'report' / 'results.md'}")
    except ImportError as error:  # everything but the pictures goes on
        print(f"No report: {error}")
    if untrained is not None:
        of = "the encoder of --pretrained" if pretrained else "untrained"
        print(f"EER before training: {untrained:.2f} % ({of})")
    print(f"EER after training: {after:.2f} %")
    if few:
        print(few)
    elif speakers:
        count = len(speakers.names)
        print(f"In brackets: the 95 % interval over {count} speakers.")
    for note in notes:
        print(printable(note))
    return Decision.fit(scores, trials.labels, name), notes


@contextmanager
def complaints_as_errors():
    """Let SpeechBrain's parser raise instead of printing its usage."""

    def complain(_, message):
        raise ValueError(f"{message.removeprefix('argument ')}.")

    complaint = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = complain
    try:
        yield
    finally:
        argparse.ArgumentParser.error = complaint


def main(argv):
    """Train; the exit status."""
    leave_on_signals()
    with complaints_as_errors():
        hparams_file, run_opts, overrides = sb.parse_arguments(argv)
    hparams_file = recipe_file(hparams_file)
    check_settings(hparams_file, overrides, run_opts)
    keep_freed_memory()
    sb.utils.distributed.ddp_init_group(run_opts)
    if run_opts["device"] == "cuda" and "LOCAL_RANK" in os.environ:
        # SpeechBrain would put all processes of torchrun on the first GPU.
        run_opts.device = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(run_opts["device"])
    try:
        train(hparams_file, run_opts, overrides)
    except Interrupted as asked:
        if not asked.told:  # was not training yet, or not any more
            print(asked.farewell(), file=sys.stderr)
        return asked.code
    finally:
        # torchrun ends the others when one fails: let that hide no error
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        leave_group()
    return 0


def run(argv: Sequence[str], program: str) -> NoReturn:
    """Train and leave; after a user's error with one line and status 2."""
    with one_line_errors(program):
        sys.exit(main(argv))
