"""Ferropt's token files and its order of training samples, written a second time.

A sample's place follows from (number of samples, seed, index) alone, see crates/data/src/permutation.rs; here it is worked
out independently, so that PyTorch trains on the same sequences in the same order.
"""

import numpy

HEADER = 128
EOS = 2
MASK32 = 0xFFFFFFFF


def load(path):
    """All ids of a token file, as int64."""
    with open(path, "rb") as file:
        header = file.read(HEADER)
        if header[:8] != b"FERROTOK" or int.from_bytes(header[8:12], "little") != 2:
            raise SystemExit(f"{path} is no token file of version 2")
        width = int.from_bytes(header[12:16], "little")
        count = int.from_bytes(header[16:24], "little")
        # Checksums follow the ids.
        ids = numpy.fromfile(file, dtype={2: "<u2", 4: "<u4"}[width], count=count)
    if len(ids) != count:
        raise SystemExit(f"{path} holds {len(ids)} ids, its header says {count}; delete it and run ferropt again")
    return ids.astype(numpy.int64)


def philox(counter, key):
    """Philox4x32-10 (Salmon and others, 2011); four words from four and a key of two."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ k0, q & MASK32, (p >> 32) ^ d ^ k1, p & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return a, b, c, d


class Order:
    """The shuffled order of `samples` samples; every epoch has its own."""

    ROUNDS = 8
    DATA_ORDER = 6

    def __init__(self, samples, seed):
        self.samples = samples
        self.key = (seed & MASK32, seed >> 32)
        self.half = max(1, ((samples - 1).bit_length() + 1) // 2)

    def at(self, index):
        """Window number of the index-th training sample."""
        epoch, place = divmod(index, self.samples)
        while True:
            place = self.feistel(place, epoch)
            if place < self.samples:
                return place

    def feistel(self, place, epoch):
        what = self.DATA_ORDER << 24 | (epoch & 0xFFFFFF)
        left, right = place >> self.half, place & ((1 << self.half) - 1)
        for turn in range(self.ROUNDS):
            high = right >> 32
            rotated = (high << 20 | high >> 12) & MASK32
            word = philox((turn, right & MASK32, what, (epoch >> 24) ^ rotated), self.key)[0]
            left, right = right, left ^ (word & ((1 << self.half) - 1))
        return left << self.half | right


def training_batch(ids, order, seq, first, count):
    """Inputs and targets [count, seq] of samples first, first + 1, ..."""
    windows = numpy.stack([ids[w * seq : w * seq + seq + 1] for w in (order.at(first + j) for j in range(count))])
    return windows[:, :-1], windows[:, 1:]


def validation_set(ids, seq, most):
    """Inputs and targets [samples, seq]: every token is a target once, `</s>` comes before the first; whole sequences of
    at most `most` tokens in all."""
    samples = min(len(ids), most) // seq
    targets = ids[: samples * seq]
    inputs = numpy.concatenate([[EOS], targets[:-1]])
    return inputs.reshape(samples, seq), targets.reshape(samples, seq)
