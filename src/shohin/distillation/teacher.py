"""The teacher: a model whose answers are remembered for samples that come again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shohin.data import Call
from shohin.distillation.answers import Answers
from shohin.distillation.inference import Answer, Inference
from shohin.distillation.keys import Keys, batch_size, device_of, fingerprint, keys_of, part_of
from shohin.distillation.shards import Shards
from shohin.errors import DataError

#: relative difference of a sample's answers in two batches that is still rounding
ROUNDING = 1e-4


class Teacher:
    """Logits and features of a model for batches.

    Answers are remembered by sample: by the contents of its row in every argument (the first axis is the batch), whatever else is in the
    call, and the precision. A shuffled loader is answered from memory from its second epoch on, and of a batch with some unknown
    samples only those are computed. A sample padded to another length is another sample.

    That is right only where samples do not see one another and every answer has the batch as its first axis. It is tried once on
    the first batch of two samples or more, a part of which is run again. Where it does not hold, whole batches are remembered instead.
    So are batches of one sample, since models may treat them differently. The model must stay as it is while its answers are remembered.

    Args:
        model: put into eval mode for each call, and back.
        names: modules whose outputs are features.
        cache_bytes: memory for remembered answers, beside about 200 bytes for each sample; 0 remembers nothing there.
        folder: where answers are kept for other runs and processes too, in a folder of their own for each teacher (the weights, the
            settings of its modules and ``names`` make its name). A file that is damaged is computed anew, with a warning.
        lowered: a faster form, called as the model is, that answers where no features are asked: a runner of another runtime, a compiled
            module; it gives tensors or arrays. Compared with the model on the first batch, and refused with a warning if its logits
            differ by more than `AGREES`. A batch that it cannot run is run by the model.
        disk_bytes: of all files in ``folder``; nothing is written beyond.

    ``hits`` counts samples with remembered answers (``reads`` of them read from the disk for this very call), ``misses`` those computed.
    ``by_sample`` tells whether the last batch was remembered by sample; None before the first of two samples or more.

    Raises:
        DataError: if ``folder`` cannot be made.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str] = (),
        cache_bytes: int = 256 << 20,
        folder: Path | None = None,
        lowered: Callable[..., Any] | None = None,
        *,
        disk_bytes: int = 20 << 30,
    ) -> None:
        self.model, self.names = model, tuple(dict.fromkeys(names))
        self._infer = Inference(model, self.names, None if self.names else lowered)
        self.hits = self.misses = self.reads = 0
        self.by_sample: bool | None = None
        self._independent: dict[str, bool] = {}
        self._answers, self._cache_bytes = Answers(cache_bytes), cache_bytes
        self._remembers = cache_bytes > 0 or folder is not None
        self._folder, self._disk_bytes = None if folder is None else Path(folder), disk_bytes
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(f"the folder {self._folder} for the teacher's answers cannot be made: {error}") from None

    def watching(self, names: Sequence[str]) -> Teacher:
        """A teacher with the same model, memory, folder and bounds, whose features are of these modules."""
        return Teacher(self.model, names, self._cache_bytes, self._folder, self.lowered, disk_bytes=self._disk_bytes)

    def __call__(self, call: Call) -> Answer:
        """Logits (the first tensor of the outputs) and ``{module name: [feature for each call]}`` of a batch; no gradients lead to them."""
        self._open()
        keys = keys_of(call) if self._remembers else None
        if keys is None:
            self.misses += max(batch_size(call), 1)
            return self._infer(call)
        answer = None
        if len(keys.samples) > 1:
            if self._independent.get(keys.layout, True):
                answer = self._by_sample(call, keys)
            else:
                self.by_sample = False
        return self._by_batch(call, keys) if answer is None else answer

    def _by_sample(self, call: Call, keys: Keys) -> Answer | None:
        """The answer to a batch, of which only unknown samples are computed. None where samples cannot be told apart."""
        size, found = len(keys.samples), self._answers.find(keys.samples, device_of(call))
        if not found.positions and keys.layout not in self._independent:
            return self._first_batch(call, keys)
        known = found.positions
        missing = sorted(set(range(size)) - set(known))
        if missing:
            fresh = self._rows(call, missing, known)
            if fresh is None or not found.fits(*fresh):
                self._independent[keys.layout] = self.by_sample = False
                return None
            self._answers.keep([keys.samples[i] for i in missing], *fresh)
            found = found.joined(missing, *fresh)
        # A layout that was not tried here but has answers on disk was tried by whoever wrote them.
        self._independent[keys.layout] = self.by_sample = True
        self._count(len(known), len(missing), found.read)
        return self._answer(found.ordered(), found.note)

    @property
    def lowered(self) -> Callable[..., Any] | None:
        """The faster form in use, or None."""
        return self._infer.lowered

    def _first_batch(self, call: Call, keys: Keys) -> Answer:
        """Tries whether samples are independent, and remembers the answer accordingly."""
        if (answer := self._known_batch(call, keys)) is not None:  # by an earlier run, which has tried it
            self._independent[keys.layout] = self.by_sample = False
            return answer
        answer = self._infer(call)
        self._independent[keys.layout] = self.by_sample = apart = self._tried(call, answer)
        self._keep(keys.samples if apart else None, keys, answer)
        self._count(0, len(keys.samples))
        return answer

    def _by_batch(self, call: Call, keys: Keys) -> Answer:
        if (answer := self._known_batch(call, keys)) is None:
            self._count(0, max(len(keys.samples), 1))
            answer = self._infer(call)
            self._keep(None, keys, answer)
        return answer

    def _known_batch(self, call: Call, keys: Keys) -> Answer | None:
        found = self._answers.find([keys.whole], device_of(call))
        if not found.positions:
            return None
        size = max(len(keys.samples), 1)
        self._count(size, 0, size * found.read)
        return self._answer([t[0] for t in found.tensors], found.note)

    def _keep(self, samples: Sequence[bytes] | None, keys: Keys, answer: Answer) -> None:
        """By sample, or the whole batch as one row."""
        tensors, note = _flat(answer)
        if samples is None:
            samples, tensors = [keys.whole], [t.unsqueeze(0) for t in tensors]
        self._answers.keep(samples, tensors, note)

    def _rows(self, call: Call, missing: list[int], known: list[int]) -> tuple[list[Tensor], str] | None:
        """Computed answers to some samples, and their note; None if they are no rows."""
        rows = missing if len(missing) > 1 else [*missing, known[0]]  # none alone: models may treat one sample differently
        try:
            tensors, note = _flat(self._infer(part_of(call, rows) if known else call))
        except Exception:
            if not known:
                raise
            return None  # if the batch is wrong, running it whole will tell
        return ([t[: len(missing)] for t in tensors], note) if _have_rows(tensors, len(rows)) else None

    def _tried(self, call: Call, answer: Answer) -> bool:
        """True if a part of the batch, in another order, is answered as within the batch."""
        size = batch_size(call)
        rows = [*range(size // 2, size)][::-1] if size > 2 else [1, 1]
        whole, note = _flat(answer)
        if not _have_rows(whole, size):
            return False
        try:
            part, told = _flat(self._infer.again(part_of(call, rows)))
        except Exception:  # a form with a fixed batch, or an argument whose first axis only looks like the batch
            return False
        index = torch.tensor(rows)
        return note == told and all(_agree(a, b[index.to(b.device)]) for a, b in zip(part, whole, strict=True))

    def _answer(self, tensors: list[Tensor], note: str) -> Answer:
        """The inverse of `_flat`."""
        rest = iter(tensors[1:])
        return tensors[0], {name: [next(rest) for _ in range(count)] for name, count in zip(self.names, json.loads(note), strict=True)}

    def _count(self, hits: int, misses: int, reads: int = 0) -> None:
        self.hits, self.misses, self.reads = self.hits + hits, self.misses + misses, self.reads + reads

    def _open(self) -> None:
        """Opens the folder of this teacher at the first call: until then its weights may be loaded."""
        if self._folder is None or self._answers.disk is not None:
            return
        own = fingerprint(self.model, self.names, self.lowered is not None)
        if own is None:
            warnings.warn("the teacher's answers are not kept on disk: it holds state that is no tensor or plain value", stacklevel=3)
            self._folder, self._remembers = None, self._answers.free > 0
        else:
            self._answers.disk = Shards(self._folder, own, self._disk_bytes)


def _flat(answer: Answer) -> tuple[list[Tensor], str]:
    """All tensors of an answer, and how many each module gave."""
    logits, features = answer
    return [logits, *(t for tensors in features.values() for t in tensors)], json.dumps([len(tensors) for tensors in features.values()])


def _have_rows(tensors: Sequence[Tensor], count: int) -> bool:
    return all(t.dim() > 0 and len(t) == count for t in tensors)


def _agree(part: Tensor, whole: Tensor) -> bool:
    """True if two answers ``[N, ...]`` differ by rounding alone, row by row.

    Another batch size means other kernels and another order of sums: some 1e-6 of the norm in float32, a unit in the last place or so in
    shorter types. Samples that see one another (statistics of the batch, attention across it) differ by 1e-2 and more.
    """
    if part.shape != whole.shape or part.dtype != whole.dtype:
        return False
    if not whole.is_floating_point():
        return torch.equal(part, whole)
    shortest = [whole.dtype, *(torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind))]
    allowed = max(ROUNDING, *(torch.finfo(dtype).eps for dtype in shortest))
    if whole.is_cuda and torch.backends.cudnn.allow_tf32:
        allowed = max(allowed, 2.0**-10)  # what TF32 keeps of a float32
    a, b = (x.double().reshape(len(x), -1) for x in (part, whole))
    if not torch.equal(a.isfinite(), b.isfinite()):
        return False
    a, b = (x.nan_to_num(0.0, 0.0, 0.0) for x in (a, b))  # answers that are ruled out are -inf
    size = b.norm(dim=1)
    return bool(((a - b).norm(dim=1) <= allowed * (size + size.mean())).all())
