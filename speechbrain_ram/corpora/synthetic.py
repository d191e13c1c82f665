"""A made-up corpus in VoxCeleb's folder shape, for demos and tests.

Every voice is a source-filter model (Fant, Acoustic Theory of Speech
Production, 1960): a train of glottal pulses with breath noise, shaped by the
resonances of a vocal tract. A speaker is a pitch range, a tract length, small
displacements of each formant, a glottal tilt and a breathiness. What changes
from one utterance to the next is meant to mask them: vowels, intonation, mood
(pitch and tilt), microphone (a random equaliser), background noise and level.
Average spectra therefore tell utterances apart rather than speakers.

The folder, with the names that VoxCeleb1's two archives have::

    OUTPUT_DIR/dev/wav/id10001/VIDEO/00001.wav    training speakers
    OUTPUT_DIR/test/wav/id10271/VIDEO/00001.wav   other speakers
    OUTPUT_DIR/trials.txt                         all pairs of test/wav
    OUTPUT_DIR/synthetic.json                     the settings it was made with
"""

from __future__ import annotations

import json
import os
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.fft
import soundfile
from tqdm import tqdm

from speechbrain_ram.data.manifest import ManifestError
from speechbrain_ram.data.plain import read_json
from speechbrain_ram.utils import atomic_folder

SAMPLE_RATE = 16000

_VERSION = 2  # raised whenever the same settings give other samples
_N_FFT = 512  # 32 ms: long enough for two pitch periods
_HOP = _N_FFT // 4
_FREQUENCIES = np.fft.rfftfreq(_N_FFT, 1 / SAMPLE_RATE)
_WINDOW = np.hanning(_N_FFT + 1)[:-1].astype(np.float32)

# F1, F2, F3 in Hz of nine vowels, between the averages for men and women of
# Peterson and Barney (1952).
_VOWELS = np.array(
    [
        [290, 2540, 3160],
        [410, 2230, 2770],
        [570, 2080, 2720],
        [750, 1880, 2650],
        [790, 1150, 2620],
        [580, 880, 2560],
        [450, 1090, 2460],
        [330, 910, 2460],
        [690, 1290, 2580],
    ],
    dtype=float,
)
_BANDWIDTHS = np.array([70.0, 100.0, 140.0, 200.0, 260.0])


class SyntheticCorpus(NamedTuple):
    """Where the parts of a synthetic corpus lie."""

    train_root: Path  # of folders of speakers
    test_root: Path
    trials: Path  # in VoxCeleb's form, relative to `test_root`


class _Voice(NamedTuple):
    """What stays the same in all utterances of a speaker."""

    pitch: float  # Hz, median
    liveliness: float  # semitones, how far intonation moves
    tract: float  # scales all formants
    formants: np.ndarray  # [5], scales each formant
    high_formants: np.ndarray  # [2], F4 and F5 in Hz
    tilt: float  # dB per octave above 300 Hz
    breath: float  # noise against pulses
    tempo: float  # segments per second


def make_synthetic(
    output_dir: str | os.PathLike,
    n_speakers: int = 20,
    n_utterances: int = 12,
    n_test_speakers: int = 10,
    n_test_utterances: int = 8,
    min_seconds: float = 3.0,
    max_seconds: float = 4.0,
    seed: int = 1986,
) -> SyntheticCorpus:
    """Make the corpus, or find it made with the same settings before.

    Arguments
    ---------
    output_dir : path
        The corpus folder; it appears when all of it is there.
    n_speakers, n_utterances : int
        Training speakers, and utterances of each.
    n_test_speakers, n_test_utterances : int
        Other speakers, for the trials. All pairs of their utterances are
        trials.
    min_seconds, max_seconds : float
        Utterances last a random time between these.
    seed : int
        The same settings give the same samples.

    Returns
    -------
    SyntheticCorpus

    Raises
    ------
    ManifestError
        The folder holds something else, or a corpus of other settings.
    ValueError
        Numbers that make no corpus.

    Example
    -------
    >>> corpus = make_synthetic(
    ...     getfixture("tmp_path") / "corpus", 2, 2, 2, 2, 0.2, 0.3
    ... )
    >>> len(corpus.trials.read_text().splitlines())
    6
    """
    settings = {
        "version": _VERSION,
        "n_speakers": n_speakers,
        "n_utterances": n_utterances,
        "n_test_speakers": n_test_speakers,
        "n_test_utterances": n_test_utterances,
        "min_seconds": min_seconds,
        "max_seconds": max_seconds,
        "seed": seed,
    }
    for name, low in (
        ("n_speakers", 2),
        ("n_utterances", 1),
        ("n_test_speakers", 2),
        ("n_test_utterances", 2),
    ):
        if settings[name] < low:
            raise ValueError(f"{name} is {settings[name]}, expected >= {low}.")
    if not 0.1 <= min_seconds <= max_seconds:
        raise ValueError(
            f"min_seconds is {min_seconds} and max_seconds {max_seconds}, "
            "expected 0.1 <= min_seconds <= max_seconds."
        )
    output_dir = Path(output_dir)
    if _already_made(output_dir, settings):
        return _parts(output_dir)

    try:
        with atomic_folder(output_dir) as temporary:
            _write_corpus(temporary, settings)
    except OSError:  # another process was faster, or the disk is full
        if not _already_made(output_dir, settings):
            raise
    return _parts(output_dir)


def _parts(folder: Path) -> SyntheticCorpus:
    return SyntheticCorpus(
        folder / "dev" / "wav", folder / "test" / "wav", folder / "trials.txt"
    )


def _already_made(folder: Path, settings: dict) -> bool:
    """Whether `folder` holds this corpus; raises when it holds another."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    stamp = folder / "synthetic.json"
    try:
        found = read_json(stamp) if stamp.exists() else None
    except (OSError, ValueError) as error:
        raise ManifestError(
            f"'{stamp}' does not say which corpus this is: {error} Choose "
            "another folder, or remove this one."
        ) from error
    if found == settings:
        return True
    if not isinstance(found, dict):
        raise ManifestError(
            f"'{folder}' is not empty and holds no synthetic corpus. Choose "
            "another folder for it."
        )
    changed = {
        key: f"{found.get(key)!r:.40} there, {value} wanted"
        for key, value in settings.items()
        if found.get(key) != value
    }
    raise ManifestError(
        f"'{folder}' holds a synthetic corpus of other settings: {changed}. "
        "Remove it, or choose another folder."
    )


def _write_corpus(folder: Path, settings: dict) -> None:
    """Synthesise everything into `folder`."""
    parts = _parts(folder)
    n_speakers, n_test = settings["n_speakers"], settings["n_test_speakers"]
    jobs = [
        (parts.train_root, speaker, utterance)
        for speaker in range(n_speakers)
        for utterance in range(settings["n_utterances"])
    ] + [
        (parts.test_root, n_speakers + speaker, utterance)
        for speaker in range(n_test)
        for utterance in range(settings["n_test_utterances"])
    ]
    test_names: list[tuple[int, str]] = []
    for root, speaker, utterance in tqdm(jobs, desc="Synthesis", unit="utt"):
        # A seed of its own for each voice and utterance: a larger corpus
        # begins with the smaller one of the same seed.
        key = (settings["seed"], speaker)
        voice = _draw_voice(np.random.default_rng((*key, 0)))
        generator = np.random.default_rng((*key, utterance + 1))
        seconds = generator.uniform(
            settings["min_seconds"], settings["max_seconds"]
        )
        name = (
            f"id{10001 + speaker}/video{utterance:06d}/{utterance + 1:05d}.wav"
        )
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(
            path,
            _synthesise(voice, round(seconds * SAMPLE_RATE), generator),
            SAMPLE_RATE,
            subtype="PCM_16",
        )
        if root == parts.test_root:
            test_names.append((speaker, name))
    with open(parts.trials, "w", encoding="utf-8") as file:
        for (first, enrol), (second, test) in combinations(test_names, 2):
            file.write(f"{int(first == second)} {enrol} {test}\n")
    stamp = json.dumps(settings, indent=1)
    (folder / "synthetic.json").write_text(stamp + "\n")


def _draw_voice(generator: np.random.Generator) -> _Voice:
    """Draw a speaker."""
    tract = generator.uniform(0.82, 1.2)
    return _Voice(
        # A short tract goes with a high voice, loosely, as in people.
        pitch=150 * tract**2 * 2 ** generator.uniform(-0.6, 0.6),
        liveliness=generator.uniform(0.5, 2.0),
        tract=tract,
        formants=1 + generator.uniform(-0.1, 0.1, 5),
        high_formants=np.array(
            [generator.uniform(3300, 3900), generator.uniform(4200, 5200)]
        ),
        tilt=generator.uniform(-12, -5),
        breath=10 ** generator.uniform(-2.0, -0.7),
        tempo=generator.uniform(4.0, 8.0),
    )


def _synthesise(
    voice: _Voice, length: int, generator: np.random.Generator
) -> np.ndarray:
    """Speak one utterance, [length], peak below 1."""
    frames = length // _HOP + 4
    formants, loudness = _articulate(voice, frames, generator)
    source = _glottis(voice, frames, length, generator)

    # The filter acts on short spectra: tract (moving), then tilt and
    # microphone (fixed).
    octaves = np.log2(np.maximum(_FREQUENCIES, 300) / 300)
    tilt = voice.tilt + generator.uniform(-2, 2)
    fixed = 10 ** ((tilt * octaves + _equaliser(generator)) / 20)
    gains = _resonances(formants) * fixed.astype(np.float32)  # [frames, bins]
    gains *= loudness[:, None]
    speech = _filter_frames(source, gains, length)
    speech /= np.sqrt(np.mean(speech**2)) + 1e-12

    noise = _coloured_noise(_equaliser(generator, -8, 2), length, generator)
    snr = generator.uniform(12, 25)
    mixture = speech + noise * 10 ** (-snr / 20)
    level = generator.uniform(0.1, 0.9)  # of the peak
    return level * mixture / np.abs(mixture).max()


def _articulate(voice, frames, generator) -> tuple[np.ndarray, np.ndarray]:
    """Vowel targets gliding into each other: [frames, 5] Hz, [frames]."""
    step = SAMPLE_RATE / _HOP / voice.tempo
    knots = int(frames / step) + 3
    vowels = _VOWELS[generator.integers(len(_VOWELS), size=knots)]
    targets = np.concatenate(
        [vowels, np.tile(voice.high_formants, (knots, 1))], axis=1
    )
    targets *= 1 + generator.normal(0, 0.02, targets.shape)
    targets *= voice.tract * voice.formants
    # A fifth of the targets are pauses or closures.
    level = np.where(generator.random(knots) < 0.2, 0.03, 1.0)
    level *= generator.uniform(0.4, 1.0, knots)
    times = np.cumsum(generator.uniform(0.6, 1.4, knots)) * step
    at = np.arange(frames) + times[0]
    formants = np.stack(
        [np.interp(at, times, targets[:, k]) for k in range(5)], axis=1
    )
    return formants, np.interp(at, times, level)


def _glottis(voice, frames, length, generator) -> np.ndarray:
    """Pulses and breath, [length]."""
    mood = generator.uniform(-1.5, 1.5)  # semitones
    knots = max(frames // 25, 2)
    movement = generator.normal(0, voice.liveliness, knots)
    declination = np.linspace(1, -1, knots)
    semitones = mood + movement + declination
    at = np.linspace(0, knots - 1, length)
    pitch = voice.pitch * 2 ** (np.interp(at, np.arange(knots), semitones) / 12)
    phase = np.cumsum(pitch / SAMPLE_RATE) + generator.random()
    pulses = np.diff(np.floor(phase), prepend=np.floor(phase[0]))
    pulses *= np.sqrt(SAMPLE_RATE / pitch)  # unit power at any pitch
    breath = voice.breath * 2 ** generator.uniform(-1, 1)
    return pulses + breath * generator.standard_normal(length, dtype=np.float32)


def _resonances(formants: np.ndarray) -> np.ndarray:
    """Magnitude response of a cascade of resonators, [frames, bins]."""
    response = np.ones((len(formants), len(_FREQUENCIES)), dtype=np.float32)
    squares = _FREQUENCIES.astype(np.float32) ** 2
    for centre, bandwidth in zip(formants.T, _BANDWIDTHS, strict=True):
        centre = centre.astype(np.float32)[:, None]
        ratio = squares / centre**2  # of the frequencies, squared
        response *= (1 - ratio) ** 2 + ratio * (bandwidth / centre) ** 2
    return 1 / np.sqrt(response)


def _equaliser(generator, low_tilt: float = -3, high_tilt: float = 3):
    """A random smooth curve in dB over the bins: microphone, room, codec."""
    octaves = np.log2(np.maximum(_FREQUENCIES, 100) / 100)
    curve = generator.uniform(low_tilt, high_tilt) * octaves
    knots = np.linspace(0, octaves[-1], 9)
    curve += np.interp(octaves, knots, generator.normal(0, 5, 9))
    # Pulses have an offset that voices have not, and no microphone takes in.
    return np.where(_FREQUENCIES < 60, -100, curve)


def _coloured_noise(curve, length: int, generator) -> np.ndarray:
    """Noise of unit power with a spectrum in dB over the bins, [length]."""
    spectrum = scipy.fft.rfft(
        generator.standard_normal(
            scipy.fft.next_fast_len(length, real=True), dtype=np.float32
        )
    )
    at = np.linspace(0, SAMPLE_RATE / 2, len(spectrum))
    spectrum *= np.interp(at, _FREQUENCIES, 10 ** (curve / 20))
    noise = scipy.fft.irfft(spectrum)[:length]
    return noise / np.sqrt(np.mean(noise**2))


def _filter_frames(signal, gains, length: int) -> np.ndarray:
    """Multiply short-time spectra by `gains` and add up the frames."""
    frames = len(gains)
    padded = np.zeros((frames + 3) * _HOP, dtype=np.float32)
    padded[3 * _HOP : 3 * _HOP + length] = signal
    views = np.lib.stride_tricks.sliding_window_view(padded, _N_FFT)[::_HOP]
    spectra = scipy.fft.rfft(views * _WINDOW, axis=1) * gains
    pieces = scipy.fft.irfft(spectra, axis=1) * _WINDOW
    output = np.zeros((frames + 3, _HOP), dtype=np.float32)
    for k in range(4):  # each frame covers four hops
        output[k : k + frames] += pieces[:, k * _HOP : (k + 1) * _HOP]
    return output.reshape(-1)[3 * _HOP : 3 * _HOP + length]
