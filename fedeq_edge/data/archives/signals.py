"""Sensor streams as windows of one length, and the filters that the authors of HAR applied to them."""

import io

import numpy as np
from numpy.typing import NDArray

Signal = NDArray[np.float64]


def columns(text: bytes, count: int) -> Signal:
    """(rows, count) of a text file of numbers. Raises ValueError, which names the row, where it is not that."""
    if not text.strip():
        raise ValueError("it is empty")
    table = np.loadtxt(io.BytesIO(text), dtype=np.float64, ndmin=2)
    if table.shape[1] != count or not np.isfinite(table).all():
        raise ValueError(f"{table.shape[1]} columns, or values that are no numbers; expected {count} columns")
    return table


def window_starts(start: int, stop: int, width: int) -> NDArray[np.int64]:
    """First samples of all windows of `width` within [start, stop), each half a window after the one before."""
    return np.arange(start, stop - width + 1, width // 2)


def cut(stream: NDArray[np.floating], starts: NDArray[np.int64], width: int) -> NDArray[np.float32]:
    """(windows, channels, width) float32 of a stream (samples, channels)."""
    rows = starts[:, None] + np.arange(width)
    return np.ascontiguousarray(stream[rows].swapaxes(1, 2), dtype=np.float32)


def median_of_three(stream: Signal) -> Signal:
    """Each sample (rows, channels) becomes the median of itself and its neighbours; the ends stay."""
    inner = np.median(np.stack([stream[:-2], stream[1:-1], stream[2:]]), axis=0)
    return np.concatenate([stream[:1], inner, stream[-1:]]) if len(stream) > 2 else stream


def low_pass(stream: Signal, cutoff_hz: float, rate_hz: float) -> Signal:
    """A 3rd-order Butterworth low-pass run forwards and backwards over a stream (rows, channels): no delay.

    Both passes together have the gain 1 / (1 + (tan(pi f / rate) / tan(pi cutoff / rate))^6), which is applied to the
    spectrum of the stream, mirrored about its ends as filters do that run over it.
    """
    mirrored = np.concatenate([2 * stream[:1] - stream[::-1], stream[1:-1], 2 * stream[-1:] - stream[::-1]])
    frequency = np.fft.rfftfreq(len(mirrored))
    with np.errstate(over="ignore"):  # tan at half the rate is infinite, and the gain 0
        gain = 1 / (1 + (np.tan(np.pi * frequency) / np.tan(np.pi * cutoff_hz / rate_hz)) ** 6)
    passed = np.fft.irfft(np.fft.rfft(mirrored, axis=0) * gain[:, None], len(mirrored), axis=0)
    return passed[len(stream) - 1 : 2 * len(stream) - 1]
