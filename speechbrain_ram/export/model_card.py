"""The README of an exported encoder: what it is, how good, how to use it.

In the form that model hubs read: YAML facts on top, then Markdown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from speechbrain_ram.verification.decision import Decision

#: What a recipe may say about an encoder; what it does not say is left open.
FACTS = {
    "name": "Name",
    "corpus": "Training corpus",
    "speakers": "Training speakers",
    "objective": "Objective",
    "language": "Languages",
    "note": "Note",  # what must be read before the numbers
    "license": "Licence",  # an SPDX identifier, which hubs read in lower case
}

_CARD = """---
library_name: speechbrain
license: {license_id}
tags:
- speaker-verification
- speaker-recognition
- speaker-embeddings
- speechbrain
- pytorch
metrics:
- EER
---

# {name}

A speaker encoder: it maps a recording of {rate} Hz to {dim} numbers that are
alike when the speaker is. Trained with [speechbrain-ram] on [SpeechBrain].

| | |
| --- | --- |
{facts}

## How good it is

{results}

These numbers hold for recordings like those of that list. For another
language, channel or age group measure anew before you rely on a threshold.

## Use it

Nothing that this folder contains is executed:

```python
from speechbrain_ram.inference import SpeakerEncoder

encoder = SpeakerEncoder.from_folder("path/of/this/folder")
print(encoder.compare("a.wav", "b.wav"))
```

```
speechbrain-ram compare --encoder path/of/this/folder a.wav b.wav
```

With SpeechBrain alone (it executes what `hyperparams.yaml` names, so trust the
folder first):

```python
from speechbrain.inference.speaker import SpeakerRecognition

model = SpeakerRecognition.from_hparams("path/of/this/folder")
score, _ = model.verify_files("a.wav", "b.wav")  # compare with a threshold
```

## What is inside

| file | what |
| --- | --- |
| `encoder.json` | architecture, thresholds and score distributions |
| `encoder.safetensors` | weights |
| `hyperparams.yaml`, `*.ckpt` | the same for SpeechBrain, with the classifier |

## Cite

```bibtex
@inproceedings{{li2022ram,
  title     = {{Real Additive Margin Softmax for Speaker Verification}},
  author    = {{Li, Lantian and Nai, Ruiqian and Wang, Dong}},
  booktitle = {{Proc. ICASSP}},
  year      = {{2022}}
}}
```

[speechbrain-ram]: https://pypi.org/project/speechbrain-ram
[SpeechBrain]: https://speechbrain.github.io
"""


def model_card(
    architecture: Mapping[str, Any],
    facts: Mapping[str, Any],
    decision: Decision | None = None,
) -> str:
    """Write the model card.

    Arguments
    ---------
    architecture : mapping
        As plain data, for the sample rate and the size of the embedding.
    facts : mapping
        Any of the keys of `FACTS`.
    decision : Decision, optional
        The development list's results.

    Returns
    -------
    str
        Markdown.

    Raises
    ------
    ValueError
        A fact of another name.
    """
    unknown = sorted(set(facts) - set(FACTS))
    if unknown:
        raise ValueError(
            f"A model card has no {', '.join(unknown)}; it has "
            f"{', '.join(FACTS)}. Is a key misspelt in the YAML?"
        )
    front_end = architecture["compute_features"]
    rows = [
        f"| {title} | {facts.get(key, 'not stated')} |"
        for key, title in FACTS.items()
        if key not in ("name", "note")
    ]
    rows.append(f"| Front-end | `{_describe(front_end)}` |")
    rows.append(f"| Network | `{_describe(architecture['embedding_model'])}` |")
    note = [f"**{facts['note']}**"] if facts.get("note") else []
    return _CARD.format(
        name=facts.get("name", "Speaker encoder"),
        license_id=str(facts.get("license", "unknown")).lower(),
        rate=architecture["sample_rate"],
        dim=architecture["embedding_dim"],
        facts="\n".join(rows),
        results="\n\n".join([*note, _results(decision)]),
    )


def _results(decision: Decision | None) -> str:
    if decision is None:
        return "No development list was scored, so no threshold is saved."
    rows = [
        f"| threshold at {name} | {value:.3f} |"
        for name, value in decision.thresholds.items()
    ]
    return "\n".join(
        [
            "| | |",
            "| --- | --- |",
            f"| EER | {decision.eer:.2f} % |",
            f"| list | {decision.trials}: {decision.n_target:,} target and "
            f"{decision.n_nontarget:,} non-target trials |",
            *rows,
        ]
    )


def _describe(call: Mapping[str, Any]) -> str:
    """A part of the architecture as a call, `Name(key=value, ...)`."""
    arguments = dict(call["arguments"])
    name = call.get("class") or call.get("function")
    listed = ", ".join(f"{key}={value}" for key, value in arguments.items())
    return f"{name.rpartition('.')[2]}({listed})"
