# SPDX-License-Identifier: MIT
"""Sound files as 16 kHz PCM: read, mixed to mono, resampled, and cut where nobody speaks."""

from __future__ import annotations

import math
import os
import wave
from collections.abc import Iterator

import numpy as np
import torch

SAMPLE_RATE = 16_000
MAX_RATE = 1_000_000
_TAPS = 16  # zero crossings of the low-pass filter on either side
_BLOCK = 1 << 14  # samples resampled at a time
_SEARCH = 5 * SAMPLE_RATE  # a pause is looked for in the last 5 s of a chunk
_PAUSE = SAMPLE_RATE // 5


class AudioError(ValueError):
    """A sound file that cannot be read."""


def read_audio(path: str | os.PathLike[str]) -> torch.Tensor:
    """float32 ``[samples]`` in [-1, 1] at 16 kHz, the mean of all channels.

    WAV of 8 to 32 bits is read with the standard library; anything else (FLAC, MP3, WAV of floats)
    with the package soundfile, where it is installed.
    """
    samples, rate = _read_wav(path)
    return resample(samples.mean(0), rate)


def _read_wav(path: str | os.PathLike[str]) -> tuple[torch.Tensor, int]:
    """``[channels, samples]`` and the sample rate."""
    try:
        with open(path, "rb") as stream, wave.open(stream) as file:
            channels, width, rate, frames = file.getparams()[:4]
            data = file.readframes(frames)
    except (wave.Error, EOFError) as error:
        return _read_soundfile(path, str(error) or "the file ends too early")
    if not channels or not 1 <= width <= 4 or not 0 < rate <= MAX_RATE:
        problem = f"{channels} channels of {width} bytes at {rate} Hz"
        raise AudioError(f"{os.fspath(path)}: {problem} cannot be read")
    raw = np.frombuffer(data[: len(data) // (channels * width) * channels * width], np.uint8)
    if width == 1:  # the only width that is unsigned
        values = raw.astype(np.float32) - 128
    else:  # into the upper bytes of an int32, whatever the width
        wide = np.zeros((len(raw) // width, 4), np.uint8)
        wide[:, 4 - width :] = raw.reshape(-1, width)
        values = (wide.view("<i4")[:, 0] / 2.0 ** (32 - 8 * width)).astype(np.float32)
    values /= 2.0 ** (8 * width - 1)
    return torch.from_numpy(values.reshape(-1, channels).T.copy()), rate


def _read_soundfile(path: str | os.PathLike[str], why: str) -> tuple[torch.Tensor, int]:
    name = os.fspath(path)
    try:
        import soundfile
    except ImportError:
        hint = "other files need soundfile (pip install soundfile), or ffmpeg -i IN OUT.wav"
        raise AudioError(f"{name}: not a WAV file of PCM ({why}); {hint}") from None
    try:
        data, rate = soundfile.read(name, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{name}: {error}") from None
    return torch.from_numpy(data.T.copy()), int(rate)


def resample(samples: torch.Tensor, rate: int, new_rate: int = SAMPLE_RATE) -> torch.Tensor:
    """``[samples]`` at any rate to another, through a windowed sinc that keeps what both can hold.

    Output i stands at time t = i · rate / new_rate of the input and is the sum over inputs j of
    ``samples[j] · h(t - j)``, where h passes frequencies below the lower Nyquist limit.
    """
    if rate == new_rate:
        return samples
    cutoff = min(1.0, new_rate / rate)
    reach = math.ceil(_TAPS / cutoff)
    count = len(samples) * new_rate // rate
    padded = torch.nn.functional.pad(samples, (reach, reach + 1))
    offsets = torch.arange(-reach, reach + 1)
    blocks = []
    for first in range(0, count, _BLOCK):
        i = torch.arange(first, min(first + _BLOCK, count), dtype=torch.int64)
        whole = i * rate // new_rate
        fraction = (i * rate % new_rate).double() / new_rate
        distance = (fraction[:, None] - offsets) * cutoff  # [outputs, 2 reach + 1]
        window = torch.cos(distance.clamp(-_TAPS, _TAPS) * (math.pi / (2 * _TAPS))).square()
        weights = (torch.sinc(distance) * window * cutoff).float()
        blocks.append((padded[whole[:, None] + offsets + reach] * weights).sum(1))
    return torch.cat(blocks) if blocks else samples[:0]


def split_at_pauses(pcm: torch.Tensor, chunk_samples: int) -> Iterator[torch.Tensor]:
    """Pieces of at most chunk_samples that together are all of pcm, cut in the quietest places."""
    start = 0
    while len(pcm) - start > chunk_samples:
        search, pause = min(_SEARCH, chunk_samples // 2), min(_PAUSE, chunk_samples // 8)
        first = start + chunk_samples - search
        # The energy of every `pause` samples, a quarter of that apart.
        tail = pcm[first : start + chunk_samples].square()
        step = max(1, pause // 4)
        energy = tail.unfold(0, max(1, pause), step).sum(1)
        end = first + int(energy.argmin()) * step + pause // 2
        yield pcm[start:end]
        start = end
    if start < len(pcm):
        yield pcm[start:]
